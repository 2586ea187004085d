#pragma once
// GradientReducer: layout + codec + feedback + exchange = one all-reduce of one bucket. A C++ training loop, the PyTorch hook and replay
// all enter here.

#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "collectives/communicator.hpp"
#include "collectives/watchdog_state.hpp"
#include "compressors/core/config.hpp"
#include "compressors/core/span.hpp"
#include "compressors/core/stream.hpp"

namespace thinwire {

/// A parameter as the reducer knows it. Its id is its place in the constructor's list, equal on all ranks.
struct Parameter {
  std::string name;                ///< unique; state is keyed by it
  std::vector<std::size_t> shape;  ///< fewer than two dimensions, or fewer elements than min_numel: stays dense
};

struct ParameterStats {
  std::string name;
  std::size_t numel = 0;
  bool compressed = false;                  ///< at the last step
  std::string reason;                       ///< why not; empty if compressed
  double density = 1;                       ///< configured now
  std::uint64_t kept = 0;                   ///< entries sent at the last step
  double residual_norm = 0, grad_norm = 0;  ///< L2, of this rank; grad_norm of the last step's local gradient (codec=none, and on a GPU: of
                                            ///< the last step divisible by 16), in unscaled units; 0 for tensors that go by pass()
  std::optional<double> server_residual_norm;  ///< two_phase: of what this rank holds back as the owner of a part
  std::optional<double> momentum_norm;         ///< target=momentum: of the shared momentum
  /// target=momentum: residual_norm / momentum_norm, 0 while there is no momentum. About 1 to 5 is usual; one that goes on growing says
  /// that the error feedback does not keep up (docs/onebit_adam.md).
  std::optional<double> residual_over_momentum;
  std::optional<double> estimate_norm;  ///< estimate: of this rank's h
  /// At the last step that was looked at, every 64th: 1 − ‖x − C(x)‖²/‖x‖² of the message x, whatever the codec promises. Not of a
  /// frozen momentum without feedback; without feedback on the host alone.
  std::optional<double> measured_delta;
  /// estimate, at the same step: ‖g − h‖/‖g‖, under worker_ema of the average; above 1 for long, h lags behind
  std::optional<double> stale;
  std::optional<double> eta;              ///< EControl: in use
  std::optional<std::uint32_t> eta_cuts;  ///< how often the watchdog has lowered it, because the residual grew
  std::size_t masked = 0;                 ///< target=momentum: elements whose frozen variance is 0
};

struct Stats {
  std::uint64_t step = 0;                  ///< synchronised steps completed
  std::uint64_t payload_bytes = 0;         ///< see Traffic
  double wire_bytes = 0, dense_bytes = 0;  ///< dense_bytes: what a ring all-reduce of the same gradients in their own dtype would have sent
  double factor = 1;                       ///< dense_bytes / wire_bytes; 1 at world 1
  std::uint64_t nonfinite_steps = 0;
  std::size_t state_bytes = 0;         ///< of all arrays that this rank keeps between steps
  bool frozen = false;                 ///< target=momentum: whether the next step's momentum is compressed
  std::optional<double> resync_error;  ///< at the last resynchronize(): ‖H − its new value‖ / ‖its new value‖, over all parameters
  std::vector<ParameterStats> parameters;  ///< in id order
};

/// State of one rank by parameter and state name ("momentum", "accumulated", "residual", "threshold", …). Arrays are fp32, numel(parameter)
/// long or, for a codec's memory, its own length.
struct ReducerState {
  std::uint64_t step = 0;
  int world = 1, rank = 0;
  std::string config;
  bool started = true;  ///< under a grad scaler: whether a finite step has been seen
  std::uint64_t nonfinite_steps = 0;
  std::optional<std::uint64_t> frozen;  ///< target=momentum: the first step whose momentum was compressed, once that is known
  std::map<std::string, std::map<std::string, std::vector<float>>> parameters;
  std::map<std::string, WatchdogState> watchdog;  ///< of the parameters that it has looked at
  std::uint64_t start_until = 0;                  ///< EF21, EControl: steps before this one set the estimates, densely
  std::map<std::string, DType> dense;  ///< the same: tensors that exchange=auto had dense, whose estimates are old, and their dtypes
  bool flush = false;                  ///< flush() was called, and the dense step is yet to come
};

/// Before which steps an optimizer may freeze its variance: there, until it has, the ranks compare whether all have, and with the same
/// masks and beta1s. A small collective each time, for which a GPU's stream is waited for.
struct FreezeSteps {
  std::uint64_t from = 0;    ///< each from this one on
  std::uint64_t every = 0;   ///< before it this one and its multiples; 0: none
  std::uint64_t within = 1;  ///< each with those that follow, so many: an optimizer that steps only now and then steps before one of them
  bool contains(std::uint64_t step) const noexcept { return step >= from || (every != 0 && step >= every && step % every < within); }
};

/// Where there is more than one rank an optimizer raises sqrt(v) to at least this times its mean over the tensor when it freezes v:
/// gradients that were merely rare get no updates of thousands of times the learning rate.
inline constexpr double kVarianceFloor = 0.05;
/// The least v of a tensor whose sqrt(v) have this mean; where v is 0 it stays 0, and the element is masked.
inline float least_variance(double mean_root) noexcept {
  const double root = mean_root * kVarianceFloor;
  return float(root * root);
}
/// An update of so many times the learning rate deserves a word: Adam's are about 1.
inline constexpr double kUnusualUpdate = 20;

/// target=momentum: what an optimizer hands over of one parameter when its variance is frozen.
struct Handover {
  std::span<const float> momentum;     ///< the shared momentum, numel elements; empty: what the reducer has of it
  std::span<const std::uint8_t> live;  ///< Segment::live, (numel + 7) / 8 bytes: 0 where the frozen variance is 0; empty: all live
  float beta1 = 0.9f;                  ///< of the parameter's group
};

/// A ticket for one reduce. Copyable; outlives the reducer.
class Work {
 public:
  Work() = default;
  /// Blocks until the mean is in the bucket; on a GPU until all of it is enqueued: what comes after it on its stream finds the mean.
  /// @throws the error that the reduce met (each call again).
  void wait();
  bool done() const;

  struct Shared;  ///< of the reducer's inside

 private:
  friend class GradientReducer;
  std::shared_ptr<Shared> shared_;
  std::uint64_t ticket_ = 0;
};

struct ReduceOptions {
  float loss_scale = 1.0f;  ///< gradients are this times the true ones; state holds true ones; the mean comes back scaled
  /// On a GPU: where the loss scale lies in its memory, in place of `loss_scale`. The bucket's kernels read it, in the stream's order; the
  /// host never does. One that is not a positive number makes a bad verdict, and a later call throws.
  const float* device_loss_scale = nullptr;
  /// This rank has run out of data: it sends an empty payload and its state stays as it is. Where the momentum is averaged it sends its
  /// beta1·m and its residual, with a gradient of 0. What the bucket holds is not read.
  bool joined = false;
  /// Called when the bucket is done, on the thread that finished it, with null or the error. Must not throw and not call back into the
  /// reducer.
  void (*done)(void* context, std::exception_ptr error) noexcept = nullptr;
  void* context = nullptr;
  std::size_t dense_bytes = 0;  ///< pass() only: bytes that a dense reduction of these gradients would hold, for the statistics
};

struct ReducerOptions {
  /// The unit of a non-finite verdict is the step (an optimizer under a grad scaler skips all of it), not the bucket.
  bool step_verdict = false;
  /// The GPU in whose memory buckets and state are, or -1: the host's. On a GPU every call enqueues on the stream it is given, in the
  /// calling thread, and returns; one stream, or streams that wait for each other, for all buckets.
  int device = -1;
  /// target=momentum: an optimizer keeps the momentum and decides: everything stays dense until it calls freeze(), from the config's
  /// freeze=STEP on, or with freeze=auto at any step, unless describe_optimizer() says otherwise.
  bool momentum_elsewhere = false;
  /// On a GPU: elements of the largest bucket that will come, whose scratch must fit beside the state; 0: all parameters may come in one,
  /// as in DDP's first step.
  std::size_t largest_bucket = 0;
  /// Keep the calling thread: no queue thread even where the transport would allow one.
  bool inline_queue = false;
  /// Called with this rank's own payloads of every bucket (under two_phase those of phase 1 in destination order, then its second one), on
  /// the queue's thread. For replay and tests.
  std::function<void(std::uint64_t step, ConstBytes payload)> record_payload = nullptr;
};

/// One all-reduce (mean) per bucket, compressed. All ranks construct it with equal configs and parameters (checked at the first step by a
/// fingerprint exchange) and call reduce() for the same buckets in the same order. A step is complete when every parameter was reduced (or
/// passed) once; that is the only clock.
///
/// State lives with parameters: buckets may change between steps. Work is queued in call order and done by one thread of the reducer on a
/// communicator of its own
/// (`communicator->split`), so it overlaps the caller's work; where the transport allows only the caller's thread it is done inside
/// reduce(). After a transport error or a corrupt payload the group is aborted and every later call throws the same error.
class GradientReducer {
 public:
  /// Collective (it splits the communicator). @throws invalid_config, invalid_argument (no parameters, duplicate names, shapes beyond 2^63
  /// elements, more elements in a compressed one than the codec addresses).
  GradientReducer(std::shared_ptr<Communicator> communicator, const Config& config, std::vector<Parameter> parameters,
                  ReducerOptions options = {});
  /// Fails what is queued, releases the peers if work was under way, joins the thread (bounded by the timeout). On a GPU what is enqueued
  /// may end within the timeout, before peers are released. Never throws.
  ~GradientReducer();
  GradientReducer(const GradientReducer&) = delete;
  GradientReducer& operator=(const GradientReducer&) = delete;

  /// Replaces `grad` (local, undivided, fp32 | bf16 | fp16, the parameters' gradients one after the other without gaps, in the order of
  /// `parameters`) by the mean over ranks. A bucket with a non-finite gradient anywhere, or a non-finite mean, is NaN everywhere on all
  /// ranks, and nothing is lost (DESIGN.md 4). `grad` must stay valid until the work is done. Bytes moved: see docs/algorithms.md.
  /// @throws invalid_argument (nothing queued): unknown or repeated id, wrong size or dtype, a parameter twice in one step.
  Work reduce(std::span<const std::uint32_t> parameters, Bytes grad, Stream stream = Stream::host(), const ReduceOptions& options = {});

  /// Parameters whose gradient this reducer does not reduce in this step (sparse rows): `exchange` runs in the queue's order and thread and
  /// returns whether the mean it made is finite, the same on all ranks: it takes part in the step's verdict. It may be empty.
  Work pass(std::span<const std::uint32_t> parameters, std::string reason, std::function<bool()> exchange,
            const ReduceOptions& options = {});

  /// The next step is dense, so that it empties the residuals; where a gradient in it is not finite, so is the one after it. Call it on all
  /// ranks, between steps.
  void flush();
  /// Recursions with an estimate: H becomes the mean of the ranks' h again (less what an owner holds back, under two_phase), without what
  /// fp32 rounding has moved it; nothing else changes. A choice for checkpoints of long runs. Collective, between steps, on all ranks at
  /// the same step. Bytes moved: 8 · world per element of a compressed parameter. @throws invalid_argument where ranks are at different
  /// steps; nothing changed then. @source Gao et al. 2024 keep H as this mean; drift: docs/error_control.md.
  void resynchronize();
  /// The elements of parameter `id` lie otherwise from its next bucket on: element i is where element from[i] was. What is kept of it moves
  /// with them. Local; in the midst of a step too, as long as the parameter was not reduced in it, and on all ranks alike before that
  /// bucket.
  /// @throws invalid_argument, nothing changed, where `from` is no permutation, or this rank holds back a part of the parameter as its
  /// owner (two_phase), other elements of which would belong to other ranks.
  void reorder(std::uint32_t id, std::span<const std::uint32_t> from);
  /// target=momentum: from the next step on the momentum is compressed. `handover`: one per parameter, in id order, equal on all ranks, or
  /// empty: the reducer's own momentum, the config's beta1. Called again, it replaces masks and beta1s and, where given, momenta. Between
  /// steps, on all ranks: with momentum_elsewhere a rank that has not called it is an error on all ranks at that step. @throws
  /// invalid_argument naming what does not fit, or that this is no step to freeze before; nothing changed.
  void freeze(std::span<const Handover> handover = {});
  /// momentum_elsewhere: what the optimizer is, in words, and when it may freeze, equal on all ranks: they compare the words at the first
  /// step, and at the first after load_state(). Between steps.
  void describe_optimizer(std::string words, FreezeSteps steps);
  /// Whether the momentum is compressed by now.
  bool frozen() const;
  /// target=momentum: whether what comes back of this parameter is its momentum once that is compressed; false: its mean gradient, always.
  bool averages(std::uint32_t parameter) const;
  /// What was not sent is multiplied by `factors`, one per parameter, in id order: after a change of the learning rate, with the old rate
  /// by the new one, it moves the parameters as far as it would have. Owners' residuals too, but for EF21 and EControl, whose owners hold
  /// back no gradient. Between steps, on all ranks.
  /// @throws invalid_argument on a factor that is no positive number; nothing changed.
  /// @source BytePS; Karimireddy et al. 2019 have the learning rate inside the residual.
  void rescale_residuals(std::span<const float> factors);
  /// Zeroes all state and counters (not the step). Between steps, on all ranks; with an estimate they wait for each other, because H is the
  /// same on all, and a new start follows.
  void reset();
  /// Fails what is queued and stops the thread; idempotent. Waits at most `limit` for work under way before it aborts the group.
  void close(std::chrono::milliseconds limit = std::chrono::milliseconds(0)) noexcept;

  std::uint64_t step() const;
  const Config& config() const noexcept;
  int rank() const noexcept;
  int world() const noexcept;
  /// Waits for queued work, then reads; after a failure and after close() too.
  Stats stats() const;
  /// What a person should be told and is no error, once: empty most of the time, and then it costs nothing. Today: the first time that
  /// EControl's watchdog has lowered an eta (on a GPU: once stats() or state() have looked). From any thread.
  std::string take_notice();
  /// Between steps; after close() too. @throws the sticky error: a step that broke off has left no state that could be gone on from.
  ReducerState state() const;
  /// One state of this rank and world, or all ranks' states of another world: momentum, accumulated, residual and threshold become their
  /// mean. With momentum_elsewhere masks and beta1s stay with the optimizer's state: after a state that is frozen reduce() is refused until
  /// freeze() was called again.
  /// @throws invalid_argument naming missing or unknown names and wrong sizes; nothing changed then, on any rank. Between steps, on
  /// all ranks: they tell each other whether their states fit together.
  /// `refused`: why this rank's caller has no state to give, or empty; the peers refuse with that reason.
  void load_state(std::span<const ReducerState> states, const std::string& refused = {});

  class Impl;

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace thinwire
