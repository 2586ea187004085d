#pragma once
// One bucket's way: messages and payload out, exchange, decode, verdict. The engine owns the scratch and counts; it is used by one thread
// at a time, in bucket order. On the host a call returns when its work is done; on a GPU it enqueues.

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>

#include "collectives/bucket_plan.hpp"
#include "collectives/communicator.hpp"
#include "collectives/reducer.hpp"
#include "collectives/watch.hpp"
#include "compressors/core/buffer.hpp"
#include "compressors/core/codec.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/core/stream.hpp"

namespace thinwire {

/// What an engine works with; all of it outlives the engine.
struct EngineParts {
  Communicator& communicator;
  const Codec* codec;  ///< null: codec=none
  Recursion recursion;
  const ReducerOptions& options;
  Arena& arena;             ///< the state, in the engine's place
  std::size_t parameters;   ///< how many, for per-parameter statistics
  std::size_t total_numel;  ///< of all of them, for clipping
  std::uint64_t check_every;
};

class BucketEngine {
 public:
  virtual ~BucketEngine() = default;

  /// Reduces one bucket in place. @throws what the transport and the codec throw; the engine is not to be used afterwards.
  virtual void run(const std::shared_ptr<const BucketPlan>& bucket, Bytes grad, std::uint64_t step, const ReduceOptions& options,
                   Stream stream) = 0;

  /// A bucket that others reduced: how large it was, and whether its mean is finite.
  virtual void passed(std::size_t dense_bytes, bool finite) = 0;

  /// After the last bucket of `step`: settles what waited for the step's verdict, zeroes all state where no finite step has been seen under
  /// a step verdict, compares replicas where check_every asks for it. @throws Error{internal} if the replicas' means differ.
  virtual void finish_step(std::uint64_t step) = 0;

  /// Whether all that was enqueued is done, at the latest after `limit`.
  virtual bool idle_within(std::chrono::milliseconds limit) = 0;
  /// Returns when all that was enqueued is done.
  virtual void wait() = 0;
  /// @throws what kernels have left to be told.
  virtual void check() = 0;

  /// The true state has been replaced or zeroed.
  virtual void set_started(bool started) = 0;
  virtual bool started() const = 0;
  virtual std::uint64_t nonfinite_steps() const = 0;
  virtual void set_nonfinite_steps(std::uint64_t steps) = 0;

  // Of the last step, per parameter; on a GPU after wait().
  virtual std::span<const std::uint32_t> kept() const = 0;
  virtual std::span<const double> grad_norms() const = 0;  ///< squared, in unscaled units
  /// Error feedback's own measurements; null where none are made.
  virtual Watch* watch() { return nullptr; }
  /// SegmentState::eta_limit of parameter p is at [p], in the engine's place; null: there is no watchdog.
  virtual const float* eta_limits() { return nullptr; }

  double dense_bytes() const noexcept { return dense_bytes_; }
  void forget_bytes() noexcept { dense_bytes_ = 0; }

 protected:
  /// Counts a bucket of this many bytes towards dense_bytes().
  void count_dense(std::size_t bytes, int world) noexcept { dense_bytes_ += 2.0 * (world - 1) / world * double(bytes); }

 private:
  double dense_bytes_ = 0;
};

std::unique_ptr<BucketEngine> make_host_engine(const EngineParts& parts);
/// @throws Error{unsupported} in a build without CUDA.
std::unique_ptr<BucketEngine> make_device_engine(const EngineParts& parts, int device);

}  // namespace thinwire
