#pragma once
// The shapes of a recursion's kernel. Apart from feedback_math.hpp, whose includers may stand under a target pragma.

#include <cstdint>

#include "compressors/core/dtype.hpp"
#include "compressors/core/recursion.hpp"

namespace thinwire::feedback {

/// Recursion::Kind with Nesterov's variant and the averaged ones apart: what decides the shape of a kernel.
enum class Form : std::uint8_t { none = 0, error_feedback = 1, momentum = 2, nesterov = 3, averaged = 4, averaged_feedback = 5 };
inline constexpr int kForms = 6, kGradientForms = 4;  ///< the first four know no shared momentum

constexpr Form form_of(const Recursion& recursion) noexcept {
  if (recursion.kind == Recursion::Kind::none) return recursion.averaged ? Form::averaged : Form::none;
  if (recursion.kind == Recursion::Kind::error_feedback) return recursion.averaged ? Form::averaged_feedback : Form::error_feedback;
  return recursion.nesterov ? Form::nesterov : Form::momentum;
}
/// The recursion's one coefficient: rho or m.
constexpr float rate_of(const Recursion& recursion) noexcept {
  return recursion.kind == Recursion::Kind::error_feedback ? recursion.decay : recursion.momentum;
}
THINWIRE_HD constexpr bool has_residual(Form form) noexcept { return form != Form::none && form != Form::averaged; }
THINWIRE_HD constexpr bool has_momentum(Form form) noexcept { return form == Form::momentum || form == Form::nesterov; }

THINWIRE_HD constexpr bool is_averaged(Form form) noexcept { return form == Form::averaged || form == Form::averaged_feedback; }
/// What the form does with beta1·m + (1 − beta1)·g once it stands where g does.
THINWIRE_HD constexpr Form past_average(Form form) noexcept {
  return form == Form::averaged ? Form::none : form == Form::averaged_feedback ? Form::error_feedback : form;
}

}  // namespace thinwire::feedback
