#pragma once
// What the kernels work on: arrays where the library's arena would put them, filled so that a step meets the density that it claims.

#include <cstddef>
#include <cstdint>
#include <string>

#include "compressors/core/buffer.hpp"
#include "compressors/core/dtype.hpp"
#include "compressors/core/recursion.hpp"

namespace thinwire::bench {

/// Element i of what fill_normal and fill_uniform write, the same on every device.
THINWIRE_HD inline std::uint64_t hash_at(std::uint64_t seed, std::uint64_t i) noexcept {  // splitmix64's finisher
  std::uint64_t x = seed * 0x9e3779b97f4a7c15ull + i;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
THINWIRE_HD inline float normal_at(std::uint64_t seed, std::uint64_t i, float sigma) noexcept {
  const std::uint64_t h = hash_at(seed, i);
  const int sum = int(h & 0xffff) + int((h >> 16) & 0xffff) + int((h >> 32) & 0xffff) + int(h >> 48) - 2 * 65535;
  return float(sum) * (sigma / 37837.2f);  // four uniform 16-bit numbers have the variance 4·(2^32 − 1)/12
}
THINWIRE_HD inline float uniform_at(std::uint64_t seed, std::uint64_t i, float bound) noexcept {
  return (float(int(hash_at(seed, i) >> 40)) * 0x1p-23f - 1.0f) * bound;
}

/// About standard normal times `sigma` (a sum of four uniforms), counter-based: element i depends on (seed, i) alone.
void fill_normal(float* out, std::size_t count, float sigma, std::uint64_t seed);
void fill_uniform(float* out, std::size_t count, float bound, std::uint64_t seed);

inline constexpr float kBeta1 = 0.9f;  ///< of averaged recursions

/// How far state has come after many steps of standard normal gradients.
struct Settled {
  float momentum;  ///< its standard deviation; 0: there is none
  float residual;  ///< t: uniform in [-t, t] with t = E|increment| / 2·density, so that the share `density` crosses t at the next step
};
Settled settled(const Recursion& recursion, double density);

/// arena: as a reducer places its state. spaced: the power-of-two distance of 128 MiB that large mallocs end up with.
enum class Placement { arena, spaced };

/// The arrays of one step, n elements each. A repetition reads the gradient through a window that slides by a cache line, so it never meets
/// the gradient of the one before: a constant gradient under error feedback raises the density far above the one that was asked for.
class Arrays {
 public:
  static constexpr std::size_t kSlack = 65536;  ///< elements by which the window may slide
  static constexpr std::size_t kSlide = 16;

  Arrays(std::size_t numel, Placement placement);
  ~Arrays();
  Arrays(const Arrays&) = delete;
  Arrays& operator=(const Arrays&) = delete;

  std::size_t numel() const noexcept { return numel_; }
  const float* grad(std::size_t repetition) const noexcept { return grad_ + window(repetition); }
  const std::uint16_t* grad_bf16(std::size_t repetition) const noexcept {
    return reinterpret_cast<const std::uint16_t*>(grad_bf16_) + window(repetition);
  }
  float* momentum() const noexcept { return momentum_; }
  float* residual() const noexcept { return residual_; }
  const float* from() const noexcept { return from_; }  ///< the references read it
  float* out() const noexcept { return out_; }          ///< the references and decodes write it

  /// Momentum and residual as after many steps of this gradient.
  void settle(const Recursion& recursion, double density);
  /// Where the arrays lie: distances to the gradient, in MiB and bytes.
  std::string offsets() const;

 private:
  static std::size_t window(std::size_t repetition) noexcept { return repetition * kSlide % kSlack; }

  std::size_t numel_;
  Arena arena_;
  void* mapping_ = nullptr;
  std::size_t mapped_ = 0;
  float *grad_ = nullptr, *momentum_ = nullptr, *residual_ = nullptr, *from_ = nullptr, *out_ = nullptr, *grad_bf16_ = nullptr;
};

}  // namespace thinwire::bench
