#pragma once
// The sum of squares of a segment, piece by piece: fused passes take it block by block while the gradient is in the cache anyway.

#include <array>
#include <cstddef>

#include "compressors/core/block_sum.hpp"
#include "compressors/core/span.hpp"

namespace thinwire::feedback {

/// Σ x² over the finite elements, in the fixed order of squared_norms: blocks of kSumBlock elements from the segment's start, each summed
/// in fp32 over kPartials partials, the blocks in double over as many.
class SquaredNorm {
 public:
  /// Adds elements [first, first + count) of `grad`. Pieces come in order; every piece but a segment's last is whole blocks.
  void add(ConstBytes grad, std::size_t first, std::size_t count) noexcept;
  /// The sum; the object is spent.
  double sum() noexcept;

 private:
  std::array<double, kPartials> partial_{};
  std::size_t block_ = 0;
};

}  // namespace thinwire::feedback
