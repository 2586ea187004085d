#pragma once
// The Communicator over torch.distributed: Gloo groups, ranks as processes.

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "collectives/communicator.hpp"
#include "torch_ext/src/gloo_sockets.hpp"

namespace thinwire::torch_ext {

/// Builds a Gloo backend of `size` ranks that meet at `store`. torch ships no Gloo headers, so its Python face has to do it; called where
/// groups are made, never by the thread that reduces.
using GroupFactory = std::function<c10::intrusive_ptr<c10d::Backend>(c10::intrusive_ptr<c10d::Store> store, int rank, int size,
                                                                     std::chrono::milliseconds timeout)>;

/// One rank of a Gloo group that nobody else knows: DDP's own collectives and the user's never meet ours. Ranks find each other at `store`,
/// which must be a PrefixStore whose prefix was never used before.
///
/// The group is made by the first collective call, or by `split` for the communicator it returns. Gloo sums in the order of its own ring:
/// equal bits on all ranks. abort() shuts the group's sockets, so calls in flight here and on the peers fail at once; the deadline of every
/// single operation stands behind that.
class C10dCommunicator final : public Communicator {
 public:
  C10dCommunicator(c10::intrusive_ptr<c10d::Store> store, int rank, int size, GroupFactory factory, std::chrono::milliseconds timeout);
  ~C10dCommunicator() override;

  int rank() const noexcept override { return rank_; }
  int size() const noexcept override { return size_; }
  const char* transport() const noexcept override { return "gloo"; }
  std::unique_ptr<Communicator> split(int colour, int key) override;
  void abort(const std::string& reason) noexcept override;

  /// The sum over ranks of a tensor that no span describes (sparse rows, fp64); the result replaces `tensor`. Call it as any other
  /// collective.
  void all_reduce_tensor(at::Tensor& tensor);
  /// The communicator that the last split made, null before; valid while its owner lives.
  C10dCommunicator* last_split() const noexcept { return last_split_; }

 private:
  void do_all_gather(ConstBytes send, Bytes recv, Stream stream) override;
  void do_all_to_all(ConstBytes send, std::span<const std::size_t> send_bytes, Bytes recv, std::span<const std::size_t> recv_bytes,
                     Stream stream) override;
  void do_all_reduce(Bytes data, Stream stream) override;
  void do_broadcast(Bytes data, int root, Stream stream) override;
  void do_barrier() override;

  void gather_directly(ConstBytes send, Bytes recv);

  c10::intrusive_ptr<c10d::Backend> connect();
  /// In words, the ranks that have written nothing under `place` of the store.
  std::string missing(const std::string& place) const;
  template <class Start>
  void run(const char* what, Start&& start);

  const c10::intrusive_ptr<c10d::Store> store_;
  const int rank_, size_;
  const GroupFactory factory_;
  int splits_ = 0;
  C10dCommunicator* last_split_ = nullptr;

  std::mutex mutex_;  // guards what abort() may touch from another thread
  c10::intrusive_ptr<c10d::Backend> group_;
  GlooSockets sockets_;
  bool aborted_ = false;
  std::string reason_;
};

}  // namespace thinwire::torch_ext
