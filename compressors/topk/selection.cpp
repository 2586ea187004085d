#include "compressors/topk/selection.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include "compressors/core/clones.hpp"
#include "compressors/core/dtype.hpp"

namespace thinwire::topk {
namespace {

constexpr int kBinShift = 20;  // exponent and three bits of the mantissa: 2048 bins
constexpr std::size_t kBins = 2048;
constexpr std::size_t kFew = 256;      // elements up to which selecting among them is faster than a histogram of all bins
constexpr std::size_t kRefine = 8192;  // members of a bin from which another histogram is faster than nth_element on them

std::size_t sample_rank(std::size_t count, std::size_t sampled, std::size_t k) noexcept {
  const auto r = std::size_t(std::floor(double(k) * double(sampled) / double(count) + 0.5));
  return std::clamp<std::size_t>(r, 1, sampled);
}

/// Members of a bin, in order; `out` may be `bits`.
std::size_t keep(const std::uint32_t* bits, std::size_t count, int shift, std::uint32_t bin, std::uint32_t* out) noexcept {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t b = bits[i];
    out[kept] = b;
    kept += ((b >> shift) & (kBins - 1)) == bin;
  }
  return kept;
}

/// Narrows members of one bin to those that share the next eleven bits with the rank-th largest; `rank` becomes its rank among them.
std::size_t refine(std::uint32_t* members, std::size_t count, std::size_t& rank) noexcept {
  constexpr int kShift = kBinShift - 11;
  std::array<std::uint32_t, kBins> histogram{};
  for (std::size_t i = 0; i < count; ++i) ++histogram[(members[i] >> kShift) & (kBins - 1)];
  std::size_t bin = kBins - 1;
  while (histogram[bin] < rank) rank -= histogram[bin--];
  return keep(members, count, kShift, std::uint32_t(bin), members);
}

/// The rank-th largest, which lies most likely within an octave of `floor`, below which there is none.
std::uint32_t statistic_near(const std::uint32_t* bits, std::size_t count, std::uint32_t floor, std::size_t rank, std::uint32_t* scratch) {
  constexpr int kShift = 12;  // an octave's mantissas in 2048 bins; what is larger is in the last one
  const auto bin_of = [floor](std::uint32_t b) { return std::min<std::uint32_t>((b - floor) >> kShift, kBins - 1); };
  std::array<std::uint32_t, kBins> histogram;
  std::size_t bin = kBins - 1, above = 0;
  if (count > kFew) {
    histogram.fill(0);
    for (std::size_t i = 0; i < count; ++i) ++histogram[bin_of(bits[i])];
    while (above + histogram[bin] < rank) above += histogram[bin--];
  }
  if (bin == kBins - 1) return order_statistic(bits, count, rank, scratch);  // few elements, or large ones
  std::size_t members = 0;
  for (std::size_t i = 0; i < count; ++i) {
    scratch[members] = bits[i];
    members += bin_of(bits[i]) == bin;
  }
  const auto nth = scratch + (rank - above - 1);
  std::nth_element(scratch, nth, scratch + members, std::greater<>());
  return *nth;
}

}  // namespace

THINWIRE_CLONES std::size_t keep_at_least(const std::uint32_t* bits, std::size_t count, std::uint32_t floor, std::uint32_t* out) noexcept {
  constexpr std::size_t kGroup = 16;  // most groups have no member, and are passed over as one vector
  std::size_t kept = 0, i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    std::uint32_t any = 0;
    for (std::size_t j = 0; j < kGroup; ++j) any |= std::uint32_t(bits[i + j] >= floor);
    if (any == 0) continue;
    for (std::size_t j = 0; j < kGroup; ++j) {
      out[kept] = bits[i + j];
      kept += bits[i + j] >= floor;
    }
  }
  for (; i < count; ++i) {
    if (bits[i] >= floor) out[kept++] = bits[i];
  }
  return kept;
}

std::uint32_t order_statistic(const std::uint32_t* bits, std::size_t count, std::size_t rank, std::uint32_t* scratch) {
  std::size_t members = count;
  if (count <= kFew) {
    std::copy_n(bits, count, scratch);
  } else {
    // 1. Histogram, of large samples four in turn: consecutive increments of one bin would wait for each other.
    const std::size_t lanes = count < kRefine ? 1 : 4;
    std::array<std::array<std::uint32_t, kBins>, 4> histogram;
    for (std::size_t j = 0; j < lanes; ++j) histogram[j].fill(0);
    std::size_t i = 0;
    if (lanes == 4) {
      for (; i + 4 <= count; i += 4) {
        for (std::size_t j = 0; j < 4; ++j) ++histogram[j][bits[i + j] >> kBinShift];
      }
    }
    for (; i < count; ++i) ++histogram[0][bits[i] >> kBinShift];
    auto& total = histogram[0];
    for (std::size_t lane = 1; lane < lanes; ++lane) {
      for (std::size_t b = 0; b < kBins; ++b) total[b] += histogram[lane][b];
    }
    // 2. The members of the bin that it falls into; where values are dense, eleven bits more.
    std::size_t bin = kBins - 1;
    while (total[bin] < rank) rank -= total[bin--];
    members = keep(bits, count, kBinShift, std::uint32_t(bin), scratch);
    if (members > kRefine) members = refine(scratch, members, rank);
  }
  const auto nth = scratch + (rank - 1);
  std::nth_element(scratch, nth, scratch + members, std::greater<>());
  return *nth;
}

SampleRanks::SampleRanks(std::size_t count, std::size_t sampled, std::size_t k) noexcept {
  middle = high = low = to_high = to_low = sample_rank(count, sampled, k);
  if (sampled == count) return;
  const double deviation = std::sqrt(double(middle));  // of a count of r
  high = std::size_t(std::max(0.0, std::floor(double(middle) - 2 * deviation)));
  low = std::min(sampled, std::size_t(std::ceil(double(middle) + 2 * deviation)));
  to_high = std::size_t(std::max(1.0, std::floor(double(middle) - deviation)));
  to_low = std::min(low, std::size_t(std::ceil(double(middle) + deviation)));
}

std::size_t candidate_rank(std::size_t count, std::size_t sampled, std::size_t k) noexcept {
  const std::size_t r = sample_rank(count, sampled, k);
  if (sampled == count) return r;
  return std::min(sampled, std::size_t(std::ceil(double(r) + 3 * std::sqrt(double(r)) + 2)));
}

float corrected(float carried, const std::uint32_t* bits, std::size_t count, std::uint32_t floor, const SampleRanks& ranks,
                std::uint32_t* scratch) {
  const std::uint32_t threshold = float_bits(carried);
  std::uint32_t above = 0, at_least = 0;
  for (std::size_t i = 0; i < count; ++i) {
    above += bits[i] > threshold;
    at_least += bits[i] >= threshold;
  }
  if (above < ranks.low && at_least >= ranks.high) return carried;
  return bits_float(statistic_near(bits, count, floor, above >= ranks.low ? ranks.to_low : ranks.to_high, scratch));
}

}  // namespace thinwire::topk
