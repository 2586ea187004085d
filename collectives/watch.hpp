#pragma once
// What error feedback does, looked at now and then, and EControl's watchdog: a residual that grows without bound has too large an eta.

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "collectives/reducer.hpp"
#include "compressors/core/codec.hpp"
#include "compressors/core/probe.hpp"
#include "compressors/core/recursion.hpp"

namespace thinwire {

/// Of one parameter, at the last step that was looked at.
struct Seen {
  bool any = false;
  double delta = 0;  ///< 1 − ‖x − C(x)‖²/‖x‖²
  double stale = 0;  ///< ‖g − h‖/‖g‖, of the average where there is one
};

/// Each rank watches its own messages, and may have an eta of its own: H is the mean of estimates, however they came about. Deterministic:
/// what it does depends on the bucket's steps alone.
class Watch {
 public:
  Watch(const Codec* codec, const Recursion& recursion, std::size_t parameters);

  /// Whether this step of these segments is looked at.
  bool looks(std::span<const Segment> segments, std::uint64_t step) const;
  /// The segments with the eta that the watchdog has left them; the same span where it has done nothing.
  std::span<const Segment> adjusted(std::span<const Segment> segments);
  /// `probes`: one per segment; several segments of one parameter are its parts. `grads`: ‖g‖², unscaled, of the parameters in the order in
  /// which the segments begin.
  void note(std::span<const Segment> segments, std::uint64_t step, std::span<const Probe> probes, std::span<const double> grads);

  bool watches() const noexcept { return !watched_.empty(); }
  const Seen& seen(std::uint32_t parameter) const { return watched_[parameter].seen; }
  /// For checkpoints and statistics; null: not looked at yet.
  const WatchdogState* state(std::uint32_t parameter) const { return watched_[parameter].looked ? &watched_[parameter].state : nullptr; }
  /// null: as at the start.
  void set_state(std::uint32_t parameter, const WatchdogState* state);
  void forget();

 private:
  struct Watched {
    Seen seen;
    bool looked = false;  ///< in this run or in the one that it goes on from
    WatchdogState state;
  };
  bool is_due(const Segment& segment, std::uint64_t step) const;
  float eta_of_segment(const Segment& segment) const;
  void watch(WatchdogState& state, const Segment& segment, std::uint64_t step, double ratio);

  const Codec* codec_;
  Recursion recursion_;
  std::vector<Watched> watched_;
  std::vector<Segment> adjusted_;
  bool lowered_any_ = false;
};

}  // namespace thinwire
