#include "compressors/ratio/warmup.hpp"

#include <string>
#include <utility>

#include "compressors/core/error.hpp"

namespace thinwire {

WarmupPolicy::WarmupPolicy(std::vector<double> densities, std::uint64_t steps, double final_density)
    : densities_(std::move(densities)), steps_(steps), final_density_(final_density) {
  const auto valid = [](double density) { return density > 0 && density <= 1; };  // false for NaN
  THINWIRE_EXPECTS(steps_ >= 1, "warmup: steps=0, but every entry must last at least one step");
  THINWIRE_EXPECTS(valid(final_density_), "warmup: the final density " + std::to_string(final_density_) + " is outside (0, 1]");
  for (const double density : densities_) {
    THINWIRE_EXPECTS(valid(density), "warmup: density " + std::to_string(density) + " is outside (0, 1]");
  }
  std::erase_if(densities_, [&](double density) { return density < final_density_; });
}

Setting WarmupPolicy::setting(std::uint64_t step, std::uint32_t /*parameter*/) const noexcept {
  const std::uint64_t entry = step / steps_;
  return {.density = entry < densities_.size() ? densities_[entry] : final_density_};
}

}  // namespace thinwire
