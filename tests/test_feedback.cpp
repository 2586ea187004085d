// The recursion's parts that need no codec: names of states, norms in their fixed order, clip factors, dense messages.

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "compressors/core/recursion.hpp"
#include "tests/reducer_oracle.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

using Kind = Recursion::Kind;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity(),
                kMax = std::numeric_limits<float>::max();

Plan plan_of(const std::vector<Segment>& segments) { return {segments, {}, 0}; }
Segment segment(std::uint32_t parameter, std::size_t first, std::size_t count) { return {parameter, first, count, 1, 1, {}, nullptr}; }

// ---- squared norms

/// The order that is promised: blocks of 4096, 64 fp32 partials each, halves; over blocks the same in double. Non-finite elements count 0.
double norm_oracle(const Vec& x) {
  std::vector<double> blocks;
  for (std::size_t begin = 0; begin < x.size(); begin += 4096) {
    std::vector<float> partial(64, 0.0f);
    for (std::size_t i = begin; i < std::min(x.size(), begin + 4096); ++i) {
      const float y = std::isfinite(x[i]) ? x[i] : 0.0f;
      const float square = y * y;
      partial[(i - begin) % 64] += square;
    }
    for (std::size_t half = 32; half >= 1; half /= 2)
      for (std::size_t i = 0; i < half; ++i) partial[i] = partial[i] + partial[i + half];
    blocks.push_back(double(partial[0]));
  }
  std::vector<double> partial(64, 0.0);
  for (std::size_t b = 0; b < blocks.size(); ++b) partial[b % 64] += blocks[b];
  for (std::size_t half = 32; half >= 1; half /= 2)
    for (std::size_t i = 0; i < half; ++i) partial[i] = partial[i] + partial[i + half];
  return partial[0];
}

TEST(SquaredNorms, FixedOrderToTheBit) {
  for (const DType dtype : {DType::fp32, DType::bf16, DType::fp16}) {
    for (const std::size_t n : {0,
                                1,
                                31,
                                32,
                                33,
                                63,
                                64,
                                65,
                                127,
                                128,
                                129,
                                4095,
                                4096,
                                4097,
                                8192,
                                12345,
                                64 * 4096 - 1,
                                64 * 4096,
                                64 * 4096 + 1,
                                70 * 4096 + 77}) {
      for (const std::size_t first : {std::size_t(0), std::size_t(3)}) {  // a segment that starts off a vector's boundary
        Vec x(n);
        GradBuffer grad(dtype, first + n + 5);
        for (std::size_t i = 0; i < first + n + 5; ++i) grad.set(i, 1e3f);  // neighbours that must not count
        for (std::size_t i = 0; i < n; ++i) {
          x[i] = as_type(real_number(3, int(n), 0, 0, i), dtype);
          grad.set(first + i, x[i]);
        }
        double norm = -1;
        const std::vector<Segment> segments = {segment(0, first, n)};
        squared_norms(plan_of(segments), grad.view(), &norm, Stream::host());
        ASSERT_EQ(norm, norm_oracle(x)) << to_string(dtype) << " n=" << n;
      }
    }
  }
}

TEST(SquaredNorms, NonFiniteElementsCountNothingAndOtherSegmentsAreTheirOwn) {
  GradBuffer grad(DType::fp32, 300);
  Vec x(300);
  for (std::size_t i = 0; i < 300; ++i) x[i] = real_number(4, 0, 0, 0, i);
  x[0] = kNan, x[64] = kInf, x[199] = -kInf, x[200] = kNan, x[250] = -0.0f;
  for (std::size_t i = 0; i < 300; ++i) grad.set(i, x[i]);
  const std::vector<Segment> segments = {segment(0, 0, 200), segment(1, 200, 100)};
  double norms[2];
  squared_norms(plan_of(segments), grad.view(), norms, Stream::host());
  EXPECT_EQ(norms[0], norm_oracle(Vec(x.begin(), x.begin() + 200)));
  EXPECT_EQ(norms[1], norm_oracle(Vec(x.begin() + 200, x.end())));
  EXPECT_TRUE(std::isfinite(norms[0]) && norms[0] > 0);
}

TEST(SquaredNorms, SquaresBeyondFp32StayFinite) {
  GradBuffer grad(DType::fp32, 5000);
  for (std::size_t i = 0; i < 5000; ++i) grad.set(i, i == 4500 ? kMax : 1.0f);
  const std::vector<Segment> segments = {segment(0, 0, 5000)};
  double norm;
  squared_norms(plan_of(segments), grad.view(), &norm, Stream::host());
  // 5000 ones are below half an ulp of kMax², whatever the order.
  EXPECT_EQ(norm, double(kMax) * double(kMax));
}

// ---- clip factors

TEST(ClipFactors, OffWithoutClipNorm) {
  const std::vector<Segment> segments = {segment(0, 0, 8), segment(1, 8, 2)};
  const std::vector<double> norms = {1e30, 0};
  float factors[2];
  clip_factors({.kind = Kind::momentum_correction}, plan_of(segments), norms, 0.25f, 4, 10, factors);
  EXPECT_EQ(factors[0], 0.25f);
  EXPECT_EQ(factors[1], 0.25f);
}

TEST(ClipFactors, ScalesToTheShareOfTheGlobalThreshold) {
  // N = 4, a quarter of all elements: the limit is c itself. Norm 8 in scaled units is 2 in true ones.
  const std::vector<Segment> segments = {segment(0, 0, 25), segment(1, 25, 25), segment(2, 50, 50)};
  const std::vector<double> norms = {64, 16, 0};
  float factors[3];
  clip_factors({.kind = Kind::momentum_correction, .clip_norm = 1.0f}, plan_of(segments), norms, 0.25f, 4, 100, factors);
  EXPECT_EQ(factors[0], 0.125f);  // halved
  EXPECT_EQ(factors[1], 0.25f);   // norm 1 is at the limit: untouched
  EXPECT_EQ(factors[2], 0.25f);   // nothing to clip, and no division by 0
}

// Clipping raw local gradients at sqrt(N)·c is clipping gradients divided by N at c/sqrt(N), as the paper has it.
TEST(ClipFactors, AgreesWithTheFormForDividedGradients) {
  const std::vector<Segment> segments = {segment(0, 0, 30)};
  for (const int world : {1, 2, 3, 4, 7}) {
    const double c = 0.7, norm = 13.0;
    const std::vector<double> norms = {norm * norm};
    float factor;
    clip_factors({.kind = Kind::momentum_correction, .clip_norm = float(c)}, plan_of(segments), norms, 1.0f, world, 30, &factor);
    const double paper = c / std::sqrt(world) / (norm / world);
    EXPECT_NEAR(factor, paper, 2e-7 * paper) << world;  // c and the factor are rounded to fp32: 2^-24 each, with room
  }
}

// ---- names

TEST(StateNames, AreThePublicOnes) {
  const auto names = [](std::span<const std::string_view> views) { return std::vector<std::string>(views.begin(), views.end()); };
  const Recursion none, ef{.kind = Kind::error_feedback}, dgc{.kind = Kind::momentum_correction};
  EXPECT_EQ(names(state_names(none)), std::vector<std::string>{});
  EXPECT_EQ(names(state_names(ef)), std::vector<std::string>{"residual"});
  EXPECT_EQ(names(state_names(dgc)), (std::vector<std::string>{"momentum", "accumulated"}));
  EXPECT_EQ(names(dense_state_names(none)), std::vector<std::string>{});
  EXPECT_EQ(names(dense_state_names(ef)), std::vector<std::string>{});
  EXPECT_EQ(names(dense_state_names(dgc)), std::vector<std::string>{"momentum"});
  float a, b;
  EXPECT_EQ(residual_of(none, {{&a, &b}}), nullptr);
  EXPECT_EQ(residual_of(ef, {{&a, nullptr}}), &a);
  EXPECT_EQ(residual_of(dgc, {{&a, &b}}), &b);
  EXPECT_EQ(residual_of(dgc, {{&a, nullptr}}), nullptr);
}

// ---- dense messages

struct DenseCase {
  Recursion recursion;
  bool residual;
};

class DenseMessage : public testing::TestWithParam<DType> {};

TEST_P(DenseMessage, IsTheRecursionInPlainLoops) {
  const DType dtype = GetParam();
  const DenseCase cases[] = {{{}, false},
                             {{.kind = Kind::error_feedback}, true},
                             {{.kind = Kind::error_feedback, .decay = 0.3f}, true},
                             {{.kind = Kind::error_feedback}, false},
                             {{.kind = Kind::momentum_correction, .momentum = 0.9f}, true},
                             {{.kind = Kind::momentum_correction, .momentum = 0.9f}, false},
                             {{.kind = Kind::momentum_correction, .momentum = 0.9f, .nesterov = true}, true},
                             {{.kind = Kind::momentum_correction, .momentum = 0.9f, .nesterov = true}, false}};
  for (const DenseCase& c : cases) {
    for (const std::size_t n : {0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1000}) {
      const float factor = 0.37f;
      GradBuffer grad(dtype, n + 3);
      Vec g(n), u(n), v(n), u_start(n), v_start(n);
      for (std::size_t i = 0; i < n; ++i) {
        g[i] = as_type(real_number(7, 1, 0, 0, i), dtype);
        u[i] = real_number(7, 2, 0, 0, i);
        v[i] = real_number(7, 3, 0, 0, i);
        if (i % 50 == 13) g[i] = i % 100 == 13 ? kNan : -kInf;
      }
      for (std::size_t i = 0; i < n; ++i) grad.set(3 + i, g[i]);
      u_start = u, v_start = v;
      const bool dgc = c.recursion.kind == Kind::momentum_correction;
      SegmentState arrays;
      if (dgc) arrays.array = {u.data(), c.residual ? v.data() : nullptr};
      if (c.recursion.kind == Kind::error_feedback) arrays.array = {c.residual ? v.data() : nullptr, nullptr};
      const std::vector<Segment> segments = {segment(0, 3, n)};
      Vec message(n + 1, 99.0f);
      std::uint32_t flags = 0;
      dense_message(c.recursion, plan_of(segments), grad.view(), {std::span(&arrays, 1), &factor}, host_bytes(message.data(), n), &flags,
                    Stream::host());
      EXPECT_EQ(flags, n > 13 ? std::uint32_t(kFlagNonfinite) : 0u);
      EXPECT_EQ(message[n], 99.0f);
      for (std::size_t i = 0; i < n; ++i) {
        const float scaled = g[i] * factor, news = std::isfinite(scaled) ? scaled : 0.0f;
        const float held = c.residual ? v_start[i] : 0.0f;
        float expected = news, momentum = u_start[i];
        if (c.recursion.kind == Kind::error_feedback && c.residual) {
          const float kept = c.recursion.decay * held;
          expected = kept + news;
        } else if (dgc && c.recursion.nesterov) {
          const float both = momentum + news;
          momentum = 0.9f * both;
          expected = held + (momentum + news);
        } else if (dgc) {
          const float kept = 0.9f * momentum;
          momentum = kept + news;
          expected = held + momentum;
        }
        ASSERT_EQ(message[i], expected) << i;
        ASSERT_EQ(u[i], dgc ? momentum : u_start[i]) << i;
        ASSERT_EQ(v[i], c.residual ? expected : v_start[i]) << i;  // the message waits here for the verdict
      }
      settle_dense(c.recursion, plan_of(segments), {std::span(&arrays, 1), nullptr}, Stream::host());
      if (c.residual) { EXPECT_EQ(v, Vec(n, 0.0f)); }
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Types, DenseMessage, testing::Values(DType::fp32, DType::bf16, DType::fp16),
                         [](const auto& test) { return to_string(test.param); });

// A finite gradient on top of a finite state may overflow: the element keeps both and the step is bad.
TEST(DenseMessageEdges, AnOverflowingMessageKeepsItsState) {
  for (const bool nesterov : {false, true}) {
    const Recursion dgc{.kind = Kind::momentum_correction, .momentum = 0.5f, .nesterov = nesterov};
    Vec u = {1.0f, 0.5f * kMax}, v = {kMax, 0.0f}, g = {kMax, 0.25f}, message(2);
    const SegmentState arrays{{u.data(), v.data()}};
    const std::vector<Segment> segments = {segment(0, 0, 2)};
    std::uint32_t flags = 0;
    dense_message(dgc, plan_of(segments), host_bytes(g.data(), 2), {std::span(&arrays, 1), nullptr}, host_bytes(message.data(), 2), &flags,
                  Stream::host());
    EXPECT_EQ(flags, std::uint32_t(kFlagNonfinite));
    EXPECT_EQ(u[0], 1.0f);
    EXPECT_EQ(v[0], kMax);
    EXPECT_EQ(message[0], kMax);
    EXPECT_NE(message[1], 0.0f);
    EXPECT_EQ(v[1], message[1]);
  }
}

TEST(DenseMessageEdges, WithoutStateTheGradientTravelsAsItIs) {
  for (const DType dtype : {DType::bf16, DType::fp16}) {
    GradBuffer grad(dtype, 6);
    const Vec x = {1.5f, -0.0f, 0.25f, -8.0f, 3.0f, 0.5f};
    for (std::size_t i = 0; i < 6; ++i) grad.set(i, x[i]);
    const std::vector<Segment> segments = {segment(0, 4, 2), segment(1, 0, 3)};
    GradBuffer message(dtype, 5);
    const SegmentState nothing[2];
    std::uint32_t flags = 0;
    dense_message({}, plan_of(segments), grad.view(), {nothing, nullptr}, message.view(), &flags, Stream::host());
    EXPECT_EQ(flags, 0u);
    const Vec expected = {3.0f, 0.5f, 1.5f, -0.0f, 0.25f};
    for (std::size_t i = 0; i < 5; ++i) EXPECT_EQ(float_bits(message.get(i)), float_bits(expected[i]));
    grad.set(2, kNan);
    dense_message({}, plan_of(segments), grad.view(), {nothing, nullptr}, message.view(), &flags, Stream::host());
    EXPECT_EQ(flags, std::uint32_t(kFlagNonfinite));
  }
}

}  // namespace
}  // namespace thinwire::test
