#pragma once
// What error feedback does to its messages, measured now and then: two further passes over gradient and state, around the fused one.

#include <span>

#include "compressors/core/recursion.hpp"

namespace thinwire {

/// Σ over the live, finite elements of a segment, in double and in the order of block_sum.hpp: the same bits on a GPU.
struct Probe {
  double message = 0;   ///< x²
  double left = 0;      ///< (x − what was sent)²
  double stale = 0;     ///< (g − h)² after the step; forms with an estimate, g: the average where there is one
  double followed = 0;  ///< g² (or the average's); forms with an estimate
  double residual = 0;  ///< e² after the step

  THINWIRE_HD Probe& operator+=(const Probe& other) noexcept {
    message += other.message, left += other.left, stale += other.stale, followed += other.followed, residual += other.residual;
    return *this;
  }
};

/// Whether messages can be measured: with a residual or an estimate their remainder is in the state.
bool can_probe(const Recursion& recursion) noexcept;
/// Before the fused pass: Probe::message, one per segment. Reads gradient and state once.
void probe_messages(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, std::span<Probe> out) noexcept;
/// After it: the rest. Reads gradient and state once.
void probe_rest(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, std::span<Probe> out) noexcept;

}  // namespace thinwire
