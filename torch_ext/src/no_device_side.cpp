// The twin of device_side_cuda.cpp in a build without CUDA, NCCL or torch's CUDA.

#include "compressors/core/error.hpp"
#include "torch_ext/src/device_side.hpp"

namespace thinwire::torch_ext {

std::string device_refusal() {
  return "this build of thinwire reduces gradients on the CPU: it was made without CUDA, NCCL or torch's CUDA";
}

std::shared_ptr<Communicator> make_device_group(c10d::Store&, int, int, int, int, std::chrono::milliseconds) {
  fail(Errc::unsupported, device_refusal());
}

std::vector<std::uint8_t> make_device_group_id() { fail(Errc::unsupported, device_refusal()); }

std::shared_ptr<Communicator> make_device_group(std::span<const std::uint8_t>, int, int, int, std::chrono::milliseconds) {
  fail(Errc::unsupported, device_refusal());
}

struct SideStream::Impl {};
SideStream::SideStream(int) { fail(Errc::unsupported, device_refusal()); }
SideStream::~SideStream() = default;
void SideStream::run(const at::Tensor&, const std::function<void(Stream)>&) {}
void SideStream::join() {}

}  // namespace thinwire::torch_ext
