#include "bench/kernels_cuda_data.hpp"

#include <algorithm>
#include <vector>

#include "bench/kernels_data.hpp"

namespace thinwire::bench {

DeviceArrays::DeviceArrays(std::size_t numel, Stream stream) : numel_(numel), stream_(stream) {
  const std::size_t bytes = 4 * (numel + Arrays::kSlack);
  for (DeviceBuffer* buffer : {&grad_, &momentum_, &residual_, &from_, &out_}) buffer->reserve(bytes, kDevice);
  half_.reserve(bytes / 2, kDevice);
  std::vector<float> host(numel + Arrays::kSlack);
  fill_normal(host.data(), host.size(), 1.0f, 1);
  device_copy(grad_.data(), host.data(), bytes, stream);
  device_copy(from_.data(), host.data(), bytes, stream);
  device_wait(stream);
  std::vector<std::uint16_t> half(host.size());
  std::transform(host.begin(), host.end(), half.begin(), [](float x) { return float_to_bf16(x); });
  device_copy(half_.data(), half.data(), bytes / 2, stream);
  device_wait(stream);
}

ConstBytes DeviceArrays::grad(std::size_t repetition, DType dtype, std::size_t numel) const {
  const std::size_t at = repetition * Arrays::kSlide % Arrays::kSlack;
  const std::byte* base = dtype == DType::fp32 ? grad_.data() : half_.data();
  return {base + at * size_of(dtype), numel * size_of(dtype), dtype, Place::cuda, kDevice};
}

void DeviceArrays::settle(const Recursion& recursion, double density) {
  const Settled to = settled(recursion, density);
  std::vector<float> host(numel_);
  fill_normal(host.data(), numel_, to.momentum, 2);
  device_copy(momentum_.data(), host.data(), 4 * numel_, stream_);
  device_wait(stream_);
  fill_uniform(host.data(), numel_, to.residual, 3);
  device_copy(residual_.data(), host.data(), 4 * numel_, stream_);
  device_wait(stream_);
}

}  // namespace thinwire::bench
