#pragma once
// The kernels of a GPU by name, through the codec's public interface.

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "bench/kernels_cuda_data.hpp"

namespace thinwire::bench {

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

/// Elements of exact selection at most: what torch.topk is compared with on as many.
inline constexpr std::size_t kExactNumel = std::size_t(64) << 20;

/// All that fit arrays of this size. Cases allocate when they are settled: workspaces of all together would not fit.
std::vector<DeviceGroup> all_device_groups(DeviceArrays& arrays);

}  // namespace thinwire::bench
