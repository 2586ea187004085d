#include "torch_ext/src/estimate.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "collectives/bucket_plan.hpp"
#include "compressors/core/codec.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/registry.hpp"

namespace thinwire::torch_ext {
namespace {

constexpr std::size_t kOther = 64;  ///< elements of the tensor beside which another one stays dense

struct Sent {
  double payload = 0, wire = 0;
};

/// What a bucket sends, by the plan that the reducer goes by.
class Buckets {
 public:
  Buckets(const Config& config, const Codec& codec, int world)
      : codec_(codec), recursion_(make_recursion(config)), world_(world), two_phase_(uses_two_phase(config, codec)) {}

  /// A compressed tensor alone in its bucket.
  Sent compressed(std::size_t numel, const Setting& setting) const { return of({slot(numel, setting, true)}); }

  /// What a tensor that stays dense adds to a bucket that is sent compressed.
  Sent beside(std::size_t numel, const Setting& setting) const {
    const ParameterSlot other = slot(kOther, setting, world_ > 1);
    const Sent without = of({other}), with = of({other, slot(numel, setting, false)});
    return {with.payload - without.payload, with.wire - without.wire};
  }

 private:
  static ParameterSlot slot(std::size_t numel, const Setting& setting, bool compressed) {
    ParameterSlot slot;
    slot.numel = numel;
    slot.rows = 1;
    slot.columns = std::uint32_t(std::min<std::size_t>(numel, UINT32_MAX));
    slot.compressible = compressed;
    slot.setting = setting;
    return slot;
  }

  Sent of(const std::vector<ParameterSlot>& slots) const {
    std::vector<std::uint32_t> ids(slots.size());
    std::iota(ids.begin(), ids.end(), 0u);
    const BucketPlan plan = make_bucket_plan(ids, DType::fp32, false, slots, &codec_, recursion_, world_, 0, two_phase_);
    const double n = world_, gathered = double(plan.contribution);
    const double scattered = plan.two_phase ? double(plan.phases.slot) * n : double(plan.sent_bytes());
    return {scattered + gathered, scattered * (n - 1) / n + gathered * (n - 1)};
  }

  const Codec& codec_;
  const Recursion recursion_;
  const int world_;
  const bool two_phase_;
};

}  // namespace

std::vector<Estimate> estimate(const Config& config, std::uint64_t numel, int world) {
  if (world < 1) fail(Errc::invalid_argument, "world=" + std::to_string(world) + " is not a number of ranks");
  const auto codec = make_codec(config);
  const auto policy = make_policy(config);
  const double n = world, raw = 4.0 * double(numel), ring = raw * 2 * (n - 1) / n;

  std::vector<Estimate> stages;
  const bool averaged = config.target().name == "momentum";
  const std::string freeze = averaged ? config.target().text("freeze") : "";
  const bool starts_dense = make_recursion(config).kind == Recursion::Kind::estimate && config.feedback().text("init") == "dense";
  const std::uint64_t begin = std::max<std::uint64_t>(
      {config.start_step(), averaged && freeze != "auto" ? config.target().integer("freeze") : 0, starts_dense ? 1u : 0u});
  if (begin > 0 || averaged || !codec)
    stages.push_back({!codec     ? "dense"
                      : averaged ? "dense, before the freeze"
                                 : "dense start",
                      0, 1, false, std::uint64_t(raw), ring, ring});
  if (!codec) return stages;
  if (numel > std::numeric_limits<std::uint32_t>::max())
    fail(Errc::invalid_argument,
         "numel=" + std::to_string(numel) + " is too large: a compressed parameter has at most 4294967295 elements");
  const Buckets buckets(config, *codec, world);
  // The optimizer decides when freeze=auto freezes.
  const auto at = [&](std::uint64_t step) { return freeze == "auto" ? std::nullopt : std::optional(begin + step); };
  const auto passenger = [&](std::string stage, std::uint64_t step) {
    const Sent sent = buckets.beside(std::size_t(numel), policy->setting(step, 0));
    return Estimate{std::move(stage), at(step), 1, false, std::uint64_t(sent.payload), sent.wire, ring};
  };
  if (numel < config.min_numel()) {
    stages.push_back(passenger("dense beside a payload, below min_numel", 0));
    return stages;
  }

  const auto stage = [&](std::uint64_t step, bool last) {
    const std::string name = last ? "compressed" : "warm-up";
    const Setting setting = policy->setting(step, 0);
    const Segment segment{0, 0, std::size_t(numel), 1, std::uint32_t(numel), setting, nullptr};
    const DenseRule rule = dense_rule(config, *codec, segment, DType::fp32, world);
    if (rule == DenseRule::alone) return passenger(name + ", a world of one is exact", step);
    if (rule == DenseRule::sends_less) return passenger(last ? "dense, which sends less" : "warm-up, dense sends less", step);
    const Sent sent = buckets.compressed(std::size_t(numel), setting);
    return Estimate{name, at(step), setting.density, true, std::uint64_t(sent.payload), sent.wire, ring};
  };
  // Settings of a warm-up change at multiples of its period, those of policy=none never.
  const bool warms_up = config.policy().name == "warmup";
  const std::uint64_t period = warms_up ? config.policy().integer("steps") : 1;
  const std::uint64_t entries = warms_up ? config.policy().numbers("densities").size() : 0;
  for (std::uint64_t entry = 0; entry <= entries; ++entry) {
    const bool last = policy->setting(entry * period, 0) == policy->setting(entries * period, 0);
    stages.push_back(stage(entry * period, last));
    if (last) break;
  }
  return stages;
}

}  // namespace thinwire::torch_ext
