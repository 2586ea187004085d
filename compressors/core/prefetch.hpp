#pragma once
// Lines that a stream will want soon. Hardware prefetchers stop at the end of a page and follow only so many streams; where a loop says
// itself what it reads next, one core has more lines under way (docs/performance.md).

#include <cstddef>
#include <cstdint>

namespace thinwire {

/// How far ahead of its loads a stream asks, in bytes: longer than memory takes to answer, and few enough lines that L1 keeps them until
/// then.
inline constexpr std::size_t kAhead = 2048;

/// The lines `kAhead` after `bytes` bytes at `from`, into the nearest cache. What lies behind the end of an array is asked for and never
/// faults.
template <std::size_t bytes>
[[gnu::always_inline]] inline void prefetch_ahead(const void* from) noexcept {
  const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(from) + kAhead;
  for (std::size_t line = 0; line < bytes; line += 64) __builtin_prefetch(reinterpret_cast<const void*>(at + line), 0, 3);
}

}  // namespace thinwire
