// two_phase on the host: parts of the payload to their owners, who send their sums' mean on, encoded again (DESIGN: seams, 3).
#include <algorithm>
#include <cstring>

#include "collectives/host_engine.hpp"
#include "collectives/passengers.hpp"

namespace thinwire {

std::uint32_t HostEngine::run_two_phase(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options) {
  const std::size_t world = std::size_t(communicator_.size()), rank = std::size_t(communicator_.rank());
  const std::size_t capacity = bucket.layout.part_capacity, slot = bucket.phases.slot, share = bucket.contribution;
  const float mean_factor = 1.0f / float(world), factors[2] = {mean_factor * options.loss_scale, mean_factor};
  std::uint32_t flags = options.joined ? std::uint32_t(kFlagJoined) : 0;

  // Send buffer and, where passengers lie between the payloads, the payloads one after the other as the codec writes them; then the mean of
  // this rank's parts. Received are first the others' parts, later their second payloads.
  const bool between = slot != capacity;
  const std::size_t sent_bytes = round_up(slot * world, 64), payload_bytes = between ? round_up(capacity * world, 64) : 0;
  const Bytes memory = messages_.take(sent_bytes + payload_bytes + bucket.phases.own_count * sizeof(float));
  const Bytes send = memory.sub(0, slot * world), payloads = between ? memory.sub(sent_bytes, capacity * world) : send;
  Bytes mean = memory.sub(sent_bytes + payload_bytes, bucket.phases.own_count * sizeof(float));
  mean.dtype = DType::fp32;
  const Bytes arrived = gathered_.take(std::max(slot, share) * world), received = arrived.sub(0, slot * world),
              gathered = arrived.sub(0, share * world);
  const Bytes workspace = workspace_.take(bucket.phases.workspace);

  // 1. Messages and payloads to their owners.
  if (bucket.owners) write_for_owners(bucket, grad, step, options, send, &flags);
  stream(bucket, grad, step, options, workspace, payloads, &flags);
  if (options_.record_payload) options_.record_payload(step, payloads);
  for (std::size_t r = 0; r < world && between; ++r) {
    std::memcpy(send.data + r * slot, payloads.data + r * capacity, capacity);
    if (!bucket.owners) std::memset(send.data + r * slot + capacity, 0, slot - capacity);
  }
  communicator_.all_to_all(send, received);

  // 2. The mean of what this rank owns, encoded again; its header tells what was found so far.
  for (std::size_t r = 0; r < world; ++r) wires_[r] = received.sub(slot * r, capacity);
  Plan own = bucket.own_part(step);
  codec_->decode(own, wires_, mean_factor, workspace, mean, &flags, Stream::host());
  // Where the gather takes this rank's share from: the payloads have been sent.
  const Bytes contribution = send.sub(0, share);
  std::size_t used = capacity;
  if (bucket.owners)
    used += finish_owned(bucket, int(world), int(rank), received.sub(capacity, received.size - capacity), slot, factors,
                         contribution.sub(used, share - used), &flags);
  const bool estimates = !bucket.mean_estimates.empty();
  if (!estimates) own.output = {grad.dtype, options.loss_scale};
  const Bytes second = contribution.sub(0, capacity);
  codec_->stream(kOwner, own, mean, {bucket.phases.own_states, nullptr}, workspace, second, &flags, {}, Stream::host());
  if (options_.record_payload) options_.record_payload(step, second);
  std::memset(contribution.data + used, 0, share - used);

  // 3. Everyone's means.
  communicator_.all_gather(contribution, gathered);
  for (std::size_t r = 0; r < world; ++r) wires_[r] = gathered.sub(share * r, capacity);
  codec_->decode(bucket.mean_plan(step, options.loss_scale), wires_, estimates ? 1.0f : options.loss_scale, workspace, grad, &flags,
                 Stream::host());
  for (std::size_t r = 0; r < world && bucket.owners; ++r)
    place_owned(bucket, int(r), gathered.sub(share * r + capacity, share - capacity), grad);
  sent_.own_wire = second;
  sent_.gathered = gathered;
  return flags;
}

}  // namespace thinwire
