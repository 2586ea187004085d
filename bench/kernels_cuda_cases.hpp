#pragma once
// The kernels of a GPU by name, through the codec's public interface.

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "bench/kernels_cases.hpp"
#include "compressors/core/device.hpp"

namespace thinwire::bench {

inline constexpr int kDevice = 0;

/// The arrays of one step in device memory, as bench::Arrays has them on the host: a gradient through a window that slides.
class DeviceArrays {
 public:
  DeviceArrays(std::size_t numel, Stream stream);
  ConstBytes grad(std::size_t repetition, DType dtype, std::size_t numel) const;
  /// As Arrays::settle: momentum of many steps, a residual of which the share `density` crosses the threshold next.
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

/// What is measured: enqueues one run.
struct Case {
  std::string name;
  std::size_t numel = 0;
  std::function<void(std::size_t repetition)> run;
  std::function<void()> settle = [] {};       ///< before the first repetition
  std::function<double()> bytes_per_element;  ///< after the last one
  std::function<std::optional<double>()> density = [] { return std::nullopt; };
};

/// Measured in turn, repetition by repetition.
struct DeviceGroup {
  std::vector<Case> cases;
  std::string pair;  ///< what the last case's time is compared with the first's for; empty: nothing
};

/// All that fit arrays of this size. Cases allocate when they are settled: workspaces of all together would not fit.
std::vector<DeviceGroup> all_device_groups(DeviceArrays& arrays);

}  // namespace thinwire::bench
