#include "collectives/watch.hpp"

#include <algorithm>

namespace thinwire {

Watch::Watch(const Codec* codec, const Recursion& recursion, std::size_t parameters, bool without_state)
    : codec_(codec),
      recursion_(recursion),
      watched_(codec != nullptr && (can_probe(recursion) || (without_state && !recursion.averaged)) ? parameters : 0),
      limits_(watched_.size()) {}

void Watch::describe(std::span<const Segment> segments, std::vector<WatchedSegment>* out) const {
  Recursion proven = recursion_;
  proven.eta = Recursion::Eta::theory;
  out->clear();
  for (const Segment& segment : segments) {
    const double contraction = codec_->nominal_delta(segment);
    out->push_back(
        {segment.parameter, recursion_.control, segment.setting.eta, recursion_.control ? eta_of(proven, contraction) : 0.0f, contraction});
  }
}

bool Watch::looks(std::span<const WatchedSegment> segments, std::uint64_t step) const {
  return std::any_of(segments.begin(), segments.end(),
                     [&](const WatchedSegment& segment) { return is_look_due(segment, watched_[segment.parameter], step); });
}

void Watch::note(std::span<const WatchedSegment> segments, std::uint64_t step, std::span<const Probe> probes,
                 std::span<const double> grads) {
  for (std::size_t s = 0; s < segments.size(); ++s) {
    Watched& watched = watched_[segments[s].parameter];
    // Where the look was for another one, which may be in another bucket tomorrow, this one is none.
    if (!is_look_due(segments[s], watched, step)) continue;
    Probe sum;
    for (std::size_t part = s; part < probes.size(); part += segments.size()) sum += probes[part];
    note_look(segments[s], watched, step, sum, grads[s]);
    limits_[segments[s].parameter] = watched.state.eta;
  }
}

void Watch::set_state(std::uint32_t parameter, const WatchdogState* state) {
  watched_[parameter] = {};
  if (state != nullptr) watched_[parameter].looked = true, watched_[parameter].state = *state;
  limits_[parameter] = watched_[parameter].state.eta;
  ++version_;
}

void Watch::restart() {
  for (Watched& watched : watched_) restart_watch(watched.state);
  ++version_;
}

void Watch::forget() {
  watched_.assign(watched_.size(), {});
  limits_.assign(limits_.size(), 0);
  ++version_;
}

}  // namespace thinwire
