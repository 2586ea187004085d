#pragma once
// Device memory and what moves it, seen from the host. In a build without CUDA every call throws Error{unsupported}, but for device_count,
// which is 0.

#include <cstddef>
#include <memory>
#include <string>

#include "compressors/core/plan.hpp"
#include "compressors/core/span.hpp"
#include "compressors/core/stream.hpp"

namespace thinwire {

/// GPUs that this process can use; 0 also where there is no driver.
int device_count() noexcept;
/// "NVIDIA H200, compute capability 9.0, driver 13.0, runtime 13.0".
std::string describe_device(int device);
/// Bytes that the device could give now.
std::size_t device_free_memory(int device);
/// What gives back device memory that nobody uses, as the caching allocator of a framework in this process can. Called once where an
/// allocation finds no room, before it fails. Null, as at first: there is none.
void set_memory_reclaim(void (*reclaim)()) noexcept;
/// Calls it. @returns whether there is one.
bool reclaim_device_memory();
/// The GPU in whose memory `p` lies, or -1: the host's.
int device_of(const void* p);

/// Bytes in device memory, 256-byte aligned. Growing loses the contents and synchronises with the device.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(std::size_t bytes, int device) { reserve(bytes, device); }
  /// @throws Error{device} naming the bytes that the device could not give.
  bool reserve(std::size_t bytes, int device);
  std::byte* data() const noexcept { return data_.get(); }
  std::size_t size() const noexcept { return size_; }
  Bytes bytes(DType dtype = DType::u8) const noexcept { return {data(), size_, dtype, Place::cuda, device_}; }

 private:
  struct Free {
    int device;
    void operator()(std::byte* p) const noexcept;
  };
  std::unique_ptr<std::byte, Free> data_{nullptr, Free{0}};
  std::size_t size_ = 0;
  int device_ = 0;
};

/// Page-locked host memory that the device reads and writes at the same address.
class MappedBuffer {
 public:
  MappedBuffer() = default;
  /// Zeroed. @throws Error{device}.
  explicit MappedBuffer(std::size_t bytes);
  std::byte* data() const noexcept { return data_.get(); }
  std::size_t size() const noexcept { return size_; }

 private:
  struct Free {
    void operator()(std::byte* p) const noexcept;
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_ = 0;
};

// Enqueued on the stream; a copy from or to pageable host memory may wait for it. @throws Error{device} naming the call.
void device_copy(void* to, const void* from, std::size_t bytes, Stream stream);
void device_clear(Bytes bytes, Stream stream);
/// Waits until the stream is done. @throws Error{device} with what its kernels met.
void device_wait(Stream stream);
/// Whether the stream is done. @throws the same.
bool device_idle(Stream stream);

/// The device is the calling thread's current one for as long as this lives: kernels are launched on streams of the current device only.
/// Afterwards the one before is, where this process has a context on it; where it has none, making it current would make one, and a rank
/// would hold some hundred MB of a GPU that it never uses.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int device_, before_ = 0;
};

/// A stream of its own, ordered against no other.
class DeviceStream {
 public:
  explicit DeviceStream(int device);
  ~DeviceStream();
  DeviceStream(const DeviceStream&) = delete;
  DeviceStream& operator=(const DeviceStream&) = delete;
  Stream get() const noexcept { return Stream::cuda(stream_, device_); }

 private:
  CUstream_st* stream_ = nullptr;
  int device_;
};

}  // namespace thinwire
