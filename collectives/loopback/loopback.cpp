// Ranks as threads of one process. A collective is: meet (publish where the data is), read straight from the peers' spans, meet again (so
// that nobody's span changes or dies while a peer reads it). Nothing is staged and nothing is allocated per call.

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "collectives/communicator.hpp"
#include "collectives/element_sum.hpp"
#include "compressors/core/error.hpp"

namespace thinwire {
namespace {

using Clock = std::chrono::steady_clock;

enum class Op { all_gather, all_to_all, all_reduce, broadcast, barrier, split, summed, finish };

/// Whether the ranks read each other's spans after a meeting for this.
constexpr bool opens_spans(Op op) { return op <= Op::broadcast || op == Op::summed; }

const char* to_string(Op op) {
  switch (op) {
    case Op::all_gather:
      return "all_gather";
    case Op::all_to_all:
      return "all_to_all";
    case Op::all_reduce:
      return "all_reduce";
    case Op::broadcast:
      return "broadcast";
    case Op::barrier:
      return "barrier";
    case Op::split:
      return "split";
    case Op::summed:
      return "all_reduce (second half)";
    case Op::finish:
      return "the end of a call";
  }
  return "?";
}

/// What one rank brings to the first meeting of a call.
struct Offer {
  Op op = Op::barrier;
  const std::byte* send = nullptr;
  std::span<const std::size_t> send_bytes{}, recv_bytes{};  // of all_to_all
  std::size_t bytes = 0;
  DType dtype = DType::u8;
  int root = 0, colour = 0, key = 0;
};

std::string describe(const Offer& offer) {
  std::string text = to_string(offer.op);
  if (offer.op == Op::broadcast) text += " from root " + std::to_string(offer.root);
  if (offer.op == Op::all_gather || offer.op == Op::all_reduce || offer.op == Op::broadcast)
    text += " of " + std::to_string(offer.bytes) + " bytes";
  if (offer.op == Op::all_reduce) text += std::string(" ") + thinwire::to_string(offer.dtype);
  return text;
}

/// What the ranks of one group share.
class Group {
 public:
  /// A rank's place in a group that a split made.
  struct Seat {
    std::shared_ptr<Group> group;
    int rank = 0;
  };

  explicit Group(int world) : members_(std::size_t(world)) {}

  int world() const noexcept { return int(members_.size()); }
  const Offer& offer(int rank) const noexcept { return members_[std::size_t(rank)].offer; }

  /// Returns once all ranks are here for the same thing; if that opens spans, the peers' offers and what they point to may be read until
  /// this rank's next meet(). `offer` is null in the later meetings of a call: peers may still be reading the first one's. On failure waits
  /// until no rank reads any more, then throws: the caller's spans may die after that.
  void meet(int rank, Op op, const Offer* offer, const char* call, Clock::time_point deadline, std::chrono::milliseconds timeout) {
    std::unique_lock lock(mutex_);
    Member& me = members_[std::size_t(rank)];
    if (me.reading) {
      me.reading = false;
      if (--readers_ == 0 && failed_) changed_.notify_all();
    }
    if (!failed_) {
      me.op = op;
      if (offer != nullptr) me.offer = *offer;
      me.here = true;
      const std::uint64_t meeting = meeting_;
      if (++here_ == world()) {
        complete();
      } else {
        while (meeting_ == meeting && !failed_) {
          if (std::any_of(members_.begin(), members_.end(), [](const Member& m) { return m.gone && !m.here; })) {
            set_failed(Errc::peer_lost,
                       "lost " + list([](const Member& m) { return m.gone && !m.here; }) + ": its communicator was destroyed");
          } else if (changed_.wait_until(lock, deadline) == std::cv_status::timeout && meeting_ == meeting && !failed_) {
            set_failed(Errc::timeout, "timed out: rank " + std::to_string(rank) + " waited " + std::to_string(timeout.count()) + " ms in " +
                                          call + " for " + list([](const Member& m) { return !m.here; }));
          }
        }
      }
      if (meeting_ != meeting) return;  // complete, whatever happened since
    }
    changed_.wait(lock, [&] { return readers_ == 0; });  // bounded: readers only copy
    fail(code_, "loopback rank " + std::to_string(rank) + " of " + std::to_string(world()) + ": " + call + ": " + reason_);
  }

  void abort(int rank, const std::string& reason) noexcept {
    std::lock_guard lock(mutex_);
    if (failed_) return;
    try {
      set_failed(Errc::peer_lost, "rank " + std::to_string(rank) + " aborted: " + reason);
    } catch (...) {  // no memory for the text: the failure itself must not be lost
      failed_ = true;
      code_ = Errc::peer_lost;
      changed_.notify_all();
    }
  }

  void leave(int rank) noexcept {
    std::lock_guard lock(mutex_);
    members_[std::size_t(rank)].gone = true;
    changed_.notify_all();
  }

  Seat take_seat(int rank) {
    std::lock_guard lock(mutex_);
    return std::exchange(members_[std::size_t(rank)].seat, Seat{});
  }

 private:
  struct Member {
    Op op = Op::barrier;
    Offer offer;
    Seat seat;
    bool here = false, gone = false, reading = false;
  };

  template <class Which>
  std::string list(Which which) const {
    std::string text;
    int found = 0;
    for (std::size_t r = 0; r < members_.size(); ++r) {
      if (which(members_[r])) text += (found++ ? ", " : "") + std::to_string(r);
    }
    return (found == 1 ? "rank " : "ranks ") + text;
  }

  void set_failed(Errc code, std::string reason) {
    reason_ = std::move(reason);
    code_ = code;
    failed_ = true;
    changed_.notify_all();
  }

  // By the last rank to arrive, under the lock.
  void complete() {
    const std::string mismatch = find_mismatch();
    if (!mismatch.empty()) return set_failed(Errc::transport, "the ranks' calls do not fit together: " + mismatch);
    const Op op = members_[0].op;
    if (op == Op::split) assign_seats();
    for (Member& m : members_) {
      m.here = false;
      m.reading = opens_spans(op);
    }
    here_ = 0;
    readers_ = opens_spans(op) ? world() : 0;
    ++meeting_;
    changed_.notify_all();
  }

  std::string find_mismatch() const {
    const auto says = [&](std::size_t r) { return "rank " + std::to_string(r) + " calls " + describe(members_[r].offer); };
    const Offer& first = members_[0].offer;
    for (std::size_t r = 1; r < members_.size(); ++r) {
      const Offer& other = members_[r].offer;
      if (members_[r].op != members_[0].op || other.op != first.op || other.bytes != first.bytes || other.dtype != first.dtype ||
          other.root != first.root)
        return says(0) + ", " + says(r);
    }
    if (members_[0].op != Op::all_to_all) return {};
    for (std::size_t from = 0; from < members_.size(); ++from) {
      for (std::size_t to = 0; to < members_.size(); ++to) {
        const std::size_t sent = members_[from].offer.send_bytes[to], expected = members_[to].offer.recv_bytes[from];
        if (sent != expected) {
          return "all_to_all: rank " + std::to_string(from) + " sends " + std::to_string(sent) + " bytes to rank " + std::to_string(to) +
                 ", which expects " + std::to_string(expected);
        }
      }
    }
    return {};
  }

  void assign_seats() {
    std::map<int, std::vector<std::pair<int, int>>> colours;  // colour to (key, rank)
    for (int r = 0; r < world(); ++r) colours[offer(r).colour].emplace_back(offer(r).key, r);
    for (auto& [colour, ranks] : colours) {
      std::sort(ranks.begin(), ranks.end());
      const auto group = std::make_shared<Group>(int(ranks.size()));
      for (std::size_t i = 0; i < ranks.size(); ++i) members_[std::size_t(ranks[i].second)].seat = {group, int(i)};
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Member> members_;
  std::uint64_t meeting_ = 0;
  int here_ = 0, readers_ = 0;
  bool failed_ = false;
  Errc code_ = Errc::peer_lost;
  std::string reason_ = "aborted";
};

class Loopback final : public Communicator {
 public:
  Loopback(std::shared_ptr<Group> group, int rank) : group_(std::move(group)), rank_(rank) {}
  ~Loopback() override { group_->leave(rank_); }

  int rank() const noexcept override { return rank_; }
  int size() const noexcept override { return group_->world(); }
  const char* transport() const noexcept override { return "loopback"; }

  std::unique_ptr<Communicator> split(int colour, int key) override {
    THINWIRE_EXPECTS(colour >= 0, "split: colour " + std::to_string(colour) + " is negative");
    Call(*this, "split").meet({.op = Op::split, .colour = colour, .key = key});
    Group::Seat seat = group_->take_seat(rank_);
    auto part = std::make_unique<Loopback>(std::move(seat.group), seat.rank);
    part->set_timeout(timeout());
    return part;
  }

  void abort(const std::string& reason) noexcept override { group_->abort(rank_, reason); }

 private:
  // One collective: its meetings share one deadline.
  class Call {
   public:
    Call(Loopback& owner, const char* name) : owner_(owner), name_(name) {
      constexpr std::chrono::milliseconds kLongest = std::chrono::hours(24 * 365);  // now() + milliseconds::max() would overflow
      deadline_ = Clock::now() + std::min(owner.timeout(), kLongest);
    }
    void meet(const Offer& offer) { owner_.group_->meet(owner_.rank_, offer.op, &offer, name_, deadline_, owner_.timeout()); }
    void meet_again(Op op) { owner_.group_->meet(owner_.rank_, op, nullptr, name_, deadline_, owner_.timeout()); }

   private:
    Loopback& owner_;
    const char* name_;
    Clock::time_point deadline_;
  };

  static void copy(std::byte* to, const std::byte* from, std::size_t bytes) {
    if (bytes != 0 && to != from) std::memcpy(to, from, bytes);
  }

  void do_all_gather(ConstBytes send, Bytes recv, Stream) override {
    Call call(*this, "all_gather");
    call.meet({.op = Op::all_gather, .send = send.data, .bytes = send.size});
    for (int r = 0; r < size(); ++r) copy(recv.data + std::size_t(r) * send.size, group_->offer(r).send, send.size);
    call.meet_again(Op::finish);
  }

  void do_all_to_all(ConstBytes send, std::span<const std::size_t> send_bytes, Bytes recv, std::span<const std::size_t> recv_bytes,
                     Stream) override {
    Call call(*this, "all_to_all");
    call.meet({.op = Op::all_to_all, .send = send.data, .send_bytes = send_bytes, .recv_bytes = recv_bytes});
    std::byte* to = recv.data;
    for (int r = 0; r < size(); ++r) {
      const Offer& peer = group_->offer(r);
      std::size_t first = 0;
      for (int before = 0; before < rank_; ++before) first += peer.send_bytes[std::size_t(before)];
      const std::size_t bytes = recv_bytes[std::size_t(r)];
      if (bytes == 0) continue;
      copy(to, peer.send + first, bytes);
      to += bytes;
    }
    call.meet_again(Op::finish);
  }

  // Rank r sums part r over all ranks in rank order and leaves it in its own span, from where the others take it.
  void do_all_reduce(Bytes data, Stream) override {
    Call call(*this, "all_reduce");
    const int world = size();
    call.meet({.op = Op::all_reduce, .send = data.data, .bytes = data.size, .dtype = data.dtype});
    alignas(64) std::byte sum[16384];
    const std::size_t end = detail::part_begin(data.size, data.dtype, rank_ + 1, world);
    for (std::size_t at = detail::part_begin(data.size, data.dtype, rank_, world); at < end;) {
      const std::size_t bytes = std::min(sizeof sum, end - at);
      copy(sum, group_->offer(0).send + at, bytes);
      for (int r = 1; r < world; ++r) detail::add_elements(sum, group_->offer(r).send + at, bytes, data.dtype);
      copy(data.data + at, sum, bytes);
      at += bytes;
    }
    call.meet_again(Op::summed);
    for (int r = 0; r < world; ++r) {
      if (r == rank_) continue;
      const std::size_t first = detail::part_begin(data.size, data.dtype, r, world),
                        last = detail::part_begin(data.size, data.dtype, r + 1, world);
      if (first != last) copy(data.data + first, group_->offer(r).send + first, last - first);
    }
    call.meet_again(Op::finish);
  }

  void do_broadcast(Bytes data, int root, Stream) override {
    Call call(*this, "broadcast");
    call.meet({.op = Op::broadcast, .send = data.data, .bytes = data.size, .root = root});
    if (rank_ != root) copy(data.data, group_->offer(root).send, data.size);
    call.meet_again(Op::finish);
  }

  void do_barrier() override { Call(*this, "barrier").meet({.op = Op::barrier}); }

  std::shared_ptr<Group> group_;
  int rank_;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> make_loopback(int world) {
  THINWIRE_EXPECTS(world >= 1, "make_loopback: world " + std::to_string(world) + " is less than 1");
  const auto group = std::make_shared<Group>(world);
  std::vector<std::unique_ptr<Communicator>> ranks;
  for (int r = 0; r < world; ++r) ranks.push_back(std::make_unique<Loopback>(group, r));
  return ranks;
}

}  // namespace thinwire
