#pragma once
// AdamW and, with a config whose target is the momentum, the optimizer's half of 1-bit Adam: operation for operation that of
// torch_ext/thinwire/onebit_adam.py, so that both trainers reach the same bits.

#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "collectives/reducer.hpp"
#include "compressors/core/config.hpp"

namespace thinwire::launch {

class Adam {
 public:
  /// `parameters[i]` is the reducer's parameter i. Where the config's target is the momentum its freeze is a step.
  Adam(std::vector<torch::Tensor> parameters, GradientReducer& reducer, const Config& config, double beta2, double weight_decay);

  /// w ← w − lr·(weight_decay·w + m / (1 − beta1^t) / (sqrt(v / (1 − beta2^t)) + eps)); where the reducer compresses the momentum, m is the
  /// gradient that it left, and v and its correction are those of the freeze.
  /// @returns whether the variance was frozen after it.
  bool step(double lr);
  /// What a person should be told, once, in the words of the Python optimizer: tensors without any gradient at the freeze, an update far
  /// beyond Adam's. Empty most of the time. On a GPU updates are looked at in every 16th step.
  std::string take_notice() { return std::exchange(notice_, {}); }
  /// The largest |update / learning rate| that was looked at since the freeze. `wait`: of all steps so far.
  double max_update(bool wait);

 private:
  void freeze();
  void look_at_updates(bool wait);

  std::vector<torch::Tensor> parameters_, momenta_, variances_;
  GradientReducer& reducer_;
  std::optional<std::uint64_t> freeze_at_;  ///< synchronised steps; none: plain AdamW
  double beta1_ = 0.9, beta2_, decay_, eps_ = 1e-8;
  double steps_ = 0, frozen_steps_ = 0;  ///< 0: not frozen
  std::uint64_t frozen_at_ = 0;          ///< synchronised steps
  torch::Tensor largest_;                ///< update since the last look
  int unread_ = 0;                       ///< steps since then
  double max_update_ = 0;
  std::string notice_;
};

}  // namespace thinwire::launch
