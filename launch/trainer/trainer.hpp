#pragma once
// One rank of the training: data, network, optimizer, and the reducer between them.

#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "collectives/reducer.hpp"
#include "compressors/core/config.hpp"
#include "launch/trainer/adam.hpp"
#include "launch/trainer/buckets.hpp"
#include "launch/trainer/idx.hpp"
#include "launch/trainer/options.hpp"
#include "launch/trainer/sgd.hpp"

namespace thinwire::launch {

struct Net;

/// The first images and labels of a set as tensors; on the CPU they share the vectors' memory, on a GPU they lie there whole.
struct Samples {
  torch::Tensor images, labels;

  Samples(Images& from, std::int64_t keep, torch::Device device);
  std::int64_t count() const { return images.size(0); }
};

class Trainer {
 public:
  /// Collective. `gradients` carries them; it works in the memory of `device`. MPI_COMM_WORLD, of the same ranks, carries a few numbers per
  /// epoch. The options have passed check_optimizer(). @throws Error{invalid_argument} if there are too few images for one step.
  Trainer(const Options& options, std::shared_ptr<Communicator> gradients, Dataset& data, torch::Device device);
  ~Trainer();

  /// @returns a row of the results.
  nlohmann::json epoch(std::int64_t epoch);

  std::int64_t images() const { return train_.count(); }
  std::int64_t steps() const { return steps_; }

 private:
  std::vector<Parameter> described() const;
  /// @returns the batch's mean loss, on the device: nobody waits for it.
  torch::Tensor step(const torch::Tensor& batch);
  /// Of step `done`: it falls to 0 linearly.
  double rate_at(std::int64_t done) const;
  /// Share of the test images that are classified right; each rank takes every world-th.
  double accuracy();
  /// The hash of the parameters. @throws internal if it is not the same on all ranks.
  std::string common_fingerprint() const;

  const Options options_;
  const std::string source_;
  const int world_, rank_;
  const torch::Device device_;
  Samples train_, test_;
  Config config_;
  std::unique_ptr<Net> net_;
  std::vector<torch::Tensor> parameters_;
  GradientReducer reducer_;
  Buckets buckets_;
  Sgd sgd_;
  std::optional<Adam> adam_;  ///< in its place
  std::optional<std::uint64_t> frozen_step_;
  std::int64_t epoch_steps_ = 0, steps_ = 0, done_ = 0;
  double seconds_ = 0;
};

}  // namespace thinwire::launch
