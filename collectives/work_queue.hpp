#pragma once
// The reducer's FIFO: one thread works through buckets in the order they were given. Nothing is allocated once the ring has grown to the
// deepest queue seen.

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "collectives/bucket_plan.hpp"
#include "collectives/reducer.hpp"

namespace thinwire {

struct Job {
  std::shared_ptr<const BucketPlan> bucket;  ///< null: a pass
  Bytes grad;
  Stream stream = Stream::host();
  ReduceOptions options;
  std::uint64_t step = 0;
  bool first = false, last = false;  ///< bucket of the step
  bool flushed = false;              ///< the step is dense because of flush()
  std::function<bool()> exchange;    ///< a pass's own work; whether its result is finite
  std::uint64_t ticket = 0;
};

/// What Work and the reducer share; outlives the reducer.
struct Work::Shared {
  std::mutex mutex;
  std::condition_variable changed;
  std::uint64_t submitted = 0;                    ///< tickets given out
  std::uint64_t completed = 0;                    ///< tickets [1, completed] are over, well or badly
  std::uint64_t failed_from = ~std::uint64_t(0);  ///< tickets from here on failed with `error`
  std::exception_ptr error;                       ///< sticky
};

class WorkQueue {
 public:
  /// `run` does one job and throws on failure; `failed` is called once, with the first error, before anybody learns of it, and returns the
  /// error to keep.
  WorkQueue(bool threaded, std::function<void(Job&)> run, std::function<std::exception_ptr(const Job&, std::exception_ptr)> failed);
  ~WorkQueue();

  /// Queues (threaded) or runs. @throws the sticky error.
  std::uint64_t push(Job&& job);
  /// Blocks until everything queued is over.
  void settle() const;
  /// The same. @throws the sticky error.
  void drain() const;
  /// @throws the sticky error, if there is one by now.
  void rethrow() const;
  /// Makes `error` the sticky one unless there is one, and fails what is queued.
  void fail_all(std::exception_ptr error);
  /// Stops the thread after the job under way; what is queued fails with `error`.
  void stop(std::exception_ptr error) noexcept;
  /// Whether a job is under way or queued; waits at most `limit` for the answer to become no.
  bool busy_after(std::chrono::milliseconds limit) const;

  const std::shared_ptr<Work::Shared>& shared() const noexcept { return shared_; }

 private:
  void loop();
  void finish(Job& job, std::exception_ptr error);
  void execute(Job& job);

  std::function<void(Job&)> run_;
  std::function<std::exception_ptr(const Job&, std::exception_ptr)> failed_;
  std::shared_ptr<Work::Shared> shared_;
  std::vector<Job> ring_;
  std::size_t head_ = 0, size_ = 0;
  bool stop_ = false;
  const bool threaded_;
  std::thread thread_;
};

}  // namespace thinwire
