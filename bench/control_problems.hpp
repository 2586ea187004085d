#pragma once
// Problems on which error feedback is compared: what ranks minimise together, small enough for thousands of steps a second. All of it in
// double, by a generator that is written out, so that numbers of other implementations can be compared.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <vector>

namespace thinwire::bench {

using Vector = std::vector<double>;

/// SplitMix64 (Steele, Lea, Flood 2014); normal numbers by Box and Muller, two draws each.
class SplitMix {
 public:
  explicit SplitMix(std::uint64_t seed) noexcept : state_(seed) {}
  std::uint64_t next() noexcept {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  double uniform() noexcept { return double(next() >> 11) * 0x1p-53; }
  double normal() noexcept {
    const double u = uniform(), v = uniform();
    return std::sqrt(-2 * std::log1p(-u)) * std::cos(2 * std::numbers::pi * v);
  }

 private:
  std::uint64_t state_;
};

/// f = (1/n) Σ f_i; rank i computes the gradient of f_i.
class Problem {
 public:
  virtual ~Problem() = default;
  virtual std::size_t size() const = 0;
  virtual int world() const = 0;
  virtual Vector start() const = 0;
  virtual Vector gradient(int rank, const Vector& x) const = 0;
  /// Of f_i at the minimum of f.
  virtual Vector gradient_at_minimum(int) const { return Vector(size(), 0.0); }
  /// What a run is stopped by: ‖grad f(x)‖², unless the problem says otherwise.
  virtual double distance(const Vector& x) const {
    Vector mean(size());
    for (int i = 0; i < world(); ++i) {
      const Vector g = gradient(i, x);
      for (std::size_t j = 0; j < g.size(); ++j) mean[j] += g[j] / double(world());
    }
    double sum = 0;
    for (const double g : mean) sum += g * g;
    return sum;
  }
};

/// f_i = <a_i, x>² + ‖x‖²/4 in three dimensions, on which biased compression without feedback moves away from the minimum, 0.
/// @source Beznosikov et al. 2020, "On biased compression for distributed learning", example 1.
class ThreeQuadratics final : public Problem {
 public:
  std::size_t size() const override { return 3; }
  int world() const override { return 3; }
  Vector start() const override { return {1, 1, 1}; }
  Vector gradient(int rank, const Vector& x) const override {
    const double a[3] = {rank == 0 ? -3.0 : 2.0, rank == 1 ? -3.0 : 2.0, rank == 2 ? -3.0 : 2.0};
    const double product = a[0] * x[0] + a[1] * x[1] + a[2] * x[2];
    return {2 * product * a[0] + x[0] / 2, 2 * product * a[1] + x[1] / 2, 2 * product * a[2] + x[2] / 2};
  }
  double distance(const Vector& x) const override { return x[0] * x[0] + x[1] * x[1] + x[2] * x[2]; }
};

/// f_i = ‖A_i x − b_i‖²/2 with A_i = (i/√n)·diag(kappa^(−j/(2(d−1)))) and b_i of deviation zeta/i: at the minimum every rank's own gradient
/// has deviation zeta/√n per coordinate (kappa = 1).
/// @source Koloskova et al. 2020, as Gao et al. 2024 use it.
class LeastSquares final : public Problem {
 public:
  LeastSquares(int world, std::size_t size, double zeta, double kappa = 1)
      : b_(std::size_t(world), Vector(size)), scale_(size), minimum_(size) {
    SplitMix random(1);
    for (std::size_t i = 0; i < b_.size(); ++i)
      for (double& b : b_[i]) b = zeta / double(i + 1) * random.normal();
    for (std::size_t j = 0; j < size; ++j) scale_[j] = size > 1 ? std::pow(kappa, -double(j) / (2 * double(size - 1))) : 1;
    for (std::size_t j = 0; j < size; ++j) {
      double above = 0, below = 0;
      for (int i = 0; i < world; ++i) above += row(i, j) * b_[std::size_t(i)][j], below += row(i, j) * row(i, j);
      minimum_[j] = above / below;
    }
  }
  /// The largest curvature of f.
  double smoothness() const { return double(world() + 1) * double(2 * world() + 1) / (6 * double(world())); }

  std::size_t size() const override { return scale_.size(); }
  int world() const override { return int(b_.size()); }
  Vector start() const override {
    SplitMix random(1234);
    Vector x(size());
    double norm = 0;
    for (double& z : x) z = random.normal(), norm += z * z;
    for (std::size_t j = 0; j < x.size(); ++j) x[j] = minimum_[j] + x[j] / std::sqrt(norm);
    return x;
  }
  Vector gradient(int rank, const Vector& x) const override {
    Vector g(size());
    for (std::size_t j = 0; j < g.size(); ++j) g[j] = row(rank, j) * (row(rank, j) * x[j] - b_[std::size_t(rank)][j]);
    return g;
  }
  Vector gradient_at_minimum(int rank) const override { return gradient(rank, minimum_); }
  const Vector& minimum() const { return minimum_; }

 private:
  double row(int rank, std::size_t j) const { return double(rank + 1) / std::sqrt(double(b_.size())) * scale_[j]; }
  std::vector<Vector> b_;
  Vector scale_, minimum_;
};

}  // namespace thinwire::bench
