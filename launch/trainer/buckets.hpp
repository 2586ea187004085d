#pragma once
// Gradients in buckets that are reduced while the backward pass still computes earlier layers.

#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "collectives/reducer.hpp"
#include "torch_ext/src/device_side.hpp"

namespace thinwire::launch {

/// Makes every parameter's gradient a view into a bucket of about `bucket_bytes` (a larger tensor has one of its own), last layers first:
/// that is the order in which the backward pass finishes them. A bucket goes to the reducer when its last gradient is there and all buckets
/// before it have gone, so the order is the same on all ranks. `parameters[i]` is the reducer's parameter i, contiguous fp32, all on one
/// device. On a GPU buckets are reduced on a stream beside the backward pass's, and nobody waits for them but later kernels.
class Buckets {
 public:
  Buckets(GradientReducer& reducer, std::vector<torch::Tensor> parameters, std::size_t bucket_bytes);
  ~Buckets();
  Buckets(const Buckets&) = delete;
  Buckets& operator=(const Buckets&) = delete;

  /// Call it before each backward pass: gradients are added to what is there.
  void zero();
  /// Call it after each backward pass: waits until every gradient is the mean over ranks; on a GPU the current stream does, not the caller.
  /// @throws what a reduction threw.
  void finish();

 private:
  struct Bucket {
    std::vector<std::uint32_t> parameters;  ///< in memory order
    torch::Tensor grad;
    std::size_t missing = 0;
    Work work;
  };

  void start(Bucket& bucket);
  void arrived(std::size_t bucket);

  GradientReducer& reducer_;
  std::vector<torch::Tensor> parameters_;
  std::unique_ptr<torch_ext::SideStream> side_;  ///< on a GPU
  std::vector<Bucket> buckets_;
  std::size_t next_ = 0;  ///< the first bucket that has not gone
  struct Hook {
    std::shared_ptr<torch::autograd::Node> node;  ///< torch holds it weakly
    std::uintptr_t key;
  };
  std::vector<Hook> hooks_;
};

}  // namespace thinwire::launch
