#pragma once
// Values of fp32 into an output's dtype, with the one look at their finiteness that every verdict needs.

#include <cstddef>

#include "compressors/core/dtype.hpp"

namespace thinwire {

/// out[i] = factor × x[i], rounded once to `dtype` (fp32, bf16 or fp16). @returns whether all of out is finite. Reads and writes once.
bool store_scaled(const float* x, float factor, DType dtype, void* out, std::size_t n) noexcept;

}  // namespace thinwire
