#include "launch/trainer/gpu.hpp"

#include <mpi.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string_view>
#include <vector>

#include "compressors/core/device.hpp"
#include "torch_ext/src/device_side.hpp"

namespace thinwire::launch {

GpuChoice choose_gpu() {
  // A launcher may hand each rank its own GPU (Slurm's --gpus-per-task): these share nothing, and each is the first of what it sees.
  const char* const visible = std::getenv("CUDA_VISIBLE_DEVICES");
  const int colour = int(std::hash<std::string_view>()(visible != nullptr ? visible : "") & 0x7fffffff);
  MPI_Comm host = MPI_COMM_NULL, peers = MPI_COMM_NULL;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host);
  MPI_Comm_split(host, colour, 0, &peers);
  int place = 0, ranks = 0;
  MPI_Comm_rank(peers, &place);
  MPI_Comm_size(peers, &ranks);
  MPI_Comm_free(&peers);
  MPI_Comm_free(&host);
  if (std::string refusal = torch_ext::device_refusal(); !refusal.empty()) return {-1, std::move(refusal)};
  const char* const host_id = std::getenv("NCCL_HOSTID");
  return choose_gpu(place, ranks, device_count(), host_id != nullptr && *host_id != 0);
}

std::shared_ptr<Communicator> make_gpu_group(int device, std::chrono::milliseconds timeout) {
  int rank = 0, world = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &world);
  std::vector<std::uint8_t> id;
  if (rank == 0) id = torch_ext::make_device_group_id();
  std::uint64_t bytes = id.size();
  MPI_Bcast(&bytes, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);
  id.resize(bytes);
  MPI_Bcast(id.data(), int(bytes), MPI_BYTE, 0, MPI_COMM_WORLD);
  return torch_ext::make_device_group(id, rank, world, device, timeout);
}

}  // namespace thinwire::launch
