#include "launch/trainer/trainer.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <mpi.h>
#include <torch/nn/functional/loss.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "compressors/core/error.hpp"
#include "launch/trainer/model.hpp"

namespace thinwire::launch {

namespace {

double sum_over_ranks(double value) {
  MPI_Allreduce(MPI_IN_PLACE, &value, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
  return value;
}

/// Initial bits are the CPU's generator's, wherever the training goes on.
std::unique_ptr<Net> seeded(std::uint64_t seed, torch::Device device) {
  torch::manual_seed(seed);
  auto net = std::make_unique<Net>();
  net->to(device);
  return net;
}

ReducerOptions on(torch::Device device, bool adam, const std::vector<torch::Tensor>& parameters, std::int64_t bucket_kb) {
  ReducerOptions options;
  options.largest_bucket = std::size_t(bucket_kb) * 1024 / sizeof(float);
  for (const torch::Tensor& p : parameters) options.largest_bucket = std::max(options.largest_bucket, std::size_t(p.numel()));
  options.momentum_elsewhere = adam;  // until it freezes its variance
  if (device.is_cuda()) options.device = device.index();
  return options;
}

}  // namespace

Samples::Samples(Images& from, std::int64_t keep, torch::Device device) {
  const auto count = std::min(std::int64_t(from.count), keep);
  images = torch::from_blob(from.pixels.data(), {count, 28, 28}, torch::kUInt8).to(device);
  labels = torch::from_blob(from.labels.data(), {count}, torch::kUInt8).to(device);
}

Trainer::Trainer(const Options& options, std::shared_ptr<Communicator> gradients, Dataset& data, torch::Device device)
    : options_(options),
      source_(data.source),
      world_(gradients->size()),
      rank_(gradients->rank()),
      device_(device),
      train_(data.train, options.subset > 0 ? options.subset : std::int64_t(data.train.count), device),
      test_(data.test, options.subset > 0 ? std::max<std::int64_t>(1, options.subset / 5) : std::int64_t(data.test.count), device),
      config_(with_timeout(options.config, options.timeout)),
      net_(seeded(options.seed, device)),
      parameters_(net_->parameters()),
      reducer_(std::move(gradients), config_, described(), on(device, uses_adam(options, config_), parameters_, options.bucket_kb)),
      buckets_(reducer_, parameters_, std::size_t(options.bucket_kb) * 1024),
      sgd_(parameters_, config_, options.momentum, options.weight_decay) {
  if (uses_adam(options, config_)) adam_.emplace(parameters_, reducer_, config_, options.beta2, options.weight_decay);
  epoch_steps_ = train_.count() / (world_ * options.batch);
  if (epoch_steps_ == 0)
    fail(Errc::invalid_argument, std::to_string(train_.count()) + " images are too few for " + std::to_string(world_) + " ranks of batch " +
                                     std::to_string(options.batch));
  steps_ = epoch_steps_ * options.epochs;
  if (rank_ == 0 && config_.target().name == "momentum" && config_.target().integer("freeze") >= std::uint64_t(steps_))
    std::fprintf(stderr, "thinwire_train: warning: freeze=%s: all %lld steps of this run will be dense\n",
                 config_.target().text("freeze").c_str(), static_cast<long long>(steps_));
}

nlohmann::json Trainer::epoch(std::int64_t epoch) {
  const auto start = std::chrono::steady_clock::now();
  const torch::Tensor order =
      torch::randperm(train_.count(), at::detail::createCPUGenerator(options_.seed * 1000003 + std::uint64_t(epoch)), torch::kLong)
          .to(device_);
  torch::Tensor losses = torch::zeros({}, torch::TensorOptions(torch::kFloat64).device(device_));
  const std::int64_t stride = world_ * options_.batch;
  for (std::int64_t s = 0; s < epoch_steps_; ++s) {
    const torch::Tensor loss = step(order.slice(0, s * stride + rank_, (s + 1) * stride, world_));
    losses += loss;
    if (rank_ == 0 && s % 10 == 0 && isatty(STDERR_FILENO)) {
      std::fprintf(stderr, "\repoch %ld/%ld  step %ld/%ld  loss %.4f ", long(epoch), long(options_.epochs), long(s + 1), long(epoch_steps_),
                   loss.item<double>());
    }
  }
  const double loss_sum = losses.item<double>();  // waits for the GPU, so the clock below has seen every step
  seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const Stats stats = reducer_.stats();
  return {{"config", options_.config},
          {"label", options_.config},
          {"full_config", config_.str()},
          {"data", source_},
          {"world", world_},
          {"epoch", epoch},
          {"loss", sum_over_ranks(loss_sum) / double(epoch_steps_) / world_},
          {"accuracy", accuracy()},
          {"seconds", seconds_},
          {"steps", done_},
          {"payload_bytes", stats.payload_bytes},
          {"wire_bytes", std::uint64_t(stats.wire_bytes)},
          {"dense_bytes", std::uint64_t(stats.dense_bytes)},
          {"frozen_step", frozen_step_ ? nlohmann::json(*frozen_step_) : nullptr},
          {"freeze_reason", frozen_step_ ? nlohmann::json("freeze=" + config_.target().text("freeze")) : nullptr},
          {"fingerprint", common_fingerprint()}};
}

Trainer::~Trainer() = default;

std::vector<Parameter> Trainer::described() const {
  std::vector<Parameter> parameters;
  for (const auto& item : net_->named_parameters()) {
    const auto sizes = item.value().sizes();
    parameters.push_back({item.key(), {sizes.begin(), sizes.end()}});
  }
  return parameters;
}

double Trainer::rate_at(std::int64_t done) const { return learning_rate(options_, config_) * (1 - double(done) / double(steps_)); }

torch::Tensor Trainer::step(const torch::Tensor& batch) {
  const double lr = rate_at(done_);
  if (done_ > 0 && config_.feedback().name == "ef14" && config_.feedback().flag("lr_rescale"))
    reducer_.rescale_residuals(std::vector<float>(parameters_.size(), float(1.0 / (lr / rate_at(done_ - 1)))));
  buckets_.zero();
  const torch::Tensor images = pixels(train_.images.index_select(0, batch));
  const torch::Tensor loss =
      torch::nn::functional::cross_entropy(net_->forward(images), train_.labels.index_select(0, batch).to(torch::kLong));
  loss.backward();
  buckets_.finish();
  if (adam_) {
    if (adam_->step(lr)) {
      frozen_step_ = reducer_.step();
      if (rank_ == 0)
        std::printf("%svariance frozen at step %llu: freeze=%s\n", isatty(STDERR_FILENO) ? "\r\033[K" : "",
                    static_cast<unsigned long long>(*frozen_step_), config_.target().text("freeze").c_str());
    }
    // Momenta and variances are equal on all ranks: one of them speaks.
    if (const std::string notice = adam_->take_notice(); !notice.empty() && rank_ == 0)
      std::fprintf(stderr, "thinwire_train: warning: %s\n", notice.c_str());
  } else {
    sgd_.step(lr);
  }
  ++done_;
  if (const std::string notice = reducer_.take_notice(); !notice.empty())
    std::fprintf(stderr, "thinwire_train: warning: %s\n", notice.c_str());
  return loss.detach();
}

double Trainer::accuracy() {
  const torch::NoGradGuard no_grad;
  const std::int64_t stride = world_ * 500;
  double right = 0;
  for (std::int64_t first = rank_; first < test_.count(); first += stride) {
    const std::int64_t last = std::min(test_.count(), first + stride);
    const torch::Tensor answers = net_->forward(pixels(test_.images.slice(0, first, last, world_))).argmax(1);
    right += (answers == test_.labels.slice(0, first, last, world_)).sum().item<double>();
  }
  return sum_over_ranks(right) / double(test_.count());
}

std::string Trainer::common_fingerprint() const {
  const std::string own = fingerprint(*net_);
  std::string all(own.size() * std::size_t(world_), '?');
  MPI_Allgather(own.data(), int(own.size()), MPI_CHAR, all.data(), int(own.size()), MPI_CHAR, MPI_COMM_WORLD);
  for (std::size_t r = 0; r < std::size_t(world_); ++r) {
    if (all.compare(r * own.size(), own.size(), own) != 0)
      fail(Errc::internal, "the replicas have diverged: rank " + std::to_string(r) + " has parameters " +
                               all.substr(r * own.size(), own.size()) + ", this rank " + own);
  }
  return own;
}

}  // namespace thinwire::launch
