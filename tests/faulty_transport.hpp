#pragma once
// A communicator that does what a broken network would: it changes what arrives, or never comes back. Everything else goes to the inner
// one.

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "collectives/communicator.hpp"

namespace thinwire::test {

/// What happens to one rank's calls; shared by a communicator and those split from it.
struct Faults {
  /// After the n-th all_gather (from 0) of a split communicator: may change what was received.
  std::function<void(int call, Bytes received, std::size_t share)> gathered = nullptr;
  /// The same of the n-th all_to_all.
  std::function<void(int call, Bytes received)> exchanged = nullptr;
  /// Before the n-th collective of a split communicator, on the thread that makes it.
  std::function<void(int call)> before = nullptr;
};

class FaultyTransport final : public Communicator {
 public:
  FaultyTransport(std::unique_ptr<Communicator> inner, std::shared_ptr<Faults> faults, bool armed = false)
      : inner_(std::move(inner)), faults_(std::move(faults)), armed_(armed) {}

  int rank() const noexcept override { return inner_->rank(); }
  int size() const noexcept override { return inner_->size(); }
  const char* transport() const noexcept override { return "faulty"; }
  std::unique_ptr<Communicator> split(int colour, int key) override {
    return std::make_unique<FaultyTransport>(inner_->split(colour, key), faults_, true);
  }
  void abort(const std::string& reason) noexcept override { inner_->abort(reason); }
  void set_timeout(std::chrono::milliseconds timeout) override {
    Communicator::set_timeout(timeout);
    inner_->set_timeout(timeout);
  }

 private:
  void step() {
    if (armed_ && faults_->before) faults_->before(calls_);
    ++calls_;
  }
  void do_all_gather(ConstBytes send, Bytes recv, Stream stream) override {
    step();
    inner_->all_gather(send, recv, stream);
    if (armed_ && faults_->gathered) faults_->gathered(gathers_, recv, send.size);
    ++gathers_;
  }
  void do_all_to_all(ConstBytes send, std::span<const std::size_t> send_bytes, Bytes recv, std::span<const std::size_t> recv_bytes,
                     Stream stream) override {
    step();
    inner_->all_to_all_v(send, send_bytes, recv, recv_bytes, stream);
    if (armed_ && faults_->exchanged) faults_->exchanged(exchanges_, recv);
    ++exchanges_;
  }
  void do_all_reduce(Bytes data, Stream stream) override {
    step();
    inner_->all_reduce(data, stream);
  }
  void do_broadcast(Bytes data, int root, Stream stream) override {
    step();
    inner_->broadcast(data, root, stream);
  }
  void do_barrier() override {
    step();
    inner_->barrier();
  }

  std::unique_ptr<Communicator> inner_;
  std::shared_ptr<Faults> faults_;
  bool armed_;
  int calls_ = 0, gathers_ = 0, exchanges_ = 0;
};

}  // namespace thinwire::test
