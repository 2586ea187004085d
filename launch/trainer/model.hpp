#pragma once
// The network of both trainers; launch/model.py is the Python side: same layers, same names, same initial bits for a seed.

#include <torch/nn/module.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <zlib.h>

#include <cstdio>
#include <string>

namespace thinwire::launch {

/// 824,458 parameters for 28 x 28 grey images; 99.6 % of them in two tensors that are compressed (conv2.weight, fc1.weight).
struct Net : torch::nn::Module {
  Net() {
    conv1 = register_module("conv1", torch::nn::Conv2d(torch::nn::Conv2dOptions(1, 32, 3).padding(1)));
    conv2 = register_module("conv2", torch::nn::Conv2d(torch::nn::Conv2dOptions(32, 64, 3).padding(1)));
    fc1 = register_module("fc1", torch::nn::Linear(64 * 7 * 7, 256));
    fc2 = register_module("fc2", torch::nn::Linear(256, 10));
  }

  torch::Tensor forward(const torch::Tensor& images) {
    torch::Tensor x = torch::max_pool2d(torch::relu(conv1(images)), 2);
    x = torch::max_pool2d(torch::relu(conv2(x)), 2);
    return fc2(torch::relu(fc1(x.flatten(1))));
  }

  torch::nn::Conv2d conv1{nullptr}, conv2{nullptr};
  torch::nn::Linear fc1{nullptr}, fc2{nullptr};
};

/// Bytes (n, 28, 28) as floats (n, 1, 28, 28) of about zero mean and unit variance (Fashion-MNIST's moments).
inline torch::Tensor pixels(const torch::Tensor& images) {
  return images.unsqueeze(1).to(torch::kFloat32).div_(255).sub_(0.2860).div_(0.3530);
}

/// CRC-32 and Adler-32 of the parameters' bytes in order, 16 hexadecimal digits.
inline std::string fingerprint(const torch::nn::Module& model) {
  uLong crc = crc32(0, nullptr, 0), adler = adler32(0, nullptr, 0);
  for (const torch::Tensor& parameter : model.parameters()) {
    const torch::Tensor raw = parameter.detach().contiguous().cpu();
    const auto* bytes = static_cast<const Bytef*>(raw.const_data_ptr());
    crc = crc32_z(crc, bytes, raw.nbytes());
    adler = adler32_z(adler, bytes, raw.nbytes());
  }
  char text[17];
  std::snprintf(text, sizeof text, "%08lx%08lx", crc, adler);
  return text;
}

}  // namespace thinwire::launch
