// What follows a bucket's verdict on a GPU, and what the host asks of the device: each waits for nothing but where it says so.
#include <algorithm>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "collectives/device_engine.hpp"
#include "collectives/passengers_cuda.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/wire.hpp"

namespace thinwire {

void DeviceEngine::write_counters() {
  device_copy(counters_, &observed_, sizeof observed_, last_stream_);
  device_wait(last_stream_);
}

void DeviceEngine::upload_watch() {
  device_copy(device_watched(), watch_.records().data(), watch_.records().size_bytes(), last_stream_);
  device_copy(device_limits(), watch_.limits(), parts_.parameters * sizeof(float), last_stream_);
  device_wait(last_stream_);
  watch_version_ = watch_.version();
}

void DeviceEngine::download_watch() {
  if (!watch_.watches() || watch_version_ != watch_.version()) return;  // what the host has is newer
  device_copy(watch_.records().data(), device_watched(), watch_.records().size_bytes(), last_stream_);
  device_wait(last_stream_);
}

void DeviceEngine::check() {
  for (const auto& plan : plans_) {
    if (const std::uint64_t wrong = *plan->wrong_scale; wrong != 0)
      fail(Errc::invalid_argument, "loss_scale=" + std::to_string(bits_float(std::uint32_t(wrong))) + " is not a positive number (bucket " +
                                       plan->bucket->name + "; found on the GPU, so this is a later call)");
    if (plan->report->corrupt == 0) continue;
    parts_.communicator.raise_failure();  // what a broken gather left is no payload of the peer's
    fail(Errc::corrupt_payload, parts_.codec->describe(plan->bucket->plan(0), *plan->report) + " (bucket " + plan->bucket->name +
                                    "; found on the GPU, so this is a later call)");
  }
}

void DeviceEngine::passed(std::size_t dense_bytes, bool finite) {
  static constexpr std::uint32_t kBad = kFlagNonfinite;
  count_dense(dense_bytes, world());
  if (!finite) device_copy(&counters_->step_flags, &kBad, sizeof kBad, last_stream_);
}

void DeviceEngine::finish_step(std::uint64_t step) {
  const OnDevice on(device_);
  const Stream stream = last_stream_;
  launch_end_step(counters_, step_verdict_, stream);
  for (std::size_t i = 0; i < pending_count_; ++i) {
    Pending& pending = pending_[i];
    settle(*pending.plan, step, pending.sent, step_verdict_, stream);
    pending.plan.reset();
    pending.memory.end_step();
  }
  pending_count_ = 0;
  if (parts_.options.step_verdict) {
    for (std::size_t j = 0; j < parts_.arena.arrays(); ++j)
      launch_clear_unless_started(counters_, parts_.arena.array(j), parts_.arena.count(j), stream);
  }
  for (DeviceScratch* scratch : {&gathered_, &messages_, &workspace_, &momenta_}) scratch->end_step();

  if (parts_.check_every == 0 || (step + 1) % parts_.check_every != 0) return;
  Communicator& communicator = parts_.communicator;
  const auto rank = std::size_t(communicator.rank());
  std::vector<std::uint64_t> hashes(std::size_t(communicator.size()));
  hashes[rank] = output_hash_;
  const Bytes own = gathered_.take(8 * hashes.size());
  device_copy(own.data, hashes.data(), own.size, stream);
  communicator.all_gather(own.sub(rank * 8, 8), own, stream);
  device_copy(hashes.data(), own.data, own.size, stream);
  device_wait(stream);
  output_hash_ = 0;
  for (std::size_t r = 0; r < hashes.size(); ++r) {
    if (hashes[r] == hashes[rank]) continue;
    fail(Errc::internal, "check_every: the means up to step " + std::to_string(step) + " differ between rank " + std::to_string(rank) +
                             " and rank " + std::to_string(r) + "; the replicas have drifted apart");
  }
}

bool DeviceEngine::idle_within(std::chrono::milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + std::min<std::chrono::milliseconds>(limit, std::chrono::hours(24 * 365));
  while (!device_idle(last_stream_)) {
    if (std::chrono::steady_clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  return true;
}

void DeviceEngine::wait() {
  device_copy(&observed_, counters_, sizeof observed_, last_stream_);
  device_wait(last_stream_);
  download_watch();
  // The bucket that was reduced last says how it went with a parameter.
  std::sort(plans_.begin(), plans_.end(), [](const auto& a, const auto& b) { return a->last_used < b->last_used; });
  for (const auto& plan : plans_) {
    const BucketPlan& bucket = *plan->bucket;
    for (const std::uint32_t id : bucket.ids) kept_[id] = 0;
    std::vector<std::uint32_t> kept(bucket.segments.size());
    device_copy(kept.data(), plan->kept, 4 * kept.size(), last_stream_);
    device_wait(last_stream_);
    for (std::size_t s = 0; s < kept.size(); ++s) kept_[bucket.segments[s].parameter] += kept[s];
    DeviceScales scales;
    device_copy(&scales, plan->scales, sizeof scales, last_stream_);
    const std::vector<Segment>* const groups[3] = {&bucket.passengers[0].segments, &bucket.passengers[1].segments,
                                                   bucket.two_phase ? &bucket.phases.whole : &bucket.segments};
    for (int g = 0; g < 3; ++g) {
      std::vector<double> norms(groups[g]->size());
      device_copy(norms.data(), plan->norms[g], 8 * norms.size(), last_stream_);
      device_wait(last_stream_);
      for (std::size_t s = 0; s < norms.size(); ++s)
        grad_norms_[(*groups[g])[s].parameter] = norms[s] * double(scales.norm_unscale) * double(scales.norm_unscale);
    }
  }
}

}  // namespace thinwire
