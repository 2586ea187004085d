// What top-k selects: exactly the k largest against a sorted list, sampled thresholds within their bounds, and the corners of both.

#include <set>

#include "compressors/topk/selection.hpp"
#include "tests/topk_fixture.hpp"

namespace thinwire {
namespace {

template <class T>
class TopKSelection : public OnBackend<T> {};
TYPED_TEST_SUITE(TopKSelection, Backends, BackendName);

TopKOptions with(bool exact, DType wire = DType::fp32) {
  TopKOptions o;
  o.exact = exact;
  o.wire = wire;
  return o;
}

/// The k largest magnitudes that do not round to zero on the wire, ties to the lowest index, by sorting.
std::vector<std::size_t> largest(const std::vector<float>& x, std::size_t k, DType wire) {
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (std::isfinite(x[i]) && oracle::sent_value(x[i], wire) != 0) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return std::fabs(x[a]) > std::fabs(x[b]); });
  if (order.size() > k) order.resize(k);
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<std::size_t> indices(const std::vector<oracle::Entry>& entries) {
  std::vector<std::size_t> out;
  for (const auto& e : entries) out.push_back(e.index);
  return out;
}

std::vector<float> segment_of(const TopKRig& rig, const std::vector<float>& grad, std::size_t s) {
  const auto first = grad.begin() + std::ptrdiff_t(rig.segments[s].first);
  return {first, first + std::ptrdiff_t(rig.segments[s].count)};
}

TYPED_TEST(TopKSelection, ExactIsTheSortedReference) {
  const std::vector<std::size_t> counts = {1, 2, 15, 16, 17, 33, 1000, 4097, 65537, 200001};
  for (const DType wire : kWires) {
    for (const double density : {1e-6, 0.001, 0.03, 0.4, 1.0}) {
      TopKRig rig(TypeParam::kBackend, with(true, wire), no_feedback(), counts, density);
      const auto grad = gradients(rig.numel, 11, true);
      rig.stream(grad);
      const auto entries = rig.entries();
      for (std::size_t s = 0; s < counts.size(); ++s) {
        const std::size_t k = oracle::layout(counts[s], density, rig.options).k;
        ASSERT_EQ(indices(entries[s]), largest(segment_of(rig, grad, s), k, wire))
            << "n " << counts[s] << " density " << density << " wire " << to_string(wire);
      }
    }
  }
}

TYPED_TEST(TopKSelection, TiesGoToTheLowestIndex) {
  for (const auto& recursion : {no_feedback(), ef14(), dgc()}) {
    TopKRig rig(TypeParam::kBackend, with(true), recursion, {100000}, 0.01);
    std::vector<float> grad(rig.numel, -0.5f);
    rig.stream(grad);
    auto entries = rig.entries();
    ASSERT_EQ(entries[0].size(), 1000u);
    for (std::size_t i = 0; i < 1000; ++i) ASSERT_EQ(entries[0][i], (oracle::Entry{i, -0.5f}));
  }
}

TYPED_TEST(TopKSelection, AllZeroAllEqualOneHotDenormal) {
  for (const bool exact : {false, true}) {
    for (const DType wire : kWires) {
      for (const std::size_t n : {50u, 5000u, 100000u}) {
        const auto run = [&](const std::vector<float>& values) {
          TopKRig rig(TypeParam::kBackend, with(exact, wire), ef14(), {n}, 0.02);
          std::vector<float> grad(rig.numel, 0);
          std::copy(values.begin(), values.end(), grad.begin() + 1);
          rig.stream(grad);
          EXPECT_EQ(rig.flags, 0u);
          return std::pair(rig.entries()[0], rig.residual[0]);
        };
        const auto name = std::string(exact ? "exact " : "sampled ") + to_string(wire) + " n " + std::to_string(n);
        const auto layout = oracle::layout(n, 0.02, with(exact, wire));

        EXPECT_TRUE(run(std::vector<float>(n, 0.0f)).first.empty()) << name;
        EXPECT_TRUE(run(std::vector<float>(n, -0.0f)).first.empty()) << name;

        const auto equal = run(std::vector<float>(n, 0.25f));
        ASSERT_EQ(equal.first.size(), layout.capacity) << name;
        for (std::size_t i = 0; i < n; ++i) ASSERT_EQ(equal.second[i], i < layout.capacity ? 0.0f : 0.25f) << name << " element " << i;

        std::vector<float> hot(n, 0.0f);
        hot[n / 2] = -3;
        EXPECT_EQ(run(hot).first, (std::vector<oracle::Entry>{{n / 2, -3.0f}})) << name;

        const auto tiny = run(std::vector<float>(n, std::ldexp(1.0f, -149)));  // rounds to zero on the 16-bit wires: stays
        EXPECT_EQ(tiny.first.size(), wire == DType::fp32 ? layout.capacity : 0) << name;
        EXPECT_EQ(tiny.second[n - 1], std::ldexp(1.0f, -149)) << name;
      }
    }
  }
}

// The smallest magnitude that is sent and the largest that is not, at the wire's floor: half of the smallest value ties to zero, anything
// above does not.
TYPED_TEST(TopKSelection, NothingThatRoundsToZeroIsSent) {
  for (const bool exact : {false, true}) {
    for (const DType wire : {DType::bf16, DType::fp16}) {
      const auto half = float(oracle::half_table(wire).magnitudes[1] / 2);
      TopKRig rig(TypeParam::kBackend, with(exact, wire), ef14(), {64}, 1.0);
      std::vector<float> grad(rig.numel, 0);
      grad[5] = half;
      grad[40] = std::nextafter(half, 1.0f);
      rig.stream(grad);
      EXPECT_EQ(rig.entries()[0], (std::vector<oracle::Entry>{{39, 2 * half}}));
      EXPECT_EQ(rig.residual[0][4], half);
    }
  }
}

// Few large values that no sample of 1/32 is likely to meet, or many where it meets none: exact selection must not believe its sample.
TYPED_TEST(TopKSelection, ExactDoesNotDependOnItsSample) {
  const std::size_t n = 400000;
  for (const auto& recursion : {no_feedback(), ef14(), dgc(0.5f), dgc(0.5f, true), ef21(), econtrol(0.5f)}) {
    for (const DType wire : {DType::fp32, DType::bf16}) {
      for (const int shape : {0, 1, 2}) {
        TopKRig rig(TypeParam::kBackend, with(true, wire), recursion, {n}, 0.001);
        std::vector<float> grad(rig.numel, 0);
        std::mt19937 random(3);
        for (std::size_t i = 0; i < n; ++i) {
          const float noise = float(random() % 1000 + 1) / 1024;
          if (shape == 0) grad[1 + i] = i % 1000 == 17 ? 100 + noise : 0;  // as many as k, all else zero
          if (shape == 1)
            grad[1 + i] = i < 40000 ? noise : 1e-30f * noise;     // in one stretch: more above the sampled bound than candidates fit
          if (shape == 2) grad[1 + i] = float(random() % 3) - 1;  // ties everywhere
        }
        for (std::size_t i = 0; i < n && has_estimate(recursion); ++i)
          rig.residual[0][i] = 0.5f * grad[1 + i], rig.estimate[0][i] = 0.25f * grad[1 + i];
        std::vector<float> message(n);
        std::vector<oracle::Held> held(n);
        for (std::size_t i = 0; i < n; ++i) {
          const auto element = oracle::update(recursion, grad[1 + i], 1, rig.held(0, i), eta_at(0));
          message[i] = element.x, held[i] = element.held;
        }
        rig.stream(grad);
        const auto entries = rig.entries();
        ASSERT_EQ(indices(entries[0]), largest(message, 400, wire)) << describe(recursion) << " shape " << shape;
        for (const auto& e : entries[0]) {
          ASSERT_EQ(e.value, oracle::sent_value(message[e.index], wire));
          held[e.index] = oracle::after_sending(recursion, held[e.index], message[e.index], e.value);
        }
        const bool keeps = recursion.kind != Recursion::Kind::none && (!has_estimate(recursion) || recursion.control);
        for (std::size_t i = 0; i < n; ++i) {
          const auto where = [&] { return describe(recursion) + " shape " + std::to_string(shape) + " element " + std::to_string(i); };
          if (recursion.kind == Recursion::Kind::momentum_correction) ASSERT_EQ(rig.u[0][i], held[i].u) << where();
          if (keeps) ASSERT_EQ(rig.residual[0][i], held[i].residual) << where();
          if (has_estimate(recursion)) ASSERT_EQ(rig.estimate[0][i], held[i].estimate) << where();
        }
      }
    }
  }
}

/// Sampled selection is a threshold: everything sent is at or above it, everything that stayed before the payload was full is below.
void expect_threshold(const TopKRig& rig, const std::vector<float>& message, const std::vector<oracle::Entry>& entries,
                      const std::string& name) {
  const std::size_t capacity = oracle::layout(message.size(), rig.segments[0].setting.density, rig.options).capacity;
  ASSERT_LE(entries.size(), capacity) << name;
  float smallest = INFINITY, largest_left = 0;
  std::set<std::size_t> sent;
  for (const auto& e : entries) {
    smallest = std::min(smallest, std::fabs(message[e.index]));
    sent.insert(e.index);
  }
  const std::size_t reach = entries.size() == capacity ? entries.back().index : message.size();
  for (std::size_t i = 0; i < reach; ++i) {
    if (sent.count(i) == 0) largest_left = std::max(largest_left, std::fabs(message[i]));
  }
  ASSERT_LT(largest_left, smallest) << name;
}

// A sample of m elements has r = k·m/n above the threshold, give or take sqrt(r): the count is within 4 standard deviations of k. The
// steadied threshold stays within 2.
TYPED_TEST(TopKSelection, SampledCountsAreWithinTheirBounds) {
  const std::size_t n = 300000, m = n / 32 / 16 * 16;
  for (const double density : {0.005, 0.02, 0.1}) {
    for (const int law : {0, 1}) {
      TopKRig rig(TypeParam::kBackend, with(false), no_feedback(), {n}, density);
      std::mt19937 random(unsigned(7 + law));
      std::normal_distribution<float> normal;
      std::exponential_distribution<float> exponential;
      const double k = double(oracle::layout(n, density, rig.options).k), r = k * double(m) / double(n), deviation = 1 / std::sqrt(r);
      double mean = 0;
      for (rig.step = 0; rig.step < 12; ++rig.step) {
        std::vector<float> grad(rig.numel);
        for (auto& x : grad) x = law == 0 ? normal(random) : exponential(random) * (random() % 2 != 0 ? 1.0f : -1.0f);
        rig.stream(grad);
        const auto entries = rig.entries();
        const auto name = "density " + std::to_string(density) + " law " + std::to_string(law) + " step " + std::to_string(rig.step);
        expect_threshold(rig, segment_of(rig, grad, 0), entries[0], name);
        EXPECT_NEAR(double(entries[0].size()) / k, 1, std::min(4 * deviation + 0.02, 0.9)) << name;
        if (rig.step >= 4) mean += double(entries[0].size()) / k / 8;
        EXPECT_GT(rig.memory[0], 0) << name;
      }
      EXPECT_NEAR(mean, 1, 0.1);
    }
  }
}

// Under feedback all that is above the threshold has come there within a step, so that hits depend on it much more steeply than under any
// distribution of gradients. The threshold settles all the same: steps with too many hits and steps with hardly any do not take turns.
TYPED_TEST(TopKSelection, TheThresholdSettlesUnderFeedback) {
  const std::size_t n = 40000;
  const int steps = 160, last = 80;
  for (const auto& recursion : {ef14(), dgc(0.9f)}) {
    TopKRig rig(TypeParam::kBackend, with(false), recursion, {n}, 0.01);
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    std::vector<float> grad(rig.numel);
    std::vector<double> kept;
    for (rig.step = 0; rig.step < steps; ++rig.step) {
      for (auto& x : grad) x = normal(random);
      rig.stream(grad);
      if (rig.step >= steps - last) kept.push_back(double(rig.entries()[0].size()) / 400);
    }
    double mean = 0, square = 0, turns = 0;
    for (const double x : kept) mean += x / last;
    for (int i = 0; i < last; ++i) square += (kept[i] - mean) * (kept[i] - mean);
    for (int i = 1; i < last; ++i) turns += (kept[i] - mean) * (kept[i - 1] - mean);
    EXPECT_NEAR(mean, 1.05, 0.15);              // there is room for 1.25
    EXPECT_LT(std::sqrt(square / last), 0.12);  // a count of 400 scatters by .05 by itself
    EXPECT_GT(turns / square, -0.6);            // -1: every second step
  }
}

// After a single large gradient its residual drains through a threshold that has to fall at every step.
TYPED_TEST(TopKSelection, TheThresholdFollowsAfterASpike) {
  TopKRig rig(TypeParam::kBackend, with(false), ef14(), {40000}, 0.01);
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::vector<float> grad(rig.numel);
  double mean = 0;
  for (rig.step = 0; rig.step < 80; ++rig.step) {
    for (auto& x : grad) x = normal(random) * (rig.step == 10 ? 1000 : 1);
    rig.stream(grad);
    if (rig.step >= 20) mean += double(rig.entries()[0].size()) / 400 / 60;
  }
  EXPECT_GT(mean, 0.75);
  EXPECT_LT(mean, 1.25);
}

// Where hardly one of the wanted elements is in the sample, its largest one bounds nothing: the end of a layer is sent too.
TYPED_TEST(TopKSelection, WhatIsRareIsSentFromEverywhere) {
  const std::size_t n = 100000;
  TopKRig rig(TypeParam::kBackend, with(false), no_feedback(), {n}, 1e-4);
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> grad(rig.numel);
  std::size_t first = 0, last = 0;
  for (rig.step = 0; rig.step < 100; ++rig.step) {
    for (auto& x : grad) x = normal(random);
    rig.stream(grad);
    if (rig.step < 20) continue;
    const auto entries = rig.entries();
    for (const auto& e : entries[0]) first += e.index < n / 5, last += e.index >= n - n / 5;
  }
  EXPECT_GT(double(last), 0.3 * double(first));
}

TYPED_TEST(TopKSelection, SmallSegmentsAreTheirOwnSample) {
  for (const std::size_t n : {1u, 16u, 100u, 4096u}) {
    TopKRig rig(TypeParam::kBackend, with(false), no_feedback(), {n}, 0.05);
    rig.memory[0] = 1e9f;  // a threshold carried from elsewhere cannot mislead it
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    std::vector<float> grad(rig.numel);
    for (auto& x : grad) x = normal(random);
    rig.stream(grad);
    const auto entries = rig.entries();
    EXPECT_EQ(indices(entries[0]), largest(segment_of(rig, grad, 0), oracle::layout(n, 0.05, rig.options).k, DType::fp32));
  }
}

// Whatever was carried, or restored from a checkpoint, the sample bounds it.
TYPED_TEST(TopKSelection, ACarriedThresholdIsBoundedByTheSample) {
  const std::size_t n = 300000;
  for (const float carried : {NAN, -1.0f, 0.0f, 1e-30f, 1e30f, INFINITY}) {
    TopKRig rig(TypeParam::kBackend, with(false), no_feedback(), {n}, 0.02);
    rig.memory[0] = carried;
    rig.stream(gradients(rig.numel, 6, false));
    const double k = 6000, r = k / 32;  // within two deviations of the sample, and four of the sample's own
    EXPECT_NEAR(double(rig.entries()[0].size()) / k, 1, 6 / std::sqrt(r)) << "carried " << carried;
    EXPECT_TRUE(std::isfinite(rig.memory[0]) && rig.memory[0] > 0);
  }
}

TYPED_TEST(TopKSelection, WhatDoesNotFitStaysAndIsSentLater) {
  const std::size_t n = 100000;
  TopKRig rig(TypeParam::kBackend, with(false), ef14(), {n}, 0.01);
  std::vector<float> grad(rig.numel, 1.0f);
  std::set<std::size_t> seen;
  for (rig.step = 0; rig.step < 80; ++rig.step) {
    rig.stream(grad);
    std::fill(grad.begin(), grad.end(), 0.0f);
    const auto entries = rig.entries();
    ASSERT_EQ(entries[0].size(), 1250u);
    for (const auto& e : entries[0]) EXPECT_TRUE(seen.insert(e.index).second) << e.index << " was sent twice";
  }
  EXPECT_EQ(seen.size(), n);
  rig.stream(grad);
  EXPECT_TRUE(rig.entries()[0].empty());
}

// Liveness: gradients of constant, equal magnitude. Every coordinate is sent within ceil(n/k) + 1 steps.
TYPED_TEST(TopKSelection, EveryCoordinateIsSentInTime) {
  const std::size_t n = 5000, k = 150;
  for (const auto& recursion : {ef14(), dgc(0.5f)}) {
    TopKRig rig(TypeParam::kBackend, with(true), recursion, {n}, 0.03);
    std::vector<float> grad(rig.numel);
    for (std::size_t i = 0; i < grad.size(); ++i) grad[i] = i % 2 != 0 ? 1.0f : -1.0f;
    std::set<std::size_t> seen;
    for (rig.step = 0; rig.step < (n + k - 1) / k + 1; ++rig.step) {
      rig.stream(grad);
      for (const auto& part : rig.entries()) {
        for (const auto& e : part) seen.insert(e.index);
      }
    }
    EXPECT_EQ(seen.size(), n) << describe(recursion);
  }
}

TYPED_TEST(TopKSelection, DensityOneSendsEverything) {
  for (const bool exact : {false, true}) {
    TopKRig rig(TypeParam::kBackend, with(exact), dgc(0.5f), {300000}, 1.0);
    auto grad = gradients(rig.numel, 2, false);
    for (auto& x : grad) x = x == 0 ? 1 : x;
    rig.stream(grad);
    EXPECT_EQ(rig.kept[0], 300000u);
    for (const float v : rig.residual[0]) ASSERT_EQ(v, 0);
  }
}

TYPED_TEST(TopKSelection, KCountsAsWritten) {
  TopKRig rig(TypeParam::kBackend, with(true), ef14(), {1000}, 0.1);
  const std::pair<double, std::size_t> expected[] = {{0.1, 100}, {0.3, 300}, {0.0001, 1}, {0.001, 1}, {0.0011, 2}, {1.0, 1000}, {0.7, 700}};
  for (const auto& [density, k] : expected) {
    rig.segments[0].setting.density = density;
    EXPECT_EQ(rig.codec->target(rig.segments[0]), k) << density;
  }
}

TEST(OrderStatistics, AreThoseOfTheSortedList) {
  std::mt19937 random(5);
  for (const std::size_t n : {1, 2, 17, 255, 256, 257, 4096, 9000, 40000})
    for (const std::uint32_t distinct : {1u, 3u, 1000u, 0xffffffffu}) {
      std::vector<std::uint32_t> bits(n), scratch(n);
      // Magnitudes around 2^-6: many in few bins, as in a sample.
      for (auto& b : bits) b = 0x3c800000u + (random() % distinct) % 0x800000u;
      std::vector<std::uint32_t> sorted = bits;
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      for (const std::size_t middle : {std::size_t(1), n / 100 + 1, n / 2 + 1, n}) {
        const std::size_t ranks[] = {std::max<std::size_t>(1, middle / 2), middle, middle, std::min(n, 2 * middle)};
        for (const std::size_t rank : ranks)
          ASSERT_EQ(topk::order_statistic(bits.data(), n, rank, scratch.data()), sorted[rank - 1])
              << n << " " << distinct << " rank " << rank;

        const std::uint32_t floor = sorted[middle - 1];
        std::vector<std::uint32_t> expected;
        for (const auto b : bits)
          if (b >= floor) expected.push_back(b);
        const std::size_t kept = topk::keep_at_least(bits.data(), n, floor, scratch.data());
        ASSERT_EQ(std::vector(scratch.begin(), scratch.begin() + std::ptrdiff_t(kept)), expected) << n << " " << distinct;
      }
    }
}

// The carried threshold stays where the statistics of both ranks allow it, else it becomes one nearer to the middle; wherever the floor is
// that the sample was thinned by.
TEST(OrderStatistics, AThresholdIsCorrectedWhereTheyContradictIt) {
  std::mt19937 random(6);
  int below = 0, between = 0, above = 0;
  for (const std::size_t n : {2, 200, 300, 4096, 20000})
    for (const std::uint32_t distinct : {2u, 1000u, 0xffffffffu})
      for (const double octaves : {0.25, 1.0, 30.0}) {
        std::vector<std::uint32_t> bits(n), scratch(n);
        for (auto& b : bits) b = 0x3c800000u + std::uint32_t(double(random() % distinct) / double(distinct) * octaves * 0x800000);
        std::vector<std::uint32_t> sorted = bits;
        std::sort(sorted.begin(), sorted.end(), std::greater<>());
        topk::SampleRanks ranks(32 * n, n, std::max<std::size_t>(1, 32 * n / 5));
        ASSERT_LE(ranks.high, ranks.low);
        if (ranks.high == 0) {  // nothing is too high
          const float carried = bits_float(sorted.front() + 1000);
          ASSERT_EQ(topk::corrected(carried, bits.data(), n, 0, ranks, scratch.data()), carried);
          continue;
        }
        const std::uint32_t low = sorted[ranks.low - 1], high = sorted[ranks.high - 1];
        ASSERT_TRUE(ranks.high <= ranks.to_high && ranks.to_high <= ranks.middle && ranks.middle <= ranks.to_low &&
                    ranks.to_low <= ranks.low);
        for (const std::uint32_t carried :
             {low - 1000, low - 1, low, low + 1, low + (high - low) / 2, high - 1, high, high + 1, high + 1000})
          for (const std::uint32_t floor : {0u, sorted.back() - 5, sorted.back()}) {
            const std::uint32_t expected = carried < low ? sorted[ranks.to_low - 1] : carried > high ? sorted[ranks.to_high - 1] : carried;
            const float got = topk::corrected(bits_float(carried), bits.data(), n, floor, ranks, scratch.data());
            ASSERT_EQ(float_bits(got), expected) << n << " " << distinct << " " << octaves << " " << carried - low << " " << floor;
            (carried < low ? below : carried > high ? above : between) += 1;
          }
      }
  EXPECT_GT(std::min({below, between, above}), 100);
}

}  // namespace
}  // namespace thinwire
