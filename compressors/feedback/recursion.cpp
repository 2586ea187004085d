// The recursion's parts that need no codec: state names, gradient norms and clip factors. The dense step is in dense.cpp.
#include "compressors/core/recursion.hpp"

#include <algorithm>
#include <cmath>

#include "compressors/core/clones.hpp"
#include "compressors/core/prefetch.hpp"
#include "compressors/feedback/clip.hpp"
#include "compressors/feedback/squared_norm.hpp"

namespace thinwire {
namespace {

constexpr std::size_t kBlock = kSumBlock;

inline float finite_or_zero(float x) noexcept { return is_finite(x) ? x : 0.0f; }

/// One block's Σ x² in fp32: element i goes to partial i mod 64 in rising i.
template <class T, class Convert>
inline __attribute__((always_inline)) void add_squares(const T* from, Convert convert, std::size_t n, float* partial) noexcept {
  std::size_t row = 0;
  for (; row + kPartials <= n; row += kPartials) {
    prefetch_ahead<kPartials * sizeof(T)>(from + row);
    for (std::size_t j = 0; j < kPartials; ++j) {
      const float x = finite_or_zero(convert(from[row + j]));
      partial[j] += x * x;
    }
  }
  for (std::size_t j = 0; row + j < n; ++j) {
    const float x = finite_or_zero(convert(from[row + j]));
    partial[j] += x * x;
  }
}

THINWIRE_CLONES void add_squares_fp32(const float* x, std::size_t n, float* partial) {
  add_squares(
      x, [](float v) { return v; }, n, partial);
}
THINWIRE_CLONES void add_squares_bf16(const std::uint16_t* x, std::size_t n, float* partial) {
  add_squares(
      x, [](std::uint16_t v) { return bf16_to_float(v); }, n, partial);
}
THINWIRE_CLONES void add_squares_fp16(const std::uint16_t* x, std::size_t n, float* partial) {
  add_squares(
      x, [](std::uint16_t v) { return fp16_to_float(v); }, n, partial);
}

float block_sum(ConstBytes grad, std::size_t first, std::size_t n) noexcept {
  float partial[kPartials] = {};
  if (grad.dtype == DType::fp32) add_squares_fp32(grad.as<float>() + first, n, partial);
  if (grad.dtype == DType::bf16) add_squares_bf16(grad.as<std::uint16_t>() + first, n, partial);
  if (grad.dtype == DType::fp16) add_squares_fp16(grad.as<std::uint16_t>() + first, n, partial);
  return add_in_halves(partial);
}

double element_squares(ConstBytes grad, std::size_t first, std::size_t n) noexcept {
  double sum = 0;
  for (std::size_t at = first; at < first + n; ++at) {
    const double x = finite_or_zero(load_element(grad.data, grad.dtype, at));
    sum += x * x;
  }
  return sum;
}

constexpr std::string_view kCorrectionNames[] = {"momentum", "accumulated"}, kAveragedNames[] = {"momentum", "residual"};
constexpr std::string_view kEstimateNames[] = {"estimate", "mean_estimate", "average"},
                           kControlNames[] = {"estimate", "mean_estimate", "residual", "average"};

}  // namespace

std::span<const std::string_view> state_names(const Recursion& recursion) noexcept {
  switch (recursion.kind) {
    case Recursion::Kind::none:
      return std::span(kAveragedNames).first(recursion.averaged ? 1 : 0);
    case Recursion::Kind::error_feedback:
      return recursion.averaged ? std::span(kAveragedNames) : std::span(kAveragedNames).last(1);
    case Recursion::Kind::momentum_correction:
      return kCorrectionNames;
    case Recursion::Kind::estimate: {
      const std::span<const std::string_view> all = recursion.control ? std::span<const std::string_view>(kControlNames) : kEstimateNames;
      return all.first(all.size() - (recursion.fresh < 1 ? 0 : 1));
    }
  }
  return {};
}

std::span<const std::string_view> dense_state_names(const Recursion& recursion) noexcept {
  return recursion.kind == Recursion::Kind::momentum_correction ? std::span(kCorrectionNames).first(1)
                                                                : std::span<const std::string_view>{};
}

DType state_dtype(const Recursion& recursion, std::size_t j) noexcept {
  const std::span<const std::string_view> names = state_names(recursion);
  const bool narrow = j < names.size() && ((recursion.narrow && names[j] == "residual") || (recursion.grid && names[j] == "estimate"));
  return narrow ? DType::bf16 : DType::fp32;
}

StateArray residual_of(const Recursion& recursion, const SegmentState& state) noexcept {
  switch (recursion.kind) {
    case Recursion::Kind::none:
      return {};
    case Recursion::Kind::error_feedback:
      return state.array[recursion.averaged ? 1 : 0];
    case Recursion::Kind::momentum_correction:
      return state.array[1];
    case Recursion::Kind::estimate:
      return recursion.control ? state.array[2] : StateArray{};
  }
  return {};
}

StateArray estimate_of(const Recursion& recursion, const SegmentState& state) noexcept {
  return recursion.kind == Recursion::Kind::estimate ? state.array[0] : StateArray{};
}
float* mean_estimate_of(const Recursion& recursion, const SegmentState& state) noexcept {
  return recursion.kind == Recursion::Kind::estimate ? state.array[1].fp32() : nullptr;
}
float* average_of(const Recursion& recursion, const SegmentState& state) noexcept {
  if (recursion.kind != Recursion::Kind::estimate || !(recursion.fresh < 1)) return nullptr;
  return state.array[recursion.control ? 3 : 2].fp32();
}

namespace feedback {

void SquaredNorm::add(ConstBytes grad, std::size_t first, std::size_t count) noexcept {
  for (std::size_t i = 0; i < count; i += kBlock, ++block_) {
    const std::size_t n = std::min(kBlock, count - i);
    double sum = block_sum(grad, first + i, n);
    // Squares of finite values beyond fp32's range: in double they fit.
    if (!std::isfinite(sum)) sum = element_squares(grad, first + i, n);
    partial_[block_ % kPartials] += sum;
  }
}

double SquaredNorm::sum() noexcept { return add_in_halves(partial_.data()); }

}  // namespace feedback

void squared_norms(const Plan& plan, ConstBytes grad, double* norms, Stream) {
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    feedback::SquaredNorm norm;
    norm.add(grad, plan.segments[s].first, plan.segments[s].count);
    norms[s] = norm.sum();
  }
}

void clip_factors(const Recursion& recursion, const Plan& plan, std::span<const double> norms, float unscale, int world,
                  std::size_t total_numel, float* factors) {
  for (std::size_t s = 0; s < plan.segments.size(); ++s)
    factors[s] = feedback::clip_factor(recursion.clip_norm, norms[s], plan.segments[s].count, unscale, world, total_numel);
}

}  // namespace thinwire
