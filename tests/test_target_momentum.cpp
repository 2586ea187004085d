// target=momentum beyond its equations (test_two_phase.cpp): the handover by an optimizer, masks, verdicts over whole steps, dense steps
// after the freeze, ranks without data, and what is refused.

#include <gtest/gtest.h>

#include "tests/reducer_world.hpp"
#include "tests/two_phase_oracle.hpp"

namespace thinwire::test {
namespace {

const std::vector<Parameter> kParameters = {{"w", {40, 50}}, {"bias", {50}}, {"v", {3, 9, 3}}};
const std::vector<std::size_t> kNumel = {2000, 50, 81};
const std::vector<bool> kCompressed = {true, false, true};
const std::string kConfig = "onebit_adam:freeze=3,block=64 min_numel=1";

Scenario scenario(int world, int steps, const std::string& config = kConfig) {
  Scenario s;
  s.world = world;
  s.config = config;
  s.parameters = kParameters;
  s.steps = steps;
  s.grad = numbers(real_number, 12, kParameters);
  return s;
}

std::vector<std::uint8_t> bits_of(const std::vector<bool>& dead) {
  std::vector<std::uint8_t> out((dead.size() + 7) / 8);
  for (std::size_t i = 0; i < dead.size(); ++i)
    if (!dead[i]) out[i / 8] |= std::uint8_t(1u << (i % 8));
  return out;
}

// An optimizer's momentum, masks and beta1s take the place of the reducer's own, whatever the config's freeze says; masked elements come
// back as 0 and hold nothing, in every later step.
TEST(TargetMomentum, IsHandedOverWithMasks) {
  for (const int world : {1, 2, 3}) {
    for (const DType dtype : {DType::fp32, DType::bf16}) {
      std::vector<std::vector<bool>> dead = {std::vector<bool>(2000), {}, std::vector<bool>(81)};
      for (std::size_t i = 0; i < 2000; ++i) dead[0][i] = draw(1, i, 0, 0, 0) % 5 == 0 || (i >= 700 && i < 830);
      dead[2][80] = true;
      Vec momenta[3] = {Vec(2000), Vec(50), Vec(81)};
      for (std::uint32_t p = 0; p < 3; ++p)
        for (std::size_t i = 0; i < kNumel[p]; ++i) momenta[p][i] = dead[p].empty() || !dead[p][i] ? dyadic_number(3, 0, 0, p, i) : 0.0f;
      const std::vector<std::uint8_t> live[2] = {bits_of(dead[0]), bits_of(dead[2])};
      Scenario s = scenario(world, 6);
      s.dtype = dtype;
      if (dtype != DType::fp32) s.grad = numbers(dyadic_number, 12, kParameters);
      s.reducer.momentum_elsewhere = true;
      s.before_step = [&](GradientReducer& reducer, int step, int) {
        if (step == 0) reducer.describe_optimizer("freezes early", {.from = 2});
        EXPECT_EQ(reducer.frozen(), step > 2);
        if (step != 2) return;
        const Handover handover[] = {{momenta[0], live[0], 0.75f}, {}, {momenta[2], live[1], 0.5f}};
        reducer.freeze(handover);
      };
      const Outcome out = play(s);

      TwoPhaseOracle oracle(world, kNumel, kCompressed, {.averaged = true, .freeze = 2, .block = 64, .dtype = dtype});
      oracle.dead = dead;
      for (int t = 0; t < 6; ++t) {
        TwoPhaseOracle::Step step;
        for (int r = 0; r < world; ++r) step.grad.push_back({s.grad(t, r, 0), s.grad(t, r, 1), s.grad(t, r, 2)});
        TwoPhaseOracle::Arrays want(3);
        for (const std::uint32_t p : {0u, 1u, 2u}) {  // every parameter by its own beta1
          oracle.options.beta1 = p == 0 ? 0.75f : 0.5f;
          if (t == 2 && kCompressed[p]) oracle.momentum[p] = momenta[p];
          step.buckets = {{p}};
          want[p] = oracle.run(t, step)[p];
          if (world != 1 || t < 2 || !kCompressed[p]) continue;
          for (std::size_t i = 0; i < kNumel[p]; ++i) {  // alone there is nothing to compress, but the mask holds
            const float m = out.mean[std::size_t(t)][0][p][i];
            ASSERT_TRUE(!dead[p][i] || m == 0) << "step " << t << " element " << i;
          }
        }
        for (int r = 0; r < world && world > 1; ++r)
          for (std::size_t p = 0; p < 3; ++p)
            ASSERT_TRUE(same_values(out.mean[std::size_t(t)][std::size_t(r)][p], want[p]))
                << "step " << t << " rank " << r << " parameter " << p;
      }
      for (int r = 0; r < world; ++r) {
        const Vec& residual = out.array(r, "w", "residual");
        const Vec& m = out.array(r, "w", "momentum");
        for (std::size_t i = 0; i < 2000; ++i)
          if (dead[0][i]) ASSERT_TRUE(residual[i] == 0 && m[i] == 0) << "world " << world << " element " << i;
        if (world > 1) EXPECT_TRUE(same_values(m, oracle.momentum[0]));
      }
    }
  }
}

// Nothing is sent, so nothing is rounded but the output: the momentum is that of fp32 arithmetic, before and after the freeze.
TEST(TargetMomentum, AloneItIsExactWhateverTheDtypeOfTheGradients) {
  for (const DType dtype : {DType::fp32, DType::bf16, DType::fp16}) {
    for (const float loss_scale : {1.0f, 64.0f}) {
      for (const bool verdict : {false, true}) {
        Scenario s = scenario(1, 40, "onebit_adam:freeze=20,block=64,beta1=0.99 min_numel=1");
        s.dtype = dtype;
        const auto grad = numbers(dyadic_number, 12, kParameters);
        s.grad = [&](int step, int rank, std::uint32_t p) {
          Vec g = grad(step, rank, p);
          for (float& x : g) x *= loss_scale;
          return g;
        };
        s.reducer.step_verdict = verdict;
        s.options = [&](int, int) {
          ReduceOptions options;
          options.loss_scale = loss_scale;
          return options;
        };
        const Outcome out = play(s);
        for (const std::uint32_t p : {0u, 2u}) {
          Vec m(kNumel[p]);
          for (int step = 0; step < s.steps; ++step) {
            const Vec g = grad(step, 0, p);
            for (std::size_t i = 0; i < m.size(); ++i) m[i] = 0.99f * m[i] + (1.0f - 0.99f) * g[i];
          }
          EXPECT_TRUE(same_values(out.array(0, kParameters[p].name, "momentum"), m)) << to_string(dtype) << " × " << loss_scale;
        }
      }
    }
  }
}

// With a grad scaler a bad bucket condemns the step: after it all is as the equations of an unscaled run have it without that step, up to
// what the codec's rounding leaves; the momentum to the bit.
TEST(TargetMomentum, AStepThatIsSkippedMovesNothing) {
  for (const int world : {1, 2, 4}) {
    for (const char* config : {"onebit_adam:freeze=1,block=8,beta1=0.5 min_numel=1",
                               "codec=sign:block=8 feedback=ef14 target=momentum:freeze=1,beta1=0.5 exchange=gather min_numel=1"}) {
      Scenario s = scenario(world, 3, config);
      s.parameters = {{"w", {40, 64}}, {"v", {64, 8}}};
      const auto grad = numbers(dyadic_number, 12, s.parameters);
      s.grad = [&](int step, int rank, std::uint32_t p) {
        Vec g = grad(step, rank, p);
        if (step == 2 && rank == world - 1 && p == 1) g[5] = INFINITY;
        for (float& x : g) x *= 1024;
        return g;
      };
      s.buckets = [](int) { return std::vector<Ids>{{0}, {1}}; };
      s.reducer.step_verdict = true;
      s.options = [](int, int) {
        ReduceOptions options;
        options.loss_scale = 1024;
        return options;
      };
      std::vector<ReducerState> before(static_cast<std::size_t>(world));
      s.after_step = [&](GradientReducer& reducer, int step, int rank) {
        if (step == 1) before[std::size_t(rank)] = reducer.state();
      };
      const Outcome out = play(s);
      SCOPED_TRACE(std::string(config) + " world " + std::to_string(world));
      for (const char* name : {"w", "v"}) {
        // What the skipped step fed into the residuals, mean over ranks: its gradients' share alone.
        std::vector<double> change(std::size_t(name[0] == 'w' ? 2560 : 512), 0.0);
        for (int r = 0; r < world; ++r) {
          EXPECT_TRUE(same_bits(out.array(r, name, "momentum"), before[std::size_t(r)].parameters.at(name).at("momentum"))) << name;
          const Vec& now = out.array(r, name, "residual");
          const Vec& then = before[std::size_t(r)].parameters.at(name).at("residual");
          const std::uint32_t p = name[0] == 'w' ? 0 : 1;
          const Vec g = s.grad(2, r, p);
          for (std::size_t i = 0; i < now.size(); ++i)
            change[i] += (double(now[i]) - double(then[i]) - (std::isfinite(g[i]) ? 0.5 * g[i] / 1024 : 0)) / world;
        }
        if (out.state[0].parameters.at(name).contains("server_residual")) {
          std::size_t at = 0;
          for (int r = 0; r < world; ++r) {
            const Vec& now = out.array(r, name, "server_residual");
            const Vec& then = before[std::size_t(r)].parameters.at(name).at("server_residual");
            for (std::size_t i = 0; i < now.size(); ++i) change[at++] += double(now[i]) - double(then[i]);
          }
        }
        for (const double x : change) ASSERT_NEAR(x, 0, 1e-4) << name;  // rounding of numbers below 100: 2^-24 each, a dozen times
      }
      EXPECT_EQ(out.stats[0].nonfinite_steps, 1u);
      EXPECT_TRUE(all_nan(out.mean[2][0][1]));
      EXPECT_FALSE(std::isnan(out.mean[2][0][0][0]));  // that bucket was done before the other was seen
    }
  }
}

// A dense step after the freeze returns the momentum with nothing left out, and everything held back with it.
TEST(TargetMomentum, AFlushAfterTheFreezeSendsEverything) {
  for (const int world : {2, 3}) {
    Scenario s = scenario(world, 5, "onebit_adam:freeze=1,block=64 min_numel=1");
    std::vector<ReducerState> before(static_cast<std::size_t>(world));
    s.before_step = [&](GradientReducer& reducer, int step, int rank) {
      if (step != 4) return;
      before[std::size_t(rank)] = reducer.state();
      reducer.flush();
    };
    const Outcome out = play(s);
    for (const std::uint32_t p : {0u, 2u}) {
      const std::string& name = kParameters[p].name;
      std::vector<double> want(kNumel[p], 0.0);
      std::size_t at = 0;
      for (int r = 0; r < world; ++r) {
        const auto& arrays = before[std::size_t(r)].parameters.at(name);
        const Vec g = s.grad(4, r, p);
        for (std::size_t i = 0; i < want.size(); ++i)
          want[i] += (double(arrays.at("residual")[i]) + double(0.9f) * arrays.at("momentum")[i] + double(1.0f - 0.9f) * g[i]) / world;
        for (const float x : arrays.at("server_residual")) want[at++] += x;
        for (const char* array : {"residual", "server_residual"})
          for (const float x : out.array(r, name, array)) ASSERT_EQ(x, 0.0f);
      }
      for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(out.mean[4][0][p][i], want[i], 1e-5 * (1 + std::abs(want[i])));
      EXPECT_TRUE(same_bits(out.array(0, name, "momentum"), out.mean[4][0][p]));
    }
    expect_replicas_agree(out);
  }
}

// Every rank owes beta1·m, with data or without: one that has run out of it is one whose gradients are 0, whatever lies in its bucket. So
// the momentum stays the decaying mean of all ranks' gradients, nothing is lost, and a bad verdict takes back what was sent.
TEST(TargetMomentum, ARankWithoutDataSpeaksWithAGradientOfZero) {
  for (const char* config : {"onebit_adam:freeze=2,block=64 min_numel=1",
                             "codec=sign:block=64 feedback=ef14 target=momentum:freeze=2 exchange=gather min_numel=1"}) {
    for (const int world : {1, 3}) {
      for (const bool verdict : {false, true}) {
        Outcome outs[2];
        for (const bool joined : {false, true}) {
          Scenario s = scenario(world, 10, config);
          s.reducer.step_verdict = verdict;
          const auto without = [=](int step, int rank) { return rank == world - 1 && step >= 4; };
          s.options = [=](int step, int rank) {
            ReduceOptions options;
            options.joined = joined && without(step, rank);
            return options;
          };
          s.grad = [=, grad = s.grad](int step, int rank, std::uint32_t p) {
            if (without(step, rank)) return Vec(kNumel[p], joined ? 7.0f : 0.0f);
            Vec g = grad(step, rank, p);
            if (step == 5 && rank == 0) g[3] = INFINITY;
            return g;
          };
          s.before_step = [](GradientReducer& reducer, int step, int) {
            if (step == 7) reducer.flush();
          };
          outs[joined] = play(s);
        }
        SCOPED_TRACE(std::string(config) + " world " + std::to_string(world) + (verdict ? " step verdict" : ""));
        expect_replicas_agree(outs[1]);
        for (std::size_t step = 0; step < 10; ++step)
          for (std::uint32_t p = 0; p < 3; ++p)
            ASSERT_TRUE(same_bits(outs[1].mean[step][0][p], outs[0].mean[step][0][p])) << "step " << step << " parameter " << p;
        for (int r = 0; r < world; ++r)
          for (const char* name : {"w", "v"})
            for (const auto& [array, values] : outs[0].state[std::size_t(r)].parameters.at(name))
              EXPECT_TRUE(same_bits(outs[1].array(r, name, array), values)) << "rank " << r << " " << name << "." << array;
      }
    }
  }
}

TEST(TargetMomentum, ReplicasStayTheSameOverAThousandStepsSlow) {
  for (const int world : {2, 3, 4, 7}) {
    Scenario s = scenario(world, 1000, "onebit_adam:freeze=20 min_numel=1 check_every=50");
    const Outcome out = play(s);
    expect_replicas_agree(out);
    for (const float x : out.mean.back()[0][0]) ASSERT_TRUE(std::isfinite(x));
  }
}

/// Two ranks at step 2 of which `prepare` makes what its optimizer did; both must refuse that step with these words.
void expect_step_two_refused(const std::vector<std::string>& words, const std::function<void(GradientReducer&, int rank)>& prepare,
                             bool joined = false) {
  run_ranks(2, [&](std::shared_ptr<Communicator> communicator) {
    ReducerOptions options;
    options.momentum_elsewhere = true;
    const int rank = communicator->rank();
    GradientReducer reducer(communicator, Config::parse("onebit_adam min_numel=1 timeout=60"), kParameters, options);
    reducer.describe_optimizer("one", {.from = 100, .every = 2});
    const Ids all = {0, 1, 2};
    GradBuffer grad(DType::fp32, 2131);
    ReduceOptions how;
    for (int step = 0; step < 2; ++step) {
      for (std::size_t i = 0; i < 2131; ++i) grad.set(i, float(i % 7));
      reducer.reduce(all, grad.view(), Stream::host(), how).wait();
    }
    prepare(reducer, rank);
    how.joined = joined && rank == 1;
    expect_error(Errc::invalid_argument, words, [&] { reducer.reduce(all, grad.view(), Stream::host(), how).wait(); });
  });
}

std::vector<Handover> handovers(std::span<const std::uint8_t> live = {}, float beta1 = 0.9f) {
  static const Vec zeros(2000);
  return {{zeros, live, beta1}, {}, {std::span(zeros).first(81), {}, 0.9f}};
}

// Ranks that do not freeze alike would wait for each other in different collectives.
TEST(TargetMomentum, RanksThatFreezeDifferentlyAreRefusedOnAll) {
  expect_step_two_refused({"rank 1 and rank 0", "at step 2", "not frozen and frozen since step 2"}, [](GradientReducer& reducer, int rank) {
    if (rank == 0) reducer.freeze(handovers());
  });
  expect_step_two_refused(
      {"not frozen (and without data: DDP.join) and frozen since step 2", "freeze at a step that all ranks take"},
      [](GradientReducer& reducer, int rank) {
        if (rank == 0) reducer.freeze(handovers());
      },
      true);
  std::vector<std::uint8_t> live(250, 0xff);
  live[3] = 0;
  expect_step_two_refused({"different masks of parameter 'w'", "8 and 0 of its elements", "same optimizer state_dict()"},
                          [&](GradientReducer& reducer, int rank) { reducer.freeze(rank == 1 ? handovers(live) : handovers()); });
  expect_step_two_refused({"different beta1s of parameter 'w'", "0.8", "0.9"},
                          [](GradientReducer& reducer, int rank) { reducer.freeze(handovers({}, rank == 1 ? 0.8f : 0.9f)); });
  expect_step_two_refused({"different optimizers: one that is frozen and one that is not"}, [](GradientReducer& reducer, int rank) {
    const ReducerState state = reducer.state();
    reducer.load_state(std::span(&state, 1));
    reducer.describe_optimizer(rank == 1 ? "one that is frozen" : "one that is not", {.from = 100});
  });
}

// Words of any length: what differs is shown, wherever it stands.
TEST(TargetMomentum, LongWordsAreShownWhereTheyDiffer) {
  const std::string words = std::string(3000, 'a') + "the setting of rank ", rest(3000, 'b');
  expect_step_two_refused({"rank 1 and rank 0 have different optimizers: … aaa", "the setting of rank 1bbb", "the setting of rank 0bbb"},
                          [&](GradientReducer& reducer, int rank) {
                            const ReducerState state = reducer.state();
                            reducer.load_state(std::span(&state, 1));
                            reducer.describe_optimizer(words + std::to_string(rank) + rest, {.from = 100});
                          });
  expect_step_two_refused({"have different optimizers: … aaa", "the setting of rank  and"}, [&](GradientReducer& reducer, int rank) {
    const ReducerState state = reducer.state();
    reducer.load_state(std::span(&state, 1));
    reducer.describe_optimizer(words + (rank == 1 ? "" : "more"), {.from = 100});
  });
}

// Masks and beta1s are not in a state. A reducer that went on without them would let dead coordinates into the scales.
TEST(TargetMomentum, AFrozenStateNeedsItsMasksAgain) {
  std::vector<std::uint8_t> live(250, 0xff);
  live[7] = 0;
  for (const bool elsewhere : {false, true}) {
    run_ranks(2, [&](std::shared_ptr<Communicator> communicator) {
      ReducerOptions options;
      options.momentum_elsewhere = elsewhere;
      const Config config = Config::parse("onebit_adam:freeze=2,block=64 min_numel=1 timeout=60");
      const Ids all = {0, 1, 2};
      GradBuffer grad(DType::fp32, 2131), other(DType::fp32, 2131);
      const auto step = [&](GradientReducer& reducer, GradBuffer& into, int i) {
        for (std::size_t e = 0; e < 2131; ++e) into.set(e, real_number(5, i, communicator->rank(), 0, e));
        reducer.reduce(all, into.view()).wait();
      };
      GradientReducer reducer(communicator, config, kParameters, options);
      for (int i = 0; i < 2; ++i) step(reducer, grad, i);
      if (elsewhere) reducer.freeze(handovers(live, 0.8f));
      for (int i = 2; i < 4; ++i) step(reducer, grad, i);
      const ReducerState state = reducer.state();
      GradientReducer again(communicator, config, kParameters, options);
      again.load_state(std::span(&state, 1));
      if (elsewhere) {
        for (int tries = 0; tries < 2; ++tries)
          expect_error(Errc::invalid_argument, {"frozen since step 2", "masks and beta1s are not in it", "call freeze()"},
                       [&] { again.reduce(all, other.view()); });
        std::vector<Handover> masks = handovers(live, 0.8f);
        for (Handover& one : masks) one.momentum = {};
        again.freeze(masks);
      }
      step(reducer, grad, 4);
      step(again, other, 4);
      for (std::size_t e = 0; e < 2131; ++e) ASSERT_EQ(other.get(e), grad.get(e)) << "element " << e;
      if (elsewhere) EXPECT_EQ(again.stats().parameters[0].masked, 8u);
    });
  }
}

TEST(TargetMomentum, StatesThatFrozeDifferentlyAreRefusedOnAll) {
  const Outcome out = play(scenario(2, 5));
  run_ranks(2, [&](std::shared_ptr<Communicator> communicator) {
    const int rank = communicator->rank();
    GradientReducer reducer(communicator, Config::parse(kConfig), kParameters);
    ReducerState state = out.state[std::size_t(rank)];
    if (rank == 1) state.frozen = 11;
    expect_error(Errc::invalid_argument, {"frozen since step 11 and frozen since step 3", "same checkpoint"},
                 [&] { reducer.load_state(std::span(&state, 1)); });
    EXPECT_EQ(reducer.step(), 0u);
  });
}

TEST(TargetMomentum, RefusesWhatDoesNotFit) {
  run_ranks(1, [](std::shared_ptr<Communicator> communicator) {
    expect_error(Errc::invalid_config, {"freeze=auto", "freeze=STEP"},
                 [&] { GradientReducer reducer(communicator, Config::parse("onebit_adam"), kParameters); });
    GradientReducer plain(communicator, Config::parse("codec=sign feedback=ef14 min_numel=1"), kParameters);
    expect_error(Errc::invalid_argument, {"target=momentum", "gradient"}, [&] { plain.freeze(); });
    ReducerOptions options;
    options.momentum_elsewhere = true;
    GradientReducer reducer(communicator, Config::parse("onebit_adam min_numel=1"), kParameters, options);
    EXPECT_TRUE(reducer.averages(0) && !reducer.averages(1) && reducer.averages(2));
    const Vec w(2000), odd(7), bad = [] {
      Vec v(2000);
      v[3] = NAN;
      return v;
    }();
    const std::vector<std::uint8_t> few(3);
    const Handover two[] = {{w, {}, 0.9f}, {}};
    expect_error(Errc::invalid_argument, {"2 parameters", "3"}, [&] { reducer.freeze(two); });
    const Handover length[] = {{odd, {}, 0.9f}, {}, {}};
    expect_error(Errc::invalid_argument, {"'w'", "2000", "7"}, [&] { reducer.freeze(length); });
    const Handover mask[] = {{w, few, 0.9f}, {}, {}};
    expect_error(Errc::invalid_argument, {"'w'", "250 bytes", "3"}, [&] { reducer.freeze(mask); });
    const Handover beta[] = {{w, {}, 1.0f}, {}, {}};
    expect_error(Errc::invalid_argument, {"'w'", "beta1=1", "[0, 1)"}, [&] { reducer.freeze(beta); });
    const Handover nan[] = {{bad, {}, 0.9f}, {}, {}};
    expect_error(Errc::invalid_argument, {"'w'", "not finite"}, [&] { reducer.freeze(nan); });
    EXPECT_FALSE(reducer.frozen());
    reducer.freeze();
    EXPECT_TRUE(reducer.frozen());
    GradientReducer late(communicator, Config::parse("onebit_adam min_numel=1"), kParameters, options);
    late.describe_optimizer("patient", {.from = 7, .every = 5});
    expect_error(Errc::invalid_argument, {"momentum_elsewhere"}, [&] { plain.describe_optimizer("none", {}); });
    GradBuffer grad(DType::fp32, 2131);
    late.reduce(Ids{0, 1, 2}, grad.view()).wait();
    expect_error(Errc::invalid_argument, {"freeze() at step 1", "step 7 and later", "divisible by 5"}, [&] { late.freeze(); });
  });
}

}  // namespace
}  // namespace thinwire::test
