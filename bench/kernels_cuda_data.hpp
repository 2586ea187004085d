#pragma once
// What the kernels of a GPU work on.

#include <cstddef>

#include "compressors/core/device.hpp"
#include "compressors/core/recursion.hpp"

namespace thinwire::bench {

inline constexpr int kDevice = 0;

/// The arrays of one step in device memory, as bench::Arrays has them on the host: a gradient through a window that slides.
class DeviceArrays {
 public:
  DeviceArrays(std::size_t numel, Stream stream);
  ConstBytes grad(std::size_t repetition, DType dtype, std::size_t numel) const;
  /// As Arrays::settle.
  void settle(const Recursion& recursion, double density);
  std::size_t numel() const { return numel_; }
  float* momentum() const { return reinterpret_cast<float*>(momentum_.data()); }
  float* residual() const { return reinterpret_cast<float*>(residual_.data()); }
  std::byte* from() const { return from_.data(); }
  std::byte* out() const { return out_.data(); }
  Stream stream() const { return stream_; }

 private:
  std::size_t numel_;
  Stream stream_;
  DeviceBuffer grad_, momentum_, residual_, from_, out_, half_;
};

}  // namespace thinwire::bench
