#pragma once
// The numbers of kernels_data.hpp in device memory: made there, for a host would take seconds for each case.

#include <cstdint>

#include "compressors/core/span.hpp"
#include "compressors/core/stream.hpp"

namespace thinwire::bench {

/// fp32 is the host's to the bit, bf16 and fp16 are that rounded. One kernel each.
void fill_normal(Bytes out, float sigma, std::uint64_t seed, Stream stream);
void fill_uniform(Bytes out, float bound, std::uint64_t seed, Stream stream);

}  // namespace thinwire::bench
