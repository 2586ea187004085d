// kernels_gbench: each kernel over sizes, for a look at caches and tails; `--benchmark_filter` chooses. Names are
// <kernel>/<isa>/d:<density>/n:<elements>. bytes_per_second counts gradient bytes, so that codecs compare; numbers to report come from the
// paired program (docs/performance.md).

#include <benchmark/benchmark.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bench/kernels_cases.hpp"
#include "bench/kernels_sign.hpp"
#include "collectives/passengers.hpp"

namespace {

using namespace thinwire;
using namespace thinwire::bench;

/// 2^14 to 2^26 by 4 (2^18 floats are the first bucket of DDP), and a later bucket of 25 MB.
constexpr std::size_t kSizes[] = {1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 6553600};
constexpr double kDensities[] = {0.001, 0.01, 0.08};
constexpr Isa kIsas[] = {Isa::scalar, Isa::avx2, Isa::avx512};

/// Codec::take_back: what a bucket with a bad verdict sent goes back to the residual. Bytes: the payload, and every residual that it
/// touches, read and written.
template <class Sender>
class TakeBackKernel final : public Kernel {
 public:
  template <class Case>
  TakeBackKernel(const Case& what, Arrays& arrays) : sender_(what, arrays) {}
  std::string name() const override { return "take_back_" + sender_.name(); }
  std::size_t numel() const override { return sender_.numel(); }
  std::optional<double> claimed() const override { return sender_.claimed(); }
  std::optional<double> density() const override { return sender_.density(); }
  double bytes_per_element() const override {
    return double(sender_.payload().size) / double(numel()) + density().value_or(1) * 2 * sizeof(float);
  }
  void settle() override {
    sender_.settle();
    sender_.run(0);
  }
  void run(std::size_t) override {
    sender_.codec().take_back(sender_.recursion(), sender_.plan(), sender_.payload(), sender_.state(), nullptr, Stream::host());
  }

 private:
  Sender sender_;
};

/// sum_in_rank_order of what stays dense beside a payload. Bytes: all ranks' messages and the output once.
class RankSumKernel final : public Kernel {
 public:
  RankSumKernel(std::size_t ranks, DType dtype, Arrays& arrays) : ranks_(ranks), dtype_(dtype), arrays_(arrays) {
    for (std::size_t r = 0; r < ranks; ++r) {
      Buffer& message = storage_.emplace_back(numel() * size_of(dtype));
      const void* from = dtype == DType::bf16 ? static_cast<const void*>(arrays.grad_bf16(r)) : arrays.grad(r);
      std::memcpy(message.data(), from, numel() * size_of(dtype));
      messages_.push_back({message.data(), numel() * size_of(dtype), dtype, Place::host, 0});
    }
  }
  static std::string name_of(std::size_t ranks, DType dtype) { return "rank_sum_" + std::to_string(ranks) + "_" + to_string(dtype); }
  std::string name() const override { return name_of(ranks_, dtype_); }
  std::size_t numel() const override { return arrays_.numel(); }
  double bytes_per_element() const override { return double((ranks_ + 1) * size_of(dtype_)); }
  void run(std::size_t) override {
    std::uint32_t flags = 0;
    sum_in_rank_order(messages_, 1.0f / float(ranks_), {reinterpret_cast<std::byte*>(arrays_.out()), numel() * size_of(dtype_), dtype_},
                      &flags);
  }

 private:
  const std::size_t ranks_;
  const DType dtype_;
  Arrays& arrays_;
  std::vector<Buffer> storage_;
  std::vector<ConstBytes> messages_;
};

template <class Make>
void add(const std::string& name, std::size_t numel, Make make) {
  benchmark::RegisterBenchmark(name.c_str(), [numel, make](benchmark::State& state) {
    Arrays arrays(numel, Placement::arena);
    const std::unique_ptr<Kernel> kernel = make(arrays);
    kernel->settle();
    std::size_t repetition = 0;
    for (int i = 0; i < 3; ++i) kernel->run(repetition++);
    for (auto _ : state) kernel->run(repetition++);
    state.SetBytesProcessed(std::int64_t(state.iterations()) * std::int64_t(numel * sizeof(float)));
    if (const auto* stream = dynamic_cast<const StreamKernel*>(kernel.get())) {
      const double wire = double(stream->payload().size);
      state.counters["wire_B"] = wire;
      state.counters["factor"] = double(numel * sizeof(float)) / wire;
    }
    if (kernel->density()) state.counters["density"] = *kernel->density();
  })->Unit(benchmark::kMicrosecond);
}

std::string suffix(const char* isa, double density, std::size_t numel) {
  std::string text = std::string("/") + isa;
  if (density > 0) text += "/d:" + std::to_string(density).substr(0, 5);
  return text + "/n:" + std::to_string(numel);
}

void add_stream(const StreamCase& what, std::size_t numel) {
  add(what.name() + suffix(to_string(what.isa), what.density, numel), numel,
      [what](Arrays& arrays) -> std::unique_ptr<Kernel> { return std::make_unique<StreamKernel>(what, arrays); });
}

template <class Sender, class Case>
void add_take_back(const Case& what, double density, std::size_t numel) {
  add("take_back_" + what.name() + suffix(to_string(what.isa), density, numel), numel,
      [what](Arrays& arrays) -> std::unique_ptr<Kernel> { return std::make_unique<TakeBackKernel<Sender>>(what, arrays); });
}

void add_topk(double density, Isa isa, std::size_t numel) {
  for (const char* recursion : {"none", "ef14", "dgc"}) {
    StreamCase what{.recursion = recursion, .density = density, .isa = isa};
    for (const bool exact : {false, true}) {
      what.topk.exact = exact;
      add_stream(what, numel);
    }
    what.topk.exact = false;
    StreamCase grad = what, wire = what;
    grad.grad = DType::bf16;
    grad.variant = "bf16grad";
    add_stream(grad, numel);
    wire.topk.wire = DType::bf16;
    wire.variant = "bf16wire";
    add_stream(wire, numel);
    if (what.recursion != "none") add_take_back<StreamKernel>(what, density, numel);
  }
  for (const DType wire : {DType::fp32, DType::bf16}) {
    const std::string variant = wire == DType::fp32 ? "" : std::string("_") + to_string(wire) + "wire";
    add("decode_topk_8" + variant + suffix(to_string(isa), density, numel), numel,
        [=](Arrays& arrays) -> std::unique_ptr<Kernel> { return std::make_unique<DecodeKernel>(density, wire, 8, isa, arrays); });
  }
}

void add_all() {
  for (const std::size_t numel : kSizes) {
    for (const Isa isa : kIsas) {
      if (!cpu_supports(isa)) continue;
      for (const double density : kDensities) add_topk(density, isa, numel);
      for (const char* recursion : {"none", "ef14", "averaged_ef14"}) {
        const SignCase what{.recursion = recursion, .isa = isa};
        add(what.name() + suffix(to_string(isa), 0, numel), numel,
            [what](Arrays& arrays) -> std::unique_ptr<Kernel> { return std::make_unique<SignKernel>(what, arrays); });
        if (what.recursion == "ef14") add_take_back<SignKernel>(what, 0, numel);
      }
      add("decode_sign_8" + suffix(to_string(isa), 0, numel), numel,
          [isa](Arrays& arrays) -> std::unique_ptr<Kernel> { return std::make_unique<SignDecodeKernel>(8, isa, arrays); });
    }
    add("none_norms" + suffix("loader", 0, numel), numel,
        [](Arrays& arrays) -> std::unique_ptr<Kernel> { return std::make_unique<DenseKernel>(DenseKernel::What::norms, "none", arrays); });
    for (const DType dtype : {DType::fp32, DType::bf16}) {
      add(RankSumKernel::name_of(4, dtype) + suffix("loader", 0, numel), numel,
          [dtype](Arrays& arrays) -> std::unique_ptr<Kernel> { return std::make_unique<RankSumKernel>(4, dtype, arrays); });
    }
    for (const std::string recursion : {"none", "ef14", "dgc"}) {
      add(recursion + "_dense" + suffix("loader", 0, numel), numel, [recursion](Arrays& arrays) -> std::unique_ptr<Kernel> {
        return std::make_unique<DenseKernel>(DenseKernel::What::message, recursion, arrays);
      });
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  pin_this_thread();
  add_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
