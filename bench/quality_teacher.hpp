#pragma once
// The teacher-student comparison: ranks as threads train replicas of one student through GradientReducer over loopback, and the results are
// held against the dense runs' (quality_methods.hpp). A method that loses, doubles or misplaces gradient fails here though each of its
// parts passes its own tests.

#include <chrono>
#include <cstdio>
#include <exception>
#include <limits>
#include <numeric>
#include <string>
#include <thread>

#include "bench/quality_methods.hpp"
#include "bench/quality_network.hpp"
#include "bench/quality_optimizer.hpp"
#include "collectives/communicator.hpp"
#include "collectives/reducer.hpp"
#include "compressors/core/config.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/wire.hpp"

namespace thinwire::bench {

inline constexpr int kWorld = 4;
inline constexpr std::size_t kBatch = 16, kTrain = 8192, kTest = 4096, kSteps = 3000;  // rates × 0.1 at half and at three quarters

namespace detail {

/// What one rank does: its own shard, batches in an order of its own, the same updates as all others.
inline void train_rank(const Method& method, std::unique_ptr<Communicator> communicator, const Examples& examples, std::uint64_t seed,
                       Network& net, Stats& stats) {
  const int rank = communicator->rank();
  const std::vector<Parameter> parameters = {{"w1", {Network::kInputs, Network::kHidden}},
                                             {"b1", {Network::kHidden}},
                                             {"w2", {Network::kHidden, Network::kClasses}},
                                             {"b2", {Network::kClasses}}};
  const std::vector<std::uint32_t> bucket = {0, 1, 2, 3};
  const Config config = Config::parse(method.config);
  ReducerOptions options;
  options.momentum_elsewhere = method.rule == Rule::adam;  // until it freezes its variance
  GradientReducer reducer(std::move(communicator), config, parameters, options);
  Sgd sgd(method.momentum);
  Adam adam(config, method.masks);
  std::mt19937_64 random(seed * 1000 + std::uint64_t(rank) + 1);
  const std::size_t shard = kTrain / kWorld;
  std::vector<std::size_t> order(shard);
  std::iota(order.begin(), order.end(), shard * std::size_t(rank));
  std::vector<float> grad(Network::kNumel);
  std::size_t at = shard;
  for (std::size_t step = 0; step < kSteps; ++step) {
    if (at + kBatch > shard) {
      std::shuffle(order.begin(), order.end(), random);
      at = 0;
    }
    std::fill(grad.begin(), grad.end(), 0.0f);
    for (std::size_t b = 0; b < kBatch; ++b, ++at) {
      net.backward(examples.input(order[at]), examples.labels[order[at]], 1.0f / float(kBatch), grad.data());
    }
    reducer.reduce(bucket, host_bytes(grad.data(), grad.size())).wait();
    const float decay = step < kSteps / 2 ? 1.0f : step < kSteps * 3 / 4 ? 0.1f : 0.01f;
    if (method.rule == Rule::adam) {
      adam.step(reducer, grad, Adam::kRate * decay, net.values);
    } else {
      sgd.step(grad, Sgd::kRate * decay, net.values);
    }
  }
  stats = reducer.stats();
}

}  // namespace detail

/// Trains one method. @throws what a rank met, and Error{internal} if the replicas differ.
inline Outcome train_teacher_student(const Method& method, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  const Network teacher = Network::teacher(random);
  Examples train(teacher, kTrain, random);
  const Examples test(teacher, kTest, random);
  train.silence(method.dead_inputs);
  std::vector<Network> nets(kWorld, Network::student(random));
  std::vector<Stats> stats(kWorld);
  std::vector<std::exception_ptr> errors(kWorld);
  auto communicators = make_loopback(kWorld);
  const auto start = std::chrono::steady_clock::now();
  {
    std::vector<std::jthread> ranks;
    for (std::size_t r = 0; r < std::size_t(kWorld); ++r) {
      ranks.emplace_back([&, r] {
        try {
          detail::train_rank(method, std::move(communicators[r]), train, seed, nets[r], stats[r]);
        } catch (...) { errors[r] = std::current_exception(); }
      });
    }
  }
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  Outcome outcome;
  outcome.name = method.name;
  outcome.config = Config::parse(method.config).str();
  outcome.seed = seed;
  outcome.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  outcome.payload_bytes = stats[0].payload_bytes;
  outcome.dense_bytes = stats[0].dense_bytes;
  for (std::size_t r = 0; r < std::size_t(kWorld); ++r) {
    char hex[17];
    std::snprintf(hex, sizeof hex, "%016llx",
                  static_cast<unsigned long long>(wire::hash_bytes(nets[r].values.data(), nets[r].values.size() * sizeof(float), 0)));
    if (r == 0) outcome.fingerprint = hex;
    if (outcome.fingerprint != hex)
      fail(Errc::internal, std::string(method.name) + ": rank " + std::to_string(r) + " has another replica than rank 0");
  }
  for (std::size_t i = 0; i < train.size(); ++i)
    outcome.loss += nets[0].backward(train.input(i), train.labels[i], 0, nullptr) / double(kTrain);
  for (std::size_t i = 0; i < test.size(); ++i) {
    outcome.test_loss += nets[0].backward(test.input(i), test.labels[i], 0, nullptr) / double(kTest);
    outcome.accuracy += (nets[0].classify(test.input(i)) == test.labels[i] ? 1.0 : 0.0) / double(kTest);
  }
  for (double* loss : {&outcome.loss, &outcome.test_loss}) {
    if (!std::isfinite(*loss)) *loss = std::numeric_limits<double>::infinity();
  }
  return outcome;
}

}  // namespace thinwire::bench
