#pragma once
// Order statistics of magnitudes, given as bit patterns of non-negative floats (which sort as the floats do).

#include <cstddef>
#include <cstdint>

namespace thinwire::topk {

/// The rank-th largest (1 is the largest) of bits[0, count), rank in [1, count]. `scratch`: count words, `bits` perhaps.
/// @complexity reads bits twice: for a histogram of 2048 bins, and for the bin that the rank falls into; exact.
std::uint32_t order_statistic(const std::uint32_t* bits, std::size_t count, std::size_t rank, std::uint32_t* scratch);

/// The members of bits[0, count) that are at least `floor`, in order. `out`: count words. @returns how many.
std::size_t keep_at_least(const std::uint32_t* bits, std::size_t count, std::uint32_t floor, std::uint32_t* out) noexcept;

/// What a sample of `sampled` of `count` elements says about the k-th largest of all.
struct SampleRanks {
  /// Ranks in the sample: r − 2√r (0: none, so few are expected), r, r + 2√r; all r where the sample is the segment.
  std::size_t high, middle, low;
  std::size_t to_high, to_low;  ///< r − √r, r + √r: half way to where the sample says that a threshold outside of them should be
  SampleRanks(std::size_t count, std::size_t sampled, std::size_t k) noexcept;
};
/// A rank whose statistic is below the k-th largest of all but for one case in about a thousand: r + 3√r + 2.
std::size_t candidate_rank(std::size_t count, std::size_t sampled, std::size_t k) noexcept;

/// `carried` > 0 where it lies between the statistics of ranks.low and ranks.high, which two counts tell; else the statistic of
/// ranks.to_low or to_high. All of bits[0, count) are at least `floor`, which should not lie far below `carried`. `scratch`: count words.
float corrected(float carried, const std::uint32_t* bits, std::size_t count, std::uint32_t floor, const SampleRanks& ranks,
                std::uint32_t* scratch);

}  // namespace thinwire::topk
