#pragma once
// The sign codec on a GPU: the same payloads, state and sums as sign.hpp, to the bit.

#include <memory>

#include "compressors/core/codec.hpp"
#include "compressors/sign/sign.hpp"

namespace thinwire {

/// The CUDA twin. What it is given lies in device memory, 4-byte aligned, state arrays 16-byte aligned; plans bring their table (see
/// Codec::tabulate); payloads are decoded where a gather left them, equally spaced. Calls enqueue kernels on the stream and nothing else:
/// no copy, no synchronisation; they can be captured in a graph, which then repeats the step number it was captured with.
///
///   stream     2 kernels for blocks of at most kSumBlock elements: gradient and state are read once and the state is written once;
///              3 for larger ones without state, 4 with a residual, which is read and written once more, or with an estimate: gradient
///              and state are read once more, and written then; norms 2 more where somebody asks
///   decode     2: one checks the payloads, one writes the output
///   take_back  1, of EF21 none;  empty 1
///
/// @throws Error{unsupported} in a build without CUDA.
std::unique_ptr<const Codec> make_sign_cuda(const SignOptions& options);

}  // namespace thinwire
