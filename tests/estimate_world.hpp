#pragma once
// Runs of EF21 and EControl on loopback ranks, followed by their oracle step by step.

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/estimate_oracle.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {

/// Two tensors that are compressed, of sizes that no part or block divides, between two that never are.
inline const std::vector<Parameter> kModel = {{"w", {25, 21}}, {"bias", {7}}, {"m", {9, 31}}, {"tail", {5}}};
inline const std::vector<std::size_t> kNumel = {525, 7, 279, 5};
inline const std::vector<bool> kCompressed = {true, false, true, false};

struct Method {
  std::string config;
  EstimateOracle::Options options;
};

/// Codec, feedback and exchange of a method, whose oracle they configure alike.
inline Method topk_method(bool control, double fresh = 1, EstimateOracle::Init init = EstimateOracle::Init::dense, int start_step = 0) {
  const char* const inits[] = {"dense", "compressed", "zero"};
  Method out;
  out.options.control = control;
  out.options.fresh = fresh;
  out.options.init = init;
  out.options.start_step = start_step;
  out.options.density = [](int) { return 0.1; };
  out.config = std::string("codec=topk:density=0.1,select=exact feedback=") + (control ? "econtrol" : "ef21") +
               ":worker_ema=" + std::to_string(fresh) + ",init=" + inits[int(init)] +
               " exchange=gather min_numel=20 start_step=" + std::to_string(start_step);
  return out;
}
inline Method sign_method(bool control, bool two_phase, double fresh = 1, EstimateOracle::Init init = EstimateOracle::Init::dense,
                          int start_step = 0) {
  Method out = topk_method(control, fresh, init, start_step);
  out.options.density = nullptr;
  out.options.two_phase = two_phase;
  out.config.replace(0, out.config.find(" feedback"), "codec=sign:block=8");
  if (two_phase) out.config.replace(out.config.find("gather"), 6, "two_phase");
  return out;
}

inline Scenario scenario_of(int world, const Method& method, int steps,
                            float (*number)(std::uint64_t, int, int, std::uint32_t, std::size_t) = real_number) {
  Scenario s{.world = world, .config = method.config, .parameters = kModel, .steps = steps, .grad = nullptr};
  s.grad = numbers(number, 7, kModel);
  s.buckets = [](int) { return std::vector<Ids>{{3, 2}, {0, 1}}; };
  s.reducer.step_verdict = method.options.step_verdict;
  return s;
}

/// Every step rounds an element at most world + 8 times, by 2^-24 of the largest magnitude there is. What h is off by then enters e once a
/// step, and comes back by eta <= 1: steps² of them at most. About 1e-3 for values of several units.
inline double bound_of(const EstimateOracle& oracle, int steps) {
  return double(steps) * steps * double(oracle.world + 8) * 0x1p-24 * oracle.largest;
}

inline void expect_near(const Vec& got, const std::vector<double>& want, double bound, const std::string& where) {
  ASSERT_EQ(got.size(), want.size()) << where;
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(want[i])) {
      ASSERT_TRUE(std::isnan(got[i])) << where << " element " << i << " is " << got[i];
    } else {
      ASSERT_NEAR(got[i], want[i], bound) << where << " element " << i;
    }
  }
}

/// The parts of all owners, one after the other: of a whole parameter.
inline std::vector<double> server_residual(const Outcome& out, const std::string& parameter) {
  std::vector<double> whole;
  for (const ReducerState& state : out.state) {
    const Vec& part = state.parameters.at(parameter).at("server_residual");
    whole.insert(whole.end(), part.begin(), part.end());
  }
  return whole;
}

/// H + e_s is the mean of all h, up to what `bound` says of rounding; H is the same everywhere, to the bit.
inline void expect_mean_of_estimates(const Outcome& out, bool two_phase, double bound) {
  for (std::size_t p = 0; p < kModel.size(); ++p) {
    if (!kCompressed[p]) continue;
    const std::string& name = kModel[p].name;
    const Vec& shared = out.array(0, name, "mean_estimate");
    std::vector<double> mean(kNumel[p], 0.0);
    if (two_phase) {
      mean = server_residual(out, name);
      for (double& x : mean) x = -x;
    }
    for (int r = 0; r < int(out.state.size()); ++r) {
      EXPECT_TRUE(same_bits(out.array(r, name, "mean_estimate"), shared)) << "rank " << r;
      for (std::size_t i = 0; i < mean.size(); ++i) mean[i] += double(out.array(r, name, "estimate")[i]) / double(out.state.size());
    }
    expect_near(shared, mean, bound, name + ": H against the mean of all h");
  }
}

inline void expect_state(const Outcome& out, const EstimateOracle& oracle, double bound) {
  for (std::size_t r = 0; r < oracle.world; ++r) {
    for (std::size_t p = 0; p < kModel.size(); ++p) {
      const auto& arrays = out.state[r].parameters.at(kModel[p].name);
      if (!kCompressed[p]) {
        EXPECT_TRUE(arrays.empty());
        continue;
      }
      const auto where = [&](const char* array) { return kModel[p].name + "." + array + " of rank " + std::to_string(r); };
      expect_near(arrays.at("estimate"), oracle.estimate[r][p], bound, where("estimate"));
      expect_near(arrays.at("mean_estimate"), oracle.mean_estimate[p], bound, where("mean_estimate"));
      if (oracle.options.control) expect_near(arrays.at("residual"), oracle.residual[r][p], bound, where("residual"));
      if (oracle.options.fresh < 1) expect_near(arrays.at("average"), oracle.average[r][p], bound, where("average"));
    }
  }
  for (std::size_t p = 0; p < kModel.size() && oracle.options.two_phase && oracle.world > 1; ++p) {
    if (!kCompressed[p]) continue;
    const auto got = server_residual(out, kModel[p].name);
    for (std::size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], oracle.server[p][i], bound) << kModel[p].name << " element " << i;
  }
}

/// Plays a scenario of kModel beside the oracle. Means are rounded to the bucket's dtype last: by half a step of it. `exact`: no number of
/// the run rounds, so the bound is 0.
inline Outcome follow(const Scenario& s, const EstimateOracle::Options& options, const std::vector<int>& flushes = {}, bool exact = false) {
  Scenario run = s;
  run.before_step = [&](GradientReducer& reducer, int step, int rank) {
    if (std::find(flushes.begin(), flushes.end(), step) != flushes.end()) reducer.flush();
    if (s.before_step) s.before_step(reducer, step, rank);
  };
  const Outcome out = play(run);
  expect_replicas_agree(out);
  EstimateOracle oracle(s.world, kNumel, kCompressed, options);
  std::vector<EstimateOracle::Arrays> means;
  for (int t = 0; t < s.steps; ++t) {
    EstimateOracle::Step step{.grad = {}, .buckets = s.buckets(t), .flush = std::find(flushes.begin(), flushes.end(), t) != flushes.end()};
    for (int r = 0; r < s.world; ++r) {
      auto& grad = step.grad.emplace_back();
      for (std::uint32_t p = 0; p < kModel.size(); ++p) {
        auto& values = grad.emplace_back();
        GradBuffer typed(s.dtype, kNumel[p]);
        const Vec g = s.grad(t, r, p);
        for (std::size_t i = 0; i < g.size(); ++i) {
          typed.set(i, g[i]);
          values.push_back(typed.get(i));
        }
      }
      if (s.options) step.joined.push_back(s.options(t, r).joined);
    }
    means.push_back(oracle.run(t, step));
  }
  const double bound = exact ? 0 : bound_of(oracle, s.steps);
  const double rounding = s.dtype == DType::bf16 ? 0x1p-9 : s.dtype == DType::fp16 ? 0x1p-12 : 0;
  for (int t = 0; t < s.steps; ++t)
    for (std::size_t p = 0; p < kModel.size(); ++p)
      expect_near(out.mean[std::size_t(t)][0][p], means[std::size_t(t)][p], bound + rounding * oracle.largest,
                  "step " + std::to_string(t) + " " + kModel[p].name);
  expect_state(out, oracle, bound);
  EXPECT_EQ(out.stats[0].nonfinite_steps, std::uint64_t(oracle.bad_steps));
  EXPECT_GT(oracle.largest, 1000 * bound) << "the bound tells nothing apart";
  return out;
}

/// A run that is saved and loaded in its middle goes on with the same bits.
inline void expect_checkpoints_go_on(const Method& method) {
  for (const int cut : {1, 4}) {
    SCOPED_TRACE(method.config + " cut at " + std::to_string(cut));
    const Scenario whole = scenario_of(3, method, 8);
    Scenario first = whole, second = whole;
    first.steps = cut, second.steps = 8 - cut;
    second.start = play(first).state;
    second.grad = [grad = whole.grad, cut](int step, int rank, std::uint32_t p) { return grad(step + cut, rank, p); };
    second.buckets = [buckets = whole.buckets, cut](int step) { return buckets(step + cut); };
    const Outcome a = play(whole), b = play(second);
    expect_same_state(a.state, b.state);
    for (std::size_t t = std::size_t(cut); t < 8; ++t)
      for (std::size_t p = 0; p < kModel.size(); ++p)
        EXPECT_TRUE(same_bits(a.mean[t][0][p], b.mean[t - std::size_t(cut)][0][p])) << "step " << t;
  }
}

}  // namespace thinwire::test
