// Exact selection on a GPU: the k-th largest magnitude digit by digit, then the k entries in index order. Among the candidates of the pass
// if they hold the k largest, else among the whole messages, which lie in the state (forms with an estimate make them again of gradient and
// state, which they have not written yet; without state: the gradient, once more). Nobody asks the host which.

#include "compressors/topk/topk_cuda_entries.cuh"

namespace thinwire::topk {
namespace {

/// What a segment's k are chosen from.
struct Source {
  const EncodeCall& call;
  const DeviceSegment& segment;
  std::uint32_t s;
  bool complete;        ///< the candidates hold the k largest
  std::uint64_t count;  ///< candidates, or elements

  __device__ Source(const EncodeCall& c, std::uint32_t s_) : call(c), segment(c.table.segments[s_]), s(s_) {
    const std::uint32_t hits = call.scratch.hits[s];
    complete = hits <= segment.candidates && (hits >= segment.k || call.scratch.threshold[s] == call.floor);
    count = complete ? hits : segment.range.count;
  }
  /// No more candidates than k: all are sent.
  __device__ bool takes_all() const { return complete && count <= segment.k; }
  __device__ std::size_t index(std::size_t i) const { return complete ? call.scratch.candidate_index[segment.first_candidate + i] : i; }
  __device__ float factor() const { return call.grad_factor != nullptr ? call.grad_factor[s] : 1.0f; }
  /// An element of a form with an estimate, before it is advanced.
  __device__ feedback::Estimated estimated(std::size_t i) const {
    if (!segment.residual) {
      return segment.average == nullptr ? estimated_at<Form::estimate>(call, segment, factor(), i)
                                        : estimated_at<Form::smoothed_estimate>(call, segment, factor(), i);
    }
    return segment.average == nullptr ? estimated_at<Form::control>(call, segment, factor(), i)
                                      : estimated_at<Form::smoothed_control>(call, segment, factor(), i);
  }
  /// An element of error feedback whose residual is narrow, before it is advanced.
  __device__ float fed_back(std::size_t i) const {
    float residual = segment.residual[i], none = 0;
    bool told = true;  // by the first pass
    return step_element<Form::error_feedback>(load_element(call.grad, call.grad_dtype, segment.range.first + i) * factor(), call.rate,
                                              residual, none, told);
  }
  /// Whether the pass has left the state as it was.
  __device__ bool waits() const { return segment.estimate || call.narrow; }
  /// The state of such an element, if nothing is sent.
  __device__ void advance(std::size_t i) const {
    if (!is_live(segment.live, i)) return;
    if (!segment.estimate) {
      const float x = fed_back(i);
      if (is_finite(x)) segment.residual.set(i, x);
      return;
    }
    const feedback::Estimated element = estimated(i);
    if (segment.residual) segment.residual.set(i, element.residual);
    if (segment.average != nullptr) segment.average[i] = element.average;
  }
  /// 0 where nothing may be sent.
  __device__ float message(std::size_t i) const {
    if (complete) return call.scratch.candidate_value[segment.first_candidate + i];
    if (!is_live(segment.live, i)) return 0;
    float x;
    if (segment.estimate) {
      x = estimated(i).x;
    } else if (call.narrow) {
      x = fed_back(i);
      if (!is_finite(x)) return 0;
    } else if (segment.residual) {
      x = segment.residual[i];
    } else {
      feedback::news(load_element(call.grad, call.grad_dtype, segment.range.first + i) * factor(), x);
    }
    return magnitude(x) >= call.floor ? x : 0;
  }
};

__device__ inline int digit_shift(int digit) { return digit == 0 ? 20 : digit == 1 ? 9 : 0; }
__device__ inline std::uint32_t digit_of(std::uint32_t bits, int digit) {
  return (bits >> digit_shift(digit)) % (digit == 2 ? 512u : kDigitBins);
}

/// What is taken: bits above `prefix`, and the first `wanted` equal to it, once all digits are known.
struct Descent {
  std::uint32_t prefix = 0, wanted = 0;
  bool few = false;  ///< there are no k: everything is taken
};

/// Walks down `digits` histograms. By a whole block of kThreads.
__device__ Descent descend(const EncodeCall& call, std::uint32_t s, int digits) {
  constexpr unsigned kEach = kDigitBins / kThreads;
  __shared__ std::uint32_t sums[kWarps], found[2];
  Descent at{0, call.table.segments[s].k, false};
  for (int digit = 0; digit < digits; ++digit) {
    const std::uint32_t* const bins = call.scratch.histogram + (std::size_t(s) * kDigits + std::size_t(digit)) * kDigitBins;
    // Thread t looks at kEach bins, thread 0 at the largest.
    const std::uint32_t top = kDigitBins - 1 - kEach * threadIdx.x;
    std::uint32_t own = 0;
    for (unsigned j = 0; j < kEach; ++j) own += bins[top - j];
    const std::uint32_t in_warp = warp_inclusive_sum(own);
    if (lane() == 31) sums[warp()] = in_warp;
    if (threadIdx.x == 0) found[0] = kDigitBins;
    __syncthreads();
    std::uint32_t through = in_warp;
    for (unsigned w = 0; w < warp(); ++w) through += sums[w];
    if (through >= at.wanted && through - own < at.wanted) {
      std::uint32_t above = through - own, bin = top;
      while (above + bins[bin] < at.wanted) above += bins[bin--];
      found[0] = bin;
      found[1] = at.wanted - above;
    }
    __syncthreads();
    if (found[0] == kDigitBins) {
      at.few = true;
      return at;
    }
    at.prefix |= found[0] << digit_shift(digit);
    at.wanted = found[1];
    __syncthreads();
  }
  return at;
}

/// One block per chunk of the elements; a source with fewer leaves the rest idle.
__global__ void __launch_bounds__(kThreads) digit_kernel(EncodeCall call, int digit) {
  __shared__ std::uint32_t histogram[kDigitBins];
  const std::uint32_t s = call.table.chunk_segment[blockIdx.x];
  const Source source(call, s);
  const std::uint64_t start = std::uint64_t(blockIdx.x - source.segment.range.first_chunk) * kDeviceChunk;
  if (start >= source.count || source.takes_all()) return;
  const Descent above = descend(call, s, digit);
  if (above.few) return;
  for (unsigned i = threadIdx.x; i < kDigitBins; i += kThreads) histogram[i] = 0;
  __syncthreads();
  const std::uint32_t mask = digit == 0 ? 0u : ~0u << digit_shift(digit - 1);
  const std::uint64_t end = start + kDeviceChunk < source.count ? start + kDeviceChunk : source.count;
  for (std::uint64_t i = start + threadIdx.x; i < end; i += kThreads) {
    const std::uint32_t bits = float_bits(magnitude(source.message(i)));
    if (bits != 0 && (bits & mask) == above.prefix) atomicAdd(&histogram[digit_of(bits, digit)], 1u);
  }
  __syncthreads();
  std::uint32_t* const bins = call.scratch.histogram + (std::size_t(s) * kDigits + std::size_t(digit)) * kDigitBins;
  for (unsigned i = threadIdx.x; i < kDigitBins; i += kThreads) {
    if (histogram[i] != 0) atomicAdd(&bins[i], histogram[i]);
  }
}

/// One block per chunk of the elements, where the messages are those of candidates: then the state may advance before the cut.
__global__ void __launch_bounds__(kThreads) advance_kernel(EncodeCall call) {
  const Source source(call, call.table.chunk_segment[blockIdx.x]);
  if (!source.complete) return;
  const DeviceRange& range = source.segment.range;
  const std::uint64_t start = std::uint64_t(blockIdx.x - range.first_chunk) * kDeviceChunk;
  const std::uint64_t end = start + kDeviceChunk < range.count ? start + kDeviceChunk : range.count;
  for (std::uint64_t i = start + threadIdx.x; i < end; i += kThreads) source.advance(i);
}

/// Sends what is above the cut and the first of what equals it. Positions by look-back over two counts in one word.
__global__ void __launch_bounds__(kThreads) cut_kernel(EncodeCall call) {
  constexpr int kTies = 31;  // the shift of the second count
  __shared__ std::uint32_t ticket;
  __shared__ std::uint64_t sums[kWarps], preceding;
  const std::uint32_t id = take_ticket(call.scratch.tickets + 1, &ticket);
  const std::uint32_t s = call.table.chunk_segment[id];
  const Source source(call, s);
  const DeviceSegment& segment = source.segment;
  const std::uint32_t chunk = id - segment.range.first_chunk;
  const std::uint64_t start = std::uint64_t(chunk) * kDeviceChunk;
  if (start >= source.count) return;  // nobody looks back at it; without any candidate nothing is kept, as the cleared payload says
  const Descent cut = source.takes_all() ? Descent{0, 0, true} : descend(call, s, kDigits);
  std::uint64_t* const looked_back = call.scratch.cut_looked_back + segment.range.first_chunk;

  // A thread's elements lie together, so that its counts are a prefix of the next thread's.
  constexpr unsigned kEach = kDeviceChunk / kThreads;
  float messages[kEach];
  std::uint64_t own = 0;
#pragma unroll
  for (unsigned j = 0; j < kEach; ++j) {
    const std::uint64_t i = start + threadIdx.x * kEach + j;
    messages[j] = i < source.count ? source.message(i) : 0;
    const std::uint32_t bits = float_bits(magnitude(messages[j]));
    own += bits > cut.prefix ? 1u : bits == cut.prefix && bits != 0 ? std::uint64_t(1) << kTies : 0u;
  }
  const std::uint64_t in_warp = warp_inclusive_sum(own);
  if (lane() == 31) sums[warp()] = in_warp;
  __syncthreads();
  std::uint64_t all = 0, before = in_warp - own;
  for (unsigned w = 0; w < kWarps; ++w) {
    if (w < warp()) before += sums[w];
    all += sums[w];
  }
  if (threadIdx.x == 0) publish(looked_back, chunk, all);
  if (warp() == 0) {
    const std::uint64_t sum = look_back(looked_back, chunk, all);
    if (lane() == 0) preceding = sum;
  }
  __syncthreads();
  before += preceding;

  const std::uint64_t low = (std::uint64_t(1) << kTies) - 1;
  const auto place_of = [&](std::uint64_t counts) {
    const std::uint64_t ties = counts >> kTies;
    return std::uint32_t((counts & low) + (ties < cut.wanted ? ties : cut.wanted));
  };
#pragma unroll
  for (unsigned j = 0; j < kEach; ++j) {
    const std::uint32_t bits = float_bits(magnitude(messages[j]));
    const bool above = bits > cut.prefix, tie = bits == cut.prefix && bits != 0;
    const bool sent = above || (tie && (before >> kTies) < cut.wanted);
    std::size_t i = start + threadIdx.x * kEach + j;
    if (!source.complete && source.waits() && i < source.count) source.advance(i);  // its message is known: nobody needs more
    if (sent) {
      i = source.index(i);
      const std::uint32_t place = place_of(before);
      send_value(call, segment, place, i, messages[j]);
      send_index(call, segment, place, i);
      if (IndexForm(segment.form) == IndexForm::bitmap) atomicOr(&words_at(call.wire, segment.index_at)[i / 32], 1u << (i % 32));
    }
    if (IndexForm(segment.form) == IndexForm::u16) {  // lanes with entries of one block count together
      const auto block = sent ? std::uint32_t(i / kBlock) : ~0u;
      const unsigned peers = __match_any_sync(kFullWarp, block);
      if (sent && (peers & lanes_below()) == 0) atomicAdd(&words_at(call.wire, segment.index_at)[block], std::uint32_t(__popc(peers)));
    }
    before += above ? 1u : tie ? std::uint64_t(1) << kTies : 0u;
  }
  if (threadIdx.x == 0 && start + kDeviceChunk >= source.count) send_kept(call, s, place_of(preceding + all));
}

}  // namespace

void launch_cut(const EncodeCall& call, Form form, Stream stream) {
  for (int digit = 0; digit < kDigits; ++digit) launch("topk digit", digit_kernel, call.shape.chunks, kThreads, stream, call, digit);
  if (feedback::is_control(form) || feedback::is_smoothed(form) || call.narrow)
    launch("topk advance", advance_kernel, call.shape.chunks, kThreads, stream, call);
  launch("topk cut", cut_kernel, call.shape.chunks, kThreads, stream, call);
}

}  // namespace thinwire::topk
