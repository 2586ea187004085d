#pragma once
// Density warm-up: few steps at high densities before the codec's own one, for all parameters alike.

#include <cstdint>
#include <vector>

#include "compressors/core/policy.hpp"

namespace thinwire {

/// Entry i of `densities` holds for the synchronised steps [i·steps, (i + 1)·steps), then `final_density` for good. Entries below the final
/// density are left out before counting, so a warm-up never sends less than what follows it. No entries: `final_density` from the first
/// step on.
/// @source Lin et al. 2018, section 3.3 (warm-up training): sparsity 75, 93.75, 98.4375, 99.6, 99.9 %. The paper counts epochs; here
/// `steps` says how many synchronised steps one entry lasts.
class WarmupPolicy final : public RatioPolicy {
 public:
  /// @param densities each in (0, 1].  @param steps at least 1.  @param final_density in (0, 1].  @throws Error{invalid_argument}
  WarmupPolicy(std::vector<double> densities, std::uint64_t steps, double final_density);

  Setting setting(std::uint64_t step, std::uint32_t parameter) const noexcept override;

 private:
  std::vector<double> densities_;
  std::uint64_t steps_;
  double final_density_;
};

}  // namespace thinwire
