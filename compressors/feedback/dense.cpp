// The dense step of the recursion: nothing is left out, so the whole message travels and the residual is empty afterwards. Unfused from any
// codec.
#include <algorithm>
#include <cstring>

#include "compressors/core/clones.hpp"
#include "compressors/core/prefetch.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/feedback/feedback_math.hpp"

namespace thinwire {
namespace {

/// Loads of the three gradient dtypes as types, so that each loop below is compiled for each of them.
struct LoadFp32 {
  const float* p;
  float operator()(std::size_t i) const noexcept { return p[i]; }
};
struct LoadBf16 {
  const std::uint16_t* p;
  float operator()(std::size_t i) const noexcept { return bf16_to_float(p[i]); }
};
struct LoadFp16 {
  const std::uint16_t* p;
  float operator()(std::size_t i) const noexcept { return fp16_to_float(p[i]); }
};

struct Rates {
  float rate, beta;  ///< rho or m; beta1
};

/// One segment; u and v as the form and the parameter have them. Returns whether something was not finite: such news is dropped, and where
/// the accumulated message itself would overflow the element keeps its state and sends what it held.
template <feedback::Form form, bool residual, class Load>
inline __attribute__((always_inline)) bool dense_loop(Load load, float factor, const Rates& rates, float* u, float* v, float* message,
                                                      std::size_t n) noexcept {
  const float rate = rates.rate, beta = rates.beta, fresh = 1.0f - beta;
  std::uint32_t bad = 0;  // a word, not a bool: so the loop vectorises
  const auto ask = [&](std::size_t i) __attribute__((always_inline)) {
    prefetch_ahead<kAskEvery * sizeof *load.p>(load.p + i);
    if (feedback::has_momentum(form) || feedback::is_averaged(form)) prefetch_ahead<kAskEvery * sizeof(float)>(u + i);
    if (residual) prefetch_ahead<kAskEvery * sizeof(float)>(v + i);
  };
  for_prefetched(
      n, ask, [&](std::size_t i) __attribute__((always_inline)) {
        float g = 0.0f;
        bool finite = feedback::news(load(i) * factor, g);
        const float v0 = residual ? v[i] : 0.0f;
        float u1 = feedback::has_momentum(form) ? u[i] : 0.0f, x = 0.0f;
        const float u0 = u1;
        if (feedback::is_averaged(form)) g = feedback::average(beta, fresh, u[i], g);
        feedback::message<feedback::past_average(form)>(g, rate, v0, u1, x);
        const bool kept = is_finite(x);
        finite &= kept;
        x = kept ? x : v0;
        if (feedback::has_momentum(form)) u[i] = kept ? u1 : u0;
        if (residual) v[i] = x;
        message[i] = x;
        bad |= std::uint32_t(!finite);
      });
  return bad != 0;
}

template <feedback::Form form, bool residual>
THINWIRE_CLONES bool dense_segment(ConstBytes grad, std::size_t first, float factor, const Rates& rate, float* u, float* v, float* message,
                                   std::size_t n) noexcept {
  if (grad.dtype == DType::bf16)
    return dense_loop<form, residual>(LoadBf16{grad.as<std::uint16_t>() + first}, factor, rate, u, v, message, n);
  if (grad.dtype == DType::fp16)
    return dense_loop<form, residual>(LoadFp16{grad.as<std::uint16_t>() + first}, factor, rate, u, v, message, n);
  return dense_loop<form, residual>(LoadFp32{grad.as<float>() + first}, factor, rate, u, v, message, n);
}

using DenseSegment = bool (*)(ConstBytes, std::size_t, float, const Rates&, float*, float*, float*, std::size_t);

DenseSegment choose(feedback::Form form, bool momentum, bool residual) noexcept {
  using feedback::Form;
  switch (form) {
    case Form::none:
      return dense_segment<Form::none, false>;
    case Form::estimate:  // a dense message needs no estimate; the first one may lie in it
    case Form::smoothed_estimate:
      return residual ? dense_segment<Form::none, true> : dense_segment<Form::none, false>;
    case Form::control:
    case Form::smoothed_control:
    case Form::error_feedback:
      return residual ? dense_segment<Form::error_feedback, true> : dense_segment<Form::none, false>;
    case Form::momentum:
      return residual ? dense_segment<Form::momentum, true> : dense_segment<Form::momentum, false>;
    case Form::nesterov:
      return residual ? dense_segment<Form::nesterov, true> : dense_segment<Form::nesterov, false>;
    case Form::averaged:
      return momentum ? dense_segment<Form::averaged, false> : dense_segment<Form::none, false>;
    case Form::averaged_feedback:
      return momentum ? dense_segment<Form::averaged_feedback, true> : dense_segment<Form::none, false>;
  }
  return nullptr;
}

/// The same where the residual is narrow, piece by piece.
bool dense_pieces(DenseSegment segment, ConstBytes grad, std::size_t first, float factor, const Rates& rates, float* u, StateArray v,
                  float* message, std::size_t n) noexcept {
  bool bad = false;
  for (std::size_t i = 0; i < n; i += kStatePiece) {
    const std::size_t count = std::min(kStatePiece, n - i);
    StatePiece piece(v.from(i), count);
    bad |= segment(grad, first + i, factor, rates, u != nullptr ? u + i : nullptr, piece.data(), message + i, count);
  }
  return bad;
}

/// What is sent becomes an estimate, or lies until then, in bf16.
THINWIRE_CLONES void round_messages(float* message, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) message[i] = wire_round(message[i], DType::bf16);
}

bool any_nonfinite(ConstBytes x) noexcept {
  bool bad = false;
  for (std::size_t i = 0; i < x.count(); ++i) {
    if (x.dtype == DType::fp32) bad |= !is_finite(x.as<float>()[i]);
    if (x.dtype == DType::bf16) bad |= !is_finite(bf16_to_float(x.as<std::uint16_t>()[i]));
    if (x.dtype == DType::fp16) bad |= !is_finite(fp16_to_float(x.as<std::uint16_t>()[i]));
  }
  return bad;
}

}  // namespace

void dense_message(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, Bytes message,
                   std::uint32_t* flags, Stream) {
  const feedback::Form form = feedback::form_of(recursion);
  bool bad = false;
  std::size_t packed = 0;
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    const Segment& segment = plan.segments[s];
    const std::size_t n = segment.count;
    if (message.dtype != DType::fp32) {  // no state: the gradient travels as it is
      const ConstBytes part{grad.data + segment.first * size_of(grad.dtype), n * size_of(grad.dtype), grad.dtype, grad.place, grad.device};
      std::memcpy(message.data + packed * size_of(message.dtype), part.data, part.size);
      bad |= any_nonfinite(part);
      packed += n;
      continue;
    }
    const float factor = state.grad_factor != nullptr ? state.grad_factor[s] : 1.0f;
    const SegmentState& arrays = state.segments[s];
    float* out = message.as<float>() + packed;
    const StateArray v = recursion.starting && !recursion.control ? estimate_of(recursion, arrays) : residual_of(recursion, arrays);
    const Rates rates{feedback::rate_of(recursion), state.beta1 != nullptr ? state.beta1[s] : 0.0f};
    float* const u = recursion.kind == Recursion::Kind::momentum_correction || recursion.averaged ? arrays.array[0].fp32() : nullptr;
    const DenseSegment run = choose(form, u != nullptr, bool(v));
    bad |= v.narrow() ? dense_pieces(run, grad, segment.first, factor, rates, u, v, out, n)
                      : run(grad, segment.first, factor, rates, u, v.fp32(), out, n);
    if (recursion.starting && (recursion.narrow || recursion.grid)) round_messages(out, n);
    packed += n;
  }
  if (bad) *flags |= kFlagNonfinite;
}

void average_momentum(float beta1, std::span<const float> momentum, std::span<const float> mean, std::span<float> out) noexcept {
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = feedback::average(beta1, 1.0f - beta1, momentum[i], mean[i]);
}

void settle_dense(const Recursion& recursion, const Plan& plan, const StateView& state, Stream) {
  if (recursion.starting && recursion.grid) return;  // start_estimates left there what the estimate's rounding cut off
  for (std::size_t s = 0; s < plan.segments.size(); ++s) clear_state(residual_of(recursion, state.segments[s]), plan.segments[s].count);
}

}  // namespace thinwire
