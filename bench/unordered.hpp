#pragma once
// What order costs: the pass of top-k with places handed out by atomics.

#include <memory>

#include "compressors/core/codec.hpp"
#include "compressors/topk/topk.hpp"

namespace thinwire::bench {

/// make_topk_cuda with index=u32, but a chunk's entries lie where an atomic counter puts them: the same set, in another order at each run,
/// so no decoder takes its payloads. Sample, threshold, loads and arithmetic are the codec's own. EF14 on fp32 gradients alone, sampled.
/// Where more entries pass the threshold than have room, which of them are sent is chance.
std::unique_ptr<const Codec> make_topk_unordered(TopKOptions options);

}  // namespace thinwire::bench
