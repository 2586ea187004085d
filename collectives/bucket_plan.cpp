#include "collectives/bucket_plan.hpp"

#include <algorithm>

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

std::size_t owned_elements(const Passengers& passengers, int world, int rank) {
  std::size_t sum = 0;
  for (const Segment& segment : passengers.segments) sum += owned_part(segment.count, world, rank).count;
  return sum;
}

constexpr std::size_t round_up(std::size_t x, std::size_t to) noexcept { return (x + to - 1) / to * to; }

}  // namespace

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
      const std::size_t stateful = owned_elements(bucket.passengers[0], world, r), plain = owned_elements(bucket.passengers[1], world, r);
      bucket.send_bytes.push_back(round_up(stateful * sizeof(float) + plain * size_of(dtype), sizeof(float)));
      beside = std::max(beside, (plain + stateful) * size_of(dtype));  // the owner sends the finished mean in the gradient's dtype
    }
    bucket.recv_bytes.assign(std::size_t(world), bucket.send_bytes[std::size_t(rank)]);
  }
  // A multiple of 64, so that every rank's header in the gathered buffer is aligned.
  bucket.contribution = round_up(bucket.layout.part_capacity + beside, 64);
  return bucket;
}

}  // namespace thinwire
