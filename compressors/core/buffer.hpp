#pragma once
// Owners of host memory: scratch that only grows, and the arena in which a reducer's state lives.

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "compressors/core/device.hpp"
#include "compressors/core/span.hpp"
#include "compressors/core/state_array.hpp"

namespace thinwire {

/// 4096-aligned bytes, huge pages where they pay. Contents are lost on growth.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes) { reserve(bytes); }
  /// Grows to at least `bytes`; never shrinks. @returns whether memory moved.
  bool reserve(std::size_t bytes);
  std::byte* data() const noexcept { return data_.get(); }
  std::size_t size() const noexcept { return size_; }
  Bytes bytes(DType dtype = DType::u8) const noexcept { return {data(), size_, dtype, Place::host, 0}; }

 private:
  struct Free {
    void operator()(std::byte* p) const noexcept;
  };
  std::unique_ptr<std::byte[], Free> data_;
  std::size_t size_ = 0;
};

/// Scratch of work that comes in steps. What one large step needed (DDP's first bucket holds the whole model) is given back when the steps
/// after it need much less.
class StepScratch {
 public:
  /// The first `bytes` of the scratch, contents undefined.
  Bytes take(std::size_t bytes) {
    if (bytes > used_) used_ = bytes;
    buffer_.reserve(bytes);
    return {buffer_.data(), bytes, DType::u8, Place::host, 0};
  }
  std::byte* data() const noexcept { return buffer_.data(); }
  /// A step that used none says nothing about the next.
  void end_step() {
    constexpr std::size_t kWorthIt = std::size_t(1) << 20;
    if (used_ != 0 && buffer_.size() > 2 * used_ + kWorthIt) buffer_ = Buffer(used_);
    used_ = 0;
  }

 private:
  Buffer buffer_;
  std::size_t used_ = 0;
};

/// Float arrays of one reducer, zeroed: on a GPU in one allocation, on the host on one huge-page mapping. Array j starts at its 2
/// MiB-rounded place + j × (1 MiB + 1344 B): streams whose distance is a power of two run at half speed (measured on Zen 3;
/// docs/tuning.md), and three mallocs of 128 MiB lie exactly so.
class Arena {
 public:
  Arena() = default;
  explicit Arena(std::span<const std::size_t> counts);
  /// The same in device memory. @throws Error{device} naming the bytes that the device could not give.
  Arena(std::span<const std::size_t> counts, int device);
  ~Arena();
  Arena(Arena&&) noexcept;
  Arena& operator=(Arena&&) noexcept;

  float* array(std::size_t j) const noexcept { return arrays_[j]; }
  std::size_t count(std::size_t j) const noexcept { return counts_[j]; }
  std::size_t arrays() const noexcept { return arrays_.size(); }

  // Between steps, when nothing else uses the arrays. They return when it is done.
  void read(StateArray from, std::span<float> to) const;
  void write(std::span<const float> from, StateArray to);
  void clear();

 private:
  void* mapping_ = nullptr;
  std::size_t mapped_ = 0;
  DeviceBuffer device_;
  std::unique_ptr<DeviceStream> stream_;  ///< null: on the host
  std::vector<float*> arrays_;
  std::vector<std::size_t> counts_;
};

}  // namespace thinwire
