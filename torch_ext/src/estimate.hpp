#pragma once
// What a config will send, from its layouts alone: `thinwire check`.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "compressors/core/config.hpp"

namespace thinwire::torch_ext {

/// One fp32 tensor of `numel` elements and two dimensions at one stage of training: compressed, alone in its bucket; dense beside
/// compressed ones, what it adds to theirs.
struct Estimate {
  std::string stage;                        ///< "dense start", "warm-up", "compressed", …, for people
  std::optional<std::uint64_t> first_step;  ///< the stage's first synchronised step; none: when freeze=auto has frozen
  double density = 1;
  bool compressed = false;
  std::uint64_t payload_bytes = 0;  ///< handed to the transport per step, capacity included
  double wire_bytes = 0;            ///< what leaves one rank per step
  double dense_bytes = 0;           ///< what a ring all-reduce of the same gradients would send
};

/// One entry per stage, in order. `exchange=auto` is decided as the reducer decides it: gather becomes dense where capacity × (world − 1)
/// is at least what a ring all-reduce sends. @throws invalid_argument for a tensor too large for the codec.
std::vector<Estimate> estimate(const Config& config, std::uint64_t numel, int world);

}  // namespace thinwire::torch_ext
