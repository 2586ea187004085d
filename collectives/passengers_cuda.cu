#include "collectives/passengers_cuda.hpp"

#include <algorithm>

#include "compressors/core/device_ranges.cuh"
#include "compressors/core/dtype.hpp"

namespace thinwire {
namespace {

using namespace thinwire::cuda;

__global__ void __launch_bounds__(kThreads)
    sum_kernel(DeviceRanges ranges, RankMessages messages, DeviceFactor factor, std::byte* out, DType dtype, std::uint32_t* flags) {
  const Chunk chunk(ranges, blockIdx.x);
  const DeviceDense& dense = dense_of(ranges, chunk.segment);
  const std::uint64_t start = chunk.start, end = start + chunk.count;
  const float product = factor.read();
  bool bad = false;
  for (std::uint64_t i = start + threadIdx.x; i < end; i += kThreads) {
    float sum = 0;
    for (int r = 0; r < messages.world; ++r)
      sum += load_element(messages.first + std::size_t(r) * messages.stride, messages.dtype, dense.packed + i);
    bad |= !store_element(out, dtype, dense.range.first + i, sum * product);
  }
  if (bad) atomicOr(flags, std::uint32_t(kFlagNonfinite));
}

/// x · factor in `dtype`, as bits; `bad` is raised where that is not finite.
template <DType dtype>
__device__ inline std::uint32_t scaled(std::uint32_t bits, float factor, bool& bad) {
  if constexpr (dtype == DType::fp32) {
    const float x = (0.0f + bits_float(bits)) * factor;
    bad |= !is_finite(x);
    return float_bits(x);
  } else {
    const float x = (0.0f + half_to_float<dtype>(std::uint16_t(bits))) * factor;
    const std::uint16_t out = dtype == DType::bf16 ? float_to_bf16(x) : float_to_fp16(x);
    constexpr std::uint32_t exponent = dtype == DType::bf16 ? 0x7f80u : 0x7c00u;
    bad |= (out & exponent) == exponent;
    return out;
  }
}
template <DType dtype>
__device__ inline std::uint32_t scaled_word(std::uint32_t word, float factor, bool& bad) {
  if constexpr (dtype == DType::fp32) return scaled<dtype>(word, factor, bad);
  return scaled<dtype>(word & 0xffffu, factor, bad) | scaled<dtype>(word >> 16, factor, bad) << 16;
}

constexpr unsigned kInFlight = 4;  // 16-byte words of one thread that are on their way together

/// Reads and writes `count` elements once, in 16-byte words; the few before the first one, for a bucket may begin anywhere, and after the
/// last go one by one.
template <DType dtype>
__global__ void __launch_bounds__(kThreads) scale_kernel(std::byte* data, std::size_t count, float factor, std::uint32_t* flags) {
  constexpr std::size_t per = 16 / size_of(dtype);
  const std::size_t to_word = (16 - reinterpret_cast<std::uintptr_t>(data) % 16) % 16 / size_of(dtype);
  const std::size_t head = to_word < count ? to_word : count, words = (count - head) / per, tail = head + words * per;
  auto* const at = reinterpret_cast<uint4*>(data + head * size_of(dtype));
  const std::size_t stride = std::size_t(gridDim.x) * kThreads;
  bool bad = false;
  for (std::size_t w = std::size_t(blockIdx.x) * kThreads + threadIdx.x; w < words; w += kInFlight * stride) {
    uint4 raw[kInFlight];
#pragma unroll
    for (unsigned q = 0; q < kInFlight; ++q)
      if (w + q * stride < words) raw[q] = at[w + q * stride];
#pragma unroll
    for (unsigned q = 0; q < kInFlight; ++q) {
      if (w + q * stride >= words) continue;
      raw[q].x = scaled_word<dtype>(raw[q].x, factor, bad);
      raw[q].y = scaled_word<dtype>(raw[q].y, factor, bad);
      raw[q].z = scaled_word<dtype>(raw[q].z, factor, bad);
      raw[q].w = scaled_word<dtype>(raw[q].w, factor, bad);
      at[w + q * stride] = raw[q];
    }
  }
  if (blockIdx.x == 0 && threadIdx.x < head + (count - tail)) {
    const std::size_t i = threadIdx.x < head ? threadIdx.x : tail + (threadIdx.x - head);
    if constexpr (dtype == DType::fp32) {
      auto* const element = reinterpret_cast<std::uint32_t*>(data) + i;
      *element = scaled<dtype>(*element, factor, bad);
    } else {
      auto* const element = reinterpret_cast<std::uint16_t*>(data) + i;
      *element = std::uint16_t(scaled<dtype>(*element, factor, bad));
    }
  }
  if (bad) atomicOr(flags, std::uint32_t(kFlagNonfinite));
}

__global__ void __launch_bounds__(kThreads) add_server_kernel(DeviceRanges ranges, float world, float* messages) {
  const Chunk chunk(ranges, blockIdx.x);
  const DeviceDense& dense = dense_of(ranges, chunk.segment);
  const std::uint64_t start = chunk.start, end = start + chunk.count;
  for (std::uint64_t i = start + threadIdx.x; i < end; i += kThreads) messages[dense.packed + i] += world * dense.residual[i];
}

__global__ void __launch_bounds__(kThreads) place_kernel(DeviceRanges ranges, const std::byte* packed, std::byte* out, DType dtype) {
  const Chunk chunk(ranges, blockIdx.x);
  const DeviceDense& dense = dense_of(ranges, chunk.segment);
  const std::uint64_t start = chunk.start, end = start + chunk.count;
  for (std::uint64_t i = start + threadIdx.x; i < end; i += kThreads) {
    if (dtype == DType::fp32) {
      reinterpret_cast<std::uint32_t*>(out)[dense.range.first + i] = reinterpret_cast<const std::uint32_t*>(packed)[dense.packed + i];
    } else {
      reinterpret_cast<std::uint16_t*>(out)[dense.range.first + i] = reinterpret_cast<const std::uint16_t*>(packed)[dense.packed + i];
    }
  }
}

__global__ void begin_kernel(DeviceFactor loss_scale, float mean, bool norms, bool judged, std::uint32_t* flags, DeviceScales* scales,
                             std::uint64_t* wrong) {
  const float scale = loss_scale.read();
  const bool sound = scale > 0 && is_finite(scale);
  scales->unscale = 1.0f / scale;
  scales->mean = mean * scale;
  scales->loss = scale;
  if (norms) scales->norm_unscale = 1.0f / scale;
  *flags = !sound && judged ? std::uint32_t(kFlagNonfinite) : 0u;
  if (!sound) *static_cast<volatile std::uint64_t*>(wrong) = kWrongScale | float_bits(scale);
}

__global__ void add_flags_kernel(const std::uint32_t* flags, std::uint32_t* to) { *to |= *flags; }
__global__ void count_flag_kernel(const std::uint32_t* flags, float* count) { *count = (*flags & kFlagNonfinite) != 0 ? 1.0f : 0.0f; }
__global__ void read_flag_kernel(const float* count, std::uint32_t* flags) {
  if (*count != 0.0f) *flags |= kFlagNonfinite;
}

__global__ void __launch_bounds__(kThreads)
    verdict_kernel(std::byte* grad, DType dtype, std::size_t count, const std::uint32_t* flags, std::uint32_t* step_flags) {
  if ((*flags & kFlagNonfinite) == 0) return;
  if (blockIdx.x == 0 && threadIdx.x == 0) atomicOr(step_flags, std::uint32_t(kFlagNonfinite));
  for (std::size_t i = std::size_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += std::size_t(gridDim.x) * kThreads) {
    if (dtype == DType::fp32) {
      reinterpret_cast<std::uint32_t*>(grad)[i] = nan_bits(DType::fp32);
    } else {
      reinterpret_cast<std::uint16_t*>(grad)[i] = std::uint16_t(nan_bits(dtype));
    }
  }
}

__global__ void end_step_kernel(DeviceCounters* counters, std::uint32_t* verdict) {
  *verdict = counters->step_flags;
  if ((counters->step_flags & kFlagNonfinite) != 0) {
    ++counters->nonfinite_steps;
  } else {
    counters->started = 1;
  }
  counters->step_flags = 0;
}

__global__ void __launch_bounds__(kThreads) clear_kernel(const DeviceCounters* counters, float* state, std::size_t count) {
  if (counters->started != 0) return;
  for (std::size_t i = std::size_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += std::size_t(gridDim.x) * kThreads) state[i] = 0;
}

/// Blocks of a loop over `count` elements, each several.
std::size_t blocks_for(std::size_t count) {
  return count == 0 ? 0 : std::min<std::size_t>((count + 8 * kThreads - 1) / (8 * kThreads), 4096);
}

}  // namespace

void launch_sum(const DeviceRanges& ranges, const RankMessages& messages, DeviceFactor factor, Bytes out, std::uint32_t* flags,
                Stream stream) {
  launch("sum in rank order", sum_kernel, ranges.chunks, kThreads, stream, ranges, messages, factor, out.data, out.dtype, flags);
}
void launch_scale(Bytes data, float factor, std::uint32_t* flags, Stream stream) {
  const std::size_t words = data.size / 16 + 1,
                    blocks = std::min<std::size_t>((words + kInFlight * kThreads - 1) / (kInFlight * kThreads), 4096);
  const auto run = [&](auto kernel) {
    launch("scale", kernel, data.size == 0 ? 0 : blocks, kThreads, stream, data.data, data.count(), factor, flags);
  };
  if (data.dtype == DType::fp32) run(scale_kernel<DType::fp32>);
  if (data.dtype == DType::bf16) run(scale_kernel<DType::bf16>);
  if (data.dtype == DType::fp16) run(scale_kernel<DType::fp16>);
}
void launch_place(const DeviceRanges& ranges, const std::byte* packed, Bytes out, Stream stream) {
  launch("place", place_kernel, ranges.chunks, kThreads, stream, ranges, packed, out.data, out.dtype);
}
void launch_begin(DeviceFactor loss_scale, float mean, bool norms, bool judged, std::uint32_t* flags, DeviceScales* scales,
                  std::uint64_t* wrong, Stream stream) {
  launch("begin", begin_kernel, 1, 1, stream, loss_scale, mean, norms, judged, flags, scales, wrong);
}
void launch_add_server_residuals(const DeviceRanges& ranges, int world, float* messages, Stream stream) {
  launch("add server residuals", add_server_kernel, ranges.chunks, kThreads, stream, ranges, float(world), messages);
}
void launch_add_flags(const std::uint32_t* flags, std::uint32_t* to, Stream stream) {
  launch("add flags", add_flags_kernel, 1, 1, stream, flags, to);
}
void launch_count_flag(const std::uint32_t* flags, float* count, Stream stream) {
  launch("count flag", count_flag_kernel, 1, 1, stream, flags, count);
}
void launch_read_flag(const float* count, std::uint32_t* flags, Stream stream) {
  launch("read flag", read_flag_kernel, 1, 1, stream, count, flags);
}
void launch_verdict(Bytes grad, const std::uint32_t* flags, std::uint32_t* step_flags, Stream stream) {
  launch("verdict", verdict_kernel, std::max<std::size_t>(blocks_for(grad.count()), 1), kThreads, stream, grad.data, grad.dtype,
         grad.count(), flags, step_flags);
}
void launch_end_step(DeviceCounters* counters, std::uint32_t* verdict, Stream stream) {
  launch("end of step", end_step_kernel, 1, 1, stream, counters, verdict);
}
void launch_clear_unless_started(const DeviceCounters* counters, float* state, std::size_t count, Stream stream) {
  launch("clear state", clear_kernel, blocks_for(count), kThreads, stream, counters, state, count);
}

}  // namespace thinwire
