#pragma once
// A small network on label-sorted shards: every rank sees one or two classes, so that its gradients are far from the mean.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "bench/control_engine.hpp"
#include "bench/quality_network.hpp"

namespace thinwire::bench {

struct Training {
  int world = 8;
  std::size_t examples = 2048, batch = 16, steps = 3000;
  double rate = 0.1;
};
struct Trained {
  double loss = 0, accuracy = 0;
};

inline Trained train_network(const std::string& config, const Training& how, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  const Network teacher = Network::teacher(random);
  const Examples train(teacher, how.examples, random), test(teacher, how.examples, random);
  const Network start = Network::student(random);
  std::vector<std::size_t> sorted(train.size());
  std::iota(sorted.begin(), sorted.end(), std::size_t(0));
  std::stable_sort(sorted.begin(), sorted.end(), [&](std::size_t a, std::size_t b) { return train.labels[a] < train.labels[b]; });
  Trained out;
  as_ranks(how.world, [&](std::unique_ptr<Communicator> communicator) {
    const auto rank = std::size_t(communicator->rank()), shard = train.size() / std::size_t(how.world);
    ReducerOptions options;
    options.inline_queue = true;
    GradientReducer reducer(std::move(communicator), Config::parse(config),
                            {{"w1", {kInputs, kHidden}}, {"b1", {kHidden}}, {"w2", {kHidden, kClasses}}, {"b2", {kClasses}}}, options);
    const std::vector<std::uint32_t> bucket = {0, 1, 2, 3};
    SplitMix batches(seed * 1000 + rank + 1);
    Network net = start;
    std::vector<float> grad(Network::kNumel);
    for (std::size_t step = 0; step < how.steps; ++step) {
      std::fill(grad.begin(), grad.end(), 0.0f);
      for (std::size_t b = 0; b < how.batch; ++b) {
        const std::size_t i = sorted[rank * shard + batches.next() % shard];
        net.backward(train.input(i), train.labels[i], 1.0f / float(how.batch), grad.data());
      }
      reducer.reduce(bucket, host_bytes(grad.data(), grad.size())).wait();
      for (std::size_t j = 0; j < grad.size(); ++j) net.values[j] -= float(how.rate) * grad[j];
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
