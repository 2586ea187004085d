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

/// Elements between two calls of `ask` below: whole lines of every dtype, and a length that the compiler knows.
inline constexpr std::size_t kAskEvery = 64;

/// one(i) for all i < n in order, and before every kAskEvery of them ask(i), which prefetches what it reads behind element i. A simple loop
/// with prefetches inside would not be vectorised.
template <class Ask, class One>
[[gnu::always_inline]] inline void for_prefetched(std::size_t n, Ask ask, One one) noexcept {
  std::size_t i = 0;
  for (; i + kAskEvery <= n; i += kAskEvery) {
    ask(i);
    for (std::size_t j = i; j < i + kAskEvery; ++j) one(j);
  }
  for (; i < n; ++i) one(i);
}

}  // namespace thinwire
