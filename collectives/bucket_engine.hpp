#pragma once
// One bucket's way: messages and payload out, exchange, decode, verdict. The engine owns the scratch and counts; it is used by one thread
// at a time, in bucket order.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "collectives/bucket_plan.hpp"
#include "collectives/communicator.hpp"
#include "collectives/reducer.hpp"
#include "compressors/core/buffer.hpp"
#include "compressors/core/codec.hpp"
#include "compressors/core/recursion.hpp"

namespace thinwire {

class BucketEngine {
 public:
  /// `codec` may be null (codec=none). `parameters`: how many, for per-parameter statistics; `total_numel`: of all of them, for clipping.
  BucketEngine(Communicator& communicator, const Codec* codec, const Recursion& recursion, const ReducerOptions& options,
               std::size_t parameters, std::size_t total_numel, std::uint64_t check_every);

  /// Reduces one bucket in place. @throws what the transport and the codec throw; the engine is not to be used afterwards.
  void run(const std::shared_ptr<const BucketPlan>& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options);

  /// A bucket that others reduced: how large it was, and whether its mean is finite.
  void passed(std::size_t dense_bytes, bool finite) noexcept;

  struct StepEnd {
    bool finite = true;
    bool restart = false;  ///< no finite step has been seen under a step verdict: all state goes back to zero
  };
  /// After the last bucket of `step`: settles what waited for the step's verdict, compares replicas where check_every asks for it.
  /// @throws Error{internal} if the replicas' means differ.
  StepEnd finish_step(std::uint64_t step);

  /// The true state has been replaced or zeroed.
  void set_started(bool started) noexcept { started_ = started; }
  bool started() const noexcept { return started_; }

  std::span<const std::uint32_t> kept() const noexcept { return kept_; }       ///< per parameter, last step
  std::span<const double> grad_norms() const noexcept { return grad_norms_; }  ///< per parameter, last step, squared, in unscaled units
  double dense_bytes() const noexcept { return dense_bytes_; }
  void forget_bytes() noexcept { dense_bytes_ = 0; }

 private:
  /// What waits for the step's verdict: each bucket's own payload.
  struct Pending {
    std::shared_ptr<const BucketPlan> bucket;
    StepScratch payload;
    bool joined = false;
  };

  std::uint32_t run_compressed(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options);
  std::uint32_t run_whole_dense(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options);
  std::uint32_t run_plain(Bytes grad);
  /// Clip factors from norms_.
  const float* factors_of(const Plan& plan, float unscale);
  void note_norms(const Plan& plan, float unscale);
  const float* passenger_factors(const Passengers& group, Bytes grad, std::uint64_t step, float unscale);
  void write_message(const Passengers& part, const float* factors, Bytes grad, std::uint64_t step, Bytes message, std::uint32_t* flags);
  void write_raw(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options, Bytes messages,
                 std::uint32_t* flags);
  void write_for_owners(const BucketPlan& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options, Bytes send,
                        std::uint32_t* flags);
  void settle(const BucketPlan& bucket, std::uint64_t step, ConstBytes own_wire, bool joined, bool finite);
  double ring_bytes(std::size_t bytes) const noexcept;
  void keep_pending(const std::shared_ptr<const BucketPlan>& bucket, bool joined);

  Communicator& communicator_;
  const Codec* codec_;
  Recursion recursion_;
  const ReducerOptions& options_;
  std::size_t total_numel_;
  std::uint64_t check_every_;

  StepScratch gathered_, messages_, workspace_;
  std::vector<ConstBytes> wires_, raw_;
  std::vector<float> factors_;
  std::vector<double> norms_;
  std::vector<std::uint32_t> kept_, bucket_kept_;
  std::vector<double> grad_norms_;
  std::vector<Pending> pending_;
  std::size_t pending_count_ = 0;
  ConstBytes own_wire_;

  bool step_finite_ = true;
  bool started_ = true;
  std::uint64_t output_hash_ = 0;
  std::vector<std::uint64_t> hashes_;
  double dense_bytes_ = 0;
};

}  // namespace thinwire
