#include "collectives/bucket_engine.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "collectives/passengers.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/wire.hpp"

namespace thinwire {

BucketEngine::BucketEngine(Communicator& communicator, const Codec* codec, const Recursion& recursion, const ReducerOptions& options,
                           std::size_t parameters, std::size_t total_numel, std::uint64_t check_every)
    : communicator_(communicator),
      codec_(codec),
      recursion_(recursion),
      options_(options),
      total_numel_(total_numel),
      check_every_(check_every),
      wires_(std::size_t(communicator.size())),
      raw_(std::size_t(communicator.size())),
      factors_(parameters),
      norms_(parameters),
      kept_(parameters),
      bucket_kept_(parameters),
      grad_norms_(parameters),
      started_(!options.step_verdict),
      hashes_(std::size_t(communicator.size())) {}

double BucketEngine::ring_bytes(std::size_t bytes) const noexcept {
  const double world = communicator_.size();
  return 2 * (world - 1) / world * double(bytes);
}

void BucketEngine::passed(std::size_t dense_bytes, bool finite) noexcept {
  dense_bytes_ += ring_bytes(dense_bytes);
  step_finite_ &= finite;
}

void BucketEngine::run(const std::shared_ptr<const BucketPlan>& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options) {
  dense_bytes_ += ring_bytes(grad.size);
  for (const std::uint32_t id : bucket->ids) kept_[id] = 0;

  std::uint32_t flags = 0;
  own_wire_ = {};
  if (codec_ == nullptr) {
    factors_of(bucket->passengers[0].plan(step), grad, 1.0f / options.loss_scale);  // for the statistics only
    if (options.joined) std::memset(grad.data, 0, grad.size);
    flags = run_plain(grad);
  } else if (bucket->whole_dense) {
    flags = run_whole_dense(*bucket, grad, step, options);
  } else {
    flags = run_compressed(*bucket, grad, step, options);
  }

  const bool finite = (flags & kFlagNonfinite) == 0;
  if (!finite) {
    fill_nan(grad);
    step_finite_ = false;
  }
  if (options_.step_verdict) {
    keep_pending(bucket, options.joined);
  } else {
    settle(*bucket, step, own_wire_, options.joined, finite);
  }
  // Every step's means, not only the checked one's: replicas that drifted earlier are found as well.
  if (check_every_ != 0) output_hash_ = wire::hash_bytes(grad.data, grad.size, output_hash_);
}

std::uint32_t BucketEngine::run_plain(Bytes grad) {
  const float factor = 1.0f / float(communicator_.size());
  std::uint32_t flags = 0, ignored = 0;
  const bool narrow = grad.dtype != DType::fp32;
  if (narrow) scale_in_place(grad, factor, &ignored);  // a transport's fp16 sum could overflow where the mean does not
  communicator_.all_reduce(grad);
  scale_in_place(grad, narrow ? 1.0f : factor, &flags);
  return flags;
}

const float* BucketEngine::factors_of(const Plan& plan, Bytes grad, float unscale) {
  const std::size_t n = plan.segments.size();
  squared_norms(plan, grad, norms_.data(), Stream::host());
  for (std::size_t s = 0; s < n; ++s) grad_norms_[plan.segments[s].parameter] = norms_[s] * double(unscale) * double(unscale);
  clip_factors(recursion_, plan, std::span(norms_).first(n), unscale, communicator_.size(), total_numel_, factors_.data());
  return factors_.data();
}

void BucketEngine::write_messages(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options, Bytes messages,
                                  std::uint32_t* flags) {
  if (options.joined) {
    std::memset(messages.data, 0, messages.size);
    return;
  }
  std::size_t offset = 0;
  for (const Passengers& group : bucket.passengers) {
    if (group.count == 0) continue;
    const Plan plan = group.plan(step);
    const float* factors = factors_of(plan, grad, 1.0f / options.loss_scale);
    // Without state the message is the gradient as it came, in its own dtype and units; only the mean is taken.
    const StateView view{group.states, group.stateful ? factors : nullptr};
    Bytes out = messages.sub(offset, group.bytes());
    out.dtype = group.dtype;
    dense_message(recursion_, plan, grad, view, out, flags, Stream::host());
    offset += group.bytes();
  }
}

std::uint32_t BucketEngine::run_whole_dense(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options) {
  Bytes all = messages_.take((bucket.count + 1) * sizeof(float));
  all.dtype = DType::fp32;
  const Bytes messages = all.sub(0, bucket.count * sizeof(float));
  std::uint32_t flags = 0;
  write_messages(bucket, grad, step, options, messages, &flags);
  // One more element counts the ranks that met something non-finite, so the verdict needs no collective of its own.
  all.as<float>()[bucket.count] = (flags & kFlagNonfinite) != 0 ? 1.0f : 0.0f;
  communicator_.all_reduce(all);
  if (all.as<float>()[bucket.count] != 0.0f) flags |= kFlagNonfinite;
  const ConstBytes sum = messages;
  sum_in_rank_order(std::span(&sum, 1), 1.0f / float(communicator_.size()) * options.loss_scale, grad, &flags);
  return flags;
}

std::uint32_t BucketEngine::run_compressed(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options) {
  const int world = communicator_.size(), rank = communicator_.rank();
  const std::size_t share = bucket.contribution, capacity = bucket.layout.part_capacity;
  const Bytes gathered = gathered_.take(share * std::size_t(world)), workspace = workspace_.take(bucket.layout.workspace);
  const Bytes own = gathered.sub(share * std::size_t(rank), share), own_wire = own.sub(0, capacity),
              beside = own.sub(capacity, share - capacity);
  const Plan plan = bucket.plan(step);
  // The mean of messages with state is in true units until it is given back; a message without state never left the loss-scaled ones.
  const float mean = 1.0f / float(world), factors[2] = {mean * options.loss_scale, mean};

  // 1. What stays dense, then the payload, whose header tells what both found.
  std::uint32_t flags = options.joined ? std::uint32_t(kFlagJoined) : 0;
  const std::size_t raw_bytes = bucket.passengers[0].bytes() + bucket.passengers[1].bytes();
  std::size_t sent = 0, received = 0;
  for (const std::size_t bytes : bucket.send_bytes) sent += bytes;
  for (const std::size_t bytes : bucket.recv_bytes) received += bytes;
  const Bytes messages = bucket.owners ? messages_.take(std::max(raw_bytes, received)) : beside;
  write_messages(bucket, grad, step, options, messages.sub(0, raw_bytes), &flags);
  if (options.joined) {
    codec_->empty(plan, own_wire, flags, Stream::host());
  } else {
    const float* clip = factors_of(plan, grad, 1.0f / options.loss_scale);
    codec_->stream(recursion_, plan, grad, {bucket.states, clip}, workspace, own_wire, &flags, bucket_kept_.data(), Stream::host());
    for (std::size_t s = 0; s < bucket.segments.size(); ++s) kept_[bucket.segments[s].parameter] = bucket_kept_[s];
  }
  if (options_.record_payload) options_.record_payload(step, own_wire);

  // 2. Too much to travel raw: owners sum the parts and send back the finished mean beside their payload.
  std::size_t used = raw_bytes;
  if (bucket.owners) {
    const Bytes send = exchanged_.take(sent), receive = messages.sub(0, received);  // packed, the messages are not needed any more
    pack_for_owners(bucket, world, messages, send);
    communicator_.all_to_all_v(send, bucket.send_bytes, receive, bucket.recv_bytes);
    used = finish_owned(bucket, world, rank, receive, factors, beside, &flags);
    wire::add_flags(own_wire, flags);
  }
  std::memset(beside.data + used, 0, beside.size - used);

  // 3. One gather carries all of it.
  communicator_.all_gather(own, gathered);
  for (int r = 0; r < world; ++r) wires_[std::size_t(r)] = gathered.sub(share * std::size_t(r), capacity);
  codec_->decode(plan, wires_, factors[0], workspace, grad, &flags, Stream::host());
  if (bucket.owners) {
    for (int r = 0; r < world; ++r) place_owned(bucket, world, r, gathered.sub(share * std::size_t(r) + capacity, share - capacity), grad);
  } else if (raw_bytes != 0) {
    for (int r = 0; r < world; ++r) raw_[std::size_t(r)] = gathered.sub(share * std::size_t(r) + capacity, raw_bytes);
    place_raw(bucket, raw_, factors, grad, &flags);
  }
  own_wire_ = own_wire;
  return flags;
}

void BucketEngine::settle(const BucketPlan& bucket, std::uint64_t step, ConstBytes own_wire, bool joined, bool finite) {
  if (codec_ == nullptr || joined) return;
  const Passengers& stateful = bucket.passengers[0];
  if (finite) {
    settle_dense(recursion_, stateful.plan(step), {stateful.states, nullptr}, Stream::host());
  } else if (!own_wire.empty()) {
    codec_->take_back(recursion_, bucket.plan(step), own_wire, {bucket.states, nullptr}, Stream::host());
  }
}

void BucketEngine::keep_pending(const std::shared_ptr<const BucketPlan>& bucket, bool joined) {
  if (pending_count_ == pending_.size()) pending_.emplace_back();
  Pending& pending = pending_[pending_count_++];
  pending.bucket = bucket;
  pending.joined = joined;
  const Bytes payload = pending.payload.take(own_wire_.size);
  if (!own_wire_.empty()) std::memcpy(payload.data, own_wire_.data, own_wire_.size);
}

BucketEngine::StepEnd BucketEngine::finish_step(std::uint64_t step) {
  StepEnd end{step_finite_, false};
  for (std::size_t i = 0; i < pending_count_; ++i) {
    Pending& pending = pending_[i];
    const std::size_t bytes = pending.bucket->whole_dense || codec_ == nullptr ? 0 : pending.bucket->layout.part_capacity;
    settle(*pending.bucket, step, {pending.payload.data(), bytes, DType::u8, Place::host, 0}, pending.joined, step_finite_);
    pending.bucket.reset();
    pending.payload.end_step();
  }
  pending_count_ = 0;
  for (StepScratch* scratch : {&gathered_, &messages_, &exchanged_, &workspace_}) scratch->end_step();
  if (step_finite_) started_ = true;
  end.restart = !started_;
  step_finite_ = true;

  if (check_every_ != 0 && (step + 1) % check_every_ == 0) {
    const int rank = communicator_.rank();
    hashes_[std::size_t(rank)] = output_hash_;
    const Bytes all{reinterpret_cast<std::byte*>(hashes_.data()), hashes_.size() * 8, DType::u8, Place::host, 0};
    communicator_.all_gather(all.sub(std::size_t(rank) * 8, 8), all);
    output_hash_ = 0;
    for (std::size_t r = 0; r < hashes_.size(); ++r) {
      if (hashes_[r] == hashes_[std::size_t(rank)]) continue;
      fail(Errc::internal, "check_every: the means up to step " + std::to_string(step) + " differ between rank " + std::to_string(rank) +
                               " and rank " + std::to_string(r) + "; the replicas have drifted apart");
    }
  }
  return end;
}

}  // namespace thinwire
