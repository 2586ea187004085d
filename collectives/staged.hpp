#pragma once
// Device memory over a transport of host memory: MPI that is not CUDA-aware, Gloo, ranks as threads. Every call waits for the stream.

#include <memory>

#include "collectives/communicator.hpp"

namespace thinwire {

/// Serves host spans as `inner` does, and device spans through a page-locked copy of them. It needs memory on the host for the largest
/// call.
/// @throws Error{unsupported} at the first device span in a build without CUDA.
std::unique_ptr<Communicator> make_staged(std::unique_ptr<Communicator> inner);

}  // namespace thinwire
