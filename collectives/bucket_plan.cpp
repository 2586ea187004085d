#include "collectives/bucket_plan.hpp"

#include <algorithm>
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
    SegmentState& state = owned.states.emplace_back(group.states[s]);
    for (float*& array : state.array)
      if (array != nullptr) array += part.first;
    owned.count += part.count;
  }
  return owned;
}

}  // namespace

std::size_t BucketPlan::sent_bytes() const noexcept { return std::accumulate(send_bytes.begin(), send_bytes.end(), std::size_t(0)); }

bool dense_sends_less(const Codec& codec, const Segment& segment, DType dtype, int world) {
  const std::uint32_t end = 1;
  const double capacity = double(codec.layout({std::span(&segment, 1), std::span(&end, 1), 0}).part_capacity - sizeof(wire::Header));
  const double n = world;
  return capacity * (n - 1) >= 2 * (n - 1) / n * double(segment.count * size_of(dtype));
}

BucketPlan make_bucket_plan(std::span<const std::uint32_t> ids, DType dtype, bool whole_dense, const std::vector<ParameterSlot>& slots,
                            const Codec* codec, const Recursion& recursion, int world, int rank) {
  BucketPlan bucket;
  bucket.ids.assign(ids.begin(), ids.end());
  bucket.dtype = dtype;
  bucket.whole_dense = whole_dense;
  bucket.name = describe(ids, slots);
  bucket.context = wire::hash_bytes(ids.data(), ids.size_bytes(), std::uint64_t(dtype));
  bucket.passengers[0].stateful = true;
  bucket.passengers[1].dtype = dtype;

  for (const std::uint32_t id : ids) {
    const ParameterSlot& slot = slots[id];
    Segment segment{id, bucket.count, slot.numel, slot.rows, slot.columns, slot.setting, nullptr};
    bucket.count += slot.numel;
    if (!whole_dense && slot.compressible && !slot.dense_now) {
      bucket.segments.push_back(segment);
      bucket.states.push_back(slot.state);
      continue;
    }
    const bool has_state = residual_of(recursion, slot.state) != nullptr || recursion.kind == Recursion::Kind::momentum_correction;
    Passengers& group = bucket.passengers[whole_dense || has_state ? 0 : 1];
    group.segments.push_back(segment);
    group.states.push_back(slot.state);
    group.count += slot.numel;
  }
  if (whole_dense) return bucket;

  bucket.part_end = {std::uint32_t(bucket.segments.size())};
  bucket.layout = codec->layout(bucket.plan(0));
  const std::size_t raw = bucket.passengers[0].bytes() + bucket.passengers[1].bytes();
  bucket.owners = world > 1 && raw > kRawPassengerBytes;
  std::size_t beside = raw;
  if (bucket.owners) {
    beside = 0;
    for (int r = 0; r < world; ++r) {
      const OwnerShare& share =
          bucket.shares.emplace_back(OwnerShare{{owned_by(bucket.passengers[0], world, r), owned_by(bucket.passengers[1], world, r)}});
      bucket.send_bytes.push_back(round_up(share.parts[0].bytes() + share.parts[1].bytes(), sizeof(float)));
      // The owner sends the finished mean in the gradient's dtype.
      beside = std::max(beside, (share.parts[0].count + share.parts[1].count) * size_of(dtype));
    }
    bucket.recv_bytes.assign(std::size_t(world), bucket.send_bytes[std::size_t(rank)]);
  }
  // A multiple of 64, so that every rank's header in the gathered buffer is aligned.
  bucket.contribution = round_up(bucket.layout.part_capacity + beside, 64);
  return bucket;
}

}  // namespace thinwire
