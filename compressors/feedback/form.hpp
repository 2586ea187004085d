#pragma once
// The shapes of a recursion's kernel. Apart from feedback_math.hpp, whose includers may stand under a target pragma.

#include <cstdint>

#include "compressors/core/dtype.hpp"
#include "compressors/core/recursion.hpp"

namespace thinwire::feedback {

/// Recursion::Kind with Nesterov's variant apart: what decides the shape of a kernel.
enum class Form : std::uint8_t { none = 0, error_feedback = 1, momentum = 2, nesterov = 3 };
inline constexpr int kForms = 4;

constexpr Form form_of(const Recursion& recursion) noexcept {
  if (recursion.kind == Recursion::Kind::none) return Form::none;
  if (recursion.kind == Recursion::Kind::error_feedback) return Form::error_feedback;
  return recursion.nesterov ? Form::nesterov : Form::momentum;
}
/// The recursion's one coefficient: rho or m.
constexpr float rate_of(const Recursion& recursion) noexcept {
  return recursion.kind == Recursion::Kind::error_feedback ? recursion.decay : recursion.momentum;
}
THINWIRE_HD constexpr bool has_residual(Form form) noexcept { return form != Form::none; }
THINWIRE_HD constexpr bool has_momentum(Form form) noexcept { return form == Form::momentum || form == Form::nesterov; }

}  // namespace thinwire::feedback
