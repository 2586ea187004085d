// EF21 and EControl with top-k, beyond what the suites of all recursions say: what is conserved, what overflows, and the mean estimate H
// that all ranks keep.

#include "tests/topk_fixture.hpp"

namespace thinwire {
namespace {

template <class T>
class TopKEstimates : public OnBackend<T> {};
TYPED_TEST_SUITE(TopKEstimates, Backends, BackendName);

constexpr float kLargest = std::numeric_limits<float>::max();

TopKOptions with(bool exact, DType wire, TopKOptions::Index index = TopKOptions::Index::automatic) {
  TopKOptions o;
  o.exact = exact;
  o.wire = wire;
  o.index = index;
  return o;
}

// I1: Σ g = e + Σ h, each h after its step, and h = Σ sent. Gradients are multiples of 1/8 below 2^4 but for one beyond fp16's range; eta
// and the average by 1/4 cost two bits a step: after four everything is a multiple of 2^-11, the one below 2^17 of 2^-6 (its errors are
// multiples of 2^5 at first): 24 bits hold both.
TYPED_TEST(TopKEstimates, ConserveEveryCoordinateToTheBit) {
  const std::vector<std::size_t> counts = {1, 33, 5000};
  for (const auto& recursion : {ef21(), ef21(0.25f), econtrol(), econtrol(0.25f)}) {
    for (const bool exact : {false, true}) {
      for (const DType wire : kWires) {
        for (const DType dtype : kWires) {
          TopKRig rig(TypeParam::kBackend, with(exact, wire), recursion, counts, 0.05);
          const float etas[] = {0.25f, 1.0f, 0.25f};
          for (std::size_t s = 0; s < counts.size(); ++s) rig.segments[s].setting.eta = etas[s];
          std::mt19937 random(5);
          std::vector<std::vector<double>> fed, sent, estimates, average;
          for (auto* sums : {&fed, &sent, &estimates, &average})
            for (const auto n : counts) sums->emplace_back(n, 0.0);
          for (rig.step = 0; rig.step < 4; ++rig.step) {
            std::vector<float> grad(rig.numel);
            for (auto& x : grad) x = float(int(random() % 255) - 127) / 8;
            if (dtype == DType::fp32) grad[rig.segments[2].first + 7] = 70016;
            rig.stream(oracle::to_bytes(grad, dtype), dtype);
            const auto entries = rig.entries();
            for (std::size_t s = 0; s < counts.size(); ++s) {
              for (const auto& e : entries[s]) sent[s][e.index] += e.value;
              for (std::size_t i = 0; i < counts[s]; ++i) {
                average[s][i] = (1.0 - recursion.fresh) * average[s][i] + recursion.fresh * grad[rig.segments[s].first + i];
                fed[s][i] += average[s][i];
                estimates[s][i] += rig.estimate[s][i];
              }
            }
          }
          double total = 0;
          for (std::size_t s = 0; s < counts.size(); ++s) {
            for (std::size_t i = 0; i < counts[s]; ++i) {
              const auto where = [&] { return describe(recursion) + describe(rig.options) + " element " + std::to_string(i); };
              ASSERT_EQ(rig.estimate[s][i], sent[s][i]) << where();
              if (recursion.control) { ASSERT_EQ(rig.residual[s][i] + estimates[s][i], fed[s][i]) << where(); }
              total += std::fabs(sent[s][i]);
            }
          }
          ASSERT_GT(total, 1000) << "nothing was sent";
        }
      }
    }
  }
}

// Four ways past the largest float: t = g - h, e + t, eta·e + t, and a gradient that is infinite once it is scaled.
TYPED_TEST(TopKEstimates, AnElementThatOverflowsSitsTheStepOut) {
  struct Corner {
    float g, e, h, eta, factor;
  };
  for (const auto& [g, e, h, eta, factor] : {Corner{3e38f, 1, -3e38f, 0.5f, 1}, {2e38f, 3e38f, 0, 0, 1}, {1, 3e38f, 0, 2, 1}}) {
    for (const bool exact : {false, true}) {
      for (const auto& recursion : {econtrol(), econtrol(0.5f)}) {
        TopKRig rig(TypeParam::kBackend, with(exact, DType::fp32), recursion, {130}, 0.1);
        rig.segments[0].setting.eta = eta;
        rig.residual[0][20] = e, rig.estimate[0][20] = h, rig.average[0][20] = g;
        std::vector<float> grad(rig.numel, 0.5f);
        grad[1 + 20] = g;
        rig.stream(grad);
        EXPECT_EQ(rig.flags, unsigned(kFlagNonfinite));
        EXPECT_EQ(rig.residual[0][20], e) << "eta " << eta;
        EXPECT_EQ(rig.estimate[0][20], h);
        EXPECT_EQ(rig.average[0][20], g);
        const auto entries = rig.entries();
        EXPECT_EQ(entries[0].size(), exact ? 13u : 17u);
        for (const auto& entry : entries[0]) EXPECT_NE(entry.index, 20u);
      }
    }
  }
  TopKRig rig(TypeParam::kBackend, with(true, DType::fp32), econtrol(), {130}, 1);
  rig.factors[0] = 1e10f;
  rig.residual[0][20] = 3, rig.estimate[0][20] = 2;
  std::vector<float> grad(rig.numel, 0.5f);
  grad[1 + 20] = 1e30f;
  rig.stream(grad);
  EXPECT_EQ(rig.flags, unsigned(kFlagNonfinite));
  EXPECT_EQ(rig.estimate[0][20], 2 + 0.1f * 3) << "the estimate stands for it, and the residual goes on being fed back";
}

// eta = 0: e + t leaves fp32's range where the message t, far from being a hit, does not.
TYPED_TEST(TopKEstimates, AnOverflowThatIsNoHitSitsTheStepOutToo) {
  for (const double density : {0.001, 0.01, 0.1}) {
    for (const bool exact : {false, true}) {
      TopKRig rig(TypeParam::kBackend, with(exact, DType::fp32), econtrol(), {4096}, density);
      rig.segments[0].setting.eta = 0;
      std::vector<float> grad(rig.numel, 1.0f);
      std::fill_n(grad.begin() + 1, 600, 2e38f);
      grad[1 + 3000] = 1e38f;
      rig.residual[0][3000] = 3e38f;
      rig.stream(grad);
      EXPECT_EQ(rig.flags, unsigned(kFlagNonfinite));
      EXPECT_EQ(rig.residual[0][3000], 3e38f);
      EXPECT_EQ(rig.residual[0][3001], 1.0f);
      EXPECT_EQ(rig.estimate[0][3000], 0.0f);
    }
  }
}

// I10: with h held at 0 and eta = 1 EControl is EF14 (and EC-Ideal where h* is 0), to the bit.
TYPED_TEST(TopKEstimates, WithoutEstimatesEControlIsErrorFeedback) {
  for (const bool exact : {false, true}) {
    for (const DType wire : kWires) {
      TopKRig control(TypeParam::kBackend, with(exact, wire), econtrol(), {9001}, 0.03),
          feedback(TypeParam::kBackend, with(exact, wire), ef14(), {9001}, 0.03);
      for (TopKRig* rig : {&control, &feedback}) rig->segments[0].setting.eta = 1;
      for (unsigned step = 0; step < 4; ++step) {
        control.step = feedback.step = step;
        for (TopKRig* rig : {&control, &feedback}) rig->stream(gradients(rig->numel, step, false));
        ASSERT_EQ(control.payload, feedback.payload);
        expect_same_bits(control.residual[0], feedback.residual[0], [&] { return describe(control.options); });
        std::fill(control.estimate[0].begin(), control.estimate[0].end(), 0.0f);
      }
    }
  }
}

// I6: k entries of n leave at most 1 - k/n of the square; equal magnitudes leave exactly that, in integers.
TYPED_TEST(TopKEstimates, TheNominalContractionIsKeptAndReached) {
  for (const double density : {0.001, 0.1, 0.5, 1.0}) {
    TopKRig rig(TypeParam::kBackend, with(true, DType::fp32), ef14(), {1000, 1, 333}, density);
    for (const int shape : {0, 1, 2}) {
      for (auto& values : rig.residual) std::fill(values.begin(), values.end(), 0.0f);
      auto grad = gradients(rig.numel, 3, false);
      for (std::size_t i = 0; i < grad.size() && shape > 0; ++i)
        grad[i] = shape == 1 ? (i % 2 != 0 ? 1.0f : -1.0f) : i % 10 == 1 ? 7.0f : 0;
      rig.stream(grad);
      for (std::size_t s = 0; s < 3; ++s) {
        const std::size_t n = rig.segments[s].count, k = oracle::layout(n, density, rig.options).k;
        const double delta = rig.codec->nominal_delta(rig.segments[s]);
        EXPECT_EQ(delta, double(k) / double(n));
        double left = 0, all = 0;
        for (std::size_t i = 0; i < n; ++i) {
          left += double(rig.residual[s][i]) * rig.residual[s][i];
          all += double(grad[rig.segments[s].first + i]) * grad[rig.segments[s].first + i];
        }
        EXPECT_LE(left, (1 - delta) * all * (1 + 1e-12));
        if (shape == 1) { EXPECT_EQ(left, double(n - k)); }
      }
    }
  }
}

// I6 of a threshold: what was sent are the largest of the tensor, so many as came out. Where hardly one of k is in the sample and all are
// alike, the last step's threshold may be above all of them; the next step's is not.
TYPED_TEST(TopKEstimates, WhatASampleChoseContractsByWhatItKept) {
  const std::vector<std::size_t> counts = {1, 333, 9001, 70000};
  for (const double density : {0.001, 0.01, 0.1, 1.0}) {
    for (const int shape : {0, 1, 2, 3, 4, 5}) {
      TopKRig rig(TypeParam::kBackend, with(false, DType::fp32), ef14(), counts, density);
      std::mt19937 random(7);
      std::normal_distribution<double> normal;
      std::vector<float> grad(rig.numel);
      for (std::size_t i = 0; i < grad.size(); ++i) {
        const double z = normal(random);
        grad[i] = shape == 0   ? float(z)                                  // normal
                  : shape == 1 ? float(z * z * z)                          // a few large entries
                  : shape == 2 ? (i % 2 != 0 ? 1.0f : -1.0f)               // all alike
                  : shape == 3 ? (i % 3001 == 1 ? 7.0f : 0.0f)             // hardly any
                  : shape == 4 ? float(std::ldexp(double(i % 100), -149))  // denormal
                               : 0.0f;
      }
      std::vector<bool> sent(counts.size(), false);
      for (rig.step = 0; rig.step < 4; ++rig.step) {
        for (auto& values : rig.residual) std::fill(values.begin(), values.end(), 0.0f);
        rig.stream(grad);
        const auto entries = rig.entries();
        for (std::size_t s = 0; s < counts.size(); ++s) {
          double left = 0, all = 0;
          for (std::size_t i = 0; i < counts[s]; ++i) {
            left += double(rig.residual[s][i]) * rig.residual[s][i];
            all += double(grad[rig.segments[s].first + i]) * grad[rig.segments[s].first + i];
          }
          const double delta = double(entries[s].size()) / double(counts[s]);
          EXPECT_EQ(rig.kept[s], entries[s].size());
          EXPECT_LE(left, (1 - delta) * all * (1 + 1e-12))
              << "step " << rig.step << " shape " << shape << " density " << density << " of " << counts[s];
          EXPECT_TRUE(left < all || all == 0 || sent[s]) << "nothing for the second time: shape " << shape << " of " << counts[s];
          sent[s] = left < all;
        }
      }
    }
  }
}

// I5: where all is sent e only drains, e ← (1 − eta)·e. t = g − h, eta·e, x = eta·e + t, e + t and e + t − x round once each.
TYPED_TEST(TopKEstimates, WhereAllIsSentTheResidualDrains) {
  const std::vector<std::size_t> counts = {1, 33, 500, 9001, 64};  // at every eta_at
  for (const bool exact : {false, true}) {
    TopKRig rig(TypeParam::kBackend, with(exact, DType::fp32), econtrol(), counts, 1.0);
    rig.age(3, false);
    for (rig.step = 0; rig.step < 3; ++rig.step) {
      const auto residual = rig.residual, estimate = rig.estimate;
      const auto grad = gradients(rig.numel, unsigned(rig.step), false);
      rig.stream(grad);
      for (std::size_t s = 0; s < counts.size(); ++s) {
        for (std::size_t i = 0; i < counts[s]; ++i) {
          const double e = residual[s][i], t = double(grad[rig.segments[s].first + i]) - double(estimate[s][i]);
          const double bound = 5 * 0x1p-24 * (std::fabs(e) + 2 * std::fabs(t)) + 0x1p-148;
          ASSERT_NEAR(rig.residual[s][i], (1 - double(eta_at(s))) * e, bound) << "eta " << eta_at(s) << " element " << i;
        }
      }
    }
  }
}

TYPED_TEST(TopKEstimates, StatesAreCutAtTheLargestFloat) {
  for (const float sign : {1.0f, -1.0f}) {
    for (const bool exact : {false, true}) {
      for (const double density : {0.02, 1.0}) {
        TopKRig rig(TypeParam::kBackend, with(exact, DType::fp32), econtrol(), {130}, density);
        rig.segments[0].setting.eta = 1;
        rig.residual[0][20] = sign * 2.5e38f, rig.estimate[0][20] = sign * 2e38f;
        std::vector<float> grad(rig.numel, 0.0f);
        grad[1 + 20] = sign * 2e38f;
        rig.stream(grad);
        EXPECT_EQ(rig.flags, 0u);
        EXPECT_EQ(rig.estimate[0][20], sign * kLargest);
        EXPECT_EQ(rig.residual[0][20], 0.0f);
        rig.residual[0][20] = sign * 2e38f;
        rig.take_back();
        EXPECT_EQ(rig.residual[0][20], sign * kLargest);
      }
    }
  }
}

TYPED_TEST(TopKEstimates, TakeBackIsForBadVerdictsAndResiduals) {
  for (const auto& recursion : {ef21(), ef21(0.25f), econtrol(), econtrol(0.1f)}) {
    TopKRig rig(TypeParam::kBackend, with(false, DType::bf16), recursion, {33, 9001}, 0.03);
    rig.age(3, false);
    rig.stream(gradients(rig.numel, 1, false));
    const auto take_back = [&](const std::uint32_t* verdict) {
      rig.codec->take_back(rig.recursion, rig.plan(), rig.bytes(rig.payload), rig.state(), verdict, Stream::host());
    };
    auto residual = rig.residual;
    const auto estimate = rig.estimate, mean_estimate = rig.mean_estimate, average = rig.average;
    const std::uint32_t good = kFlagJoined, bad = kFlagNonfinite | kFlagJoined;
    take_back(&good);
    EXPECT_EQ(rig.residual, residual);
    take_back(&bad);
    for (std::size_t s = 0; s < 2; ++s)
      for (std::size_t i = 0; i < residual[s].size() && recursion.control; ++i) residual[s][i] += estimate[s][i];
    EXPECT_EQ(rig.residual, residual);
    EXPECT_EQ(rig.estimate, estimate);
    EXPECT_EQ(rig.mean_estimate, mean_estimate);
    EXPECT_EQ(rig.average, average);
  }
}

/// A rig's plan for decoding into mean estimates that lie one after the other in `flat`, with the plan's gaps between them.
Plan mean_plan(const TopKRig& rig, std::vector<float>& flat, std::vector<float*>& pointers, float factor) {
  pointers.clear();
  for (const auto& segment : rig.segments) pointers.push_back(flat.data() + segment.first);
  Plan plan = rig.plan();
  plan.mean_estimates = pointers;
  plan.output.factor = factor;
  return plan;
}

std::vector<std::byte> decode_means(TopKRig& rig, const Plan& plan, const std::vector<std::vector<std::byte>>& payloads, DType dtype) {
  std::vector<ConstBytes> wires;
  for (const auto& p : payloads) wires.push_back({p.data(), p.size(), DType::u8, Place::host, 0});
  auto out = oracle::to_bytes(std::vector<float>(rig.numel, kGap), dtype);
  rig.prepare();
  rig.flags = 0;
  rig.codec->decode(plan, wires, 1.0f / float(payloads.size()), rig.bytes(rig.workspace), {out.data(), out.size(), dtype, Place::host, 0},
                    &rig.flags, Stream::host());
  return out;
}

TYPED_TEST(TopKEstimates, DecodingAddsTheMeanToH) {
  const std::vector<std::size_t> counts = {1, 33, 9000, 70000, 0};
  const float scales[] = {1.0f, 0.3f, 0.125f};
  std::size_t turn = 0;
  for (const auto index : {TopKOptions::Index::u32, TopKOptions::Index::u16, TopKOptions::Index::bitmap}) {
    for (const DType wire : kWires) {
      for (const std::size_t world : {1u, 2u, 3u, 7u}) {
        const DType dtype = kWires[++turn % 3];
        TopKRig rig(TypeParam::kBackend, with(false, wire, index), no_feedback(), counts, 0.07);
        std::vector<std::vector<std::byte>> payloads;
        std::vector<float> want(rig.numel, 0.0f), means = held_values(rig.numel, 3, false);
        for (std::size_t r = 0; r < world; ++r) {
          rig.stream(gradients(rig.numel, unsigned(r), false));
          payloads.push_back(rig.payload);
          const auto entries = rig.entries();
          for (std::size_t s = 0; s < counts.size(); ++s)
            for (const auto& e : entries[s]) want[rig.segments[s].first + e.index] += e.value;
        }
        std::vector<bool> inside(rig.numel);
        for (const auto& segment : rig.segments) std::fill_n(inside.begin() + std::ptrdiff_t(segment.first), segment.count, true);
        const float factor = 1.0f / float(world), scale = scales[turn % 4 % 3];
        std::vector<float> scaled(rig.numel, kGap);
        for (std::size_t i = 0; i < rig.numel; ++i) {
          const float mean = want[i] * factor;
          want[i] = means[i] + (inside[i] ? mean : 0.0f);
          if (inside[i]) scaled[i] = want[i] * scale;
        }
        std::vector<float*> pointers;
        const auto out = decode_means(rig, mean_plan(rig, means, pointers, scale), payloads, dtype);
        const auto where = [&] { return describe(rig.options) + " world " + std::to_string(world) + " out " + to_string(dtype); };
        expect_same_bits(means, want, where);
        ASSERT_EQ(out, oracle::to_bytes(scaled, dtype)) << where();
        ASSERT_EQ(rig.flags, 0u);
        if (this->HasFatalFailure()) return;
      }
    }
  }
}

TYPED_TEST(TopKEstimates, TheMeanEstimateIsCutAndItsOutputIsNot) {
  TopKRig rig(TypeParam::kBackend, with(true, DType::fp32), no_feedback(), {100}, 1);
  std::vector<float> grad(rig.numel, 1.0f);
  grad[1 + 5] = 3e38f, grad[1 + 70] = -3e38f;
  rig.stream(grad);
  for (const DType dtype : kWires) {
    std::vector<float> means(rig.numel, 0.0f);
    means[1 + 5] = 3e38f, means[1 + 70] = -3e38f;
    std::vector<float*> pointers;
    const auto payload = rig.payload;
    const auto out = decode_means(rig, mean_plan(rig, means, pointers, 0.5f), {payload}, dtype);
    rig.payload = payload;
    EXPECT_EQ(means[1 + 5], kLargest);
    EXPECT_EQ(means[1 + 70], -kLargest);
    EXPECT_EQ(means[1 + 71], 1.0f);
    EXPECT_EQ(rig.flags, dtype == DType::fp16 ? unsigned(kFlagNonfinite) : 0u);
    EXPECT_EQ(oracle::element(out, 1 + 71, dtype), 0.5f);
    EXPECT_EQ(oracle::element(out, 1 + 5, dtype), dtype == DType::fp32   ? kLargest / 2
                                                  : dtype == DType::bf16 ? 0x1p127f
                                                                         : std::numeric_limits<float>::infinity());
  }
}

// I12: what the wire cuts off stays in e and out of h, so that H remains the mean of all h. Every entry of a rank costs roundings of
// n·2^-24 of the element's largest magnitude in its sum with the others', and 2^-24 of it each in h, in the mean and in H. Estimates that
// take the unrounded messages leave that bound: a bf16 entry is off by up to 2^-9 of itself.
TYPED_TEST(TopKEstimates, HIsTheMeanOfEstimatesOnANarrowWire) {
  constexpr std::size_t n = 2000, world = 3;
  for (const DType wire : {DType::bf16, DType::fp16}) {
    for (const auto& recursion : {ef21(), econtrol()}) {
      std::vector<TopKRig> ranks;
      for (std::size_t r = 0; r < world; ++r) ranks.emplace_back(TypeParam::kBackend, with(true, wire), recursion, std::vector{n}, 0.1);
      std::vector<float> means(ranks[0].numel, 0.0f);
      std::vector<double> unrounded(n, 0.0), touched(n, 0.0), largest(n, 0.0);
      for (std::uint64_t step = 0; step < 80; ++step) {
        std::vector<std::vector<std::byte>> payloads;
        for (std::size_t r = 0; r < world; ++r) {
          TopKRig& rig = ranks[r];
          rig.step = step;
          const auto grad = gradients(rig.numel, unsigned(step * world + r), false);
          std::vector<float> message(n);
          for (std::size_t i = 0; i < n; ++i) {
            message[i] = oracle::update(recursion, grad[1 + i], 1, rig.held(0, i), eta_at(0)).x;
            largest[i] = std::fmax(largest[i], std::fabs(message[i]) + std::fabs(rig.estimate[0][i]));
          }
          rig.stream(grad);
          const auto entries = rig.entries();
          for (const auto& e : entries[0]) unrounded[e.index] += double(message[e.index]) / world, touched[e.index] += 1;
          payloads.push_back(rig.payload);
        }
        std::vector<float*> pointers;
        decode_means(ranks[0], mean_plan(ranks[0], means, pointers, 1), payloads, DType::fp32);
      }
      std::size_t outside = 0;
      for (std::size_t i = 0; i < n; ++i) {
        double mean = 0;
        for (const TopKRig& rig : ranks) mean += double(rig.estimate[0][i]) / world;
        const double bound = touched[i] * (world + 3) * 0x1p-24 * largest[i];
        ASSERT_NEAR(means[1 + i], mean, bound) << describe(recursion) << " " << to_string(wire) << " element " << i;
        outside += std::fabs(unrounded[i] - double(means[1 + i])) > bound;
      }
      EXPECT_GT(outside, n / 2) << describe(recursion) << ": unrounded estimates pass for the right ones";
    }
  }
}

}  // namespace
}  // namespace thinwire
