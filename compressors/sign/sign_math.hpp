#pragma once
// What decides bits, each once: scalar, AVX2, AVX-512 and CUDA twins all call these. SIMD files include this header under their own target
// pragma, so all of it is inlined always: no copy of it may be linked into portable code.

#include <cmath>
#include <cstddef>

#include "compressors/core/dtype.hpp"
#include "compressors/core/plan.hpp"
#include "compressors/feedback/feedback_math.hpp"
#include "compressors/sign/sign.hpp"

namespace thinwire::sign {

using Scale = SignOptions::Scale;

/// Whether the residual holds the message between encoding and what leaves it.
THINWIRE_HD constexpr bool keeps_message(feedback::Form form) noexcept {
  return feedback::has_residual(form) && !feedback::has_estimate(form);
}

/// The message of one live element, always finite. `finite` falls where the gradient or the message was not: their news is dropped. `m`:
/// averaged forms; `residual`: forms that have one.
template <feedback::Form form>
[[gnu::always_inline]] THINWIRE_HD inline float message_of(float scaled, float rate, float beta, float m, float residual,
                                                           bool& finite) noexcept {
  float g, x = 0, unused = 0;
  if (!feedback::news(scaled, g)) finite = false;
  const auto recursion = [&](float news) {
    if constexpr (feedback::is_averaged(form)) news = feedback::average(beta, 1.0f - beta, m, news);
    feedback::message<feedback::past_average(form)>(news, rate, residual, unused, x);
  };
  recursion(g);
  if (!is_finite(x)) {  // an accumulator overflowed
    finite = false;
    recursion(0.0f);
    if (!is_finite(x)) x = residual;
  }
  return x;
}

/// What an element adds to its block's sum.
template <Scale scale, class V>
[[gnu::always_inline]] THINWIRE_HD inline V weight(const V& magnitude) noexcept {
  if constexpr (scale == Scale::l1) return magnitude;
  if constexpr (scale == Scale::l2) return magnitude * magnitude;
}

/// A block's scale from the sum of its live elements' weights; 0 where none is live. Finite, since no element exceeds the largest float.
[[gnu::always_inline]] THINWIRE_HD inline float scale_of(double sum, std::size_t live, Scale scale) noexcept {
  if (live == 0) return 0.0f;
  const double mean = sum / double(live);
  return float(scale == Scale::l1 ? mean : std::sqrt(mean));
}

/// A scale that the output holds without rounding. Cut to the dtype's largest value: what is cut stays in the residual.
[[gnu::always_inline]] THINWIRE_HD inline float fit(float scale, const Output& output) noexcept {
  if (output.dtype == DType::fp32) return scale;
  const float fitted = wire_round(scale * output.factor, output.dtype) / output.factor;
  return is_finite(fitted) ? fitted : scale;
}

/// The bit of an element: 1 for zeros of both signs.
[[gnu::always_inline]] THINWIRE_HD inline bool bit_of(float x) noexcept { return !(x < 0.0f); }
/// What is decoded of a bit.
[[gnu::always_inline]] THINWIRE_HD inline float value_of(bool bit, float scale) noexcept { return bit ? scale : -scale; }

}  // namespace thinwire::sign
