// What follows a bucket's verdict on the host: state is settled, or what was not applied returns to it; with a step verdict after the
// step's last bucket.
#include <algorithm>
#include <array>
#include <cstring>
#include <string>

#include "collectives/host_engine.hpp"
#include "collectives/passengers.hpp"
#include "compressors/core/dtype.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/rounding.hpp"

namespace thinwire {

void HostEngine::settle(const BucketPlan& bucket, std::uint64_t step, const Sent& sent, bool finite) {
  if (codec_ == nullptr) return;
  if (!finite) return take_back(bucket, step, sent);
  const Passengers& stateful = bucket.passengers[0];
  if (bucket.recursion.starting) start(bucket, step, sent, true);
  if (!sent.joined) settle_dense(bucket.recursion, stateful.plan(step), {stateful.states, nullptr}, Stream::host());
  clear_server_residuals(stateful);
  if (!bucket.momenta.empty()) move_momentum(bucket, step, sent);
}

void HostEngine::start(const BucketPlan& bucket, std::uint64_t step, const Sent& sent, bool finite) {
  const Passengers& dense = bucket.passengers[0];
  if (bucket.whole_dense) {
    start_estimates(bucket.recursion, dense.plan(step), {dense.states}, sent.shared.as<float>(), finite);
  } else if (finite) {  // init=compressed: the first payload is the estimate, and nothing is kept back
    for (std::size_t s = 0; s < bucket.segments.size(); ++s)
      clear_state(residual_of(bucket.recursion, bucket.states[s]), bucket.segments[s].count);
  }
}

void HostEngine::take_back(const BucketPlan& bucket, std::uint64_t step, const Sent& sent) {
  if (bucket.recursion.starting) start(bucket, step, sent, false);
  if (bucket.recursion.kind == Recursion::Kind::estimate) {
    keep_news(bucket.recursion, bucket.plan(step), {bucket.states});
    return;
  }
  if (bucket.two_phase) {  // what the workers sent lies with the owners already
    Recursion owner = kOwner;
    owner.averaged = bucket.recursion.averaged;
    const Plan own = bucket.own_part(step);
    const TwoPhase& phases = bucket.phases;
    codec_->take_back(owner, own, sent.own_wire, {phases.own_taken, nullptr, phases.own_betas.data()}, nullptr, Stream::host());
  } else if (!sent.own_wire.empty() && !sent.joined) {
    codec_->take_back(bucket.recursion, bucket.plan(step), sent.own_wire, {bucket.states, nullptr, bucket.betas.data()}, nullptr,
                      Stream::host());
  }
  // Dense messages are in the residual still; of the shared momentum, which has not moved, the next ones will hold their share again.
  if (!bucket.recursion.averaged || sent.joined) return;
  const Passengers& dense = bucket.passengers[0];
  for (std::size_t s = 0; s < dense.segments.size(); ++s) {
    const StateArray residual = residual_of(bucket.recursion, dense.states[s]);
    const float* const momentum = dense.states[s].array[0].fp32();
    if (!residual || momentum == nullptr) continue;
    for (std::size_t i = 0; i < dense.segments[s].count; ++i) residual.set(i, residual[i] - dense.betas[s] * momentum[i]);
  }
}

void HostEngine::note_dense_momentum(const BucketPlan& bucket, Bytes grad, float unscale) {
  const bool averaging = bucket.recursion.averaged, waits = options_.step_verdict;
  if (options_.momentum_elsewhere && !averaging) return;
  std::size_t count = 0;
  for (const SharedMomentum& shared : bucket.momenta) count += shared.dense ? shared.count : 0;
  const Bytes memory = momenta_.take(waits ? count * sizeof(float) : 0);
  float* kept = memory.as<float>();
  std::array<float, 1024> means;
  for (const SharedMomentum& shared : bucket.momenta) {
    if (!shared.dense) continue;
    float* const out = waits ? kept : shared.momentum;  // the bucket's own verdict is good: otherwise nobody calls
    for (std::size_t first = 0; first < shared.count; first += means.size()) {
      const std::size_t n = std::min(means.size(), shared.count - first);
      const std::span<float> mean(means.data(), n);
      // Not rounded as the output is; but what came from owners was.
      if (!dense_messages_.empty()) sum_in_rank_order(dense_messages_, shared.message + first, 1.0f / float(communicator_.size()), mean);
      for (std::size_t i = 0; i < n; ++i) {
        const std::size_t at = shared.first + first + i;
        if (dense_messages_.empty()) mean[i] = load_element(grad.data, grad.dtype, at) * unscale;
        if (!averaging || is_live(shared.live, first + i)) continue;
        std::memset(grad.data + at * size_of(grad.dtype), 0, size_of(grad.dtype));
        mean[i] = 0;
      }
      if (averaging) {
        std::copy(mean.begin(), mean.end(), out + first);
      } else {
        average_momentum(shared.beta1, std::span<const float>(shared.momentum + first, n), mean, std::span<float>(out + first, n));
      }
    }
    kept += waits ? shared.count : 0;
  }
  sent_.shared = memory;
}

void HostEngine::note_dense_means(const BucketPlan& bucket, Bytes sums) {
  const Passengers& dense = bucket.passengers[0];
  const float mean = 1.0f / float(communicator_.size());
  if (bucket.recursion.starting) {
    const Bytes memory = momenta_.take(bucket.count * sizeof(float));
    store_scaled(sums.as<float>(), mean, DType::fp32, memory.data, bucket.count);
    sent_.shared = memory;
    return;
  }
  if (bucket.recursion.blank) return;
  float* at = sums.as<float>();
  for (std::size_t s = 0; s < dense.segments.size(); at += dense.segments[s++].count) {
    if (const StateArray estimate = estimate_of(bucket.recursion, dense.states[s])) {
      load_state(estimate, at, dense.segments[s].count);
    } else {
      std::fill_n(at, dense.segments[s].count, 0.0f);
    }
  }
  communicator_.all_reduce(sums);
  at = sums.as<float>();
  for (std::size_t s = 0; s < dense.segments.size(); at += dense.segments[s++].count) {
    float* const mean_estimate = mean_estimate_of(bucket.recursion, dense.states[s]);
    if (mean_estimate == nullptr) continue;
    std::fill_n(mean_estimate, dense.segments[s].count, 0.0f);
    add_to_mean_estimate(at, mean, mean_estimate, dense.segments[s].count);  // cut at the largest float, as ever
  }
}

void HostEngine::move_momentum(const BucketPlan& bucket, std::uint64_t step, const Sent& sent) {
  if (const float* in = sent.shared.as<float>(); !sent.shared.empty()) {
    for (const SharedMomentum& shared : bucket.momenta) {
      if (!shared.dense) continue;
      std::memcpy(shared.momentum, in, shared.count * sizeof(float));
      in += shared.count;
    }
  }
  if (bucket.segments.empty()) return;
  // What was compressed is decoded once more, in true units, to where the momentum lies.
  const std::size_t world = std::size_t(communicator_.size()), share = bucket.contribution;
  const Bytes out = host_bytes(arena_.array(0), arena_.count(0));
  std::uint32_t seen = 0;  // all of it was decoded before
  const Bytes workspace =
      workspace_.take(bucket.two_phase ? bucket.phases.workspace : std::max(bucket.layout.workspace, bucket.layout.per_payload * world));
  Plan plan = bucket.plan(step);
  plan.segments = bucket.momentum_segments;
  for (std::size_t r = 0; r < world; ++r) wires_[r] = sent.gathered.sub(share * r, bucket.layout.part_capacity);
  codec_->decode(plan, wires_, bucket.two_phase ? 1.0f : 1.0f / float(world), workspace, out, &seen, Stream::host());
}

void HostEngine::keep_pending(const std::shared_ptr<const BucketPlan>& bucket) {
  if (pending_count_ == pending_.size()) pending_.emplace_back();
  Pending& pending = pending_[pending_count_++];
  pending.bucket = bucket;
  pending.sent = sent_;
  if (bucket->momenta.empty()) sent_.gathered = {};
  const std::size_t own = round_up(sent_.own_wire.size, 64), gathered = round_up(sent_.gathered.size, 64);
  const Bytes memory = pending.memory.take(own + gathered + sent_.shared.size);
  const auto keep = [&](ConstBytes from, std::size_t at) -> ConstBytes {
    if (!from.empty()) std::memcpy(memory.data + at, from.data, from.size);
    return {memory.data + at, from.size, DType::u8, Place::host, 0};
  };
  pending.sent.own_wire = keep(sent_.own_wire, 0);
  pending.sent.gathered = keep(sent_.gathered, own);
  pending.sent.shared = keep(sent_.shared, own + gathered);
}

void HostEngine::finish_step(std::uint64_t step) {
  for (std::size_t i = 0; i < pending_count_; ++i) {
    Pending& pending = pending_[i];
    settle(*pending.bucket, step, pending.sent, step_finite_);
    pending.bucket.reset();
    pending.memory.end_step();
  }
  pending_count_ = 0;
  for (StepScratch* scratch : {&gathered_, &messages_, &workspace_, &momenta_, &decoded_}) scratch->end_step();
  if (step_finite_) started_ = true;
  if (!step_finite_) ++nonfinite_steps_;
  if (!started_) arena_.clear();
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
}

}  // namespace thinwire
