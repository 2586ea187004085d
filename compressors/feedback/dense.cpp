// The dense step of the recursion: nothing is left out, so the whole message travels and the residual is empty afterwards. Unfused from any codec.
#include <cstring>

#include "compressors/core/clones.hpp"
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

/// One segment. u may be null (no momentum), v may be null (no residual). Returns whether something was not finite; such news is dropped, and where the accumulated message
/// itself would overflow the element keeps its state and sends what it held.
template <class Math, class Load>
inline __attribute__((always_inline)) bool dense_loop(const Math& math, Load load, float factor, float* u, float* v, float* message, std::size_t n) noexcept {
  bool bad = false;
  for (std::size_t i = 0; i < n; ++i) {
    const float given = load(i) * factor;
    const float g = is_finite(given) ? given : 0.0f;
    const float u0 = u != nullptr ? u[i] : 0.0f, v0 = v != nullptr ? v[i] : 0.0f;
    float u1 = u0, x = v0;
    math(g, u1, x);
    const bool overflow = !is_finite(x);
    bad |= !is_finite(given) | overflow;
    u1 = overflow ? u0 : u1;
    x = overflow ? v0 : x;
    if (u != nullptr) u[i] = u1;
    if (v != nullptr) v[i] = x;
    message[i] = x;
  }
  return bad;
}

template <class Math>
bool dense_segment(const Math& math, ConstBytes grad, std::size_t first, float factor, float* u, float* v, float* message, std::size_t n) noexcept {
  if (grad.dtype == DType::bf16) return dense_loop(math, LoadBf16{grad.as<std::uint16_t>() + first}, factor, u, v, message, n);
  if (grad.dtype == DType::fp16) return dense_loop(math, LoadFp16{grad.as<std::uint16_t>() + first}, factor, u, v, message, n);
  return dense_loop(math, LoadFp32{grad.as<float>() + first}, factor, u, v, message, n);
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

void dense_message(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, Bytes message, std::uint32_t* flags, Stream) {
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
    switch (recursion.kind) {
      case Recursion::Kind::none:
        bad |= dense_segment(detail::NoFeedback{}, grad, segment.first, factor, nullptr, nullptr, out, n);
        break;
      case Recursion::Kind::error_feedback:
        bad |= dense_segment(detail::ErrorFeedback{recursion.decay}, grad, segment.first, factor, nullptr, arrays.array[0], out, n);
        break;
      case Recursion::Kind::momentum_correction:
        if (recursion.nesterov) {
          bad |= dense_segment(detail::NesterovCorrection{recursion.momentum}, grad, segment.first, factor, arrays.array[0], arrays.array[1], out, n);
        } else {
          bad |= dense_segment(detail::MomentumCorrection{recursion.momentum}, grad, segment.first, factor, arrays.array[0], arrays.array[1], out, n);
        }
        break;
    }
    packed += n;
  }
  if (bad) *flags |= kFlagNonfinite;
}

void settle_dense(const Recursion& recursion, const Plan& plan, const StateView& state, Stream) {
  for (std::size_t s = 0; s < plan.segments.size(); ++s)
    if (float* residual = residual_of(recursion, state.segments[s])) std::memset(residual, 0, plan.segments[s].count * sizeof(float));
}

}  // namespace thinwire
