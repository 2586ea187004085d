#pragma once
// What a probe adds up of one element: on the host and in the kernels, with the same bits.

#include "compressors/core/probe.hpp"
#include "compressors/feedback/feedback_math.hpp"

namespace thinwire::feedback {

/// An element's state, 0 where the recursion has none. `momentum`: u, or the shared m.
struct ProbedElement {
  float momentum = 0, residual = 0, estimate = 0, average = 0;
};

/// What the recursion's coefficients are for a segment.
struct ProbedSegment {
  float eta = 0;          ///< control
  float beta1 = 0;        ///< averaged
  bool averages = false;  ///< a worker average is kept
};

/// The message of gradient g before the fused pass.
THINWIRE_HD inline double probed_message(const Recursion& recursion, const ProbedSegment& segment, float g,
                                         const ProbedElement& own) noexcept {
  const double rate = rate_of(recursion);
  if (recursion.kind == Recursion::Kind::estimate) {
    double x = segment.averages ? average(average_shares(recursion).keep, average_shares(recursion).fresh, own.average, g) : g;
    x -= double(own.estimate);
    return recursion.control ? x + double(segment.eta) * double(own.residual) : x;
  }
  if (recursion.kind == Recursion::Kind::momentum_correction) {
    const double u = recursion.nesterov ? rate * double(own.momentum + g) : rate * double(own.momentum) + double(g);
    return double(own.residual) + (recursion.nesterov ? u + double(g) : u);
  }
  const double x = recursion.averaged ? average(segment.beta1, 1 - segment.beta1, own.momentum, g) : g;
  return x + rate * double(own.residual);
}

/// The rest of Probe after it.
THINWIRE_HD inline Probe probed_rest(const Recursion& recursion, const ProbedSegment& segment, float g, const ProbedElement& own) noexcept {
  Probe out;
  const double e = own.residual;
  double left = e;
  if (recursion.kind == Recursion::Kind::estimate) {
    const double followed = segment.averages ? own.average : g, stale = followed - double(own.estimate);
    // e = e' + t − sent and g − h = t − sent, so x − sent = eta·e' + (g − h) with e' = e − (g − h).
    left = recursion.control ? double(segment.eta) * (e - stale) + stale : stale;
    out.stale = stale * stale;
    out.followed = followed * followed;
  }
  out.left = left * left;
  out.residual = e * e;
  return out;
}

}  // namespace thinwire::feedback
