#pragma once
// Top-k: each segment sends the largest magnitudes of its message as (index, value) pairs. docs/wire_format.md has the payload,
// topk_kernels.hpp the pass.

#include <cstdint>
#include <memory>

#include "compressors/core/codec.hpp"
#include "compressors/core/dtype.hpp"
#include "compressors/core/isa.hpp"

namespace thinwire {

struct TopKOptions {
  enum class Index : std::uint8_t { automatic, u32, u16, bitmap };

  double density = 0.01;           ///< what policies start from; the density in a segment's Setting is what counts
  DType wire = DType::fp32;        ///< fp32, bf16 or fp16 values; the rounding error stays in the residual
  bool exact = false;              ///< exactly k, or those above a threshold taken from a sample
  Index index = Index::automatic;  ///< automatic: the form with the fewest bytes at capacity, per segment
  std::uint64_t seed = 0;          ///< of the samples
};

/// k = max(1, ceil(density·n − 1e-9)) entries are meant to be sent of a segment of n > 0 elements; zeros and what rounds to zero on the
/// wire never are.
///   exact    exactly min(k, elements above the wire's floor), the largest |x|, ties to the lowest index. No memory.
///   sampled  all |x| >= threshold, in index order, at most k + ceil(k/4) of them; what does not fit stays in the residual. The threshold
///   is an order statistic of a
///            sample (n/32 elements, at least 4096 and at most 256 Ki, whole cache lines, through the same recursion), steadied by the last
///            step's threshold, which is the codec's memory ("threshold", one float).
/// One pass over gradient and state: DGC reads 12 and writes 8 bytes per element, EF14 8 and 4 (fp32 gradients), plus the entries.
/// @determinism bit-exact: payload, state and sums are the same bits on every ISA.
/// @throws Error{invalid_argument} on a wire dtype that is none of the three, or an ISA that this CPU lacks.
/// @source DGC (Lin et al. 2018), section 3; a sample of whole cache lines stands in for its strided one, exact selection for its
/// hierarchical one.
std::unique_ptr<const Codec> make_topk(const TopKOptions& options, Isa isa);

}  // namespace thinwire
