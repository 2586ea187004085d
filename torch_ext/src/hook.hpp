#pragma once
// From DDP's buckets to GradientReducer and back: tensor → span, parameter → id, done → future. No Python here: the backward pass never
// needs the GIL.

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/distributed/c10d/comm.hpp>

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "collectives/reducer.hpp"
#include "compressors/core/config.hpp"
#include "torch_ext/src/c10d_communicator.hpp"
#include "torch_ext/src/device_side.hpp"
#include "torch_ext/src/layout.hpp"

namespace thinwire::torch_ext {

struct NamedParameter {
  std::string name;
  at::Tensor tensor;
};

struct EngineOptions {
  /// GradScaler's one scale tensor (fp32): on the CPU it is read whenever a bucket comes, on the gradients' GPU by the bucket's kernels;
  /// undefined: gradients are not scaled.
  at::Tensor loss_scale;
  bool momentum_elsewhere = false;  ///< see ReducerOptions
  /// Makes the group that reduces on a GPU. Collective.
  std::function<std::shared_ptr<Communicator>(int device)> make_device_group;
  /// Turns an error of ours into the exception that autograd shows; null: as it is.
  std::exception_ptr (*translate)(std::exception_ptr error) noexcept = nullptr;
};

/// All of one model's buckets of one rank. A bucket's parameters are known by their tensors' identity, so buckets may change between steps.
///
/// Without names the parameters are learnt: the buckets of the first step wait for its last one, then the reducer is built from all of them
/// in the order in which they came, and they are worked through in that order. Nothing but that one step's overlap is lost, but what names
/// the state is then the order of arrival.
///
/// Gradients are reduced where the parameters are: on the CPU over Gloo by a thread of the reducer's, on a GPU over NCCL on a stream beside
/// autograd's, where no host thread waits.
///
/// In a forked child every call is refused and the destructor lets go of the threads' memory without touching it.
class Engine {
 public:
  /// Collective if `parameters` is given: it makes the group. Parameters are held weakly.
  Engine(std::shared_ptr<C10dCommunicator> communicator, Config config, std::optional<std::vector<NamedParameter>> parameters,
         EngineOptions options);
  ~Engine();

  /// Queues a bucket; never throws: what goes wrong is in the future. `result`: what the future gets, the bucket's own buffer unless
  /// torch's Python hooks want it wrapped; after an error it is kept until the next submit or close, on a thread that may destroy it.
  c10::intrusive_ptr<c10::ivalue::Future> submit(c10d::GradBucket& bucket, std::optional<c10::IValue> result = std::nullopt,
                                                 bool python = false) noexcept;

  bool named() const noexcept { return named_; }
  /// Null until the parameters are known. Readable after close() too. @throws invalid_argument in a forked child.
  GradientReducer* reducer() const;
  /// GradientReducer::take_notice; empty in a forked child.
  std::string take_notice() const;
  /// The same for what goes on. @throws invalid_argument after close() too.
  GradientReducer* open_reducer() const;
  const Config& config() const noexcept { return config_; }
  int rank() const noexcept { return communicator_->rank(); }
  int world() const noexcept { return communicator_->size(); }
  /// By id: how what is kept of the parameters lies. Named ones, between steps.
  std::vector<Layout> layouts() const;
  /// What was loaded lies so.
  void set_layouts(std::vector<Layout> layouts);
  /// Idempotent, from any thread without the GIL. Waits at most `limit` for work under way, then releases the peers.
  void close(std::chrono::milliseconds limit) noexcept;

 private:
  struct Pending;  // one bucket on its way

  void learn(const std::vector<at::Tensor>& parameters);
  /// All parameters are on one device, the first one's. @throws unsupported naming the one that is not.
  void place(const std::string& name, const at::Tensor& parameter);
  void build(std::vector<Parameter> parameters);
  void reduce_on_device(Pending& bucket, Bytes grad, ReduceOptions options);
  void start(std::unique_ptr<Pending> pending);
  void fail_waiting(std::exception_ptr error) noexcept;
  static void finish(void* context, std::exception_ptr error) noexcept;
  std::vector<std::uint32_t> ids_of(const std::vector<at::Tensor>& parameters) const;
  /// Notes in the bucket which of its parameters lie otherwise in it than what is kept of them.
  void look_at_layouts(const c10d::GradBucket& bucket, const std::vector<at::Tensor>& parameters, Pending& pending) const;

  const std::shared_ptr<C10dCommunicator> communicator_;
  const Config config_;
  const EngineOptions options_;
  const bool named_;
  const int pid_;

  using Identity = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;  // keeps the address from being used again
  std::optional<c10::Device> device_;                                                   // of the parameters
  std::unique_ptr<SideStream> side_;
  std::vector<Identity> identities_;
  std::vector<Layout> layouts_, first_layouts_;  ///< by id: of what is kept, and as the parameters lay when they were first seen
  std::unordered_map<const c10::TensorImpl*, std::uint32_t> ids_;
  std::vector<Parameter> learnt_;
  std::vector<std::unique_ptr<Pending>> waiting_;  // the first step's buckets while parameters are being learnt
  std::size_t seen_ = 0;                           // parameters in this step's buckets so far

  mutable std::mutex mutex_;  // guards closed_, discarded_ and layouts_
  bool closed_ = false;
  bool said_no_momentum_ = false;  // the submitting thread's
  std::vector<c10::IValue> discarded_;
  std::unique_ptr<GradientReducer> reducer_;
};

/// The hook for c10d::Reducer::register_comm_hook.
std::unique_ptr<c10d::CommHookInterface> make_comm_hook(std::shared_ptr<Engine> engine);

}  // namespace thinwire::torch_ext
