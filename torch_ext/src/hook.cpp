#include "torch_ext/src/hook.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/any.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/graph_task.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "compressors/core/error.hpp"

namespace thinwire::torch_ext {
namespace {

std::optional<DType> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::fp32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::fp16;
    default:
      return std::nullopt;
  }
}

/// DDP.join calls the hook of a rank that has run out of data, with zeros, from outside of any backward pass. Within one zeros are a
/// gradient like any other.
bool outside_of_backward() { return torch::autograd::get_current_graph_task_id() == -1; }

/// Whether every element is +0 or −0.
bool all_zero(ConstBytes data) {
  const std::uint64_t magnitudes = data.dtype == DType::fp32 ? 0x7fffffff7fffffffull : 0x7fff7fff7fff7fffull;
  std::size_t i = 0;
  for (; i + 8 <= data.size; i += 8) {
    std::uint64_t word;
    std::memcpy(&word, data.data + i, 8);
    if (word & magnitudes) return false;
  }
  std::uint64_t tail = 0;
  std::memcpy(&tail, data.data + i, data.size - i);
  return (tail & magnitudes) == 0;
}

std::string shape_of(const at::Tensor& tensor) {
  std::string text = "(";
  for (const auto size : tensor.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

Parameter describe(const std::string& name, const at::Tensor& tensor) { return {name, {tensor.sizes().begin(), tensor.sizes().end()}}; }

}  // namespace

struct Engine::Pending {
  Engine* engine;  // outlives it: the destructor ends all that is queued
  c10::intrusive_ptr<c10::ivalue::Future> future;
  at::Tensor buffer;
  std::vector<std::uint32_t> ids;
  std::optional<c10::IValue> result;
  std::size_t index = 0;
  struct Moved {
    std::uint32_t id;
    std::vector<std::int64_t> sizes;
    Layout now;
  };
  std::vector<Moved> moved{};
};

Engine::Engine(std::shared_ptr<C10dCommunicator> communicator, Config config, std::optional<std::vector<NamedParameter>> parameters,
               EngineOptions options)
    : communicator_(std::move(communicator)),
      config_(std::move(config)),
      options_(options),
      named_(parameters.has_value()),
      pid_(getpid()) {
  if (!named_) return;
  std::vector<Parameter> described;
  for (const auto& [name, tensor] : *parameters) {
    const auto* impl = tensor.unsafeGetTensorImpl();
    if (!ids_.emplace(impl, std::uint32_t(described.size())).second) {
      fail(Errc::invalid_argument,
           "parameter \"" + name + "\" is \"" + described[ids_.at(impl)].name + "\" under another name; name tied parameters once");
    }
    place(name, tensor);
    identities_.emplace_back(tensor.getIntrusivePtr());
    layouts_.push_back(layout_of(tensor));
    described.push_back(describe(name, tensor));
  }
  first_layouts_ = layouts_;
  build(std::move(described));
}

Engine::~Engine() {
  if (getpid() != pid_) {
    // The queue's thread and Gloo's do not exist in this process; joining them would wait for ever.
    static_cast<void>(reducer_.release());
    new std::shared_ptr<C10dCommunicator>(communicator_);
    return;
  }
  close(std::chrono::milliseconds(0));
}

void Engine::place(const std::string& name, const at::Tensor& parameter) {
  const c10::Device device = parameter.device();
  if (!device_) {
    if (!device.is_cpu() && !device.is_cuda())
      fail(Errc::unsupported, "parameter \"" + name + "\" is on " + device.str() + "; gradients are reduced on the CPU or on CUDA's GPUs");
    if (device.is_cuda() && !device_refusal().empty())
      fail(Errc::unsupported, "parameter \"" + name + "\" is on " + device.str() + ": " + device_refusal());
    device_ = device;
  } else if (device != *device_) {
    fail(Errc::unsupported, "parameter \"" + name + "\" is on " + device.str() + ", others on " + device_->str() +
                                ": one hook reduces the gradients of one device");
  }
}

void Engine::build(std::vector<Parameter> parameters) {
  ReducerOptions options;
  options.step_verdict = options_.loss_scale.defined();
  options.momentum_elsewhere = options_.momentum_elsewhere;
  if (options.step_verdict && !options_.loss_scale.is_cpu() && options_.loss_scale.device() != *device_)
    fail(Errc::invalid_argument, "the grad scaler's scale is on " + options_.loss_scale.device().str() + ", the gradients on " +
                                     device_->str() + "; it may be there or on the CPU");
  std::shared_ptr<Communicator> group = communicator_;
  if (device_->is_cuda()) {
    options.device = device_->index();
    side_ = std::make_unique<SideStream>(options.device);
    group = options_.make_device_group(options.device);
  }
  auto reducer = std::make_unique<GradientReducer>(std::move(group), config_, std::move(parameters), std::move(options));
  const std::lock_guard lock(mutex_);
  reducer_ = std::move(reducer);
}

GradientReducer* Engine::reducer() const {
  if (getpid() != pid_) fail(Errc::invalid_argument, "this hook belongs to the process that made it, not to a forked child");
  const std::lock_guard lock(mutex_);
  return reducer_.get();
}

std::string Engine::take_notice() const {
  GradientReducer* const reducer = getpid() == pid_ ? this->reducer() : nullptr;
  return reducer != nullptr ? reducer->take_notice() : "";
}

GradientReducer* Engine::open_reducer() const {
  GradientReducer* reducer = this->reducer();
  const std::lock_guard lock(mutex_);
  if (closed_) fail(Errc::invalid_argument, "this hook is closed");
  return reducer;
}

void Engine::learn(const std::vector<at::Tensor>& parameters) {
  for (const at::Tensor& tensor : parameters) {
    if (!ids_.emplace(tensor.unsafeGetTensorImpl(), std::uint32_t(learnt_.size())).second) {
      fail(Errc::invalid_argument, "a parameter of shape " + shape_of(tensor) + " came twice in the first step");
    }
    const std::string name = "parameter " + std::to_string(learnt_.size());
    place(name, tensor);
    identities_.emplace_back(tensor.getIntrusivePtr());
    layouts_.push_back(layout_of(tensor));
    first_layouts_ = layouts_;
    learnt_.push_back(describe(name, tensor));
  }
}

std::vector<std::uint32_t> Engine::ids_of(const std::vector<at::Tensor>& parameters) const {
  std::vector<std::uint32_t> ids;
  ids.reserve(parameters.size());
  for (const at::Tensor& tensor : parameters) {
    const auto found = ids_.find(tensor.unsafeGetTensorImpl());
    if (found == ids_.end()) {
      fail(Errc::invalid_argument, "DDP reduces a parameter of shape " + shape_of(tensor) + " that is not among the " +
                                       std::to_string(ids_.size()) + (named_ ? " named parameters" : " parameters of the first step"));
    }
    ids.push_back(found->second);
  }
  return ids;
}

std::vector<Layout> Engine::layouts() const {
  const std::lock_guard lock(mutex_);
  return layouts_;
}

void Engine::set_layouts(std::vector<Layout> layouts) {
  const std::lock_guard lock(mutex_);
  layouts_ = std::move(layouts);
}

void Engine::look_at_layouts(const c10d::GradBucket& bucket, const std::vector<at::Tensor>& parameters, Pending& pending) const {
  const at::Tensor& buffer = pending.buffer;
  if (buffer.is_sparse() || !dtype_of(buffer.scalar_type())) return;
  std::vector<at::Tensor> shares;  // made where they are needed: a view each
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor& parameter = parameters[i];
    const std::uint32_t id = pending.ids[i];
    Layout lies = layout_of(parameter);
    if (lies == layouts_[id]) continue;
    // DDP made this bucket before or after the parameter was laid out anew, and the gradient says which.
    const at::Tensor& grad = parameter.grad();
    if (grad.defined() && grad.is_alias_of(buffer)) {  // gradient_as_bucket_view
      lies = layout_of(grad);
    } else if (grad.defined() && !outside_of_backward()) {
      if (shares.empty()) shares = bucket.getGradients();
      const at::Tensor flat = shares[i].view({-1});
      if (!shows(flat, grad, lies) && (shows(flat, grad, layouts_[id]) || shows(flat, grad, first_layouts_[id])))
        fail(Errc::invalid_argument,
             "a parameter of shape " + shape_of(parameter) +
                 " was given another memory format after DDP had made its buckets, and DDP reads what comes back from a "
                 "hook by the new one: convert the model before DistributedDataParallel(model), or use "
                 "gradient_as_bucket_view=True");
    }
    if (lies != layouts_[id]) pending.moved.push_back({id, parameter.sizes().vec(), std::move(lies)});
  }
}

c10::intrusive_ptr<c10::ivalue::Future> Engine::submit(c10d::GradBucket& bucket, std::optional<c10::IValue> result, bool python) noexcept {
  c10::TypePtr type = c10::TensorType::get();
  if (python) type = c10::PyObjectType::get();
  std::vector<c10::Device> devices;  // without its device a future of CUDA tensors orders nothing
  if (bucket.getBuffer().is_cuda()) devices.push_back(bucket.getBuffer().device());
  auto future = c10::make_intrusive<c10::ivalue::Future>(std::move(type), std::move(devices));
  try {
    GradientReducer* reducer = open_reducer();
    if (const std::string notice = reducer != nullptr ? reducer->take_notice() : ""; !notice.empty()) TORCH_WARN("thinwire: ", notice);
    std::vector<c10::IValue> discarded;  // destroyed here: this thread may take the GIL
    {
      const std::lock_guard lock(mutex_);
      discarded.swap(discarded_);
    }
    auto pending = std::make_unique<Pending>(Pending{this, future, bucket.getBuffer(), {}, std::move(result), bucket.getIndex()});
    const auto parameters = bucket.getParameters();
    if (bucket.getIndex() == 0) seen_ = 0;
    seen_ += parameters.size();
    if (reducer != nullptr) {
      pending->ids = ids_of(parameters);
      if (bucket.isLast() && seen_ < ids_.size()) {
        fail(Errc::invalid_argument, "DDP reduces " + std::to_string(seen_) + " parameters, but " + std::to_string(ids_.size()) +
                                         " are named: name exactly those that require gradients and that DDP does not ignore");
      }
      look_at_layouts(bucket, parameters, *pending);
      start(std::move(pending));
      return future;
    }
    if (bucket.getIndex() == 0 && !waiting_.empty()) {  // the step before broke off: forget it
      fail_waiting(std::make_exception_ptr(Error(Errc::invalid_argument, "the first step was not finished")));
      learnt_.clear(), ids_.clear(), identities_.clear(), layouts_.clear();
    }
    learn(parameters);
    pending->ids = ids_of(parameters);
    look_at_layouts(bucket, parameters, *pending);
    waiting_.push_back(std::move(pending));
    if (!bucket.isLast()) return future;
    build(std::move(learnt_));
    std::vector<std::unique_ptr<Pending>> waiting;
    waiting.swap(waiting_);
    for (auto& one : waiting) start(std::move(one));
  } catch (...) {
    auto error = std::current_exception();
    fail_waiting(error);
    future->setErrorIfNeeded(options_.translate ? options_.translate(error) : error);
  }
  return future;
}

void Engine::start(std::unique_ptr<Pending> pending) {
  ReduceOptions options;
  options.done = &Engine::finish;
  options.context = pending.get();
  if (options_.loss_scale.defined()) {
    const float* const scale = options_.loss_scale.const_data_ptr<float>();
    if (options_.loss_scale.is_cpu()) {
      options.loss_scale = *scale;
    } else {
      options.device_loss_scale = scale;
    }
  }

  Pending& bucket = *pending;
  const at::Tensor& buffer = bucket.buffer;
  const auto dtype = dtype_of(buffer.scalar_type());
  // From here on `finish` owns the bucket: on a throw nothing was queued, and it is ours again.
  pending.release();
  try {
    if (buffer.device() != *device_)
      fail(Errc::invalid_argument, "gradients on " + buffer.device().str() + " of parameters on " + device_->str());
    if (buffer.is_cuda() && (buffer.is_sparse() || !dtype))
      fail(Errc::unsupported,
           std::string(buffer.is_sparse() ? "sparse gradients" : c10::toString(buffer.scalar_type()) + std::string(" gradients")) +
               " on a GPU: fp32, bf16 and fp16 are reduced there; have DDP ignore these parameters");
    if (buffer.is_sparse() || !dtype) {
      std::string reason = buffer.is_sparse() ? "sparse gradient" : std::string("dtype ") + c10::toString(buffer.scalar_type());
      if (config_.feedback().name == "dgc") {
        if (!std::exchange(said_no_momentum_, true) && rank() == 0)
          TORCH_WARN("thinwire: a parameter's gradient (", reason,
                     ") is reduced as it is and gets no momentum, which feedback=dgc keeps in ",
                     "the hook and DGCSGD does not apply. Make such gradients dense and float32, bfloat16 or float16, or choose ",
                     "feedback=ef14 with an optimizer that has the momentum");
        reason += ", no momentum";
      }
      options.dense_bytes = std::size_t(buffer.numel()) * buffer.element_size();
      auto exchange = [this, &bucket] {
        const at::NoGradGuard no_grad;
        at::Tensor sum = bucket.buffer;
        communicator_->last_split()->all_reduce_tensor(sum);
        sum.mul_(1.0 / world());
        at::Tensor values = sum.is_sparse() ? sum._values() : sum;
        const bool finite = at::isfinite(values).all().item<bool>();
        if (!finite) values.fill_(std::numeric_limits<double>::quiet_NaN());  // as in every other bucket
        if (!sum.is_same(bucket.buffer)) bucket.buffer.copy_(sum);
        return finite;
      };
      reducer_->pass(bucket.ids, reason, std::move(exchange), options);
      return;
    }
    if (!buffer.is_contiguous()) fail(Errc::invalid_argument, "the bucket's buffer is not contiguous");
    for (const auto& [id, sizes, now] : bucket.moved) {
      const Layout before = layouts()[id];
      reducer_->reorder(id, reordering(sizes, before, now));
      const std::lock_guard lock(mutex_);
      layouts_[id] = now;
    }
    Bytes grad{static_cast<std::byte*>(buffer.data_ptr()), buffer.nbytes(), *dtype, Place::host, 0};
    if (buffer.is_cuda()) return reduce_on_device(bucket, grad, options);
    options.joined = outside_of_backward() && all_zero(grad);
    reducer_->reduce(bucket.ids, grad, Stream::host(), options);
  } catch (...) { finish(&bucket, std::current_exception()); }
}

void Engine::reduce_on_device(Pending& bucket, Bytes grad, ReduceOptions options) {
  if (outside_of_backward()) {
    const at::NoGradGuard no_grad;  // any() waits for the GPU; a rank without data has nothing else to do
    options.joined = !at::any(bucket.buffer).item<bool>();
  }
  grad.place = Place::cuda;
  grad.device = device_->index();
  const at::Tensor buffer = bucket.buffer;  // the bucket is gone once it is done
  side_->run(buffer, [&](Stream stream) { reducer_->reduce(bucket.ids, grad, stream, options); });
}

void Engine::finish(void* context, std::exception_ptr error) noexcept {
  const std::unique_ptr<Pending> bucket(static_cast<Pending*>(context));
  Engine& engine = *bucket->engine;
  try {
    if (!error) {
      // Moved, so that the last owner of a wrapped result is never this thread.
      bucket->future->markCompleted(bucket->result ? std::move(*bucket->result) : c10::IValue(bucket->buffer));
      return;
    }
    if (bucket->result) {
      const std::lock_guard lock(engine.mutex_);
      engine.discarded_.push_back(std::move(*bucket->result));
    }
    bucket->future->setErrorIfNeeded(engine.options_.translate ? engine.options_.translate(error) : error);
  } catch (...) {
    // Out of memory while telling the result: the future still has to end.
    bucket->future->setErrorIfNeeded(std::current_exception());
  }
}

void Engine::fail_waiting(std::exception_ptr error) noexcept {
  std::vector<std::unique_ptr<Pending>> waiting;
  waiting.swap(waiting_);
  for (auto& one : waiting) finish(one.release(), error);
}

void Engine::close(std::chrono::milliseconds limit) noexcept {
  if (getpid() != pid_) return;
  std::vector<c10::IValue> discarded;
  GradientReducer* reducer = nullptr;
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    discarded.swap(discarded_);
    reducer = reducer_.get();
  }
  fail_waiting(std::make_exception_ptr(Error(Errc::peer_lost, "the hook was closed")));
  if (reducer) reducer->close(limit);
}

namespace {

class CommHook final : public c10d::CommHookInterface {
 public:
  explicit CommHook(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) {}
  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override { return engine_->submit(bucket); }
  at::Tensor parseHookResult(const c10::IValue& result) override { return c10d::detail::parseCppCommHookResult(result); }

 private:
  const std::shared_ptr<Engine> engine_;
};

}  // namespace

std::unique_ptr<c10d::CommHookInterface> make_comm_hook(std::shared_ptr<Engine> engine) {
  return std::make_unique<CommHook>(std::move(engine));
}

}  // namespace thinwire::torch_ext
