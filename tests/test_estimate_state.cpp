// Estimates between steps and between runs: resets, checkpoints, another world, H made anew.

#include <gtest/gtest.h>

#include <atomic>

#include "tests/estimate_world.hpp"

namespace thinwire::test {
namespace {

using Init = EstimateOracle::Init;

// A reset is a start: the same as a fresh run from there on, with its dense step.
TEST(EstimateState, AResetStartsAnew) {
  for (const Method& method : {topk_method(true, 0.5), topk_method(false, 1, Init::zero), topk_method(false, 0.25, Init::zero),
                               topk_method(true, 0.25, Init::compressed), topk_method(true, 1, Init::dense, 2), sign_method(true, true)}) {
    SCOPED_TRACE(method.config);
    Scenario s = scenario_of(2, method, 8);
    s.before_step = [](GradientReducer& reducer, int step, int) {
      if (step != 4) return;
      reducer.reset();
      for (const auto& [name, arrays] : reducer.state().parameters)
        for (const auto& [array, values] : arrays)
          for (const float x : values) ASSERT_EQ(x, 0) << name << "." << array;
    };
    const Outcome reset = play(s);
    Method once = method;  // start_step counts from the beginning of a run
    once.config.replace(once.config.find("start_step="), std::string::npos, "start_step=0");
    Scenario fresh = scenario_of(2, once, 4);
    fresh.grad = [grad = s.grad](int step, int rank, std::uint32_t p) { return grad(step + 4, rank, p); };
    expect_same_state(reset.state, play(fresh).state);
  }
}

// A rank that resets alone would have another H than the others: it waits for them, and says so.
TEST(EstimateState, AResetIsOfAllRanks) {
  std::atomic<bool> over{false};
  run_ranks(2, [&](std::shared_ptr<Communicator> communicator) {
    GradientReducer reducer(communicator, Config::parse(topk_method(true).config + " timeout=0.2"), kModel);
    if (communicator->rank() == 1) {
      while (!over) std::this_thread::yield();
      return;
    }
    try {
      reducer.reset();
      ADD_FAILURE() << "a rank has reset alone";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::timeout);
      EXPECT_NE(std::string(error.what()).find("reset() at step 0 on rank 0, which all ranks have to call"), std::string::npos)
          << error.what();
    }
    over = true;
  });
}

// I13: a run that is saved and loaded in its middle goes on with the same bits; also where the start is still to come.
TEST(EstimateState, ACheckpointGoesOnToTheBit) {
  Method sampled = topk_method(true, 0.5, Init::compressed, 2);
  sampled.config.replace(sampled.config.find("exact"), 5, "sampled");
  for (const Method& method : {topk_method(false, 0.5), topk_method(true, 1, Init::dense, 3), sampled, sign_method(true, true)})
    expect_checkpoints_go_on(method);
}

// Another world: the mean over the old ranks, H as all of them had it, owned parts cut anew; and H goes on being the mean of all h.
TEST(EstimateState, AnotherWorldTakesTheMeans) {
  for (const Method& method : {topk_method(true, 0.5), sign_method(true, true)})
    for (const auto& [from, to] : {std::pair(4, 3), {2, 4}, {3, 2}}) {
      SCOPED_TRACE(method.config + " " + std::to_string(from) + " to " + std::to_string(to));
      const std::vector<ReducerState> old = play(scenario_of(from, method, 5)).state;
      Scenario s = scenario_of(to, method, 3);
      s.start = old;
      s.before_step = [&, from = from](GradientReducer& reducer, int step, int) {
        if (step != 0) return;
        const ReducerState now = reducer.state();
        for (const auto& [name, arrays] : now.parameters)
          for (const auto& [array, values] : arrays) {
            if (array == "server_residual") continue;
            if (array == "mean_estimate") {
              EXPECT_TRUE(same_bits(values, old[0].parameters.at(name).at(array))) << name;
              continue;
            }
            for (std::size_t i = 0; i < values.size(); ++i) {
              double mean = 0;
              for (const ReducerState& rank : old) mean += double(rank.parameters.at(name).at(array)[i]) / from;
              ASSERT_NEAR(values[i], mean, 0x1p-23 * std::fabs(mean)) << name << "." << array << " element " << i;
            }
          }
      };
      const Outcome out = play(s);
      expect_replicas_agree(out);
      expect_mean_of_estimates(out, method.options.two_phase, 8 * double(from + to + 6) * 0x1p-24 * 64);
    }
}

/// The rest of `whole` from step `cut` on, out of the states that its beginning has left.
Scenario rest_of(const Scenario& whole, int cut, std::vector<ReducerState> states) {
  Scenario rest = whole;
  rest.steps = whole.steps - cut;
  rest.start = std::move(states);
  rest.grad = [grad = whole.grad, cut](int step, int rank, std::uint32_t p) { return grad(step + cut, rank, p); };
  return rest;
}

void expect_goes_on_from(const Scenario& whole, const std::vector<int>& cuts) {
  const Outcome a = play(whole);
  for (const int cut : cuts) {
    SCOPED_TRACE(whole.config + " cut at " + std::to_string(cut));
    Scenario begin = whole;
    begin.steps = cut;
    const Outcome b = play(rest_of(whole, cut, play(begin).state));
    expect_same_state(a.state, b.state);
    for (std::size_t t = std::size_t(cut); t < a.mean.size(); ++t)
      for (std::size_t p = 0; p < kModel.size(); ++p)
        EXPECT_TRUE(same_bits(a.mean[t][0][p], b.mean[t - std::size_t(cut)][0][p])) << "step " << t;
  }
}

// A start whose gradients were not finite is made again until one is good, wherever the run is cut.
TEST(EstimateState, ABadStartIsMadeAgainAfterACheckpointToo) {
  for (const int start_step : {0, 3})
    for (const int bad : {0, 1, 2}) {
      Method method = topk_method(true, 0.5, Init::dense, start_step);
      Scenario s = scenario_of(2, method, 8);
      s.grad = [grad = s.grad, bad](int step, int rank, std::uint32_t p) {
        Vec g = grad(step, rank, p);
        if (step == bad && rank == 1 && p == 0) g[3] = std::numeric_limits<float>::infinity();
        return g;
      };
      std::array<bool, 8> compressed{};
      s.after_step = [&](GradientReducer& reducer, int step, int rank) {
        if (rank == 0) compressed[std::size_t(step)] = reducer.stats().parameters[0].compressed;
      };
      const Outcome out = play(s);
      const int dense = std::max(start_step, 1), last = bad < dense ? std::max(dense, std::max(bad + 1, dense - 1) + 2) : dense;
      for (int step = 0; step < 8; ++step) EXPECT_EQ(compressed[std::size_t(step)], step >= last) << "bad " << bad << " step " << step;
      s.after_step = nullptr;
      expect_goes_on_from(s, {1, 2, 3, 4, 5});
    }
}

// Tensors that are dense by the rule for a time: their estimates are old, which the checkpoint knows. So does another world.
TEST(EstimateState, TensorsThatWereDenseStartAnewAfterACheckpointToo) {
  Method method = topk_method(true, 0.5, Init::dense, 1);
  method.config.replace(method.config.find("gather"), 6, "auto");
  method.config += " policy=warmup:densities=0.25/0.5/0.25,steps=2";
  expect_goes_on_from(scenario_of(4, method, 9), {3, 4, 5, 6, 7});

  method = topk_method(true);
  method.config.replace(method.config.find("gather"), 6, "auto");
  method.config.replace(method.config.find("0.1"), 3, "0.5");
  Scenario s = scenario_of(2, method, 3);
  s.start = play(scenario_of(4, method, 4)).state;  // always dense among four
  ASSERT_TRUE(s.start[0].dense.contains("w"));
  std::array<bool, 3> compressed{};
  s.after_step = [&](GradientReducer& reducer, int step, int rank) {
    if (rank == 0) compressed[std::size_t(step)] = reducer.stats().parameters[0].compressed;
  };
  const Outcome out = play(s);
  EXPECT_EQ(compressed, (std::array{false, false, true}));
  expect_mean_of_estimates(out, false, 3 * 8 * 0x1p-24 * 64);
}

// What the watchdog is waiting for is in the checkpoint, so it acts at the same steps; and it does not matter who shares a bucket with
// whom.
TEST(EstimateState, TheWatchdogGoesOnToo) {
  Scenario whole = scenario_of(2, topk_method(true), 140);
  whole.config = "codec=topk:density=0.1,select=exact feedback=econtrol:eta=0.9 exchange=gather min_numel=20";
  const Outcome a = play(whole);
  std::uint32_t latest = 0;
  for (const int cut : {30, 71, 120}) {
    Scenario begin = whole;
    begin.steps = cut;
    const Outcome first = play(begin);
    Scenario rest = rest_of(whole, cut, first.state);
    rest.buckets = [](int) { return std::vector<Ids>{{2}, {1, 0, 3}}; };
    const Outcome b = play(rest);
    expect_same_state(a.state, b.state);
    for (int r = 0; r < 2; ++r) {
      EXPECT_EQ(a.state[std::size_t(r)].watchdog, b.state[std::size_t(r)].watchdog) << "cut at " << cut;
      for (const auto& [name, watchdog] : first.state[std::size_t(r)].watchdog)
        latest = std::max(latest, a.state[std::size_t(r)].watchdog.at(name).cuts - watchdog.cuts);
    }
  }
  EXPECT_GT(latest, 0u) << "it did nothing after a cut, so nothing was shown";
}

TEST(EstimateState, AFlushThatIsAheadIsInTheCheckpoint) {
  const Method method = topk_method(true, 0.5);
  Scenario whole = scenario_of(2, method, 6);
  whole.before_step = [](GradientReducer& reducer, int step, int) {
    if (step == 3) reducer.flush();
  };
  Scenario begin = whole;
  begin.steps = 3;
  std::vector<ReducerState> states(2);
  begin.after_step = [&](GradientReducer& reducer, int step, int rank) {
    if (step != 2) return;
    reducer.flush();
    states[std::size_t(rank)] = reducer.state();
  };
  (void)play(begin);
  Scenario rest = rest_of(whole, 3, states);
  rest.before_step = nullptr;
  expect_same_state(play(whole).state, play(rest).state);
}

// H that was moved comes back to the mean of h, less what owners hold back, as if it had never been moved; how far it was is in the
// statistics.
TEST(EstimateState, ResynchronizeMakesHTheMeanAgain) {
  Method grid = topk_method(true);
  grid.config.insert(grid.config.find("init="), "estimate=grid,");
  for (const Method& method : {topk_method(false, 0.5), topk_method(true), grid, sign_method(true, true), sign_method(false, false)})
    for (const int world : {1, 3}) {
      SCOPED_TRACE(method.config + " world " + std::to_string(world));
      const Outcome begun = play(scenario_of(world, method, 5));
      std::vector<ReducerState> moved = begun.state;
      double moved_by = 0, norm = 0;
      for (std::size_t p = 0; p < kModel.size(); ++p) {
        if (!kCompressed[p]) continue;
        const Vec& h = begun.array(0, kModel[p].name, "mean_estimate");
        for (std::size_t i = 0; i < h.size(); ++i) {
          const float by = i % 3 == 0 ? 0.25f : 0;
          moved_by += double(by) * by, norm += double(h[i]) * h[i];
          for (ReducerState& state : moved) state.parameters.at(kModel[p].name).at("mean_estimate")[i] += by;
        }
      }
      const double bound = 5 * double(world + 6) * 0x1p-24 * 64;
      const auto run = [&](const std::vector<ReducerState>& states) {
        Scenario rest = rest_of(scenario_of(world, method, 8), 5, states);
        rest.before_step = [&](GradientReducer& reducer, int step, int) {
          if (step == 1) EXPECT_TRUE(reducer.stats().resync_error.has_value());
          if (step != 0) return;
          EXPECT_FALSE(reducer.stats().resync_error.has_value());
          const ReducerState before = reducer.state();
          reducer.resynchronize();
          const ReducerState after = reducer.state();
          for (const auto& [name, arrays] : before.parameters)
            for (const auto& [array, values] : arrays)
              if (array != "mean_estimate") EXPECT_TRUE(same_bits(values, after.parameters.at(name).at(array))) << name << "." << array;
        };
        return play(rest);
      };
      const Outcome plain = run(begun.state), back = run(moved);
      expect_replicas_agree(back);
      expect_same_state(plain.state, back.state);
      expect_same_means(plain, back);
      expect_mean_of_estimates(back, method.options.two_phase, bound);
      EXPECT_LT(*plain.stats[0].resync_error, bound);
      EXPECT_NEAR(*back.stats[0].resync_error, std::sqrt(moved_by / norm), 0.01 * std::sqrt(moved_by / norm));
    }
}

// What an owner holds back is what H lacks of the mean of h: another learning rate changes nothing of it.
TEST(EstimateState, AnotherLearningRateLeavesHTheMean) {
  for (const float factor : {8.0f, 0.125f}) {
    const Method method = sign_method(true, true);
    Scenario s = scenario_of(3, method, 8);
    s.before_step = [factor](GradientReducer& reducer, int step, int) {
      if (step == 4) reducer.rescale_residuals(std::vector<float>(kModel.size(), factor));
    };
    const Outcome out = play(s);
    expect_mean_of_estimates(out, true, 8 * double(3 + 6) * 0x1p-24 * 64);
    double held = 0;
    for (const double x : server_residual(out, "w")) held = std::max(held, std::fabs(x));
    EXPECT_GT(held, 0.01) << "the owners hold nothing, so nothing was shown";
  }
}

// The lowest eta that any rank of another world had.
TEST(EstimateState, AnotherWorldTakesTheLowestEta) {
  const Method method = topk_method(true);
  std::vector<ReducerState> states = play(scenario_of(3, method, 4)).state;
  for (ReducerState& state : states) state.watchdog["w"] = {.eta = 0, .cuts = 0};
  states[1].watchdog["w"] = {.eta = 0.04f, .cuts = 3};
  states[2].watchdog["w"] = {.eta = 0.07f, .cuts = 1};
  run_ranks(2, [&](std::shared_ptr<Communicator> communicator) {
    GradientReducer reducer(communicator, Config::parse(method.config), kModel);
    reducer.load_state(states);
    EXPECT_EQ(reducer.state().watchdog.at("w").eta, 0.04f);
    EXPECT_EQ(reducer.state().watchdog.at("w").cuts, 3u);
  });
}

// A sequence of old ranks' states must agree on H as well.
TEST(EstimateState, ASequenceOfStatesWithDifferentMeanEstimatesIsRefused) {
  const Method method = topk_method(true);
  std::vector<ReducerState> states = play(scenario_of(3, method, 2)).state;
  states[2].parameters.at("m").at("mean_estimate")[7] += 1;
  states[1].watchdog["nobody"] = {};
  run_ranks(2, [&](std::shared_ptr<Communicator> communicator) {
    GradientReducer reducer(communicator, Config::parse(method.config), kModel);
    try {
      reducer.load_state(states);
      ADD_FAILURE() << "it was loaded";
    } catch (const Error& error) {
      for (const char* words : {"'m' 'mean_estimate' is not the same on rank 2 and on rank 0", "'nobody' in 'watchdog'"})
        EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
    }
  });
}

// States of several checkpoints of the same step: every rank hears of it, and goes on with what it had.
TEST(EstimateState, DifferentMeanEstimatesAreRefused) {
  const Method method = topk_method(true);
  const std::vector<ReducerState> good = play(scenario_of(3, method, 2)).state;
  for (const bool flush : {false, true}) {
    run_ranks(3, [&](std::shared_ptr<Communicator> communicator) {
      ReducerState state = good[std::size_t(communicator->rank())];
      if (communicator->rank() == 2) flush ? void(state.flush = true) : void(state.parameters.at("m").at("mean_estimate")[7] += 1);
      GradientReducer reducer(communicator, Config::parse(method.config), kModel);
      try {
        reducer.load_state(std::span(&state, 1));
        ADD_FAILURE() << "rank " << communicator->rank() << " has loaded it";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), Errc::invalid_argument);
        EXPECT_NE(std::string(error.what()).find("rank 2 and rank 0 have different mean estimates"), std::string::npos) << error.what();
      }
      EXPECT_EQ(reducer.step(), 0u);
      reducer.load_state(std::span(&good[std::size_t(communicator->rank())], 1));
    });
  }
}

}  // namespace
}  // namespace thinwire::test
