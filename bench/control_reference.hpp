#pragma once
// The methods in double precision, as their papers have them, in one thread: what the engine's runs are held against. No code of the
// library.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "bench/control_problems.hpp"

namespace thinwire::bench {

/// A run: steps until `stop` was reached, or what it hovered at.
struct Run {
  std::size_t steps = 0;
  bool reached = false, diverged = false;
  double last = 0, plateau = 0;              ///< distance at the end, and its mean over the last quarter
  double largest_residual = 0;               ///< ‖e‖ at any step: of any rank (reference), of rank 0 (engine)
  std::vector<double> distances, residuals;  ///< every `every` steps
  Vector x;                                  ///< where it ended (reference)
  double drift = 0;                          ///< max |H − mean h| there (reference)
};

struct Descent {
  double gamma = 0, stop = 0, sigma = 0;  ///< sigma: noise of deviation sigma/√d per coordinate in every gradient
  std::size_t most = 20000, every = 10;
};

/// Noise that a rank's gradient of one step has, the same for all methods.
inline void add_noise(Vector& g, double sigma, int rank, std::size_t step) {
  if (sigma == 0) return;
  SplitMix random(std::uint64_t(step) * 4096 + std::uint64_t(rank) + 77);
  for (double& x : g) x += sigma / std::sqrt(double(g.size())) * random.normal();
}

/// Follows a run. @returns whether it goes on.
inline bool follow(Run& run, const Descent& descent, double distance, double residual) {
  run.last = distance;
  run.largest_residual = std::max(run.largest_residual, residual);
  if (run.steps % descent.every == 0) run.distances.push_back(distance), run.residuals.push_back(residual);
  if (4 * run.steps >= 3 * descent.most) run.plateau += distance / double(descent.most - (3 * descent.most + 3) / 4 + 1);
  run.reached = distance < descent.stop;
  run.diverged = !(distance < 1e30);
  return !run.reached && !run.diverged && run.steps < descent.most;
}

enum class Method { sgd, naive, ef14, ideal, ef21, two_messages, econtrol };

using Compress = std::function<Vector(const Vector&)>;

/// The k entries of largest magnitude; ties to the lowest index.
inline Compress top(std::size_t k) {
  return [k](const Vector& x) {
    Vector out(x.size());
    std::vector<bool> taken(x.size());
    for (std::size_t turn = 0; turn < std::min(k, x.size()); ++turn) {
      std::size_t largest = x.size();
      for (std::size_t j = 0; j < x.size(); ++j)
        if (!taken[j] && (largest == x.size() || std::fabs(x[j]) > std::fabs(x[largest]))) largest = j;
      taken[largest] = true, out[largest] = x[largest];
    }
    return out;
  };
}
/// Mean magnitude times sign.
inline Vector scaled_sign(const Vector& x) {
  double sum = 0;
  for (const double v : x) sum += std::fabs(v);
  Vector out(x.size());
  for (std::size_t j = 0; j < x.size(); ++j) out[j] = (x[j] < 0 ? -sum : sum) / double(x.size());
  return out;
}

/// What leaves nothing out.
inline Vector identity(const Vector& x) { return x; }

using Rounding = double (*)(double);
/// To the nearest number of so many bits and no finer than `least`, ties to even.
inline double narrowed(double x, int bits, double least) {
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::max(std::ldexp(1, exponent - bits), least);
  return std::isfinite(x) ? std::nearbyint(x / unit) * unit : x;
}
inline double as_bf16(double x) { return narrowed(x, 8, 0x1p-133); }
inline double as_fp16(double x) { return narrowed(x, 11, 0x1p-24); }

struct Variant {
  bool from_zero = false;                                           ///< estimates do not start from the first gradients, sent whole
  Compress second = nullptr;                                        ///< of two messages, where that is not as the first
  Rounding wire = nullptr, estimate = nullptr, residual = nullptr;  ///< of what is sent and of what is stored
  bool unrounded_state = false;  ///< e and h are updated by what was to be sent, before `wire` rounded it
};

/// `average`: the worker average's share of the new gradient.
inline Run run_reference(const Problem& problem, Method method, double eta, double average, const Compress& compress,
                         const Descent& descent, const Variant& variant = {}) {
  const auto n = std::size_t(problem.world()), d = problem.size();
  std::vector<Vector> e(n, Vector(d)), h(n, Vector(d)), v(n, Vector(d));
  Vector x = problem.start(), mean(d), shared(d);
  Run run;
  double residual = 0;
  const auto rounded = [](Rounding rounding, double number) { return rounding == nullptr ? number : rounding(number); };
  while (follow(run, descent, problem.distance(x), residual)) {
    std::fill(mean.begin(), mean.end(), 0.0);
    const bool estimates = method == Method::ef21 || method == Method::econtrol || method == Method::two_messages;
    const bool starts = estimates && run.steps == 0 && !variant.from_zero;
    for (std::size_t i = 0; i < n; ++i) {
      Vector g = problem.gradient(int(i), x), s(d), sent;
      add_noise(g, descent.sigma, int(i), run.steps);
      if (run.steps == 0) v[i] = g;
      for (std::size_t j = 0; j < d; ++j) g[j] = v[i][j] = (1 - average) * v[i][j] + average * g[j];
      for (std::size_t j = 0; j < d && starts; ++j) h[i][j] = rounded(variant.estimate, g[j]);
      if (method == Method::ideal) h[i] = problem.gradient_at_minimum(int(i));
      const double fed = method == Method::econtrol                                                            ? eta
                         : method == Method::ef14 || method == Method::ideal || method == Method::two_messages ? 1
                                                                                                               : 0;
      if (method == Method::two_messages) {  // first what moves the estimate, then what is applied beside it
        for (std::size_t j = 0; j < d; ++j) s[j] = g[j] - h[i][j];
        const Vector first = compress(s);
        for (std::size_t j = 0; j < d; ++j) h[i][j] += first[j], shared[j] += first[j] / double(n);
      }
      for (std::size_t j = 0; j < d; ++j) s[j] = fed * e[i][j] + g[j] - h[i][j];
      const bool other = method == Method::two_messages && variant.second != nullptr;
      sent = method == Method::sgd ? s : (other ? variant.second : compress)(s);
      for (std::size_t j = 0; j < d; ++j) {
        const double received = rounded(variant.wire, sent[j]), own = variant.unrounded_state ? sent[j] : received;
        if (starts) shared[j] += h[i][j] / double(n);
        if (fed != 0) e[i][j] = rounded(variant.residual, e[i][j] + g[j] - h[i][j] - own);
        if (method == Method::ef21 || method == Method::econtrol) h[i][j] = rounded(variant.estimate, h[i][j] + own);
        mean[j] += received / double(n);
      }
    }
    for (std::size_t j = 0; j < d; ++j) {
      if (method == Method::ef21 || method == Method::econtrol) mean[j] = shared[j] += mean[j];
      if (method == Method::two_messages) mean[j] += shared[j];
      x[j] -= descent.gamma * mean[j];
    }
    residual = 0;
    for (const Vector& of_rank : e) {
      double sum = 0;
      for (const double r : of_rank) sum += r * r;
      residual = std::max(residual, std::sqrt(sum));
    }
    ++run.steps;
  }
  run.x = x;
  for (std::size_t j = 0; j < d; ++j) {
    double mean_h = 0;
    for (const Vector& of_rank : h) mean_h += of_rank[j] / double(n);
    if (method == Method::ef21 || method == Method::econtrol) run.drift = std::max(run.drift, std::fabs(mean_h - shared[j]));
  }
  return run;
}

}  // namespace thinwire::bench
