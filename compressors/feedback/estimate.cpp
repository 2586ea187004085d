// What happens to estimates outside of the fused passes: their start, bad verdicts, and the mean that all ranks keep.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "compressors/core/clones.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/feedback/feedback_math.hpp"

namespace thinwire {
namespace {

THINWIRE_CLONES void add_saturated(const float* x, float* sum, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) sum[i] = feedback::saturated(sum[i] + x[i]);
}

}  // namespace

float eta_of(const Recursion& recursion, double delta) noexcept {
  const double c = std::sqrt(1 - delta);
  switch (recursion.eta) {
    case Recursion::Eta::automatic:
      return float(delta);
    case Recursion::Eta::theory:
      return float(c > 0 ? std::min(delta, (1 - c) / (3 * c)) : delta);
    case Recursion::Eta::paper:
      return float(delta / 400);
    case Recursion::Eta::number:
      return recursion.given_eta;
  }
  return 0;
}

THINWIRE_CLONES void add_to_mean_estimate(float* sum, float factor, float* mean_estimate, std::size_t count) noexcept {
  for (std::size_t i = 0; i < count; ++i) sum[i] = mean_estimate[i] = feedback::saturated(mean_estimate[i] + sum[i] * factor);
}

void keep_news(const Recursion& recursion, const Plan& plan, const StateView& state) noexcept {
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    float* const residual = residual_of(recursion, state.segments[s]);
    if (residual != nullptr) add_saturated(estimate_of(recursion, state.segments[s]), residual, plan.segments[s].count);
  }
}

void start_estimates(const Recursion& recursion, const Plan& plan, const StateView& state, const float* means, bool finite,
                     bool joined) noexcept {
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    const SegmentState& own = state.segments[s];
    const std::size_t bytes = plan.segments[s].count * sizeof(float);
    const float* const mean = means;
    means += plan.segments[s].count;
    float *const estimate = estimate_of(recursion, own), *const mean_estimate = mean_estimate_of(recursion, own);
    if (estimate == nullptr || bytes == 0) continue;
    const float* const residual = residual_of(recursion, own);
    if (finite) {
      if (joined) {
        std::memset(estimate, 0, bytes);
      } else if (residual != nullptr) {
        std::memcpy(estimate, residual, bytes);
      }
      if (float* const average = average_of(recursion, own)) std::memcpy(average, estimate, bytes);
      std::memcpy(mean_estimate, mean, bytes);
    } else if (residual == nullptr) {
      std::memset(estimate, 0, bytes);
      std::memset(mean_estimate, 0, bytes);
    }
  }
}

}  // namespace thinwire
