// NCCL as a transport. A thread of each group keeps its deadlines. Communicators are blocking: nonblocking ones make a thread for every
// collective.

#include "collectives/nccl/nccl.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "collectives/nccl/nccl_api.hpp"
#include "compressors/core/device.hpp"
#include "compressors/core/error.hpp"

namespace thinwire {
namespace {

using Clock = std::chrono::steady_clock;
using detail::nccl_api;

Clock::time_point deadline_after(std::chrono::milliseconds timeout) {
  constexpr std::chrono::milliseconds kLongest = std::chrono::hours(24 * 365);  // now() + milliseconds::max() would overflow
  return Clock::now() + std::min(timeout, kLongest);
}

void check_cuda(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // told here: it is no error of somebody's next call
  fail(Errc::device, std::string(call) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

/// What NCCL said, with the name of the call.
Error error_of(ncclResult_t result, const std::string& call, ncclComm_t communicator) {
  const auto& api = nccl_api();
  if (result == ncclInProgress)
    return Error(Errc::unsupported,
                 "nccl: " + call + ": the communicator is nonblocking, thinwire's calls need a blocking one: unset NCCL_COMM_BLOCKING" +
                     ", and make a communicator of your own with ncclConfig_t::blocking = 1");
  std::string what = "nccl: " + call + ": " + api.error_string(result);
  const char* last = api.last_error(communicator);
  if (last != nullptr && *last != '\0') what += " (" + std::string(last) + ")";
  return Error(result == ncclInvalidArgument ? Errc::invalid_argument
               : result == ncclRemoteError   ? Errc::peer_lost
                                             : Errc::transport,
               what);
}
[[noreturn]] void fail_nccl(ncclResult_t result, const std::string& call, ncclComm_t communicator) {
  throw error_of(result, call, communicator);
}

ncclDataType_t type_of(DType dtype) {
  return dtype == DType::fp32 ? ncclFloat32 : dtype == DType::bf16 ? ncclBfloat16 : dtype == DType::fp16 ? ncclFloat16 : ncclUint8;
}

/// Runs a call that makes a communicator, which waits for all ranks, and gives up on it at the deadline. What it works on outlives this
/// call, because NCCL may come back to it later.
ncclComm_t make_within(const char* call, Clock::time_point deadline, int device, std::function<ncclResult_t(ncclComm_t*)> make) {
  struct Shared {
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    ncclResult_t result = ncclSuccess;
    ncclComm_t made = nullptr;
  };
  const auto shared = std::make_shared<Shared>();
  std::thread([shared, device, make = std::move(make)] {
    ncclComm_t made = nullptr;
    const cudaError_t chosen = cudaSetDevice(device);
    const ncclResult_t result = chosen == cudaSuccess ? make(&made) : ncclUnhandledCudaError;
    if (result == ncclInProgress && made != nullptr) nccl_api().abort(made);  // it is refused (error_of)
    const std::lock_guard lock(shared->mutex);
    shared->done = true;
    shared->result = result;
    shared->made = made;
    shared->changed.notify_all();
  }).detach();
  std::unique_lock lock(shared->mutex);
  if (!shared->changed.wait_until(lock, deadline, [&] { return shared->done; }))
    fail(Errc::timeout, std::string("nccl: ") + call + ": not all ranks came within the deadline");
  if (shared->result != ncclSuccess) fail_nccl(shared->result, call, nullptr);
  return shared->made;
}

class Nccl final : public Communicator {
 public:
  Nccl(ncclComm_t communicator, bool owned, int device) : communicator_(communicator), owned_(owned), device_(device), own_stream_(device) {
    const ncclResult_t ranked = nccl_api().user_rank(communicator_, &rank_);
    const ncclResult_t counted = ranked == ncclSuccess ? nccl_api().count(communicator_, &size_) : ranked;
    if (counted != ncclSuccess) {
      const Error error = error_of(counted, ranked != ncclSuccess ? "ncclCommUserRank" : "ncclCommCount", communicator_);
      if (owned_) nccl_api().abort(communicator_);
      throw error;
    }
    watcher_ = std::thread([this] { watch(); });
  }

  ~Nccl() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
      changed_.notify_all();
    }
    watcher_.join();
    // Calls in flight end first; a group that is broken, or whose peers are gone, must not keep this process.
    const auto deadline = Clock::now() + std::chrono::seconds(10);
    bool sound = !failed_;
    for (const Call& call : in_flight_) {
      while (sound && cudaEventQuery(call.done) == cudaErrorNotReady) {
        if (Clock::now() > deadline) sound = false;
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
    }
    if (owned_ && !aborted_) sound ? nccl_api().destroy(communicator_) : nccl_api().abort(communicator_);
    for (const Call& call : in_flight_) cudaEventDestroy(call.done);
    for (cudaEvent_t event : spare_) cudaEventDestroy(event);
  }

  int rank() const noexcept override { return rank_; }
  int size() const noexcept override { return size_; }
  const char* transport() const noexcept override { return "nccl"; }

  std::unique_ptr<Communicator> split(int colour, int key) override {
    THINWIRE_EXPECTS(colour >= 0, "split: colour " + std::to_string(colour) + " is negative");
    raise_failure();
    ncclComm_t part = nullptr;
    try {
      // The lock is held by who waits, so that the watcher leaves the parent alone meanwhile.
      const std::lock_guard use(use_);
      part = make_within("ncclCommSplit", deadline_after(timeout()), device_, [parent = communicator_, colour, key](ncclComm_t* made) {
        return nccl_api().split(parent, colour, key, made, nullptr);
      });
    } catch (const Error& error) {
      break_off(error.code(), error.what());
      throw;
    }
    auto group = std::make_unique<Nccl>(part, true, device_);
    group->set_timeout(timeout());
    return group;
  }

  void abort(const std::string& reason) noexcept override {
    try {
      break_off(Errc::peer_lost, "rank " + std::to_string(rank_) + " aborted: " + reason);
    } catch (const std::bad_alloc&) { break_off(Errc::peer_lost, {}); }
  }

 private:
  static constexpr auto kStuck = std::chrono::seconds(1);

  /// A call on a stream and when it has to be done.
  struct Call {
    const char* name;
    cudaEvent_t done;
    Clock::time_point deadline;
  };

  bool serves(Place) const noexcept override { return true; }

  void raise_failure() override {
    const std::lock_guard lock(mutex_);
    if (failed_) throw Error(code_, what_);
  }

  /// The group is unusable from here on, on this rank; kernels of it that wait for peers end.
  void break_off(Errc code, std::string what) noexcept {
    {
      const std::lock_guard lock(mutex_);
      if (!failed_) {
        failed_ = true;
        code_ = code;
        what_ = std::move(what);
      }
      if (aborted_ || !owned_) return;
      aborted_ = true;
    }
    // Nobody else is inside NCCL with this communicator, unless that is what hangs: then abort is what ends it.
    const std::unique_lock use(use_, kStuck);
    nccl_api().abort(communicator_);
  }

  /// The call that a thread is in, for the watcher; use_ is held.
  class Calling {
   public:
    Calling(Nccl& group, const char* name, Clock::time_point deadline) : group_(group) { group_.set_calling(name, deadline); }
    ~Calling() { group_.set_calling(nullptr, {}); }
    Calling(const Calling&) = delete;
    Calling& operator=(const Calling&) = delete;

   private:
    Nccl& group_;
  };

  /// Makes calls of NCCL on a stream, and has them watched.
  template <class Enqueue>
  void enqueue(const char* name, Stream stream, Enqueue&& calls) {
    const auto deadline = deadline_after(timeout());
    std::optional<Error> problem;
    {
      const std::lock_guard use(use_);
      raise_failure();
      const Calling calling(*this, name, deadline);  // until it is in flight, so that its deadline is looked after all the time
      const ncclResult_t result = calls(stream.get());
      raise_failure();  // it was aborted while it was in there: the communicator is gone
      if (result != ncclSuccess) {
        problem = error_of(result, name, communicator_);
      } else {
        put_in_flight(name, stream, deadline);
        raise_failure();
      }
    }
    if (problem) {
      if (problem->code() != Errc::invalid_argument) break_off(problem->code(), problem->what());
      throw *problem;
    }
  }

  /// Marks the end of a call on its stream.
  void put_in_flight(const char* name, Stream stream, Clock::time_point deadline) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(stream.get(), &capture), "cudaStreamIsCapturing");
    if (capture != cudaStreamCaptureStatusNone) return;
    cudaEvent_t done = nullptr;
    {
      const std::lock_guard lock(mutex_);
      if (!spare_.empty()) {
        done = spare_.back();
        spare_.pop_back();
      }
    }
    if (done == nullptr) {
      const OnDevice on(device_);
      check_cuda(cudaEventCreateWithFlags(&done, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    }
    // Without the lock: where the queue of launches is full, because a peer is gone, this waits until the watcher has aborted the group.
    const cudaError_t recorded = cudaEventRecord(done, stream.get());
    const std::lock_guard lock(mutex_);
    if (recorded == cudaSuccess) {
      in_flight_.push_back({name, done, deadline});
    } else {
      spare_.push_back(done);
    }
    check_cuda(recorded, "cudaEventRecord");
  }

  bool was_aborted() {
    const std::lock_guard lock(mutex_);
    return aborted_;
  }

  void set_calling(const char* name, Clock::time_point deadline) {
    const std::lock_guard lock(mutex_);
    calling_ = name;
    calling_deadline_ = deadline;
  }

  /// The watcher's thread.
  void watch() {
    constexpr auto kEvery = std::chrono::milliseconds(50);
    std::optional<Error> problem;
    cudaSetDevice(device_);
    // Looking at events must not break a capture that another thread has under way.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeThreadLocal;
    cudaThreadExchangeStreamCaptureMode(&mode);
    std::unique_lock lock(mutex_);
    while (!stop_) {
      changed_.wait_for(lock, kEvery, [this] { return stop_; });
      if (stop_ || failed_ || (in_flight_.empty() && calling_ == nullptr)) continue;
      const char* late = nullptr;
      if (calling_ != nullptr) {  // a call that waits for room in the queue may hold a lock that a look at an event would wait for
        if (Clock::now() > calling_deadline_) late = calling_;
      } else {
        while (!in_flight_.empty() && cudaEventQuery(in_flight_.front().done) != cudaErrorNotReady) {
          spare_.push_back(in_flight_.front().done);  // done, or broken by an error of the device that the next call of its own meets
          in_flight_.pop_front();
        }
        if (!in_flight_.empty() && Clock::now() > in_flight_.front().deadline) late = in_flight_.front().name;
      }
      lock.unlock();
      if (late != nullptr) {
        break_off(Errc::timeout, std::string("nccl: ") + late + " did not end within " + std::to_string(timeout().count()) +
                                     " ms: a peer is missing or late");
      } else if (const std::unique_lock use(use_, std::try_to_lock); use.owns_lock() && !was_aborted()) {
        ncclResult_t state = ncclSuccess;
        const ncclResult_t asked = nccl_api().async_error(communicator_, &state);
        if (asked != ncclSuccess) state = asked;
        if (state != ncclSuccess && state != ncclInProgress) problem = error_of(state, "an asynchronous error", communicator_);
      }
      if (problem) break_off(problem->code(), problem->what());
      problem.reset();
      lock.lock();
    }
  }

  /// Runs a call of host spans on their copies in device memory, and waits within the deadline.
  template <class Run>
  void bounce(const char* name, ConstBytes in, std::size_t in_at, Bytes out, std::size_t out_at, Run&& run) {
    const std::size_t bytes = std::max(in_at + in.size, out_at + out.size);
    if (bounce_.size() < bytes) bounce_.reserve(bytes, device_);
    const Stream stream = own_stream_.get();
    device_copy(bounce_.data() + in_at, in.data, in.size, stream);
    run(bounce_.data(), stream);
    wait(name, stream);
    device_copy(out.data, bounce_.data() + out_at, out.size, stream);
    device_wait(stream);
  }

  /// Polls: cudaStreamSynchronize knows no deadline.
  void wait(const char* name, Stream stream) {
    const auto deadline = deadline_after(timeout());
    for (;;) {
      const cudaError_t state = cudaStreamQuery(stream.get());
      if (state == cudaSuccess) return raise_failure();
      if (state != cudaErrorNotReady) check_cuda(state, name);
      raise_failure();
      if (Clock::now() > deadline) {
        break_off(Errc::timeout, std::string("nccl: ") + name + " did not end within " + std::to_string(timeout().count()) + " ms");
        raise_failure();
      }
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }

  Bytes on_device(std::byte* data, Bytes like) const { return {data, like.size, like.dtype, Place::cuda, device_}; }
  ConstBytes on_device(const std::byte* data, ConstBytes like) const { return {data, like.size, like.dtype, Place::cuda, device_}; }

  void do_all_gather(ConstBytes send, Bytes recv, Stream stream) override {
    if (recv.place == Place::host) {
      const std::size_t own = send.size * std::size_t(rank_);
      return bounce("all_gather", send, own, recv, 0, [&](std::byte* base, Stream on) {
        do_all_gather(on_device(static_cast<const std::byte*>(base + own), send), on_device(base, recv), on);
      });
    }
    enqueue("all_gather", stream,
            [&](cudaStream_t on) { return nccl_api().all_gather(send.data, recv.data, send.size, ncclUint8, communicator_, on); });
  }

  void do_all_to_all(ConstBytes send, std::span<const std::size_t> send_bytes, Bytes recv, std::span<const std::size_t> recv_bytes,
                     Stream stream) override {
    if (recv.place == Place::host) {
      const std::size_t received = round_up(send.size, 256);
      return bounce("all_to_all", send, 0, recv, received, [&](std::byte* base, Stream on) {
        do_all_to_all(on_device(static_cast<const std::byte*>(base), send), send_bytes, on_device(base + received, recv), recv_bytes, on);
      });
    }
    enqueue("all_to_all", stream, [&](cudaStream_t on) {
      const auto& api = nccl_api();
      ncclResult_t result = api.group_start();
      std::size_t from = 0, to = 0;
      for (int r = 0; r < size_ && result == ncclSuccess; ++r) {
        const std::size_t out = send_bytes[std::size_t(r)], in = recv_bytes[std::size_t(r)];
        if (out != 0) result = api.send(send.data + from, out, ncclUint8, r, communicator_, on);
        if (in != 0 && result == ncclSuccess) result = api.recv(recv.data + to, in, ncclUint8, r, communicator_, on);
        from += out;
        to += in;
      }
      const ncclResult_t ended = api.group_end();
      return result != ncclSuccess ? result : ended;
    });
  }

  void do_equal_all_to_all(ConstBytes send, Bytes recv, std::span<const std::size_t> slots, Stream stream) override {
    if (recv.place == Place::host || nccl_api().all_to_all == nullptr) return do_all_to_all(send, slots, recv, slots, stream);
    enqueue("all_to_all", stream,
            [&](cudaStream_t on) { return nccl_api().all_to_all(send.data, recv.data, slots.front(), ncclUint8, communicator_, on); });
  }

  void do_all_reduce(Bytes data, Stream stream) override {
    if (data.place == Place::host)
      return bounce("all_reduce", data, 0, data, 0, [&](std::byte* base, Stream on) { do_all_reduce(on_device(base, data), on); });
    enqueue("all_reduce", stream, [&](cudaStream_t on) {
      return nccl_api().all_reduce(data.data, data.data, data.count(), type_of(data.dtype), ncclSum, communicator_, on);
    });
  }

  void do_broadcast(Bytes data, int root, Stream stream) override {
    if (data.place == Place::host)
      return bounce("broadcast", data, 0, data, 0, [&](std::byte* base, Stream on) { do_broadcast(on_device(base, data), root, on); });
    enqueue("broadcast", stream,
            [&](cudaStream_t on) { return nccl_api().broadcast(data.data, data.data, data.size, ncclUint8, root, communicator_, on); });
  }

  void do_barrier() override {
    std::byte token{};
    std::vector<std::byte> all(static_cast<std::size_t>(size_));
    do_all_gather({&token, 1, DType::u8, Place::host, 0}, {all.data(), all.size(), DType::u8, Place::host, 0}, Stream::host());
  }

  ncclComm_t communicator_;
  const bool owned_;
  const int device_;
  int rank_ = 0, size_ = 1;
  DeviceStream own_stream_;
  DeviceBuffer bounce_;

  std::timed_mutex use_;  // of calls with the communicator
  std::mutex mutex_;      // of what follows
  std::condition_variable changed_;
  std::deque<Call> in_flight_;
  const char* calling_ = nullptr;  // the call under way in NCCL, and when it has to be back
  Clock::time_point calling_deadline_;
  std::vector<cudaEvent_t> spare_;
  bool stop_ = false, failed_ = false, aborted_ = false;
  Errc code_ = Errc::transport;
  std::string what_;
  std::thread watcher_;
};

}  // namespace

std::unique_ptr<Communicator> make_nccl(ncclComm_t communicator, int device) {
  THINWIRE_EXPECTS(communicator != nullptr, "make_nccl: the communicator is null");
  return std::make_unique<Nccl>(communicator, false, device);
}

std::unique_ptr<Communicator> make_nccl(const ncclUniqueId& id, int world, int rank, int device, std::chrono::milliseconds limit) {
  THINWIRE_EXPECTS(world > 0 && rank >= 0 && rank < world,
                   "make_nccl: rank " + std::to_string(rank) + " is outside [0, " + std::to_string(world) + ")");
  const ncclComm_t communicator = make_within("ncclCommInitRankConfig", deadline_after(limit), device, [id, world, rank](ncclComm_t* made) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    return nccl_api().init_rank(made, world, id, rank, &config);
  });
  auto group = std::make_unique<Nccl>(communicator, true, device);
  group->set_timeout(limit);
  return group;
}

ncclUniqueId nccl_unique_id() {
  ncclUniqueId id;
  const ncclResult_t result = nccl_api().get_unique_id(&id);
  if (result != ncclSuccess) fail_nccl(result, "ncclGetUniqueId", nullptr);
  return id;
}

}  // namespace thinwire
