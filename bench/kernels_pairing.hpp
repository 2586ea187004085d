#pragma once
// Paired measurement: on a shared machine bandwidth moves by the minute, so a kernel is judged against references that run beside it in the
// same repetition.

#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "bench/kernels_data.hpp"

namespace thinwire::bench {

/// One thing to time. `bytes_per_element` counts the least bytes that it must read and write, entries included.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual std::string name() const = 0;  ///< <recursion>_<sink>[_<variant>]
  virtual const char* isa() const { return nullptr; }
  virtual std::size_t numel() const = 0;
  virtual std::optional<double> claimed() const { return std::nullopt; }  ///< density asked for
  virtual std::optional<double> density() const { return std::nullopt; }  ///< density reached at the last run
  virtual double bytes_per_element() const = 0;
  virtual void settle() {}                       ///< untimed, before the warm-up
  virtual void run(std::size_t repetition) = 0;  ///< timed
};

struct Row {
  std::string kernel;
  const char* isa = nullptr;
  std::size_t numel = 0;
  std::optional<double> claimed, density;
  double bytes_per_element = 0, seconds_median = 0, seconds_min = 0, gb_per_s = 0, ratio_memcpy = 0, ratio_axpy = 0;
  double time_to_first = 1;  ///< median over repetitions of this kernel's time / that of the first kernel of its group
};

/// What every repetition of every group runs last.
struct References {
  explicit References(Arrays& arrays_) : arrays(arrays_) {}
  void copy();
  void axpy();
  static constexpr double kCopyBytes = 8, kAxpyBytes = 12;
  Arrays& arrays;
};

/// CPU time of this thread: a kernel never waits, so this is its time on the clock less what other processes took of the core.
double seconds_of(const std::function<void()>& call);
double median(std::vector<double> values);

/// Runs `group` and the references back to back, `repetitions` times after a warm-up, and takes the medians of the ratios of each
/// repetition. One thread.
std::vector<Row> measure(const std::vector<Kernel*>& group, References& references, std::size_t repetitions);

/// Rows of the references themselves, from all groups' repetitions so far are not kept: measured on their own.
std::vector<Row> measure_references(References& references, std::size_t repetitions);

/// Keeps the calling thread on the CPU where it runs. @returns that CPU, or -1 where the system refuses.
int pin_this_thread();

}  // namespace thinwire::bench
