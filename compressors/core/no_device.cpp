// The twin of device_cuda.cpp in a build without CUDA.

#include "compressors/core/device.hpp"
#include "compressors/core/error.hpp"

namespace thinwire {
namespace {

[[noreturn]] void refuse() { fail(Errc::unsupported, "this build of thinwire has no CUDA"); }

}  // namespace

int device_count() noexcept { return 0; }
std::string describe_device(int) { refuse(); }
std::size_t device_free_memory(int) { refuse(); }
void set_memory_reclaim(void (*)()) noexcept {}
bool reclaim_device_memory() { return false; }
int device_of(const void*) { refuse(); }

void DeviceBuffer::Free::operator()(std::byte*) const noexcept {}
bool DeviceBuffer::reserve(std::size_t, int) { refuse(); }
void MappedBuffer::Free::operator()(std::byte*) const noexcept {}
MappedBuffer::MappedBuffer(std::size_t) { refuse(); }

void device_copy(void*, const void*, std::size_t, Stream) { refuse(); }
void device_clear(Bytes, Stream) { refuse(); }
void device_wait(Stream) { refuse(); }
bool device_idle(Stream) { refuse(); }

OnDevice::OnDevice(int device) : device_(device) { refuse(); }
OnDevice::~OnDevice() = default;

DeviceStream::DeviceStream(int device) : device_(device) { refuse(); }
DeviceStream::~DeviceStream() = default;

}  // namespace thinwire
