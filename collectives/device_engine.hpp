#pragma once
// The engine of device memory. device_engine.cpp has a bucket's way, device_verdict.cpp what follows its verdict and what the host asks.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "collectives/bucket_engine.hpp"
#include "collectives/device_plan.hpp"
#include "collectives/passengers_cuda.hpp"
#include "compressors/core/device.hpp"
#include "compressors/core/error.hpp"

namespace thinwire {

/// StepScratch in device memory.
class DeviceScratch {
 public:
  explicit DeviceScratch(int device) : device_(device) {}
  Bytes take(std::size_t bytes) {
    used_ = std::max(used_, bytes);
    buffer_.reserve(std::max<std::size_t>(bytes, 1), device_);
    return {buffer_.data(), bytes, DType::u8, Place::cuda, device_};
  }
  std::byte* data() const { return buffer_.data(); }
  void end_step() {
    constexpr std::size_t kWorthIt = std::size_t(1) << 20;
    if (used_ != 0 && buffer_.size() > 2 * used_ + kWorthIt) buffer_ = DeviceBuffer(used_, device_);
    used_ = 0;
  }

 private:
  int device_;
  DeviceBuffer buffer_;
  std::size_t used_ = 0;
};

class DeviceEngine final : public BucketEngine {
 public:
  DeviceEngine(const EngineParts& parts, int device)
      : parts_(parts),
        device_(device),
        own_stream_(device),
        last_stream_(own_stream_.get()),
        gathered_(device),
        messages_(device),
        workspace_(device),
        momenta_(device),
        memory_(sizeof(DeviceCounters) + 64, device),
        watch_(parts.codec, parts.recursion, parts.parameters, false),
        kept_(parts.parameters),
        grad_norms_(parts.parameters),
        wires_(std::size_t(parts.communicator.size())) {
    counters_ = reinterpret_cast<DeviceCounters*>(memory_.data());
    step_verdict_ = reinterpret_cast<std::uint32_t*>(memory_.data() + round_up(sizeof(DeviceCounters), 16));
    observed_.started = !parts.options.step_verdict;
    write_counters();
    if (watch_.watches()) {
      watch_memory_ = DeviceBuffer(round_up(watch_.records().size_bytes(), 64) + parts.parameters * sizeof(float), device);
      upload_watch();
    }
  }

  /// Kernels use what dies with the engine.
  ~DeviceEngine() override {
    try {
      device_wait(last_stream_);
    } catch (const Error&) {  // a broken device runs no kernels
    }
  }

  void run(const std::shared_ptr<const BucketPlan>& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options,
           Stream stream) override;
  void passed(std::size_t dense_bytes, bool finite) override;
  void finish_step(std::uint64_t step) override;
  bool idle_within(std::chrono::milliseconds limit) override;
  void wait() override;
  void check() override;

  void set_started(bool started) override {
    observed_.started = started;
    write_counters();
  }
  bool started() const override { return observed_.started != 0; }
  std::uint64_t nonfinite_steps() const override { return observed_.nonfinite_steps; }
  void set_nonfinite_steps(std::uint64_t steps) override {
    observed_.nonfinite_steps = steps;
    write_counters();
  }
  std::span<const std::uint32_t> kept() const override { return kept_; }
  std::span<const double> grad_norms() const override { return grad_norms_; }
  Watch* watch() override { return watch_.watches() ? &watch_ : nullptr; }
  const float* eta_limits() override { return watch_.watches() ? device_limits() : nullptr; }

 private:
  /// What a bucket leaves for its verdict. All of it lies in scratch, or waits for the step's verdict in a Pending.
  struct Sent {
    ConstBytes own_wire;  ///< what is taken back: this rank's payload, under two_phase its second one
    ConstBytes shared;    ///< what becomes of the bucket's momenta, as DevicePlan::momenta packs them; or a starting step's sums
    bool joined = false;
  };
  struct Pending {
    explicit Pending(int device) : memory(device) {}
    std::shared_ptr<DevicePlan> plan;
    DeviceScratch memory;
    Sent sent;
  };

  int world() const { return parts_.communicator.size(); }
  bool clips() const { return parts_.recursion.clip_norm > 0; }
  /// The host cannot know a scale in device memory to be 1.
  static bool scaled(const ReduceOptions& options) { return options.device_loss_scale != nullptr || options.loss_scale != 1.0f; }
  /// The factor of a decode, unless the plan has one. A codec that does not look there gives NaN then, not a wrong mean.
  static float unless_in(const Plan& plan, float factor) {
    return plan.factor != nullptr ? std::numeric_limits<float>::quiet_NaN() : factor;
  }
  std::shared_ptr<DevicePlan> plan_of(const std::shared_ptr<const BucketPlan>& bucket, Stream stream);
  /// Norms where somebody needs them, and the factors of a group whose messages are in true units; null: all 1.
  const float* factors_of(DevicePlan& plan, int group, Bytes grad, std::uint64_t step, const ReduceOptions& options, Stream stream);
  void write_messages(DevicePlan& plan, const DeviceRanges (&where)[2], Bytes grad, std::uint64_t step, const ReduceOptions& options,
                      std::byte* const (&to)[2], Stream stream);
  void run_plain(DevicePlan& plan, Bytes grad, std::uint64_t step, const ReduceOptions& options, Stream stream);
  Sent run_whole_dense(DevicePlan& plan, Bytes grad, std::uint64_t step, const ReduceOptions& options, Stream stream);
  Sent run_compressed(DevicePlan& plan, Bytes grad, std::uint64_t step, const ReduceOptions& options, Stream stream);
  Sent run_two_phase(DevicePlan& plan, Bytes grad, std::uint64_t step, const ReduceOptions& options, Stream stream);
  /// The payload of this rank's messages, or of a rank that has none.
  void encode(DevicePlan& plan, Bytes grad, std::uint64_t step, const ReduceOptions& options, Bytes workspace, Bytes wire, Stream stream);
  void record(std::uint64_t step, ConstBytes wire, Stream stream);
  /// Messages of what stays dense: what this rank holds back as an owner goes with them, also where it has no data any more.
  void write_for_owners(DevicePlan& plan, Bytes grad, std::uint64_t step, const ReduceOptions& options, Bytes send, Stream stream);
  std::size_t sum_owned(DevicePlan& plan, const std::byte* received, std::size_t stride, Bytes finished, Stream stream);
  ConstBytes note_momenta(DevicePlan& plan, Bytes grad, std::uint64_t step, Stream stream);
  void keep_pending(const std::shared_ptr<DevicePlan>& plan, const Sent& sent, Stream stream);
  /// A dense step with estimates that is not starting: makes the mean of all of them anew, in the memory of `sums`.
  void remake_mean_estimates(DevicePlan& plan, Bytes sums, Stream stream);
  void settle(DevicePlan& plan, std::uint64_t step, const Sent& sent, const std::uint32_t* verdict, Stream stream);
  void write_counters();
  Watched* device_watched() const { return reinterpret_cast<Watched*>(watch_memory_.data()); }
  float* device_limits() const {
    return reinterpret_cast<float*>(watch_memory_.data() + round_up(std::size_t(parts_.parameters) * sizeof(Watched), 64));
  }
  void upload_watch();
  void download_watch();

  EngineParts parts_;
  int device_;
  DeviceStream own_stream_;
  Stream last_stream_;
  DeviceScratch gathered_, messages_, workspace_, momenta_;
  DeviceBuffer memory_;
  DeviceCounters* counters_;
  std::uint32_t* step_verdict_;
  DeviceCounters observed_;  ///< at the last wait()
  std::vector<std::shared_ptr<DevicePlan>> plans_;
  std::uint64_t uses_ = 0;
  Watch watch_;                ///< as of the last wait(), but for `looked`, which is as it will be
  DeviceBuffer watch_memory_;  ///< its records, then its limits
  std::uint64_t watch_version_ = 0;
  bool looks_ = false;  ///< whether the bucket at hand is looked at
  std::vector<std::uint32_t> kept_;
  std::vector<double> grad_norms_;
  std::vector<ConstBytes> wires_;
  RankMessages dense_messages_;  ///< as the host's
  std::vector<Pending> pending_;
  std::size_t pending_count_ = 0;
  std::uint64_t output_hash_ = 0;
};

}  // namespace thinwire
