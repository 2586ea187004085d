// State in and out: a restart leaves no trace, another world gets the mean, and what does not fit is refused by name with nothing changed.

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "tests/reducer_oracle.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

const std::vector<Parameter> kModel = {{"w", {25, 40}}, {"bias", {50}}, {"other", {4, 30}}};

const char* const kConfigs[] = {
    "codec=topk:density=0.02 feedback=dgc exchange=gather min_numel=7",
    "codec=topk:density=0.02,wire=bf16 feedback=dgc:nesterov=1,mask=0,clip_norm=2 exchange=gather min_numel=7 start_step=3",
    "codec=topk:density=0.02,wire=fp16,select=exact feedback=ef14 exchange=gather min_numel=7",
    "codec=topk:density=0.01 feedback=ef14:decay=0.5 min_numel=7 policy=warmup:densities=0.3/0.1/0.05,steps=3", "codec=none"};

std::vector<Ids> one_bucket(int) { return {{2, 1, 0}}; }
std::vector<Ids> three_buckets(int) { return {{1}, {0}, {2}}; }

Scenario scenario(int world, const std::string& config, int steps, int first = 0) {
  Scenario s{.world = world, .config = config, .parameters = kModel, .steps = steps, .grad = nullptr};
  s.grad = [first, plain = numbers(real_number, 17, kModel)](int step, int rank, std::uint32_t p) { return plain(first + step, rank, p); };
  return s;
}

TEST(ReducerState, ContinuesToTheBitWithOtherBuckets) {
  for (const char* config : kConfigs)
    for (const int world : {1, 2, 3})
      for (const bool verdict : {false, true}) {
        SCOPED_TRACE(std::string(config) + " world " + std::to_string(world));
        Scenario whole = scenario(world, config, 10);
        whole.buckets = one_bucket;
        whole.reducer.step_verdict = verdict;
        const Outcome expected = play(whole);
        Scenario first = whole;
        first.steps = 5;
        const Outcome half = play(first);
        EXPECT_EQ(half.state[0].step, 5u);
        EXPECT_EQ(half.state[0].world, world);
        Scenario second = scenario(world, config, 5, 5);
        second.buckets = three_buckets;
        second.reducer.step_verdict = verdict;
        second.start = half.state;
        const Outcome rest = play(second);
        for (std::size_t t = 0; t < 5; ++t)
          for (std::uint32_t p = 0; p < 3; ++p) ASSERT_TRUE(same_bits(rest.mean[t][0][p], expected.mean[t + 5][0][p])) << t << " " << p;
        expect_same_state(rest.state, expected.state);
        EXPECT_EQ(rest.stats[0].step, 10u);
      }
}

TEST(ReducerState, LoadingIsTheInverseOfReadingToTheBit) {
  run_ranks(1, [](std::shared_ptr<Communicator> communicator) {
    GradientReducer reducer(communicator, Config::parse(kConfigs[0]), kModel);
    ReducerState state = reducer.state();
    Vec& momentum = state.parameters.at("bias").at("momentum");
    momentum[0] = -0.0f;
    momentum[1] = std::numeric_limits<float>::denorm_min();
    momentum[2] = -std::numeric_limits<float>::max();
    state.nonfinite_steps = 3;
    state.step = 12;
    reducer.load_state(std::span(&state, 1));
    expect_same_state({reducer.state()}, {state});
    EXPECT_EQ(reducer.step(), 12u);
    EXPECT_EQ(reducer.stats().step, 12u);
    EXPECT_EQ(reducer.stats().nonfinite_steps, 3u);
  });
}

TEST(ReducerState, LoadingIntoAReducerThatHasRunForgetsTheRun) {
  Scenario s = scenario(2, kConfigs[0], 6);
  const Outcome expected = play(s);
  Scenario early = scenario(2, kConfigs[0], 3);
  const Outcome half = play(early);
  Scenario again = scenario(2, kConfigs[0], 6);
  again.before_step = [&](GradientReducer& reducer, int step, int rank) {
    if (step == 3) reducer.load_state(std::span(&half.state[std::size_t(rank)], 1));
  };
  again.grad = [plain = s.grad](int step, int rank, std::uint32_t p) { return plain(step < 3 ? step + 40 : step, rank, p); };
  const Outcome out = play(again);
  expect_same_state(out.state, expected.state);
}

/// The mean over ranks, in double.
Vec mean_of(const std::vector<ReducerState>& states, const std::string& parameter, const std::string& name) {
  Vec mean(states[0].parameters.at(parameter).at(name).size());
  for (std::size_t i = 0; i < mean.size(); ++i) {
    double sum = 0;
    for (const ReducerState& s : states) sum += double(s.parameters.at(parameter).at(name)[i]);
    mean[i] = float(sum / double(states.size()));
  }
  return mean;
}

TEST(ReducerState, AnotherWorldGetsTheMean) {
  for (const char* config : kConfigs) {
    SCOPED_TRACE(config);
    const Outcome four = play(scenario(4, config, 5));
    Scenario load = scenario(2, config, 0);
    load.start = four.state;
    const Outcome two = play(load);
    for (const auto& [parameter, arrays] : four.state[0].parameters)
      for (const auto& [name, values] : arrays)
        for (int r = 0; r < 2; ++r)
          EXPECT_TRUE(same_bits(two.array(r, parameter, name), mean_of(four.state, parameter, name))) << parameter << name;
    EXPECT_EQ(two.state[0].step, 5u);

    Scenario on = scenario(2, config, 4, 5);
    on.start = four.state;
    const Outcome later = play(on);
    expect_replicas_agree(later);
    Scenario back = scenario(4, config, 3, 9);
    back.start = later.state;
    const Outcome again = play(back);
    expect_replicas_agree(again);
    EXPECT_EQ(again.stats[0].step, 12u);
    Scenario look = scenario(4, config, 0);
    look.start = later.state;
    const Outcome loaded = play(look);
    for (const auto& [parameter, arrays] : later.state[0].parameters)
      for (const auto& [name, values] : arrays)
        for (int r = 0; r < 4; ++r) EXPECT_TRUE(same_bits(loaded.array(r, parameter, name), mean_of(later.state, parameter, name)));
  }
}

// Mean of N ranks' residuals delivered by M ranks and divided by M is what the old world would have delivered divided by N.
TEST(ReducerState, AnotherWorldLosesNothing) {
  Scenario four = scenario(4, "codec=topk:density=0.02,select=exact feedback=ef14 exchange=gather min_numel=7", 5);
  four.grad = numbers(dyadic_number, 6, kModel);
  const Outcome before = play(four);
  Scenario flush = scenario(2, four.config, 1);
  flush.start = before.state;
  flush.grad = [](int, int, std::uint32_t p) { return Vec(numel_of(kModel[p]), 0.0f); };
  flush.before_step = [](GradientReducer& reducer, int, int) { reducer.flush(); };
  const Outcome after = play(flush);
  for (const std::uint32_t p : {0u, 2u})
    for (std::size_t i = 0; i < numel_of(kModel[p]); ++i) {
      float fed = 0, delivered = after.mean[0][0][p][i];
      for (int t = 0; t < 5; ++t) {
        for (int r = 0; r < 4; ++r) fed += four.grad(t, r, p)[i] / 4;
        delivered += before.mean[std::size_t(t)][0][p][i];
      }
      ASSERT_EQ(fed, delivered) << p << " " << i;
      if (p == 2) continue;
      ASSERT_EQ(after.array(0, "w", "residual")[i], 0.0f);
    }
}

TEST(ReducerState, AllRanksStatesServeTheSameWorldToo) {
  const Outcome run = play(scenario(3, kConfigs[0], 4));
  run_ranks(3, [&](std::shared_ptr<Communicator> communicator) {
    GradientReducer reducer(communicator, Config::parse(kConfigs[0]), kModel);
    reducer.load_state(run.state);
    expect_same_state({reducer.state()}, {run.state[std::size_t(communicator->rank())]});
    communicator->barrier();
  });
}

/// Whoever loads alone must not meet its peers' gradients with a message of another size: it waits for them and says so.
TEST(ReducerState, LoadingOnOneRankOnlyIsAnErrorWithinTheDeadline) {
  const Outcome two = play(scenario(2, kConfigs[0], 4));
  run_ranks(2, [&](std::shared_ptr<Communicator> communicator) {
    GradientReducer reducer(communicator, Config::parse(std::string(kConfigs[0]) + " timeout=0.3"), kModel);
    if (communicator->rank() == 0) {
      expect_error(Errc::timeout, {"rank 1"}, [&] { reducer.load_state(std::span(two.state.data(), 1)); });
      EXPECT_EQ(reducer.step(), 0u);
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(600));
    }
  });
}

TEST(ReducerState, OneRanksRefusalIsEverybodys) {
  const Outcome two = play(scenario(2, kConfigs[0], 4));
  run_ranks(2, [&](std::shared_ptr<Communicator> communicator) {
    const auto me = std::size_t(communicator->rank());
    GradientReducer reducer(communicator, Config::parse(kConfigs[0]), kModel);
    ReducerState state = two.state[me];
    if (me == 1) state.parameters.erase("w");
    expect_error(Errc::invalid_argument, {"'w' is missing"}, [&] { reducer.load_state(std::span(&state, 1)); });
    EXPECT_EQ(reducer.step(), 0u);
    state = two.state[me];
    state.step += me;
    expect_error(Errc::invalid_config, {"different steps", "5 and 4", "rank 1"}, [&] { reducer.load_state(std::span(&state, 1)); });
    EXPECT_EQ(reducer.step(), 0u);
    reducer.load_state(std::span(&two.state[me], 1));
    expect_same_state({reducer.state()}, {two.state[me]});
    communicator->barrier();
  });
}

TEST(ReducerState, WhatDoesNotFitIsRefusedByNameAndChangesNothing) {
  const Outcome two = play(scenario(2, kConfigs[0], 4));
  const Outcome three = play(scenario(3, kConfigs[0], 4));
  const Outcome exact = play(scenario(2, "codec=topk:density=0.02,select=exact feedback=dgc exchange=gather min_numel=7", 4));
  const Outcome ef = play(scenario(2, "codec=topk:density=0.02 feedback=ef14 exchange=gather min_numel=7", 4));
  run_ranks(2, [&](std::shared_ptr<Communicator> communicator) {
    const auto me = std::size_t(communicator->rank());
    GradientReducer reducer(communicator, Config::parse(kConfigs[0]), kModel);
    reducer.load_state(std::span(&two.state[me], 1));
    const auto refused = [&](const std::vector<std::string>& words, const std::vector<ReducerState>& states) {
      expect_error(Errc::invalid_argument, words, [&] { reducer.load_state(states); });
      expect_same_state({reducer.state()}, {two.state[me]});
      EXPECT_EQ(reducer.step(), 4u);
    };
    const auto changed = [&](const std::function<void(ReducerState&)>& change) {
      ReducerState state = two.state[me];
      // everything else is different too, so that a partial load would be seen
      for (auto& [name, arrays] : state.parameters)
        for (auto& [array, values] : arrays)
          for (float& x : values) x += 1;
      state.step = 99;
      change(state);
      return std::vector<ReducerState>{state};
    };
    refused({"no state"}, {});
    refused({"'other' is missing"}, changed([](ReducerState& s) { s.parameters.erase("other"); }));
    refused({"'extra' is not a parameter here"}, changed([](ReducerState& s) { s.parameters["extra"]; }));
    refused({"'renamed' is not a parameter here", "'w' is missing"}, changed([](ReducerState& s) {
              auto node = s.parameters.extract("w");
              node.key() = "renamed";
              s.parameters.insert(std::move(node));
            }));
    refused({"'w' has no 'accumulated'"}, changed([](ReducerState& s) { s.parameters.at("w").erase("accumulated"); }));
    refused({"'w' has no 'threshold'"}, {exact.state[me]});
    refused({"'w' has no 'momentum'", "'bias' has no 'momentum'", "saved under '" + ef.state[me].config + "'"}, {ef.state[me]});
    refused({"'e7' is not a parameter here; and 92 more"}, changed([](ReducerState& s) {
              for (int i = 0; i < 100; ++i) s.parameters["e" + std::string(i < 10 ? "" : "x") + std::to_string(i)];
            }));
    refused({"'bias' has 'residual', which this config does not keep"},
            changed([](ReducerState& s) { s.parameters.at("bias")["residual"] = Vec(50); }));
    refused({"'w' 'momentum'", "999", "1000"}, changed([](ReducerState& s) { s.parameters.at("w").at("momentum").pop_back(); }));
    refused({"'other' 'accumulated'", "not finite"},
            changed([](ReducerState& s) { s.parameters.at("other").at("accumulated")[7] = std::numeric_limits<float>::quiet_NaN(); }));
    refused({"rank " + std::to_string(1 - me)}, {two.state[1 - me]});
    refused({"1 state", "world of 3", "all 3"}, {three.state[0]});
    refused({"2 state"}, {three.state[0], three.state[1]});
    refused({"rank order"}, {three.state[1], three.state[0], three.state[2]});
    refused({"not of one checkpoint"}, {three.state[0], two.state[1], three.state[2]});
    std::vector<ReducerState> mixed = three.state;
    mixed[2].step = 5;
    refused({"not of one checkpoint"}, mixed);
    std::vector<ReducerState> hurt = three.state;
    hurt[1].parameters.at("w").at("momentum")[0] = std::numeric_limits<float>::infinity();
    refused({"'w' 'momentum'", "not finite"}, hurt);
    communicator->barrier();
  });
}

// After a load the ranks compare again: one that loaded another checkpoint is found before any gradient is exchanged.
TEST(ReducerState, ResetIsAFreshStart) {
  for (const bool verdict : {false, true}) {
    Scenario s = scenario(2, kConfigs[0], 8);
    s.reducer.step_verdict = verdict;
    s.before_step = [](GradientReducer& reducer, int step, int) {
      if (step == 4) reducer.reset();
    };
    s.grad = [plain = s.grad](int step, int rank, std::uint32_t p) { return plain(step % 4, rank, p); };
    const Outcome out = play(s);
    Scenario fresh = scenario(2, kConfigs[0], 4);
    fresh.reducer.step_verdict = verdict;
    const Outcome expected = play(fresh);
    expect_same_state(out.state, expected.state);
    EXPECT_EQ(out.stats[0].payload_bytes, expected.stats[0].payload_bytes);
    EXPECT_EQ(out.stats[0].dense_bytes, expected.stats[0].dense_bytes);
    EXPECT_EQ(out.stats[0].step, 8u);  // the clock goes on
  }
}

// Without ties the k largest are the same wherever they lie. w lies otherwise for three steps, then as before.
TEST(ReducerState, ReorderedElementsTakeTheirStateAlong) {
  std::vector<std::uint32_t> turned(1000), back(1000);  // 25 x 40, column by column
  for (std::uint32_t i = 0; i < 1000; ++i) turned[i] = i % 25 * 40 + i / 25;
  for (std::uint32_t i = 0; i < 1000; ++i) back[turned[i]] = i;
  for (const char* config : {"codec=topk:density=0.02,select=exact feedback=dgc exchange=gather min_numel=7",
                             "codec=topk:density=0.05,select=exact feedback=ef14:residual=bf16 exchange=gather min_numel=7",
                             "codec=topk:density=0.05,select=exact feedback=econtrol:worker_ema=0.5,init=zero exchange=gather min_numel=7"})
    for (const bool verdict : {false, true}) {
      SCOPED_TRACE(config);
      Scenario s = scenario(3, config, 8);
      s.buckets = three_buckets;
      s.reducer.step_verdict = verdict;
      const Outcome expected = play(s);
      s.before_step = [&](GradientReducer& reducer, int step, int) {
        if (step == 2) reducer.reorder(0, turned);
        if (step == 5) reducer.reorder(0, back);
      };
      const auto lies = [&](int step) { return step >= 2 && step < 5; };
      s.grad = [&, plain = s.grad](int step, int rank, std::uint32_t p) {
        const Vec g = plain(step, rank, p);
        if (p != 0 || !lies(step)) return g;
        Vec out(g.size());
        for (std::size_t i = 0; i < out.size(); ++i) out[i] = g[turned[i]];
        return out;
      };
      const Outcome out = play(s);
      for (std::size_t t = 0; t < 8; ++t)
        for (std::size_t i = 0; i < 1000; ++i)
          ASSERT_EQ(out.mean[t][0][0][i], expected.mean[t][0][0][lies(int(t)) ? turned[i] : i]) << "step " << t << " element " << i;
      expect_same_state(out.state, expected.state);
    }
}

TEST(ReducerState, ReorderRefusesWhatIsNoPermutation) {
  run_ranks(2, [](std::shared_ptr<Communicator> communicator) {
    GradientReducer reducer(communicator, Config::parse("codec=sign:block=24 feedback=ef14 min_numel=7"), {{"w", {6, 8}}, {"bias", {8}}});
    std::vector<std::uint32_t> from(48);
    for (std::uint32_t i = 0; i < 48; ++i) from[i] = 47 - i;
    reducer.reorder(0, from);  // nothing is held back yet
    GradBuffer w(DType::fp32, 48), bias(DType::fp32, 8);
    for (std::size_t i = 0; i < 48; ++i) w.set(i, float(i) - 20.25f * float(communicator->rank() + 1));
    reducer.reduce(Ids{0}, w.view());
    expect_error(Errc::invalid_argument, {"'w'", "was reduced in step 0"}, [&] { reducer.reorder(0, from); });
    reducer.reduce(Ids{1}, bias.view()).wait();
    expect_error(Errc::invalid_argument, {"'w'", "owners hold back"}, [&] { reducer.reorder(0, from); });
    expect_error(Errc::invalid_argument, {"no parameter 2", "2"}, [&] { reducer.reorder(2, from); });
    expect_error(Errc::invalid_argument, {"'bias'", "8 elements", "permutation"}, [&] { reducer.reorder(1, from); });
    from[3] = from[4];
    expect_error(Errc::invalid_argument, {"'w'", "permutation"}, [&] { reducer.reorder(0, from); });
    from[3] = 48;
    expect_error(Errc::invalid_argument, {"'w'", "permutation"}, [&] { reducer.reorder(0, from); });
  });
}

}  // namespace
}  // namespace thinwire::test
