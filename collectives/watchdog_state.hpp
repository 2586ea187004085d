#pragma once

#include <cstdint>

namespace thinwire {

/// EControl's watchdog, of one parameter that it has looked at.
struct WatchdogState {
  float eta = 0;            ///< what it has lowered eta to; 0: nothing
  std::uint64_t since = 0;  ///< 1 + the step at which its window begins; 0: none has
  double ratio = 0;         ///< the smallest ‖e‖²/‖g‖² since eta is what it is; 0: not taken yet
  double recent = 0;        ///< the smallest since the window began
  double grad = 0;          ///< the largest ‖g‖² of late
  std::uint32_t grown = 0;  ///< looks in a row at which the ratio had grown too much
  std::uint32_t cuts = 0;   ///< how often it has lowered eta
  bool operator==(const WatchdogState&) const = default;
};

}  // namespace thinwire
