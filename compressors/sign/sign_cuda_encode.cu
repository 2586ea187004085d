// The fused pass on a GPU: messages, their bits, ordered sums, scales and what they leave behind.

#include <algorithm>

#include "compressors/sign/sign_cuda_lanes.cuh"

namespace thinwire::sign {
namespace {

constexpr std::size_t kSlice = 65536;  // bytes of a payload that one block pads at most

/// Headers and padding of all parts, and how many elements each segment sends. With `empty` everything behind the headers is padding.
/// One block per part and slice of its payload.
__global__ void __launch_bounds__(kThreads) prologue_kernel(EncodeCall call, bool empty) {
  constexpr unsigned kFlags = offsetof(wire::Header, flags) / 4, kSegments = offsetof(wire::Header, segments) / 4,
                     kPlan = offsetof(wire::Header, plan) / 4;
  const std::size_t slices = call.shape.capacity / kSlice + 1, r = blockIdx.x / slices, slice = blockIdx.x % slices;
  const DevicePart& part = call.table.parts[r];
  std::byte* const payload = call.wire + r * call.shape.capacity;
  if (slice == 0 && threadIdx.x < sizeof(wire::Header) / 4) {
    std::uint32_t word = reinterpret_cast<const std::uint32_t*>(&call.header)[threadIdx.x];
    if (threadIdx.x == kFlags && call.flags != nullptr) word = *call.flags;
    if (threadIdx.x == kSegments) word = part.segments;
    if (threadIdx.x == kPlan) word = std::uint32_t(part.fingerprint);
    if (threadIdx.x == kPlan + 1) word = std::uint32_t(part.fingerprint >> 32);
    reinterpret_cast<std::uint32_t*>(payload)[threadIdx.x] = word;
  }
  const std::size_t used = empty ? sizeof(wire::Header) : part.bytes, end = (slice + 1) * kSlice;
  std::size_t i = slice * kSlice;
  i = (i < used ? used : i) + threadIdx.x;
  for (; i < end && i < call.shape.capacity; i += kThreads) payload[i] = std::byte{0};
  if (blockIdx.x != 0 || call.kept == nullptr) return;
  for (std::size_t s = threadIdx.x; s < call.shape.segments; s += kThreads) {
    const std::uint64_t count = call.table.segments[s].range.count;
    call.kept[s] = count < 0xffffffffu ? std::uint32_t(count) : 0xffffffffu;
  }
}

/// A tile and where it lies.
struct Tile {
  std::uint32_t segment;
  std::uint64_t scale;  ///< its first scale among the segment's
  std::uint64_t start;  ///< element of the segment, a multiple of 8
  std::uint32_t count;

  __device__ Tile(const DeviceTable& table, std::uint32_t id) : segment(table.tile_segment[id]) {
    const DeviceSegment& own = table.segments[segment];
    const std::uint32_t index = id - own.first_tile;
    const std::uint64_t from = own.wide() ? std::uint64_t(index % own.pieces) * kSumBlock : 0;
    scale = own.wide() ? index / own.pieces : std::uint64_t(index) * (own.tile / own.block);
    start = scale * own.block + from;
    const std::uint64_t room = own.wide() ? own.block - from : own.tile, left = own.range.count - start;
    count = std::uint32_t(room < left ? room : left);
    if (count > kSumBlock) count = kSumBlock;
  }
};

/// A block's scale as it is sent. What a scale may depend on besides its sum comes in here.
__device__ inline float sent_scale(const EncodeCall& call, double sum, std::uint64_t live) {
  Output output = call.output;
  if (call.output_factor != nullptr) output.factor = *call.output_factor;
  return fit(scale_of(sum, live, call.scale), output);
}

__device__ inline float weight_of(Scale scale, float magnitude) {
  return scale == Scale::l1 ? weight<Scale::l1>(magnitude) : weight<Scale::l2>(magnitude);
}

/// Σ of the weights of n magnitudes in the order of block_sum.hpp, by a whole warp: lane l has partials l and l + 32, which are the first
/// halves. @returns the sum, to lane 0.
__device__ inline float ordered_sum(const float* magnitudes, std::uint32_t n, Scale scale) {
  float low = 0, high = 0;
  for (std::uint32_t i = lane(); i < n; i += kPartials) {
    low += weight_of(scale, magnitudes[i]);
    if (i + kPartials / 2 < n) high += weight_of(scale, magnitudes[i + kPartials / 2]);
  }
  float sum = low + high;
  for (unsigned width = kPartials / 4; width != 0; width /= 2) sum += __shfl_down_sync(kFullWarp, sum, width);
  return sum;
}

/// The same where fp32 does not hold it. By one thread.
__device__ double wide_sum(const float* magnitudes, std::uint32_t n, Scale scale) {
  double sum = 0;
  for (std::uint32_t i = 0; i < n; ++i) {
    const double magnitude = magnitudes[i];
    sum += scale == Scale::l1 ? magnitude : magnitude * magnitude;
  }
  return sum;
}

/// Live elements among n from element `from` on, a multiple of 8. By a whole warp, to all lanes.
__device__ inline std::uint32_t count_live(const std::uint8_t* live, std::uint64_t from, std::uint32_t n) {
  if (live == nullptr) return n;
  std::uint32_t count = 0;
  for (std::uint32_t i = 8 * lane(); i < n; i += 8 * 32) {
    const std::uint32_t in = n - i < 8 ? (1u << (n - i)) - 1 : 255u;
    count += std::uint32_t(__popc(live[(from + i) / 8] & in));
  }
  return warp_sum(count);
}

/// What a thread has in registers of its elements: gradients, and the state that the form has.
template <Form form>
struct Held {
  float g[kElements];
  float x[kElements];  ///< the residual; then what stays of it if nothing is sent: the message, but for forms with an estimate
  float m[kElements];  ///< the momentum, or the average
  float h[kElements];  ///< the estimate

  /// All loads first, so that they are in flight together: of a whole tile without a branch among them, and before a conversion waits for
  /// one.
  __device__ Held(const EncodeCall& call, const DeviceSegment& segment, const Tile& tile) {
    const float* const second = feedback::is_averaged(form) ? segment.momentum : segment.average;
    const std::byte* const grad = call.grad + (segment.range.first + tile.start) * size_of(call.dtype);
    const bool wide = call.dtype == DType::fp32;
    if (tile.count == kSumBlock && aligned(grad, wide ? 16 : 8) && !segment.residual.narrow() && !segment.estimate.narrow()) {
      uint4 raw[kGroups];
      if (wide) {
#pragma unroll
        for (unsigned v = 0; v < kGroups; ++v) raw[v] = reinterpret_cast<const uint4*>(grad)[group_start(v) / kGroup];
      } else {
#pragma unroll
        for (unsigned v = 0; v < kGroups; ++v) {
          const uint2 halves = reinterpret_cast<const uint2*>(grad)[group_start(v) / kGroup];
          raw[v].x = halves.x, raw[v].y = halves.y;
        }
      }
#pragma unroll
      for (unsigned v = 0; v < kGroups; ++v) {
        const std::uint64_t at = tile.start + group_start(v);
        if constexpr (feedback::has_residual(form)) load_group(segment.residual.fp32() + at, kGroup, x + v * kGroup);
        if constexpr (feedback::is_averaged(form) || feedback::is_smoothed(form)) load_group(second + at, kGroup, m + v * kGroup);
        if constexpr (feedback::has_estimate(form)) load_group(segment.estimate.fp32() + at, kGroup, h + v * kGroup);
      }
      if (wide) {
#pragma unroll
        for (unsigned v = 0; v < kGroups; ++v) to_floats<DType::fp32>(raw[v], g + v * kGroup);
      } else if (call.dtype == DType::bf16) {
#pragma unroll
        for (unsigned v = 0; v < kGroups; ++v) to_floats<DType::bf16>(raw[v], g + v * kGroup);
      } else {
#pragma unroll
        for (unsigned v = 0; v < kGroups; ++v) to_floats<DType::fp16>(raw[v], g + v * kGroup);
      }
      return;
    }
#pragma unroll
    for (unsigned v = 0; v < kGroups; ++v) {
      const std::uint32_t i = group_start(v), in = i < tile.count ? tile.count - i : 0;
      const std::uint64_t at = tile.start + i;
      load_group(call.grad, call.dtype, segment.range.first + at, in, g + v * kGroup);
      if constexpr (feedback::has_residual(form)) load_group(segment.residual.from(at), in, x + v * kGroup);
      if constexpr (feedback::is_averaged(form) || feedback::is_smoothed(form)) load_group(second + at, in, m + v * kGroup);
      if constexpr (feedback::has_estimate(form)) load_group(segment.estimate.from(at), in, h + v * kGroup);
    }
  }
  /// Element e's message; its state is what it keeps if nothing is sent.
  __device__ float message(const EncodeCall& call, float rate, unsigned e, float factor, float beta, bool& finite) {
    const float residual = feedback::has_residual(form) ? x[e] : 0.0f,
                second = feedback::is_averaged(form) || feedback::is_smoothed(form) ? m[e] : 0.0f;
    if constexpr (feedback::has_estimate(form)) {
      const feedback::Estimated element = feedback::estimated<form>(g[e] * factor, rate, call.keep, call.fresh, h[e], residual, second);
      finite &= element.finite;
      x[e] = element.residual, m[e] = element.average;
      return element.x;
    } else {
      x[e] = message_of<form>(g[e] * factor, rate, beta, second, residual, finite);
      return x[e];
    }
  }
  /// What live elements of group v keep now that their bits were sent.
  __device__ void send(unsigned v, float scale, std::uint32_t bits, std::uint32_t alive) {
    if constexpr (feedback::has_estimate(form)) {
#pragma unroll
      for (unsigned j = 0; j < kGroup; ++j)
        if (((alive >> j) & 1u) != 0) feedback::send(value_of(((bits >> j) & 1u) != 0, scale), x[v * kGroup + j], h[v * kGroup + j]);
    } else {
      leave_group(scale, bits, alive, x + v * kGroup);
    }
  }
  __device__ void store(const DeviceSegment& segment, const Tile& tile, unsigned v) const {
    const std::uint32_t i = group_start(v), in = tile.count - i;
    const std::uint64_t at = tile.start + i;
    if constexpr (feedback::has_residual(form)) store_group(segment.residual.from(at), in, x + v * kGroup);
    if constexpr (feedback::is_smoothed(form)) store_group(segment.average + at, in, m + v * kGroup);
    if constexpr (feedback::has_estimate(form)) store_group(segment.estimate.from(at), in, h + v * kGroup);
  }
};

__device__ inline float factor_of(const EncodeCall& call, std::uint32_t segment) {
  return call.grad_factor != nullptr ? call.grad_factor[segment] : 1.0f;
}
/// Chunk::rate.
template <Form form>
__device__ inline float rate_of(const EncodeCall& call, const DeviceSegment& segment) {
  return feedback::has_estimate(form) ? feedback::limited_eta(segment.eta, segment.eta_limit) : call.rate;
}

/// One block per tile: reads gradient and state once. Where the tile holds whole blocks, messages stay in registers until the scales are
/// known and the state is written once; else the residual takes the messages, and what cannot hold them writes nothing yet.
template <Form form>
__global__ void __launch_bounds__(kThreads) stream_kernel(EncodeCall call) {
  alignas(16) __shared__ float magnitudes[kSumBlock];
  __shared__ float scales[kSumBlock / 8];
  const Tile tile(call.table, blockIdx.x);
  const DeviceSegment segment = call.table.segments[tile.segment];
  const float factor = factor_of(call, tile.segment), rate = rate_of<form>(call, segment);
  const float beta = feedback::is_averaged(form) ? call.beta1[tile.segment] : 0.0f;
  Held<form> held(call, segment, tile);

  bool finite = true;
  std::uint32_t bits = 0, alive = 0;  // kGroup of each group
  auto* const wire_bits = reinterpret_cast<std::uint8_t*>(call.wire + segment.bits_at);
#pragma unroll
  for (unsigned v = 0; v < kGroups; ++v) {
    const std::uint32_t i = group_start(v), in = live_group(segment.live, tile.start + i, i < tile.count ? tile.count - i : 0);
    std::uint32_t own = 0;
    float sizes[kGroup];
#pragma unroll
    for (unsigned j = 0; j < kGroup; ++j) {
      const unsigned e = v * kGroup + j;
      sizes[j] = 0;  // of dead ones: adds nothing
      if (((in >> j) & 1u) != 0) {
        const float message = held.message(call, rate, e, factor, beta, finite);
        sizes[j] = magnitude(message);
        own |= std::uint32_t(bit_of(message)) << j;
      }
    }
    store_group(magnitudes + i, kGroup, sizes);
    // Two lanes make a byte.
    const std::uint32_t upper = __shfl_down_sync(kFullWarp, own, 1);
    if (lane() % 2 == 0 && i < tile.count) wire_bits[(tile.start + i) / 8] = std::uint8_t(own | upper << kGroup);
    bits |= own << (v * kGroup);
    alive |= in << (v * kGroup);
  }
  if (__any_sync(kFullWarp, !finite) != 0 && lane() == 0) {
    for (std::size_t r = 0; r < call.shape.parts; ++r)
      raise(reinterpret_cast<std::uint32_t*>(call.wire + r * call.shape.capacity + offsetof(wire::Header, flags)));
    if (call.flags != nullptr) raise(call.flags);
  }
  __syncthreads();

  const bool wide = segment.wide();
  const auto block = std::uint32_t(wide ? kSumBlock : segment.block);
  for (std::uint32_t b = warp(); b * block < tile.count; b += kWarps) {
    const std::uint32_t from = b * block, n = tile.count - from < block ? tile.count - from : block;
    const float narrow = ordered_sum(magnitudes + from, n, call.scale);
    const std::uint32_t live = count_live(segment.live, tile.start + from, n);
    if (lane() != 0) continue;
    const double sum = is_finite(narrow) ? double(narrow) : wide_sum(magnitudes + from, n, call.scale);
    if (wide) {
      call.scratch.tile_sums[blockIdx.x] = sum;
      call.scratch.tile_live[blockIdx.x] = live;
    } else {
      scales[b] = sent_scale(call, sum, live);
      scales_of_segment(call.wire, segment)[tile.scale + b] = scales[b];
    }
  }
  if constexpr (!feedback::has_residual(form) && !feedback::has_estimate(form)) return;
  if (wide && (!keeps_message(form) || segment.residual.narrow())) return;
  __syncthreads();
#pragma unroll
  for (unsigned v = 0; v < kGroups; ++v) {
    const std::uint32_t i = group_start(v);
    if (i >= tile.count) break;
    if (!wide) held.send(v, scales[i / block], bits >> (v * kGroup), alive >> (v * kGroup));
    held.store(segment, tile, v);
  }
}

/// One block of kPartials per wide block: its tiles' sums in the order of block_sum.hpp.
__global__ void __launch_bounds__(unsigned(kPartials)) scale_kernel(EncodeCall call) {
  __shared__ double sums[kPartials];
  __shared__ std::uint64_t lives[kPartials];
  const DeviceSegment& segment = call.table.segments[call.table.wide_segment[blockIdx.x]];
  const std::uint32_t b = blockIdx.x - segment.first_wide;
  const std::uint64_t left = segment.range.count - b * segment.block, count = left < segment.block ? left : segment.block;
  const auto tiles = std::uint32_t((count + kSumBlock - 1) / kSumBlock);
  const std::size_t first = segment.first_tile + std::size_t(b) * segment.pieces;
  double sum = 0;
  std::uint64_t live = 0;
  for (std::uint32_t q = threadIdx.x; q < tiles; q += kPartials) {
    sum += call.scratch.tile_sums[first + q];
    live += call.scratch.tile_live[first + q];
  }
  sums[threadIdx.x] = sum;
  lives[threadIdx.x] = live;
  __syncthreads();
  if (threadIdx.x == 0) scales_of_segment(call.wire, segment)[b] = sent_scale(call, add_in_halves(sums), add_in_halves(lives));
}

/// One block per tile of a wide block: the residual, which holds the messages, is read and written once.
__global__ void __launch_bounds__(kThreads) leave_kernel(EncodeCall call) {
  const Tile tile(call.table, blockIdx.x);
  const DeviceSegment segment = call.table.segments[tile.segment];
  if (!segment.wide()) return;
  const float scale = scales_of_segment(call.wire, segment)[tile.scale];
  float x[kElements];
#pragma unroll
  for (unsigned v = 0; v < kGroups; ++v) {
    const std::uint32_t i = group_start(v);
    load_group(segment.residual.from(tile.start + i), i < tile.count ? tile.count - i : 0, x + v * kGroup);
  }
#pragma unroll
  for (unsigned v = 0; v < kGroups; ++v) {
    const std::uint32_t i = group_start(v);
    if (i >= tile.count) break;
    std::uint32_t bits = 0;
#pragma unroll
    for (unsigned j = 0; j < kGroup; ++j) bits |= std::uint32_t(bit_of(x[v * kGroup + j])) << j;
    leave_group(scale, bits, live_group(segment.live, tile.start + i, tile.count - i), x + v * kGroup);
    store_group(segment.residual.from(tile.start + i), tile.count - i, x + v * kGroup);
  }
}

/// The same for forms with an estimate, and where the residual is narrow and cannot hold them: messages are made again of gradient and
/// state, then the state is written once.
template <Form form>
__global__ void __launch_bounds__(kThreads) commit_kernel(EncodeCall call) {
  const Tile tile(call.table, blockIdx.x);
  const DeviceSegment segment = call.table.segments[tile.segment];
  if (!segment.wide()) return;
  const float scale = scales_of_segment(call.wire, segment)[tile.scale], factor = factor_of(call, tile.segment),
              rate = rate_of<form>(call, segment);
  const float beta = feedback::is_averaged(form) ? call.beta1[tile.segment] : 0.0f;
  Held<form> held(call, segment, tile);
#pragma unroll
  for (unsigned v = 0; v < kGroups; ++v) {
    const std::uint32_t i = group_start(v);
    if (i >= tile.count) break;
    const std::uint32_t alive = live_group(segment.live, tile.start + i, tile.count - i);
    std::uint32_t bits = 0;
    bool told = true;  // by the first pass
#pragma unroll
    for (unsigned j = 0; j < kGroup; ++j) {
      if (((alive >> j) & 1u) != 0) bits |= std::uint32_t(bit_of(held.message(call, rate, v * kGroup + j, factor, beta, told))) << j;
    }
    held.send(v, scale, bits, alive);
    held.store(segment, tile, v);
  }
}

void launch_prologue(const EncodeCall& call, bool empty, Stream stream) {
  launch("sign headers", prologue_kernel, call.shape.parts * (call.shape.capacity / kSlice + 1), kThreads, stream, call, empty);
}

}  // namespace

void launch_encode(const EncodeCall& call, Form form, Stream stream) {
  launch_prologue(call, false, stream);
  const auto run = [&](auto kernel) { launch("sign stream", kernel, call.shape.tiles, kThreads, stream, call); };
  if (form == Form::none) run(stream_kernel<Form::none>);
  if (form == Form::error_feedback) run(stream_kernel<Form::error_feedback>);
  if (form == Form::averaged) run(stream_kernel<Form::averaged>);
  if (form == Form::averaged_feedback) run(stream_kernel<Form::averaged_feedback>);
  if (form == Form::estimate) run(stream_kernel<Form::estimate>);
  if (form == Form::smoothed_estimate) run(stream_kernel<Form::smoothed_estimate>);
  if (form == Form::control) run(stream_kernel<Form::control>);
  if (form == Form::smoothed_control) run(stream_kernel<Form::smoothed_control>);
  if (call.shape.wides == 0) return;
  launch("sign scales", scale_kernel, call.shape.wides, unsigned(kPartials), stream, call);
  const auto settle = [&](auto kernel) { launch("sign state", kernel, call.shape.tiles, kThreads, stream, call); };
  if (keeps_message(form) && !call.narrow) settle(leave_kernel);
  if (form == Form::error_feedback && call.narrow) settle(commit_kernel<Form::error_feedback>);
  if (form == Form::averaged_feedback && call.narrow) settle(commit_kernel<Form::averaged_feedback>);
  if (form == Form::estimate) settle(commit_kernel<Form::estimate>);
  if (form == Form::smoothed_estimate) settle(commit_kernel<Form::smoothed_estimate>);
  if (form == Form::control) settle(commit_kernel<Form::control>);
  if (form == Form::smoothed_control) settle(commit_kernel<Form::smoothed_control>);
}

void launch_empty(const EncodeCall& call, Stream stream) { launch_prologue(call, true, stream); }

}  // namespace thinwire::sign
