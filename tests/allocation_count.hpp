#pragma once
// Counts the process's calls of operator new, for promises of "allocates nothing". Its .cpp replaces the global operators: link it once.

namespace thinwire::test {

/// Allocations by operator new in all threads since the start.
long allocations() noexcept;

}  // namespace thinwire::test
