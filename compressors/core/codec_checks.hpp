#pragma once
// Which arguments every codec refuses, host's and GPU's alike.

#include <cstddef>

#include "compressors/core/plan.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/core/span.hpp"

namespace thinwire {

/// Checks in a codec's own name. Each throws Error{invalid_argument} naming what was given, but the last.
struct CodecChecks {
  const char* codec;

  void payload_size(std::size_t given, std::size_t bytes) const;
  void workspace(std::size_t given, std::size_t bytes) const;
  /// A gradient's dtype, and segments inside the flat buffer.
  void input(const Plan& plan, ConstBytes grad) const;
  /// Round 0 of an fp32 message.
  void message(int round, ConstBytes message) const;
  void output(const Plan& plan, ConstBytes out) const;
  /// As many states as segments, or none and no feedback.
  void state(const Plan& plan, const Recursion& recursion, std::size_t states) const;
  /// @throws Error{corrupt_payload}.
  void wire_size(std::size_t rank, std::size_t given, std::size_t bytes) const;

 private:
  void bounds(const Plan& plan, std::size_t elements) const;
};

}  // namespace thinwire
