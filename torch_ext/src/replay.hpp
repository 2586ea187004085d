#pragma once
// A config over recorded gradients, on ranks as threads of this process: the same engine as in training, without a cluster.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "collectives/reducer.hpp"
#include "compressors/core/config.hpp"

namespace thinwire::torch_ext {

/// One parameter's gradients: steps × world × numel elements, without gaps.
struct Recording {
  std::string name;
  std::vector<std::size_t> shape;
  const std::byte* data = nullptr;
};

struct ReplayResult {
  std::vector<std::vector<std::byte>> mean;                   ///< [parameter]: steps × numel elements
  std::vector<std::uint64_t> payload_bytes;                   ///< [step · world + rank]: handed to the transport
  std::vector<ReducerState> state;                            ///< [rank], after the last step
  std::vector<std::vector<std::vector<std::byte>>> payloads;  ///< [step][rank], if recorded; empty for a step that sent none
  Stats stats;                                                ///< of rank 0
};

/// All parameters are one bucket, in the order given. Rank 0's results are returned after they have been compared with every other rank's.
/// @throws what the reducer throws; invalid_argument for a world that is not 1 to 1024; internal if two ranks received different bytes.
ReplayResult replay(const Config& config, DType dtype, std::size_t steps, std::int64_t ranks, std::span<const Recording> recordings,
                    bool record_payloads);

}  // namespace thinwire::torch_ext
