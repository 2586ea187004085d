#pragma once
// The seam of ratio policies: which setting each parameter gets at a step.

#include <cstddef>
#include <cstdint>

#include "compressors/core/plan.hpp"

namespace thinwire {

/// Pure function of (step, parameter) here; policies that measure decide on rank 0 and broadcast in the reducer's own queue.
class RatioPolicy {
 public:
  virtual ~RatioPolicy() = default;
  /// `step` counts compressed-eligible synchronised steps: those after start_step.
  virtual Setting setting(std::uint64_t step, std::uint32_t parameter) const noexcept = 0;
};

}  // namespace thinwire
