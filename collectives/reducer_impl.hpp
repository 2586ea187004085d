#pragma once
// The reducer's inside, shared by reducer.cpp (calls and the clock), reducer_setup.cpp (construction), reducer_state.cpp (what is done to
// state between steps, statistics) and reducer_checkpoint.cpp.

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "collectives/bucket_engine.hpp"
#include "collectives/bucket_plan.hpp"
#include "collectives/communicator.hpp"
#include "collectives/reducer.hpp"
#include "collectives/work_queue.hpp"
#include "compressors/core/buffer.hpp"
#include "compressors/core/codec.hpp"
#include "compressors/core/policy.hpp"

namespace thinwire {

/// The caller's communicator with the reducer's own deadline for as long as this lives.
class Deadline {
 public:
  Deadline(Communicator& of, std::chrono::milliseconds timeout) : of_(of), before_(of.timeout()) { of.set_timeout(timeout); }
  ~Deadline() { of_.set_timeout(before_); }
  Deadline(const Deadline&) = delete;
  Deadline& operator=(const Deadline&) = delete;

 private:
  Communicator& of_;
  const std::chrono::milliseconds before_;
};

/// What a parameter may keep: the recursion's arrays, the codec's memory, what the owner of its part holds back.
inline constexpr std::size_t kNamedArrays = kMaxStateArrays + 2, kMemoryArray = kMaxStateArrays, kServerArray = kMaxStateArrays + 1;

class GradientReducer::Impl {
 public:
  Impl(std::shared_ptr<Communicator> communicator, const Config& config, std::vector<Parameter> parameters, ReducerOptions options);
  ~Impl();

  std::uint64_t reduce(std::span<const std::uint32_t> ids, Bytes grad, Stream stream, const ReduceOptions& options);
  std::uint64_t pass(std::span<const std::uint32_t> ids, std::string reason, std::function<bool()> exchange, const ReduceOptions& options);
  void flush();
  void freeze(std::span<const Handover> handover);
  void rescale_residuals(std::span<const float> factors);
  void resynchronize();
  void reorder(std::uint32_t id, std::span<const std::uint32_t> from);
  void describe_optimizer(std::string words, FreezeSteps steps);
  void reset();
  void close(std::chrono::milliseconds limit) noexcept;
  Stats stats();
  std::string take_notice();
  ReducerState state() const;
  void load_state(std::span<const ReducerState> states, const std::string& refused);

  // reducer_setup.cpp
  /// @throws invalid_argument naming a parameter that is to be compressed and has more elements than the codec can address.
  void check_sizes() const;
  /// A codec's words, which know parameters by their ids, with the names beside them.
  std::string with_names(std::string what) const;
  void lay_out_state();
  /// @throws device where the GPU lacks the memory that the largest bucket needs beside the state, naming the bytes.
  void check_device_memory() const;
  /// Where a rank stands.
  struct Standing {
    std::uint64_t step, freeze_at;
    bool at_step;  ///< about to take this step: not loading a state, after which an optimizer may still load its own
    bool joined;
    std::uint64_t loaded = 0;  ///< of a state that is being loaded: a hash of what all ranks of its checkpoint hold alike
  };
  /// What a rank is: all ranks compare theirs before anything of different sizes could travel. `problem`: why this rank refuses, or empty.
  void compare_cards(Communicator& communicator, const Standing& standing, const std::string& problem) const;
  std::uint64_t own_fingerprint() const;
  /// Of cards whose optimizers differ: @throws invalid_argument with what differs in the words of two of them. `longest`: bytes of words.
  void compare_optimizers(Communicator& communicator, std::size_t longest) const;
  /// In words, the first parameter in which rank `other` and rank 0, with so many each, differ. Collective: all ranks call it alike.
  std::string first_difference(Communicator& communicator, int other, std::size_t other_count, std::size_t first_count) const;
  /// @throws invalid_argument naming the parameter of which the optimizers handed over different things.
  void compare_handovers(Communicator& communicator) const;

  // reducer.cpp
  /// target=gradient is frozen from the start.
  /// What a parameter is sent with at a step after the dense ones.
  Setting setting_at(std::uint64_t step, std::uint32_t id) const;
  /// The recursion of the current step's messages.
  Recursion recursion_now() const noexcept;
  bool is_frozen() const noexcept { return !recursion_.averaged || step_ >= freeze_at_; }
  void begin_step_if_needed();
  /// A dense step that sets the estimates and meets a gradient that is not finite, or follows such steps, is followed by two more: one that
  /// sends what waited, and one in which the message is the gradient alone. The host waits to know, from the step before a start on.
  /// @returns start_until_ as it should be.
  std::uint64_t start_goes_on_until() const;
  /// Estimates that start without a dense step: whether this step, unless it is dense, sends their first payload. The host waits to
  /// know, after such a step under a step verdict.
  bool is_first_compressed(bool dense);
  /// Whether the step before was a flushed one whose gradients were not finite: what it held back is still there. After engine_->wait().
  bool has_flush_failed() const;
  /// Marks the ids as reduced in this step. @throws invalid_argument, nothing changed.
  void mark(std::span<const std::uint32_t> ids);
  bool complete_step_if_all_seen();
  /// Whether a rule makes this parameter dense at its setting.
  bool dense_by_rule(const ParameterSlot& slot, DType dtype) const;
  /// @throws invalid_argument where bucket and stream are not both in the reducer's place.
  void check_place(Bytes grad, Stream stream, const float* loss_scale) const;
  std::shared_ptr<const BucketPlan> find_plan(std::span<const std::uint32_t> ids, DType dtype);
  void run(Job& job);
  /// After a step, on the queue's thread: whether a watchdog has lowered an eta by now, to be told once.
  void notice_cuts(std::uint64_t step);
  std::exception_ptr explain(const Job& job, std::exception_ptr error);
  /// @throws invalid_argument where a frozen state was loaded and freeze() was not called since.
  void expect_handover() const;
  /// @throws the sticky error, or invalid_argument in the middle of a step.
  void between_steps(const char* call) const;
  /// Waits until all that was submitted is done. @throws what went wrong in it.
  void finish_all() const;

  // reducer_checkpoint.cpp
  /// One named array of a parameter's state.
  struct Array {
    std::string_view name;
    StateArray data;
    std::size_t count;
  };
  /// compare_cards on the caller's communicator. An error of the transport names the call: a rank that has not made it is the likeliest
  /// reason.
  void compare_with_all(const char* call, const Standing& standing) const;
  /// The state that this rank takes from, after everything about it was checked. @throws invalid_argument, nothing changed.
  std::span<const ReducerState> check_states(std::span<const ReducerState> states) const;
  /// Whether what the array would take, `values` of one checkpoint, is no bf16 number where the array's place in the recursion needs one.
  bool off_grid(const Array& array, std::span<const float> values) const noexcept;
  /// The named array of another rank of another world: an owned part has another length there.
  std::size_t length_in(const Array& array, std::uint32_t id, const ReducerState& source) const;
  /// Fills `out` (kNamedArrays of them) with what parameter `id` keeps; returns how many.
  std::size_t arrays_of(std::uint32_t id, std::span<Array> out) const;

  const std::shared_ptr<Communicator> parent_;
  std::unique_ptr<Communicator> communicator_;  ///< its own duplicate of parent_: collectives of two threads never meet on one
  const Config config_;
  const ReducerOptions options_;
  std::unique_ptr<const Codec> codec_;
  Recursion recursion_;
  Recursion before_freeze_;                                        ///< target=momentum: of the dense steps before it
  enum class Init { dense, compressed, zero } init_ = Init::zero;  ///< of estimates
  std::uint64_t dense_steps_ = 0;                                  ///< that come first
  bool two_phase_ = false;
  std::unique_ptr<const RatioPolicy> policy_;
  std::vector<ParameterSlot> slots_;
  std::size_t total_numel_ = 0;
  Arena arena_;

  // The clock, moved by the submitting thread.
  mutable std::mutex submit_;
  std::uint64_t step_ = 0;           ///< of the next bucket to come
  std::vector<std::uint64_t> seen_;  ///< per parameter: 1 + the step in which it was last reduced
  std::size_t seen_count_ = 0;
  bool step_begun_ = false;
  bool dense_step_ = false;
  bool starting_step_ = false;         ///< of Recursion::starting
  bool first_average_ = false;         ///< of Recursion::first
  std::uint64_t compressed_from_ = 0;  ///< estimates that start without a dense step: the step of their first payload
  std::uint64_t start_until_ = 0;  ///< steps before this one are such steps, after a bad verdict, a reset, or for tensors that come back
  bool blank_ = true;              ///< no state was loaded: before the start estimates are 0
  std::uint64_t bad_before_ = 0;   ///< non-finite steps that are accounted for in start_until_
  bool flush_next_ = false;
  bool flushed_step_ = false;           ///< the current step is dense because of flush()
  std::uint64_t bad_before_flush_ = 0;  ///< non-finite steps before it
  bool was_frozen_ = true;
  std::uint64_t freeze_at_ = UINT64_MAX;     ///< target=momentum: the first step that is compressed
  std::optional<FreezeSteps> freeze_steps_;  ///< momentum_elsewhere
  std::string optimizer_;                    ///< in words
  bool awaits_handover_ = false;             ///< momentum_elsewhere: a frozen state was loaded, which has no masks and beta1s
  std::uint64_t epoch_ = 0;                  ///< changes with any setting
  struct CachedPlan {
    std::uint64_t epoch;
    std::shared_ptr<const BucketPlan> plan;
  };
  std::vector<CachedPlan> plans_;
  std::vector<std::string> pass_reasons_;  ///< per parameter

  // What the queue's thread counts; read after drain() or under this mutex.
  bool cuts_noticed_ = false;  ///< the queue's thread alone
  std::atomic<bool> has_notice_ = false;
  std::string notice_;  ///< under counters_
  mutable std::mutex counters_;
  std::uint64_t steps_done_ = 0;
  Traffic traffic_, traffic_at_reset_;
  std::optional<double> resync_error_;

  bool cards_compared_ = false, freeze_agreed_ = false;  ///< queue's thread, or between steps
  bool closed_ = false;
  std::unique_ptr<BucketEngine> engine_;
  std::unique_ptr<WorkQueue> queue_;  ///< last: its thread uses all of the above
};

}  // namespace thinwire
