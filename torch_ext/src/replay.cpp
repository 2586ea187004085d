#include "torch_ext/src/replay.hpp"

#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>
#include <system_error>
#include <thread>
#include <utility>

#include "compressors/core/error.hpp"
#include "compressors/core/wire.hpp"

namespace thinwire::torch_ext {
namespace {

std::size_t numel(const std::vector<std::size_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), std::size_t(1), std::multiplies<>());
}

/// Of several ranks' errors the one that is not merely another's echo.
class FirstError {
 public:
  void keep(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    if (!error_ || (echo(error_) && !echo(error))) error_ = std::move(error);
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static bool echo(const std::exception_ptr& error) {
    try {
      std::rethrow_exception(error);
    } catch (const Error& e) { return e.code() == Errc::peer_lost || e.code() == Errc::timeout; } catch (...) {
      return false;
    }
  }
  std::mutex mutex_;
  std::exception_ptr error_;
};

/// The ranks' threads. Whatever is thrown while they are being made or joined: those that run are released from one another and joined.
class Ranks {
 public:
  explicit Ranks(int world) {
    for (auto& communicator : make_loopback(world)) communicators_.push_back(std::move(communicator));
    threads_.reserve(communicators_.size());
  }
  ~Ranks() {
    if (threads_.empty()) return;
    for (const auto& communicator : communicators_) communicator->abort("the replay could not start all its ranks");
    join();
  }
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  template <class Run>
  void run(Run run) {
    for (const auto& communicator : communicators_) {
      const int rank = communicator->rank();
      try {
        threads_.emplace_back(run, rank, communicator);
      } catch (const std::system_error& error) {
        fail(Errc::unsupported, "replay: this machine has no thread for rank " + std::to_string(rank) + " of " +
                                    std::to_string(communicators_.size()) + ": " + error.what());
      }
    }
    join();
  }

 private:
  void join() {
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }
  std::vector<std::shared_ptr<Communicator>> communicators_;
  std::vector<std::thread> threads_;
};

constexpr int kLargestWorld = 1024;  // a thread each

}  // namespace

ReplayResult replay(const Config& config, DType dtype, std::size_t steps, std::int64_t ranks, std::span<const Recording> recordings,
                    bool record_payloads) {
  if (ranks < 1 || ranks > kLargestWorld) {
    fail(Errc::invalid_argument, "replay: " + std::to_string(ranks) + " ranks; 1 to " + std::to_string(kLargestWorld) +
                                     " are possible, as each is a thread of this process");
  }
  if (config.feedback().name == "ef14" && config.feedback().flag("lr_rescale"))
    fail(Errc::invalid_config,
         "replay: feedback=ef14:lr_rescale=1 follows an optimizer's learning rate, and a recording has none; leave it out");
  const int world = int(ranks);
  std::vector<Parameter> parameters;
  std::vector<std::size_t> bytes;  // of one gradient of each parameter
  for (const Recording& recording : recordings) {
    parameters.push_back({recording.name, recording.shape});
    bytes.push_back(numel(recording.shape) * size_of(dtype));
  }
  const std::size_t bucket_bytes = std::accumulate(bytes.begin(), bytes.end(), std::size_t(0));
  std::vector<std::uint32_t> ids(parameters.size());
  std::iota(ids.begin(), ids.end(), 0u);

  ReplayResult result;
  for (const std::size_t b : bytes) result.mean.emplace_back(steps * b);
  result.payload_bytes.resize(steps * std::size_t(world));
  result.state.resize(std::size_t(world));
  if (record_payloads) result.payloads.assign(steps, std::vector<std::vector<std::byte>>(std::size_t(world)));
  std::vector<std::uint64_t> received(steps * std::size_t(world));  // hashes of what each rank got

  FirstError error;
  Ranks(world).run([&](int rank, const std::shared_ptr<Communicator>& communicator) {
    try {
      ReducerOptions options;
      options.inline_queue = true;
      if (record_payloads) {
        options.record_payload = [&, rank](std::uint64_t step, ConstBytes payload) {
          std::vector<std::byte>& all = result.payloads.at(step)[std::size_t(rank)];
          all.insert(all.end(), payload.data, payload.data + payload.size);
        };
      }
      GradientReducer reducer(communicator, config, parameters, std::move(options));
      std::vector<std::byte> bucket(bucket_bytes);
      std::uint64_t sent = 0;
      for (std::size_t step = 0; step < steps; ++step) {
        const std::size_t slot = step * std::size_t(world) + std::size_t(rank);
        std::size_t first = 0;
        for (std::size_t p = 0; p < bytes.size(); ++p) {
          if (bytes[p] != 0) std::memcpy(bucket.data() + first, recordings[p].data + slot * bytes[p], bytes[p]);
          first += bytes[p];
        }
        reducer.reduce(ids, Bytes{bucket.data(), bucket.size(), dtype, Place::host, 0}).wait();
        received[slot] = wire::hash_bytes(bucket.data(), bucket.size(), step);
        const std::uint64_t total = reducer.stats().payload_bytes;
        result.payload_bytes[slot] = total - sent;
        sent = total;
        if (rank != 0) continue;
        first = 0;
        for (std::size_t p = 0; p < bytes.size(); ++p) {
          if (bytes[p] != 0) std::memcpy(result.mean[p].data() + step * bytes[p], bucket.data() + first, bytes[p]);
          first += bytes[p];
        }
      }
      result.state[std::size_t(rank)] = reducer.state();
      if (rank == 0) result.stats = reducer.stats();
    } catch (...) {
      error.keep(std::current_exception());
      communicator->abort("another rank of the replay failed");
    }
  });
  error.rethrow();

  for (std::size_t step = 0; step < steps; ++step) {
    for (int rank = 1; rank < world; ++rank) {
      if (received[step * std::size_t(world) + std::size_t(rank)] == received[step * std::size_t(world)]) continue;
      fail(Errc::internal, "replay: ranks 0 and " + std::to_string(rank) + " received different bytes at step " + std::to_string(step));
    }
  }
  return result;
}

}  // namespace thinwire::torch_ext
