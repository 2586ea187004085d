#include "bench/kernels_data.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <vector>

#include "compressors/core/clones.hpp"
#include "compressors/core/dtype.hpp"
#include "compressors/core/error.hpp"

namespace thinwire::bench {
namespace {

constexpr std::size_t kHugePage = std::size_t(2) << 20;
constexpr std::size_t kBadDistance = std::size_t(128) << 20;

constexpr std::size_t round_up(std::size_t x, std::size_t to) noexcept { return (x + to - 1) / to * to; }

THINWIRE_CLONES void narrow(const float* in, std::uint16_t* out, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) out[i] = float_to_bf16(in[i]);
}

/// The numbers of an array, as bf16 in its first half.
void halve(float* array, std::size_t count) {
  std::array<float, 4096> piece;
  for (std::size_t i = 0; i < count; i += piece.size()) {
    const std::size_t n = std::min(piece.size(), count - i);
    std::copy_n(array + i, n, piece.begin());
    narrow(piece.data(), reinterpret_cast<std::uint16_t*>(array) + i, n);
  }
}

}  // namespace

THINWIRE_CLONES void fill_normal(float* out, std::size_t count, float sigma, std::uint64_t seed) {
  for (std::size_t i = 0; i < count; ++i) out[i] = normal_at(seed, i, sigma);
}

THINWIRE_CLONES void fill_uniform(float* out, std::size_t count, float bound, std::uint64_t seed) {
  for (std::size_t i = 0; i < count; ++i) out[i] = uniform_at(seed, i, bound);
}

Settled settled(const Recursion& recursion, double density) {
  double momentum = 0;
  if (recursion.kind == Recursion::Kind::momentum_correction)
    momentum = 1 / std::sqrt(1 - double(recursion.momentum) * recursion.momentum);
  else if (recursion.averaged)
    momentum = std::sqrt((1 - double(kBeta1)) / (1 + double(kBeta1)));
  const double increment =
      (momentum > 0 ? momentum : 1) * std::sqrt(2 / M_PI);  // a step adds the momentum to the residual, or the gradient
  return {float(momentum), float(increment / (2 * density))};
}

Arrays::Arrays(std::size_t numel, Placement placement) : numel_(numel) {
  if (placement == Placement::arena) {
    const std::array<std::size_t, 6> counts = {numel + kSlack, numel, numel, numel, numel, (numel + kSlack) / 2};
    arena_ = Arena(counts);
    grad_ = arena_.array(0), momentum_ = arena_.array(1), residual_ = arena_.array(2);
    from_ = arena_.array(3), out_ = arena_.array(4), grad_bf16_ = arena_.array(5);
  } else {
    const std::size_t distance = round_up(numel * sizeof(float), kBadDistance);
    mapped_ = 3 * distance + kSlack * sizeof(float) + kHugePage;
    mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) fail(Errc::device, "no memory for " + std::to_string(mapped_) + " bytes");
    const std::size_t base = round_up(reinterpret_cast<std::size_t>(mapping_), kHugePage);
    madvise(reinterpret_cast<void*>(base), mapped_ - kHugePage, MADV_HUGEPAGE);
    momentum_ = reinterpret_cast<float*>(base);
    residual_ = reinterpret_cast<float*>(base + distance);
    grad_ = reinterpret_cast<float*>(base + 2 * distance);  // last: its window slides past the end
  }
  fill_normal(grad_, numel + kSlack, 1.0f, 1);
  if (grad_bf16_ != nullptr) narrow(grad_, reinterpret_cast<std::uint16_t*>(grad_bf16_), numel + kSlack);
  if (from_ != nullptr) fill_uniform(from_, numel, 1.0f, 2), fill_uniform(out_, numel, 1.0f, 3);
}

Arrays::~Arrays() {
  if (mapping_ != nullptr) munmap(mapping_, mapped_);
}

void Arrays::settle(const Recursion& recursion, double density) {
  if (recursion.kind == Recursion::Kind::none) return;
  if (recursion.kind == Recursion::Kind::estimate) {  // thresholds come from the messages themselves, whatever these are
    fill_normal(momentum_, numel_, 0.5f, 4);
    fill_normal(residual_, numel_, 1.0f, 5);
  } else {
    const Settled to = settled(recursion, density);
    if (to.momentum > 0) fill_normal(momentum_, numel_, to.momentum, 4);
    fill_uniform(residual_, numel_, to.residual, 5);
  }
  if (recursion.narrow) halve(residual_, numel_);
  if (recursion.grid) halve(momentum_, numel_);
}

std::string Arrays::offsets() const {
  std::string text;
  const std::array<std::pair<const char*, const float*>, 5> arrays = {
      {{"momentum", momentum_}, {"residual", residual_}, {"copy source", from_}, {"copy target", out_}, {"bf16 gradient", grad_bf16_}}};
  for (const auto& [name, array] : arrays) {
    if (array == nullptr) continue;
    const std::ptrdiff_t bytes = (array - grad_) * std::ptrdiff_t(sizeof(float));
    char piece[96];
    std::snprintf(piece, sizeof piece, "%s%s %+.3f MiB", text.empty() ? "" : ", ", name, double(bytes) / 1048576);
    text += piece;
  }
  return text;
}

}  // namespace thinwire::bench
