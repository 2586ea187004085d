#pragma once
// The shapes of a recursion's kernel. Apart from feedback_math.hpp, whose includers may stand under a target pragma.

#include <cstdint>

#include "compressors/core/dtype.hpp"
#include "compressors/core/recursion.hpp"

namespace thinwire::feedback {

/// Recursion::Kind with Nesterov's variant and the averaged ones apart: what decides the shape of a kernel.
enum class Form : std::uint8_t {
  none,
  error_feedback,
  momentum,
  nesterov,
  estimate,  ///< EF21
  smoothed_estimate,
  control,  ///< EControl
  smoothed_control,
  averaged,
  averaged_feedback
};
inline constexpr int kForms = 10, kGradientForms = 8;  ///< the first eight know no shared momentum

constexpr Form form_of(const Recursion& recursion) noexcept {
  if (recursion.kind == Recursion::Kind::none) return recursion.averaged ? Form::averaged : Form::none;
  if (recursion.kind == Recursion::Kind::error_feedback) return recursion.averaged ? Form::averaged_feedback : Form::error_feedback;
  if (recursion.kind == Recursion::Kind::estimate) {
    if (recursion.control) return recursion.fresh < 1 ? Form::smoothed_control : Form::control;
    return recursion.fresh < 1 ? Form::smoothed_estimate : Form::estimate;
  }
  return recursion.nesterov ? Form::nesterov : Form::momentum;
}
/// The recursion's one coefficient: rho or m; eta is each segment's own.
constexpr float rate_of(const Recursion& recursion) noexcept {
  if (recursion.kind == Recursion::Kind::estimate) return 1.0f;  // of dense messages, e + g
  return recursion.kind == Recursion::Kind::error_feedback ? recursion.decay : recursion.momentum;
}
THINWIRE_HD constexpr bool has_estimate(Form form) noexcept { return form >= Form::estimate && form <= Form::smoothed_control; }
THINWIRE_HD constexpr bool is_control(Form form) noexcept { return form == Form::control || form == Form::smoothed_control; }
THINWIRE_HD constexpr bool is_smoothed(Form form) noexcept { return form == Form::smoothed_estimate || form == Form::smoothed_control; }
THINWIRE_HD constexpr bool has_residual(Form form) noexcept {
  return form != Form::none && form != Form::averaged && (!has_estimate(form) || is_control(form));
}
THINWIRE_HD constexpr bool has_momentum(Form form) noexcept { return form == Form::momentum || form == Form::nesterov; }

THINWIRE_HD constexpr bool is_averaged(Form form) noexcept { return form == Form::averaged || form == Form::averaged_feedback; }
/// EControl's eta of a segment: its setting, unless a watchdog has lowered it (SegmentState::eta_limit).
THINWIRE_HD inline float limited_eta(float eta, const float* limit) noexcept {
  return limit != nullptr && *limit > 0 && *limit < eta ? *limit : eta;
}
/// What the form does with beta1·m + (1 − beta1)·g once it stands where g does.
THINWIRE_HD constexpr Form past_average(Form form) noexcept {
  return form == Form::averaged ? Form::none : form == Form::averaged_feedback ? Form::error_feedback : form;
}

}  // namespace thinwire::feedback
