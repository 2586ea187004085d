#include "compressors/core/probe.hpp"

#include <cstdint>

#include "compressors/feedback/feedback_math.hpp"
#include "compressors/feedback/form.hpp"

namespace thinwire {
namespace {

using feedback::Form;

/// Calls visit(probe, segment, its state, its index, element, gradient) for every live element; a gradient that is not finite is 0.
template <class Visit>
void for_each(const Plan& plan, ConstBytes grad, const StateView& state, std::span<Probe> out, Visit&& visit) noexcept {
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    const Segment& segment = plan.segments[s];
    const float factor = state.grad_factor != nullptr ? state.grad_factor[s] : 1.0f;
    for (std::size_t i = 0; i < segment.count; ++i) {
      float g;
      if (!is_live(segment.live, i) || !feedback::news(load_element(grad.data, grad.dtype, segment.first + i) * factor, g)) continue;
      visit(out[s], segment, state.segments[s], s, i, g);
    }
  }
}

}  // namespace

bool can_probe(const Recursion& recursion) noexcept { return recursion.kind != Recursion::Kind::none; }

void probe_messages(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, std::span<Probe> out) noexcept {
  const Form form = feedback::form_of(recursion);
  const float rate = feedback::rate_of(recursion);
  for_each(plan, grad, state, out,
           [&](Probe& probe, const Segment& segment, const SegmentState& own, std::size_t s, std::size_t i, float g) {
             const StateArray residual = residual_of(recursion, own);
             double x = g;
             if (feedback::has_estimate(form)) {
               if (const float* average = average_of(recursion, own))
                 x = feedback::average(1 - recursion.fresh, recursion.fresh, average[i], g);
               x -= estimate_of(recursion, own)[i];
               if (residual) x += double(segment.setting.eta) * residual[i];
             } else if (feedback::has_momentum(form)) {
               const double u = recursion.nesterov ? double(rate) * (own.array[0][i] + g) : double(rate) * own.array[0][i] + g;
               x = residual[i] + (recursion.nesterov ? u + g : u);
             } else {
               if (recursion.averaged) x = feedback::average(state.beta1[s], 1 - state.beta1[s], own.array[0][i], g);
               x += double(rate) * residual[i];
             }
             probe.message += x * x;
           });
}

void probe_rest(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, std::span<Probe> out) noexcept {
  for_each(plan, grad, state, out, [&](Probe& probe, const Segment& segment, const SegmentState& own, std::size_t, std::size_t i, float g) {
    const StateArray residual = residual_of(recursion, own);
    const double e = residual ? residual[i] : 0;
    double left = e;
    if (recursion.kind == Recursion::Kind::estimate) {
      const float* const average = average_of(recursion, own);
      const double followed = average != nullptr ? average[i] : g, stale = followed - estimate_of(recursion, own)[i];
      // e = e' + t − sent and g − h = t − sent, so x − sent = eta·e' + (g − h) with e' = e − (g − h).
      left = residual ? double(segment.setting.eta) * (e - stale) + stale : stale;
      probe.stale += stale * stale;
      probe.followed += followed * followed;
    }
    probe.left += left * left;
    probe.residual += e * e;
  });
}

}  // namespace thinwire
