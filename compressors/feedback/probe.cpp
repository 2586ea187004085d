#include "compressors/core/probe.hpp"

#include <algorithm>

#include "compressors/core/block_sum.hpp"
#include "compressors/feedback/probe_math.hpp"

namespace thinwire {
namespace {

using feedback::ProbedElement;
using feedback::ProbedSegment;

/// Adds up visit(segment, element, gradient) over the live elements of every segment; a gradient that is not finite is none.
template <class Visit>
void for_each(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, std::span<Probe> out,
              Visit&& visit) noexcept {
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    const Segment& segment = plan.segments[s];
    const SegmentState& own = state.segments[s];
    const StateArray residual = residual_of(recursion, own), estimate = estimate_of(recursion, own);
    const float* const average = average_of(recursion, own);
    const bool moves = recursion.kind == Recursion::Kind::momentum_correction || recursion.averaged;
    const float* const momentum = moves ? own.array[0].fp32() : nullptr;
    const float factor = state.grad_factor != nullptr ? state.grad_factor[s] : 1.0f;
    const ProbedSegment probed{feedback::limited_eta(segment.setting.eta, own.eta_limit), recursion.averaged ? state.beta1[s] : 0.0f,
                               average != nullptr};
    Probe blocks[kPartials];
    for (std::size_t block = 0, begin = 0; begin < segment.count; ++block, begin += kSumBlock) {
      Probe partial[kPartials];
      for (std::size_t i = begin; i < std::min(segment.count, begin + kSumBlock); ++i) {
        float g;
        if (!is_live(segment.live, i) || !feedback::news(load_element(grad.data, grad.dtype, segment.first + i) * factor, g)) continue;
        const ProbedElement element{momentum != nullptr ? momentum[i] : 0.0f, residual ? residual[i] : 0.0f, estimate ? estimate[i] : 0.0f,
                                    average != nullptr ? average[i] : 0.0f};
        partial[i % kPartials] += visit(probed, g, element);
      }
      blocks[block % kPartials] += add_in_halves(partial);
    }
    out[s] += add_in_halves(blocks);
  }
}

}  // namespace

bool can_probe(const Recursion& recursion) noexcept { return recursion.kind != Recursion::Kind::none; }

void probe_messages(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, std::span<Probe> out) noexcept {
  for_each(recursion, plan, grad, state, out, [&](const ProbedSegment& segment, float g, const ProbedElement& element) {
    const double x = feedback::probed_message(recursion, segment, g, element);
    return Probe{.message = x * x};
  });
}

void probe_rest(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, std::span<Probe> out) noexcept {
  for_each(recursion, plan, grad, state, out, [&](const ProbedSegment& segment, float g, const ProbedElement& element) {
    return feedback::probed_rest(recursion, segment, g, element);
  });
}

}  // namespace thinwire
