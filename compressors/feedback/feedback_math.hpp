#pragma once
// The formulas of the feedback recursions, each written once. V is float or a GCC vector of floats: scalar, AVX2, AVX-512 and CUDA twins
// all call these, so their bits agree. Products and sums are rounded separately (-ffp-contract=off): never an fma. SIMD files include this
// header under their own target pragma: a vector operation compiled without it is lowered to pieces before it is inlined.

#include "compressors/core/dtype.hpp"
#include "compressors/feedback/form.hpp"

namespace thinwire::feedback {

/// The message x of one element or vector: g is the (finite, scaled) gradient, `residual` e or v, and u becomes the new momentum.
///   none            x = g
///   error_feedback  x = rho·e + g
///   momentum        u = m·u + g,    x = v + u
///   nesterov        u = m·(u + g),  x = v + (u + g)
/// @source DGC (Lin et al. 2018) eq. 7 and its Nesterov form; EF14 (Seide et al. 2014).
template <Form form, class V>
[[gnu::always_inline]] THINWIRE_HD inline void message(const V& g, const V& rate, const V& residual, V& u, V& x) noexcept {
  if constexpr (form == Form::none) {
    x = g;
  } else if constexpr (form == Form::error_feedback) {
    x = rate * residual + g;
  } else if constexpr (form == Form::momentum) {
    u = rate * u + g;
    x = residual + u;
  } else {
    u = rate * (u + g);
    x = residual + (u + g);
  }
}

/// The message of forms with an estimate: x = eta·e + t (EF21: t), and e ← e + t, of which what is sent leaves later; t = g − h first, for
/// where g ≈ h the difference is exact.
/// @source EControl (Gao et al. 2024); EF21 (Richtárik et al. 2021).
template <Form form, class V>
[[gnu::always_inline]] THINWIRE_HD inline void estimate_message(const V& g, const V& eta, const V& estimate, V& residual, V& x) noexcept {
  const V t = g - estimate;
  if constexpr (is_control(form)) {
    x = eta * residual + t;
    residual = residual + t;
  } else {
    x = t;
  }
}

/// Below this magnitude no sum of two values that a form with an estimate makes leaves fp32's range.
inline constexpr float kAmple = 0x1p125f;

/// x, cut at the largest float.
[[gnu::always_inline]] THINWIRE_HD inline float saturated(float x) noexcept {
  if (is_finite(x)) return x;
  return bits_float((float_bits(x) & 0x80000000u) | 0x7f7fffffu);
}

/// One element of a form with an estimate. What it keeps if nothing is sent: residual and average.
struct Estimated {
  float x = 0, residual = 0, average = 0;
  bool finite = true;
};

/// What stands where g does under target=momentum, and the worker average of forms that have one.
/// @source 1-bit Adam (Tang et al. 2021): m_r = beta1·m + (1 − beta1)·g_r; EF21-SGDM (Fatkhullin et al. 2023).
template <class V>
[[gnu::always_inline]] THINWIRE_HD inline V average(const V& beta, const V& fresh, const V& m, const V& g) noexcept {
  return beta * m + fresh * g;
}

/// A gradient element as the recursion sees it: a non-finite one is no news. @returns whether it was finite.
[[gnu::always_inline]] THINWIRE_HD inline bool news(float scaled, float& g) noexcept {
  const bool finite = is_finite(scaled);
  g = finite ? scaled : 0.0f;
  return finite;
}

/// A gradient that is not finite is no news: the estimate stands for it. Where the message or what is kept would leave fp32's range the
/// element sits the step out: x = 0, and it keeps what it has. `eta`: control; `keep`, `fresh`: smoothed.
template <Form form>
[[gnu::always_inline]] THINWIRE_HD inline Estimated estimated(float scaled, float eta, float keep, float fresh, float estimate,
                                                              float residual, float average_before) noexcept {
  Estimated out;
  float g;
  out.finite = news(scaled, g);
  if (!out.finite) g = estimate;
  if constexpr (is_smoothed(form)) g = average(keep, fresh, average_before, g);
  out.average = g;
  out.residual = residual;
  estimate_message<form>(g, eta, estimate, out.residual, out.x);
  if (!is_finite(out.x) || !is_finite(out.residual) || !is_finite(out.average)) out = {0.0f, residual, average_before, false};
  return out;
}

/// The same of element i of a block of elements, of whatever codec.
template <Form form, DType dtype, class Block>
Estimated estimated_at(const Block& b, std::size_t i) noexcept {
  float residual = 0, average = 0;
  if constexpr (has_residual(form)) residual = b.residual[i];
  if constexpr (is_smoothed(form)) average = b.average[i];
  return estimated<form>(load_element<dtype>(b.grad, i) * b.factor, b.rate, b.keep, b.fresh, b.estimate[i], residual, average);
}

/// Forms with an estimate: w was sent. e ← e − w, h ← h + w; the residual does not matter where there is none.
[[gnu::always_inline]] THINWIRE_HD inline void send(float w, float& residual, float& estimate) noexcept {
  residual = saturated(residual - w);
  estimate = saturated(estimate + w);
}

/// Recursion::grid: what is sent of a message x, so that h plus it is the bf16 number nearest to h + x, or, where one of the two is 2^16
/// times the other, so near to a bf16 number that storing it as one loses no more than fp32 would.
[[gnu::always_inline]] THINWIRE_HD inline float to_grid(float x, float estimate) noexcept {
  const float sent = wire_round(saturated(estimate + x), DType::bf16) - estimate;
  return is_finite(sent) ? sent : x < 0 ? -0x1p127f : 0x1p127f;  // from one end of the range to the other: half way
}

/// What stays behind of a message x whose rounded value w was sent: exact but for values cut at fp16's largest.
template <class V>
[[gnu::always_inline]] THINWIRE_HD inline void leave(const V& x, const V& w, V& residual) noexcept {
  residual = x - w;
}

}  // namespace thinwire::feedback
