#include "bench/kernels_cuda_data.hpp"

#include "bench/fill.hpp"
#include "bench/kernels_data.hpp"

namespace thinwire::bench {

DeviceArrays::DeviceArrays(std::size_t numel, Stream stream) : numel_(numel), stream_(stream) {
  const std::size_t bytes = 4 * (numel + Arrays::kSlack);
  for (DeviceBuffer* buffer : {&grad_, &momentum_, &residual_, &from_, &out_}) buffer->reserve(bytes, kDevice);
  half_.reserve(bytes / 2, kDevice);
  fill_normal(grad_.bytes(DType::fp32), 1.0f, 1, stream);
  fill_normal(from_.bytes(DType::fp32), 1.0f, 1, stream);
  fill_normal(half_.bytes(DType::bf16), 1.0f, 1, stream);
}

ConstBytes DeviceArrays::grad(std::size_t repetition, DType dtype, std::size_t numel) const {
  const std::size_t at = repetition * Arrays::kSlide % Arrays::kSlack;
  const std::byte* base = dtype == DType::fp32 ? grad_.data() : half_.data();
  return {base + at * size_of(dtype), numel * size_of(dtype), dtype, Place::cuda, kDevice};
}

void DeviceArrays::settle(const Recursion& recursion, double density) {
  const Settled to = settled(recursion, density);
  fill_normal({momentum_.data(), 4 * numel_, DType::fp32, Place::cuda, kDevice}, to.momentum, 2, stream_);
  fill_uniform({residual_.data(), 4 * numel_, DType::fp32, Place::cuda, kDevice}, to.residual, 3, stream_);
}

}  // namespace thinwire::bench
