#pragma once
// What a rank of the teacher-student comparison does with the mean that came back: SGD with momentum, or Adam, which becomes the
// optimizer's half of 1-bit Adam where the config compresses the momentum. In plain loops over one array, as launch/trainer/adam.cpp does
// it with torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "bench/quality_methods.hpp"
#include "bench/quality_network.hpp"
#include "collectives/reducer.hpp"
#include "compressors/core/config.hpp"

namespace thinwire::bench {

/// u ← m·u + g; w ← w − lr·u.
class Sgd {
 public:
  static constexpr float kRate = 0.05f;
  explicit Sgd(float momentum) : momentum_(momentum) {}

  void step(std::span<const float> grad, float rate, std::span<float> values) noexcept {
    for (std::size_t i = 0; i < grad.size(); ++i) {
      buffer_[i] = momentum_ * buffer_[i] + grad[i];
      values[i] -= rate * buffer_[i];
    }
  }

 private:
  float momentum_;
  std::vector<float> buffer_ = std::vector<float>(Network::kNumel);
};

/// w ← w − lr·m / (1 − beta1^t) / (sqrt(v / (1 − beta2^t)) + eps). Frozen: v and its t stay, m is what the reducer left in the gradient.
class Adam {
 public:
  static constexpr float kRate = 2e-3f;
  Adam(const Config& config, bool masks) : masks_(masks) {
    if (config.target().name != "momentum") return;
    beta1_ = float(config.target().number("beta1"));
    freeze_at_ = config.target().integer("freeze");
  }

  void step(GradientReducer& reducer, std::span<const float> grad, float rate, std::span<float> values) {
    ++steps_;
    const float step_size = float(rate / (1 - std::pow(double(beta1_), steps_)));
    std::size_t i = 0;
    for (std::uint32_t p = 0; p < Network::kSizes.size(); ++p) {
      const bool averaged = frozen_at_ > 0 && reducer.averages(p);
      const float root = float(std::sqrt(1 - std::pow(double(kBeta2), averaged ? frozen_at_ : steps_)));
      for (const std::size_t end = i + Network::kSizes[p]; i < end; ++i) {
        if (averaged) {
          momentum_[i] = grad[i];
        } else {
          momentum_[i] += (1 - beta1_) * (grad[i] - momentum_[i]);
          variance_[i] = kBeta2 * variance_[i] + (1 - kBeta2) * grad[i] * grad[i];
        }
        values[i] -= step_size * momentum_[i] / (std::sqrt(variance_[i]) / root + kEps);
      }
    }
    if (freeze_at_ && std::uint64_t(steps_) == *freeze_at_) freeze(reducer);
  }

 private:
  static constexpr float kBeta2 = 0.999f, kEps = 1e-8f;

  static void raise_to_floor(std::span<float> variance) {
    double sum = 0;
    for (const float v : variance) sum += std::sqrt(v);
    const float least = least_variance(sum / double(variance.size()));
    for (float& v : variance) v = v > 0 ? std::max(v, least) : v;
  }

  void freeze(GradientReducer& reducer) {
    std::vector<Handover> handover(Network::kSizes.size());
    std::vector<std::vector<std::uint8_t>> live(handover.size());
    std::size_t first = 0;
    for (std::uint32_t p = 0; p < handover.size(); first += Network::kSizes[p], ++p) {
      if (!reducer.averages(p)) continue;
      const std::size_t count = Network::kSizes[p];
      live[p].resize((count + 7) / 8);
      for (std::size_t i = 0; i < count; ++i) live[p][i / 8] |= std::uint8_t((variance_[first + i] != 0 ? 1u : 0u) << (i % 8));
      handover[p].momentum = std::span(momentum_).subspan(first, count);
      if (masks_) handover[p].live = live[p];
      handover[p].beta1 = beta1_;
      if (reducer.world() > 1) raise_to_floor(std::span(variance_).subspan(first, count));
    }
    reducer.freeze(handover);
    frozen_at_ = steps_;
  }

  bool masks_;
  float beta1_ = 0.9f;
  std::optional<std::uint64_t> freeze_at_;  ///< none: plain Adam
  double steps_ = 0, frozen_at_ = 0;        ///< 0: not frozen
  std::vector<float> momentum_ = std::vector<float>(Network::kNumel), variance_ = momentum_;
};

}  // namespace thinwire::bench
