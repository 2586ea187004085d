#pragma once
// Top-k on a GPU: the same payloads, state and sums as topk.hpp, to the bit.

#include <memory>

#include "compressors/core/codec.hpp"
#include "compressors/topk/topk.hpp"

namespace thinwire {

/// The CUDA twin. What it is given lies in device memory, 4-byte aligned, state arrays 16-byte aligned; plans bring their table (see
/// Codec::tabulate); payloads are decoded where a gather left them, equally spaced. Calls enqueue kernels on the stream (sampled 3, exact
/// 7, or 8 where estimates have a residual or an average beside them or a residual is narrow; decode 2; take_back 1; norms 2 more where
/// somebody asks) and nothing else: no copy, no synchronisation; they can be captured in a graph, which then repeats the step number it was
/// captured with.
/// @throws Error{unsupported} in a build without CUDA.
std::unique_ptr<const Codec> make_topk_cuda(const TopKOptions& options);

}  // namespace thinwire
