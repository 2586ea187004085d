#pragma once
// Who owns which part of a parameter. By parameter, never by bucket, so that re-bucketing moves nothing: n elements are cut into N parts of
// 8·ceil(n/8N), the last ones shorter or empty; rank r owns part r of every parameter.

#include <algorithm>
#include <cstddef>

namespace thinwire {

struct Range {
  std::size_t first, count;
};

/// Elements [first, first + count) of a parameter of `numel` elements that `rank` of `world` owns.
constexpr Range owned_part(std::size_t numel, int world, int rank) noexcept {
  const std::size_t n = std::size_t(world);
  const std::size_t part = 8 * ((numel + 8 * n - 1) / (8 * n));
  const std::size_t first = std::min(numel, std::size_t(rank) * part);
  return {first, std::min(part, numel - first)};
}

}  // namespace thinwire
