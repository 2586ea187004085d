// thinwire_train: data-parallel training in C++, LibTorch over Open MPI, no Python; on GPUs MPI starts the ranks and NCCL carries the
// gradients. Same data, network, options and arithmetic as launch/train_rank.py.

#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <mpi.h>
#include <torch/types.h>
#include <torch/version.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>
#include <string>

#include "compressors/core/device.hpp"
#include "compressors/core/registry.hpp"
#include "launch/trainer/gpu.hpp"
#include "launch/trainer/idx.hpp"
#include "launch/trainer/machine.hpp"
#include "launch/trainer/options.hpp"
#include "launch/trainer/trainer.hpp"
#include "thinwire/thinwire.hpp"

namespace thinwire::launch {

namespace {

[[noreturn]] void abort_all(int rank, const char* what) {
  std::fprintf(stderr, "thinwire_train: rank %d: %s\n", rank, what);
  std::fflush(stderr);
  MPI_Abort(MPI_COMM_WORLD, 1);
  std::_Exit(1);
}

void show(const nlohmann::json& row) {
  const double wire = row["wire_bytes"], dense = row["dense_bytes"];
  std::printf("%sepoch %ld: loss %.4f, accuracy %.2f %%, %.1f MB sent per rank (dense %.1f), %.1f s\n", isatty(STDERR_FILENO) ? "\r" : "",
              row["epoch"].get<long>(), row["loss"].get<double>(), row["accuracy"].get<double>() * 100, wire / 1e6, dense / 1e6,
              row["seconds"].get<double>());
  std::fflush(stdout);
}

void run(const Options& options, torch::Device device, int rank, const std::string& command) {
  const c10::DeviceGuard on(device);
  Dataset data = load_dataset(options.data);
  std::ofstream file;
  if (rank == 0 && !options.json.empty()) {  // a name that cannot be written is better known before the training
    file.open(options.json);
    if (!file.good()) fail(Errc::invalid_argument, options.json + ": cannot be written");
  }
  const std::chrono::milliseconds limit(std::int64_t(options.timeout * 1e3));
  Trainer trainer(options, device.is_cuda() ? make_gpu_group(device.index(), limit) : make_mpi(MPI_COMM_WORLD), data, device);
  // Caught while the trainer lives: after a failed call MPI may still write into its buckets, so nothing may be freed before the abort.
  try {
    int world = 0;
    MPI_Comm_size(MPI_COMM_WORLD, &world);
    const std::string gpu = device.is_cuda() ? describe_device(device.index()) : std::string();
    if (rank == 0)
      std::printf("%s, %ld images, %d ranks%s, %ld steps, %s\n", data.source.c_str(), long(trainer.images()), world,
                  gpu.empty() ? "" : (" on " + gpu).c_str(), long(trainer.steps()), options.config.c_str());
    nlohmann::json rows = nlohmann::json::array();
    for (std::int64_t epoch = 1; epoch <= options.epochs; ++epoch) {
      rows.push_back(trainer.epoch(epoch));
      if (rank == 0) show(rows.back());
    }
    if (file.is_open()) {
      nlohmann::json machine = describe_machine();
      machine.update({{"link", nullptr},
                      {"batch", options.batch},
                      {"optimizer", uses_adam(options, Config::parse(options.config)) ? "adam" : "sgd"},
                      {"lr", learning_rate(options, Config::parse(options.config))},
                      {"torch", TORCH_VERSION}});
      if (!gpu.empty()) machine["gpu"] = gpu;
      file << nlohmann::json{{"command", command}, {"version", kVersion}, {"machine", machine}, {"rows", rows}}.dump(1) << '\n';
      file.close();
      THINWIRE_EXPECTS(!file.fail(), options.json + ": could not be written");
    }
  } catch (const std::exception& error) { abort_all(rank, error.what()); }
}

/// The device that the options ask for, or nothing if a rank cannot have it: the first of those says why, all know it.
std::optional<torch::Device> pick_device(const Options& options, int rank) {
  if (options.device == "cpu") return torch::Device(torch::kCPU);
  const GpuChoice gpu = choose_gpu();
  int world = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &world);
  int first = gpu.refusal.empty() ? world : rank;
  MPI_Allreduce(MPI_IN_PLACE, &first, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
  if (first == world) return torch::Device(torch::kCUDA, c10::DeviceIndex(gpu.device));
  if (first == rank) std::fprintf(stderr, "thinwire_train: --device cuda: rank %d: %s\n", rank, gpu.refusal.c_str());
  return std::nullopt;
}

/// @returns the exit status: 2 for a command line, a config or a device that is refused, equally on all ranks and before anything has
/// begun.
int main_of_rank(int argc, char** argv, int rank) {
  CLI::App app{
      "Trains a small network on Fashion-MNIST, data parallel over MPI (on GPUs: NCCL) with compressed gradients.\nStart it with mpirun "
      "-np N."};
  Options options;
  declare(app, options);
  std::ostream silent(nullptr);
  try {
    app.parse(argc, argv);
    const Config config = Config::parse(options.config);  // as it was given, so that the message speaks of nothing else
    check_optimizer(options, config);
    for (const std::string& text : rank == 0 ? grammar::warnings(config) : std::vector<std::string>())
      std::fprintf(stderr, "thinwire_train: warning: %s\n", text.c_str());
  } catch (const CLI::ParseError& error) {
    const int status = rank == 0 ? app.exit(error) : app.exit(error, silent, silent);
    return status == 0 ? 0 : 2;
  } catch (const Error& error) {
    if (rank == 0) std::fprintf(stderr, "thinwire_train: %s\n", error.what());
    return 2;
  }
  const std::optional<torch::Device> device = pick_device(options, rank);
  if (!device) return 2;
  at::set_num_threads(1);  // ranks share the machine's cores
  std::string command = "thinwire_train";
  for (int i = 1; i < argc; ++i) command += std::string(" ") + argv[i];
  run(options, *device, rank, command);
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
