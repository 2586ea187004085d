// two_phase on a GPU, step for step the host's (host_two_phase.cpp), each enqueued; and what becomes of the shared momenta.
#include <algorithm>

#include "collectives/device_engine.hpp"
#include "compressors/core/wire.hpp"

namespace thinwire {

DeviceEngine::Sent DeviceEngine::run_two_phase(DevicePlan& plan, Bytes grad, std::uint64_t step, const ReduceOptions& options,
                                               Stream stream) {
  const BucketPlan& bucket = *plan.bucket;
  Communicator& communicator = parts_.communicator;
  const auto ranks = std::size_t(world());
  const std::size_t capacity = bucket.layout.part_capacity, slot = bucket.phases.slot, share = bucket.contribution;

  const bool between = slot != capacity;
  const std::size_t sent_bytes = round_up(slot * ranks, 256), payload_bytes = between ? round_up(capacity * ranks, 256) : 0;
  const Bytes memory = messages_.take(sent_bytes + payload_bytes + bucket.phases.own_count * sizeof(float));
  const Bytes send = memory.sub(0, slot * ranks), payloads = between ? memory.sub(sent_bytes, capacity * ranks) : send;
  Bytes mean = memory.sub(sent_bytes + payload_bytes, bucket.phases.own_count * sizeof(float));
  mean.dtype = DType::fp32;
  const Bytes arrived = gathered_.take(std::max(slot, share) * ranks), received = arrived.sub(0, slot * ranks),
              gathered = arrived.sub(0, share * ranks);
  const Bytes workspace = workspace_.take(bucket.phases.workspace);

  // 1. Messages and payloads to their owners.
  if (between) write_for_owners(plan, grad, step, options, send, stream);
  encode(plan, grad, step, options, workspace, payloads, stream);
  record(step, payloads, stream);
  for (std::size_t r = 0; r < ranks && between; ++r) device_copy(send.data + r * slot, payloads.data + r * capacity, capacity, stream);
  communicator.all_to_all(send, received, stream);

  // 2. The mean of what this rank owns, encoded again; its header tells what was found so far.
  for (std::size_t r = 0; r < ranks; ++r) wires_[r] = received.sub(slot * r, capacity);
  const Plan own = plan.own_part(step);
  parts_.codec->decode(own, wires_, 1.0f / float(world()), workspace, mean, plan.flags, stream);
  const Bytes contribution = send.sub(0, share), second = contribution.sub(0, capacity);
  if (share != capacity) device_clear(contribution.sub(capacity, share - capacity), stream);
  if (bucket.owners) sum_owned(plan, received.data + capacity, slot, contribution.sub(capacity, share - capacity), stream);
  parts_.codec->stream(kOwner, own, mean, {bucket.phases.own_states, nullptr}, workspace, second, plan.flags, {}, stream);
  record(step, second, stream);

  // 3. Everyone's means.
  communicator.all_gather(contribution, gathered, stream);
  for (std::size_t r = 0; r < ranks; ++r) wires_[r] = gathered.sub(share * r, capacity);
  const Plan view = plan.mean_plan(step);
  parts_.codec->decode(view, wires_, unless_in(view, 1.0f), workspace, grad, plan.flags, stream);
  if (bucket.owners) launch_place(plan.finished, gathered.data, grad, stream);
  return {second, {}, false};
}

ConstBytes DeviceEngine::note_momenta(DevicePlan& plan, Bytes grad, std::uint64_t step, Stream stream) {
  const BucketPlan& bucket = *plan.bucket;
  Bytes out = momenta_.take(plan.momentum_count * sizeof(float));
  out.dtype = DType::fp32;
  launch_note_momentum(plan.dense_momenta, dense_messages_, 1.0f / float(world()), grad, &plan.scales->unscale, plan.momenta_betas,
                       bucket.recursion.averaged, out.as<float>(), stream);
  if (bucket.segments.empty()) return out;
  // What was compressed is decoded once more, in true units; wires_ are those of the bucket's last decode.
  const float factor = bucket.two_phase ? 1.0f : 1.0f / float(world());
  parts_.codec->decode(plan.momentum_plan(step), wires_, factor, {workspace_.data(), 0, DType::u8, Place::cuda, device_}, out, nullptr,
                       stream);
  return out;
}

void DeviceEngine::keep_pending(const std::shared_ptr<DevicePlan>& plan, const Sent& sent, Stream stream) {
  if (pending_count_ == pending_.size()) pending_.emplace_back(device_);
  Pending& pending = pending_[pending_count_++];
  pending.plan = plan;
  pending.sent = sent;
  const std::size_t own = round_up(sent.own_wire.size, 256);
  const Bytes memory = pending.memory.take(own + sent.shared.size);
  const auto keep = [&](ConstBytes from, std::size_t at) -> ConstBytes {
    if (from.size != 0) device_copy(memory.data + at, from.data, from.size, stream);
    return {memory.data + at, from.size, from.dtype, Place::cuda, device_};
  };
  pending.sent.own_wire = keep(sent.own_wire, 0);
  pending.sent.shared = keep(sent.shared, own);
}

void DeviceEngine::remake_mean_estimates(DevicePlan& plan, Bytes sums, Stream stream) {
  launch_pack_estimates(plan.whole[0], sums.as<float>(), stream);
  parts_.communicator.all_reduce(sums, stream);
  launch_set_mean_estimates(plan.whole[0], sums.as<float>(), 1.0f / float(world()), stream);
}

void DeviceEngine::settle(DevicePlan& plan, std::uint64_t step, const Sent& sent, const std::uint32_t* verdict, Stream stream) {
  const BucketPlan& bucket = *plan.bucket;
  if (parts_.codec == nullptr) return;
  if (bucket.recursion.starting) {
    if (bucket.whole_dense) {
      launch_start_estimates(plan.whole[0], sent.shared.as<float>(), 1.0f / float(world()), verdict, stream);
    } else {  // init=compressed: the first payload is the estimate, and nothing is kept back
      launch_settle_dense(plan.compressed, verdict, stream);
    }
  }
  if (!sent.joined) {
    launch_keep_news(bucket.recursion, plan.compressed, verdict, stream);
    if (bucket.recursion.averaged) launch_forget_momentum(plan.whole[0], plan.passenger_betas, verdict, stream);
    launch_settle_dense(plan.whole[0], verdict, stream);
  }
  launch_settle_dense(plan.server, verdict, stream);
  if (bucket.recursion.kind == Recursion::Kind::estimate) return;  // what was sent is in the estimates, on all ranks
  if (bucket.two_phase) {                                          // what the workers sent lies with the owners already
    Recursion owner = kOwner;
    owner.averaged = bucket.recursion.averaged;
    parts_.codec->take_back(owner, plan.own_taken(step), sent.own_wire, {bucket.phases.own_taken, nullptr, plan.own_betas}, verdict,
                            stream);
  } else if (!sent.own_wire.empty() && !sent.joined) {
    parts_.codec->take_back(bucket.recursion, plan.plan(step), sent.own_wire, {bucket.states, nullptr, plan.betas}, verdict, stream);
  }
  if (bucket.momenta.empty() || (parts_.options.momentum_elsewhere && !bucket.recursion.averaged)) return;
  launch_move_momentum(plan.momenta, sent.shared.as<float>(), verdict, stream);
}

}  // namespace thinwire
