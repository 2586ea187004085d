// thinwire_bench_kernels_cuda: every kernel of a GPU beside device-to-device copy in the same repetitions.

#include <cuda_runtime.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <regex>
#include <string>
#include <utility>
#include <vector>

#include "bench/kernels_cuda_cases.hpp"
#include "compressors/core/device.hpp"
#include "compressors/core/error.hpp"

namespace thinwire::bench {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) fail(Errc::device, cudaGetErrorString(error));
}

struct Row {
  std::string kernel;
  std::size_t numel;
  std::optional<double> density;
  double bytes_per_element, seconds_median, seconds_min, gb_per_s, ratio_memcpy;
};

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x[x.size() / 2];
}

/// Pairs of events around calls on one stream. `fill` keeps the device busy while the host enqueues, so that no launch is waited for
/// between the events.
class Timer {
 public:
  Timer(Stream stream, std::function<void()> fill) : stream_(stream), fill_(std::move(fill)) {
    check(cudaEventCreate(&begin_));
    check(cudaEventCreate(&end_));
  }
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  template <class Run>
  double seconds(Run&& run) {
    fill_();
    check(cudaEventRecord(begin_, stream_.get()));
    run();
    check(cudaEventRecord(end_, stream_.get()));
    check(cudaEventSynchronize(end_));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin_, end_));
    return milliseconds * 1e-3;
  }

 private:
  Stream stream_;
  std::function<void()> fill_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

/// The rows of a group; `ratio`: the median over the repetitions of the last case's time by the first's.
std::vector<Row> measure(DeviceGroup& group, DeviceArrays& arrays, std::size_t repetitions, double* ratio) {
  const Stream stream = arrays.stream();
  const auto copy = [&] { device_copy(arrays.out(), arrays.from(), 4 * arrays.numel(), stream); };
  Timer timer(stream, [&] {
    // .1 ms at 5 TB/s, and longer than the host needs for the launches of any case.
    constexpr std::size_t kFilled = std::size_t(64) << 20, kMost = 16;
    const std::size_t copies = std::min(kMost, (kFilled + arrays.numel() - 1) / arrays.numel());
    for (std::size_t i = 0; i < copies; ++i) copy();
  });
  for (Case& one : group.cases) one.settle();
  constexpr std::size_t kWarm = 3;  // thresholds are carried from the second step on
  for (std::size_t warm = 0; warm < kWarm; ++warm)
    for (Case& one : group.cases) one.run(warm);
  copy();
  std::vector<std::vector<double>> seconds(group.cases.size());
  std::vector<double> copying, paired;
  for (std::size_t repetition = 0; repetition < repetitions; ++repetition) {
    for (std::size_t i = 0; i < group.cases.size(); ++i)
      seconds[i].push_back(timer.seconds([&] { group.cases[i].run(repetition + kWarm); }));
    copying.push_back(timer.seconds(copy));
    paired.push_back(seconds.back().back() / seconds.front().back());
  }
  *ratio = median(paired);
  std::vector<Row> rows;
  for (std::size_t i = 0; i < group.cases.size(); ++i) {
    const Case& one = group.cases[i];
    const double per_element = one.bytes_per_element(), bytes = per_element * double(one.numel), copied = 8.0 * double(arrays.numel());
    std::vector<double> ratios;
    for (std::size_t r = 0; r < repetitions; ++r) ratios.push_back((bytes / seconds[i][r]) / (copied / copying[r]));
    const double middle = median(seconds[i]);
    rows.push_back({one.name, one.numel, one.density(), per_element, middle, *std::min_element(seconds[i].begin(), seconds[i].end()),
                    bytes / middle * 1e-9, median(ratios)});
  }
  return rows;
}

nlohmann::json json_of(const Row& row) {
  return {{"kernel", row.kernel.substr(0, row.kernel.find('/'))},
          {"isa", nullptr},
          {"backend", "cuda"},
          {"numel", row.numel},
          {"density", row.density ? nlohmann::json(*row.density) : nlohmann::json()},
          {"bytes_per_element", row.bytes_per_element},
          {"seconds_median", row.seconds_median},
          {"seconds_min", row.seconds_min},
          {"gb_per_s", row.gb_per_s},
          {"ratio_memcpy", row.ratio_memcpy},
          {"ratio_axpy", nullptr}};
}

int run(int argc, char** argv) {
  // A pass of 64 Mi elements ends in a third of a millisecond, of which its beginning and end are a part that is seen.
  constexpr std::size_t kMany = std::size_t(256) << 20, kFew = std::size_t(64) << 20, kRoom = std::size_t(16) << 30;
  std::size_t numel = kMany, repetitions = 15;
  std::string filter, file;
  CLI::App app("Every kernel of GPU 0 beside device-to-device copy: medians of the ratios of paired repetitions.");
  CLI::Option* const given =
      app.add_option("--numel", numel, "elements of the arrays; below 64 Mi caches help. The default is 64 Mi where 16 GiB are not free")
          ->check(CLI::Range(std::size_t(1), std::size_t(1) << 31))
          ->capture_default_str();
  app.add_option("--reps", repetitions, "repetitions; fewer than 9 are noise")
      ->check(CLI::Range(std::size_t(1), std::size_t(100000)))
      ->capture_default_str();
  app.add_option("--filter", filter, "only groups with a kernel whose <name>/<density> this regular expression finds");
  app.add_option("--json", file, "where to write {\"device\": ..., \"rows\": [...], \"pairs\": [...]}");
  CLI11_PARSE(app, argc, argv);
  if (device_count() == 0) {
    std::fprintf(stderr, "there is no GPU\n");
    return 1;
  }
  if (given->count() == 0 && device_free_memory(kDevice) < kRoom) numel = kFew;
  const std::regex pattern(filter);
  const std::string device = describe_device(kDevice);
  std::printf("%s; %zu elements, %zu repetitions\n\n", device.c_str(), numel, repetitions);
  std::printf("%-34s %8s %7s %9s %9s %8s %8s\n", "kernel", "density%", "B/elem", "ms", "ms best", "GB/s", "x copy");
  const DeviceStream stream(kDevice);
  DeviceArrays arrays(numel, stream.get());
  nlohmann::json rows = nlohmann::json::array(), pairs = nlohmann::json::array();
  for (DeviceGroup& group : all_device_groups(arrays)) {
    if (std::none_of(group.cases.begin(), group.cases.end(), [&](const Case& one) { return std::regex_search(one.name, pattern); }))
      continue;
    double ratio = 0;
    for (const Row& row : measure(group, arrays, repetitions, &ratio)) {
      std::printf("%-34s %8.3f %7.2f %9.3f %9.3f %8.0f %8.2f\n", row.kernel.c_str(), row.density.value_or(0) * 100, row.bytes_per_element,
                  row.seconds_median * 1e3, row.seconds_min * 1e3, row.gb_per_s, row.ratio_memcpy);
      rows.push_back(json_of(row));
    }
    if (!group.pair.empty()) {
      std::printf("  %s, time: %.3fx\n", group.pair.c_str(), ratio);
      pairs.push_back({{"pair", group.pair}, {"ratio", ratio}});
    }
    std::fflush(stdout);
    group = {};  // its workspaces go
  }
  if (file.empty()) return 0;
  std::ofstream out(file);
  out << nlohmann::json{{"device", device}, {"rows", rows}, {"pairs", pairs}}.dump(1) << "\n";
  if (!out) {
    std::fprintf(stderr, "cannot write %s\n", file.c_str());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace thinwire::bench

int main(int argc, char** argv) {
  try {
    return thinwire::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
