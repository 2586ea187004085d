#pragma once
// In which order the elements of a parameter lie in DDP's buckets. DDP lays a gradient out as its parameter lies in memory, channels_last
// and transposed ones too, when it makes its buckets; what the reducer keeps lies as the bucket does, and is permuted where that changes.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace thinwire::torch_ext {

/// All dimensions in the order in which they lie in memory, the slowest first; empty: as in a contiguous tensor.
using Layout = std::vector<std::int64_t>;

/// As DDP lays out the gradient of a parameter that lies so: a tensor with gaps or overlaps as a contiguous one.
Layout layout_of(const at::Tensor& tensor);
/// The tensor of these sizes whose elements lie one after the other in `flat` so.
at::Tensor laid_out(const at::Tensor& flat, at::IntArrayRef sizes, const Layout& layout);
/// from[i]: where the element that lies at i under `now` lay under `before`. For GradientReducer::reorder.
std::vector<std::uint32_t> reordering(at::IntArrayRef sizes, const Layout& before, const Layout& now);
/// Whether `flat`, a bucket's share, holds the gradient so: bit for bit.
bool shows(const at::Tensor& flat, const at::Tensor& grad, const Layout& layout);

}  // namespace thinwire::torch_ext
