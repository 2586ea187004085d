// The fused pass of top-k: against the unfused composition, against the equations, and the same bits on every ISA.

#include "tests/topk_fixture.hpp"

namespace thinwire {
namespace {

template <class T>
class TopKStream : public OnBackend<T> {};
TYPED_TEST_SUITE(TopKStream, Backends, BackendName);

std::vector<TopKOptions> all_options() {
  std::vector<TopKOptions> out;
  for (const DType wire : kWires) {
    for (const bool exact : {false, true}) {
      TopKOptions o;
      o.wire = wire;
      o.exact = exact;
      out.push_back(o);
    }
  }
  return out;
}

/// Segments around the sizes that vectors, groups and chunks have, and one around a block's: which, goes by `turn`.
std::vector<std::size_t> counts_at(std::size_t turn) {
  return {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 1023, 1025, 4095, 4096, 4097, 65535 + turn % 3};
}

// What gradients are like. equal: ties everywhere, so that a sampled threshold lets through more than there is room for.
enum class Data { normal, wild, equal };

std::vector<float> data(Data kind, std::size_t n, unsigned seed) {
  if (kind == Data::equal) return std::vector<float>(n, 0.75f);
  return gradients(n, seed, kind == Data::wild);
}

// Message by the equations, encode(), and what the entries leave behind, written out here: the same payload, state and memory as stream(),
// to the bit.
template <class T>
void fused_is_unfused(const Recursion& recursion, const TopKOptions& options, DType dtype, double density, Data kind,
                      const std::vector<std::size_t>& counts) {
  TopKRig fused(T::kBackend, options, recursion, counts, density), unfused(Isa::scalar, options, recursion, counts, density);
  for (auto* rig : {&fused, &unfused}) {
    for (std::size_t s = 0; s < counts.size(); ++s) rig->factors[s] = s % 3 == 2 ? 0.3f : 1.0f;
    if (has_estimate(recursion) && kind != Data::equal) rig->age(unsigned(density * 100), kind == Data::wild);
  }
  for (unsigned step = 0; step < 3; ++step) {
    fused.step = unfused.step = step;
    const auto grad = oracle::to_bytes(data(kind, fused.numel, 17 * step + unsigned(density * 1000)), dtype);
    const auto name = [&] {
      return describe(recursion) + describe(options) + " grad " + to_string(dtype) + " density " + std::to_string(density) + " step " +
             std::to_string(step);
    };

    std::vector<float> message(unfused.numel, NAN);
    std::uint32_t nonfinite = 0;
    for (std::size_t s = 0; s < counts.size(); ++s) {
      for (std::size_t i = 0; i < counts[s]; ++i) {
        const std::size_t at = unfused.segments[s].first + i;
        const auto e = oracle::update(recursion, oracle::element(grad, at, dtype), unfused.factors[s], unfused.held(s, i), eta_at(s));
        nonfinite |= e.nonfinite ? 1u : 0u;
        message[at] = e.sits_out ? NAN : e.x;
        unfused.hold(s, i, e.held);
      }
    }
    unfused.prepare();
    unfused.codec->encode(0, unfused.plan(), host_bytes(message.data(), message.size()), {}, unfused.state(),
                          unfused.bytes(unfused.workspace), unfused.bytes(unfused.payload), Stream::host());
    std::memcpy(&unfused.payload[8], &nonfinite, 4);  // the message has forgotten which of its elements met a bad gradient
    auto sent = unfused.entries();
    for (std::size_t s = 0; s < counts.size(); ++s) {
      for (auto& [i, value] : sent[s]) {
        if (recursion.grid) value = oracle::grid_value(value, unfused.estimate[s][i]);
        unfused.hold(s, i, oracle::after_sending(recursion, unfused.held(s, i), message[unfused.segments[s].first + i], value));
      }
    }

    fused.stream(grad, dtype);
    ASSERT_EQ(fused.flags, nonfinite) << name();
    if (recursion.grid) {
      ASSERT_EQ(fused.entries(), sent) << name();
    } else {
      ASSERT_EQ(fused.payload, unfused.payload) << name();
    }
    ASSERT_EQ(fused.memory, unfused.memory) << name();
    for (std::size_t s = 0; s < counts.size(); ++s) {
      ASSERT_EQ(fused.kept[s], sent[s].size()) << name();
      const auto where = [&] { return name() + " n " + std::to_string(counts[s]); };
      const bool control = recursion.kind == Recursion::Kind::error_feedback || recursion.control;
      if (control || recursion.kind == Recursion::Kind::momentum_correction)
        expect_same_bits(fused.residual[s], unfused.residual[s], where);
      if (recursion.kind == Recursion::Kind::momentum_correction) expect_same_bits(fused.u[s], unfused.u[s], where);
      for (auto array : {&TopKRig::estimate, &TopKRig::mean_estimate, &TopKRig::average})
        expect_same_bits((fused.*array)[s], (unfused.*array)[s], where);
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

TYPED_TEST(TopKStream, FusedIsUnfused) {
  const double densities[] = {0.001, 0.03, 0.6};
  std::size_t turn = 0;
  for (const auto& recursion : all_recursions()) {
    for (const auto& options : all_options()) {
      if (recursion.grid && options.wire != DType::fp32) continue;
      fused_is_unfused<TypeParam>(recursion, options, DType::fp32, densities[turn % 3], Data::normal, counts_at(turn / 3 + turn));
      if (this->HasFatalFailure()) return;
      ++turn;
    }
    ++turn;  // six options: every pair of option and density comes up
  }
}

TYPED_TEST(TopKStream, FusedIsUnfusedOnHalfGradientsAndNonfiniteOnes) {
  const std::vector<std::size_t> counts = {33, 1000, 9001};
  std::size_t turn = 0;
  for (const auto& recursion : all_recursions()) {
    for (const auto& options : all_options()) {
      if (recursion.grid && options.wire != DType::fp32) continue;
      for (const DType dtype : kWires) {
        fused_is_unfused<TypeParam>(recursion, options, dtype, turn++ % 2 == 0 ? 0.005 : 0.2, Data::wild, counts);
        if (this->HasFatalFailure()) return;
      }
    }
    ++turn;  // a recursion takes an option and dtype at the density that the one before did not
  }
}

// Whatever way the hits of a group are found (a density each), and where the payload is full before the segment ends.
TYPED_TEST(TopKStream, RoomThatRunsOut) {
  std::size_t turn = 0;
  for (const auto& recursion :
       {ef14(), dgc(), ef21(), ef21(0.25f), econtrol(), econtrol(0.1f), narrow(ef14()), on_grid(narrow(econtrol()))}) {
    for (const auto& options : all_options()) {
      if (recursion.grid && options.wire != DType::fp32) continue;
      for (const double density : {0.001, 0.03, 0.6}) {
        if (!recursion.grid && turn++ % 3 != 0) continue;
        fused_is_unfused<TypeParam>(recursion, options, DType::fp32, density, Data::equal, {70001, 515, 9000});
        if (this->HasFatalFailure()) return;
      }
      ++turn;
    }
    ++turn;  // another option takes another density, and so does another recursion
  }
}

TYPED_TEST(TopKStream, SamplesOfSeveralBlocksAndDenseOnes) {
  const std::vector<std::size_t> counts = {140001};
  const Recursion estimates[] = {ef21(0.25f), econtrol(), narrow(econtrol())}, feedbacks[] = {ef14(), narrow(ef14())};
  std::size_t turn = 0;
  for (const auto& options : all_options()) {
    for (const double density : {0.001, 0.02, 0.3, 1.0}) {
      fused_is_unfused<TypeParam>(dgc(), options, DType::fp32, density, Data::wild, counts);
      ++turn;
      fused_is_unfused<TypeParam>(feedbacks[turn % 2], options, DType::bf16, density, Data::wild, counts);
      fused_is_unfused<TypeParam>(estimates[turn % 3], options, DType::fp32, density, Data::wild, counts);
      if (this->HasFatalFailure()) return;
    }
    ++turn;  // four densities: each of two, and of three, has its turn at all of them
  }
}

// Dyadic gradients, m = 1/2 over few steps: no sum rounds, so sent + kept equals fed, exactly, whatever the wire cuts or rounds.
TYPED_TEST(TopKStream, ConservesEveryCoordinateToTheBit) {
  const std::vector<std::size_t> counts = {1, 33, 5000};
  for (const auto& recursion : {ef14(), dgc(0.5f), dgc(0.5f, false, false), dgc(0.5f, true), dgc(0.5f, true, false)}) {
    for (const auto& options : all_options()) {
      for (const DType dtype : kWires) {
        TopKRig rig(TypeParam::kBackend, options, recursion, counts, 0.05);
        std::mt19937 random(5);
        std::vector<std::vector<double>> fed, sent, momentum;
        for (const auto n : counts) fed.emplace_back(n, 0.0), sent.emplace_back(n, 0.0), momentum.emplace_back(n, 0.0);
        for (rig.step = 0; rig.step < 5; ++rig.step) {
          std::vector<float> grad(rig.numel);
          for (auto& x : grad) x = float(int(random() % 255) - 127) / 8;
          if (dtype == DType::fp32) grad[rig.segments[2].first + 7] = 70000;  // beyond fp16: what is cut must stay
          rig.stream(oracle::to_bytes(grad, dtype), dtype);
          const auto entries = rig.entries();
          for (std::size_t s = 0; s < counts.size(); ++s) {
            for (std::size_t i = 0; i < counts[s]; ++i) {
              const double g = grad[rig.segments[s].first + i], m = recursion.momentum;
              double& u = momentum[s][i];
              if (recursion.kind == Recursion::Kind::error_feedback)
                fed[s][i] += g;
              else if (!recursion.nesterov)
                fed[s][i] += u = m * u + g;
              else
                u = m * (u + g), fed[s][i] += u + g;
            }
            for (const auto& e : entries[s]) {
              sent[s][e.index] += e.value;
              if (recursion.mask) momentum[s][e.index] = 0;
            }
          }
        }
        double total = 0;
        for (std::size_t s = 0; s < counts.size(); ++s) {
          for (std::size_t i = 0; i < counts[s]; ++i) {
            ASSERT_EQ(sent[s][i] + rig.residual[s][i], fed[s][i])
                << describe(recursion) << describe(options) << " n " << counts[s] << " element " << i;
            total += std::fabs(sent[s][i]);
          }
        }
        ASSERT_GT(total, 1000) << "nothing was sent";
      }
    }
  }
}

TYPED_TEST(TopKStream, DeadElementsHaveNoState) {
  const std::vector<std::size_t> counts = {70, 66000};
  for (const auto& recursion : {no_feedback(), ef14(), dgc(), ef21(0.25f), econtrol(0.25f)}) {
    for (const auto& options : all_options()) {
      TopKRig rig(TypeParam::kBackend, options, recursion, counts, 0.1);
      std::vector<std::vector<std::uint8_t>> live;
      std::mt19937 random(9);
      for (std::size_t s = 0; s < counts.size(); ++s) {
        live.emplace_back(counts[s] / 8 + 1);
        for (auto& byte : live[s]) byte = std::uint8_t(random());
      }
      for (std::size_t s = 0; s < counts.size(); ++s) {
        rig.segments[s].live = live[s].data();
        for (auto* array : rig.arrays())
          for (std::size_t i = 0; i < counts[s]; ++i) (*array)[s][i] = float(i % 7);
      }
      const auto grad = gradients(rig.numel, 3, true);
      rig.stream(grad);
      const auto entries = rig.entries();
      for (std::size_t s = 0; s < counts.size(); ++s) {
        const auto alive = [&](std::size_t i) { return ((live[s][i / 8] >> (i % 8)) & 1u) != 0; };
        EXPECT_GT(entries[s].size(), 0u);
        for (const auto& e : entries[s]) EXPECT_TRUE(alive(e.index)) << describe(recursion) << describe(options);
        for (const auto* array : rig.arrays())
          for (std::size_t i = 0; i < counts[s]; ++i)
            ASSERT_TRUE(alive(i) || (*array)[s][i] == float(i % 7)) << describe(recursion) << " element " << i << " of segment " << s;
      }
    }
  }
}

TYPED_TEST(TopKStream, NonfiniteGradientsRaiseTheFlagAndEnterNoState) {
  TopKOptions options;
  options.exact = true;
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    for (const auto& recursion : {ef14(), dgc(), dgc(0.5f, true), ef21(), ef21(0.25f), econtrol(), econtrol(0.1f)}) {
      TopKRig clean(TypeParam::kBackend, options, recursion, {100}, 0.05), poisoned(TypeParam::kBackend, options, recursion, {100}, 0.05);
      clean.age(4, false), poisoned.age(4, false);
      auto grad = gradients(clean.numel, 1, false);
      grad[51] = has_estimate(recursion) ? clean.estimate[0][50] : 0;  // no news
      clean.stream(grad);
      grad[51] = bad;
      poisoned.stream(grad);
      EXPECT_EQ(clean.flags, 0u);
      EXPECT_EQ(poisoned.flags, unsigned(kFlagNonfinite));
      EXPECT_EQ(poisoned.entries(), clean.entries());
      for (std::size_t a = 0; a < clean.arrays().size(); ++a) EXPECT_EQ(*poisoned.arrays()[a], *clean.arrays()[a]) << describe(recursion);
    }
  }
}

TYPED_TEST(TopKStream, AnOverflowingAccumulatorSitsTheStepOut) {
  for (const bool exact : {false, true}) {
    TopKOptions options;
    options.exact = exact;
    TopKRig rig(TypeParam::kBackend, options, dgc(0.5f), {64}, 0.1);
    rig.residual[0][20] = 3e38f;
    rig.u[0][20] = 1.0f;
    std::vector<float> grad(rig.numel, 0.5f);
    grad[rig.segments[0].first + 20] = 3e38f;
    rig.stream(grad);
    EXPECT_EQ(rig.flags, unsigned(kFlagNonfinite));
    EXPECT_EQ(rig.residual[0][20], 3e38f);
    EXPECT_EQ(rig.u[0][20], 1.0f);
    const auto entries = rig.entries();
    for (const auto& e : entries[0]) EXPECT_NE(e.index, 20u);
  }
}

TYPED_TEST(TopKStream, FlagsGoIntoTheHeaderAndBack) {
  TopKRig rig(TypeParam::kBackend, {}, dgc(), {}, 0.1);
  rig.stream(oracle::to_bytes({}, DType::fp32), DType::fp32, kFlagJoined);
  EXPECT_EQ(rig.flags, unsigned(kFlagJoined));
  EXPECT_EQ(rig.payload.size(), 64u);
  std::uint32_t header;
  std::memcpy(&header, &rig.payload[8], 4);
  EXPECT_EQ(header, unsigned(kFlagJoined));
}

TYPED_TEST(TopKStream, TakeBackReturnsWhatWasSent) {
  for (const auto& recursion : {ef14(), dgc(0.5f), dgc(0.5f, true, false), econtrol(), econtrol(0.5f)}) {
    for (const auto& options : all_options()) {
      for (const auto index : {TopKOptions::Index::u32, TopKOptions::Index::u16, TopKOptions::Index::bitmap}) {
        TopKOptions with = options;
        with.index = index;
        TopKRig rig(TypeParam::kBackend, with, recursion, {33, 70000}, 0.02);
        std::vector<float> grad(rig.numel);
        std::mt19937 random(4);
        for (auto& x : grad) x = float(int(random() % 511) - 255) / 16;  // dyadic: the bits come back
        rig.stream(grad);
        rig.take_back();
        for (std::size_t s = 0; s < 2; ++s) {
          for (std::size_t i = 0; i < rig.residual[s].size(); ++i) {
            const auto e = oracle::update(recursion, grad[rig.segments[s].first + i], 1, {});
            ASSERT_EQ(rig.residual[s][i], e.held.residual) << describe(recursion) << describe(with) << " element " << i;
          }
        }
      }
    }
  }
  TopKRig none(TypeParam::kBackend, {}, no_feedback(), {100}, 0.1);
  none.stream(gradients(none.numel, 1, false));
  none.take_back();  // nothing to return to
}

// Without feedback nothing stays, and a codec that is handed nothing but a message does the same.
TYPED_TEST(TopKStream, NoFeedbackSendsRoundedGradients) {
  for (const auto& options : all_options()) {
    TopKRig rig(TypeParam::kBackend, options, no_feedback(), {5000}, 0.03);
    const auto grad = gradients(rig.numel, 8, false);
    rig.stream(grad);
    const auto entries = rig.entries()[0];
    ASSERT_GT(entries.size(), 100u);
    for (const auto& e : entries) EXPECT_EQ(e.value, oracle::sent_value(grad[1 + e.index], options.wire));
  }
}

}  // namespace
}  // namespace thinwire
