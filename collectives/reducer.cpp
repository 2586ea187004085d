#include "collectives/reducer.hpp"

#include <algorithm>

#include "collectives/reducer_impl.hpp"
#include "compressors/core/device.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/wire.hpp"

namespace thinwire {
namespace {

std::exception_ptr make_error(Errc code, const std::string& what) { return std::make_exception_ptr(Error(code, what)); }

}  // namespace

GradientReducer::GradientReducer(std::shared_ptr<Communicator> communicator, const Config& config, std::vector<Parameter> parameters,
                                 ReducerOptions options)
    : impl_(std::make_unique<Impl>(std::move(communicator), config, std::move(parameters), std::move(options))) {}
GradientReducer::~GradientReducer() = default;

Work GradientReducer::reduce(std::span<const std::uint32_t> parameters, Bytes grad, Stream stream, const ReduceOptions& options) {
  Work work;
  work.ticket_ = impl_->reduce(parameters, grad, stream, options);
  work.shared_ = impl_->queue_->shared();
  return work;
}

Work GradientReducer::pass(std::span<const std::uint32_t> parameters, std::string reason, std::function<bool()> exchange,
                           const ReduceOptions& options) {
  Work work;
  work.ticket_ = impl_->pass(parameters, std::move(reason), std::move(exchange), options);
  work.shared_ = impl_->queue_->shared();
  return work;
}

void GradientReducer::flush() { impl_->flush(); }
void GradientReducer::resynchronize() { impl_->resynchronize(); }
void GradientReducer::reorder(std::uint32_t id, std::span<const std::uint32_t> from) { impl_->reorder(id, from); }
void GradientReducer::freeze(std::span<const Handover> handover) { impl_->freeze(handover); }
void GradientReducer::rescale_residuals(std::span<const float> factors) { impl_->rescale_residuals(factors); }
void GradientReducer::describe_optimizer(std::string words, FreezeSteps steps) { impl_->describe_optimizer(std::move(words), steps); }
void GradientReducer::reset() { impl_->reset(); }
void GradientReducer::close(std::chrono::milliseconds limit) noexcept { impl_->close(limit); }
const Config& GradientReducer::config() const noexcept { return impl_->config_; }
int GradientReducer::rank() const noexcept { return impl_->communicator_->rank(); }
int GradientReducer::world() const noexcept { return impl_->communicator_->size(); }
Stats GradientReducer::stats() const { return impl_->stats(); }
std::string GradientReducer::take_notice() { return impl_->take_notice(); }
ReducerState GradientReducer::state() const { return impl_->state(); }
void GradientReducer::load_state(std::span<const ReducerState> states, const std::string& refused) { impl_->load_state(states, refused); }

std::uint64_t GradientReducer::step() const {
  const std::lock_guard lock(impl_->submit_);
  return impl_->step_;
}

bool GradientReducer::frozen() const {
  const std::lock_guard lock(impl_->submit_);
  return impl_->recursion_.averaged && impl_->step_ >= impl_->freeze_at_;
}

bool GradientReducer::averages(std::uint32_t parameter) const { return impl_->slots_.at(parameter).shared_momentum != nullptr; }

GradientReducer::Impl::~Impl() {
  // On a GPU the stream is busy with what is sound as long as nothing failed: only the host's queue holds work that must not be waited for.
  bool sound = options_.device >= 0;
  try {
    queue_->rethrow();
    if (sound) engine_->check();
  } catch (const Error&) { sound = false; }
  close(sound ? communicator_->timeout() : std::chrono::milliseconds(0));
}

void GradientReducer::Impl::close(std::chrono::milliseconds limit) noexcept {
  {
    const std::lock_guard lock(submit_);
    if (closed_) return;
    closed_ = true;
  }
  const std::string reason = "rank " + std::to_string(communicator_->rank()) + ": the reducer was closed";
  bool busy = queue_->busy_after(limit);
  try {
    busy |= !engine_->idle_within(limit);
  } catch (const Error&) { busy = true; }  // a broken device: release the peers
  if (busy) {                              // the job under way waits for peers that may never come; what is complete stays readable
    queue_->fail_all(make_error(Errc::peer_lost, reason));
    communicator_->abort(reason);
  }
  queue_->stop(nullptr);
}

void GradientReducer::Impl::between_steps(const char* call) const {
  queue_->rethrow();
  if (seen_count_ == 0) return;
  fail(Errc::invalid_argument, std::string(call) + " belongs between steps; in step " + std::to_string(step_) + " " +
                                   std::to_string(seen_count_) + " of " + std::to_string(slots_.size()) + " parameters have been reduced");
}

void GradientReducer::Impl::finish_all() const {
  queue_->drain();
  engine_->wait();
  engine_->check();
}

void GradientReducer::Impl::flush() {
  const std::lock_guard lock(submit_);
  between_steps("flush()");
  flush_next_ = true;
}

bool GradientReducer::Impl::has_flush_failed() const { return flushed_step_ && engine_->nonfinite_steps() != bad_before_flush_; }

void GradientReducer::Impl::mark(std::span<const std::uint32_t> ids) {
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const std::uint32_t id = ids[i];
    std::string problem;
    if (id >= slots_.size()) {
      problem = "unknown parameter id " + std::to_string(id) + "; ids are below " + std::to_string(slots_.size());
    } else if (seen_[id] == step_ + 1) {
      problem = "parameter '" + slots_[id].parameter.name + "' is reduced twice in step " + std::to_string(step_) + "; " +
                std::to_string(seen_count_ + i) + " of " + std::to_string(slots_.size()) + " parameters were reduced in it so far";
    }
    if (!problem.empty()) {
      for (std::size_t j = 0; j < i; ++j) seen_[ids[j]] = step_;  // as before: not in this step
      fail(Errc::invalid_argument, problem);
    }
    seen_[id] = step_ + 1;
  }
  seen_count_ += ids.size();
}

std::uint64_t GradientReducer::Impl::start_goes_on_until() const {
  const bool before_start = init_ == Init::dense && step_ + 1 == dense_steps_;  // what a bad step held back would be in the estimates
  if (!dense_step_ || !(starting_step_ || before_start) || step_ + 1 < dense_steps_) return start_until_;
  queue_->drain();
  engine_->wait();
  return engine_->nonfinite_steps() != bad_before_ ? std::max(start_until_, step_ + 2) : start_until_;
}

bool GradientReducer::Impl::is_first_compressed(bool dense) {
  if (dense && step_ == compressed_from_) ++compressed_from_;
  if (dense || recursion_.kind != Recursion::Kind::estimate || init_ == Init::dense) return false;
  if (!(recursion_.fresh < 1) && !(init_ == Init::compressed && recursion_.control)) return false;  // nothing hangs on it
  if (options_.step_verdict && step_ == compressed_from_ + 1) {  // where the scaler skipped that step, there is no state yet
    queue_->drain();
    engine_->wait();
    if (!engine_->started()) compressed_from_ = step_;
  }
  return step_ == compressed_from_;
}

void GradientReducer::Impl::expect_handover() const {
  if (!awaits_handover_) return;
  fail(Errc::invalid_argument, "the state that was loaded is frozen since step " + std::to_string(freeze_at_) +
                                   ", and the optimizer's masks and beta1s are not in it: load the optimizer's state as well and call "
                                   "freeze() with them (momenta may "
                                   "be empty), or freeze() alone where nothing is masked and beta1 is the config's");
}

void GradientReducer::Impl::begin_step_if_needed() {
  if (step_begun_) return;
  if (const std::uint64_t until = start_goes_on_until(); until != start_until_) {
    start_until_ = until;
    bad_before_ = engine_->nonfinite_steps();
  }
  step_begun_ = true;
  if (flushed_step_ || flush_next_) {
    queue_->drain();
    engine_->wait();
    flush_next_ |= has_flush_failed();
    bad_before_flush_ = engine_->nonfinite_steps();
  }
  bool changed = epoch_ == 0;
  bool dense = codec_ == nullptr || step_ < std::max(dense_steps_, start_until_) || flush_next_ || !is_frozen();
  const bool first = is_first_compressed(dense);
  bool starting = (init_ == Init::dense && step_ + 1 == dense_steps_) || step_ < start_until_ ||
                  (init_ == Init::compressed && recursion_.control && first);
  for (std::size_t p = 0; p < slots_.size() && !dense; ++p) {
    if (!slots_[p].compressible) continue;
    const Setting setting = setting_at(step_, std::uint32_t(p));
    changed |= setting != slots_[p].setting;
    slots_[p].setting = setting;
  }
  // While a tensor was dense by rule its estimates stayed what they were: dense steps set them anew, two, because other tensors have
  // residuals, which the first sends and so has in the estimates.
  const auto comes_back = [this](const ParameterSlot& slot) {
    return slot.compressible && slot.dense_now && !dense_by_rule(slot, slot.dtype);
  };
  if (!dense && recursion_.kind == Recursion::Kind::estimate && std::any_of(slots_.begin(), slots_.end(), comes_back)) {
    dense = starting = true;
    start_until_ = step_ + 2;
    queue_->drain();
    engine_->wait();
    bad_before_ = engine_->nonfinite_steps();
  }
  const bool first_average = first && recursion_.fresh < 1;
  changed |= starting != starting_step_ || first_average != first_average_;
  starting_step_ = starting;
  first_average_ = first_average;
  changed |= is_frozen() != was_frozen_;
  was_frozen_ = is_frozen();
  changed |= dense != dense_step_;
  dense_step_ = dense;
  flushed_step_ = flush_next_;
  flush_next_ = false;
  if (changed) ++epoch_;
}

Setting GradientReducer::Impl::setting_at(std::uint64_t step, std::uint32_t id) const {
  const ParameterSlot& slot = slots_[id];
  Setting setting = policy_->setting(step - dense_steps_, id);
  if (recursion_.control)
    setting.eta = eta_of(recursion_, codec_->nominal_delta({id, 0, slot.numel, slot.rows, slot.columns, setting, nullptr}));
  return setting;
}

Recursion GradientReducer::Impl::recursion_now() const noexcept {
  if (!is_frozen()) return before_freeze_;
  Recursion recursion = recursion_;
  recursion.starting = starting_step_;
  recursion.first = first_average_;
  recursion.blank = blank_ && dense_step_ && step_ < dense_steps_;
  return recursion;
}

bool GradientReducer::Impl::dense_by_rule(const ParameterSlot& slot, DType dtype) const {
  const Segment segment{0, 0, slot.numel, slot.rows, slot.columns, slot.setting, nullptr};
  return dense_rule(config_, *codec_, segment, dtype, communicator_->size()) != DenseRule::none;
}

bool GradientReducer::Impl::complete_step_if_all_seen() {
  if (seen_count_ != slots_.size()) return false;
  seen_count_ = 0;
  step_begun_ = false;
  ++step_;
  return true;
}

std::shared_ptr<const BucketPlan> GradientReducer::Impl::find_plan(std::span<const std::uint32_t> ids, DType dtype) {
  CachedPlan* place = nullptr;
  for (CachedPlan& cached : plans_) {
    if (cached.plan->dtype == dtype && std::equal(ids.begin(), ids.end(), cached.plan->ids.begin(), cached.plan->ids.end())) {
      if (cached.epoch == epoch_) return cached.plan;
      place = &cached;
      break;
    }
  }
  for (const std::uint32_t id : ids) {
    ParameterSlot& slot = slots_[id];
    slot.dtype = dtype;
    slot.dense_now = dense_step_ ? slot.dense_now && !starting_step_ : slot.compressible && dense_by_rule(slot, dtype);
  }
  auto plan = std::make_shared<const BucketPlan>(make_bucket_plan(ids, dtype, dense_step_, slots_, codec_.get(), recursion_now(),
                                                                  communicator_->size(), communicator_->rank(), two_phase_));
  if (place == nullptr) {
    // A layout that was given up (DDP rebuilds its first one) shares parameters with this one; nothing of it is needed any more.
    std::erase_if(plans_, [&](const CachedPlan& cached) {
      return std::any_of(cached.plan->ids.begin(), cached.plan->ids.end(),
                         [&](std::uint32_t id) { return std::find(ids.begin(), ids.end(), id) != ids.end(); });
    });
    place = &plans_.emplace_back();
  }
  *place = {epoch_, plan};
  return plan;
}

void GradientReducer::Impl::check_place(Bytes grad, Stream stream, const float* loss_scale) const {
  const auto name = [](Place place, int device) {
    return place == Place::host ? std::string("host memory") : "GPU " + std::to_string(device);
  };
  const Place place = options_.device < 0 ? Place::host : Place::cuda;
  const std::string own = name(place, options_.device);
  if (grad.place != place || (place == Place::cuda && grad.device != options_.device))
    fail(Errc::invalid_argument, "the bucket is in " + name(grad.place, grad.device) + ", this reducer works in " + own);
  const auto lies = [&](const char* what, const void* p) {
    if (place != Place::cuda || p == nullptr) return;
    const int device = device_of(p);
    if (device != options_.device)
      fail(Errc::invalid_argument, std::string(what) + " lies in " + name(device < 0 ? Place::host : Place::cuda, device) +
                                       ", though it is given as memory of " + own);
  };
  lies("the bucket", grad.size == 0 ? nullptr : grad.data);
  lies("the loss scale", loss_scale);
  if (stream.place() != place || (place == Place::cuda && stream.device() != options_.device))
    fail(Errc::invalid_argument, "the stream is of " + name(stream.place(), stream.device()) + ", this reducer works in " + own);
}

std::uint64_t GradientReducer::Impl::reduce(std::span<const std::uint32_t> ids, Bytes grad, Stream stream, const ReduceOptions& options) {
  check_place(grad, stream, options.device_loss_scale);
  if (grad.dtype == DType::u8) fail(Errc::invalid_argument, "a bucket's dtype is fp32, bf16 or fp16; this one is u8");
  if (!(options.loss_scale > 0) || !is_finite(options.loss_scale))
    fail(Errc::invalid_argument, "loss_scale=" + std::to_string(options.loss_scale) + " is not a positive number");
  if (options.device_loss_scale != nullptr && options_.device < 0)
    fail(Errc::invalid_argument, "device_loss_scale is read by a GPU's kernels; this reducer works in host memory and takes loss_scale");
  if (options.device_loss_scale != nullptr && options.loss_scale != 1.0f)
    fail(Errc::invalid_argument, "loss_scale=" + std::to_string(options.loss_scale) + " beside device_loss_scale; give one of them");
  std::unique_lock lock(submit_);
  if (closed_) fail(Errc::invalid_argument, "reduce() after close()");
  queue_->rethrow();
  expect_handover();
  const bool first = seen_count_ == 0;
  std::size_t count = 0;
  for (const std::uint32_t id : ids) count += id < slots_.size() ? slots_[id].numel : 0;
  mark(ids);
  const auto unmark = [&] {
    for (const std::uint32_t id : ids) seen_[id] = step_;
    seen_count_ -= ids.size();
  };
  if (grad.size != count * size_of(grad.dtype)) {
    unmark();
    fail(Errc::invalid_argument, "the bucket has " + std::to_string(grad.size) + " bytes; its " + std::to_string(ids.size()) +
                                     " parameters need " + std::to_string(count) + " elements of " + to_string(grad.dtype));
  }
  begin_step_if_needed();
  for (const std::uint32_t id : ids) pass_reasons_[id].clear();
  Job job;
  try {
    job.bucket = find_plan(ids, grad.dtype);
  } catch (...) {  // a tensor too large for the wire, or no memory: nothing of this bucket has happened
    unmark();
    throw;
  }
  job.grad = grad;
  job.stream = stream;
  job.options = options;
  job.step = step_;
  job.flushed = flushed_step_;
  job.first = first;
  job.last = complete_step_if_all_seen();
  return queue_->push(std::move(job));
}

std::uint64_t GradientReducer::Impl::pass(std::span<const std::uint32_t> ids, std::string reason, std::function<bool()> exchange,
                                          const ReduceOptions& options) {
  const std::lock_guard lock(submit_);
  if (closed_) fail(Errc::invalid_argument, "pass() after close()");
  queue_->rethrow();
  expect_handover();
  Job job;
  job.first = seen_count_ == 0;
  mark(ids);
  begin_step_if_needed();
  for (const std::uint32_t id : ids) pass_reasons_[id] = reason;
  job.options = options;
  job.exchange = std::move(exchange);
  job.step = step_;
  job.flushed = flushed_step_;
  job.last = complete_step_if_all_seen();
  return queue_->push(std::move(job));
}

void GradientReducer::Impl::run(Job& job) {
  const bool may_freeze = job.first && freeze_steps_ && !freeze_agreed_ && freeze_steps_->contains(job.step);
  if (!cards_compared_ || may_freeze) {
    if (cards_compared_) engine_->wait();  // on a GPU earlier buckets are on their way, on this communicator
    compare_cards(*communicator_, {job.step, freeze_at_, true, job.options.joined}, "");
    cards_compared_ = true;
    freeze_agreed_ = freeze_at_ <= job.step;
    const std::lock_guard lock(counters_);
    const Traffic now = communicator_->traffic();  // gradients are what users count
    traffic_at_reset_.payload_bytes += now.payload_bytes - traffic_.payload_bytes;
    traffic_at_reset_.wire_bytes += now.wire_bytes - traffic_.wire_bytes;
  }
  if (job.bucket != nullptr) engine_->run(job.bucket, job.grad, job.step, job.options, job.stream);
  if (job.bucket == nullptr) engine_->passed(job.options.dense_bytes, !job.exchange || job.exchange());
  if (job.last) {
    engine_->finish_step(job.step);
    notice_cuts(job.step);
  }
  const std::lock_guard lock(counters_);
  traffic_ = communicator_->traffic();
  if (job.last) ++steps_done_;
}

std::exception_ptr GradientReducer::Impl::explain(const Job& job, std::exception_ptr error) {
  Errc code = Errc::internal;
  std::string what = "unknown exception";
  try {
    std::rethrow_exception(error);
  } catch (const Error& e) {
    code = e.code();
    what = e.what();
  } catch (const std::exception& e) { what = e.what(); } catch (...) {
    code = Errc::internal;
  }
  if (code == Errc::corrupt_payload || code == Errc::invalid_argument) what = with_names(std::move(what));
  const std::string where = "rank " + std::to_string(communicator_->rank()) + ", step " + std::to_string(job.step) + ", bucket " +
                            (job.bucket != nullptr ? job.bucket->name : std::string("passed through"));
  if (job.flushed && (is_of_transport(code) || code == Errc::corrupt_payload))
    what += "; on this rank flush() was called before the step, so it is a dense one here: all ranks have to call it before the same step";
  communicator_->abort(where + ": " + what);
  return make_error(code, where + ": " + what);
}

}  // namespace thinwire
