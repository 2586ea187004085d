#include "bench/kernels_pairing.hpp"

#include <sched.h>

#include <algorithm>
#include <cstring>
#include <ctime>

#include "compressors/core/clones.hpp"

namespace thinwire::bench {
namespace {

constexpr int kWarmup = 3;  // a sampled threshold has settled after two steps

THINWIRE_CLONES void axpy_in_place(float a, const float* x, float* y, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) y[i] += a * x[i];
}

}  // namespace

void References::copy() { std::memcpy(arrays.out(), arrays.from(), arrays.numel() * sizeof(float)); }
void References::axpy() { axpy_in_place(0.125f, arrays.from(), arrays.out(), arrays.numel()); }

double seconds_of(const std::function<void()>& call) {
  const auto now = [] {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return double(time.tv_sec) + double(time.tv_nsec) * 1e-9;
  };
  const double start = now();
  call();
  return now() - start;
}

double median(std::vector<double> values) {
  const std::size_t half = values.size() / 2;
  std::nth_element(values.begin(), values.begin() + std::ptrdiff_t(half), values.end());
  if (values.size() % 2 == 1) return values[half];
  return (values[half] + *std::max_element(values.begin(), values.begin() + std::ptrdiff_t(half))) / 2;
}

std::vector<Row> measure(const std::vector<Kernel*>& group, References& references, std::size_t repetitions) {
  for (Kernel* kernel : group) kernel->settle();
  for (int i = 0; i < kWarmup; ++i) {
    for (Kernel* kernel : group) kernel->run(std::size_t(i));
    references.copy();
    references.axpy();
  }
  const double n = double(references.arrays.numel());
  struct Samples {
    std::vector<double> seconds, to_copy, to_axpy, to_first;
    double density = 0, bytes = 0;
  };
  std::vector<Samples> samples(group.size());
  for (std::size_t r = 0; r < repetitions; ++r) {
    for (std::size_t k = 0; k < group.size(); ++k) {
      samples[k].seconds.push_back(seconds_of([&] { group[k]->run(kWarmup + r); }));
      samples[k].density += group[k]->density().value_or(0) / double(repetitions);
      samples[k].bytes += group[k]->bytes_per_element() / double(repetitions);
    }
    const double copy_rate = References::kCopyBytes * n / seconds_of([&] { references.copy(); });
    const double axpy_rate = References::kAxpyBytes * n / seconds_of([&] { references.axpy(); });
    for (std::size_t k = 0; k < group.size(); ++k) {
      const double rate = group[k]->bytes_per_element() * double(group[k]->numel()) / samples[k].seconds[r];
      samples[k].to_copy.push_back(rate / copy_rate);
      samples[k].to_axpy.push_back(rate / axpy_rate);
      samples[k].to_first.push_back(samples[k].seconds[r] / samples[0].seconds[r]);
    }
  }
  std::vector<Row> rows;
  for (std::size_t k = 0; k < group.size(); ++k) {
    Row row;
    row.kernel = group[k]->name();
    row.isa = group[k]->isa();
    row.numel = group[k]->numel();
    row.claimed = group[k]->claimed();
    if (group[k]->density()) row.density = samples[k].density;
    row.bytes_per_element = samples[k].bytes;
    row.seconds_median = median(samples[k].seconds);
    row.seconds_min = *std::min_element(samples[k].seconds.begin(), samples[k].seconds.end());
    row.gb_per_s = row.bytes_per_element * double(row.numel) / row.seconds_median * 1e-9;
    row.ratio_memcpy = median(samples[k].to_copy);
    row.ratio_axpy = median(samples[k].to_axpy);
    row.time_to_first = median(samples[k].to_first);
    rows.push_back(std::move(row));
  }
  return rows;
}

namespace {

/// A reference as a kernel: measured beside itself, its ratio is the noise of the run.
class Reference final : public Kernel {
 public:
  Reference(References& references, bool copy) : references_(references), copy_(copy) {}
  std::string name() const override { return copy_ ? "memcpy" : "axpy"; }
  std::size_t numel() const override { return references_.arrays.numel(); }
  double bytes_per_element() const override { return copy_ ? References::kCopyBytes : References::kAxpyBytes; }
  void run(std::size_t) override { copy_ ? references_.copy() : references_.axpy(); }

 private:
  References& references_;
  bool copy_;
};

}  // namespace

std::vector<Row> measure_references(References& references, std::size_t repetitions) {
  Reference copy(references, true), axpy(references, false);
  return measure({&copy, &axpy}, references, repetitions);
}

int pin_this_thread() {
  const int cpu = sched_getcpu();
  if (cpu < 0) return -1;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(std::size_t(cpu), &set);
  return sched_setaffinity(0, sizeof set, &set) == 0 ? cpu : -1;
}

}  // namespace thinwire::bench
