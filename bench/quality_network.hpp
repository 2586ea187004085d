#pragma once
// The students of the gates and of the error-control tables: perceptrons of one hidden layer with softmax cross-entropy, plain C++, so that
// a training runs in seconds and tests the engine alone.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace thinwire::bench {

/// Weights as (inputs × outputs), then biases, one after the other in `values`.
template <std::size_t inputs, std::size_t hidden_units>
struct Perceptron {
  static constexpr std::size_t kInputs = inputs, kHidden = hidden_units, kClasses = 10;
  static constexpr std::array<std::size_t, 4> kSizes = {kInputs * kHidden, kHidden, kHidden* kClasses, kClasses};
  static constexpr std::size_t kNumel = kSizes[0] + kSizes[1] + kSizes[2] + kSizes[3];

  std::vector<float> values = std::vector<float>(kNumel);

  float* w1() noexcept { return values.data(); }
  float* b1() noexcept { return w1() + kSizes[0]; }
  float* w2() noexcept { return b1() + kSizes[1]; }
  float* b2() noexcept { return w2() + kSizes[2]; }
  const float* w1() const noexcept { return values.data(); }
  const float* b1() const noexcept { return w1() + kSizes[0]; }
  const float* w2() const noexcept { return b1() + kSizes[1]; }
  const float* b2() const noexcept { return w2() + kSizes[2]; }

  /// Weights uniform with He's variance 2/inputs, biases 0.
  static Perceptron student(std::mt19937_64& random) {
    Perceptron net;
    const auto fill = [&random](float* at, std::size_t count, std::size_t fan_in) {
      std::uniform_real_distribution<float> uniform(-std::sqrt(6 / float(fan_in)), std::sqrt(6 / float(fan_in)));
      std::generate_n(at, count, [&] { return uniform(random); });
    };
    fill(net.w1(), kSizes[0], kInputs);
    fill(net.w2(), kSizes[2], kHidden);
    return net;
  }
  /// Normal weights, biases 0: the scale does not matter to the class.
  static Perceptron teacher(std::mt19937_64& random) {
    Perceptron net;
    std::normal_distribution<float> normal;
    std::generate_n(net.w1(), kSizes[0], [&] { return normal(random); });
    std::generate_n(net.w2(), kSizes[2], [&] { return normal(random); });
    return net;
  }

  void forward(const float* x, float* hidden, float* logits) const noexcept {
    std::copy_n(b1(), kHidden, hidden);
    for (std::size_t i = 0; i < kInputs; ++i) {
      for (std::size_t j = 0; j < kHidden; ++j) hidden[j] += x[i] * w1()[i * kHidden + j];
    }
    for (std::size_t j = 0; j < kHidden; ++j) hidden[j] = std::max(hidden[j], 0.0f);
    std::copy_n(b2(), kClasses, logits);
    for (std::size_t j = 0; j < kHidden; ++j) {
      for (std::size_t k = 0; k < kClasses; ++k) logits[k] += hidden[j] * w2()[j * kClasses + k];
    }
  }

  std::size_t classify(const float* x) const noexcept {
    std::array<float, kHidden> hidden;
    std::array<float, kClasses> logits;
    forward(x, hidden.data(), logits.data());
    return std::size_t(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }

  /// Adds `share` times the gradient of one example's loss to `grad` (laid out as `values`); with null it only computes. @returns the loss.
  double backward(const float* x, std::size_t label, float share, float* grad) const noexcept {
    std::array<float, kHidden> hidden, d_hidden{};
    std::array<float, kClasses> z;
    forward(x, hidden.data(), z.data());
    const float top = *std::max_element(z.begin(), z.end());
    const double below = double(top) - z[label];  // exact where the probability itself would be 0
    float total = 0;
    for (float& value : z) total += value = std::exp(value - top);
    const double loss = std::log(double(total)) + below;
    if (grad == nullptr) return loss;

    for (float& value : z) value *= share / total;
    z[label] -= share;
    float *g_w1 = grad, *g_b1 = g_w1 + kSizes[0], *g_w2 = g_b1 + kSizes[1], *g_b2 = g_w2 + kSizes[2];
    for (std::size_t k = 0; k < kClasses; ++k) g_b2[k] += z[k];
    for (std::size_t j = 0; j < kHidden; ++j) {
      for (std::size_t k = 0; k < kClasses; ++k) {
        g_w2[j * kClasses + k] += hidden[j] * z[k];
        d_hidden[j] += w2()[j * kClasses + k] * z[k];
      }
      if (hidden[j] <= 0) d_hidden[j] = 0;
      g_b1[j] += d_hidden[j];
    }
    for (std::size_t i = 0; i < kInputs; ++i) {
      for (std::size_t j = 0; j < kHidden; ++j) g_w1[i * kHidden + j] += x[i] * d_hidden[j];
    }
    return loss;
  }
};

using Network = Perceptron<64, 128>;  ///< of the gates: 9,610 floats

/// Standard normal inputs, labelled by a teacher.
template <class Net>
struct Labelled {
  static constexpr std::size_t kInputs = Net::kInputs;
  std::vector<float> inputs;
  std::vector<std::uint8_t> labels;

  Labelled(const Net& teacher, std::size_t count, std::mt19937_64& random) : inputs(count * kInputs), labels(count) {
    std::normal_distribution<float> normal;
    for (float& x : inputs) x = normal(random);
    for (std::size_t i = 0; i < count; ++i) labels[i] = std::uint8_t(teacher.classify(input(i)));
  }
  /// `count` inputs, evenly spread, become 0; the labels stay those of the whole input. Spread, because a block of nothing but dead
  /// coordinates has scale 0 and does no harm.
  void silence(std::size_t count) noexcept {
    for (std::size_t i = 0; i < size(); ++i) {
      for (std::size_t d = 0; d < count; ++d) inputs[i * kInputs + d * kInputs / count] = 0;
    }
  }
  const float* input(std::size_t i) const noexcept { return inputs.data() + i * kInputs; }
  std::size_t size() const noexcept { return labels.size(); }
};

using Examples = Labelled<Network>;

}  // namespace thinwire::bench
