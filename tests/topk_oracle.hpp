#pragma once
// An independent reading of docs/wire_format.md and of the recursions, for tests. Shares no code with compressors/topk: payloads are parsed
// byte by byte.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "compressors/core/dtype.hpp"
#include "compressors/core/plan.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/topk/topk.hpp"
#include "tests/dtype_oracle.hpp"

namespace oracle {

struct Layout {
  std::size_t k = 0, capacity = 0, index_bytes = 0, value_bytes = 0;
  int form = 0;  // 0 u32, 1 u16 in blocks, 2 bitmap
};

inline Layout layout(std::size_t n, double density, const thinwire::TopKOptions& options) {
  Layout out;
  if (n == 0) return out;
  const double k = std::ceil(density * double(n) - 1e-9);
  out.k = k < 1 ? 1 : std::size_t(k);
  out.capacity = options.exact ? out.k : std::min(n, out.k + std::size_t(std::ceil(double(out.k) / 4)));
  const auto up4 = [](std::size_t b) { return (b + 3) & ~std::size_t(3); };
  const std::size_t bytes[3] = {4 * out.capacity, 4 * ((n + 65535) / 65536) + up4(2 * out.capacity), up4((n + 7) / 8)};
  using Index = thinwire::TopKOptions::Index;
  out.form = options.index == Index::u32 ? 0 : options.index == Index::u16 ? 1 : options.index == Index::bitmap ? 2 : 0;
  if (options.index == Index::automatic) {
    for (int f = 1; f < 3; ++f) {
      if (bytes[f] < bytes[out.form]) out.form = f;
    }
  }
  out.index_bytes = bytes[out.form];
  out.value_bytes = up4(out.capacity * thinwire::size_of(options.wire));
  return out;
}

struct Entry {
  std::size_t index;
  float value;
  bool operator==(const Entry&) const = default;
};

/// The entries of every segment; throws std::runtime_error on anything the format does not allow, unused bytes that are not zero among it.
inline std::vector<std::vector<Entry>> parse(const std::vector<std::byte>& payload, const thinwire::Plan& plan,
                                             const thinwire::TopKOptions& options) {
  const auto u32 = [&](std::size_t at) {
    std::uint32_t x;
    if (at + 4 > payload.size()) throw std::runtime_error("past the end");
    std::memcpy(&x, &payload[at], 4);
    return x;
  };
  const auto u16 = [&](std::size_t at) {
    std::uint16_t x;
    if (at + 2 > payload.size()) throw std::runtime_error("past the end");
    std::memcpy(&x, &payload[at], 2);
    return x;
  };
  const auto zero = [&](std::size_t from, std::size_t to) {
    for (; from < to; ++from) {
      if (payload[from] != std::byte{0}) throw std::runtime_error("unused bytes are not zero");
    }
  };
  if (u32(0) != 0x50575754) throw std::runtime_error("magic");
  if (u32(12) != plan.segments.size()) throw std::runtime_error("segments");
  std::vector<std::vector<Entry>> out;
  std::size_t at = 64 + 4 * plan.segments.size();
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    const std::size_t n = plan.segments[s].count;
    const Layout l = layout(n, plan.segments[s].setting.density, options);
    const std::size_t kept = u32(64 + 4 * s);
    if (kept > l.capacity) throw std::runtime_error("kept");
    std::vector<std::size_t> indices;
    std::size_t used = 0;
    if (l.form == 0) {
      for (std::size_t i = 0; i < kept; ++i) indices.push_back(u32(at + 4 * i));
      used = 4 * kept;
    } else if (l.form == 1) {
      const std::size_t blocks = (n + 65535) / 65536;
      std::size_t offset = at + 4 * blocks;
      for (std::size_t b = 0; b < blocks; ++b) {
        for (std::size_t i = 0; i < u32(at + 4 * b); ++i, offset += 2) indices.push_back(65536 * b + u16(offset));
      }
      used = offset - at;
    } else {
      for (std::size_t i = 0; i < 8 * l.index_bytes; ++i) {
        if (((u32(at + i / 32 * 4) >> (i % 32)) & 1u) != 0) indices.push_back(i);
      }
      used = l.index_bytes;
    }
    if (indices.size() != kept) throw std::runtime_error("index count");
    zero(at + used, at + l.index_bytes);
    const std::size_t values = at + l.index_bytes, size = thinwire::size_of(options.wire);
    std::vector<Entry> entries;
    for (std::size_t i = 0; i < kept; ++i) {
      if (indices[i] >= n || (i > 0 && indices[i] <= indices[i - 1])) throw std::runtime_error("indices");
      float value;
      if (size == 4) {
        const std::uint32_t bits = u32(values + 4 * i);
        std::memcpy(&value, &bits, 4);
      } else {
        value = float(half_value(u16(values + 2 * i), options.wire));
      }
      entries.push_back({indices[i], value});
    }
    zero(values + kept * size, values + l.value_bytes);
    out.push_back(std::move(entries));
    at = values + l.value_bytes;
  }
  if (at != payload.size()) throw std::runtime_error("length");
  return out;
}

/// What a rank holds of one element, as far as the recursion has it.
struct Held {
  float u = 0, residual = 0, estimate = 0, average = 0;
};

/// One element of a recursion, as the equations have it. `sits_out`: its message overflowed, nothing of it moves.
struct Element {
  Held held;  ///< if nothing is sent
  float x = 0;
  bool sits_out = false, nonfinite = false;
};

/// g is not finite: h stands for it. t = g - h;  x = eta*e + t;  e + t is kept.
inline Element update_estimate(const thinwire::Recursion& r, float g, const Held& held, float eta) {
  Element out{held, 0, false, !std::isfinite(g)};
  if (out.nonfinite) g = held.estimate;
  if (r.fresh < 1) {
    const float before = 1.0f - r.fresh, old = before * held.average, news = r.fresh * g;
    out.held.average = g = old + news;
  }
  const float t = g - held.estimate, fed = eta * held.residual;
  out.x = r.control ? fed + t : t;
  out.held.residual = r.control ? held.residual + t : 0.0f;
  if (std::isfinite(out.held.residual)) out.held.residual = stored_value(out.held.residual, r.narrow);
  if (!std::isfinite(out.x) || !std::isfinite(out.held.residual) || !std::isfinite(g)) out = {held, 0, true, true};
  return out;
}

inline Element update(const thinwire::Recursion& r, float grad, float factor, const Held& held, float eta = 0) {
  using Kind = thinwire::Recursion::Kind;
  if (r.kind == Kind::estimate) return update_estimate(r, grad * factor, held, eta);
  Element out{held, 0, false, false};
  float g = grad * factor;
  if (!std::isfinite(g)) {
    out.nonfinite = true;
    g = 0;
  }
  if (r.kind == Kind::none) {
    out.x = g;
  } else if (r.kind == Kind::error_feedback) {
    const float kept = r.decay * held.residual;
    out.x = kept + g;
  } else if (!r.nesterov) {
    const float kept = r.momentum * held.u;
    out.held.u = kept + g;
    out.x = held.residual + out.held.u;
  } else {
    const float pushed = held.u + g;
    out.held.u = r.momentum * pushed;
    const float ahead = out.held.u + g;
    out.x = held.residual + ahead;
  }
  if (!std::isfinite(out.x)) {
    out = {held, 0, true, true};
  } else {
    out.held.residual = stored_value(out.x, r.narrow);
  }
  return out;
}

inline float cut_at_largest(float x) { return std::isfinite(x) ? x : std::copysign(std::numeric_limits<float>::max(), x); }

/// What is held once `sent` has left a message x.
inline Held after_sending(const thinwire::Recursion& r, Held held, float x, float sent) {
  if (r.kind == thinwire::Recursion::Kind::estimate) {
    if (r.control) held.residual = stored_value(cut_at_largest(held.residual - sent), r.narrow);
    held.estimate = stored_value(cut_at_largest(held.estimate + sent), r.grid);
    return held;
  }
  held.residual = stored_value(x - sent, r.narrow);
  if (r.mask) held.u = 0;
  return held;
}

}  // namespace oracle
