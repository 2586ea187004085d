// Device memory by the CUDA runtime.

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <atomic>
#include <cstring>

#include "compressors/core/device.hpp"
#include "compressors/core/error.hpp"

namespace thinwire {
namespace {

void check(cudaError_t error, const std::string& call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // told here: it is no error of somebody's next call
  fail(Errc::device, call + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

std::atomic<void (*)()> memory_reclaim = nullptr;

/// Whether this process has a context on the device. The driver alone knows without making one; a process that got this far has it loaded.
bool has_context(int device) noexcept {
  using State = int (*)(int device, unsigned* flags, int* active);
  static const State state = []() -> State {
    void* const driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    return driver != nullptr ? reinterpret_cast<State>(dlsym(driver, "cuDevicePrimaryCtxGetState")) : nullptr;
  }();
  unsigned flags = 0;
  int active = 1;
  return state == nullptr || state(device, &flags, &active) != 0 || active != 0;
}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

int device_count() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // no driver is no error of a later call
  return 0;
}

std::string describe_device(int device) {
  cudaDeviceProp properties;
  int driver = 0, runtime = 0;
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties(" + std::to_string(device) + ")");
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  return std::string(properties.name) + ", compute capability " + std::to_string(properties.major) + "." +
         std::to_string(properties.minor) + ", driver " + version(driver) + ", runtime " + version(runtime);
}

std::size_t device_free_memory(int device) {
  const OnDevice on(device);
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo on GPU " + std::to_string(device));
  return free;
}

void set_memory_reclaim(void (*reclaim)()) noexcept { memory_reclaim = reclaim; }

bool reclaim_device_memory() {
  void (*const reclaim)() = memory_reclaim;
  if (reclaim != nullptr) reclaim();
  return reclaim != nullptr;
}

int device_of(const void* p) {
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, p), "cudaPointerGetAttributes");
  return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged ? attributes.device : -1;
}

void DeviceBuffer::Free::operator()(std::byte* p) const noexcept {
  int before = 0;
  const bool known = cudaGetDevice(&before) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
  cudaFree(p);
  if (known && before != device && has_context(before)) cudaSetDevice(before);
}

bool DeviceBuffer::reserve(std::size_t bytes, int device) {
  if (bytes <= size_ && device == device_) return false;
  const OnDevice on(device);
  data_.reset();
  size_ = 0;
  void* p = nullptr;
  cudaError_t error = cudaMalloc(&p, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // or what frees memory would meet it
    if (reclaim_device_memory()) error = cudaMalloc(&p, bytes);
  }
  check(error, "no memory for " + std::to_string(bytes) + " bytes on GPU " + std::to_string(device));
  data_ = std::unique_ptr<std::byte, Free>(static_cast<std::byte*>(p), Free{device});
  size_ = bytes;
  device_ = device;
  return true;
}

void MappedBuffer::Free::operator()(std::byte* p) const noexcept { cudaFreeHost(p); }

MappedBuffer::MappedBuffer(std::size_t bytes) {
  void* p = nullptr;
  check(cudaHostAlloc(&p, bytes, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc of " + std::to_string(bytes) + " bytes");
  std::memset(p, 0, bytes);
  data_.reset(static_cast<std::byte*>(p));
  size_ = bytes;
}

void device_copy(void* to, const void* from, std::size_t bytes, Stream stream) {
  if (bytes != 0)
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream.get()), "cudaMemcpyAsync of " + std::to_string(bytes) + " bytes");
}

void device_clear(Bytes bytes, Stream stream) {
  const OnDevice on(stream.device());
  if (bytes.size != 0)
    check(cudaMemsetAsync(bytes.data, 0, bytes.size, stream.get()), "cudaMemsetAsync of " + std::to_string(bytes.size) + " bytes");
}

void device_wait(Stream stream) { check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize"); }

bool device_idle(Stream stream) {
  const cudaError_t error = cudaStreamQuery(stream.get());
  if (error == cudaErrorNotReady) return false;
  check(error, "cudaStreamQuery");
  return true;
}

OnDevice::OnDevice(int device) : device_(device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (device != before_) check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
}
OnDevice::~OnDevice() {
  if (device_ != before_ && has_context(before_)) cudaSetDevice(before_);
}

DeviceStream::DeviceStream(int device) : device_(device) {
  const OnDevice on(device);
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
}
DeviceStream::~DeviceStream() { cudaStreamDestroy(stream_); }

}  // namespace thinwire
