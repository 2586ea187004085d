// The fused pass on a GPU: a sample, thresholds from it, then one pass over gradient and state that emits entries in index order.

#include <algorithm>

#include "compressors/topk/topk_cuda_entries.cuh"

namespace thinwire::topk {
namespace {

// --- 1. The sample -----------------------------------------------------------------------------------------------------------------------

/// One block per kSampleBlock sampled elements: their magnitudes, and those near the carried threshold apart. Clears what later kernels
/// count in, and the payload.
template <Form form, DType dtype>
__global__ void __launch_bounds__(kThreads) sample_kernel(EncodeCall call) {
  clear_share(reinterpret_cast<std::uint32_t*>(call.wire), call.shape.payload_bytes / 4);
  clear_share(call.scratch.cleared, call.scratch.cleared_words);
  if (blockIdx.x >= call.shape.sample_blocks) return;

  __shared__ std::uint32_t near, above, at_least;
  if (threadIdx.x == 0) near = above = at_least = 0;
  __syncthreads();

  const std::uint32_t s = call.table.sample_segment[blockIdx.x];
  const DeviceSegment& segment = call.table.segments[s];
  const std::uint32_t from = (blockIdx.x - segment.first_sample_block) * kSampleBlock + 4 * threadIdx.x;
  const float carried = segment.memory != nullptr ? *segment.memory : 0.0f;
  const float factor = call.grad_factor != nullptr ? call.grad_factor[s] : 1.0f;
  const std::uint32_t threshold = float_bits(carried), low = float_bits(kNear * carried);
  std::uint32_t* const magnitudes = call.scratch.magnitudes + std::size_t(blockIdx.x) * kSampleBlock;
  std::uint32_t* const nearby = call.scratch.near + std::size_t(blockIdx.x) * kSampleBlock;

  const bool whole = segment.sampled == segment.range.count;
  // Four consecutive samples lie in one group.
  const std::size_t first = whole ? from : SampleStrata(segment.range.count, call.draw).first_of(from / kSampleGroup) + from % kSampleGroup;
  for (unsigned j = 0; j < 4 && from + j < segment.sampled; ++j) {
    const std::size_t i = first + j;
    std::uint32_t bits = 0;
    if (is_live(segment.live, i)) {
      float x, residual = 0, u = 0;
      if constexpr (feedback::has_estimate(form)) {
        x = estimated_at<form>(call, segment, factor, i).x;
      } else {
        if constexpr (feedback::has_residual(form)) residual = segment.residual[i];
        if constexpr (feedback::has_momentum(form)) u = segment.momentum[i];
        bool ignored = false;
        x = step_element<form>(load_element<dtype>(call.grad, segment.range.first + i) * factor, call.rate, residual, u, ignored);
      }
      bits = is_finite(x) ? float_bits(magnitude(x)) : 0;
    }
    magnitudes[4 * threadIdx.x + j] = bits;
    if (carried > 0 && bits >= low) {
      nearby[atomicAdd(&near, 1u)] = bits;  // in any order: only their ranks count
      if (bits > threshold) atomicAdd(&above, 1u);
      if (bits >= threshold) atomicAdd(&at_least, 1u);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    call.scratch.near_count[blockIdx.x] = near;
    call.scratch.above[blockIdx.x] = above;
    call.scratch.at_least[blockIdx.x] = at_least;
  }
}

// --- 2. Thresholds -----------------------------------------------------------------------------------------------------------------------

constexpr unsigned kSelectThreads = 1024, kByteBins = 256;

/// The lists that a segment's sample blocks left.
struct Lists {
  const std::uint32_t* items;
  const std::uint32_t* counts;  ///< per list; null: all lists are full but the last
  std::uint32_t lists, total;

  __device__ std::uint32_t count(std::uint32_t list) const {
    if (counts != nullptr) return counts[list];
    const std::uint32_t left = total - list * kSampleBlock;
    return left < kSampleBlock ? left : kSampleBlock;
  }
};

/// The rank-th largest, byte by byte from the top. By a whole block of kSelectThreads.
__device__ std::uint32_t select(const Lists& of, std::uint32_t rank, std::uint32_t* histogram, std::uint32_t* found) {
  std::uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < kByteBins) histogram[threadIdx.x] = 0;
    __syncthreads();
    for (std::uint32_t list = warp(); list < of.lists; list += kSelectThreads / 32) {
      const std::uint32_t count = of.count(list);
      for (std::uint32_t i = lane(); i < count; i += 32) {
        const std::uint32_t bits = of.items[std::size_t(list) * kSampleBlock + i];
        if ((bits & mask) == prefix) atomicAdd(&histogram[(bits >> shift) % kByteBins], 1u);
      }
    }
    __syncthreads();
    if (warp() == 0) {  // lane l looks at eight bins, lane 0 at the largest
      const std::uint32_t top = kByteBins - 1 - 8 * lane();
      std::uint32_t own = 0;
      for (std::uint32_t j = 0; j < 8; ++j) own += histogram[top - j];
      const std::uint32_t through = warp_inclusive_sum(own);
      if (through >= rank && through - own < rank) {
        std::uint32_t above = through - own, bin = top;
        while (above + histogram[bin] < rank) above += histogram[bin--];
        found[0] = bin;
        found[1] = rank - above;
      }
    }
    __syncthreads();
    prefix |= found[0] << shift;
    mask |= 255u << shift;
    rank = found[1];
  }
  return prefix;
}

/// One block per segment. The first one writes the header too.
__global__ void __launch_bounds__(kSelectThreads) threshold_kernel(EncodeCall call) {
  __shared__ std::uint32_t histogram[kByteBins], found[2], near, above, at_least;
  const std::uint32_t s = blockIdx.x;
  if (s == 0 && threadIdx.x < sizeof(wire::Header) / 4) {
    std::uint32_t word = reinterpret_cast<const std::uint32_t*>(&call.header)[threadIdx.x];
    if (threadIdx.x == offsetof(wire::Header, flags) / 4) word = call.flags != nullptr ? *call.flags : 0;
    reinterpret_cast<std::uint32_t*>(call.wire)[threadIdx.x] = word;
  }
  if (s >= call.shape.segments) return;
  if (threadIdx.x == 0 && call.kept != nullptr) call.kept[s] = 0;  // segments without elements are in no chunk
  const DeviceSegment& segment = call.table.segments[s];
  float threshold = call.floor, steepness = kUnknownSteepness;
  if (segment.sampled != 0) {
    const std::uint32_t b = segment.first_sample_block, blocks = (segment.sampled + kSampleBlock - 1) / kSampleBlock;
    if (threadIdx.x == 0) near = above = at_least = 0;
    __syncthreads();
    for (std::uint32_t i = threadIdx.x; i < blocks; i += kSelectThreads) {
      atomicAdd(&near, call.scratch.near_count[b + i]);
      atomicAdd(&above, call.scratch.above[b + i]);
      atomicAdd(&at_least, call.scratch.at_least[b + i]);
    }
    __syncthreads();
    const float carried = segment.memory != nullptr ? *segment.memory : 0.0f;
    const bool steady = carried > 0 && segment.sampled != segment.range.count;
    const std::uint32_t* const counts = call.scratch.near_count + b;
    const Lists all{call.scratch.magnitudes + std::size_t(b) * kSampleBlock, nullptr, blocks, segment.sampled};
    // The wanted ranks are among the few near the carried threshold, unless messages have shrunk since.
    const bool few = carried > 0 && near >= segment.low;
    const Lists lists = few ? Lists{call.scratch.near + std::size_t(b) * kSampleBlock, counts, blocks, near} : all;
    float statistic = carried;
    if (steady && !(above < segment.low && at_least >= segment.high)) {
      statistic = bits_float(select(lists, above >= segment.low ? segment.to_low : segment.to_high, histogram, found));
    } else if (!steady) {
      statistic = bits_float(select(lists, segment.middle, histogram, found));
    }
    threshold = statistic < call.floor ? call.floor : statistic;
    if (steady) steepness = steepness_of(near, segment.middle, carried, threshold);
  }
  if (threadIdx.x == 0) call.scratch.threshold[s] = threshold, call.scratch.steepness[s] = steepness;
}

// --- 3. The pass -------------------------------------------------------------------------------------------------------------------------

/// Consecutive elements of one thread: 16 bytes of gradient.
template <DType dtype>
inline constexpr unsigned kPer = dtype == DType::fp32 ? 4 : 8;
inline constexpr unsigned kElements = kDeviceChunk / kThreads;  // of one thread

template <DType dtype>
__device__ inline uint4 gradient_words(const std::byte* base, std::size_t i) {
  return *reinterpret_cast<const uint4*>(base + i * size_of(dtype));
}
template <DType dtype>
__device__ inline void to_floats(const uint4& raw, float* g) {
  const std::uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  for (unsigned j = 0; j < kPer<dtype>; ++j) {
    if constexpr (dtype == DType::fp32) {
      g[j] = bits_float(words[j]);
    } else {
      g[j] = half_to_float<dtype>(std::uint16_t(words[j / 2] >> (j % 2 * 16)));
    }
  }
}
/// The first `in` of `per` elements of state, zeros after them; and back. Aligned to 16 bytes, or narrow and to 8.
template <unsigned per>
__device__ inline void load_state(const float* from, std::uint32_t in, float* to) {
  if (in >= per) {
    for (unsigned j = 0; j < per; j += 4) {
      const float4 x = *reinterpret_cast<const float4*>(from + j);
      to[j] = x.x, to[j + 1] = x.y, to[j + 2] = x.z, to[j + 3] = x.w;
    }
  } else {
    for (unsigned j = 0; j < per; ++j) to[j] = j < in ? from[j] : 0.0f;
  }
}
template <unsigned per>
__device__ inline void store_state(float* to, std::uint32_t in, const float* from) {
  if (in >= per) {
    for (unsigned j = 0; j < per; j += 4) *reinterpret_cast<float4*>(to + j) = float4{from[j], from[j + 1], from[j + 2], from[j + 3]};
  } else {
    for (unsigned j = 0; j < per; ++j)
      if (j < in) to[j] = from[j];
  }
}

template <unsigned per>
__device__ inline void load_state(const StateArray& from, std::uint32_t in, float* to) {
  if (!from.narrow()) return load_state<per>(from.fp32(), in, to);
  if (in >= per) {
    for (unsigned j = 0; j < per; j += 4) {
      const uint2 raw = *reinterpret_cast<const uint2*>(from.bf16() + j);
      to[j] = bits_float(raw.x << 16), to[j + 1] = bits_float(raw.x & 0xffff0000u);
      to[j + 2] = bits_float(raw.y << 16), to[j + 3] = bits_float(raw.y & 0xffff0000u);
    }
  } else {
    for (unsigned j = 0; j < per; ++j) to[j] = j < in ? from[j] : 0.0f;
  }
}
template <unsigned per>
__device__ inline void store_state(const StateArray& to, std::uint32_t in, const float* from) {
  if (!to.narrow()) return store_state<per>(to.fp32(), in, from);
  if (in >= per) {
    const auto two = [](float low, float high) {
      return float_bits(wire_round(low, DType::bf16)) >> 16 | float_bits(wire_round(high, DType::bf16));
    };
    for (unsigned j = 0; j < per; j += 4)
      *reinterpret_cast<uint2*>(to.bf16() + j) = uint2{two(from[j], from[j + 1]), two(from[j + 2], from[j + 3])};
  } else {
    for (unsigned j = 0; j < per; ++j)
      if (j < in) to.set(j, from[j]);
  }
}

/// Blocks of the pass that share a multiprocessor: as many as its loads need to keep the memory busy, where that leaves a thread's elements
/// in its registers but for a few.
template <Form form, DType dtype, bool exact>
inline constexpr bool kCrowded = form == Form::smoothed_control || (feedback::has_momentum(form) && exact && dtype != DType::fp32);
template <Form form, DType dtype, bool exact>
inline constexpr unsigned kAtOnce = kCrowded<form, dtype, exact> ? 3 : 4;

/// One block per chunk. Reads gradient and state once and writes state once, whole 16-byte words where the gradient is aligned; per entry
/// its bytes and the state's sectors again from L2. Entries in index order: the same bytes as the CPU's, every run.
template <Form form, DType dtype, bool exact>
__global__ void __launch_bounds__(kThreads, kAtOnce<form, dtype, exact>) stream_kernel(EncodeCall call) {
  constexpr unsigned per = kPer<dtype>, vectors = kElements / per, field = 32 / vectors;
  const bool advances = !exact || (!feedback::has_estimate(form) && !call.narrow);  // else messages may have to be made again of the state
  __shared__ std::uint32_t ticket, totals[32], starts[32], total;
  __shared__ std::uint64_t preceding;
  __shared__ std::uint16_t offsets[kDeviceChunk];
  __shared__ float values[kDeviceChunk];
  __shared__ std::uint32_t bitmap[kDeviceChunk / 32];

  const std::uint32_t id = take_ticket(call.scratch.tickets, &ticket);
  const std::uint32_t s = call.table.chunk_segment[id];
  const DeviceSegment segment = call.table.segments[s];
  const std::uint32_t chunk = id - segment.range.first_chunk;
  const std::size_t start = std::size_t(chunk) * kDeviceChunk;
  const auto count = std::uint32_t(segment.range.count - start < kDeviceChunk ? segment.range.count - start : kDeviceChunk);
  const std::byte* const grad = call.grad + (segment.range.first + start) * size_of(dtype);
  const bool aligned = reinterpret_cast<std::uintptr_t>(grad) % 16 == 0;
  const float factor = call.grad_factor != nullptr ? call.grad_factor[s] : 1.0f;
  const float threshold = call.scratch.threshold[s];
  const float eta = feedback::has_estimate(form) ? feedback::limited_eta(segment.eta, segment.eta_limit) : 0.0f;

  // All loads first, so that they are in flight together: without a branch among them, and before a conversion waits for one. u: the
  // momentum, or the average of forms that have one.
  float g[kElements], x[kElements], u[kElements], h[kElements];
  if (count == kDeviceChunk && aligned && !segment.residual.narrow() && !segment.estimate.narrow()) {
    uint4 raw[vectors];
#pragma unroll
    for (unsigned v = 0; v < vectors; ++v) {
      const std::uint32_t i = (v * kThreads + threadIdx.x) * per;
      raw[v] = gradient_words<dtype>(grad, i);
      if constexpr (feedback::has_residual(form)) load_state<per>(segment.residual.fp32() + start + i, per, x + v * per);
      if constexpr (feedback::has_momentum(form)) load_state<per>(segment.momentum + start + i, per, u + v * per);
      if constexpr (feedback::is_smoothed(form)) load_state<per>(segment.average + start + i, per, u + v * per);
      if constexpr (feedback::has_estimate(form)) load_state<per>(segment.estimate.fp32() + start + i, per, h + v * per);
    }
#pragma unroll
    for (unsigned v = 0; v < vectors; ++v) to_floats<dtype>(raw[v], g + v * per);
  } else {
#pragma unroll
    for (unsigned v = 0; v < vectors; ++v) {
      const std::uint32_t i = (v * kThreads + threadIdx.x) * per, in = i < count ? count - i : 0;
      if (in >= per && aligned) {
        to_floats<dtype>(gradient_words<dtype>(grad, i), g + v * per);
      } else {
        for (unsigned j = 0; j < per; ++j) g[v * per + j] = j < in ? load_element<dtype>(grad, i + j) : 0.0f;
      }
      if constexpr (feedback::has_residual(form)) load_state<per>(segment.residual.from(start + i), in, x + v * per);
      if constexpr (feedback::has_momentum(form)) load_state<per>(segment.momentum + start + i, in, u + v * per);
      if constexpr (feedback::is_smoothed(form)) load_state<per>(segment.average + start + i, in, u + v * per);
      if constexpr (feedback::has_estimate(form)) load_state<per>(segment.estimate.from(start + i), in, h + v * per);
    }
  }

  std::uint32_t hits = 0, packed = 0;  // one bit per element; how many per vector
  bool bad = false;
#pragma unroll
  for (unsigned v = 0; v < vectors; ++v) {
    const std::uint32_t i = (v * kThreads + threadIdx.x) * per, in = i < count ? count - i : 0;
    const std::uint32_t alive = live_bits(segment.live, start + i, in >= per ? per : in);
#pragma unroll
    for (unsigned j = 0; j < per; ++j) {
      const unsigned e = v * per + j;
      const bool here = ((alive >> j) & 1u) != 0;  // computed for dead ones too and not taken: a select is less than a branch per element
      float none = 0, message;
      float &residual = feedback::has_residual(form) ? x[e] : none,
            &moved = feedback::has_momentum(form) || feedback::is_smoothed(form) ? u[e] : none;
      float stays = residual, moves = moved;
      bool wrong = false;
      if constexpr (feedback::has_estimate(form)) {
        const feedback::Estimated element = feedback::estimated<form>(g[e] * factor, eta, call.keep, call.fresh, h[e], stays, moves);
        wrong = !element.finite;
        message = element.x, stays = element.residual, moves = element.average;
      } else {
        message = step_element<form>(g[e] * factor, call.rate, stays, moves, wrong);
      }
      bad |= here && wrong;
      residual = here ? stays : residual, moved = here ? moves : moved;
      hits |= std::uint32_t(here && magnitude(message) >= threshold) << e;
      g[e] = message;
    }
    packed |= std::uint32_t(__popc((hits >> (v * per)) & ((1u << per) - 1))) << (v * field);
    if constexpr (feedback::has_residual(form) && (!exact || !feedback::has_estimate(form)))
      if (advances) store_state<per>(segment.residual.from(start + i), in, x + v * per);
    if constexpr (feedback::has_momentum(form)) store_state<per>(segment.momentum + start + i, in, u + v * per);
    if constexpr (feedback::is_smoothed(form) && !exact) store_state<per>(segment.average + start + i, in, u + v * per);
  }
  if (bad) {
    atomicOr(words_at(call.wire, offsetof(wire::Header, flags)), std::uint32_t(kFlagNonfinite));
    if (call.flags != nullptr) atomicOr(call.flags, std::uint32_t(kFlagNonfinite));
  }

  // Where this thread's hits of each vector lie among the chunk's.
  const std::uint32_t through = warp_inclusive_sum(packed), below = through - packed;
  if (lane() == 31) {
    for (unsigned v = 0; v < vectors; ++v) totals[v * kWarps + warp()] = (through >> (v * field)) & ((1ull << field) - 1);
  }
  std::uint64_t* const looked_back = call.scratch.looked_back + segment.range.first_chunk;
  __syncthreads();
  if (warp() == 0) {
    const std::uint32_t own = lane() < vectors * kWarps ? totals[lane()] : 0;
    const std::uint32_t sum = warp_inclusive_sum(own);
    starts[lane()] = sum - own;
    if (lane() == 31) {
      total = sum;
      publish(looked_back, chunk, sum);
    }
  }
  if (!exact && threadIdx.x < kDeviceChunk / 32) bitmap[threadIdx.x] = 0;
  __syncthreads();
  for (unsigned v = 0; v < vectors; ++v) {
    std::uint32_t place = starts[v * kWarps + warp()] + ((below >> (v * field)) & ((1ull << field) - 1));
#pragma unroll
    for (unsigned j = 0; j < per; ++j) {
      if (((hits >> (v * per + j)) & 1u) == 0) continue;
      offsets[place] = std::uint16_t((v * kThreads + threadIdx.x) * per + j);
      values[place++] = g[v * per + j];
    }
  }
  if (warp() == 0) {
    const std::uint64_t sum = look_back(looked_back, chunk, total);
    if (lane() == 0) preceding = sum;
  }
  __syncthreads();

  // The state holds what an element keeps if nothing is sent (but for candidates where it does not advance); entries leave there what the
  // wire cuts off.
  const std::uint64_t before = preceding, room = exact ? segment.candidates : segment.capacity;
  const std::uint32_t sent = before >= room ? 0 : room - before < total ? std::uint32_t(room - before) : total;
  for (std::uint32_t j = threadIdx.x; j < sent; j += kThreads) {
    const std::size_t i = start + offsets[j];
    const auto place = std::uint32_t(before) + j;
    if constexpr (exact) {
      call.scratch.candidate_index[segment.first_candidate + place] = std::uint32_t(i);
      call.scratch.candidate_value[segment.first_candidate + place] = values[j];
    } else {
      send_value(call, segment, place, i, values[j]);
      send_index(call, segment, place, i);
      if (IndexForm(segment.form) == IndexForm::bitmap) atomicOr(&bitmap[offsets[j] / 32], 1u << (offsets[j] % 32));
    }
  }
  if constexpr (!exact) {
    if (IndexForm(segment.form) == IndexForm::bitmap) {
      __syncthreads();
      if (32 * threadIdx.x < count) words_at(call.wire, segment.index_at)[start / 32 + threadIdx.x] = bitmap[threadIdx.x];
    } else if (IndexForm(segment.form) == IndexForm::u16 && threadIdx.x == 0 && sent != 0) {
      atomicAdd(&words_at(call.wire, segment.index_at)[start / kBlock], sent);
    }
  }
  if (threadIdx.x == 0 && start + count == segment.range.count) {
    const std::uint64_t all = before + total;
    if constexpr (exact) {
      call.scratch.hits[s] = std::uint32_t(all);
    } else {
      send_kept(call, s, std::uint32_t(all < room ? all : room));
      if (segment.memory != nullptr && segment.sampled != 0)
        *segment.memory = next_threshold(threshold, all, segment.k, call.scratch.steepness[s]);
    }
  }
}

/// Calls launch<form, dtype>() for the call's.
template <Form form, class Launch>
void with_dtype(const EncodeCall& call, Launch&& launch) {
  if (call.grad_dtype == DType::fp32) launch.template operator()<form, DType::fp32>();
  if (call.grad_dtype == DType::bf16) launch.template operator()<form, DType::bf16>();
  if (call.grad_dtype == DType::fp16) launch.template operator()<form, DType::fp16>();
}
template <class Launch>
void with_form(const EncodeCall& call, Form form, Launch&& launch) {
  if (form == Form::none) with_dtype<Form::none>(call, launch);
  if (form == Form::error_feedback) with_dtype<Form::error_feedback>(call, launch);
  if (form == Form::momentum) with_dtype<Form::momentum>(call, launch);
  if (form == Form::nesterov) with_dtype<Form::nesterov>(call, launch);
  if (form == Form::estimate) with_dtype<Form::estimate>(call, launch);
  if (form == Form::smoothed_estimate) with_dtype<Form::smoothed_estimate>(call, launch);
  if (form == Form::control) with_dtype<Form::control>(call, launch);
  if (form == Form::smoothed_control) with_dtype<Form::smoothed_control>(call, launch);
}

}  // namespace

void launch_thresholds(const EncodeCall& call, Form form, Stream stream) {
  constexpr std::size_t kClearedByOne = 65536;  // bytes: what a block of the first kernel may be asked to clear
  const std::size_t blocks = std::max(call.shape.sample_blocks, call.shape.payload_bytes / kClearedByOne + 1);
  with_form(call, form, [&]<Form f, DType d>() { launch("topk sample", sample_kernel<f, d>, blocks, kThreads, stream, call); });
  launch("topk threshold", threshold_kernel, call.shape.segments == 0 ? 1 : call.shape.segments, kSelectThreads, stream, call);
}

void launch_encode(const EncodeCall& call, Form form, Stream stream) {
  launch_thresholds(call, form, stream);
  with_form(call, form, [&]<Form f, DType d>() {
    if (call.exact) {
      launch("topk candidates", stream_kernel<f, d, true>, call.shape.chunks, kThreads, stream, call);
    } else {
      launch("topk stream", stream_kernel<f, d, false>, call.shape.chunks, kThreads, stream, call);
    }
  });
  if (call.exact) launch_cut(call, form, stream);
}

}  // namespace thinwire::topk
