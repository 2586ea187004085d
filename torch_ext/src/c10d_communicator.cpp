#include "torch_ext/src/c10d_communicator.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "compressors/core/error.hpp"

namespace thinwire::torch_ext {
namespace {

at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::fp32:
      return at::kFloat;
    case DType::bf16:
      return at::kBFloat16;
    case DType::fp16:
      return at::kHalf;
    case DType::u8:
      return at::kByte;
  }
  fail(Errc::internal, "a dtype that torch has no name for");
}

at::Tensor view(const std::byte* data, std::size_t count, DType dtype = DType::u8) {
  return at::from_blob(const_cast<std::byte*>(data), {std::int64_t(count)}, at::TensorOptions().dtype(scalar_type(dtype)));
}

/// A gather in which a rank receives at most this much goes straight to every rank: one hop, where Gloo's ring makes world − 1, each of
/// which waits for a thread of every peer to be given a core. From there on the ring is as fast or faster: its ranks do not all send to one
/// at a time. Measured: 4 hosts on 100 Mbit and 1 Gbit, 8 on 1 Gbit; between 64 KiB and here the ring wins on idle hosts by up to a tenth,
/// and loses on busy ones.
constexpr std::size_t kDirectBytes = 512 * 1024;

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

/// Gloo knows one exception type for all that goes wrong on a connection; its text is the only source.
Errc code_of(const std::string& text) {
  const auto says = [&](const char* words) { return text.find(words) != std::string::npos; };
  if (says("Timed out") || says("timed out") || says("Timeout") || says("timeout")) return Errc::timeout;
  if (says("Connection closed") || says("Connection reset") || says("Broken pipe") || says("Connection refused")) return Errc::peer_lost;
  return Errc::transport;
}

}  // namespace

C10dCommunicator::C10dCommunicator(c10::intrusive_ptr<c10d::Store> store, int rank, int size, GroupFactory factory,
                                   std::chrono::milliseconds timeout)
    : store_(std::move(store)), rank_(rank), size_(size), factory_(std::move(factory)) {
  set_timeout(timeout);
}

C10dCommunicator::~C10dCommunicator() = default;

c10::intrusive_ptr<c10d::Backend> C10dCommunicator::connect() {
  {
    const std::lock_guard lock(mutex_);
    if (aborted_) fail(Errc::peer_lost, "the group was given up: " + reason_);
    if (group_) return group_;
  }
  // Only the thread that makes the calls comes here, so nobody else builds the group meanwhile.
  GlooSockets sockets;
  sockets.begin();
  auto group = factory_(store_, rank_, size_, timeout());
  // Every rank tells the port it listens on, so that each knows which of its sockets lead to the group.
  store_->set("port/" + std::to_string(rank_), std::to_string(sockets.listener()));
  std::vector<int> ports;
  for (int r = 0; r < size_; ++r) {
    const std::string key = "port/" + std::to_string(r);
    store_->wait({key}, timeout());
    ports.push_back(std::stoi(store_->get_to_str(key)));
  }
  sockets.end(ports);
  const std::lock_guard lock(mutex_);
  if (aborted_) fail(Errc::peer_lost, "the group was given up: " + reason_);
  sockets_ = std::move(sockets);
  group_ = std::move(group);
  return group_;
}

template <class Start>
void C10dCommunicator::run(const char* what, Start&& start) {
  const at::NoGradGuard no_grad;
  try {
    const auto group = connect();
    if (const auto work = start(*group)) work->wait();
  } catch (const Error&) { throw; } catch (const std::exception& error) {
    const std::lock_guard lock(mutex_);
    const std::string text = first_line(error.what());
    if (aborted_) fail(Errc::peer_lost, std::string(what) + " over gloo: the group was given up: " + reason_);
    fail(code_of(text), std::string(what) + " over gloo on rank " + std::to_string(rank_) + " of " + std::to_string(size_) + ": " + text);
  }
}

std::string C10dCommunicator::missing(const std::string& place) const {
  std::string who;
  try {
    for (int r = 0; r < size_; ++r)
      if (!store_->check({place + std::to_string(r)})) who += (who.empty() ? "" : ", ") + std::to_string(r);
  } catch (const std::exception&) { return {}; }  // the store went with the rank that kept it
  return who.empty() ? who : "; of these did not come: rank " + who;
}

std::unique_ptr<Communicator> C10dCommunicator::split(int colour, int key) {
  THINWIRE_EXPECTS(colour >= 0, "split: colour " + std::to_string(colour) + " is negative");
  {
    const std::lock_guard lock(mutex_);
    if (aborted_) fail(Errc::peer_lost, "split: the group was given up: " + reason_);
  }
  const std::string place = "split/" + std::to_string(splits_++) + "/";
  std::vector<std::pair<int, int>> members;  // (key, rank) of those who chose this colour
  try {
    store_->set(place + std::to_string(rank_), std::to_string(colour) + " " + std::to_string(key));
    for (int r = 0; r < size_; ++r) {
      const std::string name = place + std::to_string(r);
      store_->wait({name}, timeout());
      std::istringstream words(store_->get_to_str(name));
      int their_colour = 0, their_key = 0;
      words >> their_colour >> their_key;
      if (their_colour == colour) members.emplace_back(their_key, r);
    }
    std::sort(members.begin(), members.end());
    const auto mine = std::find(members.begin(), members.end(), std::pair(key, rank_));
    auto store = c10::make_intrusive<c10d::PrefixStore>(place + "group/" + std::to_string(colour), store_);
    auto made = std::make_unique<C10dCommunicator>(std::move(store), int(mine - members.begin()), int(members.size()), factory_, timeout());
    made->connect();
    last_split_ = made.get();
    return made;
  } catch (const Error&) { throw; } catch (const std::exception& error) {
    const std::string text = first_line(error.what());
    fail(code_of(text), "making a group of its own for " + std::to_string(size_) + " ranks, on rank " + std::to_string(rank_) + ": " +
                            text + missing(place));
  }
}

void C10dCommunicator::abort(const std::string& reason) noexcept {
  c10::intrusive_ptr<c10d::Backend> group;
  {
    const std::lock_guard lock(mutex_);
    if (aborted_) return;
    aborted_ = true;
    reason_ = reason;
    sockets_.shut();
    group = std::move(group_);
  }
  // Dropped outside the lock: its destructor waits for what is in flight, and the thread that waits for that may want the lock for its
  // message.
}

void C10dCommunicator::all_reduce_tensor(at::Tensor& tensor) {
  if (tensor.is_sparse()) {  // Gloo gathers the indices and values of all ranks
    tensor = tensor.coalesce();
    count(tensor._indices().nbytes() + tensor._values().nbytes(), size_ - 1);
  } else {
    count(tensor.nbytes(), 2.0 * (size_ - 1) / size_);
  }
  run("all-reduce", [&](c10d::Backend& group) {
    std::vector<at::Tensor> tensors{tensor};
    c10d::AllreduceOptions options;
    options.timeout = timeout();
    auto work = group.allreduce(tensors, options);
    work->wait();
    if (tensor.is_sparse()) tensor = work->result().at(0);
    return work;
  });
}

void C10dCommunicator::do_all_gather(ConstBytes send, Bytes recv, Stream) {
  if (size_ > 1 && !send.empty() && send.size <= kDirectBytes / std::size_t(size_ - 1)) return gather_directly(send, recv);
  run("all-gather", [&](c10d::Backend& group) {
    auto out = view(recv.data, recv.size), in = view(send.data, send.size);
    c10d::AllgatherOptions options;
    options.timeout = timeout();
    return group._allgather_base(out, in, options);
  });
}

void C10dCommunicator::gather_directly(ConstBytes send, Bytes recv) {
  const auto slot = [&](int r) { return recv.sub(std::size_t(r) * send.size, send.size); };
  if (slot(rank_).data != send.data) std::memcpy(slot(rank_).data, send.data, send.size);
  run("all-gather", [&](c10d::Backend& group) {
    struct Message {
      int peer;
      const char* verb;
      c10::intrusive_ptr<c10d::Work> work;
    };
    std::vector<Message> messages;
    for (int step = 1; step < size_; ++step) {
      const int from = (rank_ + size_ - step) % size_;
      std::vector<at::Tensor> in{view(slot(from).data, send.size)};
      messages.push_back({from, "from", group.recv(in, from, 0)});
    }
    for (int step = 1; step < size_; ++step) {
      const int to = (rank_ + step) % size_;
      std::vector<at::Tensor> out{view(send.data, send.size)};
      messages.push_back({to, "to", group.send(out, to, 0)});
    }
    const auto deadline = std::chrono::steady_clock::now() + timeout();
    for (const Message& message : messages) {
      const auto rest = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
      try {
        message.work->wait(std::max(rest, std::chrono::milliseconds(1)));
      } catch (const std::exception& error) {
        throw std::runtime_error(std::string(message.verb) + " rank " + std::to_string(message.peer) + ": " + first_line(error.what()));
      }
    }
    return c10::intrusive_ptr<c10d::Work>();  // a message can be waited for once
  });
}

void C10dCommunicator::do_all_to_all(ConstBytes send, std::span<const std::size_t> send_bytes, Bytes recv,
                                     std::span<const std::size_t> recv_bytes, Stream) {
  run("all-to-all", [&](c10d::Backend& group) {
    auto out = view(recv.data, recv.size), in = view(send.data, send.size);
    std::vector<std::int64_t> out_split(recv_bytes.begin(), recv_bytes.end()), in_split(send_bytes.begin(), send_bytes.end());
    c10d::AllToAllOptions options;
    options.timeout = timeout();
    return group.alltoall_base(out, in, out_split, in_split, options);
  });
}

void C10dCommunicator::do_all_reduce(Bytes data, Stream) {
  run("all-reduce", [&](c10d::Backend& group) {
    std::vector<at::Tensor> tensors{view(data.data, data.count(), data.dtype)};
    c10d::AllreduceOptions options;
    options.timeout = timeout();
    return group.allreduce(tensors, options);
  });
}

void C10dCommunicator::do_broadcast(Bytes data, int root, Stream) {
  run("broadcast", [&](c10d::Backend& group) {
    std::vector<at::Tensor> tensors{view(data.data, data.size)};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    options.rootTensor = 0;
    options.timeout = timeout();
    return group.broadcast(tensors, options);
  });
}

void C10dCommunicator::do_barrier() {
  run("barrier", [&](c10d::Backend& group) {
    c10d::BarrierOptions options;
    options.timeout = timeout();
    return group.barrier(options);
  });
}

}  // namespace thinwire::torch_ext
