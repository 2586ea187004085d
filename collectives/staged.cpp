#include "collectives/staged.hpp"

#include <utility>

#include "compressors/core/device.hpp"

namespace thinwire {
namespace {

class Staged final : public Communicator {
 public:
  explicit Staged(std::unique_ptr<Communicator> inner) : inner_(std::move(inner)) { Communicator::set_timeout(inner_->timeout()); }

  int rank() const noexcept override { return inner_->rank(); }
  int size() const noexcept override { return inner_->size(); }
  const char* transport() const noexcept override { return inner_->transport(); }
  bool any_thread() const noexcept override { return inner_->any_thread(); }
  std::unique_ptr<Communicator> split(int colour, int key) override { return make_staged(inner_->split(colour, key)); }
  void abort(const std::string& reason) noexcept override { inner_->abort(reason); }
  void raise_failure() override { inner_->raise_failure(); }
  void set_timeout(std::chrono::milliseconds timeout) override {
    Communicator::set_timeout(timeout);
    inner_->set_timeout(timeout);
  }

 private:
  bool serves(Place) const noexcept override { return true; }

  /// The host's twin of a device span, at byte `first` of the staging.
  template <class Byte>
  BasicBytes<Byte> twin(BasicBytes<Byte> span, std::size_t first) const {
    return {staging_.data() + first, span.size, span.dtype, Place::host, 0};
  }
  void reserve(std::size_t bytes) {
    if (staging_.size() < bytes) staging_ = MappedBuffer(bytes);
  }
  void fetch(ConstBytes from, std::size_t first, Stream stream) {
    device_copy(staging_.data() + first, from.data, from.size, stream);
    device_wait(stream);
  }
  void deliver(Bytes to, std::size_t first, Stream stream) {
    device_copy(to.data, staging_.data() + first, to.size, stream);
    device_wait(stream);  // the next call uses the staging again
  }

  void do_all_gather(ConstBytes send, Bytes recv, Stream stream) override {
    if (recv.place == Place::host) return inner_->all_gather(send, recv, stream);
    reserve(recv.size);
    const std::size_t own = send.size * std::size_t(rank());
    fetch(send, own, stream);
    inner_->all_gather(twin(send, own), twin(recv, 0));
    deliver(recv, 0, stream);
  }
  void do_all_to_all(ConstBytes send, std::span<const std::size_t> send_bytes, Bytes recv, std::span<const std::size_t> recv_bytes,
                     Stream stream) override {
    if (recv.place == Place::host) return inner_->all_to_all_v(send, send_bytes, recv, recv_bytes, stream);
    const std::size_t received = round_up(send.size, 64);
    reserve(received + recv.size);
    fetch(send, 0, stream);
    inner_->all_to_all_v(twin(send, 0), send_bytes, twin(recv, received), recv_bytes);
    deliver(recv, received, stream);
  }
  void do_all_reduce(Bytes data, Stream stream) override {
    if (data.place == Place::host) return inner_->all_reduce(data, stream);
    reserve(data.size);
    fetch(data, 0, stream);
    inner_->all_reduce(twin(data, 0));
    deliver(data, 0, stream);
  }
  void do_broadcast(Bytes data, int root, Stream stream) override {
    if (data.place == Place::host) return inner_->broadcast(data, root, stream);
    reserve(data.size);
    fetch(data, 0, stream);
    inner_->broadcast(twin(data, 0), root);
    deliver(data, 0, stream);
  }
  void do_barrier() override { inner_->barrier(); }

  std::unique_ptr<Communicator> inner_;
  MappedBuffer staging_;
};

}  // namespace

std::unique_ptr<Communicator> make_staged(std::unique_ptr<Communicator> inner) { return std::make_unique<Staged>(std::move(inner)); }

}  // namespace thinwire
