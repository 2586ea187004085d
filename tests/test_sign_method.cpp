// What the method promises of signs with error feedback: its published vectors, its invariants, and how much it holds back.

#include "tests/sign_fixture.hpp"

namespace thinwire {
namespace {

template <class T>
class SignMethod : public OnBackend<T> {};
TYPED_TEST_SUITE(SignMethod, Backends, BackendName);

// Invariant 20. A magnitude of few bits: no sum, mean or root rounds.
TYPED_TEST(SignMethod, AConstantMagnitudeIsSentExactly) {
  for (const Scale scale : kScales) {
    for (const std::size_t block : kBlocks) {
      for (const float a : {0.0f, 0.375f, 3.0f, 1024.0f}) {
        SignRig rig(TypeParam::kBackend, with(scale, block), ef14(), {1, 100, 9001});
        std::vector<float> grad(rig.numel);
        for (std::size_t i = 0; i < grad.size(); ++i) grad[i] = i % 3 == 0 ? -a : a;
        rig.stream(grad);
        const auto signs = rig.signs();
        for (std::size_t s = 0; s < 3; ++s) {
          for (const float sent : signs[s].scales) ASSERT_EQ(sent, a);
          for (const float e : rig.residual[s]) ASSERT_EQ(float_bits(e) & 0x7fffffffu, 0u) << a;
        }
      }
    }
  }
}

// One element of a block: l1 sends its n-th part everywhere, l2 its part by the root of n; n = 256 is exact in both.
TYPED_TEST(SignMethod, OneHot) {
  for (const Scale scale : kScales) {
    SignRig rig(TypeParam::kBackend, with(scale, 256), ef14(), {1024});
    std::vector<float> grad(rig.numel);
    grad[1 + 300] = -8.0f;
    rig.stream(grad);
    const float sent = scale == Scale::l1 ? 8.0f / 256 : 8.0f / 16;
    EXPECT_EQ(rig.signs()[0].scales, (std::vector<float>{0, sent, 0, 0}));
    for (std::size_t i = 0; i < 1024; ++i) {
      const float expected = i / 256 != 1 ? 0.0f : i == 300 ? -8.0f + sent : -sent;
      ASSERT_EQ(rig.residual[0][i], expected) << i;
      ASSERT_EQ(rig.signs()[0].bits[i], i != 300);
    }
  }
}

// Invariant 21. In exact numbers ‖x − s·sgn x‖² = ‖x‖² − 2s‖x‖₁ + n·s² for any s. With l1's mean off by a factor 1 + d that is ‖x‖² −
// ‖x‖₁²/n·(1 − d²); with l2's root, 2‖x‖²(1 − ‖x‖₁/(√n‖x‖))(1 + d) up to d²‖x‖². A block of 1024 goes through at most 16 + 6 additions,
// each off by 2^-24 at most, and one rounding more: |d| < 24·2^-24. Each residual is rounded once: 2·2^-24 of its square.
TYPED_TEST(SignMethod, ErrorsAreThoseOfTheDefinitions) {
  for (const Scale scale : kScales) {
    SignRig rig(TypeParam::kBackend, with(scale, 1024), ef14(), {8 * 1024});
    const auto grad = gradients(rig.numel, 3, false);
    rig.stream(grad);
    for (std::size_t b = 0; b < 8; ++b) {
      double one = 0, two = 0, error = 0;
      for (std::size_t i = 1024 * b; i < 1024 * (b + 1); ++i) {
        const double x = grad[1 + i], e = rig.residual[0][i];
        one += std::fabs(x);
        two += x * x;
        error += e * e;
      }
      const double want = scale == Scale::l1 ? two - one * one / 1024 : 2 * two * (1 - one / (32 * std::sqrt(two)));
      const double d = 24 * 0x1p-24;
      EXPECT_NEAR(error, want, 0x1p-22 * want + (scale == Scale::l1 ? d * d * two : d * want + d * d * two));
      EXPECT_TRUE(scale == Scale::l2 || error < two) << "l1 contracts";
    }
  }
}

// l1 over blocks of 2^k elements, integers up to 3: after t steps everything is a multiple of 2^-kt below 2^5, a block's sum below 2^(5+k)
// in steps of 2^-k(t-1). 24 bits hold both as long as kt + 5 <= 24; an average by 1/2 of integers takes one bit more.
TYPED_TEST(SignMethod, ConservesEveryCoordinateToTheBit) {
  for (const auto& recursion : {ef14(), averaged(ef14())}) {
    for (const unsigned k : {3u, 4u, 5u, 6u, 9u, 10u, 12u}) {
      for (const DType dtype : kTypes) {
        const std::size_t block = std::size_t(1) << k;
        SignRig rig(TypeParam::kBackend, with(Scale::l1, block), recursion, {4 * block, 8192}, {1, 2});
        std::mt19937 random(k);
        std::vector<std::vector<double>> fed, sent;
        for (std::size_t s = 0; s < 2; ++s) {
          fed.emplace_back(rig.segments[s].count, 0.0), sent.emplace_back(rig.segments[s].count, 0.0);
          rig.beta1[s] = 0.5f;
          for (float& m : rig.momentum[s]) m = float(int(random() % 7) - 3);
        }
        for (rig.step = 0; k * (rig.step + 1) + 6 <= 24; ++rig.step) {
          std::vector<float> grad(rig.numel);
          for (float& x : grad) x = float(int(random() % 7) - 3);
          rig.stream(oracle::to_bytes(grad, dtype), dtype);
          const auto signs = rig.signs();
          for (std::size_t s = 0; s < 2; ++s) {
            for (std::size_t i = 0; i < fed[s].size(); ++i) {
              const double g = grad[rig.segments[s].first + i];
              fed[s][i] += recursion.averaged ? 0.5 * rig.momentum[s][i] + 0.5 * g : g;
              sent[s][i] += signs[s].value(i, block);
            }
          }
        }
        ASSERT_GE(rig.step, 1u);
        for (std::size_t s = 0; s < 2; ++s) {
          for (std::size_t i = 0; i < fed[s].size(); ++i)
            ASSERT_EQ(sent[s][i] + rig.residual[s][i], fed[s][i]) << describe(recursion) << " block " << block << " element " << i;
        }
      }
    }
  }
}

// Invariant 19, the codec's part: coordinates whose frozen variance is 0 are dead; 1000 steps of 1-bit Adam leave them where they were.
TYPED_TEST(SignMethod, DeadCoordinatesNeverMove) {
  const std::size_t n = 200;
  SignRig rig(TypeParam::kBackend, with(Scale::l1, 0), averaged(ef14()), {n});
  std::vector<std::uint8_t> live(n / 8 + 1, 0xff);
  for (std::size_t i = 0; i < n; i += 8) live[i / 8] = std::uint8_t(i % 16 == 0 ? 0x7e : 0xff);
  rig.segments[0].live = live.data();
  std::vector<double> w(n, 0.0);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (rig.step = 0; rig.step < 1000; ++rig.step) {
    std::vector<float> grad(rig.numel);
    for (std::size_t i = 0; i < n; ++i) grad[1 + i] = rig.alive(0, i) ? float(w[i]) - 1.0f + normal(random) : 0.0f;
    rig.stream(grad);
    const auto out = rig.decode({rig.payload});
    for (std::size_t i = 0; i < n; ++i) {
      rig.momentum[0][i] = out[1 + i];
      w[i] -= 0.01 * double(out[1 + i]);
      if (!rig.alive(0, i)) { ASSERT_EQ(float_bits(out[1 + i]) | float_bits(rig.residual[0][i]), 0u); }
    }
  }
  double mean = 0;
  for (std::size_t i = 0; i < n; ++i) {
    if (!rig.alive(0, i)) {
      EXPECT_EQ(w[i], 0.0);
    } else {
      EXPECT_LT(std::fabs(w[i] - 1), 1.0);  // the minimum is at 1
      mean += w[i] - 1;
    }
  }
  EXPECT_LT(std::fabs(mean) / double(n), 0.1);
}

// The vectors of 1-bit Adam: two ranks, one scale each over all 16 elements, owners of 8; every number of l1 is exact.
TYPED_TEST(SignMethod, PublishedVectors) {
  const std::vector<std::vector<float>> x = {{1, -1, 2, -2, 0, -0.0f, 3, -3, .5f, .5f, -.5f, -.5f, 4, -4, 1, 1},
                                             {-1, 1, 2, 2, 1, -1, -3, 3, .25f, -.25f, .75f, -.75f, -2, 2, 0, -5}};
  struct Step {
    float scale[2], owner[2];
    std::uint8_t bits[2][2];
  };
  const Step l1[2] = {{{1.5f, 1.5625f}, {.40625f, .59375f}, {{0x75, 0xd3}, {0x9e, 0x65}}},
                      {{2.125f, 2.0390625f}, {1.0107421875f, .765625f}, {{0x45, 0xdc}, {0x9e, 0x2a}}}};
  const char* const signs[2][2] = {{"-++++--+", "+-+--++-"}, {"+-+-+-+-", "-+-++-++"}};
  const float l2[2][4] = {{1.98431349f, 2.00390244f, .997090042f, 1.22116125f}, {2.78955531f, 2.74840593f, 2.48806572f, 1.41363847f}};
  const char* const l2_signs[2][2] = {{"-++++--+", "+-+--++-"}, {"+-+--++-", "-+-++-++"}};
  for (const Scale scale : kScales) {
    std::vector<std::unique_ptr<SignRig>> worker, owner;
    for (int r = 0; r < 2; ++r) {
      worker.push_back(std::make_unique<SignRig>(TypeParam::kBackend, with(scale, 0), ef14(), std::vector<std::size_t>{16}));
      owner.push_back(std::make_unique<SignRig>(TypeParam::kBackend, with(scale, 0), ef14(), std::vector<std::size_t>{8}));
    }
    for (std::size_t t = 0; t < 2; ++t) {
      for (std::size_t r = 0; r < 2; ++r) {
        std::vector<float> grad(18, 0.0f);
        std::copy(x[r].begin(), x[r].end(), grad.begin() + 1);
        worker[r]->step = t;
        worker[r]->stream(grad);
        const float sent = worker[r]->signs()[0].scales[0];
        if (scale == Scale::l1) {
          EXPECT_EQ(sent, l1[t].scale[r]);
          for (std::size_t j = 0; j < 2; ++j) EXPECT_EQ(worker[r]->payload[68 + j], std::byte(l1[t].bits[r][j]));
        } else {
          EXPECT_NEAR(sent, l2[t][r], 1e-6 * l2[t][r]);  // given with nine digits; residuals of earlier scales round by 2^-24 each
        }
      }
      const auto mean = worker[0]->decode({worker[0]->payload, worker[1]->payload}, 0.5f);
      for (std::size_t r = 0; r < 2; ++r) {
        std::vector<float> part(10, 0.0f);
        std::copy_n(mean.begin() + 1 + 8 * std::ptrdiff_t(r), 8, part.begin() + 1);
        owner[r]->step = t;
        owner[r]->stream(part);
        const auto got = owner[r]->signs()[0];
        const char* const want = scale == Scale::l1 ? signs[t][r] : l2_signs[t][r];
        for (std::size_t i = 0; i < 8; ++i) EXPECT_EQ(got.bits[i], want[i] == '+') << "step " << t << " owner " << r << " element " << i;
        if (scale == Scale::l1) {
          EXPECT_EQ(got.scales[0], l1[t].owner[r]);
        } else {
          EXPECT_NEAR(got.scales[0], l2[t][2 + r], 1e-6 * l2[t][2 + r]);
        }
      }
      if (scale == Scale::l1 && t == 0) {
        EXPECT_EQ(worker[0]->residual[0],
                  (std::vector<float>{-.5f, .5f, .5f, -.5f, -1.5f, -1.5f, 1.5f, -1.5f, -1, -1, 1, 1, 2.5f, -2.5f, -.5f, -.5f}));
        EXPECT_EQ(owner[0]->residual[0], (std::vector<float>{.375f, -.375f, 1.125f, -.375f, 1.125f, .375f, .375f, -.375f}));
        EXPECT_EQ(owner[1]->residual[0], (std::vector<float>{.9375f, .5625f, -.5625f, -.9375f, .5625f, -.5625f, .9375f, .5625f}));
      }
    }
  }
}

// How much error feedback holds back, ‖e‖ over ‖g‖, against the reference of the method's specification: fresh gradients each step, one
// scale for all of them. (Its case of log-normal scales hangs on the largest of them: one draw says nothing.)
enum class Input { normal, laplace, fixed, random };  // the last two: 1 % of the elements, always the same ones or not

struct HeldBack {
  double first = 0, steady = 0;  ///< after the first step, and over the last hundred of 400
};

template <class T>
HeldBack held_back(Scale scale, Input input) {
  const std::size_t n = 65536;
  SignRig rig(T::kBackend, with(scale, 0), ef14(), {n});
  std::mt19937_64 random(7);
  // A pool of values; each step reads it from another place, so that no coordinate sees a period.
  std::vector<float> pool(8 * n + 11), active(rig.numel, 1.0f);
  std::normal_distribution<float> normal;
  std::exponential_distribution<float> exponential;
  for (float& x : pool) x = input == Input::laplace ? exponential(random) * (random() % 2 != 0 ? 1.0f : -1.0f) : normal(random);
  for (float& x : active) x = input != Input::fixed || random() % 100 == 0 ? 1.0f : 0.0f;
  HeldBack out;
  std::vector<float> grad(rig.numel);
  for (int t = 0; t < 400; ++t) {
    const std::size_t from = random() % (7 * n);
    for (std::size_t i = 0; i < rig.numel; ++i) grad[i] = pool[from + i] * active[i];
    if (input == Input::random) {
      for (float& x : grad) x = random() % 100 == 0 ? x : 0.0f;
    }
    rig.prepare();
    rig.codec->stream(rig.recursion, rig.plan(), host_bytes(std::as_const(grad).data(), grad.size()), rig.state(),
                      SignRig::bytes(rig.workspace), SignRig::bytes(rig.payload), nullptr, {}, Stream::host());
    if (t % 10 != 0) continue;
    double e = 0, g = 0;
    for (std::size_t i = 0; i < n; ++i) e += double(rig.residual[0][i]) * rig.residual[0][i], g += double(grad[1 + i]) * grad[1 + i];
    if (t == 0) out.first = std::sqrt(e / g);
    if (t >= 300) out.steady += std::sqrt(e / g) / 10;
  }
  return out;
}

TYPED_TEST(SignMethod, ErrorFeedbackHoldsBackWhatTheReferenceDoes) {
  const struct {
    Input input;
    double l2, l1;
  } references[] = {{Input::normal, .81, .77}, {Input::laplace, .91, .88}, {Input::fixed, 2.7, 7.2}, {Input::random, 1.9, 2.3}};
  for (const auto& reference : references) {
    if (TypeParam::kBackend.cuda && reference.input != Input::normal) continue;  // the same kernels, only slower
    const HeldBack l2 = held_back<TypeParam>(Scale::l2, reference.input), l1 = held_back<TypeParam>(Scale::l1, reference.input);
    EXPECT_NEAR(l2.steady, reference.l2, .05 * reference.l2);
    EXPECT_NEAR(l1.steady, reference.l1, .05 * reference.l1);
    if (reference.input != Input::normal) continue;
    // What l2 and l1 leave of a normal message: 2(1 − m) and 1 − m² with its mean magnitude m = sqrt(2/pi).
    const double m = std::sqrt(2 / 3.14159265358979), few = 4 / std::sqrt(65536.0);  // four standard errors of the mean square
    EXPECT_NEAR(l2.first, std::sqrt(2 * (1 - m)), few);
    EXPECT_NEAR(l1.first, std::sqrt(1 - m * m), few);
  }
}

}  // namespace
}  // namespace thinwire
