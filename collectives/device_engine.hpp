#pragma once
// The engine of device memory. device_engine.cpp has a bucket's way, device_verdict.cpp what follows its verdict and what the host asks.

#include <algorithm>
#include <chrono>
#include <cstdint>
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
        memory_(sizeof(DeviceCounters) + 64, device),
        kept_(parts.parameters),
        grad_norms_(parts.parameters),
        wires_(std::size_t(parts.communicator.size())) {
    counters_ = reinterpret_cast<DeviceCounters*>(memory_.data());
    step_verdict_ = reinterpret_cast<std::uint32_t*>(memory_.data() + round_up(sizeof(DeviceCounters), 16));
    observed_.started = !parts.options.step_verdict;
    write_counters();
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

 private:
  /// What waits for the step's verdict: a bucket's own payload.
  struct Pending {
    explicit Pending(int device) : payload(device) {}
    std::shared_ptr<DevicePlan> plan;
    DeviceScratch payload;
    std::size_t bytes = 0;
    bool joined = false;
  };

  int world() const { return parts_.communicator.size(); }
  bool clips() const { return parts_.recursion.clip_norm > 0; }
  /// The host cannot know a scale in device memory to be 1.
  static bool scaled(const ReduceOptions& options) { return options.device_loss_scale != nullptr || options.loss_scale != 1.0f; }
  std::shared_ptr<DevicePlan> plan_of(const std::shared_ptr<const BucketPlan>& bucket, Stream stream);
  /// Norms where somebody needs them, and the factors of a group whose messages are in true units; null: all 1.
  const float* factors_of(DevicePlan& plan, int group, Bytes grad, std::uint64_t step, const ReduceOptions& options, Stream stream);
  void write_messages(DevicePlan& plan, const DeviceRanges (&where)[2], Bytes grad, std::uint64_t step, const ReduceOptions& options,
                      std::byte* const (&to)[2], Stream stream);
  void run_plain(DevicePlan& plan, Bytes grad, std::uint64_t step, const ReduceOptions& options, Stream stream);
  void run_whole_dense(DevicePlan& plan, Bytes grad, std::uint64_t step, const ReduceOptions& options, Stream stream);
  ConstBytes run_compressed(DevicePlan& plan, Bytes grad, std::uint64_t step, const ReduceOptions& options, Stream stream);
  void settle(DevicePlan& plan, std::uint64_t step, ConstBytes own_wire, bool joined, const std::uint32_t* verdict, Stream stream);
  void write_counters();

  EngineParts parts_;
  int device_;
  DeviceStream own_stream_;
  Stream last_stream_;
  DeviceScratch gathered_, messages_, workspace_;
  DeviceBuffer memory_;
  DeviceCounters* counters_;
  std::uint32_t* step_verdict_;
  DeviceCounters observed_;  ///< at the last wait()
  std::vector<std::shared_ptr<DevicePlan>> plans_;
  std::uint64_t uses_ = 0;
  std::vector<std::uint32_t> kept_;
  std::vector<double> grad_norms_;
  std::vector<ConstBytes> wires_;
  std::vector<Pending> pending_;
  std::size_t pending_count_ = 0;
  std::uint64_t output_hash_ = 0;
};

}  // namespace thinwire
