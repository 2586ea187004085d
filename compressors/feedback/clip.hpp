#pragma once
// Local gradient clipping, written once for host and GPU. Apart from feedback_math.hpp, which SIMD files include under a target pragma.

#include <cmath>
#include <cstddef>

#include "compressors/core/dtype.hpp"

namespace thinwire::feedback {

/// What gradients of `count` of `total_numel` elements are multiplied by, whose squares (as they came) sum up to `squared_norm`.
/// @source clip_factors
THINWIRE_HD inline float clip_factor(float clip_norm, double squared_norm, std::size_t count, float unscale, int world,
                                     std::size_t total_numel) noexcept {
  if (clip_norm <= 0) return unscale;
  const double limit = double(clip_norm) * std::sqrt(double(world) * double(count) / double(total_numel));
  const double norm = double(unscale) * std::sqrt(squared_norm);
  return norm > limit ? float(double(unscale) * (limit / norm)) : unscale;
}

}  // namespace thinwire::feedback
