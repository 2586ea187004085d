#pragma once
// Order statistics of magnitudes, given as bit patterns of non-negative floats (which sort as the floats do).

#include <cstddef>
#include <cstdint>
#include <span>

namespace thinwire::topk {

/// out[i] = the ranks[i]-th largest (1 is the largest) of bits[0, count). Ranks ascend and lie in [1, count]. `scratch`: count words.
/// @complexity reads bits once for a histogram of 2048 bins and once per bin that a rank falls into; exact.
void order_statistics(const std::uint32_t* bits, std::size_t count, std::span<const std::size_t> ranks, std::uint32_t* out,
                      std::uint32_t* scratch);

/// The members of bits[0, count) that are at least `floor`, in order. `out`: count words. @returns how many.
std::size_t keep_at_least(const std::uint32_t* bits, std::size_t count, std::uint32_t floor, std::uint32_t* out) noexcept;

/// What a sample of `sampled` of `count` elements says about the k-th largest of all.
struct SampleRanks {
  std::size_t high, middle, low;  ///< ranks in the sample: r − 2√r, r, r + 2√r; all r where the sample is the segment
  SampleRanks(std::size_t count, std::size_t sampled, std::size_t k) noexcept;
};
/// A rank whose statistic is below the k-th largest of all but for one case in about a thousand: r + 3√r + 2.
std::size_t candidate_rank(std::size_t count, std::size_t sampled, std::size_t k) noexcept;

/// Whether `carried` > 0 lies between the statistics of ranks.low and ranks.high, so that clamping it between them would change nothing:
/// two counts instead of a selection.
bool lies_between(float carried, const std::uint32_t* bits, std::size_t count, const SampleRanks& ranks) noexcept;

}  // namespace thinwire::topk
