#pragma once
// What error feedback does, looked at now and then, and EControl's watchdog: a residual that grows without bound has too large an eta.

#include <cstdint>
#include <span>
#include <vector>

#include "collectives/watch_math.hpp"
#include "compressors/core/codec.hpp"
#include "compressors/core/recursion.hpp"

namespace thinwire {

/// Each rank watches its own messages, and may have an eta of its own: H is the mean of estimates, however they came about. Deterministic:
/// what it does depends on the bucket's steps alone. A device engine's looks are taken by kernels; this is then what its host last knew.
class Watch {
 public:
  /// `without_state`: the engine can also look at messages of which no state keeps what was left out.
  Watch(const Codec* codec, const Recursion& recursion, std::size_t parameters, bool without_state);

  /// The segments of the plan, one per parameter (its first part), as a look needs them.
  void describe(std::span<const Segment> segments, std::vector<WatchedSegment>* out) const;
  /// Whether this step of them is looked at.
  bool looks(std::span<const WatchedSegment> segments, std::uint64_t step) const;
  /// `probes`: one per segment of the plan, part by part; grads: ‖g‖², unscaled, of the parameters.
  void note(std::span<const WatchedSegment> segments, std::uint64_t step, std::span<const Probe> probes, std::span<const double> grads);

  bool watches() const noexcept { return !watched_.empty(); }
  /// SegmentState::eta_limit of parameter p is at [p].
  const float* limits() const noexcept { return limits_.data(); }
  const Seen& seen(std::uint32_t parameter) const { return watched_[parameter].seen; }
  /// For checkpoints and statistics; null: not looked at yet.
  const WatchdogState* state(std::uint32_t parameter) const { return watched_[parameter].looked ? &watched_[parameter].state : nullptr; }
  /// null: as at the start.
  void set_state(std::uint32_t parameter, const WatchdogState* state);
  void forget();
  /// See restart_watch: of all parameters.
  void restart();

  // For an engine whose kernels look.

  std::span<Watched> records() noexcept { return watched_; }
  /// Changes with set_state and forget.
  std::uint64_t version() const noexcept { return version_; }

 private:
  const Codec* codec_;
  Recursion recursion_;
  std::vector<Watched> watched_;
  std::vector<float> limits_;
  std::uint64_t version_ = 0;
};

}  // namespace thinwire
