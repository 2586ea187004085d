#pragma once
// What the contract suites of all codecs share: where a codec runs, the recursions that every codec knows, and inputs with corners.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "compressors/core/device.hpp"
#include "compressors/core/dtype.hpp"
#include "compressors/core/isa.hpp"
#include "compressors/core/recursion.hpp"
#include "tests/dtype_oracle.hpp"

namespace thinwire {

/// Where a codec runs: on the CPU by one of its ISAs, or on a GPU behind copies.
struct Backend {
  Isa isa = Isa::scalar;
  bool cuda = false;

  constexpr Backend(Isa on) : isa(on) {}
  static constexpr Backend gpu() {
    Backend out(Isa::scalar);
    out.cuda = true;
    return out;
  }
};

inline constexpr float kGap = 7.25f;  // what lies between segments, and must stay

inline Recursion no_feedback() { return {}; }
inline Recursion ef14(float decay = 1) {
  Recursion r;
  r.kind = Recursion::Kind::error_feedback;
  r.decay = decay;
  return r;
}
inline Recursion ef21(float fresh = 1) {
  Recursion r;
  r.kind = Recursion::Kind::estimate;
  r.fresh = fresh;
  return r;
}
inline Recursion econtrol(float fresh = 1) {
  Recursion r = ef21(fresh);
  r.control = true;
  return r;
}
inline Recursion narrow(Recursion r) {
  r.narrow = true;
  return r;
}
inline Recursion on_grid(Recursion r) {
  r.grid = true;
  return r;
}
inline bool has_estimate(const Recursion& r) { return r.kind == Recursion::Kind::estimate; }
inline std::string describe(const Recursion& r) {
  return "kind " + std::to_string(int(r.kind)) + " decay " + std::to_string(r.decay) + " m " + std::to_string(r.momentum) +
         (r.nesterov ? " nesterov" : "") + (r.mask ? " mask" : "") + (r.averaged ? " averaged" : "") + (r.control ? " control" : "") +
         (r.fresh < 1 ? " fresh " + std::to_string(r.fresh) : "") + (r.narrow ? " narrow" : "") + (r.grid ? " grid" : "");
}

/// EControl's eta of a rig's segment s: the two limits, and what lies between.
inline float eta_at(std::size_t s) {
  constexpr float kEtas[] = {0.1f, 1.0f, 0.0f, 0.03f, 0.5f};
  return kEtas[s % 5];
}
inline const std::vector<DType> kTypes = {DType::fp32, DType::bf16, DType::fp16};

/// Normal numbers with ties, zeros of both signs and denormals among them; `wild` adds NaN, infinities and values near the largest.
inline std::vector<float> gradients(std::size_t n, unsigned seed, bool wild) {
  static std::map<std::tuple<std::size_t, unsigned, bool>, std::vector<float>> made;  // many cases take the same
  static std::size_t held = 0;
  if (held > (std::size_t(1) << 24)) made.clear(), held = 0;
  std::vector<float>& out = made[{n, seed, wild}];
  if (out.size() == n) return out;
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  out.resize(n);
  held += n;
  for (auto& x : out) {
    const unsigned pick = random() % 64;
    x = normal(random);
    if (pick == 0) x = 0;
    if (pick == 1) x = -0.0f;
    if (pick == 2) x = std::ldexp(float(random() % 100), -149) * (random() % 2 != 0 ? 1.0f : -1.0f);
    if (pick < 12 && pick > 2) x = std::round(x * 4) / 4;
    if (pick == 12) x = x * 1e-6f;
    if (pick == 13) x = x * 1e4f;
    if (wild && random() % 997 == 0) {
      const float odd[] = {NAN, INFINITY, -INFINITY, 3.4e38f, -3.3e38f, 65520.0f, 65519.0f, 1e30f};
      x = odd[random() % 8];
    }
  }
  return out;
}

/// The same as state, which is always finite; `wild`: up to the largest float.
inline std::vector<float> held_values(std::size_t n, unsigned seed, bool wild) {
  std::vector<float> out = gradients(n, seed, wild);
  for (float& x : out)
    if (!std::isfinite(x)) x = std::copysign(std::numeric_limits<float>::max(), x);
  return out;
}

/// A rig's state, which it holds as floats, in the form in which the recursion stores it.
class StoredState {
 public:
  StateArray of(std::vector<float>& values, bool narrow) {
    if (!narrow) return values.data();
    auto& copy = copies_.emplace_back(&values, std::vector<std::uint16_t>(values.size() + 1)).second;
    for (std::size_t i = 0; i < values.size(); ++i) copy[i] = oracle::nearest_bits(values[i], DType::bf16, true);
    return copy.data();
  }
  /// What calls have left there.
  void fetch() {
    for (auto& [values, copy] : copies_)
      for (std::size_t i = 0; i < values->size(); ++i) (*values)[i] = float(oracle::half_value(copy[i], DType::bf16));
  }
  void clear() { copies_.clear(); }

 private:
  std::vector<std::pair<std::vector<float>*, std::vector<std::uint16_t>>> copies_;
};

template <class F>
void expect_same_bits(const std::vector<float>& got, const std::vector<float>& want, F&& where) {
  ASSERT_EQ(got.size(), want.size());
  if (got.empty() || std::memcmp(got.data(), want.data(), got.size() * sizeof(float)) == 0) return;  // an assertion per element is slow
  for (std::size_t i = 0; i < got.size(); ++i)
    ASSERT_EQ(float_bits(got[i]), float_bits(want[i])) << where() << " element " << i << ": " << got[i] << " against " << want[i];
}

template <class Traits>
class OnBackend : public testing::Test {
 protected:
  void SetUp() override {
    constexpr Backend on = Traits::kBackend;
    if (on.cuda && device_count() == 0) GTEST_SKIP() << "there is no GPU, or this build has no CUDA";
    if (!on.cuda && !cpu_supports(on.isa)) GTEST_SKIP() << "this CPU does not support " << to_string(on.isa);
  }
};
struct Scalar {
  static constexpr Backend kBackend = Isa::scalar;
};
struct Avx2 {
  static constexpr Backend kBackend = Isa::avx2;
};
struct Avx512 {
  static constexpr Backend kBackend = Isa::avx512;
};
struct Cuda {
  static constexpr Backend kBackend = Backend::gpu();
};
using Backends = testing::Types<Scalar, Avx2, Avx512, Cuda>;
struct BackendName {
  template <class T>
  static std::string GetName(int) {
    return T::kBackend.cuda ? "cuda" : to_string(T::kBackend.isa);
  }
};

}  // namespace thinwire
