#include "collectives/watch.hpp"

#include <algorithm>
#include <cmath>

namespace thinwire {
namespace {

constexpr std::uint64_t kEvery = 64;           // steps between two looks: two passes over gradient and state each
constexpr std::uint64_t kEveryRisky = 4;       // the same where eta is above the codec's contraction, and may be unstable
constexpr double kGrowth = 10;                 // of ‖e‖²/‖g‖² within a window
constexpr double kWindow = 10, kSettling = 2;  // steps × eta: a window, and what a residual that starts from nothing takes to settle

/// Up to the contraction (rounding aside) eta is stable: a ratio that grows tenfold is then a step whose gradient is small.
bool is_risky(float eta, double contraction) noexcept { return double(eta) > 1.01 * contraction; }

}  // namespace

Watch::Watch(const Codec* codec, const Recursion& recursion, std::size_t parameters)
    : codec_(codec), recursion_(recursion), watched_(codec != nullptr && can_probe(recursion) ? parameters : 0) {}

float Watch::eta_of_segment(const Segment& segment) const {
  const float lowered = watched_[segment.parameter].state.eta;
  return lowered > 0 ? std::min(lowered, segment.setting.eta) : segment.setting.eta;
}

bool Watch::is_due(const Segment& segment, std::uint64_t step) const {
  const bool risky = recursion_.control && is_risky(eta_of_segment(segment), codec_->nominal_delta(segment));
  return step % (risky ? kEveryRisky : kEvery) == 0 || !watched_[segment.parameter].looked;
}

bool Watch::looks(std::span<const Segment> segments, std::uint64_t step) const {
  if (watched_.empty()) return false;
  return std::any_of(segments.begin(), segments.end(), [&](const Segment& segment) { return is_due(segment, step); });
}

std::span<const Segment> Watch::adjusted(std::span<const Segment> segments) {
  if (!lowered_any_) return segments;
  adjusted_.assign(segments.begin(), segments.end());
  for (Segment& segment : adjusted_) segment.setting.eta = eta_of_segment(segment);
  return adjusted_;
}

void Watch::note(std::span<const Segment> segments, std::uint64_t step, std::span<const Probe> probes, std::span<const double> grads) {
  for (std::size_t s = 0; s < segments.size(); ++s) {
    const std::uint32_t parameter = segments[s].parameter;
    if (std::any_of(segments.begin(), segments.begin() + std::ptrdiff_t(s),
                    [&](const Segment& other) { return other.parameter == parameter; }))
      continue;                                // its other parts were added up with the first
    if (!is_due(segments[s], step)) continue;  // the look was for another one, which may be in another bucket tomorrow
    Probe sum;
    const double grad = grads[s];
    for (std::size_t part = s; part < segments.size(); ++part) {
      if (segments[part].parameter != parameter) continue;
      sum.message += probes[part].message;
      sum.left += probes[part].left;
      sum.stale += probes[part].stale;
      sum.followed += probes[part].followed;
      sum.residual += probes[part].residual;
    }
    Watched& watched = watched_[parameter];
    watched.seen.any = watched.looked = true;
    watched.seen.delta = sum.message > 0 ? 1 - sum.left / sum.message : 1;
    watched.seen.stale = sum.followed > 0 ? std::sqrt(sum.stale / sum.followed) : 0;
    const double contraction = std::min(codec_->nominal_delta(segments[s]), watched.seen.delta);
    if (recursion_.control && grad > 0 && is_risky(eta_of_segment(segments[s]), contraction))
      watch(watched.state, segments[s], step, sum.residual / grad);
  }
}

void Watch::set_state(std::uint32_t parameter, const WatchdogState* state) {
  watched_[parameter] = {};
  if (state == nullptr) return;
  watched_[parameter].looked = true;
  watched_[parameter].state = *state;
  lowered_any_ |= state->eta > 0;
}

void Watch::forget() { watched_.assign(watched_.size(), {}); }

void Watch::watch(WatchdogState& state, const Segment& segment, std::uint64_t step, double ratio) {
  const double eta = eta_of_segment(segment);
  const auto age = [&] { return double(step + 1 - state.since) * eta; };
  if (state.since == 0) state.since = step + 1;
  if (state.ratio == 0) {
    if (age() < kSettling) return;
  } else if (ratio > kGrowth * state.ratio) {
    Recursion proven = recursion_;
    proven.eta = Recursion::Eta::theory;
    state.eta = std::min(float(eta), std::max(float(eta / 2), eta_of(proven, codec_->nominal_delta(segment))));
    ++state.cuts;
    lowered_any_ = true;
  } else if (age() < kWindow) {
    return;
  } else {
    ratio = std::min(ratio, state.ratio);  // slow growth adds up from window to window
  }
  state.ratio = ratio;
  state.since = step + 1;
}

}  // namespace thinwire
