// The half of every collective that is the same on all transports: arguments are checked before a peer hears of the call, bytes are counted
// after it succeeded.

#include "collectives/communicator.hpp"

#include <cstdint>
#include <functional>
#include <string>

#include "compressors/core/error.hpp"

namespace thinwire {
namespace {

const char* name_of(Place place) { return place == Place::host ? "host" : "cuda"; }

bool overlap(ConstBytes a, ConstBytes b) {
  const std::less<const std::byte*> before;  // a total order, also over unrelated arrays
  return !a.empty() && !b.empty() && before(a.data, b.data + b.size) && before(b.data, a.data + a.size);
}

void expect_no_overlap(const char* call, ConstBytes send, ConstBytes recv) {
  THINWIRE_EXPECTS(!overlap(send, recv), std::string(call) + ": send and recv overlap");
}

std::size_t total(const char* call, const char* what, std::span<const std::size_t> sizes) {
  std::size_t sum = 0;
  for (const std::size_t bytes : sizes) {
    THINWIRE_EXPECTS(bytes <= SIZE_MAX - sum, std::string(call) + ": the sum of " + what + " overflows");
    sum += bytes;
  }
  return sum;
}

}  // namespace

void Communicator::check(const char* call, ConstBytes span, Stream stream) const {
  THINWIRE_EXPECTS(span.data != nullptr || span.empty(), std::string(call) + ": null data with size " + std::to_string(span.size));
  if (!serves(span.place))
    fail(Errc::unsupported, std::string(call) + ": the " + transport() + " transport takes no " + name_of(span.place) + " spans");
  if (span.place == Place::host) return;
  THINWIRE_EXPECTS(
      stream.place() == span.place && stream.device() == span.device,
      std::string(call) + ": a span on " + name_of(span.place) + ":" + std::to_string(span.device) + " needs a stream of that device");
}

void Communicator::count(std::size_t payload, double leaves) noexcept {
  traffic_.payload_bytes += payload;
  traffic_.wire_bytes += double(payload) * leaves;
  ++traffic_.calls;
}

void Communicator::all_gather(ConstBytes send, Bytes recv, Stream stream) {
  const auto world = std::size_t(size());
  check("all_gather", send, stream);
  check("all_gather", recv, stream);
  THINWIRE_EXPECTS(send.place == recv.place && send.device == recv.device, "all_gather: send and recv lie on different places");
  THINWIRE_EXPECTS(
      recv.size % world == 0 && recv.size / world == send.size,
      "all_gather: recv has " + std::to_string(recv.size) + " bytes, need " + std::to_string(world) + " x " + std::to_string(send.size));
  const bool in_place = !send.empty() && send.data == recv.data + std::size_t(rank()) * send.size;
  if (!in_place) expect_no_overlap("all_gather", send, recv);
  do_all_gather(send, recv, stream);
  count(send.size, double(world - 1));
}

void Communicator::all_to_all(ConstBytes send, Bytes recv, Stream stream) {
  const auto world = std::size_t(size());
  THINWIRE_EXPECTS(send.size == recv.size,
                   "all_to_all: send has " + std::to_string(send.size) + " bytes, recv " + std::to_string(recv.size));
  THINWIRE_EXPECTS(send.size % world == 0,
                   "all_to_all: " + std::to_string(send.size) + " bytes cannot be cut into " + std::to_string(world) + " equal slots");
  slots_.assign(world, send.size / world);
  exchange(send, slots_, recv, slots_, true, stream);
}

void Communicator::all_to_all_v(ConstBytes send, std::span<const std::size_t> send_bytes, Bytes recv,
                                std::span<const std::size_t> recv_bytes, Stream stream) {
  exchange(send, send_bytes, recv, recv_bytes, false, stream);
}

void Communicator::exchange(ConstBytes send, std::span<const std::size_t> send_bytes, Bytes recv, std::span<const std::size_t> recv_bytes,
                            bool equal, Stream stream) {
  const auto world = std::size_t(size()), me = std::size_t(rank());
  check("all_to_all", send, stream);
  check("all_to_all", recv, stream);
  THINWIRE_EXPECTS(send.place == recv.place && send.device == recv.device, "all_to_all: send and recv lie on different places");
  THINWIRE_EXPECTS(send_bytes.size() == world && recv_bytes.size() == world, "all_to_all: " + std::to_string(send_bytes.size()) +
                                                                                 " sizes to send and " + std::to_string(recv_bytes.size()) +
                                                                                 " to receive, need " + std::to_string(world) + " each");
  const std::size_t sending = total("all_to_all", "send_bytes", send_bytes), receiving = total("all_to_all", "recv_bytes", recv_bytes);
  THINWIRE_EXPECTS(sending == send.size,
                   "all_to_all: send has " + std::to_string(send.size) + " bytes, its slots have " + std::to_string(sending));
  THINWIRE_EXPECTS(receiving == recv.size,
                   "all_to_all: recv has " + std::to_string(recv.size) + " bytes, its slots have " + std::to_string(receiving));
  THINWIRE_EXPECTS(send_bytes[me] == recv_bytes[me], "all_to_all: this rank sends itself " + std::to_string(send_bytes[me]) +
                                                         " bytes and expects " + std::to_string(recv_bytes[me]));
  expect_no_overlap("all_to_all", send, recv);
  if (equal) {
    do_equal_all_to_all(send, recv, send_bytes, stream);
  } else {
    do_all_to_all(send, send_bytes, recv, recv_bytes, stream);
  }
  count(send.size, double(world - 1) / double(world));
}

void Communicator::all_reduce(Bytes data, Stream stream) {
  check("all_reduce", data, stream);
  THINWIRE_EXPECTS(data.dtype == DType::fp32 || data.dtype == DType::bf16 || data.dtype == DType::fp16,
                   std::string("all_reduce: dtype ") + to_string(data.dtype) + "; fp32, bf16 and fp16 can be summed");
  THINWIRE_EXPECTS(data.size % size_of(data.dtype) == 0,
                   "all_reduce: " + std::to_string(data.size) + " bytes are no whole number of " + to_string(data.dtype) + " elements");
  do_all_reduce(data, stream);
  count(data.size, 2.0 * double(size() - 1) / double(size()));
}

void Communicator::broadcast(Bytes data, int root, Stream stream) {
  check("broadcast", data, stream);
  THINWIRE_EXPECTS(root >= 0 && root < size(),
                   "broadcast: root " + std::to_string(root) + " is outside [0, " + std::to_string(size()) + ")");
  do_broadcast(data, root, stream);
  count(rank() == root ? data.size : 0, double(size() - 1));
}

void Communicator::barrier() {
  do_barrier();
  count(0, 0);
}

}  // namespace thinwire
