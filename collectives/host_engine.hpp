#pragma once
// The engine of host memory.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "collectives/bucket_engine.hpp"
#include "collectives/bucket_plan.hpp"
#include "collectives/communicator.hpp"
#include "collectives/reducer.hpp"
#include "compressors/core/buffer.hpp"
#include "compressors/core/codec.hpp"
#include "compressors/core/recursion.hpp"

namespace thinwire {

class HostEngine final : public BucketEngine {
 public:
  explicit HostEngine(const EngineParts& parts);

  void run(const std::shared_ptr<const BucketPlan>& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options,
           Stream stream) override;
  void passed(std::size_t dense_bytes, bool finite) override;
  void finish_step(std::uint64_t step) override;
  bool idle_within(std::chrono::milliseconds) override { return true; }
  void wait() override {}
  void check() override {}
  void set_started(bool started) override { started_ = started; }
  bool started() const override { return started_; }
  std::uint64_t nonfinite_steps() const override { return nonfinite_steps_; }
  void set_nonfinite_steps(std::uint64_t steps) override { nonfinite_steps_ = steps; }
  std::span<const std::uint32_t> kept() const override { return kept_; }
  std::span<const double> grad_norms() const override { return grad_norms_; }
  Watch* watch() override { return watch_.watches() ? &watch_ : nullptr; }
  const float* eta_limits() override { return watch_.watches() ? watch_.limits() : nullptr; }

 private:
  /// What a bucket leaves for its verdict. All of it lies in scratch, or waits for the step's verdict in a Pending.
  struct Sent {
    ConstBytes own_wire;  ///< what is taken back: this rank's payload, under two_phase its second one
    ConstBytes gathered;  ///< target=momentum: all ranks' contributions, of which the momentum is decoded
    ConstBytes shared;    ///< what becomes of dense parameters' momentum (a step verdict) or mean estimate (a starting step), packed, fp32
    bool joined = false;
  };
  struct Pending {
    std::shared_ptr<const BucketPlan> bucket;
    StepScratch memory;
    Sent sent;
  };

  std::uint32_t run_compressed(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options);
  std::uint32_t run_two_phase(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options);
  std::uint32_t run_whole_dense(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options);
  std::uint32_t run_plain(Bytes grad);
  /// Clip factors from norms_.
  const float* factors_of(const Plan& plan, float unscale);
  void note_norms(const Plan& plan, float unscale);
  const float* passenger_factors(const Passengers& group, Bytes grad, std::uint64_t step, float unscale);
  void write_message(const Recursion& recursion, const Passengers& part, const float* factors, Bytes grad, std::uint64_t step,
                     Bytes message, std::uint32_t* flags);
  void write_raw(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options, Bytes messages,
                 std::uint32_t* flags);
  void write_for_owners(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options, Bytes send,
                        std::uint32_t* flags);
  void stream(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options, Bytes workspace, Bytes wire,
              std::uint32_t* flags);
  /// feedback=none: what was left out is in no state. The own payload is decoded once more, into scratch of the bucket in fp32.
  void probe_decoded(const Plan& plan, ConstBytes grad, const float* factors, Bytes workspace, Bytes wire);
  void settle(const BucketPlan& bucket, std::uint64_t step, const Sent& sent, bool finite);
  void take_back(const BucketPlan& bucket, std::uint64_t step, const Sent& sent);
  /// The verdict of a step that is Recursion::starting.
  void start(const BucketPlan& bucket, std::uint64_t step, const Sent& sent, bool finite);
  void move_momentum(const BucketPlan& bucket, std::uint64_t step, const Sent& sent);
  /// A dense step with estimates: keeps the means of `sums` for the verdict of a starting one, or makes the mean of all estimates anew.
  void note_dense_means(const BucketPlan& bucket, Bytes sums);
  void note_dense_momentum(const BucketPlan& bucket, Bytes grad, float unscale);
  void keep_pending(const std::shared_ptr<const BucketPlan>& bucket);

  Communicator& communicator_;
  const Codec* codec_;
  Recursion recursion_;
  const ReducerOptions& options_;
  std::size_t total_numel_;
  std::uint64_t check_every_;
  Arena& arena_;

  StepScratch gathered_, messages_, workspace_, momenta_, decoded_;
  std::vector<ConstBytes> wires_, raw_;
  std::span<const ConstBytes> dense_messages_;  ///< of passengers[0] and the bucket under way, where all of them are here
  std::vector<float> factors_;
  std::vector<double> norms_;
  std::vector<std::uint32_t> kept_, bucket_kept_;
  std::vector<double> grad_norms_;
  std::vector<Pending> pending_;
  std::size_t pending_count_ = 0;
  Sent sent_;

  bool step_finite_ = true;
  bool started_ = true;
  std::uint64_t output_hash_ = 0;
  Watch watch_;
  std::vector<Probe> probes_;
  std::vector<SegmentState> decoded_states_;
  std::vector<WatchedSegment> watched_;
  std::vector<double> watched_grads_;
  std::vector<std::uint64_t> hashes_;
  std::uint64_t nonfinite_steps_ = 0;
};

}  // namespace thinwire
