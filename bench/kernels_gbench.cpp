// kernels_gbench: each kernel over sizes, for a look at caches and tails; `--benchmark_filter` chooses. Names are
// <kernel>/<isa>/d:<density>/n:<elements>. bytes_per_second counts gradient bytes, so that codecs compare; numbers to report come from the
// paired program (docs/performance.md).

#include <benchmark/benchmark.h>

#include <memory>
#include <string>

#include "bench/kernels_cases.hpp"
#include "bench/kernels_sign.hpp"

namespace {

using namespace thinwire;
using namespace thinwire::bench;

/// 2^14 to 2^26 by 4 (2^18 floats are the first bucket of DDP), and a later bucket of 25 MB.
constexpr std::size_t kSizes[] = {1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 6553600};
constexpr double kDensities[] = {0.001, 0.01, 0.08};
constexpr Isa kIsas[] = {Isa::scalar, Isa::avx2, Isa::avx512};

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

void add_stream(const char* recursion, bool exact, double density, Isa isa, std::size_t numel) {
  StreamCase what;
  what.recursion = recursion;
  what.density = density;
  what.topk.exact = exact;
  what.isa = isa;
  add(std::string(recursion) + "_topk_" + (exact ? "exact" : "sampled") + suffix(to_string(isa), density, numel), numel,
      [what](Arrays& arrays) -> std::unique_ptr<Kernel> { return std::make_unique<StreamKernel>(what, arrays); });
}

void add_all() {
  for (const std::size_t numel : kSizes) {
    for (const Isa isa : kIsas) {
      if (!cpu_supports(isa)) continue;
      for (const double density : kDensities) {
        for (const char* recursion : {"none", "ef14", "dgc"}) {
          for (const bool exact : {false, true}) add_stream(recursion, exact, density, isa, numel);
        }
        add("decode_topk_8" + suffix(to_string(isa), density, numel), numel, [=](Arrays& arrays) -> std::unique_ptr<Kernel> {
          return std::make_unique<DecodeKernel>(density, DType::fp32, 8, isa, arrays);
        });
      }
      for (const char* recursion : {"none", "ef14", "averaged_ef14"}) {
        const SignCase what{.recursion = recursion, .isa = isa};
        add(what.name() + suffix(to_string(isa), 0, numel), numel,
            [what](Arrays& arrays) -> std::unique_ptr<Kernel> { return std::make_unique<SignKernel>(what, arrays); });
      }
      add("decode_sign_8" + suffix(to_string(isa), 0, numel), numel,
          [isa](Arrays& arrays) -> std::unique_ptr<Kernel> { return std::make_unique<SignDecodeKernel>(8, isa, arrays); });
    }
    add("none_norms" + suffix("loader", 0, numel), numel,
        [](Arrays& arrays) -> std::unique_ptr<Kernel> { return std::make_unique<DenseKernel>(DenseKernel::What::norms, "none", arrays); });
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
