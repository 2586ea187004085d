// thinwire_train: data-parallel training in C++, LibTorch over Open MPI, no Python. Same data, network, options and arithmetic as
// launch/train_rank.py.

#include <ATen/CPUGeneratorImpl.h>
#include <torch/torch.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <ostream>
#include <sstream>
#include <string>

#include "launch/trainer/buckets.hpp"
#include "launch/trainer/idx.hpp"
#include "launch/trainer/machine.hpp"
#include "launch/trainer/model.hpp"
#include "launch/trainer/sgd.hpp"
#include "thinwire/thinwire.hpp"

namespace thinwire::launch {

namespace {

struct Options {
  std::string config = "codec=none", data, json;
  std::int64_t epochs = 3, batch = 64, subset = 0, bucket_kb = 1024;
  std::uint64_t seed = 0;
  double lr = 0.05, momentum = 0.9, weight_decay = 0, timeout = 120;
};

/// `config` with a timeout slot, unless it has one of its own.
Config with_timeout(const std::string& config, double seconds) {
  std::istringstream words(config);
  for (std::string word; words >> word;) {
    if (word.starts_with("timeout=")) return Config::parse(config);
  }
  std::ostringstream whole;
  whole << config << " timeout=" << seconds;
  return Config::parse(whole.str());
}

void declare(CLI::App& app, Options& o) {
  app.add_option("--config", o.config, "thinwire configuration, such as dgc:density=0.01")->capture_default_str();
  app.add_option("--epochs", o.epochs)->check(CLI::Range(1, 1000000))->capture_default_str();
  app.add_option("--batch", o.batch, "images per rank and step")->check(CLI::Range(1, 1000000))->capture_default_str();
  app.add_option("--lr", o.lr, "learning rate of the first step, which falls to 0 linearly")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  app.add_option("--momentum", o.momentum, "of the optimizer; under feedback=dgc the config's own counts")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--weight-decay", o.weight_decay)->check(CLI::Range(0.0, 1e6))->capture_default_str();
  app.add_option("--seed", o.seed, "of the initial parameters and of the order of the images")->capture_default_str();
  app.add_option("--data", o.data,
                 "folder with the four idx files; default: Debian's package dataset-fashion-mnist, or scikit-learn's digits from setup")
      ->type_name("DIR");
  app.add_option("--subset", o.subset, "train on the first N images and test on the first N / 5; 0: all")
      ->check(CLI::Range(0, 1000000000))
      ->capture_default_str();
  app.add_option("--bucket-kb", o.bucket_kb, "gradients go to the reducer in buckets of about this size")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
  app.add_option("--timeout", o.timeout, "seconds after which a silent peer is an error; a timeout in the config counts instead")
      ->check(CLI::Range(1.0, 1e9))
      ->capture_default_str();
  app.add_option("--json", o.json, "write the results: one row per epoch")->type_name("FILE");
}

double sum_over_ranks(double value) {
  MPI_Allreduce(MPI_IN_PLACE, &value, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
  return value;
}

/// The first `keep` images and labels, as tensors that share the vectors' memory.
struct Samples {
  torch::Tensor images, labels;

  Samples(Images& from, std::int64_t keep) {
    const auto count = std::min(std::int64_t(from.count), keep);
    images = torch::from_blob(from.pixels.data(), {count, 28, 28}, torch::kUInt8);
    labels = torch::from_blob(from.labels.data(), {count}, torch::kUInt8);
  }
  std::int64_t count() const { return images.size(0); }
};

class Trainer {
 public:
  Trainer(const Options& options, std::shared_ptr<Communicator> world, Dataset& data)
      : options_(options),
        source_(data.source),
        world_(world->size()),
        rank_(world->rank()),
        train_(data.train, options.subset > 0 ? options.subset : std::int64_t(data.train.count)),
        test_(data.test, options.subset > 0 ? std::max<std::int64_t>(1, options.subset / 5) : std::int64_t(data.test.count)),
        config_(with_timeout(options.config, options.timeout)),
        net_(seeded(options.seed)),
        parameters_(net_.parameters()),
        reducer_(std::move(world), config_, described()),
        buckets_(reducer_, parameters_, std::size_t(options.bucket_kb) * 1024),
        sgd_(parameters_, config_, options.momentum, options.weight_decay) {
    epoch_steps_ = train_.count() / (world_ * options.batch);
    THINWIRE_EXPECTS(epoch_steps_ > 0, std::to_string(train_.count()) + " images are too few for " + std::to_string(world_) +
                                           " ranks of batch " + std::to_string(options.batch));
    steps_ = epoch_steps_ * options.epochs;
  }

  /// @returns a row of the results.
  nlohmann::json epoch(std::int64_t epoch) {
    const auto start = std::chrono::steady_clock::now();
    const torch::Tensor order =
        torch::randperm(train_.count(), at::detail::createCPUGenerator(options_.seed * 1000003 + std::uint64_t(epoch)), torch::kLong);
    double loss_sum = 0;
    const std::int64_t stride = world_ * options_.batch;
    for (std::int64_t step = 0; step < epoch_steps_; ++step) {
      const double loss = train_step(order.slice(0, step * stride + rank_, (step + 1) * stride, world_));
      loss_sum += loss;
      if (rank_ == 0 && step % 10 == 0 && isatty(STDERR_FILENO)) {
        std::fprintf(stderr, "\repoch %ld/%ld  step %ld/%ld  loss %.4f ", long(epoch), long(options_.epochs), long(step + 1),
                     long(epoch_steps_), loss);
      }
    }
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
            {"fingerprint", common_fingerprint()}};
  }

  std::int64_t images() const { return train_.count(); }
  std::int64_t steps() const { return steps_; }

 private:
  static Net seeded(std::uint64_t seed) {
    torch::manual_seed(seed);
    return Net();
  }

  std::vector<Parameter> described() const {
    std::vector<Parameter> parameters;
    for (const auto& item : net_.named_parameters()) {
      const auto sizes = item.value().sizes();
      parameters.push_back({item.key(), {sizes.begin(), sizes.end()}});
    }
    return parameters;
  }

  double train_step(const torch::Tensor& batch) {
    buckets_.zero();
    const torch::Tensor images = pixels(train_.images.index_select(0, batch));
    const torch::Tensor loss =
        torch::nn::functional::cross_entropy(net_.forward(images), train_.labels.index_select(0, batch).to(torch::kLong));
    loss.backward();
    buckets_.finish();
    sgd_.step(options_.lr * (1 - double(done_) / double(steps_)));
    ++done_;
    return loss.item<double>();
  }

  /// Share of the test images that are classified right; each rank takes every world-th.
  double accuracy() {
    const torch::NoGradGuard no_grad;
    const std::int64_t stride = world_ * 500;
    double right = 0;
    for (std::int64_t first = rank_; first < test_.count(); first += stride) {
      const std::int64_t last = std::min(test_.count(), first + stride);
      const torch::Tensor answers = net_.forward(pixels(test_.images.slice(0, first, last, world_))).argmax(1);
      right += (answers == test_.labels.slice(0, first, last, world_)).sum().item<double>();
    }
    return sum_over_ranks(right) / double(test_.count());
  }

  /// The hash of the parameters. @throws internal if it is not the same on all ranks.
  std::string common_fingerprint() const {
    const std::string own = fingerprint(net_);
    std::string all(own.size() * std::size_t(world_), '?');
    MPI_Allgather(own.data(), int(own.size()), MPI_CHAR, all.data(), int(own.size()), MPI_CHAR, MPI_COMM_WORLD);
    for (std::size_t r = 0; r < std::size_t(world_); ++r) {
      if (all.compare(r * own.size(), own.size(), own) != 0)
        fail(Errc::internal, "the replicas have diverged: rank " + std::to_string(r) + " has parameters " +
                                 all.substr(r * own.size(), own.size()) + ", this rank " + own);
    }
    return own;
  }

  const Options options_;
  const std::string source_;
  const int world_, rank_;
  Samples train_, test_;
  Config config_;
  Net net_;
  std::vector<torch::Tensor> parameters_;
  GradientReducer reducer_;
  Buckets buckets_;
  Sgd sgd_;
  std::int64_t epoch_steps_ = 0, steps_ = 0, done_ = 0;
  double seconds_ = 0;
};

[[noreturn]] void abort_all(int rank, const char* what) {
  std::fprintf(stderr, "thinwire_train: rank %d: %s\n", rank, what);
  std::fflush(stderr);
  MPI_Abort(MPI_COMM_WORLD, 1);
  std::_Exit(1);
}

void run(const Options& options, int rank, int argc, char** argv) {
  Dataset data = load_dataset(options.data);
  std::ofstream file;
  if (rank == 0 && !options.json.empty()) {  // a name that cannot be written is better known before the training
    file.open(options.json);
    if (!file.good()) fail(Errc::invalid_argument, options.json + ": cannot be written");
  }
  Trainer trainer(options, make_mpi(MPI_COMM_WORLD), data);
  // Caught while the trainer lives: after a failed call MPI may still write into its buckets, so nothing may be freed before the abort.
  try {
    int world = 0;
    MPI_Comm_size(MPI_COMM_WORLD, &world);
    if (rank == 0)
      std::printf("%s, %ld images, %d ranks, %ld steps, %s\n", data.source.c_str(), long(trainer.images()), world, long(trainer.steps()),
                  options.config.c_str());
    nlohmann::json rows = nlohmann::json::array();
    for (std::int64_t epoch = 1; epoch <= options.epochs; ++epoch) {
      const nlohmann::json row = trainer.epoch(epoch);
      rows.push_back(row);
      if (rank != 0) continue;
      const double wire = row["wire_bytes"], dense = row["dense_bytes"];
      std::printf("%sepoch %ld: loss %.4f, accuracy %.2f %%, %.1f MB sent per rank (dense %.1f), %.1f s\n",
                  isatty(STDERR_FILENO) ? "\r" : "", long(epoch), row["loss"].get<double>(), row["accuracy"].get<double>() * 100,
                  wire / 1e6, dense / 1e6, row["seconds"].get<double>());
      std::fflush(stdout);
    }
    if (file.is_open()) {
      std::string command = "thinwire_train";
      for (int i = 1; i < argc; ++i) command += std::string(" ") + argv[i];
      nlohmann::json machine = describe_machine();
      machine.update({{"link", nullptr}, {"batch", options.batch}, {"lr", options.lr}, {"torch", TORCH_VERSION}});
      file << nlohmann::json{{"command", command}, {"version", kVersion}, {"machine", machine}, {"rows", rows}}.dump(1) << '\n';
      file.close();
      THINWIRE_EXPECTS(!file.fail(), options.json + ": could not be written");
    }
  } catch (const std::exception& error) { abort_all(rank, error.what()); }
}

/// @returns the exit status: 2 for a command line or a config that is refused, equally on all ranks and before anything has begun.
int main_of_rank(int argc, char** argv, int rank) {
  CLI::App app{"Trains a small network on Fashion-MNIST, data parallel over MPI with compressed gradients.\nStart it with mpirun -np N."};
  Options options;
  declare(app, options);
  std::ostream silent(nullptr);
  try {
    app.parse(argc, argv);
    Config::parse(options.config);  // as it was given, so that the message speaks of nothing else
  } catch (const CLI::ParseError& error) {
    const int status = rank == 0 ? app.exit(error) : app.exit(error, silent, silent);
    return status == 0 ? 0 : 2;
  } catch (const Error& error) {
    if (rank == 0) std::fprintf(stderr, "thinwire_train: %s\n", error.what());
    return 2;
  }
  torch::set_num_threads(1);  // ranks share the machine's cores
  run(options, rank, argc, argv);
  return 0;
}

}  // namespace

}  // namespace thinwire::launch

int main(int argc, char** argv) {
  int provided = 0, rank = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  int status = 1;
  try {
    status = thinwire::launch::main_of_rank(argc, argv, rank);
  } catch (const std::exception& error) { thinwire::launch::abort_all(rank, error.what()); }
  MPI_Finalize();
  return status;
}
