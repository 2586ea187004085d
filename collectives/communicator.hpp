#pragma once
// The transport interface: what happens between devices. Loopback (ranks as threads), MPI, c10d and NCCL implement it.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "compressors/core/span.hpp"
#include "compressors/core/stream.hpp"

namespace thinwire {

/// Bytes counted where they are handed to the transport, when a call has succeeded.
struct Traffic {
  std::uint64_t payload_bytes =
      0;  ///< send buffers of all calls, each once, own part included (an all-reduce and a broadcast's root count their buffer)
  double wire_bytes = 0;  ///< times what leaves this rank: gather and a broadcast's root N − 1, all-to-all (N − 1)/N, all-reduce 2(N − 1)/N
  std::uint64_t calls = 0;  ///< barriers too; split is no call
};

/// One rank's end of a group. Collective calls are made by all ranks in the same order, by one thread at a time. On host spans a call
/// returns when the data is there; on device spans it enqueues on `stream`. Spans must not overlap unless a call says so. Every call has a
/// deadline, timeout(): past it, and when a peer is gone or has aborted, it throws Error{timeout | peer_lost | transport}; after that the
/// group is unusable and its owner calls abort(), which releases the peers. Wrong arguments (null with a size, sizes that do not fit,
/// overlap, a dtype or root that does not exist) throw invalid_argument and a place that the transport does not serve throws unsupported,
/// before anything is sent: the group stays usable, but the peers wait for this rank's call.
class Communicator {
 public:
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  virtual int rank() const noexcept = 0;
  virtual int size() const noexcept = 0;
  /// "loopback", "mpi", "gloo", …
  virtual const char* transport() const noexcept = 0;
  /// Whether a thread other than the caller's may make the calls (MPI below THREAD_MULTIPLE: no).
  virtual bool any_thread() const noexcept { return true; }

  /// A new group of the ranks that give the same colour, ordered by (key, rank); collective. split(0, rank()) is a duplicate of this group.
  virtual std::unique_ptr<Communicator> split(int colour, int key) = 0;

  /// recv = contributions of all ranks, in rank order; recv.size = size() · send.size. `send` may be the own slot of `recv`. Equal sizes on
  /// all ranks.
  void all_gather(ConstBytes send, Bytes recv, Stream stream = Stream::host());
  /// Slot r of send goes to rank r; slot r of recv is from rank r. Equal slots: send.size = recv.size = size() · slot.
  void all_to_all(ConstBytes send, Bytes recv, Stream stream = Stream::host());
  /// Slots of unequal sizes in bytes, one after the other without gaps. What rank r sends to s is what s expects from r.
  void all_to_all_v(ConstBytes send, std::span<const std::size_t> send_bytes, Bytes recv, std::span<const std::size_t> recv_bytes,
                    Stream stream = Stream::host());
  /// In-place sum over ranks in data.dtype (fp32, bf16, fp16). Bits are equal on all ranks; the order of the sum is the transport's.
  void all_reduce(Bytes data, Stream stream = Stream::host());
  void broadcast(Bytes data, int root, Stream stream = Stream::host());
  void barrier();

  /// Makes every call in flight and to come throw, here and, as far as the transport can, on the peers. Any thread; idempotent; never
  /// throws.
  virtual void abort(const std::string& reason) noexcept = 0;

  /// @throws what has ended the group since the last call, where a call does not wait for its end (device spans); nothing is sent.
  virtual void raise_failure() {}

  std::chrono::milliseconds timeout() const noexcept { return timeout_; }
  virtual void set_timeout(std::chrono::milliseconds timeout) { timeout_ = timeout; }
  Traffic traffic() const noexcept { return traffic_; }  ///< read from the thread that makes the calls

 protected:
  Communicator() = default;
  /// Adds to traffic(): `payload` bytes handed to the transport, of which `leaves` times as many leave this rank. The calls above count
  /// themselves.
  void count(std::size_t payload, double leaves) noexcept;

 private:
  /// Which spans the transport takes.
  virtual bool serves(Place place) const noexcept { return place == Place::host; }
  virtual void do_all_gather(ConstBytes send, Bytes recv, Stream stream) = 0;
  virtual void do_all_to_all(ConstBytes send, std::span<const std::size_t> send_bytes, Bytes recv, std::span<const std::size_t> recv_bytes,
                             Stream stream) = 0;
  /// all_to_all's own: every slot of every rank has the same size.
  virtual void do_equal_all_to_all(ConstBytes send, Bytes recv, std::span<const std::size_t> slots, Stream stream) {
    do_all_to_all(send, slots, recv, slots, stream);
  }
  virtual void do_all_reduce(Bytes data, Stream stream) = 0;
  virtual void do_broadcast(Bytes data, int root, Stream stream) = 0;
  virtual void do_barrier() = 0;

  void check(const char* call, ConstBytes span, Stream stream) const;
  void exchange(ConstBytes send, std::span<const std::size_t> send_bytes, Bytes recv, std::span<const std::size_t> recv_bytes, bool equal,
                Stream stream);

  std::chrono::milliseconds timeout_{600000};
  Traffic traffic_;
  std::vector<std::size_t> slots_;  // of all_to_all: equal sizes, allocated once
};

/// `world` communicators of one process, one per thread that plays a rank. A rank whose communicator is destroyed while others wait for it
/// is a lost peer.
std::vector<std::unique_ptr<Communicator>> make_loopback(int world);

}  // namespace thinwire
