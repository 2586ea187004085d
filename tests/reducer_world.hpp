#pragma once
// Ranks as threads around GradientReducers: one description of a training run, executed with a deadline, everything observable kept.

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "collectives/communicator.hpp"
#include "collectives/reducer.hpp"
#include "collectives/staged.hpp"
#include "compressors/core/device.hpp"
#include "compressors/core/error.hpp"

namespace thinwire::test {

using Vec = std::vector<float>;
using Ids = std::vector<std::uint32_t>;

/// THINWIRE_TEST_DEVICE=N runs every Scenario in the memory of GPU N; -1: on the host.
inline int test_device() {
  static const int device = [] {
    const char* text = std::getenv("THINWIRE_TEST_DEVICE");
    return text != nullptr ? std::atoi(text) : -1;
  }();
  return device;
}

/// Ends the process, with a word, if it is not destroyed in time: a hang is a failure with a name, not a stuck test run.
class Deadline {
 public:
  explicit Deadline(std::chrono::seconds limit) {
    thread_ = std::thread([this, limit] {
      std::unique_lock lock(mutex_);
      if (changed_.wait_for(lock, limit, [this] { return over_; })) return;
      const auto* test = testing::UnitTest::GetInstance()->current_test_info();
      std::fprintf(stderr, "DEADLINE: %s.%s hangs\n", test != nullptr ? test->test_suite_name() : "?",
                   test != nullptr ? test->name() : "?");
      std::_Exit(3);
    });
  }
  ~Deadline() {
    {
      const std::lock_guard lock(mutex_);
      over_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool over_ = false;
  std::thread thread_;
};

using RankBody = std::function<void(std::shared_ptr<Communicator>)>;

/// Runs body(communicator) on one thread per rank. A body that throws is rethrown here after all have ended.
inline void run_ranks(int world, const RankBody& body, std::chrono::seconds limit = std::chrono::seconds(240)) {
  const Deadline deadline(limit);
  auto ranks = make_loopback(world);
  std::vector<std::exception_ptr> errors(ranks.size());
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    threads.emplace_back([&, r] {
      std::shared_ptr<Communicator> own = make_staged(std::move(ranks[r]));  // it takes both places
      try {
        body(std::move(own));
      } catch (...) { errors[r] = std::current_exception(); }
    });
  }
  for (std::thread& t : threads) t.join();
  for (const std::exception_ptr& e : errors)
    if (e) std::rethrow_exception(e);
}

/// A gradient buffer of any dtype, read and written as floats. Values that are given must be representable.
class GradBuffer {
 public:
  GradBuffer(DType dtype, std::size_t count) : dtype_(dtype), bytes_(count * size_of(dtype) + 1), count_(count) {}
  void set(std::size_t i, float x) {
    if (dtype_ == DType::fp32) std::memcpy(bytes_.data() + 4 * i, &x, 4);
    if (dtype_ == DType::bf16) put(i, float_to_bf16(x));
    if (dtype_ == DType::fp16) put(i, float_to_fp16(x));
  }
  float get(std::size_t i) const {
    if (dtype_ == DType::fp32) {
      float x;
      std::memcpy(&x, bytes_.data() + 4 * i, 4);
      return x;
    }
    std::uint16_t h;
    std::memcpy(&h, bytes_.data() + 2 * i, 2);
    return dtype_ == DType::bf16 ? bf16_to_float(h) : fp16_to_float(h);
  }
  Bytes view() { return host_bytes(bytes_.data(), count_, dtype_); }

  /// A twin on the GPU, which fetch() reads back.
  Bytes on_device(int device, Stream stream) {
    device_.reserve(bytes_.size(), device);
    device_copy(device_.data(), bytes_.data(), bytes_.size(), stream);
    return {device_.data(), count_ * size_of(dtype_), dtype_, Place::cuda, device};
  }
  void fetch(Stream stream) {
    device_copy(bytes_.data(), device_.data(), bytes_.size(), stream);
    device_wait(stream);
  }

 private:
  void put(std::size_t i, std::uint16_t h) { std::memcpy(bytes_.data() + 2 * i, &h, 2); }
  DType dtype_;
  std::vector<std::byte> bytes_;
  std::size_t count_;
  DeviceBuffer device_;
};

inline std::size_t numel_of(const Parameter& p) {
  std::size_t n = 1;
  for (const std::size_t extent : p.shape) n *= extent;
  return n;
}

/// A run to be made.
struct Scenario {
  int world = 1;
  std::string config;
  std::vector<Parameter> parameters;
  int steps = 1;
  DType dtype = DType::fp32;
  std::function<Vec(int step, int rank, std::uint32_t parameter)> grad;
  /// Buckets of a step, in order. Default: all parameters in one.
  std::function<std::vector<Ids>(int step)> buckets = nullptr;
  std::function<ReduceOptions(int step, int rank)> options = nullptr;
  ReducerOptions reducer = {};
  std::vector<ReducerState> start = {};  ///< loaded before the first step: one per rank, or all of another world's
  std::function<void(GradientReducer&, int step, int rank)> before_step = nullptr, after_step = nullptr;
  bool keep_payloads = false;
  int device = test_device();
  bool scale_in_memory = false;  ///< the GPU's kernels read the loss scale from its memory
};

/// What came of it.
struct Outcome {
  std::vector<std::vector<std::vector<Vec>>> mean;                         ///< [step][rank][parameter]
  std::vector<ReducerState> state;                                         ///< [rank], after the last step
  std::vector<Stats> stats;                                                ///< [rank]
  std::vector<std::vector<std::vector<std::vector<std::byte>>>> payloads;  ///< [step][rank][bucket]

  const Vec& array(int rank, const std::string& parameter, const std::string& name) const {
    return state.at(std::size_t(rank)).parameters.at(parameter).at(name);
  }
};

/// `run`: calls the body as every rank, or as those that are in this process; what the others see stays empty.
inline Outcome play(
    const Scenario& s,
    const std::function<void(int, const RankBody&)>& run = [](int world, const RankBody& body) { run_ranks(world, body); }) {
  const auto steps = std::size_t(s.steps), world = std::size_t(s.world);
  Outcome out;
  out.mean.assign(steps, std::vector<std::vector<Vec>>(world, std::vector<Vec>(s.parameters.size())));
  out.payloads.assign(steps, std::vector<std::vector<std::vector<std::byte>>>(world));
  out.state.resize(world);
  out.stats.resize(world);
  const std::uint64_t first_step = s.start.empty() ? 0 : s.start.front().step;
  run(s.world, [&](std::shared_ptr<Communicator> communicator) {
    const int rank = communicator->rank();
    ReducerOptions reducer_options = s.reducer;
    reducer_options.device = s.device;
    const auto gpu = s.device < 0 ? nullptr : std::make_unique<DeviceStream>(s.device);
    const Stream stream = gpu != nullptr ? gpu->get() : Stream::host();
    if (s.keep_payloads) {
      reducer_options.record_payload = [&out, rank, first_step](std::uint64_t step, ConstBytes payload) {
        out.payloads[step - first_step][std::size_t(rank)].emplace_back(payload.data, payload.data + payload.size);
      };
    }
    const bool scale_in_memory = s.scale_in_memory && gpu != nullptr;
    DeviceBuffer scale;
    if (scale_in_memory) scale.reserve(sizeof(float), s.device);
    const auto set_scale = [&](float value) { device_copy(scale.data(), &value, sizeof value, stream); };
    GradientReducer reducer(communicator, Config::parse(s.config), s.parameters, reducer_options);
    if (!s.start.empty()) {
      const bool same_world = s.start.front().world == s.world;
      reducer.load_state(same_world ? std::span(&s.start[std::size_t(rank)], 1) : std::span(s.start));
    }
    Ids all(s.parameters.size());
    for (std::size_t p = 0; p < all.size(); ++p) all[p] = std::uint32_t(p);
    for (int step = 0; step < s.steps; ++step) {
      if (s.before_step) s.before_step(reducer, step, rank);
      const std::vector<Ids> buckets = s.buckets ? s.buckets(step) : std::vector<Ids>{all};
      std::vector<GradBuffer> grads;
      std::vector<Work> works;
      grads.reserve(buckets.size());
      ReduceOptions options = s.options ? s.options(step, rank) : ReduceOptions{};
      if (scale_in_memory) {
        set_scale(options.loss_scale);
        options.loss_scale = 1;
        options.device_loss_scale = reinterpret_cast<const float*>(scale.data());
      }
      for (const Ids& bucket : buckets) {
        std::size_t count = 0;
        for (const std::uint32_t p : bucket) count += numel_of(s.parameters[p]);
        GradBuffer& grad = grads.emplace_back(s.dtype, count);
        std::size_t at = 0;
        for (const std::uint32_t p : bucket) {
          const Vec g = s.grad(step, rank, p);
          ASSERT_EQ(g.size(), numel_of(s.parameters[p]));
          for (const float x : g) grad.set(at++, x);
        }
        const Bytes data = gpu != nullptr ? grad.on_device(s.device, stream) : grad.view();
        works.push_back(reducer.reduce(bucket, data, stream, options));
      }
      if (scale_in_memory) set_scale(std::numeric_limits<float>::quiet_NaN());  // whatever comes later in the stream must not read it
      for (Work& work : works) work.wait();
      for (GradBuffer& grad : grads)
        if (gpu != nullptr) grad.fetch(stream);
      for (std::size_t b = 0; b < buckets.size(); ++b) {
        std::size_t at = 0;
        for (const std::uint32_t p : buckets[b]) {
          Vec& mean = out.mean[std::size_t(step)][std::size_t(rank)][p];
          for (std::size_t i = 0, n = numel_of(s.parameters[p]); i < n; ++i) mean.push_back(grads[b].get(at++));
        }
      }
      if (s.after_step) s.after_step(reducer, step, rank);
    }
    out.state[std::size_t(rank)] = reducer.state();
    out.stats[std::size_t(rank)] = reducer.stats();
    communicator->barrier();  // nobody leaves while a slower rank is still in its last calls
  });
  return out;
}

/// Equal bits, element by element.
inline testing::AssertionResult same_bits(const Vec& a, const Vec& b) {
  if (a.size() != b.size()) return testing::AssertionFailure() << a.size() << " elements against " << b.size();
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (float_bits(a[i]) != float_bits(b[i]))
      return testing::AssertionFailure() << "element " << i << ": " << a[i] << " (0x" << std::hex << float_bits(a[i]) << ") against "
                                         << b[i] << " (0x" << float_bits(b[i]) << ")";
  }
  return testing::AssertionSuccess();
}

/// Equal values: -0 is 0, NaN is NaN.
inline testing::AssertionResult same_values(const Vec& a, const Vec& b) {
  if (a.size() != b.size()) return testing::AssertionFailure() << a.size() << " elements against " << b.size();
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!(a[i] == b[i]) && !(a[i] != a[i] && b[i] != b[i]))
      return testing::AssertionFailure() << "element " << i << ": " << a[i] << " against " << b[i];
  }
  return testing::AssertionSuccess();
}

inline testing::AssertionResult all_nan(const Vec& x) {
  for (std::size_t i = 0; i < x.size(); ++i)
    if (x[i] == x[i]) return testing::AssertionFailure() << "element " << i << " is " << x[i];
  return testing::AssertionSuccess();
}

/// The whole states of two runs, to the bit.
inline void expect_same_state(const std::vector<ReducerState>& a, const std::vector<ReducerState>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t r = 0; r < a.size(); ++r) {
    ASSERT_EQ(a[r].parameters.size(), b[r].parameters.size());
    for (const auto& [name, arrays] : a[r].parameters) {
      ASSERT_EQ(arrays.size(), b[r].parameters.at(name).size()) << name;
      for (const auto& [array, values] : arrays)
        EXPECT_TRUE(same_bits(values, b[r].parameters.at(name).at(array))) << "rank " << r << " " << name << "." << array;
    }
  }
}

/// All ranks' means of all steps against another run's, to the bit.
inline void expect_same_means(const Outcome& a, const Outcome& b) {
  ASSERT_EQ(a.mean.size(), b.mean.size());
  for (std::size_t t = 0; t < a.mean.size(); ++t)
    for (std::size_t r = 0; r < a.mean[t].size(); ++r)
      for (std::size_t p = 0; p < a.mean[t][r].size(); ++p)
        ASSERT_TRUE(same_bits(a.mean[t][r][p], b.mean[t][r][p])) << "step " << t << " rank " << r << " parameter " << p;
}

inline void expect_replicas_agree(const Outcome& a) {
  for (std::size_t t = 0; t < a.mean.size(); ++t)
    for (std::size_t r = 1; r < a.mean[t].size(); ++r)
      for (std::size_t p = 0; p < a.mean[t][r].size(); ++p)
        ASSERT_TRUE(same_bits(a.mean[t][0][p], a.mean[t][r][p])) << "step " << t << " rank " << r << " parameter " << p;
}

/// A counter-based generator: any (seed, step, rank, parameter, element) has its number, whoever asks.
inline std::uint64_t draw(std::uint64_t seed, std::uint64_t a, std::uint64_t b, std::uint64_t c, std::uint64_t d) {
  std::uint64_t x = seed * 0x9e3779b97f4a7c15ull + a * 0xbf58476d1ce4e5b9ull + b * 0x94d049bb133111ebull + c * 0xd6e8feb86659fd93ull + d;
  for (int i = 0; i < 3; ++i) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ull;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebull;
    x ^= x >> 31;
  }
  return x;
}

/// A smooth-ish heavy-tailed number in fp32, nothing special about its bits.
inline float real_number(std::uint64_t seed, int step, int rank, std::uint32_t p, std::size_t i) {
  const std::uint64_t x = draw(seed, std::uint64_t(step), std::uint64_t(rank), p, i);
  const double a = double(x >> 40) / double(1 << 24) - 0.5, b = double((x >> 16) & 0xffffff) / double(1 << 24) - 0.5;
  return float(a * 8 * b * (1 + b * b * 40));
}

/// A multiple of 1/4 in [-8, 8): sums of many and halvings of them are exact, and it is representable in bf16 and fp16.
inline float dyadic_number(std::uint64_t seed, int step, int rank, std::uint32_t p, std::size_t i) {
  return float(int(draw(seed, std::uint64_t(step), std::uint64_t(rank), p, i) >> 58) - 32) / 4.0f;
}

/// A generator for Scenario::grad out of one of the two above.
inline std::function<Vec(int, int, std::uint32_t)> numbers(float (*number)(std::uint64_t, int, int, std::uint32_t, std::size_t),
                                                           std::uint64_t seed, const std::vector<Parameter>& parameters) {
  std::vector<std::size_t> numel;
  for (const Parameter& p : parameters) numel.push_back(numel_of(p));
  return [=](int step, int rank, std::uint32_t p) {
    Vec g(numel[p]);
    for (std::size_t i = 0; i < g.size(); ++i) g[i] = number(seed, step, rank, p, i);
    return g;
  };
}

/// Runs `call`, expects an Error with this code whose text holds all `words`; returns the text.
template <class Call>
std::string expect_error(Errc code, const std::vector<std::string>& words, Call&& call) {
  try {
    call();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code) << to_string(e.code()) << ": " << e.what();
    for (const std::string& word : words)
      EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << "no '" << word << "' in: " << e.what();
    return e.what();
  }
  ADD_FAILURE() << "no error, expected " << to_string(code);
  return {};
}

}  // namespace thinwire::test
