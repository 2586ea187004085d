// MPI as a transport: nonblocking calls, polled until they are done or the deadline has passed. MPI 3.1, no globals.

#include "collectives/mpi/mpi.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "collectives/element_sum.hpp"
#include "collectives/mpi/version.hpp"
#include "compressors/core/buffer.hpp"
#include "compressors/core/error.hpp"

namespace thinwire {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kDefaultTimeout{600};
constexpr int kAbortTag = 0;
constexpr int kTags = 16384;          // data tags 1 … kTags, one per call: a message that nobody took is not taken for a later call's
constexpr std::size_t kReason = 256;  // bytes of an abort message: eager everywhere
constexpr std::size_t kSmallReduce = 8192;  // up to here one all-gather is cheaper than two exchanges

std::string error_text(int code) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) return "MPI error " + std::to_string(code);
  return std::string(text, std::size_t(length));
}

bool running() {
  int initialized = 0, finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  return initialized != 0 && finalized == 0;
}

Clock::time_point deadline_after(std::chrono::milliseconds timeout) {
  constexpr std::chrono::milliseconds kLongest = std::chrono::hours(24 * 365);  // now() + milliseconds::max() would overflow
  return Clock::now() + std::min(timeout, kLongest);
}

/// Waiting that leaves a shared core to the ranks waited for: MPI progresses only inside its calls, so pure sleeping would cost a step of
/// every exchange.
class Backoff {
 public:
  /// @returns whether this wait is long enough by now to look for more than its own end.
  bool pause() {
    if (++turns_ <= 50) return false;
    if (turns_ <= 500) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    return turns_ % 16 == 0;
  }

 private:
  unsigned turns_ = 0;
};

class Mpi final : public Communicator {
 public:
  /// Takes `comm`, which is the group's own.
  Mpi(MPI_Comm comm, detail::MpiLimits limits) : comm_(comm), limits_(limits), owner_(std::this_thread::get_id()) {
    MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);  // else MPI ends the process before we can throw
    MPI_Comm_rank(comm_, &rank_);
    MPI_Comm_size(comm_, &size_);
    int provided = MPI_THREAD_SINGLE;
    MPI_Query_thread(&provided);
    any_thread_ = provided == MPI_THREAD_MULTIPLE;
    requests_.reserve(2 * std::size_t(size_));
  }

  ~Mpi() override {
    const bool alive = running();
    if (alive && !failed_) {
      MPI_Comm_free(&comm_);
      return;
    }
    if (alive && may_call()) send_notices();
    // Requests may be in flight: the communicator stays, and the staging that MPI may still write to as long as the process lives.
    (void)new (std::nothrow) Buffer(std::move(staging_));
  }

  int rank() const noexcept override { return rank_; }
  int size() const noexcept override { return size_; }
  const char* transport() const noexcept override { return "mpi"; }
  bool any_thread() const noexcept override { return any_thread_; }

  std::unique_ptr<Communicator> split(int colour, int key) override {
    THINWIRE_EXPECTS(colour >= 0, "split: colour " + std::to_string(colour) + " is negative");
    Call call(*this, "split");
    call.start([&](MPI_Request* request) { return MPI_Ibarrier(comm_, request); });  // MPI_Comm_split knows no deadline: enter it together
    call.finish();
    MPI_Comm part = MPI_COMM_NULL;
    call.check(MPI_Comm_split(comm_, colour, key, &part));
    auto group = std::make_unique<Mpi>(part, limits_);
    group->set_timeout(timeout());
    return group;
  }

  void abort(const std::string& reason) noexcept override {
    try {
      set_failed(Errc::peer_lost, "rank " + std::to_string(rank_) + " aborted: " + reason);
      {
        std::lock_guard lock(mutex_);
        if (!notice_wanted_) notice_ = reason;
        notice_wanted_ = true;
      }
      if (may_call() && running()) send_notices();
    } catch (...) {  // no memory for the text: the failure itself must not be lost
      failed_ = true;
    }
  }

 private:
  // One collective: its requests, its deadline, its name for errors.
  class Call {
   public:
    Call(Mpi& owner, const char* name) : owner_(owner), name_(name), deadline_(deadline_after(owner.timeout())) {
      THINWIRE_EXPECTS(running(), std::string(name) + ": MPI is not running (before MPI_Init or after MPI_Finalize)");
      if (owner_.failed_) rethrow();
      tag_ = 1 + int(owner_.calls_++ % kTags);
    }

    template <class Start>
    void start(Start fn) {
      MPI_Request request = MPI_REQUEST_NULL;
      const int code = fn(&request);
      if (request != MPI_REQUEST_NULL) owner_.requests_.push_back(request);
      check(code);
    }

    void send(const std::byte* from, std::size_t bytes, int peer) {
      each_message(bytes, [&](std::size_t at, int count) {
        start([&](MPI_Request* request) { return MPI_Isend(from + at, count, MPI_BYTE, peer, tag_, owner_.comm_, request); });
      });
    }
    void receive(std::byte* to, std::size_t bytes, int peer) {
      each_message(bytes, [&](std::size_t at, int count) {
        start([&](MPI_Request* request) { return MPI_Irecv(to + at, count, MPI_BYTE, peer, tag_, owner_.comm_, request); });
      });
    }
    template <class Fn>
    void each_message(std::size_t bytes, Fn fn) {
      for (std::size_t at = 0; at < bytes; at += owner_.limits_.message) fn(at, int(std::min(owner_.limits_.message, bytes - at)));
    }

    /// Polls until all requests are done. After a failure they stay in flight.
    void finish() {
      auto& requests = owner_.requests_;
      Backoff backoff;
      while (!requests.empty()) {
        int done = 0;
        owner_.statuses_.resize(requests.size());
        const int code = MPI_Testall(int(requests.size()), requests.data(), &done, owner_.statuses_.data());
        if (code == MPI_ERR_IN_STATUS) {
          for (const MPI_Status& status : owner_.statuses_) check(status.MPI_ERROR == MPI_ERR_PENDING ? MPI_SUCCESS : status.MPI_ERROR);
        }
        check(code);
        if (done != 0) return requests.clear();
        if (owner_.failed_) rethrow();
        if (backoff.pause()) {
          owner_.look_for_notice();
          if (Clock::now() >= deadline_) give_up();
        }
      }
    }

    void check(int code) {
      if (code == MPI_SUCCESS) return;
      owner_.set_failed(Errc::transport, error_text(code) + " in " + name_ + " on rank " + std::to_string(owner_.rank_));
      rethrow();
    }

   private:
    [[noreturn]] void give_up() {
      owner_.set_failed(Errc::timeout, "timed out: rank " + std::to_string(owner_.rank_) + " waited " +
                                           std::to_string(owner_.timeout().count()) + " ms in " + name_ +
                                           " for a peer (MPI does not say which)");
      rethrow();
    }

    [[noreturn]] void rethrow() {
      if (owner_.may_call()) owner_.send_notices();
      std::lock_guard lock(owner_.mutex_);
      fail(owner_.code_,
           "mpi rank " + std::to_string(owner_.rank_) + " of " + std::to_string(owner_.size_) + ": " + name_ + ": " + owner_.reason_);
    }

    Mpi& owner_;
    const char* name_;
    Clock::time_point deadline_;
    int tag_ = 1;
  };

  bool may_call() const { return any_thread_ || std::this_thread::get_id() == owner_; }

  void set_failed(Errc code, std::string reason) {
    std::lock_guard lock(mutex_);
    if (failed_) return;
    code_ = code;
    reason_ = std::move(reason);
    failed_ = true;
  }

  // What an abort still owes the peers. The text outlives everything: nobody waits for these sends.
  void send_notices() noexcept {
    char* text = nullptr;
    {
      std::lock_guard lock(mutex_);
      if (!notice_wanted_ || notice_sent_) return;
      notice_sent_ = true;
      text = new (std::nothrow) char[kReason]();
      if (text == nullptr) return;  // the peers leave by their own deadline
      std::memcpy(text, notice_.data(), std::min(notice_.size(), kReason - 1));
    }
    for (int peer = 0; peer < size_; ++peer) {
      MPI_Request request = MPI_REQUEST_NULL;
      if (peer != rank_ && MPI_Isend(text, int(kReason), MPI_BYTE, peer, kAbortTag, comm_, &request) == MPI_SUCCESS)
        MPI_Request_free(&request);
    }
  }

  void look_for_notice() {
    int found = 0;
    MPI_Status status;
    if (MPI_Iprobe(MPI_ANY_SOURCE, kAbortTag, comm_, &found, &status) != MPI_SUCCESS || found == 0) return;
    char text[kReason] = {};
    if (MPI_Recv(text, int(kReason), MPI_BYTE, status.MPI_SOURCE, kAbortTag, comm_, MPI_STATUS_IGNORE) != MPI_SUCCESS) return;
    text[kReason - 1] = 0;
    set_failed(Errc::peer_lost, "rank " + std::to_string(status.MPI_SOURCE) + " aborted: " + text);
  }

  static void copy(std::byte* to, const std::byte* from, std::size_t bytes) {
    if (bytes != 0 && to != from) std::memcpy(to, from, bytes);
  }

  /// The peers in the order rank + 1, rank + 2, …, so that not all ranks begin with the same one.
  template <class Fn>
  void each_peer(Fn fn) {
    for (int step = 1; step < size_; ++step) fn((rank_ + step) % size_);
  }

  void do_all_gather(ConstBytes send, Bytes recv, Stream) override {
    Call call(*this, "all_gather");
    const std::size_t slot = send.size;
    std::byte* own = recv.data + std::size_t(rank_) * slot;
    if (slot <= limits_.message) {
      const void* from = slot != 0 && send.data == own ? MPI_IN_PLACE : send.data;
      call.start(
          [&](MPI_Request* request) { return MPI_Iallgather(from, int(slot), MPI_BYTE, recv.data, int(slot), MPI_BYTE, comm_, request); });
      return call.finish();
    }
    each_peer([&](int peer) { call.receive(recv.data + std::size_t(peer) * slot, slot, peer); });
    each_peer([&](int peer) { call.send(send.data, slot, peer); });
    copy(own, send.data, slot);
    call.finish();
  }

  // Every pair by itself: which pairs exceed an int, or need several messages, only the pair knows.
  void do_all_to_all(ConstBytes send, std::span<const std::size_t> send_bytes, Bytes recv, std::span<const std::size_t> recv_bytes,
                     Stream) override {
    Call call(*this, "all_to_all");
    const auto first = [](std::span<const std::size_t> bytes, int rank) {
      std::size_t sum = 0;
      for (int r = 0; r < rank; ++r) sum += bytes[std::size_t(r)];
      return sum;
    };
    each_peer([&](int peer) { call.receive(recv.data + first(recv_bytes, peer), recv_bytes[std::size_t(peer)], peer); });
    each_peer([&](int peer) { call.send(send.data + first(send_bytes, peer), send_bytes[std::size_t(peer)], peer); });
    const std::size_t own = send_bytes[std::size_t(rank_)];
    if (own != 0) copy(recv.data + first(recv_bytes, rank_), send.data + first(send_bytes, rank_), own);
    call.finish();
  }

  void do_all_reduce(Bytes data, Stream) override {
    Call call(*this, "all_reduce");
    if (size_ == 1 || data.empty()) return;
    const std::size_t block = std::max(limits_.block / 4 * 4, 4 * std::size_t(size_));
    staging_.reserve(std::max(block + 4 * std::size_t(size_), kSmallReduce * std::size_t(size_)));
    if (data.size <= kSmallReduce) return reduce_small(call, data);
    for (std::size_t at = 0; at < data.size; at += block) reduce_block(call, data.sub(at, std::min(block, data.size - at)));
  }

  void reduce_small(Call& call, Bytes data) {
    std::byte* all = staging_.data();
    const int bytes = int(data.size);
    call.start([&](MPI_Request* request) { return MPI_Iallgather(data.data, bytes, MPI_BYTE, all, bytes, MPI_BYTE, comm_, request); });
    call.finish();
    for (int r = 1; r < size_; ++r) detail::add_elements(all, all + std::size_t(r) * data.size, data.size, data.dtype);
    copy(data.data, all, data.size);
  }

  // Rank r gets part r of all ranks, adds them in rank order and sends the sum to all: the volume of a ring, two messages per pair.
  void reduce_block(Call& call, Bytes data) {
    const auto begin = [&](int r) { return detail::part_begin(data.size, data.dtype, r, size_); };
    const std::size_t bytes = begin(rank_ + 1) - begin(rank_);
    std::byte* own = data.data + begin(rank_);
    const auto slot = [&](int r) { return r == rank_ ? own : staging_.data() + std::size_t(r) * bytes; };
    each_peer([&](int peer) { call.receive(slot(peer), bytes, peer); });
    each_peer([&](int peer) { call.send(data.data + begin(peer), begin(peer + 1) - begin(peer), peer); });
    call.finish();
    for (int r = 1; r < size_; ++r) detail::add_elements(slot(0), slot(r), bytes, data.dtype);
    copy(own, slot(0), bytes);
    each_peer([&](int peer) { call.receive(data.data + begin(peer), begin(peer + 1) - begin(peer), peer); });
    each_peer([&](int peer) { call.send(own, bytes, peer); });
    call.finish();
  }

  void do_broadcast(Bytes data, int root, Stream) override {
    Call call(*this, "broadcast");
    call.each_message(data.size, [&](std::size_t at, int count) {
      call.start([&](MPI_Request* request) { return MPI_Ibcast(data.data + at, count, MPI_BYTE, root, comm_, request); });
    });
    call.finish();
  }

  void do_barrier() override {
    Call call(*this, "barrier");
    call.start([&](MPI_Request* request) { return MPI_Ibarrier(comm_, request); });
    call.finish();
  }

  MPI_Comm comm_;
  const detail::MpiLimits limits_;
  const std::thread::id owner_;
  int rank_ = 0, size_ = 1;
  bool any_thread_ = false;
  unsigned calls_ = 0;
  std::vector<MPI_Request> requests_;
  std::vector<MPI_Status> statuses_;
  Buffer staging_;

  std::mutex mutex_;  // of what follows; failed_ is read without it
  std::atomic<bool> failed_{false};
  Errc code_ = Errc::peer_lost;
  std::string reason_ = "aborted", notice_;
  bool notice_wanted_ = false, notice_sent_ = false;
};

}  // namespace

namespace detail {

std::unique_ptr<Communicator> make_mpi_with_limits(MPI_Comm comm, MpiLimits limits) {
  THINWIRE_EXPECTS(running(), "make_mpi: MPI is not running; call MPI_Init_thread first");
  THINWIRE_EXPECTS(comm != MPI_COMM_NULL, "make_mpi: MPI_COMM_NULL");
  THINWIRE_EXPECTS(limits.message >= 1 && limits.message <= INT_MAX, "make_mpi: a message of " + std::to_string(limits.message) + " bytes");
  int inter = 0;
  MPI_Comm_test_inter(comm, &inter);
  THINWIRE_EXPECTS(inter == 0, "make_mpi: an intercommunicator; merge it first");
  auto own = std::make_unique<MPI_Comm>(MPI_COMM_NULL);
  MPI_Request request = MPI_REQUEST_NULL;
  int code = MPI_Comm_idup(comm, own.get(), &request);
  const auto deadline = Clock::now() + kDefaultTimeout;
  Backoff backoff;
  for (int done = 0; code == MPI_SUCCESS && done == 0;) {
    code = MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    if (done == 0 && backoff.pause() && Clock::now() >= deadline) {
      (void)own.release();  // the duplicate may still come
      fail(Errc::timeout, "make_mpi: waited " + std::to_string(kDefaultTimeout.count()) + " s for all ranks of the communicator");
    }
  }
  if (code != MPI_SUCCESS) fail(Errc::transport, "make_mpi: " + error_text(code));
  return std::make_unique<Mpi>(*own, limits);
}

}  // namespace detail

std::unique_ptr<Communicator> make_mpi(MPI_Comm comm) { return detail::make_mpi_with_limits(comm, {}); }

bool built_with_mpi() noexcept { return true; }

std::string mpi_standard() {
  int version = 0, subversion = 0;
  MPI_Get_version(&version, &subversion);
  return std::to_string(version) + "." + std::to_string(subversion);
}

std::string mpi_library() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  if (MPI_Get_library_version(text, &length) != MPI_SUCCESS) return {};
  const std::string whole(text, std::size_t(length));
  return whole.substr(0, whole.find('\n'));
}

}  // namespace thinwire
