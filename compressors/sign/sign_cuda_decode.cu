// Payloads of signs back into sums on a GPU. Bytes from peers are untrusted: the first kernel checks headers and scales; any bits are
// sound.

#include "compressors/core/cuda_payload.cuh"
#include "compressors/sign/sign_cuda_lanes.cuh"

namespace thinwire::sign {
namespace {

constexpr std::uint32_t kScalesOfOne = 4096;  // scales that one block checks

/// One block per rank for the header, and one per rank and kScalesOfOne scales.
__global__ void __launch_bounds__(kThreads) check_kernel(DecodeCall call) {
  const auto units = std::uint32_t((call.shape.scales + kScalesOfOne - 1) / kScalesOfOne + 1);
  const std::uint32_t rank = blockIdx.x / units, unit = blockIdx.x % units;
  const std::byte* const payload = call.wire + rank * call.stride;
  const DevicePart& part = call.table.parts[call.apart ? rank : 0];
  if (unit == 0) {
    wire::Header sound = call.header;
    sound.plan = part.fingerprint;
    sound.segments = part.segments;
    return check_header(reinterpret_cast<const std::uint32_t*>(payload), sound, rank, call.flags, call.report);
  }
  const auto* const scales = reinterpret_cast<const float*>(payload + sizeof(wire::Header));
  const std::size_t first = std::size_t(unit - 1) * kScalesOfOne;
  for (std::size_t i = first + threadIdx.x; i < first + kScalesOfOne && i < part.scales; i += kThreads) {
    const float scale = scales[i];
    if (!is_finite(scale) || scale < 0.0f)
      report_corrupt(call.flags, call.report, unsigned(Fault::scale), rank, std::uint32_t(i), float_bits(scale), part.scales);
  }
}

/// A group of one rank's values.
struct Values {
  std::uint32_t bits;
  float scale;
  __device__ Values(const DecodeCall& call, const DeviceSegment& segment, std::uint32_t rank, std::uint64_t i, std::uint64_t scale_index) {
    // A segment's places are those of payloads without a gap between the parts.
    const std::byte* const payload = call.wire + rank * call.stride + (call.apart ? segment.part * (call.stride - call.shape.capacity) : 0);
    bits = std::uint32_t(payload[segment.bits_at + i / 8]) >> (i % 8);
    scale = scales_of_segment(payload, segment)[scale_index];
  }
  __device__ float operator[](unsigned j) const { return value_of(((bits >> j) & 1u) != 0, scale); }
};

/// Rounds a group once to the output's dtype and stores its first `in`. @returns whether all of it is finite.
__device__ inline bool store_output(const DecodeCall& call, std::size_t i, std::uint32_t in, const float* x) {
  std::byte* const at = call.out + i * size_of(call.dtype);
  bool finite = true;
  if (in >= kGroup && call.dtype == DType::fp32 && aligned(at, 16)) {
    *reinterpret_cast<float4*>(at) = float4{x[0], x[1], x[2], x[3]};
    for (unsigned j = 0; j < kGroup; ++j) finite &= is_finite(x[j]);
  } else if (in >= kGroup && call.dtype != DType::fp32 && aligned(at, 8)) {
    std::uint16_t half[kGroup];
    for (unsigned j = 0; j < kGroup; ++j) finite &= store_element(reinterpret_cast<std::byte*>(half), call.dtype, j, x[j]);
    *reinterpret_cast<uint2*>(at) = uint2{half[0] | unsigned(half[1]) << 16, half[2] | unsigned(half[3]) << 16};
  } else {
#pragma unroll
    for (unsigned j = 0; j < kGroup; ++j)
      if (j < in) finite &= store_element(call.out, call.dtype, i + j, x[j]);
  }
  return finite;
}

/// One block per chunk of the output: neighbouring pairs of ranks are added, then their sums in turn. Reads each rank's bits once, writes
/// the output once.
__global__ void __launch_bounds__(kThreads) decode_kernel(DecodeCall call) {
  const Chunk chunk(call.table, blockIdx.x);
  const DeviceSegment& segment = call.table.segments[chunk.segment];
  const float factor = call.factor.read(), output_factor = call.output_factor.read();
  float sum[kElements];
  std::uint64_t scale[kGroups];
#pragma unroll
  for (unsigned v = 0; v < kGroups; ++v) scale[v] = chunk.scale(group_start(v));
  for (std::uint32_t r = 0; r < call.world; r += 2) {
#pragma unroll
    for (unsigned v = 0; v < kGroups; ++v) {
      const std::uint32_t i = group_start(v);
      if (i >= chunk.count) break;
      const Values a(call, segment, r, chunk.start + i, scale[v]);
      const bool pair = r + 1 < call.world;
      const Values b(call, segment, pair ? r + 1 : r, chunk.start + i, scale[v]);
#pragma unroll
      for (unsigned j = 0; j < kGroup; ++j) {
        const float value = pair ? a[j] + b[j] : a[j];
        float& own = sum[v * kGroup + j];
        own = r == 0 ? value : own + value;
      }
    }
  }
  bool finite = true;
#pragma unroll
  for (unsigned v = 0; v < kGroups; ++v) {
    const std::uint32_t i = group_start(v);
    if (i >= chunk.count) break;
    const std::uint32_t alive = live_group(segment.live, chunk.start + i, chunk.count - i);
    float mean[kGroup];
#pragma unroll
    for (unsigned j = 0; j < kGroup; ++j) mean[j] = ((alive >> j) & 1u) != 0 ? sum[v * kGroup + j] * factor : 0.0f;
    if (call.estimates) {
      float* const estimate = segment.mean_estimate + chunk.start + i;
      float held[kGroup];
      load_group(estimate, chunk.count - i, held);
#pragma unroll
      for (unsigned j = 0; j < kGroup; ++j) {
        held[j] = feedback::saturated(held[j] + mean[j]);
        mean[j] = held[j] * output_factor;
      }
      store_group(estimate, chunk.count - i, held);
    }
    finite &= store_output(call, segment.range.first + chunk.start + i, chunk.count - i, mean);
  }
  if (!finite && call.flags != nullptr) raise(call.flags);
}

/// One block per chunk of this rank's own payloads, which need no check.
__global__ void __launch_bounds__(kThreads) take_back_kernel(DecodeCall call, const float* beta1, const std::uint32_t* verdict) {
  if (verdict != nullptr && (*verdict & kFlagNonfinite) == 0) return;
  const Chunk chunk(call.table, blockIdx.x);
  const DeviceSegment& segment = call.table.segments[chunk.segment];
#pragma unroll
  for (unsigned v = 0; v < kGroups; ++v) {
    const std::uint32_t i = group_start(v);
    if (i >= chunk.count) break;
    const std::uint32_t in = chunk.count - i, alive = live_group(segment.live, chunk.start + i, in);
    const Values sent(call, segment, 0, chunk.start + i, chunk.scale(i));
    float x[kGroup], m[kGroup] = {};
    load_group(segment.residual.from(chunk.start + i), in, x);
    if (beta1 != nullptr) load_group(segment.momentum + chunk.start + i, in, m);
    for (unsigned j = 0; j < kGroup; ++j) {
      if (((alive >> j) & 1u) == 0) continue;
      x[j] += sent[j];
      // The momentum has not moved: the next message will hold beta1·m again.
      if (beta1 != nullptr) x[j] -= beta1[chunk.segment] * m[j];
    }
    store_group(segment.residual.from(chunk.start + i), in, x);
  }
}

}  // namespace

void launch_decode(const DecodeCall& call, Stream stream) {
  const std::size_t units = (call.shape.scales + kScalesOfOne - 1) / kScalesOfOne + 1;
  launch("sign check", check_kernel, (call.apart ? call.shape.parts : call.world) * units, kThreads, stream, call);
  launch("sign decode", decode_kernel, call.shape.chunks, kThreads, stream, call);
}

void launch_take_back(const DecodeCall& call, const float* beta1, const std::uint32_t* verdict, Stream stream) {
  launch("sign take back", take_back_kernel, call.shape.chunks, kThreads, stream, call, beta1, verdict);
}

}  // namespace thinwire::sign
