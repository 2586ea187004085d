#pragma once
// Formulas of top-k that decide a bit, each written once for the CPU and CUDA twins.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "compressors/core/dtype.hpp"

namespace thinwire::topk {

inline constexpr std::size_t kSampleGroup = 16;  // consecutive elements: one cache line of fp32

/// Elements in the sample of a segment: all of them, or whole groups of kSampleGroup.
THINWIRE_HD constexpr std::size_t sample_size(std::size_t count) noexcept {
  std::size_t m = count / 32;
  m = m < 4096 ? 4096 : m > (std::size_t(1) << 18) ? std::size_t(1) << 18 : m;
  return count <= m ? count : m / kSampleGroup * kSampleGroup;
}

/// A sample's number: the steps of a seed have their own ones.
THINWIRE_HD constexpr std::uint64_t draw_of(std::uint64_t seed, std::uint64_t step) noexcept { return step + seed * 0xa0761d6478bd642full; }

/// Where the groups of a sample start. They are stratified, group j at floor(j · groups / taken), and hashed within their stratum: a fixed
/// stride would always meet the same columns of a matrix.
struct SampleStrata {
  std::uint64_t taken, stride, remainder, seed;

  THINWIRE_HD constexpr SampleStrata(std::size_t count, std::uint64_t draw) noexcept
      : taken(sample_size(count) / kSampleGroup),
        stride(count / kSampleGroup / taken),
        remainder(count / kSampleGroup % taken),
        seed((draw + 1) * 0xd1b54a32d192ed03ull) {}

  /// Group j's place within its stratum.
  THINWIRE_HD constexpr std::uint64_t jitter(std::uint64_t j) const noexcept {
    const std::uint64_t hash = seed + (j + 1) * 0x9e3779b97f4a7c15ull;
    std::uint64_t h = (hash ^ (hash >> 32)) * 0xd6e8feb86659fd93ull;
    h = (h ^ (h >> 32)) >> 32;
    return (h * stride) >> 32;
  }
  /// First element of group j.
  THINWIRE_HD constexpr std::size_t first_of(std::uint64_t j) const noexcept {
    return std::size_t(j * stride + j * remainder / taken + jitter(j)) * kSampleGroup;
  }
};

/// Candidates that exact selection keeps before it cuts; more than that and it reads the whole message again. Where much is sent there is
/// less room to spare, and where more than a third is, none: they would take more memory than a payload and the bucket in fp32.
constexpr std::size_t candidate_capacity(std::size_t count, std::size_t k) noexcept {
  constexpr std::size_t kFew = 4096;
  if (count <= 4 * kFew) return count;
  if (k > count / 3) return 0;
  const std::size_t ample = 2 * k + kFew, close = k + k / 4 + kFew;
  return std::min(ample, std::max(close, count / 4));
}

/// Where the elements lie among which a steady threshold's ranks are sought: from a little below the carried threshold on.
inline constexpr float kNear = 0.8f;

/// How much hits grow, relative to k, as the threshold sinks, relative to itself: the secant from kNear · carried up to the threshold,
/// which is steeper than the tangent at it, so that corrections are rather too small. Under error feedback it is large: all above the
/// threshold has come there within a step. From a sample: `near` of it are at least kNear · carried, `rank` are expected above the
/// threshold.
inline constexpr float kLeastSteepness = 4.0f, kUnknownSteepness = 16.0f;
THINWIRE_HD inline float steepness_of(std::size_t near, std::size_t rank, float carried, float threshold) noexcept {
  const float width = 1.0f - kNear * carried / threshold;
  if (!(width > 0.05f)) return kUnknownSteepness;
  const float steepness = (float(near) / float(rank) - 1.0f) / width;
  return steepness > kLeastSteepness ? steepness : kLeastSteepness;
}

/// The threshold to carry to the next step after `hits` of k were found: at most half of the way to where k are expected, so that it
/// neither swings nor follows every step's noise. A gain that does not know the steepness swings between too many and hardly any.
/// @returns 0, none, where there were no hits: it is far off, and the next sample knows better.
THINWIRE_HD inline float next_threshold(float threshold, std::size_t hits, std::size_t k, float steepness) noexcept {
  if (hits == 0) return 0.0f;
  const float excess = 2.0f * (float(hits) - float(k)) / (float(hits) + float(k));  // about log(hits / k), within 2
  const float next = threshold * (1.0f + 0.5f * excess / steepness);
  return next < std::numeric_limits<float>::max() ? next : std::numeric_limits<float>::max();
}

}  // namespace thinwire::topk
