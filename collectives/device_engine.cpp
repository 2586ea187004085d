// The engine of device memory: the same steps as the host's, each enqueued. What the host's engine decides by a flag, kernels decide by a
// word in device memory.
#include "collectives/device_engine.hpp"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "collectives/passengers_cuda.hpp"
#include "collectives/watch_cuda.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/wire.hpp"

namespace thinwire {
namespace {

// Norms are for the statistics alone where nothing is clipped, and cost a pass over the gradient.
constexpr std::uint64_t kNormsEvery = 16;

}  // namespace

std::shared_ptr<DevicePlan> DeviceEngine::plan_of(const std::shared_ptr<const BucketPlan>& bucket, Stream stream) {
  for (const auto& plan : plans_) {
    if (plan->bucket != bucket) continue;
    plan->last_used = ++uses_;
    return plan;
  }
  // A new layout or setting: what only this engine still knows has been replaced.
  device_wait(stream);
  check();
  std::erase_if(plans_, [](const auto& plan) { return plan->bucket.use_count() == 1 && plan.use_count() == 1; });
  auto plan = std::make_shared<DevicePlan>(bucket, parts_.codec, watch_.watches() ? &watch_ : nullptr, world(), parts_.communicator.rank(),
                                           device_, stream);
  plan->last_used = ++uses_;
  return plans_.emplace_back(std::move(plan));
}

void DeviceEngine::run(const std::shared_ptr<const BucketPlan>& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& asked,
                       Stream stream) {
  check();
  const OnDevice on(device_);
  ReduceOptions options = asked;
  if (bucket->speaks_without_data(asked.joined)) {
    device_clear(grad, stream);
    options.joined = false;
  }
  count_dense(grad.size, world());
  last_stream_ = stream;
  const std::shared_ptr<DevicePlan> shared = plan_of(bucket, stream);
  DevicePlan& plan = *shared;
  looks_ = watch_.watches() && !bucket->segments.empty() && !options.joined && watch_.looks(plan.watched, step);
  if (watch_.watches() && watch_version_ != watch_.version()) upload_watch();
  const bool norms = (clips() || looks_ || step % kNormsEvery == 0) && (!options.joined || parts_.codec == nullptr);
  const DeviceFactor loss_scale = options.device_loss_scale != nullptr ? DeviceFactor(options.device_loss_scale) : options.loss_scale;
  launch_begin(loss_scale, 1.0f / float(world()), norms, parts_.codec != nullptr, plan.flags, plan.scales,
               const_cast<std::uint64_t*>(plan.wrong_scale), stream);
  dense_messages_ = {};
  Sent sent;
  if (parts_.codec == nullptr) {
    run_plain(plan, grad, step, options, stream);
  } else if (bucket->whole_dense) {
    sent = run_whole_dense(plan, grad, step, options, stream);
  } else if (bucket->two_phase) {
    sent = run_two_phase(plan, grad, step, options, stream);
  } else {
    sent = run_compressed(plan, grad, step, options, stream);
  }
  sent.joined = options.joined;
  if (!bucket->momenta.empty()) sent.shared = note_momenta(plan, grad, step, stream);
  launch_verdict(grad, plan.flags, &counters_->step_flags, stream);
  if (parts_.options.step_verdict) {
    keep_pending(shared, sent, stream);
  } else {
    settle(plan, step, sent, plan.flags, stream);
  }
  if (parts_.check_every != 0) {  // the one thing that reads gradients back, for those who ask for it
    std::vector<std::byte> mean(grad.size);
    device_copy(mean.data(), grad.data, grad.size, stream);
    device_wait(stream);
    output_hash_ = wire::hash_bytes(mean.data(), mean.size(), output_hash_);
  }
}

void DeviceEngine::run_plain(DevicePlan& plan, Bytes grad, std::uint64_t step, const ReduceOptions& options, Stream stream) {
  factors_of(plan, 0, grad, step, options, stream);
  const float factor = 1.0f / float(world());
  const bool narrow = grad.dtype != DType::fp32;
  if (options.joined) device_clear(grad, stream);
  // A transport's fp16 sum could overflow where the mean does not. What the division meets shows in the mean.
  if (narrow) launch_scale(grad, factor, step_verdict_, stream);
  parts_.communicator.all_reduce(grad, stream);
  launch_scale(grad, narrow ? 1.0f : factor, plan.flags, stream);
}

const float* DeviceEngine::factors_of(DevicePlan& plan, int group, Bytes grad, std::uint64_t step, const ReduceOptions& options,
                                      Stream stream) {
  const DeviceRanges& ranges = plan.whole[group];
  if (ranges.segments == 0) return nullptr;
  const bool stateful = group != 1 && parts_.codec != nullptr;
  if ((clips() && stateful) || (looks_ && group == 2) || step % kNormsEvery == 0)
    launch_squared_norms(ranges, grad, plan.block_sums, plan.norms[group], stream);
  if (!stateful || (!clips() && !scaled(options))) return nullptr;
  launch_clip_factors(parts_.recursion, ranges, plan.norms[group], &plan.scales->unscale, world(), parts_.total_numel, plan.factors[group],
                      stream);
  // Parts of a parameter have its factor.
  if (group == 2)
    for (std::size_t s = ranges.segments; s < plan.bucket->segments.size(); s += ranges.segments)
      device_copy(plan.factors[2] + s, plan.factors[2], ranges.segments * sizeof(float), stream);
  return plan.factors[group];
}

void DeviceEngine::write_messages(DevicePlan& plan, const DeviceRanges (&where)[2], Bytes grad, std::uint64_t step,
                                  const ReduceOptions& options, std::byte* const (&to)[2], Stream stream) {
  const float* factors = factors_of(plan, 0, grad, step, options, stream);
  factors_of(plan, 1, grad, step, options, stream);
  launch_dense_message(plan.bucket->recursion, where[0], grad, factors, reinterpret_cast<float*>(to[0]), plan.flags, stream,
                       plan.passenger_betas);
  launch_copy_message(where[1], grad, to[1], plan.flags, stream);
}

DeviceEngine::Sent DeviceEngine::run_whole_dense(DevicePlan& plan, Bytes grad, std::uint64_t step, const ReduceOptions& options,
                                                 Stream stream) {
  const Recursion& recursion = plan.bucket->recursion;
  const std::size_t count = plan.bucket->count;
  Bytes all = messages_.take((count + 1) * sizeof(float));
  all.dtype = DType::fp32;
  if (watch_.watches() && recursion.control) launch_restart_watch(device_watched(), parts_.parameters, stream);
  // The mean estimate is made anew here, whatever the verdict: what owners still owed it is in it then.
  if (recursion.kind == Recursion::Kind::estimate) launch_settle_dense(plan.server, nullptr, stream);
  if (options.joined) {
    device_clear(all, stream);
  } else {
    write_messages(plan, {plan.whole[0], plan.whole[1]}, grad, step, options, {all.data, all.data}, stream);
  }
  launch_add_server_residuals(plan.server, world(), all.as<float>(), stream);
  launch_count_flag(plan.flags, all.as<float>() + count, stream);
  parts_.communicator.all_reduce(all, stream);
  launch_read_flag(all.as<float>() + count, plan.flags, stream);
  dense_messages_ = {all.data, 0, 1, DType::fp32};
  launch_sum(plan.whole[0], dense_messages_, &plan.scales->mean, grad, plan.flags, stream);
  if (recursion.kind != Recursion::Kind::estimate) return {};
  const Bytes sums = all.sub(0, count * sizeof(float));
  if (recursion.starting) return {{}, sums, false};
  if (!recursion.blank) remake_mean_estimates(plan, sums, stream);
  return {};
}

void DeviceEngine::write_for_owners(DevicePlan& plan, Bytes grad, std::uint64_t step, const ReduceOptions& options, Bytes send,
                                    Stream stream) {
  device_clear(send, stream);  // what pads the shares, and all of a joined rank's
  if (!options.joined) write_messages(plan, plan.sent, grad, step, options, {send.data, send.data}, stream);
  launch_add_server_residuals(plan.sent_server, world(), send.as<float>(), stream);
}

std::size_t DeviceEngine::sum_owned(DevicePlan& plan, const std::byte* received, std::size_t stride, Bytes finished, Stream stream) {
  const BucketPlan& bucket = *plan.bucket;
  // Messages without state never left the loss-scaled units.
  const DeviceFactor factors[2] = {&plan.scales->mean, 1.0f / float(world())};
  std::size_t in = 0, out = 0;
  for (std::size_t g = 0; g < 2; ++g) {
    const Passengers& group = bucket.shares[std::size_t(parts_.communicator.rank())].parts[g];
    const std::size_t bytes = group.count * size_of(bucket.dtype);
    Bytes means = finished.sub(out, bytes);
    means.dtype = bucket.dtype;
    launch_sum(plan.owned[g], {received + in, stride, world(), group.dtype}, factors[g], means, plan.flags, stream);
    in += group.bytes();
    out += bytes;
  }
  return out;
}

void DeviceEngine::encode(DevicePlan& plan, Bytes grad, std::uint64_t step, const ReduceOptions& options, Bytes workspace, Bytes wire,
                          Stream stream) {
  const BucketPlan& bucket = *plan.bucket;
  const Plan view = plan.plan(step);
  if (options.joined) {
    parts_.codec->empty(view, wire, kFlagJoined, stream);
    // What this rank has found so far, in every part's header.
    for (std::size_t at = 0; at < wire.size; at += bucket.layout.part_capacity)
      launch_add_flags(plan.flags, reinterpret_cast<std::uint32_t*>(wire.data + at + offsetof(wire::Header, flags)), stream);
    return;
  }
  const StateView state{bucket.states, factors_of(plan, 2, grad, step, options, stream), plan.betas};
  if (looks_) launch_probe_messages(bucket.recursion, plan.compressed, grad, state.grad_factor, plan.betas, plan.probe_sums, stream);
  parts_.codec->stream(bucket.recursion, view, grad, state, workspace, wire, plan.flags, {plan.kept, nullptr}, stream);
  if (!looks_) return;
  launch_probe_rest(bucket.recursion, plan.compressed, grad, state.grad_factor, plan.probe_sums, stream);
  launch_watch(plan.compressed, plan.watched_table, plan.watched.size(), plan.probe_sums, plan.norms[2], &plan.scales->norm_unscale, step,
               device_watched(), device_limits(), stream);
  for (const WatchedSegment& segment : plan.watched) watch_.records()[segment.parameter].looked = true;
}

void DeviceEngine::record(std::uint64_t step, ConstBytes wire, Stream stream) {
  if (!parts_.options.record_payload) return;
  std::vector<std::byte> payload(wire.size);
  device_copy(payload.data(), wire.data, wire.size, stream);
  device_wait(stream);
  parts_.options.record_payload(step, {payload.data(), payload.size(), DType::u8, Place::host, 0});
}

DeviceEngine::Sent DeviceEngine::run_compressed(DevicePlan& plan, Bytes grad, std::uint64_t step, const ReduceOptions& options,
                                                Stream stream) {
  const BucketPlan& bucket = *plan.bucket;
  Communicator& communicator = parts_.communicator;
  const auto ranks = std::size_t(world()), rank = std::size_t(communicator.rank());
  const std::size_t share = bucket.contribution, capacity = bucket.layout.part_capacity;
  const DeviceFactor factors[2] = {&plan.scales->mean, 1.0f / float(world())};
  const Passengers& stateful = bucket.passengers[0];

  const std::size_t received = bucket.owners ? bucket.recv_bytes.front() * ranks : 0;
  const Bytes memory = gathered_.take(std::max(share * ranks, received)), gathered = memory.sub(0, share * ranks);
  const Bytes own = gathered.sub(share * rank, share), own_wire = own.sub(0, capacity), beside = own.sub(capacity, share - capacity);

  // 1. What stays dense.
  if (bucket.owners) {
    const Bytes send = messages_.take(bucket.sent_bytes());
    write_for_owners(plan, grad, step, options, send, stream);
    communicator.all_to_all_v(send, bucket.send_bytes, memory.sub(0, received), bucket.recv_bytes, stream);
    const std::size_t out = sum_owned(plan, memory.data, bucket.recv_bytes.front(), send, stream);
    device_clear(beside, stream);
    device_copy(beside.data, send.data, out, stream);
  } else {
    device_clear(beside, stream);
    if (!options.joined)
      write_messages(plan, {plan.whole[0], plan.whole[1]}, grad, step, options, {beside.data, beside.data + stateful.bytes()}, stream);
    launch_add_server_residuals(plan.server, world(), beside.as<float>(), stream);
  }

  // 2. The payload, whose header tells what all of this found.
  const Bytes workspace = workspace_.take(std::max(bucket.layout.workspace, bucket.layout.per_payload * ranks));
  encode(plan, grad, step, options, workspace, own_wire, stream);
  record(step, own_wire, stream);

  // 3. One gather carries all of it.
  communicator.all_gather(own, gathered, stream);
  for (std::size_t r = 0; r < ranks; ++r) wires_[r] = gathered.sub(share * r, capacity);
  const Plan view = plan.mean_plan(step);
  parts_.codec->decode(view, wires_, unless_in(view, 1.0f / float(world())), workspace, grad, plan.flags, stream);
  if (bucket.owners) {
    launch_place(plan.finished, gathered.data, grad, stream);
  } else {
    dense_messages_ = {gathered.data + capacity, share, world(), DType::fp32};
    std::size_t at = capacity;
    for (std::size_t g = 0; g < 2; ++g) {
      launch_sum(plan.whole[g], {gathered.data + at, share, world(), bucket.passengers[g].dtype}, factors[g], grad, plan.flags, stream);
      at += bucket.passengers[g].bytes();
    }
  }
  return {own_wire, {}, false};
}

std::unique_ptr<BucketEngine> make_device_engine(const EngineParts& parts, int device) {
  return std::make_unique<DeviceEngine>(parts, device);
}

}  // namespace thinwire
