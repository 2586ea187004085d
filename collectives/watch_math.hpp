#pragma once
// The watchdog's arithmetic, of one parameter: on the host and in a kernel.

#include <cmath>
#include <cstdint>

#include "collectives/watchdog_state.hpp"
#include "compressors/core/dtype.hpp"
#include "compressors/core/probe.hpp"

namespace thinwire {

/// Of one parameter, at the last step that was looked at.
struct Seen {
  bool any = false;
  double delta = 0;  ///< 1 − ‖x − C(x)‖²/‖x‖²
  double stale = 0;  ///< ‖g − h‖/‖g‖, of the average where there is one
};

struct Watched {
  Seen seen;
  bool looked = false;  ///< in this run or in the one that it goes on from
  WatchdogState state;
};

/// What of the plan a look at a parameter needs.
struct WatchedSegment {
  std::uint32_t parameter = 0;
  bool control = false;    ///< Recursion::control
  float eta = 0;           ///< Setting::eta
  float proven = 0;        ///< eta=theory: not lowered below
  double contraction = 1;  ///< the codec's nominal one
};

inline constexpr std::uint64_t kLookEvery = 64;      // steps between two looks: two passes over gradient and state each
inline constexpr std::uint64_t kLookEveryRisky = 4;  // the same where eta is above the codec's contraction, and may be unstable
inline constexpr double kWatchGrowth = 10;           // of ‖e‖²/‖g‖² since a window began
inline constexpr double kWatchSlowGrowth = 100;      // of the same since eta is what it is: less than that is a training that changes
inline constexpr double kWatchWindow = 10,
                        kSettling = 2;           // steps × eta: a window, and what a residual that starts from nothing takes to settle
inline constexpr double kPersistence = 2;        // steps × eta for which it stays grown: a single odd gradient leaves e sooner
inline constexpr std::uint32_t kLooksGrown = 3;  // and at so many looks
inline constexpr double kJump = 2;               // of the largest ‖g‖²: other gradients, whose residual has yet to fill
inline constexpr double kFaint = 4;              // times less than the largest ‖g‖²: the ratio says too little of this step
inline constexpr double kHopeless = 1e4;         // times 1/eta² of the proven eta: no stable residual is as large

/// Up to the contraction (rounding aside) eta is stable: a ratio that grows tenfold is then a step whose gradient is small.
THINWIRE_HD inline bool is_risky(float eta, double contraction) noexcept { return double(eta) > 1.01 * contraction; }

THINWIRE_HD inline float watched_eta(const WatchedSegment& segment, const Watched& watched) noexcept {
  return watched.state.eta > 0 && watched.state.eta < segment.eta ? watched.state.eta : segment.eta;
}

THINWIRE_HD inline bool is_look_due(const WatchedSegment& segment, const Watched& watched, std::uint64_t step) noexcept {
  const bool risky = segment.control && is_risky(watched_eta(segment, watched), segment.contraction);
  return step % (risky ? kLookEveryRisky : kLookEvery) == 0 || !watched.looked;
}

/// As after a step that has emptied the residual, or a call that has scaled it: what it was before says nothing any more.
THINWIRE_HD inline void restart_watch(WatchdogState& state) noexcept { state.ratio = state.recent = 0, state.since = 0, state.grown = 0; }

/// ‖e‖² and ‖g‖² of a step whose eta may be unstable.
THINWIRE_HD inline void watch_growth(const WatchedSegment& segment, WatchdogState& state, float eta, std::uint64_t step, double residual,
                                     double grad) noexcept {
  const double gap = is_risky(eta, segment.contraction) ? double(kLookEveryRisky) : double(kLookEvery), rate = double(eta);
  // The largest gradient of a window or so: a small one among others is no growth.
  const double faded = state.grad / (1 + gap * rate / kWatchWindow);
  const bool jumped = grad > kJump * faded;
  state.grad = grad > faded ? grad : faded;
  const double ratio = residual / state.grad, proven = double(segment.proven);
  const auto lower = [&](float to) {
    state.eta = eta < to ? eta : to;
    ++state.cuts;
  };
  if (ratio * proven * proven > kHopeless && eta > segment.proven) {
    lower(segment.proven);
    return restart_watch(state);
  }
  // A window begins where a residual has settled. Until then, and where the gradient is small beside the largest, the ratio is too small to
  // be what later ones are compared with.
  const std::uint64_t settled = step + 1 + std::uint64_t(rate > 1e-9 ? kSettling / rate : kSettling * 1e9);
  if (jumped || state.since == 0 || state.since > settled) state.since = settled;
  if (step + 1 < state.since && state.ratio == 0) return;
  const double age = step + 1 < state.since ? 0 : double(step + 1 - state.since) * rate;
  if (state.ratio == 0) {
    state.ratio = state.recent = ratio;
    state.since = step + 1;
  } else if (ratio > kWatchGrowth * state.recent || ratio > kWatchSlowGrowth * state.ratio) {
    if (++state.grown < kLooksGrown || double(state.grown) * gap * rate < kPersistence) return;
    if (eta > segment.proven) lower(eta / 2 > segment.proven ? eta / 2 : segment.proven);
    state.ratio = state.recent = ratio;
    state.since = step + 1;
    state.grown = 0;
  } else {
    state.grown = 0;
    if (step + 1 < state.since || grad * kFaint < state.grad) return;
    state.ratio = ratio < state.ratio ? ratio : state.ratio;
    const bool ended = age >= kWatchWindow;
    if (ended || ratio < state.recent) state.recent = ratio;
    if (ended) state.since = step + 1;
  }
}

/// A look that is due. `sum`: over the parameter's parts; `grad`: ‖g‖², unscaled.
THINWIRE_HD inline void note_look(const WatchedSegment& segment, Watched& watched, std::uint64_t step, const Probe& sum,
                                  double grad) noexcept {
  watched.seen.any = watched.looked = true;
  watched.seen.delta = sum.message > 0 ? 1 - sum.left / sum.message : 1;
  watched.seen.stale = sum.followed > 0 ? sqrt(sum.stale / sum.followed) : 0;
  const double contraction = segment.contraction < watched.seen.delta ? segment.contraction : watched.seen.delta;
  const float eta = watched_eta(segment, watched);
  if (segment.control && grad > 0 && is_risky(eta, contraction)) watch_growth(segment, watched.state, eta, step, sum.residual, grad);
}

}  // namespace thinwire
