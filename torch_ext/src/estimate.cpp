#include "torch_ext/src/estimate.hpp"

#include <algorithm>
#include <limits>
#include <span>

#include "collectives/bucket_plan.hpp"
#include "collectives/ownership.hpp"
#include "compressors/core/codec.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/plan.hpp"
#include "compressors/core/registry.hpp"

namespace thinwire::torch_ext {

std::vector<Estimate> estimate(const Config& config, std::uint64_t numel, int world) {
  if (world < 1) fail(Errc::invalid_argument, "world=" + std::to_string(world) + " is not a number of ranks");
  const auto codec = make_codec(config);
  const auto policy = make_policy(config);
  const double n = world, raw = 4.0 * double(numel), ring = raw * 2 * (n - 1) / n;

  const auto whole_dense = [&](std::string stage, std::uint64_t step) {
    return Estimate{std::move(stage), step, 1, false, std::uint64_t(raw), ring, ring};
  };
  const auto passenger = [&](std::string stage, std::uint64_t step) {
    if (raw <= double(kRawPassengerBytes)) return Estimate{std::move(stage), step, 1, false, std::uint64_t(raw), raw * (n - 1), ring};
    return Estimate{std::move(stage), step, 1, false, std::uint64_t(raw + raw / n), ring, ring};
  };
  std::vector<Estimate> stages;
  const bool averaged = config.target().name == "momentum";
  const std::string freeze = averaged ? config.target().text("freeze") : "";
  // freeze=auto: the optimizer decides, so the step is not known; it is given as that of the start.
  const std::uint64_t begin = std::max(config.start_step(), averaged && freeze != "auto" ? config.target().integer("freeze") : 0);
  if (begin > 0 || averaged || !codec)
    stages.push_back(whole_dense(!codec ? "dense" : averaged ? "dense, before the freeze" : "dense start", 0));
  if (!codec) return stages;
  if (numel > std::numeric_limits<std::uint32_t>::max())
    fail(Errc::invalid_argument,
         "numel=" + std::to_string(numel) + " is too large: a compressed parameter has at most 4294967295 elements");
  if (numel < config.min_numel()) {
    stages.push_back(passenger("dense beside a payload, below min_numel", begin));
    return stages;
  }

  const auto at = [&](std::uint64_t step, const char* name) {
    const Segment segment{
        0, 0, std::size_t(numel), 1, std::uint32_t(std::min<std::uint64_t>(numel, 0xffffffffu)), policy->setting(step, 0), nullptr};
    const std::uint32_t part_end = 1;
    const Plan plan{std::span(&segment, 1), std::span(&part_end, 1), 0};
    const std::uint64_t capacity = codec->layout(plan).part_capacity, first = begin + step;
    const double leaves = double(capacity) * (n - 1);
    const bool two_phase = codec->combine() == Combine::reencode && config.exchange().name != "gather";
    if (two_phase && world == 1) return passenger(std::string(name) + ", a world of one is exact", first);
    if (two_phase) {  // a part to each owner, then each owner's mean to all: payloads of a part's size
      const Range part = owned_part(std::size_t(numel), world, 0);
      const Segment own{0, 0, part.count, 1, std::uint32_t(part.count), segment.setting, nullptr};
      const std::uint64_t bytes = codec->layout({std::span(&own, 1), std::span(&part_end, 1), 0}).part_capacity;
      return Estimate{name, first, segment.setting.density, true, bytes * std::uint64_t(world + 1), 2 * (n - 1) * double(bytes), ring};
    }
    if (config.exchange().name == "auto" && dense_sends_less(*codec, segment, DType::fp32, world))
      return passenger(std::string(name) + ", dense sends less", first);
    return Estimate{name, first, segment.setting.density, true, capacity, leaves, ring};
  };
  // Settings of a warm-up change at multiples of its period, those of policy=none never.
  const bool warms_up = config.policy().name == "warmup";
  const std::uint64_t period = warms_up ? config.policy().integer("steps") : 1;
  const std::uint64_t entries = warms_up ? config.policy().numbers("densities").size() : 0;
  for (std::uint64_t entry = 0; entry <= entries; ++entry) {
    const bool last = policy->setting(entry * period, 0) == policy->setting(entries * period, 0);
    stages.push_back(at(entry * period, last ? "compressed" : "warm-up"));
    if (last) break;
  }
  return stages;
}

}  // namespace thinwire::torch_ext
