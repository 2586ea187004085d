#pragma once
// EF21 and EControl over all ranks at once, in double and plain loops (specs: error control, 2, 7.3 and 9; DESIGN 4 for non-finite
// gradients): exact top-k gathered, or signs gathered or over two phases. Shares no code with the library.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace thinwire::test {

struct EstimateOracle {
  using Values = std::vector<double>;
  using Arrays = std::vector<Values>;  // per parameter
  enum class Init { dense, compressed, zero };

  struct Options {
    bool control = true;
    double fresh = 1;
    Init init = Init::dense;
    int start_step = 0;
    std::function<double(int step)> density = nullptr;  ///< of top-k; null: signs
    std::size_t block = 8;                              ///< of signs, l1
    bool two_phase = false;
    std::function<bool(int step, std::size_t parameter)> dense_now = nullptr;  ///< a tensor that stays dense in a compressed step
    std::function<bool(int step)> restart =
        nullptr;      ///< a dense step that sets the estimates, after tensors were dense for a time, and the one after it
    double eta = -1;  ///< negative: k / n of each parameter at each step, 1/2 for signs
    bool step_verdict = false;
  };
  struct Step {
    std::vector<Arrays> grad;  ///< [rank][parameter]
    std::vector<std::vector<std::uint32_t>> buckets;
    bool flush = false;
    std::vector<bool> joined = {};  ///< per rank; empty: nobody
  };

  std::size_t world;
  std::vector<std::size_t> numel;
  std::vector<bool> compressed;
  Options options;
  std::vector<Arrays> residual, estimate, average;  ///< [rank][parameter]
  Arrays mean_estimate, server;                     ///< server: of whole parameters, every owner's part
  double largest = 0;                               ///< magnitude of any number that an element met
  int bad_steps = 0;

  EstimateOracle(int w, std::vector<std::size_t> n, std::vector<bool> c, Options o)
      : world(std::size_t(w)), numel(std::move(n)), compressed(std::move(c)), options(std::move(o)) {
    clear();
  }

  void clear() {
    Arrays zero;
    for (const std::size_t n : numel) zero.emplace_back(n, 0.0);
    residual.assign(world, zero);
    estimate = average = residual;
    mean_estimate = server = zero;
  }

  /// Means of all parameters: NaN where the bucket's verdict is bad.
  Arrays run(int step, Step s) {
    for (std::size_t r = 0; r < s.joined.size(); ++r)  // a rank without data has a gradient of 0
      for (Values& g : s.grad[r])
        if (s.joined[r]) std::fill(g.begin(), g.end(), 0.0);
    const int dense_steps = std::max(options.start_step, options.init == Init::dense ? 1 : 0);
    // A start that was bad is made again, twice: the first sends what was kept back, so that only the second has h = g.
    const bool before_start = was_dense_ && options.init == Init::dense && step + 1 == dense_steps;
    if ((was_dense_start_ || before_start) && step + 1 >= dense_steps && bad_steps != bad_before_)
      start_until_ = step + 2, bad_before_ = bad_steps;
    if (options.restart != nullptr && options.restart(step)) start_until_ = step + 2, bad_before_ = bad_steps;
    if (was_flush_ && bad_steps != bad_before_flush_) s.flush = true;  // it is made again until it is good
    was_flush_ = s.flush, bad_before_flush_ = bad_steps;
    const bool dense = step < std::max(dense_steps, start_until_) || s.flush;
    if (step == 0) compressed_from_ = dense_steps;
    if (dense && step == compressed_from_) ++compressed_from_;
    // Where the first payload's step was skipped, all begins anew.
    if (options.step_verdict && !started_ && step == compressed_from_ + 1) compressed_from_ = step;
    const bool first = options.init != Init::dense && step == compressed_from_;
    const bool starting = step < start_until_ || (options.init == Init::dense && step + 1 == dense_steps) ||
                          (options.init == Init::compressed && options.control && step == compressed_from_);
    const auto is_bad = [&](const std::vector<std::uint32_t>& bucket) {
      for (const std::uint32_t p : bucket)
        for (std::size_t r = 0; r < world; ++r)
          for (const double g : s.grad[r][p])
            if (!std::isfinite(g)) return true;
      return false;
    };
    const bool bad_step = std::any_of(s.buckets.begin(), s.buckets.end(), is_bad);
    Arrays out(numel.size());
    for (const auto& bucket : s.buckets) {
      const bool bad = is_bad(bucket), lost = options.step_verdict ? bad_step : bad;
      for (const std::uint32_t p : bucket) {
        if (!compressed[p] || dense || (options.dense_now != nullptr && options.dense_now(step, p))) {
          out[p] = dense_step(s, p, starting && dense, lost);
        } else {
          out[p] = compressed_step(step, s, p, starting, first, lost);
        }
        for (const double x : out[p]) largest = std::fmax(largest, std::fabs(x));
        if (bad) std::fill(out[p].begin(), out[p].end(), std::numeric_limits<double>::quiet_NaN());
      }
    }
    was_dense_ = dense;
    was_dense_start_ = dense && starting;
    bad_steps += bad_step ? 1 : 0;
    started_ = started_ || !bad_step;
    if (options.step_verdict && !started_) clear();
    return out;
  }

  std::size_t part_length(std::size_t n) const { return (n + 8 * world - 1) / (8 * world) * 8; }

 private:
  Values dense_step(const Step& s, std::uint32_t p, bool starting, bool lost) {
    const std::size_t n = numel[p];
    Values mean(n, 0.0);
    std::vector<Values> messages(world, Values(n, 0.0));
    for (std::size_t r = 0; r < world; ++r) {
      for (std::size_t i = 0; i < n; ++i) {
        const double g = s.grad[r][p][i], held = compressed[p] && options.control ? residual[r][p][i] : 0;
        messages[r][i] = held + (std::isfinite(g) ? g : 0);
        mean[i] += messages[r][i] / double(world);
        largest = std::fmax(largest, std::fabs(messages[r][i]));
      }
    }
    if (!compressed[p]) return mean;
    for (std::size_t r = 0; r < world; ++r) {
      if (options.control) residual[r][p] = lost ? messages[r] : Values(n, 0.0);
      if (!starting) continue;
      if (!lost) estimate[r][p] = average[r][p] = messages[r];
      if (lost && !options.control) std::fill(estimate[r][p].begin(), estimate[r][p].end(), 0.0);
    }
    if (starting && !lost) mean_estimate[p] = mean;
    if (starting && lost && !options.control) std::fill(mean_estimate[p].begin(), mean_estimate[p].end(), 0.0);
    if (!starting) {
      std::fill(mean_estimate[p].begin(), mean_estimate[p].end(), 0.0);
      for (std::size_t r = 0; r < world; ++r)
        for (std::size_t i = 0; i < n; ++i) mean_estimate[p][i] += estimate[r][p][i] / double(world);
      std::fill(server[p].begin(), server[p].end(), 0.0);
    }
    return mean;
  }

  Values compressed_step(int step, const Step& s, std::uint32_t p, bool starting, bool first, bool lost) {
    const std::size_t n = numel[p];
    const std::size_t k =
        options.density == nullptr ? 0 : std::max<std::size_t>(1, std::size_t(std::ceil(options.density(step) * double(n) - 1e-9)));
    const double eta = options.eta >= 0 ? options.eta : k != 0 ? double(k) / double(n) : 0.5;
    Values sum(n, 0.0);
    for (std::size_t r = 0; r < world; ++r) {
      Values &e = residual[r][p], &h = estimate[r][p], &v = average[r][p], x(n);
      for (std::size_t i = 0; i < n; ++i) {
        double g = s.grad[r][p][i];
        if (!std::isfinite(g)) g = h[i];
        if (options.fresh < 1) g = v[i] = first ? g : (1 - options.fresh) * v[i] + options.fresh * g;
        const double t = g - h[i];
        x[i] = (options.control ? eta * e[i] : 0) + t;
        e[i] = options.control ? e[i] + t : 0;
      }
      const Values sent = k != 0 ? largest_of(x, k) : signs_of(x, p);
      for (std::size_t i = 0; i < n; ++i) {
        if (options.control) e[i] -= sent[i];
        h[i] += sent[i];
        sum[i] += sent[i];
        for (const double y : {x[i], e[i], h[i], sum[i]}) largest = std::fmax(largest, std::fabs(y));
        if (options.control && starting && !lost) e[i] = 0;
        if (options.control && lost) e[i] += h[i];
      }
    }
    for (double& x : sum) x /= double(world);
    if (options.two_phase && world > 1) {
      for (std::size_t i = 0; i < n; ++i) server[p][i] += sum[i];
      sum = signs_of(server[p], p);
      for (std::size_t i = 0; i < n; ++i) server[p][i] -= sum[i];
    }
    for (std::size_t i = 0; i < n; ++i) mean_estimate[p][i] += sum[i];
    return mean_estimate[p];
  }

  /// The k largest magnitudes as they are, ties to the lowest index.
  static Values largest_of(const Values& x, std::size_t k) {
    std::vector<std::size_t> order(x.size());
    std::iota(order.begin(), order.end(), std::size_t(0));
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return std::fabs(x[a]) > std::fabs(x[b]); });
    Values out(x.size(), 0.0);
    for (std::size_t j = 0; j < std::min(k, x.size()); ++j) out[order[j]] = x[order[j]];
    return out;
  }
  /// ± the mean magnitude of each block; over two phases blocks start anew with every owner's part.
  Values signs_of(const Values& x, std::uint32_t p) const {
    Values out(x.size());
    const std::size_t part = options.two_phase ? part_length(numel[p]) : x.size();
    for (std::size_t first = 0; first < x.size(); first += part) {
      const std::size_t end = std::min(first + part, x.size());
      for (std::size_t from = first; from < end; from += options.block) {
        const std::size_t to = std::min(from + options.block, end);
        double scale = 0;
        for (std::size_t i = from; i < to; ++i) scale += std::fabs(x[i]) / double(to - from);
        for (std::size_t i = from; i < to; ++i) out[i] = x[i] < 0 ? -scale : scale;
      }
    }
    return out;
  }

  bool was_flush_ = false;
  int bad_before_flush_ = 0;
  bool started_ = false, was_dense_ = false, was_dense_start_ = false;
  int start_until_ = 0, bad_before_ = 0, compressed_from_ = 0;
};

}  // namespace thinwire::test
