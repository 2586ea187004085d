#include "collectives/work_queue.hpp"

#include <utility>

namespace thinwire {

void Work::wait() {
  if (shared_ == nullptr) return;
  std::unique_lock lock(shared_->mutex);
  shared_->changed.wait(lock, [&] { return shared_->completed >= ticket_; });
  if (ticket_ >= shared_->failed_from) std::rethrow_exception(shared_->error);
}

bool Work::done() const {
  if (shared_ == nullptr) return true;
  const std::lock_guard lock(shared_->mutex);
  return shared_->completed >= ticket_;
}

WorkQueue::WorkQueue(bool threaded, std::function<void(Job&)> run, std::function<std::exception_ptr(const Job&, std::exception_ptr)> failed)
    : run_(std::move(run)), failed_(std::move(failed)), shared_(std::make_shared<Work::Shared>()), ring_(16), threaded_(threaded) {
  if (threaded_) thread_ = std::thread([this] { loop(); });
}

WorkQueue::~WorkQueue() { stop(nullptr); }

std::uint64_t WorkQueue::push(Job&& job) {
  std::unique_lock lock(shared_->mutex);
  if (shared_->error != nullptr) std::rethrow_exception(shared_->error);
  job.ticket = ++shared_->submitted;
  const std::uint64_t ticket = job.ticket;
  if (!threaded_) {
    lock.unlock();
    execute(job);
    return ticket;
  }
  if (size_ == ring_.size()) {
    std::vector<Job> larger(2 * ring_.size());
    for (std::size_t i = 0; i < size_; ++i) larger[i] = std::move(ring_[(head_ + i) % ring_.size()]);
    ring_ = std::move(larger);
    head_ = 0;
  }
  ring_[(head_ + size_++) % ring_.size()] = std::move(job);
  shared_->changed.notify_all();
  return ticket;
}

void WorkQueue::loop() {
  for (;;) {
    Job job;
    {
      std::unique_lock lock(shared_->mutex);
      shared_->changed.wait(lock, [&] { return size_ != 0 || stop_; });
      if (size_ == 0) return;
      job = std::move(ring_[head_]);
      head_ = (head_ + 1) % ring_.size();
      --size_;
    }
    execute(job);
  }
}

void WorkQueue::execute(Job& job) {
  std::exception_ptr error;
  {
    const std::lock_guard lock(shared_->mutex);
    error = shared_->error;  // after a failure the rest of the queue fails alike, without touching the group again
  }
  if (error == nullptr) {
    try {
      run_(job);
    } catch (...) {
      error = failed_(job, std::current_exception());
      const std::lock_guard lock(shared_->mutex);
      if (shared_->error == nullptr) {
        shared_->error = error;
        shared_->failed_from = job.ticket;
      } else {
        error = shared_->error;
      }
    }
  }
  finish(job, error);
}

void WorkQueue::finish(Job& job, std::exception_ptr error) {
  // The callback comes first: whoever sees the ticket completed may take the callback's effects for granted.
  if (job.options.done != nullptr) job.options.done(job.options.context, error);
  const std::lock_guard lock(shared_->mutex);
  shared_->completed = job.ticket;
  shared_->changed.notify_all();
}

void WorkQueue::settle() const {
  std::unique_lock lock(shared_->mutex);
  shared_->changed.wait(lock, [&] { return shared_->completed >= shared_->submitted; });
}

void WorkQueue::drain() const {
  settle();
  const std::lock_guard lock(shared_->mutex);
  if (shared_->error != nullptr) std::rethrow_exception(shared_->error);
}

void WorkQueue::rethrow() const {
  const std::lock_guard lock(shared_->mutex);
  if (shared_->error != nullptr) std::rethrow_exception(shared_->error);
}

bool WorkQueue::busy_after(std::chrono::milliseconds limit) const {
  std::unique_lock lock(shared_->mutex);
  return !shared_->changed.wait_for(lock, limit, [&] { return shared_->completed >= shared_->submitted; });
}

void WorkQueue::fail_all(std::exception_ptr error) {
  const std::lock_guard lock(shared_->mutex);
  if (shared_->error == nullptr) {
    shared_->error = std::move(error);
    shared_->failed_from = shared_->completed + 1;
  }
}

void WorkQueue::stop(std::exception_ptr error) noexcept {
  if (error != nullptr) fail_all(std::move(error));
  {
    const std::lock_guard lock(shared_->mutex);
    stop_ = true;
    shared_->changed.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

}  // namespace thinwire
