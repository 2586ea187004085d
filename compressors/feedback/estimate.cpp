// What happens to estimates outside of the fused passes: their start, bad verdicts, and the mean that all ranks keep.
#include <algorithm>
#include <cmath>

#include "compressors/core/clones.hpp"
#include "compressors/core/prefetch.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/feedback/feedback_math.hpp"

namespace thinwire {
namespace {

THINWIRE_CLONES void add_saturated(const float* x, float* sum, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) sum[i] = feedback::saturated(sum[i] + x[i]);
}

/// The message in e becomes the estimate. What the grid cuts off stays.
THINWIRE_CLONES void start_from(float* e, float* h, bool grid, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    h[i] = grid ? wire_round(e[i], DType::bf16) : e[i];
    e[i] = e[i] - h[i];
  }
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
  for_prefetched(
      count, [=](std::size_t i) __attribute__((always_inline)) { prefetch_ahead<kAskEvery * sizeof(float)>(mean_estimate + i); },
      [=](std::size_t i)
          __attribute__((always_inline)) { sum[i] = mean_estimate[i] = feedback::saturated(mean_estimate[i] + sum[i] * factor); });
}

void keep_news(const Recursion& recursion, const Plan& plan, const StateView& state) noexcept {
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    const StateArray residual = residual_of(recursion, state.segments[s]), estimate = estimate_of(recursion, state.segments[s]);
    const std::size_t count = plan.segments[s].count;
    for (std::size_t i = 0; i < count && residual; i += kStatePiece) {
      const std::size_t n = std::min(kStatePiece, count - i);
      StatePiece e(residual.from(i), n), h(estimate.from(i), n);
      h.drop();
      add_saturated(h.data(), e.data(), n);
    }
  }
}

void start_estimates(const Recursion& recursion, const Plan& plan, const StateView& state, const float* means, bool finite) noexcept {
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    const SegmentState& own = state.segments[s];
    const std::size_t count = plan.segments[s].count;
    const float* const mean = means;
    means += count;
    const StateArray estimate = estimate_of(recursion, own), residual = residual_of(recursion, own);
    float *const mean_estimate = mean_estimate_of(recursion, own), *const average = average_of(recursion, own);
    if (!estimate || count == 0) continue;
    if (!finite) {
      if (residual) continue;
      clear_state(estimate, count);
      std::fill_n(mean_estimate, count, 0.0f);
      continue;
    }
    for (std::size_t i = 0; i < count; i += kStatePiece) {
      const std::size_t n = std::min(kStatePiece, count - i);
      StatePiece h(estimate.from(i), n), e(residual.from(i), n);
      if (residual) start_from(e.data(), h.data(), recursion.grid, n);
      if (average != nullptr) std::copy_n(h.data(), n, average + i);
    }
    std::copy_n(mean, count, mean_estimate);
  }
}

}  // namespace thinwire
