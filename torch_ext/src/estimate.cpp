#include "torch_ext/src/estimate.hpp"

#include <algorithm>
#include <span>

#include "compressors/core/codec.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/plan.hpp"
#include "compressors/core/registry.hpp"

namespace thinwire::torch_ext {

std::vector<Estimate> estimate(const Config& config, std::uint64_t numel, int world) {
  THINWIRE_EXPECTS(world >= 1, "world=" + std::to_string(world) + " is not a number of ranks");
  const auto codec = make_codec(config);
  const auto policy = make_policy(config);
  const double raw = 4.0 * double(numel), ring = raw * 2 * (world - 1) / world;

  const auto dense = [&](std::string stage, std::uint64_t step) { return Estimate{std::move(stage), step, 1, false, std::uint64_t(raw), ring, ring}; };
  std::vector<Estimate> stages;
  if (config.start_step() > 0 || !codec) stages.push_back(dense(codec ? "dense start" : "dense", 0));
  if (!codec) return stages;

  const auto at = [&](std::uint64_t step, const char* name) {
    const Segment segment{0, 0, std::size_t(numel), 1, std::uint32_t(std::min<std::uint64_t>(numel, 0xffffffffu)), policy->setting(step, 0), nullptr};
    const std::uint32_t part_end = 1;
    const Plan plan{std::span(&segment, 1), std::span(&part_end, 1), 0};
    const std::uint64_t capacity = codec->layout(plan).part_capacity;
    const double leaves = double(capacity) * (world - 1);
    if (config.exchange().name == "auto" && world > 1 && leaves >= ring) {
      Estimate stage = dense(std::string(name) + ", dense is cheaper", config.start_step() + step);
      stage.density = segment.setting.density;
      return stage;
    }
    return Estimate{name, config.start_step() + step, segment.setting.density, true, capacity, leaves, ring};
  };
  // A policy's settings change at multiples of its period; policy=none never.
  if (config.policy().name == "warmup") {
    const std::uint64_t period = config.policy().integer("steps");
    const std::size_t entries = config.policy().numbers("densities").size();
    for (std::size_t entry = 0; entry < entries; ++entry) {
      const std::uint64_t step = entry * period;
      if (policy->setting(step, 0) == policy->setting(entries * period, 0)) break;
      stages.push_back(at(step, "warm-up"));
    }
    std::uint64_t last = entries * period;
    while (last >= period && policy->setting(last - period, 0) == policy->setting(entries * period, 0)) last -= period;
    stages.push_back(at(last, "compressed"));
  } else {
    stages.push_back(at(0, "compressed"));
  }
  return stages;
}

}  // namespace thinwire::torch_ext
