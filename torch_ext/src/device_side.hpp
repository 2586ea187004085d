#pragma once
// The hook's side of a GPU: a stream beside autograd's, and a group of ranks over NCCL. In a build without CUDA, NCCL or torch's CUDA every
// call throws Error{unsupported}.

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "collectives/communicator.hpp"
#include "compressors/core/stream.hpp"

namespace thinwire::torch_ext {

/// Why gradients on a GPU cannot be reduced here; empty: they can.
std::string device_refusal();

/// A group of our own over NCCL; its ranks meet at `store`, whose prefix was never used before, and `attempt` is a number that no earlier
/// call had there. Collective, within `timeout`.
std::shared_ptr<Communicator> make_device_group(c10d::Store& store, int attempt, int rank, int size, int device,
                                                std::chrono::milliseconds timeout);

/// A stream of one GPU on which buckets are reduced while the backward pass goes on.
class SideStream {
 public:
  explicit SideStream(int device);
  ~SideStream();
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  /// Runs `body` with this stream as torch's current one, after it was made to wait for what the caller's has enqueued; the allocator
  /// learns that `buffer` is used here. Blocks nobody.
  void run(const at::Tensor& buffer, const std::function<void(Stream)>& body);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace thinwire::torch_ext
