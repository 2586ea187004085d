#pragma once
// Which GPU a rank trains on, and the group over NCCL whose ranks MPI has started. Part of every build: without CUDA it refuses.

#include <chrono>
#include <memory>
#include <string>

#include "collectives/communicator.hpp"

namespace thinwire::launch {

/// A GPU, or why there is none.
struct GpuChoice {
  int device = -1;
  std::string refusal;  ///< empty: `device` it is
};

/// Of rank `place` among the `ranks` that see the same `gpus`: one each. `shared`: they may share them (each is a host of its own to NCCL).
inline GpuChoice choose_gpu(int place, int ranks, int gpus, bool shared) {
  if (gpus == 0) return {-1, "there is no GPU, or no driver for it"};
  if (ranks <= gpus || shared) return {place % gpus, {}};
  return {-1, std::to_string(ranks) + " ranks for " + std::to_string(gpus) + (gpus == 1 ? " GPU" : " GPUs") +
                  ": start one rank per GPU, or, to test several on one, give each rank an NCCL_HOSTID of its own"};
}

/// Of this rank among those of its host that see the same GPUs (CUDA_VISIBLE_DEVICES). Collective over MPI_COMM_WORLD.
GpuChoice choose_gpu();

/// All ranks of MPI_COMM_WORLD over NCCL, on this rank's `device`. Collective, within `timeout`. @throws what make_nccl throws.
std::shared_ptr<Communicator> make_gpu_group(int device, std::chrono::milliseconds timeout);

}  // namespace thinwire::launch
