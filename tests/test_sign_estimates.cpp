// EF21 and EControl with signs, beyond what the suite of all recursions says: what is conserved, what overflows, and the mean estimate H
// that all ranks keep, decoded from everyone's payload or from the parts of owners.

#include "tests/sign_fixture.hpp"

namespace thinwire {
namespace {

template <class T>
class SignEstimates : public OnBackend<T> {};
TYPED_TEST_SUITE(SignEstimates, Backends, BackendName);

constexpr float kLargest = std::numeric_limits<float>::max();

// I1: Σ g = e + Σ h, each h after its step, and h = Σ sent. Integers up to 3 in blocks of 2^k: eta and the average by 1/2 cost a bit each
// per step, a mean of magnitudes k. After t steps all is a multiple of 2^-(k+2)t below 2^5: 24 bits hold it as long as (k+2)t + 6 <= 24.
TYPED_TEST(SignEstimates, ConserveEveryCoordinateToTheBit) {
  for (const auto& recursion : {ef21(), ef21(0.5f), econtrol(), econtrol(0.5f)}) {
    for (const unsigned k : {3u, 4u, 5u, 6u, 7u}) {
      for (const DType dtype : kTypes) {
        const std::size_t block = std::size_t(1) << k;
        SignRig rig(TypeParam::kBackend, with(Scale::l1, block), recursion, {4 * block, 8192}, {1, 2});
        std::mt19937 random(k);
        std::vector<std::vector<double>> fed, sent, estimates, average;
        for (auto& segment : rig.segments) {
          segment.setting.eta = 0.5f;
          for (auto* sums : {&fed, &sent, &estimates, &average}) sums->emplace_back(segment.count, 0.0);
        }
        for (rig.step = 0; (k + 2) * (rig.step + 1) + 6 <= 24; ++rig.step) {
          std::vector<float> grad(rig.numel);
          for (float& x : grad) x = float(int(random() % 7) - 3);
          rig.stream(oracle::to_bytes(grad, dtype), dtype);
          const auto signs = rig.signs();
          for (std::size_t s = 0; s < 2; ++s) {
            for (std::size_t i = 0; i < fed[s].size(); ++i) {
              average[s][i] = (1.0 - recursion.fresh) * average[s][i] + recursion.fresh * grad[rig.segments[s].first + i];
              fed[s][i] += average[s][i];
              sent[s][i] += signs[s].value(i, block);
              estimates[s][i] += rig.estimate[s][i];
            }
          }
        }
        ASSERT_GE(rig.step, 2u);
        for (std::size_t s = 0; s < 2; ++s) {
          for (std::size_t i = 0; i < fed[s].size(); ++i) {
            ASSERT_EQ(rig.estimate[s][i], sent[s][i]) << describe(recursion) << " block " << block << " element " << i;
            if (recursion.control) {
              ASSERT_EQ(rig.residual[s][i] + estimates[s][i], fed[s][i]) << describe(recursion) << " block " << block << " element " << i;
            }
          }
        }
      }
    }
  }
}

// The element itself has no message; like a zero it takes part in its block with a plus.
TYPED_TEST(SignEstimates, AnElementThatOverflowsHasNoMessage) {
  struct Corner {
    float g, e, h, eta;
  };
  for (const auto& [g, e, h, eta] : {Corner{3e38f, 1, -3e38f, 0.5f}, {2e38f, 3e38f, 0, 0}, {1, 3e38f, 0, 2}}) {
    SignRig rig(TypeParam::kBackend, with(Scale::l1, 64), econtrol(), {128});
    rig.segments[0].setting.eta = eta;
    rig.residual[0][20] = e, rig.estimate[0][20] = h;
    std::vector<float> grad(rig.numel, -0.5f);
    grad[1 + 20] = g;
    rig.stream(grad);
    EXPECT_EQ(rig.flags, unsigned(kFlagNonfinite));
    const auto signs = rig.signs();
    EXPECT_TRUE(signs[0].bits[20]);
    EXPECT_EQ(signs[0].scales, (std::vector<float>{63 * 0.5f / 64, 0.5f}));
    const float scale = signs[0].scales[0];
    EXPECT_EQ(rig.residual[0][20], e - scale);
    EXPECT_EQ(rig.estimate[0][20], h + scale);
    EXPECT_EQ(rig.estimate[0][21], -scale);
    EXPECT_EQ(rig.residual[0][21], -0.5f + scale);
  }
}

// I10: with h held at 0 and eta = 1 EControl is EF14 (and EC-Ideal where h* is 0), to the bit.
TYPED_TEST(SignEstimates, WithoutEstimatesEControlIsErrorFeedback) {
  for (const Scale scale : kScales) {
    SignRig control(TypeParam::kBackend, with(scale, 512), econtrol(), {9001}),
        feedback(TypeParam::kBackend, with(scale, 512), ef14(), {9001});
    for (SignRig* rig : {&control, &feedback}) rig->segments[0].setting.eta = 1;
    for (unsigned step = 0; step < 4; ++step) {
      control.step = feedback.step = step;
      for (SignRig* rig : {&control, &feedback}) rig->stream(gradients(rig->numel, step, false));
      ASSERT_EQ(control.payload, feedback.payload);
      expect_same_bits(control.residual[0], feedback.residual[0], [&] { return describe(control.options); });
      std::fill(control.estimate[0].begin(), control.estimate[0].end(), 0.0f);
    }
  }
}

/// Magnitudes that divide a distribution into equal parts, with signs in turn.
std::vector<float> quantiles(double (*below)(double magnitude), std::size_t n) {
  std::vector<float> out(n);
  for (std::size_t i = 0; i < n; ++i) {
    double low = 0, high = 1e4;
    for (int turn = 0; turn < 60; ++turn) (below((low + high) / 2) < (double(i) + 0.5) / double(n) ? low : high) = (low + high) / 2;
    out[i] = float(i % 2 != 0 ? low : -low);
  }
  std::shuffle(out.begin(), out.end(), std::mt19937(1));
  return out;
}

// I6: one l1 scale leaves ‖x‖² − ‖x‖₁²/n; of l2 scales, 2·(1 − r) of ‖x‖² with r² = ‖x‖₁²/(n·‖x‖²), which may be more than all. 10^5
// quantiles lack of E x² at most what lies above the last, at which P(|x| > m) = 10^-5: 2e-4 of it (normal), 8e-4 (Laplace), 4e-2
// (Student's t of 3 degrees, whose density falls as 3.3/x⁴). A scale is a sum of fp32 partials of 64.
TYPED_TEST(SignEstimates, ContractionIsThatOfTheDistribution) {
  constexpr std::size_t n = 100000;
  static const struct {
    const char* name;
    std::vector<float> values;
    double l1, lack;
  } kinds[] = {{"normal", quantiles([](double m) { return std::erf(m / std::sqrt(2.0)); }, n), 2 / 3.14159265, 2e-4},
               {"Laplace", quantiles([](double m) { return -std::expm1(-m); }, n), 0.5, 8e-4},
               {"t of 3 degrees",
                quantiles(
                    [](double m) {
                      const double angle = std::atan(m / std::sqrt(3.0));
                      return 2 / 3.14159265 * (angle + std::sin(angle) * std::cos(angle));
                    },
                    n),
                4 / (3.14159265 * 3.14159265), 4e-2},
               {"one in a hundred a hundred times as large",
                [] {
                  std::vector<float> x(n, 1.0f);
                  for (std::size_t i = 0; i < n; i += 100) x[i] = -100;
                  return x;
                }(),
                1.99 * 1.99 / 100.99, 0},
               {"one of all",
                [] {
                  std::vector<float> x(n, 0.0f);
                  return x[7] = 3, x;
                }(),
                1.0 / n, 0}};
  for (const auto& [name, values, expected, lack] : kinds) {
    double sum = 0, all = 0;
    for (const float x : values) sum += std::fabs(double(x)), all += double(x) * x;
    const double l1 = sum * sum / (double(n) * all), l2 = 1 - 2 * (1 - std::sqrt(l1));
    double whole = 0;
    for (const auto& [scale, block] : {std::pair(Scale::l1, std::size_t(0)), {Scale::l1, 512}, {Scale::l2, 0}}) {
      SignRig rig(TypeParam::kBackend, with(scale, block), ef14(), {n});
      std::vector<float> grad(rig.numel, 0.0f);
      std::copy(values.begin(), values.end(), grad.begin() + 1);
      rig.stream(grad);
      double left = 0;
      for (const float e : rig.residual[0]) left += double(e) * e;
      const double delta = 1 - left / all;
      if (scale == Scale::l2) {
        EXPECT_NEAR(delta, l2, 64 * 0x1p-24) << name;
      } else if (block == 0) {
        whole = delta;
        EXPECT_NEAR(delta, l1, 64 * 0x1p-24) << name;
        EXPECT_NEAR(delta, expected, lack * expected + 64 * 0x1p-24) << name;
      } else {
        EXPECT_GE(delta, whole - 64 * 0x1p-24) << name << ": a scale per block only raises it";
      }
    }
  }
}

TYPED_TEST(SignEstimates, StatesAreCutAtTheLargestFloat) {
  for (const float sign : {1.0f, -1.0f}) {
    SignRig rig(TypeParam::kBackend, with(Scale::l1, 64), econtrol(), {192});
    rig.segments[0].setting.eta = 1;
    std::fill(rig.residual[0].begin(), rig.residual[0].end(), sign * 2.5e38f);
    std::fill(rig.estimate[0].begin(), rig.estimate[0].end(), sign * 2e38f);
    rig.stream(std::vector<float>(rig.numel, sign * 2e38f));
    EXPECT_EQ(rig.flags, 0u);
    EXPECT_EQ(rig.signs()[0].scales, std::vector<float>(3, 2.5e38f));
    EXPECT_EQ(rig.estimate[0], std::vector<float>(192, sign * kLargest));
    EXPECT_EQ(rig.residual[0], std::vector<float>(192, 0.0f));
    std::fill(rig.residual[0].begin(), rig.residual[0].end(), sign * 2e38f);
    rig.take_back();
    EXPECT_EQ(rig.residual[0], std::vector<float>(192, sign * kLargest));
  }
}

TYPED_TEST(SignEstimates, TakeBackIsForBadVerdictsAndResiduals) {
  for (const auto& recursion : {ef21(), ef21(0.25f), econtrol(), econtrol(0.1f)}) {
    SignRig rig(TypeParam::kBackend, with(Scale::l1, 1024), recursion, {33, 9001, 100}, {1, 3});
    rig.age(3);
    rig.stream(gradients(rig.numel, 1, false));
    auto residual = rig.residual;
    const auto estimate = rig.estimate, mean_estimate = rig.mean_estimate, average = rig.average;
    const std::uint32_t good = kFlagJoined, bad = kFlagNonfinite | kFlagJoined;
    rig.take_back(&good);
    EXPECT_EQ(rig.residual, residual);
    rig.take_back(&bad);
    for (std::size_t s = 0; s < 3; ++s)
      for (std::size_t i = 0; i < residual[s].size() && recursion.control; ++i) residual[s][i] += estimate[s][i];
    EXPECT_EQ(rig.residual, residual);
    EXPECT_EQ(rig.estimate, estimate);
    EXPECT_EQ(rig.mean_estimate, mean_estimate);
    EXPECT_EQ(rig.average, average);
  }
}

/// Decodes into mean estimates that lie one after the other in `means`, with the plan's gaps between them.
std::vector<std::byte> decode_means(SignRig& rig, std::vector<float>& means, float scale,
                                    const std::vector<std::vector<std::byte>>& payloads, float factor, DType dtype) {
  std::vector<float*> pointers;
  for (const auto& segment : rig.segments) pointers.push_back(means.data() + segment.first);
  Plan plan = rig.plan();
  plan.mean_estimates = pointers;
  plan.output = {dtype, scale};
  std::vector<ConstBytes> wires;
  for (const auto& p : payloads) wires.push_back(SignRig::bytes(p));
  const WireLayout layout = rig.codec->layout(plan);
  rig.workspace.assign(std::max(layout.workspace, layout.per_payload * wires.size()), std::byte{0xa5});
  auto out = oracle::to_bytes(std::vector<float>(rig.numel, kGap), dtype);
  rig.flags = 0;
  rig.codec->decode(plan, wires, factor, SignRig::bytes(rig.workspace), {out.data(), out.size(), dtype, Place::host, 0}, &rig.flags,
                    Stream::host());
  return out;
}

/// The sum of what the ranks sent of an element: neighbouring pairs first.
float sum_of(const std::vector<std::vector<oracle::Signs>>& signs, std::size_t s, std::size_t i, std::size_t block) {
  float sum = 0;
  for (std::size_t r = 0; r < signs.size(); r += 2) {
    const float first = signs[r][s].value(i, block), pair = r + 1 < signs.size() ? first + signs[r + 1][s].value(i, block) : first;
    sum = r == 0 ? pair : sum + pair;
  }
  return sum;
}

const std::vector<std::size_t> kCounts = {1, 64, 0, 9001, 260, 70001};

TYPED_TEST(SignEstimates, DecodingAddsTheMeanToH) {
  const float scales[] = {1.0f, 0.3f, 0.125f};
  std::size_t turn = 0;
  for (const std::size_t block : {std::size_t(8), std::size_t(1024), std::size_t(5000), std::size_t(0)}) {
    for (const std::size_t world : {1u, 2u, 3u, 7u}) {
      for (const bool masked : {false, true}) {
        const DType dtype = kTypes[++turn % 3];
        SignRig rig(TypeParam::kBackend, with(Scale::l1, block), no_feedback(), kCounts);
        if (masked) rig.mask(2);
        std::vector<std::vector<std::byte>> payloads;
        std::vector<std::vector<oracle::Signs>> signs;
        for (std::size_t r = 0; r < world; ++r) {
          rig.stream(gradients(rig.numel, unsigned(r), false));
          payloads.push_back(rig.payload);
          signs.push_back(rig.signs());
        }
        std::vector<float> means = held_values(rig.numel, 3, false), want = means, scaled(rig.numel, kGap);
        const float factor = 1.0f / float(world), scale = scales[turn % 4 % 3];
        for (std::size_t s = 0; s < kCounts.size(); ++s) {
          for (std::size_t i = 0; i < kCounts[s]; ++i) {
            const std::size_t at = rig.segments[s].first + i;
            if (!rig.alive(s, i)) means[at] = want[at] = 0;  // as they start
            const float mean = rig.alive(s, i) ? sum_of(signs, s, i, rig.block(s)) * factor : 0.0f;
            want[at] += mean;
            scaled[at] = want[at] * scale;
          }
        }
        const auto out = decode_means(rig, means, scale, payloads, factor, dtype);
        const auto where = [&] { return describe(rig.options) + " world " + std::to_string(world) + " out " + to_string(dtype); };
        expect_same_bits(means, want, where);
        ASSERT_EQ(out, oracle::to_bytes(scaled, dtype)) << where();
        ASSERT_EQ(rig.flags, 0u);
        if (this->HasFatalFailure()) return;
      }
    }
  }
}

// two_phase: part r comes from owner r's payload alone.
TYPED_TEST(SignEstimates, PartsAreAddedToHFromTheirOwnPayloads) {
  const std::vector<std::uint32_t> ends = {1, 1, 4, 6};
  for (const DType dtype : kTypes) {
    SignRig rig(TypeParam::kBackend, with(Scale::l1, 512), no_feedback(), kCounts, ends);
    rig.stream(gradients(rig.numel, 9, false));
    const auto signs = rig.signs();
    const std::size_t capacity = rig.payload.size() / ends.size();
    std::vector<std::vector<std::byte>> payloads;
    for (std::size_t r = 0; r < ends.size(); ++r) {
      const auto from = rig.payload.begin() + std::ptrdiff_t(r * capacity);
      payloads.emplace_back(from, from + std::ptrdiff_t(capacity));
    }
    std::vector<float> means = held_values(rig.numel, 3, false), want = means, scaled(rig.numel, kGap);
    for (std::size_t s = 0; s < kCounts.size(); ++s) {
      for (std::size_t i = 0; i < kCounts[s]; ++i) {
        const std::size_t at = rig.segments[s].first + i;
        want[at] += signs[s].value(i, 512);
        scaled[at] = want[at] * 0.25f;
      }
    }
    const auto out = decode_means(rig, means, 0.25f, payloads, 1, dtype);
    expect_same_bits(means, want, [&] { return std::string(to_string(dtype)); });
    EXPECT_EQ(out, oracle::to_bytes(scaled, dtype));
  }
}

TYPED_TEST(SignEstimates, TheMeanEstimateIsCutAndItsOutputIsNot) {
  SignRig rig(TypeParam::kBackend, with(Scale::l1, 64), no_feedback(), {200});
  rig.stream(std::vector<float>(rig.numel, -3e38f));
  const auto payload = rig.payload;
  for (const DType dtype : kTypes) {
    std::vector<float> means(rig.numel, -3e38f);
    means[1 + 5] = 3e38f;
    const auto out = decode_means(rig, means, 0.5f, {payload}, 1, dtype);
    EXPECT_EQ(means[1 + 5], 0.0f);
    EXPECT_EQ(means[1 + 6], -kLargest);
    EXPECT_EQ(means[200], -kLargest);
    EXPECT_EQ(means[0], -3e38f);
    EXPECT_EQ(rig.flags, dtype == DType::fp16 ? unsigned(kFlagNonfinite) : 0u);
    EXPECT_EQ(oracle::element(out, 1 + 5, dtype), 0.0f);
    EXPECT_EQ(oracle::element(out, 1 + 6, dtype), dtype == DType::fp32   ? -kLargest / 2
                                                  : dtype == DType::bf16 ? -0x1p127f
                                                                         : -std::numeric_limits<float>::infinity());
  }
}

}  // namespace
}  // namespace thinwire
