// thinwire_bench_kernels_cuda: every kernel of a GPU beside device-to-device copy in the same repetitions.

#include <cuda_runtime_api.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <regex>
#include <string>
#include <vector>

#include "bench/kernels_cases.hpp"
#include "bench/kernels_data.hpp"
#include "compressors/core/device.hpp"
#include "compressors/core/error.hpp"
#include "compressors/topk/topk_cuda.hpp"

namespace thinwire::bench {
namespace {

constexpr int kDevice = 0;

void check(cudaError_t error) {
  if (error != cudaSuccess) fail(Errc::device, cudaGetErrorString(error));
}

/// What is measured: enqueues one run.
struct Case {
  std::string name;
  std::size_t numel = 0;
  std::function<void(std::size_t repetition)> run;
  std::function<void()> settle = [] {};       ///< before the first repetition
  std::function<double()> bytes_per_element;  ///< after the last one
  std::function<std::optional<double>()> density = [] { return std::nullopt; };
};

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

/// Pairs of events around calls on one stream.
class Timer {
 public:
  explicit Timer(Stream stream) : stream_(stream) {
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
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

/// The arrays of one step in device memory, as bench::Arrays has them on the host: a gradient through a window that slides.
class DeviceArrays {
 public:
  DeviceArrays(std::size_t numel, Stream stream) : numel_(numel), stream_(stream) {
    const std::size_t bytes = 4 * (numel + Arrays::kSlack);
    for (DeviceBuffer* buffer : {&grad_, &momentum_, &residual_, &from_, &out_}) buffer->reserve(bytes, kDevice);
    half_.reserve(bytes / 2, kDevice);
    std::vector<float> host(numel + Arrays::kSlack);
    fill_normal(host.data(), host.size(), 1.0f, 1);
    device_copy(grad_.data(), host.data(), bytes, stream);
    device_copy(from_.data(), host.data(), bytes, stream);
    device_wait(stream);
    std::vector<std::uint16_t> half(host.size());
    std::transform(host.begin(), host.end(), half.begin(), [](float x) { return float_to_bf16(x); });
    device_copy(half_.data(), half.data(), bytes / 2, stream);
    device_wait(stream);
  }
  ConstBytes grad(std::size_t repetition, DType dtype, std::size_t numel) const {
    const std::size_t at = repetition * Arrays::kSlide % Arrays::kSlack;
    const std::byte* base = dtype == DType::fp32 ? grad_.data() : half_.data();
    return {base + at * size_of(dtype), numel * size_of(dtype), dtype, Place::cuda, kDevice};
  }
  /// As Arrays::settle: momentum of many steps, a residual of which the share `density` crosses the threshold next.
  void settle(const Recursion& recursion, double density) {
    const bool momentum = recursion.kind == Recursion::Kind::momentum_correction;
    const float sigma = momentum ? 1.0f / std::sqrt(1.0f - recursion.momentum * recursion.momentum) : 1.0f;
    std::vector<float> host(numel_);
    fill_normal(host.data(), numel_, sigma, 2);
    device_copy(momentum_.data(), host.data(), 4 * numel_, stream_);
    device_wait(stream_);
    fill_uniform(host.data(), numel_, float(0.8 * sigma / (2 * density)), 3);
    device_copy(residual_.data(), host.data(), 4 * numel_, stream_);
    device_wait(stream_);
  }
  std::size_t numel() const { return numel_; }
  float* momentum() const { return reinterpret_cast<float*>(momentum_.data()); }
  float* residual() const { return reinterpret_cast<float*>(residual_.data()); }
  std::byte* from() const { return from_.data(); }
  std::byte* out() const { return out_.data(); }
  Stream stream() const { return stream_; }

 private:
  std::size_t numel_;
  Stream stream_;
  DeviceBuffer grad_, momentum_, residual_, from_, out_, half_;
};

/// Codec::stream of a plan, and what it leaves.
class Streamed {
 public:
  Streamed(DeviceArrays& arrays, const std::string& recursion, double density, bool exact, DType grad, std::vector<std::size_t> layers)
      : arrays_(arrays), recursion_(recursion_named(recursion)), density_(density), grad_(grad), exact_(exact) {
    TopKOptions options;
    options.density = density;
    options.exact = exact;
    codec_ = make_topk_cuda(options);
    if (layers.empty()) layers = {arrays.numel()};
    for (const std::size_t count : layers) {
      Segment segment;
      segment.parameter = std::uint32_t(segments_.size());
      segment.first = numel_;
      segment.count = count;
      segment.setting.density = density;
      segments_.push_back(segment);
      numel_ += count;
    }
    part_end_ = std::uint32_t(segments_.size());
    memory_.reserve(4 * segments_.size(), kDevice);
    kept_.reserve(4 * segments_.size(), kDevice);
    flags_.reserve(4, kDevice);
    device_clear(memory_.bytes(), arrays.stream());
    device_clear(flags_.bytes(), arrays.stream());
    std::size_t at = 0;
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      SegmentState& state = states_.emplace_back();
      if (recursion_.kind == Recursion::Kind::error_feedback) state.array = {arrays.residual() + at, nullptr};
      if (recursion_.kind == Recursion::Kind::momentum_correction) state.array = {arrays.momentum() + at, arrays.residual() + at};
      if (!exact) state.memory = reinterpret_cast<float*>(memory_.data()) + s;
      at += round_up(segments_[s].count, 16);  // as a reducer places it; Arrays::kSlack has room for what that adds
    }
    plan_ = {segments_, {&part_end_, 1}, 0};
    layout_ = codec_->layout(plan_);
    workspace_.reserve(std::max(layout_.workspace, kPayloads * layout_.per_payload), kDevice);
    wire_.reserve(kPayloads * round_up(layout_.part_capacity, 64), kDevice);
    std::vector<std::byte> table(codec_->table_bytes(plan_));
    codec_->tabulate(recursion_, plan_, states_, table.data());
    table_.reserve(table.size(), kDevice);
    device_copy(table_.data(), table.data(), table.size(), arrays.stream());
    device_wait(arrays.stream());
    plan_.table = {table_.data(), table.size(), DType::u8, Place::cuda, kDevice};
  }
  void settle() { arrays_.settle(recursion_, density_); }
  void run(std::size_t repetition, std::size_t slot = 0) {
    codec_->stream(recursion_, plan_, arrays_.grad(repetition, grad_, numel_), {states_, nullptr}, workspace_.bytes(), wire(slot),
                   reinterpret_cast<std::uint32_t*>(flags_.data()), {reinterpret_cast<std::uint32_t*>(kept_.data()), nullptr},
                   arrays_.stream());
  }
  void decode(int payloads) {
    std::vector<ConstBytes> wires;
    for (int r = 0; r < payloads; ++r) wires.push_back(wire(std::size_t(r)));
    codec_->decode(plan_, wires, 1.0f / float(payloads), workspace_.bytes(), {arrays_.out(), 4 * numel_, DType::fp32, Place::cuda, kDevice},
                   reinterpret_cast<std::uint32_t*>(flags_.data()), arrays_.stream());
  }
  std::optional<double> density() const {
    std::vector<std::uint32_t> kept(segments_.size());
    device_copy(kept.data(), kept_.data(), 4 * kept.size(), arrays_.stream());
    device_wait(arrays_.stream());
    std::size_t sum = 0;
    for (const std::uint32_t k : kept) sum += k;
    return double(sum) / double(numel_);
  }
  /// The minimum: gradient and state once each way, and the entries.
  double bytes_per_element() const {
    const double state = recursion_.kind == Recursion::Kind::none ? 0 : recursion_.kind == Recursion::Kind::error_feedback ? 8 : 16;
    return double(size_of(grad_)) + state + *density() * entry_bytes();
  }
  double entry_bytes() const { return 6; }  // u16 offsets and fp32 values at these densities
  std::size_t numel() const { return numel_; }

  static constexpr std::size_t kPayloads = 8;

 private:
  Bytes wire(std::size_t slot) const {
    return {wire_.data() + slot * round_up(layout_.part_capacity, 64), layout_.part_capacity, DType::u8, Place::cuda, kDevice};
  }

  DeviceArrays& arrays_;
  Recursion recursion_;
  double density_;
  DType grad_;
  bool exact_;
  std::unique_ptr<const Codec> codec_;
  std::vector<Segment> segments_;
  std::uint32_t part_end_ = 0;
  std::vector<SegmentState> states_;
  std::size_t numel_ = 0;
  Plan plan_;
  WireLayout layout_;
  DeviceBuffer memory_, kept_, flags_, workspace_, wire_, table_;
};

Case stream_case(DeviceArrays& arrays, const std::string& recursion, double density, bool exact = false, DType grad = DType::fp32,
                 std::vector<std::size_t> layers = {}, const std::string& variant = "") {
  // Made when it is measured: workspaces of all cases together would not fit.
  auto streamed = std::make_shared<std::unique_ptr<Streamed>>();
  Case out;
  char text[32];
  std::snprintf(text, sizeof text, "/%g", density);
  out.name = recursion + "_topk_" + (exact ? "exact" : "sampled") + (grad == DType::fp32 ? "" : "_bf16grad") + variant + text;
  out.numel = arrays.numel();
  if (!layers.empty()) {
    out.numel = 0;
    for (const std::size_t n : layers) out.numel += n;
  }
  out.settle = [=, &arrays] {
    *streamed = std::make_unique<Streamed>(arrays, recursion, density, exact, grad, layers);
    (*streamed)->settle();
  };
  out.run = [=](std::size_t repetition) { (*streamed)->run(repetition); };
  out.bytes_per_element = [=] { return (*streamed)->bytes_per_element(); };
  out.density = [=] { return (*streamed)->density(); };
  return out;
}

Case decode_case(DeviceArrays& arrays, double density) {
  auto streamed = std::make_shared<std::unique_ptr<Streamed>>();
  Case out;
  char text[32];
  std::snprintf(text, sizeof text, "/%g", density);
  out.name = std::string("decode_topk_8") + text;
  out.numel = arrays.numel();
  out.settle = [=, &arrays] {
    *streamed = std::make_unique<Streamed>(arrays, "ef14", density, false, DType::fp32, std::vector<std::size_t>{});
    (*streamed)->settle();
    for (std::size_t r = 0; r < Streamed::kPayloads; ++r) (*streamed)->run(r, r);
  };
  out.run = [=](std::size_t) { (*streamed)->decode(int(Streamed::kPayloads)); };
  out.density = [=] { return (*streamed)->density(); };
  out.bytes_per_element = [=] { return 4 + double(Streamed::kPayloads) * *(*streamed)->density() * (*streamed)->entry_bytes(); };
  return out;
}

std::vector<Case> all_cases(DeviceArrays& arrays) {
  std::vector<Case> out;
  for (const char* recursion : {"dgc", "ef14", "none"})
    for (const double density : {0.001, 0.01, 0.08}) out.push_back(stream_case(arrays, recursion, density));
  for (const char* recursion : {"dgc", "ef14", "none"}) out.push_back(stream_case(arrays, recursion, 0.01, true));
  for (const char* recursion : {"dgc", "ef14"}) out.push_back(stream_case(arrays, recursion, 0.01, false, DType::bf16));
  std::size_t resnet50 = 0;
  for (const std::size_t count : resnet50_layers()) resnet50 += count;
  if (arrays.numel() >= resnet50) {
    out.push_back(stream_case(arrays, "dgc", 0.01, false, DType::fp32, {resnet50}, "_resnet50_flat"));
    out.push_back(stream_case(arrays, "dgc", 0.01, false, DType::fp32, resnet50_layers(), "_resnet50"));
  }
  for (const double density : {0.001, 0.01, 0.08}) out.push_back(decode_case(arrays, density));
  return out;
}

Row measure(Case& what, DeviceArrays& arrays, std::size_t repetitions) {
  const Stream stream = arrays.stream();
  Timer timer(stream);
  const auto copy = [&] { device_copy(arrays.out(), arrays.from(), 4 * arrays.numel(), stream); };
  what.settle();
  for (std::size_t warm = 0; warm < 3; ++warm) what.run(warm);  // thresholds are carried from the second step on
  copy();
  std::vector<double> seconds, ratios;
  const double copied = 8.0 * double(arrays.numel());
  std::vector<double> own;
  for (std::size_t repetition = 0; repetition < repetitions; ++repetition) {
    const double a = timer.seconds([&] { what.run(repetition + 3); }), b = timer.seconds(copy);
    seconds.push_back(a);
    own.push_back(b);
  }
  const double bytes = what.bytes_per_element() * double(what.numel);
  for (std::size_t i = 0; i < repetitions; ++i) ratios.push_back((bytes / seconds[i]) / (copied / own[i]));
  return {what.name,
          what.numel,
          what.density(),
          what.bytes_per_element(),
          median(seconds),
          *std::min_element(seconds.begin(), seconds.end()),
          bytes / median(seconds) * 1e-9,
          median(ratios)};
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
  std::size_t numel = std::size_t(64) << 20, repetitions = 15;
  std::string filter, file;
  CLI::App app("Every kernel of GPU 0 beside device-to-device copy: medians of the ratios of paired repetitions.");
  app.add_option("--numel", numel, "elements of the arrays; below 64 Mi caches help")
      ->check(CLI::Range(std::size_t(1), std::size_t(1) << 31))
      ->capture_default_str();
  app.add_option("--reps", repetitions, "repetitions; fewer than 9 are noise")
      ->check(CLI::Range(std::size_t(1), std::size_t(100000)))
      ->capture_default_str();
  app.add_option("--filter", filter, "only kernels whose <name>/<density> this regular expression finds");
  app.add_option("--json", file, "where to write {\"device\": ..., \"rows\": [...]}");
  CLI11_PARSE(app, argc, argv);
  if (device_count() == 0) {
    std::fprintf(stderr, "there is no GPU\n");
    return 1;
  }
  const std::regex pattern(filter);
  const std::string device = describe_device(kDevice);
  std::printf("%s; %zu elements, %zu repetitions\n\n", device.c_str(), numel, repetitions);
  std::printf("%-34s %8s %7s %9s %9s %8s %8s\n", "kernel", "density%", "B/elem", "ms", "ms best", "GB/s", "x copy");
  const DeviceStream stream(kDevice);
  DeviceArrays arrays(numel, stream.get());
  nlohmann::json rows = nlohmann::json::array();
  std::optional<double> flat;
  for (Case& what : all_cases(arrays)) {
    if (!std::regex_search(what.name, pattern)) continue;
    const Row row = measure(what, arrays, repetitions);
    what = {};  // its workspace goes
    std::printf("%-34s %8.3f %7.2f %9.3f %9.3f %8.0f %8.2f\n", row.kernel.c_str(), row.density.value_or(0) * 100, row.bytes_per_element,
                row.seconds_median * 1e3, row.seconds_min * 1e3, row.gb_per_s, row.ratio_memcpy);
    std::fflush(stdout);
    rows.push_back(json_of(row));
    if (row.kernel.find("resnet50_flat") != std::string::npos) flat = row.seconds_median;
    if (row.kernel.find("resnet50/") != std::string::npos && flat)
      std::printf("  161 ResNet-50 layers against one flat array, time: %.3fx\n", row.seconds_median / *flat);
  }
  if (file.empty()) return 0;
  std::ofstream out(file);
  out << nlohmann::json{{"device", device}, {"rows", rows}}.dump(1) << "\n";
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
