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

/// What stands where g does under target=momentum.
/// @source 1-bit Adam (Tang et al. 2021): m_r = beta1·m + (1 − beta1)·g_r.
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

/// What stays behind of a message x whose rounded value w was sent: exact but for values cut at fp16's largest.
template <class V>
[[gnu::always_inline]] THINWIRE_HD inline void leave(const V& x, const V& w, V& residual) noexcept {
  residual = x - w;
}

}  // namespace thinwire::feedback
