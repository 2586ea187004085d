#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "collectives/nccl/nccl.hpp"
#include "compressors/core/device.hpp"
#include "compressors/core/error.hpp"
#include "torch_ext/src/device_side.hpp"

namespace thinwire::torch_ext {

std::string device_refusal() { return {}; }

std::vector<std::uint8_t> make_device_group_id() {
  const ncclUniqueId id = nccl_unique_id();
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(&id);
  return {bytes, bytes + sizeof id};
}

std::shared_ptr<Communicator> make_device_group(std::span<const std::uint8_t> bytes, int rank, int size, int device,
                                                std::chrono::milliseconds timeout) {
  ncclUniqueId id;
  if (bytes.size() != sizeof id)
    fail(Errc::transport, "rank 0's NCCL id has " + std::to_string(bytes.size()) + " bytes, expected " + std::to_string(sizeof id));
  std::memcpy(&id, bytes.data(), sizeof id);
  return make_nccl(id, size, rank, device, timeout);
}

std::shared_ptr<Communicator> make_device_group(c10d::Store& store, int attempt, int rank, int size, int device,
                                                std::chrono::milliseconds timeout) {
  const std::string key = "nccl_unique_id/" + std::to_string(attempt);
  std::vector<std::uint8_t> id;
  try {
    if (rank == 0) {
      id = make_device_group_id();
      store.set(key, id);
    } else {
      store.wait({key}, timeout);
      id = store.get(key);
    }
  } catch (const Error&) { throw; } catch (const std::exception& error) {
    const std::string text = error.what();
    fail(Errc::timeout, "rank " + std::to_string(rank) + " got no NCCL id from rank 0: " + text.substr(0, text.find('\n')));
  }
  return make_device_group(id, rank, size, device, timeout);
}

struct SideStream::Impl {
  explicit Impl(int device) : stream(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, c10::DeviceIndex(device))) {}
  c10::cuda::CUDAStream stream;
  at::cuda::CUDAEvent ready, done;
};

SideStream::SideStream(int device) : impl_(std::make_unique<Impl>(device)) {
  // Torch keeps what it has freed, and thinwire allocates beside it.
  set_memory_reclaim([] { c10::cuda::CUDACachingAllocator::emptyCache(); });
}
SideStream::~SideStream() = default;

void SideStream::run(const at::Tensor& buffer, const std::function<void(Stream)>& body) {
  const c10::cuda::CUDAStream side = impl_->stream;
  impl_->ready.record(c10::cuda::getCurrentCUDAStream(side.device_index()));
  impl_->ready.block(side);
  c10::cuda::CUDACachingAllocator::recordStream(buffer.storage().data_ptr(), side);
  const c10::cuda::CUDAStreamGuard guard(side);
  body(Stream::cuda(side.stream(), side.device_index()));
}

void SideStream::join() {
  impl_->done.record(impl_->stream);
  impl_->done.block(c10::cuda::getCurrentCUDAStream(impl_->stream.device_index()));
}

}  // namespace thinwire::torch_ext
