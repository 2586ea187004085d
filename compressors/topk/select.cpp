// One segment through the pass: thresholds, blocks, and the cut to exactly k.

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "compressors/core/recursion.hpp"
#include "compressors/feedback/feedback_math.hpp"
#include "compressors/topk/selection.hpp"
#include "compressors/topk/topk_codec.hpp"

namespace thinwire::topk {
namespace {

std::size_t take_sample(const SegmentPass& pass, const Workspace& workspace) {
  if (pass.narrow()) return sample_narrow(pass, workspace.magnitudes);
  return pass.kernels.sample[std::size_t(pass.form)][std::size_t(pass.grad_dtype)](pass.segment, pass.draw, workspace.magnitudes);
}

struct SampledThreshold {
  float value, steepness;
};

/// The carried threshold where the sample does not contradict it, else a statistic of the sample nearer to the middle one; that one for
/// want of a carried threshold or where the sample is the segment.
SampledThreshold sampled_threshold(const SegmentPass& pass, std::size_t k, float carried, const Workspace& workspace) {
  std::size_t m = take_sample(pass, workspace);
  const SampleRanks ranks(pass.segment.count, m, k);
  const bool steady = carried > 0 && m != pass.segment.count;
  std::uint32_t *sample = workspace.magnitudes, *scratch = workspace.scratch;
  std::uint32_t floor = 0;  // of what is left of the sample
  std::size_t near = 0;
  if (carried > 0) {
    // The wanted ranks are among those few, unless messages have shrunk since.
    near = keep_at_least(sample, m, float_bits(kNear * carried), scratch);
    if (near >= ranks.low) {
      m = near;
      floor = float_bits(kNear * carried);
      std::swap(sample, scratch);
    }
  }
  if (!steady) return {std::max(bits_float(order_statistic(sample, m, ranks.middle, scratch)), pass.floor), kUnknownSteepness};
  const float threshold = std::max(corrected(carried, sample, m, floor, ranks, scratch), pass.floor);
  return {threshold, steepness_of(near, ranks.middle, carried, threshold)};
}

/// Each block goes the way that suits the density of the block before it: the same bits at the better speed. The gradient's norm is taken
/// just before, which brings the block into L2 for the pass.
class Dispatch {
 public:
  explicit Dispatch(const SegmentPass& pass) noexcept : pass_(pass), density_(float(pass.density)) {}
  /// Elements [first, first + block.count) of the segment.
  Emitted operator()(std::size_t first, const Block& block) noexcept {
    const auto form = std::size_t(pass_.form);
    if (pass_.norm != nullptr) {
      const auto* grad = static_cast<const std::byte*>(block.grad);
      pass_.norm->add({grad, block.count * size_of(pass_.grad_dtype), pass_.grad_dtype, Place::host, 0}, 0, block.count);
    }
    std::size_t tier = 0;
    while (tier + 1 < kTiers && density_ >= pass_.kernels.crossover[tier][form]) ++tier;
    Emitted emitted;
    const StreamKernel kernel = pass_.kernels.stream[tier][form][std::size_t(pass_.grad_dtype)];
    if (pass_.narrow()) {
      stream_narrow(pass_, first, block, kernel, emitted);
    } else {
      kernel(block, emitted);
    }
    density_ = float(emitted.hits) / float(block.count);
    return emitted;
  }

 private:
  const SegmentPass& pass_;
  float density_;
};

/// What exact selection sends: bits above `bits`, and the first `ties` equal to it.
struct Cut {
  std::uint32_t bits = 0;
  std::size_t ties = 0;
  bool takes(std::uint32_t magnitude_bits) noexcept {
    if (magnitude_bits != bits) [[likely]]
      return magnitude_bits > bits;
    if (ties == 0) return false;
    --ties;
    return true;
  }
};

/// The message after the pass, as it lies in the state; that of a form with an estimate, of narrow state, or of a gradient without state,
/// is made again. 0 where nothing may be sent.
float message_at(const SegmentPass& pass, std::size_t i) noexcept {
  const Block& s = pass.segment;
  if (pass.narrow()) return message_narrow(pass, i);
  if (feedback::has_estimate(pass.form)) return message_kernel(pass.form, pass.grad_dtype)(s, i);
  if (!is_live(s.live, i)) return 0;
  if (s.residual != nullptr) return s.residual[i];
  const float raw = load_element(s.grad, pass.grad_dtype, i);
  float g;
  feedback::news(raw * s.factor, g);
  return g;
}

/// Digit by digit over the whole message: three histograms of 11, 11 and 9 bits. No memory beside them.
Cut cut_message(const SegmentPass& pass, std::size_t k) noexcept {
  constexpr std::array<int, 3> kShift = {20, 9, 0};
  constexpr std::array<std::uint32_t, 3> kMask = {0x7ff, 0x7ff, 0x1ff};
  const std::uint32_t floor = float_bits(pass.floor);
  std::uint32_t prefix = 0, prefix_mask = 0;
  std::size_t wanted = k;
  for (std::size_t digit = 0; digit < 3; ++digit) {
    std::array<std::uint32_t, 2048> histogram{};
    for (std::size_t i = 0; i < pass.segment.count; ++i) {
      const std::uint32_t bits = float_bits(magnitude(message_at(pass, i)));
      if (bits >= floor && (bits & prefix_mask) == prefix) ++histogram[(bits >> kShift[digit]) & kMask[digit]];
    }
    std::uint32_t bin = kMask[digit];
    while (bin > 0 && histogram[bin] < wanted) wanted -= histogram[bin--];
    if (digit == 0 && histogram[bin] < wanted) return {floor, std::numeric_limits<std::size_t>::max()};  // fewer than k: all of them
    prefix |= bin << kShift[digit];
    prefix_mask |= kMask[digit] << kShift[digit];
  }
  return {prefix, wanted};
}

/// Entries of one block between selection and payload.
class Staging {
 public:
  Staging(const SegmentPass& pass, std::size_t first, const Workspace& workspace) noexcept
      : block_(block_at(pass, first, workspace)), residual_(pass.residual.from(first)), estimate_(pass.estimate.from(first)) {}

  /// Written always, counted if taken: a branch would be mispredicted for every entry near the cut.
  void offer(std::uint32_t offset, float x, bool take) noexcept {
    block_.index[count_] = std::uint16_t(offset);
    block_.value[count_] = x;
    count_ += take;
  }
  /// Rounds the staged messages to what will be decoded, and leaves the rest in the state. Touches one line of each state array per entry,
  /// asked for ahead of time.
  void settle() noexcept {
    constexpr std::size_t kAhead = 16;
    for (std::size_t j = 0; j < count_; ++j) {
      const std::uint32_t i = block_.index[j], later = block_.index[std::min(j + kAhead, count_ - 1)];
      for (const StateArray& array : {residual_, estimate_})
        if (array) __builtin_prefetch(array.from(later).data(), 1);
      if (block_.momentum != nullptr) __builtin_prefetch(block_.momentum + later, 1);
      const float x = block_.value[j], w = block_.grid ? feedback::to_grid(x, estimate_[i]) : wire_round(x, block_.wire);
      block_.value[j] = w;
      float residual = 0;
      if (estimate_) {
        float estimate = estimate_[i];
        if (residual_) residual = residual_[i];
        feedback::send(w, residual, estimate);
        estimate_.set(i, estimate);
        if (residual_) residual_.set(i, residual);
        continue;
      }
      feedback::leave(x, w, residual);
      if (residual_) residual_.set(i, residual);
      if (block_.momentum != nullptr && block_.mask) block_.momentum[i] = 0;
    }
  }
  std::size_t count() const noexcept { return count_; }

 private:
  Block block_;
  StateArray residual_, estimate_;
  std::size_t count_ = 0;
};

}  // namespace

SegmentResult stream_sampled(const SegmentPass& pass, const SegmentWire& wire, float* memory, const Workspace& workspace,
                             SegmentPacker& packer) {
  const std::size_t n = pass.segment.count;
  const bool all = wire.k == n;  // nothing to choose: no sample may hold back the smallest
  const auto [threshold, steepness] = all ? SampledThreshold{pass.floor, kUnknownSteepness}
                                          : sampled_threshold(pass, wire.k, memory != nullptr ? *memory : 0.0f, workspace);

  SegmentResult result;
  std::size_t hits = 0;
  Dispatch dispatch(pass);
  for (std::size_t first = 0; first < n; first += kBlock) {
    Block block = block_at(pass, first, workspace);
    block.threshold = threshold;
    block.bitmap = wire.form == IndexForm::bitmap ? workspace.bitmap : nullptr;
    block.room = std::uint32_t(std::min<std::size_t>(packer.room(), block.count));
    const Emitted emitted = dispatch(first, block);
    packer.append(first / kBlock, block.index, block.value, emitted.count, block.bitmap, emitted.count == emitted.hits ? emitted.noted : 0);
    hits += emitted.hits;
    result.flags |= emitted.flags;
  }
  if (memory != nullptr && !all) *memory = next_threshold(threshold, hits, wire.k, steepness);
  return result;
}

SegmentResult stream_exact(const SegmentPass& pass, const SegmentWire& wire, const Workspace& workspace, SegmentPacker& packer) {
  const std::size_t n = pass.segment.count, k = wire.k, capacity = candidate_capacity(n, k);
  const std::size_t m = take_sample(pass, workspace);
  const std::size_t rank = candidate_rank(n, m, k);
  const std::uint32_t bits = order_statistic(workspace.magnitudes, m, rank, workspace.scratch);
  const float threshold = std::max(bits_float(bits), pass.floor);

  // 1. Update the state as if nothing was sent (but for estimates and narrow state), and keep every candidate.
  SegmentResult result;
  std::size_t candidates = 0, hits = 0;
  Dispatch dispatch(pass);
  for (std::size_t first = 0; first < n; first += kBlock) {
    Block block = block_at(pass, first, workspace);
    block.threshold = threshold;
    block.clear = false;
    block.room = std::uint32_t(std::min<std::size_t>(capacity - candidates, block.count));
    const Emitted emitted = dispatch(first, block);
    for (std::size_t i = 0; i < emitted.count; ++i) {
      workspace.candidate_index[candidates + i] = std::uint32_t(first) + block.index[i];
      workspace.candidate_value[candidates + i] = block.value[i];
    }
    candidates += emitted.count;
    hits += emitted.hits;
    result.flags |= emitted.flags;
  }

  // 2. Cut to k, among the candidates if they hold the k largest.
  const bool complete = hits == candidates && (candidates >= k || threshold == pass.floor);
  Cut cut;
  if (!complete) {
    cut = cut_message(pass, k);
  } else if (candidates > k) {
    for (std::size_t i = 0; i < candidates; ++i) workspace.magnitudes[i] = float_bits(magnitude(workspace.candidate_value[i]));
    cut.bits = order_statistic(workspace.magnitudes, candidates, k, workspace.magnitudes);
    std::size_t above = 0;
    for (std::size_t i = 0; i < candidates; ++i) above += float_bits(magnitude(workspace.candidate_value[i])) > cut.bits;
    cut.ties = k - above;
  }

  // 3. Send those, and clear them.
  std::size_t next = 0;
  for (std::size_t first = 0; first < n; first += kBlock) {
    const std::size_t end = std::min<std::size_t>(first + kBlock, n);
    Staging staging(pass, first, workspace);
    if (complete) {
      for (; next < candidates && workspace.candidate_index[next] < end; ++next) {
        const float x = workspace.candidate_value[next];
        staging.offer(workspace.candidate_index[next] - std::uint32_t(first), x, cut.takes(float_bits(magnitude(x))));
      }
    } else {
      for (std::size_t i = first; i < end; ++i) {
        const float x = message_at(pass, i);
        staging.offer(std::uint32_t(i - first), x, cut.takes(float_bits(magnitude(x))));
      }
    }
    if (pass.narrow()) {
      advance_narrow(pass, first, block_at(pass, first, workspace));
    } else if (feedback::has_estimate(pass.form)) {
      advance_kernel(pass.form, pass.grad_dtype)(block_at(pass, first, workspace));
    }
    staging.settle();
    packer.append(first / kBlock, workspace.index, workspace.value, staging.count());
  }
  return result;
}

}  // namespace thinwire::topk
