#pragma once
// The side of a GPU of the hook and of the C++ trainer: a stream beside autograd's, and a group of ranks over NCCL. In a build without
// CUDA, NCCL or torch's CUDA every call throws Error{unsupported}.

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "collectives/communicator.hpp"
#include "compressors/core/stream.hpp"

namespace thinwire::torch_ext {

/// Why gradients on a GPU cannot be reduced here; empty: they can.
std::string device_refusal();

/// A group of our own over NCCL; its ranks meet at `store`, whose prefix was never used before, and `attempt` is a number that no earlier
/// call had there. Collective, within `timeout`.
std::shared_ptr<Communicator> make_device_group(c10d::Store& store, int attempt, int rank, int size, int device,
                                                std::chrono::milliseconds timeout);

/// The same where ranks can tell each other what rank 0 makes: the bytes of an ncclUniqueId.
std::vector<std::uint8_t> make_device_group_id();
std::shared_ptr<Communicator> make_device_group(std::span<const std::uint8_t> id, int rank, int size, int device,
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
  /// The caller's current stream waits for all that was enqueued here. Blocks nobody.
  void join();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace thinwire::torch_ext
