#include "torch_ext/src/layout.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "compressors/core/error.hpp"

namespace thinwire::torch_ext {
namespace {

/// Equal bits, so that a NaN is itself.
bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  const at::ScalarType word = a.element_size() == 4 ? at::kInt : at::kShort;
  return at::equal(a.view(word), b.view(word));
}

}  // namespace

Layout layout_of(const at::Tensor& tensor) {
  if (tensor.is_contiguous() || !tensor.is_non_overlapping_and_dense()) return {};
  Layout order(std::size_t(tensor.dim()));
  std::iota(order.begin(), order.end(), std::int64_t(0));
  // Dimensions of one element lie anywhere: in front, so that two layouts that differ in nothing else are equal.
  const auto weight = [&](std::int64_t d) { return tensor.size(d) == 1 ? std::numeric_limits<std::int64_t>::max() : tensor.stride(d); };
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return weight(a) > weight(b); });
  return order;
}

at::Tensor laid_out(const at::Tensor& flat, at::IntArrayRef sizes, const Layout& layout) {
  if (layout.empty()) return flat.view(sizes);
  std::vector<std::int64_t> outer(layout.size()), place(layout.size());
  for (std::size_t i = 0; i < layout.size(); ++i) {
    outer[i] = sizes[std::size_t(layout[i])];
    place[std::size_t(layout[i])] = std::int64_t(i);
  }
  return flat.view(outer).permute(place);
}

std::vector<std::uint32_t> reordering(at::IntArrayRef sizes, const Layout& before, const Layout& now) {
  const at::NoGradGuard no_grad;
  std::int64_t numel = 1;
  for (const std::int64_t size : sizes) numel *= size;
  if (numel > std::int64_t(1) << 31)
    fail(Errc::unsupported,
         "a parameter of " + std::to_string(numel) + " elements has changed its memory format; only up to 2^31 are moved");
  const at::Tensor places = laid_out(at::arange(numel, at::kInt), sizes, before);
  const at::Tensor moved = (now.empty() ? places : places.permute(now)).contiguous();
  std::vector<std::uint32_t> from(static_cast<std::size_t>(numel));
  if (numel != 0) std::memcpy(from.data(), moved.const_data_ptr<std::int32_t>(), from.size() * sizeof(std::uint32_t));
  return from;
}

bool shows(const at::Tensor& flat, const at::Tensor& grad, const Layout& layout) {
  const at::NoGradGuard no_grad;
  if (grad.is_sparse() || grad.scalar_type() != flat.scalar_type() || grad.device() != flat.device()) return false;
  return same_bits(laid_out(flat, grad.sizes(), layout), grad);
}

}  // namespace thinwire::torch_ext
