#pragma once
// The NCCL transport (device spans; host spans through a copy, for what is small). Only its users include this header: it needs nccl.h.
// What a build knows of NCCL is in collectives/nccl/version.hpp.

#include <nccl.h>

#include <chrono>
#include <memory>

#include "collectives/communicator.hpp"

namespace thinwire {

/// A group on a communicator of NCCL that stays the caller's, who keeps it alive and makes no call on it meanwhile; split() gives groups of
/// their own. `device` is the GPU it was made on.
///
/// Calls on device spans enqueue on the stream and return. all_gather is ncclAllGather, all_to_all of equal slots ncclAlltoAll where NCCL
/// has it (2.28), all others grouped sends and receives without those of no bytes; all_reduce is ncclAllReduce, whose order of the sum is
/// NCCL's. They can be captured in a graph, by all ranks or none.
///
/// Deadlines and errors: a thread of the group looks at the call under way, the oldest one in flight and NCCL's asynchronous errors. Past
/// timeout(), or when NCCL reports an error, it aborts the group, so that kernels waiting for a lost peer end; the next call throws that
/// error. A given communicator is the caller's to abort: only calls of thinwire's are refused then. Calls that are captured are not watched
/// when the graph runs.
///
/// libnccl.so.2 is looked up by that name at the first call, so that a process has the one that it loaded before (torch's), and a library
/// built with NCCL loads without one. One thread at a time may use NCCL on a GPU: with other groups on it (torch's), make calls from the
/// same thread or order them otherwise.
/// Communicators are blocking ones: a call on another, as NCCL_COMM_BLOCKING=0 makes all of a process, is refused and ends the group.
/// @throws unsupported: no libnccl.so.2, one older than 2.18, a nonblocking communicator. invalid_argument: a null communicator.
std::unique_ptr<Communicator> make_nccl(ncclComm_t communicator, int device);

/// A group of `world` ranks with a communicator of its own; collective. `id` is one ncclGetUniqueId of all ranks (nccl_unique_id()).
/// @throws timeout: not all ranks came within `limit`. transport: what NCCL said.
std::unique_ptr<Communicator> make_nccl(const ncclUniqueId& id, int world, int rank, int device,
                                        std::chrono::milliseconds limit = std::chrono::minutes(10));
ncclUniqueId nccl_unique_id();

}  // namespace thinwire
