#pragma once
// A small network on label-sorted shards: every rank sees one or two classes, so that its gradients are far from the mean.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "bench/control_engine.hpp"
#include "bench/quality_network.hpp"

namespace thinwire::bench {

using SmallNetwork = Perceptron<32, 64>;

enum class Optimizer { sgd, momentum, in_hook, adam };  ///< in_hook: momentum too, but the feedback has it

struct Training {
  Optimizer optimizer = Optimizer::sgd;
  double rate = 0.1;
  int world = 8;
  std::size_t examples = 4096, batch = 32, steps = 4000;
};
struct Trained {
  double loss = 0, accuracy = 0;  ///< of the training, in the test
};

/// What every rank does with the mean that came back.
class Stepper {
 public:
  explicit Stepper(const Training& how, std::size_t count) : how_(how), momentum_(count), variance_(count) {}

  void step(const std::vector<float>& mean, std::vector<float>& values) noexcept {
    const float rate = float(how_.rate);
    ++steps_;
    if (how_.optimizer == Optimizer::sgd || how_.optimizer == Optimizer::in_hook) {
      for (std::size_t j = 0; j < values.size(); ++j) values[j] -= rate * mean[j];
    } else if (how_.optimizer == Optimizer::momentum) {
      for (std::size_t j = 0; j < values.size(); ++j) values[j] -= rate * (momentum_[j] = 0.9f * momentum_[j] + mean[j]);
    } else {
      const float one = float(1 - std::pow(0.9, steps_)), two = float(1 - std::pow(0.999, steps_));
      for (std::size_t j = 0; j < values.size(); ++j) {
        momentum_[j] = 0.9f * momentum_[j] + 0.1f * mean[j];
        variance_[j] = 0.999f * variance_[j] + 0.001f * mean[j] * mean[j];
        values[j] -= rate * (momentum_[j] / one) / (std::sqrt(variance_[j] / two) + 1e-8f);
      }
    }
  }

 private:
  Training how_;
  std::vector<float> momentum_, variance_;
  int steps_ = 0;
};

/// The whole network is one tensor, as in the published runs.
inline Trained train_network(const std::string& config, const Training& how, std::uint64_t seed) {
  using Net = SmallNetwork;
  std::mt19937_64 random(seed);
  const Net teacher = Net::teacher(random);
  const Labelled<Net> train(teacher, how.examples, random), test(teacher, how.examples, random);
  const Net start = Net::student(random);
  std::vector<std::size_t> sorted(train.size());
  std::iota(sorted.begin(), sorted.end(), std::size_t(0));
  std::stable_sort(sorted.begin(), sorted.end(), [&](std::size_t a, std::size_t b) { return train.labels[a] < train.labels[b]; });
  Trained out;
  as_ranks(how.world, [&](std::unique_ptr<Communicator> communicator) {
    const auto rank = std::size_t(communicator->rank()), shard = train.size() / std::size_t(how.world);
    ReducerOptions options;
    options.inline_queue = true;
    GradientReducer reducer(std::move(communicator), Config::parse(config), {{"network", {Net::kNumel, 1}}}, options);
    const std::vector<std::uint32_t> bucket = {0};
    SplitMix batches(seed * 1000 + rank + 1);
    Stepper stepper(how, Net::kNumel);
    Net net = start;
    std::vector<float> grad(Net::kNumel);
    for (std::size_t step = 0; step < how.steps; ++step) {
      std::fill(grad.begin(), grad.end(), 0.0f);
      for (std::size_t b = 0; b < how.batch; ++b) {
        const std::size_t i = sorted[rank * shard + batches.next() % shard];
        net.backward(train.input(i), train.labels[i], 1.0f / float(how.batch), grad.data());
      }
      reducer.reduce(bucket, host_bytes(grad.data(), grad.size())).wait();
      stepper.step(grad, net.values);
    }
    if (rank != 0) return;
    for (std::size_t i = 0; i < train.size(); ++i) {
      out.loss += net.backward(train.input(i), train.labels[i], 0, nullptr) / double(train.size());
      out.accuracy += (net.classify(test.input(i)) == test.labels[i] ? 1.0 : 0.0) / double(test.size());
    }
  });
  return out;
}

}  // namespace thinwire::bench
