#pragma once
// An independent reading of docs/wire_format.md and of the definitions of DESIGN's numerics, for tests. Shares no code with
// compressors/sign: payloads are parsed byte by byte, sums are taken in the order that the definition names, bits are !(x < 0).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <stdexcept>
#include <vector>

#include "compressors/core/plan.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/sign/sign.hpp"
#include "tests/dtype_oracle.hpp"

namespace oracle {

using thinwire::SignOptions;

/// What a payload says of one segment.
struct Signs {
  std::vector<float> scales;
  std::vector<bool> bits;
  bool operator==(const Signs&) const = default;

  float value(std::size_t i, std::size_t block) const { return bits[i] ? scales[i / block] : -scales[i / block]; }
};

inline std::size_t sign_block(const SignOptions& options, std::size_t n) { return options.block != 0 ? options.block : n != 0 ? n : 1; }

/// Bytes of a payload of these segments, before a plan's other parts make it longer.
inline std::size_t sign_bytes(std::span<const thinwire::Segment> part, const SignOptions& options) {
  std::size_t bytes = 64;
  for (const auto& segment : part)
    bytes += 4 * ((segment.count + sign_block(options, segment.count) - 1) / sign_block(options, segment.count));
  for (const auto& segment : part) bytes += (segment.count + 7) / 8;
  return (bytes + 7) / 8 * 8;
}

/// One part's payload; throws std::runtime_error on anything the format does not allow, unused bits that are not zero among it.
inline std::vector<Signs> parse_signs(std::span<const std::byte> payload, std::span<const thinwire::Segment> part, std::uint64_t step,
                                      const SignOptions& options) {
  const auto byte = [&](std::size_t at) {
    if (at >= payload.size()) throw std::runtime_error("past the end");
    return std::uint64_t(payload[at]);
  };
  const auto number = [&](std::size_t at, int bytes) {
    std::uint64_t x = 0;
    for (int i = 0; i < bytes; ++i) x |= byte(at + std::size_t(i)) << (8 * i);
    return x;
  };
  if (payload.size() % 8 != 0 || payload.size() < sign_bytes(part, options)) throw std::runtime_error("length");
  if (number(0, 4) != 0x50575754 || number(4, 2) != 1 || number(6, 1) != 2 || number(7, 1) != 0) throw std::runtime_error("header");
  if (number(12, 4) != part.size()) throw std::runtime_error("segments");
  if (number(16, 8) != payload.size()) throw std::runtime_error("bytes");
  if (number(32, 8) != step) throw std::runtime_error("step");
  if (number(40, 8) != 0 || number(48, 8) != 0 || number(56, 8) != 0) throw std::runtime_error("reserved");
  std::vector<Signs> out(part.size());
  std::size_t at = 64;
  for (std::size_t s = 0; s < part.size(); ++s) {
    for (std::size_t i = 0; i < part[s].count; i += sign_block(options, part[s].count), at += 4) {
      const auto bits = std::uint32_t(number(at, 4));
      float scale;
      std::memcpy(&scale, &bits, 4);
      if (!std::isfinite(scale) || std::signbit(scale)) throw std::runtime_error("scale");
      out[s].scales.push_back(scale);
    }
  }
  for (std::size_t s = 0; s < part.size(); ++s) {
    const std::size_t n = part[s].count;
    for (std::size_t i = 0; i < (n + 7) / 8 * 8; ++i) {
      const bool bit = ((byte(at + i / 8) >> (i % 8)) & 1) != 0;
      if (i < n) out[s].bits.push_back(bit);
      if (i >= n && bit) throw std::runtime_error("a bit past the end");
    }
    at += (n + 7) / 8;
  }
  for (; at < payload.size(); ++at) {
    if (byte(at) != 0) throw std::runtime_error("unused bytes are not zero");
  }
  return out;
}

/// The sum of at most 4096 weights: weight i into fp32 partial i mod 64 in rising i, the partials in halves. Where fp32 does not hold it,
/// in double one after the other.
inline double block_sum(std::span<const float> magnitudes, bool squares) {
  float partial[64] = {};
  for (std::size_t i = 0; i < magnitudes.size(); ++i) {
    const float w = squares ? magnitudes[i] * magnitudes[i] : magnitudes[i];
    partial[i % 64] += w;
  }
  for (int half : {32, 16, 8, 4, 2, 1}) {
    for (int i = 0; i < half; ++i) partial[i] = partial[i] + partial[i + half];
  }
  if (std::isfinite(partial[0])) return partial[0];
  double sum = 0;
  for (const float m : magnitudes) sum += squares ? double(m) * double(m) : double(m);
  return sum;
}

/// The scale of one block of messages, of which `live` count; dead ones have magnitude 0 here.
inline float scale_of(std::span<const float> magnitudes, std::size_t live, const SignOptions& options, const thinwire::Output& output) {
  if (live == 0) return 0;
  const bool squares = options.scale == SignOptions::Scale::l2;
  double sum;
  if (magnitudes.size() <= 4096) {
    sum = block_sum(magnitudes, squares);
  } else {
    double partial[64] = {};
    for (std::size_t i = 0, b = 0; i < magnitudes.size(); i += 4096, ++b)
      partial[b % 64] += block_sum(magnitudes.subspan(i, std::min<std::size_t>(4096, magnitudes.size() - i)), squares);
    for (int half : {32, 16, 8, 4, 2, 1}) {
      for (int i = 0; i < half; ++i) partial[i] = partial[i] + partial[i + half];
    }
    sum = partial[0];
  }
  const double mean = sum / double(live);
  const float scale = float(squares ? std::sqrt(mean) : mean);
  if (output.dtype == DType::fp32) return scale;
  const float out = scale * output.factor;
  const float fitted = float(half_value(nearest_bits(out, output.dtype, true), output.dtype)) / output.factor;
  return std::isfinite(fitted) ? fitted : scale;
}

inline float cut_at_largest(float x) { return std::isfinite(x) ? x : std::copysign(std::numeric_limits<float>::max(), x); }

/// One element of a recursion with an estimate, as the equations have it: x is sent as a sign, and what is sent leaves `residual`, which
/// is e + t until then, for `estimate`.
struct Estimated {
  float x = 0, residual = 0, estimate = 0, average = 0;
  bool nonfinite = false;

  void send(float w) {
    residual = cut_at_largest(residual - w);
    estimate = cut_at_largest(estimate + w);
  }
};
inline Estimated sign_estimate(const thinwire::Recursion& r, float g, float eta, float e, float h, float v) {
  Estimated out{0, e, h, v, !std::isfinite(g)};
  if (out.nonfinite) g = h;
  if (r.fresh < 1) {
    const float before = 1.0f - r.fresh, old = before * v, news = r.fresh * g;
    out.average = g = old + news;
  }
  const float t = g - h, fed = eta * e;
  out.x = r.control ? fed + t : t;
  if (r.control) out.residual = e + t;
  if (!std::isfinite(out.x) || !std::isfinite(out.residual) || !std::isfinite(g)) out = {0, e, h, v, true};
  return out;
}

/// One element of the other recursions.
struct Message {
  float x = 0;
  bool nonfinite = false;
};
inline Message sign_message(const thinwire::Recursion& r, float grad, float factor, float beta, float m, float e) {
  const bool feeds = r.kind == thinwire::Recursion::Kind::error_feedback;
  const auto recursion = [&](float g) {
    if (r.averaged) {
      const float kept = beta * m, fresh = 1.0f - beta, news = fresh * g;
      g = kept + news;
    }
    if (!feeds) return g;
    const float kept = r.decay * e;
    return kept + g;
  };
  const float g = grad * factor;
  Message out{recursion(std::isfinite(g) ? g : 0.0f), !std::isfinite(g)};
  if (std::isfinite(out.x)) return out;
  out.nonfinite = true;  // the accumulated message overflowed: its news is dropped too
  out.x = recursion(0.0f);
  if (!std::isfinite(out.x)) out.x = feeds ? e : 0.0f;
  return out;
}

}  // namespace oracle
