#include "collectives/bucket_plan.hpp"

#include <algorithm>
#include <bit>
#include <numeric>

#include "collectives/ownership.hpp"
#include "compressors/core/wire.hpp"

namespace thinwire {
namespace {

std::string describe(std::span<const std::uint32_t> ids, const std::vector<ParameterSlot>& slots) {
  if (ids.empty()) return "an empty bucket";
  const std::string first = slots[ids.front()].parameter.name;
  if (ids.size() == 1) return first;
  return first + " … " + slots[ids.back()].parameter.name + " (" + std::to_string(ids.size()) + " parameters)";
}

SegmentState from(SegmentState state, std::size_t first) {
  for (StateArray& array : state.array) array = array.from(first);
  return state;
}

bool r_owns(Range part, const Passengers::Owned& owned) { return part.count != 0 && part.first == owned.first; }

/// The parts of a group that `rank` owns, with their state.
Passengers owned_by(const Passengers& group, int world, int rank) {
  Passengers owned;
  owned.dtype = group.dtype;
  owned.stateful = group.stateful;
  for (std::size_t s = 0; s < group.segments.size(); ++s) {
    const Range part = owned_part(group.segments[s].count, world, rank);
    Segment& segment = owned.segments.emplace_back(group.segments[s]);
    segment.first += part.first;
    segment.count = part.count;
    owned.states.push_back(from(group.states[s], part.first));
    owned.betas.push_back(group.betas[s]);
    owned.owned.emplace_back();
    if (group.owned[s].residual != nullptr && r_owns(part, group.owned[s])) owned.owned.back() = {0, part.count, group.owned[s].residual};
    owned.count += part.count;
  }
  return owned;
}

/// The compressed segments in the array of momenta. A segment knows its place in its parameter by what the parameter has before it.
std::vector<Segment> in_momenta(const BucketPlan& bucket, const std::vector<ParameterSlot>& slots) {
  std::vector<Segment> out = bucket.segments;
  for (std::size_t s = 0; s < out.size(); ++s) {
    const ParameterSlot& slot = slots[out[s].parameter];
    out[s].first = slot.momentum_at + std::size_t(bucket.states[s].array[0].fp32() - slot.shared_momentum);
  }
  return out;
}

/// Whole parameters become N parts, rank by rank.
void cut_into_parts(BucketPlan& bucket, const std::vector<ParameterSlot>& slots, int world, int rank) {
  const std::vector<Segment>& whole = bucket.phases.whole = std::move(bucket.segments);
  const std::vector<SegmentState> states = std::move(bucket.states);
  const std::vector<float> betas = std::move(bucket.betas);
  bucket.segments.clear(), bucket.states.clear(), bucket.betas.clear();
  TwoPhase& phases = bucket.phases;
  for (int r = 0; r < world; ++r) {
    for (std::size_t s = 0; s < whole.size(); ++s) {
      const Range part = owned_part(whole[s].count, world, r);
      Segment& segment = bucket.segments.emplace_back(whole[s]);
      segment.first += part.first;
      segment.count = part.count;
      if (segment.live != nullptr) segment.live += part.first / 8;
      bucket.states.push_back(from(states[s], part.first));
      bucket.betas.push_back(betas[s]);
      if (r != rank) continue;
      const ParameterSlot& slot = slots[segment.parameter];
      Segment& own = phases.own.emplace_back(segment);
      own.first = phases.own_count;
      phases.own_count += round_up(part.count, 16);  // cache lines of their own
      phases.own_states.push_back({{slot.server_residual}, nullptr});
      SegmentState taken{{slot.server_residual}, nullptr};
      if (slot.shared_momentum != nullptr) taken.array = {slot.shared_momentum + part.first, slot.server_residual};
      phases.own_taken.push_back(taken);
      phases.own_betas.push_back(slot.beta1);
    }
    bucket.part_end.push_back(std::uint32_t(bucket.segments.size()));
  }
}

/// Bytes of workspace for both phases.
std::size_t phases_workspace(const BucketPlan& bucket, const Codec& codec, int world) {
  const WireLayout own = codec.layout(bucket.own_part(0));
  return std::max({bucket.layout.workspace, own.workspace, std::max(bucket.layout.per_payload, own.per_payload) * std::size_t(world)});
}

}  // namespace

std::size_t ParameterSlot::masked() const noexcept {
  if (live.empty()) return 0;
  std::size_t alive = 0;
  for (std::size_t i = 0; i < numel / 8; ++i) alive += std::size_t(std::popcount(live[i]));
  for (std::size_t i = numel / 8 * 8; i < numel; ++i) alive += is_live(live.data(), i) ? 1 : 0;
  return numel - alive;
}

std::size_t BucketPlan::sent_bytes() const noexcept { return std::accumulate(send_bytes.begin(), send_bytes.end(), std::size_t(0)); }

std::size_t scratch_bytes(const BucketPlan& bucket, std::size_t world) noexcept {
  if (bucket.whole_dense) return (bucket.count + 1) * sizeof(float);
  const std::size_t workspace = std::max(bucket.layout.workspace, bucket.layout.per_payload * world);
  const std::size_t received = bucket.owners && !bucket.two_phase ? bucket.recv_bytes.front() * world : 0;
  const std::size_t arrived = std::max({bucket.contribution * world, bucket.phases.slot * world, received});
  return arrived + std::max(bucket.sent_bytes(), bucket.phases.slot * world) + bucket.phases.own_count * sizeof(float) + workspace;
}

bool uses_two_phase(const Config& config, const Codec& codec) noexcept {
  return codec.combine() == Combine::reencode && config.exchange().name != "gather";
}

DenseRule dense_rule(const Config& config, const Codec& codec, const Segment& segment, DType dtype, int world) {
  const bool two_phase = uses_two_phase(config, codec);
  if (world == 1 && (two_phase || config.target().name == "momentum")) return DenseRule::alone;
  if (two_phase || config.exchange().name != "auto") return DenseRule::none;
  const std::uint32_t end = 1;
  const double capacity = double(codec.layout({std::span(&segment, 1), std::span(&end, 1), 0}).part_capacity - sizeof(wire::Header));
  const double n = world;
  return capacity * (n - 1) >= 2 * (n - 1) / n * double(segment.count * size_of(dtype)) ? DenseRule::sends_less : DenseRule::none;
}

BucketPlan make_bucket_plan(std::span<const std::uint32_t> ids, DType dtype, bool whole_dense, const std::vector<ParameterSlot>& slots,
                            const Codec* codec, const Recursion& recursion, int world, int rank, bool two_phase) {
  BucketPlan bucket;
  bucket.recursion = recursion;
  bucket.ids.assign(ids.begin(), ids.end());
  bucket.dtype = dtype;
  bucket.whole_dense = whole_dense;
  bucket.name = describe(ids, slots);
  bucket.context = wire::hash_bytes(ids.data(), ids.size_bytes(), std::uint64_t(dtype));
  bucket.passengers[0].stateful = true;
  bucket.passengers[1].dtype = dtype;

  for (const std::uint32_t id : ids) {
    const ParameterSlot& slot = slots[id];
    Segment segment{id, bucket.count, slot.numel, slot.rows, slot.columns, slot.setting, slot.live.empty() ? nullptr : slot.live.data()};
    bucket.count += slot.numel;
    if (slot.shared_momentum != nullptr) {
      bucket.momenta.push_back({id, segment.first, segment.count, slot.shared_momentum, slot.beta1, segment.live,
                                whole_dense || slot.dense_now, bucket.passengers[0].count});
      if (segment.live != nullptr) bucket.context = wire::hash_bytes(segment.live, slot.live.size(), bucket.context);
    }
    if (!whole_dense && slot.compressible && !slot.dense_now) {
      bucket.segments.push_back(segment);
      bucket.states.push_back(slot.state);
      bucket.betas.push_back(slot.beta1);
      continue;
    }
    const bool has_state = bool(residual_of(recursion, slot.state)) || recursion.kind == Recursion::Kind::momentum_correction ||
                           (recursion.averaged && slot.shared_momentum != nullptr);
    // What is clipped in a dense step is clipped beside a payload too; in true units, as a message is.
    Passengers& group = bucket.passengers[whole_dense || has_state || recursion.clip_norm > 0 ? 0 : 1];
    group.segments.push_back(segment);
    group.states.push_back(slot.state);
    group.betas.push_back(slot.beta1);
    group.owned.push_back({slot.owned.first, slot.owned.count, slot.server_residual});
    group.count += slot.numel;
  }
  if (whole_dense) return bucket;

  bucket.two_phase = two_phase && world > 1 && !bucket.segments.empty();
  if (bucket.two_phase) cut_into_parts(bucket, slots, world, rank);
  if (!bucket.two_phase) bucket.part_end = {std::uint32_t(bucket.segments.size())};
  if (!bucket.momenta.empty()) bucket.momentum_segments = in_momenta(bucket, slots);
  for (std::size_t s = 0; s < bucket.states.size() && recursion.kind == Recursion::Kind::estimate; ++s)
    bucket.mean_estimates.push_back(mean_estimate_of(recursion, bucket.states[s]));
  bucket.layout = codec->layout(bucket.plan(0));
  const std::size_t raw = bucket.passengers[0].bytes() + bucket.passengers[1].bytes();
  bucket.owners = world > 1 && (bucket.two_phase ? raw != 0 : raw > kRawPassengerBytes);
  std::size_t beside = raw;
  if (bucket.owners) {
    beside = 0;
    for (int r = 0; r < world; ++r) {
      const OwnerShare& share =
          bucket.shares.emplace_back(OwnerShare{{owned_by(bucket.passengers[0], world, r), owned_by(bucket.passengers[1], world, r)}});
      if (!bucket.two_phase) bucket.share_first.push_back(bucket.sent_bytes());
      bucket.send_bytes.push_back(round_up(share.parts[0].bytes() + share.parts[1].bytes(), sizeof(float)));
      // The owner sends the finished mean in the gradient's dtype.
      beside = std::max(beside, (share.parts[0].count + share.parts[1].count) * size_of(dtype));
    }
    bucket.recv_bytes.assign(std::size_t(world), bucket.send_bytes[std::size_t(rank)]);
  }
  if (bucket.two_phase) {
    bucket.phases.workspace = phases_workspace(bucket, *codec, world);
    // A payload's size is a multiple of 8, as its header's fields need: nothing else pads it.
    bucket.contribution = round_up(bucket.layout.part_capacity + beside, 8);
    const std::size_t most = bucket.owners ? *std::max_element(bucket.send_bytes.begin(), bucket.send_bytes.end()) : 0;
    bucket.phases.slot = round_up(bucket.layout.part_capacity + most, 8);
    for (int r = 0; r < world; ++r) bucket.share_first.push_back(std::size_t(r) * bucket.phases.slot + bucket.layout.part_capacity);
    return bucket;
  }
  // A multiple of 64, so that every rank's header in the gathered buffer is aligned.
  bucket.contribution = round_up(bucket.layout.part_capacity + beside, 64);
  return bucket;
}

}  // namespace thinwire
