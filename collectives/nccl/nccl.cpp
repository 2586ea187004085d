// NCCL as a transport. Communicators are nonblocking: every call into NCCL comes back, and what it has not finished is polled until the
// deadline.

#include "collectives/nccl/nccl.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
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
  fail(Errc::device, std::string(call) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

/// The device is the thread's current one for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

/// Turns NCCL's answer into ours: success, or what it said with the name of the call.
[[noreturn]] void fail_nccl(ncclResult_t result, const std::string& call, ncclComm_t communicator) {
  const auto& api = nccl_api();
  std::string what = "nccl: " + call + ": " + api.error_string(result);
  const char* last = api.last_error(communicator);
  if (last != nullptr && *last != '\0') what += " (" + std::string(last) + ")";
  fail(result == ncclInvalidArgument ? Errc::invalid_argument : result == ncclRemoteError ? Errc::peer_lost : Errc::transport, what);
}

ncclDataType_t type_of(DType dtype) {
  return dtype == DType::fp32 ? ncclFloat32 : dtype == DType::bf16 ? ncclBfloat16 : dtype == DType::fp16 ? ncclFloat16 : ncclUint8;
}

/// Polls a nonblocking communicator until what it does is done. @throws timeout past the deadline, what NCCL reports before.
void poll(ncclComm_t communicator, const std::string& call, Clock::time_point deadline) {
  for (int turn = 0;; ++turn) {
    ncclResult_t state = ncclSuccess;
    const ncclResult_t asked = nccl_api().async_error(communicator, &state);
    if (asked != ncclSuccess) fail_nccl(asked, call, communicator);
    if (state == ncclSuccess) return;
    if (state != ncclInProgress) fail_nccl(state, call, communicator);
    if (Clock::now() > deadline) fail(Errc::timeout, "nccl: " + call + ": not all ranks came within the deadline");
    if (turn > 100) std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

ncclConfig_t nonblocking() {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  return config;
}

class Nccl final : public Communicator {
 public:
  Nccl(ncclComm_t communicator, bool owned, int device) : communicator_(communicator), owned_(owned), device_(device), own_stream_(device) {
    nccl_api().user_rank(communicator_, &rank_);
    nccl_api().count(communicator_, &size_);
    watcher_ = std::thread([this] { watch(); });
  }

  ~Nccl() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
      changed_.notify_all();
    }
    watcher_.join();
    for (const Call& call : in_flight_) cudaEventDestroy(call.done);
    for (cudaEvent_t event : spare_) cudaEventDestroy(event);
    if (!owned_ || communicator_ == nullptr) return;
    // Calls in flight end first; a group that is broken, or whose peers are gone, must not keep this process.
    bool sound = !failed_;
    try {
      if (sound && nccl_api().finalize(communicator_) <= ncclInProgress)
        poll(communicator_, "ncclCommFinalize", deadline_after(std::chrono::seconds(10)));
    } catch (const Error&) { sound = false; }
    if (sound) {
      nccl_api().destroy(communicator_);
    } else if (!aborted_) {
      nccl_api().abort(communicator_);
    }
  }

  int rank() const noexcept override { return rank_; }
  int size() const noexcept override { return size_; }
  const char* transport() const noexcept override { return "nccl"; }

  std::unique_ptr<Communicator> split(int colour, int key) override {
    THINWIRE_EXPECTS(colour >= 0, "split: colour " + std::to_string(colour) + " is negative");
    rethrow();
    const auto deadline = deadline_after(timeout());
    ncclComm_t part = nullptr;
    ncclConfig_t config = nonblocking();
    finish(nccl_api().split(communicator_, colour, key, &part, &config), "ncclCommSplit", deadline);
    poll(part, "ncclCommSplit", deadline);
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
  /// A call on a stream and when it has to be done.
  struct Call {
    const char* name;
    cudaEvent_t done;
    Clock::time_point deadline;
  };

  bool serves(Place) const noexcept override { return true; }

  void rethrow() {
    const std::lock_guard lock(mutex_);
    if (failed_) throw Error(code_, what_);
  }

  /// The group is unusable from here on, on this rank; kernels of it that wait for peers end.
  void break_off(Errc code, std::string what) noexcept {
    const std::lock_guard lock(mutex_);
    if (!failed_) {
      failed_ = true;
      code_ = code;
      what_ = std::move(what);
    }
    if (aborted_ || !owned_) return;
    aborted_ = true;
    nccl_api().abort(communicator_);
  }

  void finish(ncclResult_t result, const char* call, Clock::time_point deadline) {
    try {
      if (result != ncclSuccess && result != ncclInProgress) fail_nccl(result, call, communicator_);
      if (result == ncclInProgress) poll(communicator_, call, deadline);
    } catch (const Error& error) {
      if (error.code() != Errc::invalid_argument) break_off(error.code(), error.what());
      throw;
    }
  }

  /// Makes calls of NCCL on a stream, and has them watched.
  template <class Enqueue>
  void enqueue(const char* name, Stream stream, Enqueue&& calls) {
    rethrow();
    const auto deadline = deadline_after(timeout());
    finish(calls(stream.get()), name, deadline);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(stream.get(), &capture), "cudaStreamIsCapturing");
    if (capture != cudaStreamCaptureStatusNone) return;
    const std::lock_guard lock(mutex_);
    cudaEvent_t done = nullptr;
    if (spare_.empty()) {
      const OnDevice on(device_);
      check_cuda(cudaEventCreateWithFlags(&done, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    } else {
      done = spare_.back();
      spare_.pop_back();
    }
    check_cuda(cudaEventRecord(done, stream.get()), "cudaEventRecord");
    in_flight_.push_back({name, done, deadline});
    changed_.notify_all();
  }

  /// The watcher's thread.
  void watch() {
    constexpr auto kEvery = std::chrono::milliseconds(50);
    cudaSetDevice(device_);
    std::unique_lock lock(mutex_);
    while (!stop_) {
      if (in_flight_.empty() || failed_) {
        changed_.wait(lock, [this] { return stop_ || (!in_flight_.empty() && !failed_); });
        continue;
      }
      while (!in_flight_.empty() && cudaEventQuery(in_flight_.front().done) != cudaErrorNotReady) {
        spare_.push_back(in_flight_.front().done);  // done, or broken by an error of the device that the next call of its own meets
        in_flight_.pop_front();
      }
      ncclResult_t state = ncclSuccess;
      const ncclResult_t asked = nccl_api().async_error(communicator_, &state);
      const ncclResult_t bad = asked != ncclSuccess ? asked : state;
      std::optional<std::pair<Errc, std::string>> problem;
      if (bad != ncclSuccess && bad != ncclInProgress) {
        problem = {bad == ncclRemoteError ? Errc::peer_lost : Errc::transport,
                   std::string("nccl: an asynchronous error: ") + nccl_api().error_string(bad)};
      } else if (!in_flight_.empty() && Clock::now() > in_flight_.front().deadline) {
        problem = {Errc::timeout, std::string("nccl: ") + in_flight_.front().name + " did not end within " +
                                      std::to_string(timeout().count()) + " ms: a peer is missing or late"};
      }
      if (problem) {
        lock.unlock();
        break_off(problem->first, std::move(problem->second));
        lock.lock();
        continue;
      }
      changed_.wait_for(lock, kEvery, [this] { return stop_; });
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
      if (state == cudaSuccess) return rethrow();
      if (state != cudaErrorNotReady) check_cuda(state, name);
      rethrow();
      if (Clock::now() > deadline) {
        break_off(Errc::timeout, std::string("nccl: ") + name + " did not end within " + std::to_string(timeout().count()) + " ms");
        rethrow();
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

  std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  std::deque<Call> in_flight_;
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
  const auto deadline = deadline_after(limit);
  const OnDevice on(device);
  ncclComm_t communicator = nullptr;
  ncclConfig_t config = nonblocking();
  const ncclResult_t result = nccl_api().init_rank(&communicator, world, id, rank, &config);
  if (result != ncclSuccess && result != ncclInProgress) fail_nccl(result, "ncclCommInitRankConfig", communicator);
  try {
    poll(communicator, "ncclCommInitRankConfig", deadline);
  } catch (const Error&) {
    nccl_api().abort(communicator);
    throw;
  }
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
