#include "collectives/host_engine.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "collectives/passengers.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/wire.hpp"

namespace thinwire {
namespace {

// Without a codec norms are for the statistics only, and a pass over the gradient is half of what the hook costs.
constexpr std::uint64_t kPlainNormsEvery = 16;

}  // namespace

HostEngine::HostEngine(const EngineParts& parts)
    : communicator_(parts.communicator),
      codec_(parts.codec),
      recursion_(parts.recursion),
      options_(parts.options),
      total_numel_(parts.total_numel),
      check_every_(parts.check_every),
      arena_(parts.arena),
      wires_(std::size_t(parts.communicator.size())),
      raw_(std::size_t(parts.communicator.size())),
      factors_(parts.parameters * std::size_t(parts.communicator.size())),
      norms_(factors_.size()),
      kept_(parts.parameters),
      bucket_kept_(factors_.size()),
      grad_norms_(parts.parameters),
      started_(!parts.options.step_verdict),
      watch_(parts.codec, parts.recursion, parts.parameters, true),
      hashes_(std::size_t(parts.communicator.size())) {}

void HostEngine::passed(std::size_t dense_bytes, bool finite) {
  count_dense(dense_bytes, communicator_.size());
  step_finite_ &= finite;
}

void HostEngine::run(const std::shared_ptr<const BucketPlan>& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& asked, Stream) {
  count_dense(grad.size, communicator_.size());
  ReduceOptions options = asked;
  if (bucket->speaks_without_data(asked.joined)) {
    std::memset(grad.data, 0, grad.size);
    options.joined = false;
  }
  for (const std::uint32_t id : bucket->ids) kept_[id] = 0;

  std::uint32_t flags = 0;
  sent_ = {};
  sent_.joined = options.joined;
  dense_messages_ = {};
  if (codec_ == nullptr) {
    if (step % kPlainNormsEvery == 0) {
      const Plan plan = bucket->passengers[0].plan(step);
      squared_norms(plan, grad, norms_.data(), Stream::host());
      note_norms(plan, 1.0f / options.loss_scale);
    }
    if (options.joined) std::memset(grad.data, 0, grad.size);
    flags = run_plain(grad);
  } else if (bucket->whole_dense) {
    flags = run_whole_dense(*bucket, grad, step, options);
    if (recursion_.control) watch_.restart();
  } else if (bucket->two_phase) {
    flags = run_two_phase(*bucket, grad, step, options);
  } else {
    flags = run_compressed(*bucket, grad, step, options);
  }

  const bool finite = (flags & kFlagNonfinite) == 0;
  if (finite && !bucket->momenta.empty()) note_dense_momentum(*bucket, grad, 1.0f / options.loss_scale);
  if (!finite) {
    fill_nan(grad);
    step_finite_ = false;
  }
  if (options_.step_verdict) {
    keep_pending(bucket);
  } else {
    settle(*bucket, step, sent_, finite);
  }
  // Every step's means, not only the checked one's: replicas that drifted earlier are found as well.
  if (check_every_ != 0) output_hash_ = wire::hash_bytes(grad.data, grad.size, output_hash_);
}

std::uint32_t HostEngine::run_plain(Bytes grad) {
  const float factor = 1.0f / float(communicator_.size());
  std::uint32_t flags = 0, ignored = 0;
  const bool narrow = grad.dtype != DType::fp32;
  if (narrow) scale_in_place(grad, factor, &ignored);  // a transport's fp16 sum could overflow where the mean does not
  communicator_.all_reduce(grad);
  scale_in_place(grad, narrow ? 1.0f : factor, &flags);
  return flags;
}

const float* HostEngine::factors_of(const Plan& plan, float unscale) {
  clip_factors(recursion_, plan, std::span(norms_).first(plan.segments.size()), unscale, communicator_.size(), total_numel_,
               factors_.data());
  return factors_.data();
}

void HostEngine::note_norms(const Plan& plan, float unscale) {
  for (std::size_t s = 0; s < plan.segments.size(); ++s)
    grad_norms_[plan.segments[s].parameter] = norms_[s] * double(unscale) * double(unscale);
}

const float* HostEngine::passenger_factors(const Passengers& group, Bytes grad, std::uint64_t step, float unscale) {
  const Plan plan = group.plan(step);
  squared_norms(plan, grad, norms_.data(), Stream::host());
  note_norms(plan, unscale);
  // Without state the message is the gradient as it came, in its own dtype and units; only the mean is taken.
  return group.stateful ? factors_of(plan, unscale) : nullptr;
}

void HostEngine::write_message(const Recursion& recursion, const Passengers& part, const float* factors, Bytes grad, std::uint64_t step,
                               Bytes message, std::uint32_t* flags) {
  message.dtype = part.dtype;
  dense_message(recursion, part.plan(step), grad, {part.states, factors, part.betas.data()}, message, flags, Stream::host());
  if (part.stateful) add_server_residuals(part, communicator_.size(), message);
}

void HostEngine::write_raw(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options, Bytes messages,
                           std::uint32_t* flags) {
  if (options.joined) {
    std::memset(messages.data, 0, messages.size);
    add_server_residuals(bucket.passengers[0], communicator_.size(), messages);  // this rank's own parts it goes on owning
    return;
  }
  std::size_t offset = 0;
  for (const Passengers& group : bucket.passengers) {
    const float* factors = passenger_factors(group, grad, step, 1.0f / options.loss_scale);
    write_message(bucket.recursion, group, factors, grad, step, messages.sub(offset, group.bytes()), flags);
    offset += group.bytes();
  }
}

void HostEngine::write_for_owners(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options, Bytes send,
                                  std::uint32_t* flags) {
  for (std::size_t g = 0; g < 2; ++g) {
    const float* factors = options.joined ? nullptr : passenger_factors(bucket.passengers[g], grad, step, 1.0f / options.loss_scale);
    for (std::size_t r = 0; r < bucket.shares.size(); ++r) {
      const auto& parts = bucket.shares[r].parts;
      const Bytes message = send.sub(bucket.share_first[r] + (g == 0 ? 0 : parts[0].bytes()), parts[g].bytes());
      if (!options.joined) {
        write_message(bucket.recursion, parts[g], factors, grad, step, message, flags);
        continue;
      }
      std::memset(message.data, 0, message.size);
      if (g == 0) add_server_residuals(parts[g], communicator_.size(), message);
    }
  }
  clear_padding(bucket, send);
}

std::uint32_t HostEngine::run_whole_dense(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options) {
  Bytes all = messages_.take((bucket.count + 1) * sizeof(float));
  all.dtype = DType::fp32;
  const Bytes messages = all.sub(0, bucket.count * sizeof(float));
  std::uint32_t flags = 0;
  // The mean estimate is made anew here, whatever the verdict: what owners still owed it is in it then.
  if (bucket.recursion.kind == Recursion::Kind::estimate) clear_server_residuals(bucket.passengers[0]);
  write_raw(bucket, grad, step, options, messages, &flags);
  // One more element counts the ranks that met something non-finite, so the verdict needs no collective of its own.
  all.as<float>()[bucket.count] = (flags & kFlagNonfinite) != 0 ? 1.0f : 0.0f;
  communicator_.all_reduce(all);
  if (all.as<float>()[bucket.count] != 0.0f) flags |= kFlagNonfinite;
  raw_.front() = messages;
  dense_messages_ = std::span(raw_).first(1);
  sum_in_rank_order(dense_messages_, 1.0f / float(communicator_.size()) * options.loss_scale, grad, &flags);
  if (bucket.recursion.kind == Recursion::Kind::estimate) note_dense_means(bucket, messages);
  return flags;
}

std::uint32_t HostEngine::run_compressed(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options) {
  const int world = communicator_.size(), rank = communicator_.rank();
  const std::size_t share = bucket.contribution, capacity = bucket.layout.part_capacity;
  // The mean of messages with state is in true units until it is given back; a message without state never left the loss-scaled ones.
  const float mean = 1.0f / float(world), factors[2] = {mean * options.loss_scale, mean};
  std::uint32_t flags = options.joined ? std::uint32_t(kFlagJoined) : 0;

  const std::size_t raw_bytes = bucket.passengers[0].bytes() + bucket.passengers[1].bytes();
  const std::size_t received = bucket.owners ? bucket.recv_bytes.front() * std::size_t(world) : 0;
  const Bytes memory = gathered_.take(std::max(share * std::size_t(world), received)), gathered = memory.sub(0, share * std::size_t(world));
  const Bytes own = gathered.sub(share * std::size_t(rank), share), own_wire = own.sub(0, capacity),
              beside = own.sub(capacity, share - capacity);

  // 1. What stays dense: raw beside the payload, or, if that is too much, parts to their owners, who sum them. The parts arrive where the
  // payloads will lie later, and the finished mean waits where the parts were sent from.
  std::size_t used = raw_bytes;
  if (bucket.owners) {
    const Bytes send = messages_.take(bucket.sent_bytes());
    write_for_owners(bucket, grad, step, options, send, &flags);
    communicator_.all_to_all_v(send, bucket.send_bytes, memory.sub(0, received), bucket.recv_bytes);
    used = finish_owned(bucket, world, rank, memory.sub(0, received), bucket.recv_bytes.front(), factors, send, &flags);
    std::memcpy(beside.data, send.data, used);
  } else {
    write_raw(bucket, grad, step, options, beside.sub(0, raw_bytes), &flags);
  }
  std::memset(beside.data + used, 0, beside.size - used);

  // 2. The payload, whose header tells what all of this found.
  const Bytes workspace = workspace_.take(std::max(bucket.layout.workspace, bucket.layout.per_payload * std::size_t(world)));
  stream(bucket, grad, step, options, workspace, own_wire, &flags);
  if (options_.record_payload) options_.record_payload(step, own_wire);

  // 3. One gather carries all of it.
  communicator_.all_gather(own, gathered);
  for (int r = 0; r < world; ++r) wires_[std::size_t(r)] = gathered.sub(share * std::size_t(r), capacity);
  const bool estimates = !bucket.mean_estimates.empty();  // in true units: the loss scale comes last
  codec_->decode(bucket.mean_plan(step, options.loss_scale), wires_, estimates ? mean : factors[0], workspace, grad, &flags,
                 Stream::host());
  if (bucket.owners) {
    for (int r = 0; r < world; ++r) place_owned(bucket, r, gathered.sub(share * std::size_t(r) + capacity, share - capacity), grad);
  } else if (raw_bytes != 0) {
    for (int r = 0; r < world; ++r) raw_[std::size_t(r)] = gathered.sub(share * std::size_t(r) + capacity, raw_bytes);
    place_raw(bucket, raw_, factors, grad, &flags);
    dense_messages_ = raw_;
  }
  sent_.own_wire = own_wire;
  sent_.gathered = gathered;
  return flags;
}

void HostEngine::stream(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options, Bytes workspace, Bytes wire,
                        std::uint32_t* flags) {
  const Plan plan = bucket.plan(step);
  if (options.joined) {
    codec_->empty(plan, wire, *flags, Stream::host());
    return;
  }
  // Norms and clip factors are of whole parameters.
  const Plan whole = bucket.two_phase ? Plan{bucket.phases.whole, {}, step} : plan;
  const std::size_t parameters = whole.segments.size(), segments = plan.segments.size();
  const float unscale = 1.0f / options.loss_scale;
  const bool clipped = bucket.recursion.clip_norm > 0;  // then the norms come first; else they fall out of the pass
  if (clipped) squared_norms(whole, grad, norms_.data(), Stream::host());
  factors_of(whole, unscale);
  for (std::size_t s = parameters; s < segments; ++s) factors_[s] = factors_[s - parameters];
  const StateView state{bucket.states, factors_.data(), bucket.betas.data()};
  if (watch_.watches()) watch_.describe(plan.segments.first(parameters), &watched_);
  const bool looks = watch_.watches() && watch_.looks(watched_, step);
  if (looks) probes_.assign(segments, {});
  const bool kept = can_probe(bucket.recursion);
  if (looks && kept) probe_messages(bucket.recursion, plan, grad, state, probes_);
  codec_->stream(bucket.recursion, plan, grad, state, workspace, wire, flags, {bucket_kept_.data(), clipped ? nullptr : norms_.data()},
                 Stream::host());
  for (std::size_t s = parameters; s < segments && !clipped; ++s) norms_[s % parameters] += norms_[s];
  note_norms(whole, unscale);
  if (looks) {
    if (kept) probe_rest(bucket.recursion, plan, grad, state, probes_);
    if (!kept) probe_decoded(plan, grad, state.grad_factor, workspace, wire);
    watched_grads_.clear();
    for (const Segment& segment : whole.segments) watched_grads_.push_back(grad_norms_[segment.parameter]);
    watch_.note(watched_, step, probes_, watched_grads_);
  }
  for (std::size_t s = 0; s < segments; ++s) kept_[plan.segments[s].parameter] += bucket_kept_[s];
}

void HostEngine::probe_decoded(const Plan& plan, ConstBytes grad, const float* factors, Bytes workspace, Bytes wire) {
  std::size_t count = 0;
  for (const Segment& segment : plan.segments) count = std::max(count, segment.first + segment.count);
  Bytes sent = decoded_.take(count * sizeof(float));
  sent.dtype = DType::fp32;
  std::memset(sent.data, 0, sent.size);
  // As if the payload were an estimate's first change: the message is g − 0, and g − h is what was left.
  Recursion estimate;
  estimate.kind = Recursion::Kind::estimate;
  decoded_states_.clear();
  for (const Segment& segment : plan.segments) decoded_states_.push_back({{sent.as<float>() + segment.first}});
  const StateView state{decoded_states_, factors};
  probe_messages(estimate, plan, grad, state, probes_);
  const std::size_t parts = plan.part_end.size(), capacity = wire.size / parts;
  for (std::size_t r = 0; r < parts; ++r) wires_[r] = wire.sub(r * capacity, capacity);
  std::uint32_t flags = 0;
  codec_->decode(plan, std::span<const ConstBytes>(wires_).first(parts), 1, workspace, sent, &flags, Stream::host());
  probe_rest(estimate, plan, grad, state, probes_);
}

std::unique_ptr<BucketEngine> make_host_engine(const EngineParts& parts) { return std::make_unique<HostEngine>(parts); }

}  // namespace thinwire
