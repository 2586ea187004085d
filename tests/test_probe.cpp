// What a look at error feedback measures, against a step simulated in double from the recursions' definitions.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <ostream>
#include <vector>

#include "compressors/core/config.hpp"
#include "compressors/core/probe.hpp"
#include "compressors/core/registry.hpp"
#include "tests/reducer_oracle.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

constexpr double kEta = 0.25, kBeta = 0.75;

struct Method {
  const char* config;
  const char* recursion;   ///< what the oracle makes of it
  double coefficient = 1;  ///< rho or m
  double fresh = 1;
  bool narrow = false;  ///< what is stored is rounded, so x − sent cannot be told to fp32's accuracy
};

void PrintTo(const Method& method, std::ostream* out) { *out << method.config; }

const Method kMethods[] = {
    {"codec=topk:density=0.1 feedback=ef14", "ef14"},
    {"codec=topk:density=0.1 feedback=ef14:decay=0.5", "ef14", 0.5},
    {"codec=topk:density=0.1 feedback=ef14:residual=bf16", "ef14", 1, 1, true},
    {"onebit_adam", "averaged"},
    {"dgc:momentum=0.5", "dgc", 0.5},
    {"dgc:momentum=0.5,nesterov=1", "nesterov", 0.5},
    {"codec=topk:density=0.1 feedback=ef21", "ef21"},
    {"codec=topk:density=0.1 feedback=ef21:worker_ema=0.25", "ef21", 1, 0.25},
    {"econtrol", "econtrol"},
    {"econtrol:worker_ema=0.25", "econtrol", 1, 0.25},
    {"econtrol:worker_ema=0.25,residual=bf16,estimate=grid", "econtrol", 1, 0.25, true},
};

/// Elements of one segment: state before the step and after it, as they are stored, and what a probe is to find.
struct Step {
  Vec grad, momentum, residual, estimate, average;
  Vec residual_after, estimate_after, average_after;
  Probe sums;
};

/// An element that is sent arrives as half its message, others not at all.
Step simulate(const Method& method, DType dtype, float factor, std::size_t n, const std::vector<bool>& counts) {
  const auto number = [n](int what, std::size_t i) { return real_number(11, int(n % 1000), what, 0, i); };
  const auto stored = [&](double x) { return method.narrow ? as_type(float(x), DType::bf16) : float(x); };
  const std::string recursion = method.recursion;
  const bool estimates = recursion == "ef21" || recursion == "econtrol";
  Step out;
  for (std::size_t i = 0; i < n; ++i) {
    out.grad.push_back(as_type(number(0, i), dtype));
    const double g = double(factor) * double(out.grad[i]), u = number(1, i), e = stored(number(2, i)), h = stored(number(3, i)),
                 v = number(4, i);
    out.momentum.push_back(float(u)), out.residual.push_back(float(e)), out.estimate.push_back(float(h)), out.average.push_back(float(v));
    const double f = (1 - method.fresh) * v + method.fresh * g;  // what an estimate follows
    double x = 0;
    if (recursion == "ef14") x = g + method.coefficient * e;
    if (recursion == "averaged") x = kBeta * u + (1 - kBeta) * g + e;
    if (recursion == "dgc") x = e + method.coefficient * u + g;
    if (recursion == "nesterov") x = e + method.coefficient * (u + g) + g;
    if (recursion == "ef21") x = f - h;
    if (recursion == "econtrol") x = kEta * e + f - h;
    const double sent = i % 3 == 0 ? x / 2 : 0;
    const double after = recursion == "econtrol" ? e + f - h - sent : recursion == "ef21" ? 0 : x - sent;
    out.residual_after.push_back(stored(after)), out.estimate_after.push_back(stored(h + sent)), out.average_after.push_back(float(f));
    if (!counts[i]) continue;
    const auto square = [](double y) { return y * y; };
    out.sums.message += square(x);
    out.sums.left += square(x - sent);
    out.sums.residual += recursion == "ef21" ? 0 : square(double(out.residual_after[i]));
    if (estimates) {
      out.sums.stale += square(f - double(out.estimate_after[i]));
      out.sums.followed += square(f);
    }
  }
  return out;
}

/// State arrays as the recursion stores them.
struct Stored {
  std::vector<Vec> wide;
  std::vector<std::vector<std::uint16_t>> narrow;
  SegmentState state;

  Stored(const Recursion& recursion, const Vec& momentum, const Vec& residual, const Vec& estimate, const Vec& average) {
    const auto names = state_names(recursion);
    wide.resize(names.size()), narrow.resize(names.size());
    for (std::size_t a = 0; a < names.size(); ++a) {
      const Vec& values = names[a] == "momentum"   ? momentum
                          : names[a] == "estimate" ? estimate
                          : names[a] == "average"  ? average
                                                   : residual;
      wide[a] = names[a] == "mean_estimate" ? Vec(values.size(), 1e6f) : values;
      if (state_dtype(recursion, a) == DType::bf16) {
        for (const float x : wide[a]) narrow[a].push_back(float_to_bf16(x));
        state.array[a] = narrow[a].data();
      } else {
        state.array[a] = wide[a].data();
      }
    }
  }
};

class ProbeOf : public testing::TestWithParam<Method> {};

TEST_P(ProbeOf, MeasuresTheStep) {
  const Method& method = GetParam();
  const Recursion recursion = make_recursion(Config::parse(method.config));
  ASSERT_TRUE(can_probe(recursion));
  const float limit = float(kEta), beta = float(kBeta);
  for (const DType dtype : {DType::fp32, DType::bf16, DType::fp16})
    for (const bool masked : {false, true})
      for (const std::size_t n : {0, 1, 63, 64, 65, 1023, 1024, 1025, 4095, 4096, 4097, 64 * 4096 + 77}) {
        if (n > 5000 && (dtype != DType::fp32 || masked)) continue;
        constexpr std::size_t kFirst = 3;  // off a vector's boundary
        const float factor = 0.5f;
        std::vector<std::uint8_t> live((n + 7) / 8, 0);
        std::vector<bool> counts(n);
        for (std::size_t i = 0; i < n; ++i) {
          const bool alive = !masked || i % 5 != 2;
          live[i / 8] |= std::uint8_t(alive ? 1u << (i % 8) : 0u);
          counts[i] = alive && i % 97 != 50;  // these gradients are not finite
        }
        const Step step = simulate(method, dtype, factor, n, counts);
        GradBuffer grad(dtype, kFirst + n + 2);
        for (std::size_t i = 0; i < kFirst + n + 2; ++i) grad.set(i, 1e4f);  // neighbours that must not count
        for (std::size_t i = 0; i < n; ++i) grad.set(kFirst + i, i % 97 != 50 ? step.grad[i] : std::numeric_limits<float>::quiet_NaN());
        // eta is 1 in the settings, and a watchdog's limit is below it.
        const std::vector<Segment> segments = {{0, kFirst, n, 1, 1, {1, 1}, masked ? live.data() : nullptr}};
        const Plan plan{segments, {}, 0};
        const auto view = [&](Stored& stored) {
          stored.state.eta_limit = &limit;
          return StateView{{&stored.state, 1}, &factor, &beta};
        };
        Stored before(recursion, step.momentum, step.residual, step.estimate, step.average),
            after(recursion, Vec(n, 1e6f), step.residual_after, step.estimate_after, step.average_after);
        Probe found;
        probe_messages(recursion, plan, grad.view(), view(before), {&found, 1});
        probe_rest(recursion, plan, grad.view(), view(after), {&found, 1});
        // Terms are made of some fp32 operations each, 2^-24 of numbers like themselves; sums of squares lose nothing more.
        const std::string where =
            std::string(method.config) + " " + to_string(dtype) + " n=" + std::to_string(n) + (masked ? " masked" : "");
        const auto near = [&](const char* name, double is, double should) {
          EXPECT_NEAR(is, should, 4e-6 * should) << name << " of " << where;
        };
        near("message", found.message, step.sums.message);
        near("residual", found.residual, step.sums.residual);
        near("stale", found.stale, step.sums.stale);
        near("followed", found.followed, step.sums.followed);
        if (!method.narrow) near("left", found.left, step.sums.left);
        if (method.narrow && recursion.kind == Recursion::Kind::error_feedback) EXPECT_EQ(found.left, found.residual) << where;
      }
}

INSTANTIATE_TEST_SUITE_P(Methods, ProbeOf, testing::ValuesIn(kMethods),
                         [](const auto& each) { return "method" + std::to_string(each.index); });

TEST(Probe, SegmentsAreTheirOwnAndAddUp) {
  const Recursion recursion = make_recursion(Config::parse("codec=topk:density=0.1 feedback=ef14"));
  Vec residual(300, 1.0f);
  GradBuffer grad(DType::fp32, 300);
  for (std::size_t i = 0; i < 300; ++i) grad.set(i, i < 100 ? 1.0f : 3.0f);
  const std::vector<Segment> segments = {{0, 0, 100, 1, 1, {}, nullptr}, {1, 100, 200, 1, 1, {}, nullptr}};
  const SegmentState states[2] = {{{residual.data()}}, {{residual.data() + 100}}};
  Probe probes[2];
  probes[1].message = 7;  // of another part
  probe_messages(recursion, {segments, {}, 0}, grad.view(), {states, nullptr}, probes);
  probe_rest(recursion, {segments, {}, 0}, grad.view(), {states, nullptr}, probes);
  EXPECT_EQ(probes[0].message, 400);
  EXPECT_EQ(probes[1].message, 7 + 200 * 16);
  EXPECT_EQ(probes[0].left, 100);
  EXPECT_EQ(probes[1].residual, 200);
}

TEST(Probe, WhatHasNoResidualCannotBeMeasured) {
  EXPECT_FALSE(can_probe(make_recursion(Config::parse("codec=topk:density=0.1 feedback=none"))));
}

}  // namespace
}  // namespace thinwire::test
