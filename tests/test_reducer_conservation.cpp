// Nothing is lost: what was fed in is what was sent plus what the state holds, per coordinate and rank, for every recursion, wire,
// selection and index form, non-finite steps among them. Payloads are read by the tests' own reader, states are followed by the tests' own
// recursion.

#include <gtest/gtest.h>

#include <map>

#include "tests/payload_reader.hpp"
#include "tests/reducer_oracle.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

struct Feedback {
  std::string text;
  Oracle::Options options;
};

const Feedback kFeedbacks[] = {
    {"ef14", {.feedback = Oracle::Feedback::ef14, .rate = 1.0f}},
    {"ef14:decay=0.5", {.feedback = Oracle::Feedback::ef14, .rate = 0.5f}},
    {"dgc:momentum=0.5", {.feedback = Oracle::Feedback::dgc, .rate = 0.5f}},
    {"dgc:momentum=0.5,mask=0", {.feedback = Oracle::Feedback::dgc, .rate = 0.5f, .mask = false}},
    {"dgc:momentum=0.5,nesterov=1", {.feedback = Oracle::Feedback::dgc, .rate = 0.5f, .nesterov = true}},
    {"none", {.feedback = Oracle::Feedback::none}},
};
const std::pair<const char*, DType> kWires[] = {{"fp32", DType::fp32}, {"bf16", DType::bf16}, {"fp16", DType::fp16}};

const std::vector<Parameter> kParameters = {{"a", {33, 31}}, {"bias", {17}}, {"b", {2, 5, 7}}, {"c", {1, 6000}}};
const std::vector<std::size_t> kNumel = {1023, 17, 70, 6000};
constexpr double kDensity = 0.05;

std::size_t k_of(std::size_t n) { return std::size_t(std::max(1.0, std::ceil(kDensity * double(n) - 1e-9))); }

/// Plays `steps` steps and follows them: the oracle takes what was sent from the payloads, everything else from its own recursion.
void follow(const Feedback& feedback, const std::string& wire, DType wire_type, bool exact, const std::string& index, int world,
            DType dtype, const std::function<Vec(int, int, std::uint32_t)>& grad, int steps) {
  SCOPED_TRACE(feedback.text + " wire=" + wire + " exact=" + std::to_string(exact) + " index=" + index + " world=" + std::to_string(world));
  const std::vector<Ids> buckets = {{3, 1}, {2, 0}};
  const Outcome out = play({.world = world,
                            .config = "codec=topk:density=0.05,wire=" + wire + ",select=" + (exact ? "exact" : "sampled") +
                                      ",index=" + index + " feedback=" + feedback.text + " exchange=gather min_numel=1",
                            .parameters = kParameters,
                            .steps = steps,
                            .dtype = dtype,
                            .grad = grad,
                            .buckets = [&](int) { return buckets; },
                            .keep_payloads = true});
  Oracle::Options options = feedback.options;
  options.wire = wire_type;
  options.dtype = dtype;
  Oracle oracle(world, kNumel, options);
  const PayloadForm form{wire_type, index, exact, kDensity};
  using Way = Oracle::Way;
  for (int t = 0; t < steps; ++t) {
    std::map<std::pair<int, std::uint32_t>, Oracle::Entries> sent;
    Oracle::Step step{.grad = {}, .way = {Way::sparse, Way::never, Way::sparse, Way::sparse}, .k = {}, .buckets = buckets, .joined = {}};
    for (const std::size_t n : kNumel) step.k.push_back(k_of(n));
    for (int r = 0; r < world; ++r) {
      auto& grads = step.grad.emplace_back();
      for (std::uint32_t p = 0; p < 4; ++p) grads.push_back(grad(t, r, p));
      const auto& payloads = out.payloads[std::size_t(t)][std::size_t(r)];
      ASSERT_EQ(payloads.size(), 2u);
      sent[{r, 3}] = read_payload(payloads[0], {6000}, form)[0];
      const auto second = read_payload(payloads[1], {70, 1023}, form);
      sent[{r, 2}] = second[0];
      sent[{r, 0}] = second[1];
      for (const std::uint32_t p : {0u, 2u, 3u}) {
        const std::size_t k = k_of(kNumel[p]), most = exact ? k : std::min(kNumel[p], k + (k + 3) / 4);
        ASSERT_LE((sent[{r, p}].size()), most);
        for (std::size_t i = 0; i < sent[{r, p}].size(); ++i) {
          ASSERT_NE((sent[{r, p}][i].second), 0.0f);
          if (i > 0) { ASSERT_LT((sent[{r, p}][i - 1].first), (sent[{r, p}][i].first)); }
        }
      }
    }
    if (!exact) step.sent = [&](int r, std::uint32_t p) { return sent[{r, p}]; };
    const Oracle::Arrays mean = oracle.step(step);
    for (int r = 0; r < world; ++r)
      for (std::uint32_t p = 0; p < 4; ++p)
        ASSERT_TRUE(same_values(out.mean[std::size_t(t)][std::size_t(r)][p], mean[p]))
            << "step " << t << " rank " << r << " " << kParameters[p].name;
  }
  for (int r = 0; r < world; ++r) {
    const auto& state = out.state[std::size_t(r)].parameters;
    for (std::uint32_t p = 0; p < 4; ++p) {
      const auto& arrays = state.at(kParameters[p].name);
      std::map<std::string, Vec> expected;
      if (options.feedback == Oracle::Feedback::ef14 && p != 1) expected["residual"] = oracle.residual(r, p);
      if (options.feedback == Oracle::Feedback::dgc) expected["momentum"] = oracle.momentum(r, p);
      if (options.feedback == Oracle::Feedback::dgc && p != 1) expected["accumulated"] = oracle.residual(r, p);
      if (!exact && p != 1) expected["threshold"] = {0};
      ASSERT_EQ(arrays.size(), expected.size());
      for (const auto& [name, values] : expected) {
        if (name == "threshold") continue;  // the selection's own business
        EXPECT_TRUE(same_values(arrays.at(name), values)) << "rank " << r << " " << kParameters[p].name << "." << name;
      }
    }
  }
  EXPECT_EQ(out.stats[0].nonfinite_steps, std::uint64_t(oracle.bad_steps()));
}

/// Dyadic numbers, and at steps 2 and 3 a NaN in a compressed tensor of rank 0, at 5 an infinity in a passenger of the last rank.
std::function<Vec(int, int, std::uint32_t)> dyadic_with_accidents(int world, bool accidents) {
  const auto plain = numbers(dyadic_number, 5, kParameters);
  return [=](int step, int rank, std::uint32_t p) {
    Vec g = plain(step, rank, p);
    if (!accidents) return g;
    if ((step == 2 || step == 3) && rank == 0 && p == 0) g[77] = std::numeric_limits<float>::quiet_NaN();
    if (step == 5 && rank == world - 1 && p == 1) g[16] = -std::numeric_limits<float>::infinity();
    return g;
  };
}

class Conservation : public testing::TestWithParam<int> {};

TEST_P(Conservation, EveryWireSelectionAndIndexForm) {
  const Feedback& feedback = kFeedbacks[GetParam()];
  for (const auto& [wire, type] : kWires)
    for (const bool exact : {true, false})
      for (const int world : {1, 2, 3}) {  // each wire meets each index form in one of the worlds
        const char* const forms[] = {"u32", "u16", "bitmap"};
        follow(feedback, wire, type, exact, forms[(world + int(type)) % 3], world, DType::fp32, dyadic_with_accidents(world, true), 7);
        if (HasFatalFailure()) return;
      }
}

TEST_P(Conservation, EveryGradientType) {
  for (const DType dtype : {DType::bf16, DType::fp16})
    follow(kFeedbacks[GetParam()], "bf16", DType::bf16, true, "u32", 3, dtype, dyadic_with_accidents(3, true), 8);
}

// Not dyadic, heavy tails: every rounding must fall as it does in the plain loops.
TEST_P(Conservation, RealNumbers) {
  for (const bool exact : {true, false})
    follow(kFeedbacks[GetParam()], "fp16", DType::fp16, exact, "u16", 4, DType::fp32, numbers(real_number, 9, kParameters), 12);
}

INSTANTIATE_TEST_SUITE_P(Feedbacks, Conservation, testing::Range(0, int(std::size(kFeedbacks))),
                         [](const auto& test) { return "Feedback" + std::to_string(test.param); });

// The same claim without following any recursion. EF14: Σ_t Σ_r g = N Σ_t mean + Σ_r residual, to the bit: worlds are powers of two, so the
// division is exact, and all numbers are multiples of 1/4 far below 2^22.
TEST(ReducerConservation, SumsOverARunAreExact) {
  for (const int world : {1, 2, 4})
    for (const char* select : {"exact", "sampled"})
      for (const auto& [wire, type] : kWires) {
        const int steps = 20;
        const auto grad = dyadic_with_accidents(world, true);
        const Outcome out = play({.world = world,
                                  .config = std::string("codec=topk:density=0.05,wire=") + wire + ",select=" + select +
                                            " feedback=ef14 exchange=gather min_numel=1",
                                  .parameters = kParameters,
                                  .steps = steps,
                                  .grad = grad});
        EXPECT_EQ(out.stats[0].nonfinite_steps, 3u);
        for (const std::uint32_t p : {0u, 2u, 3u}) {
          Vec fed(kNumel[p]), delivered(kNumel[p]), held(kNumel[p]);
          for (int t = 0; t < steps; ++t)
            for (int r = 0; r < world; ++r) {
              const Vec g = grad(t, r, p);
              for (std::size_t i = 0; i < g.size(); ++i)
                fed[i] += std::isfinite(g[i]) ? g[i] : 0;  // a NaN is no news; the rest of its step returns
            }
          for (int t = 0; t < steps; ++t) {
            const Vec& mean = out.mean[std::size_t(t)][0][p];
            for (std::size_t i = 0; i < mean.size(); ++i) delivered[i] += std::isfinite(mean[i]) ? mean[i] * float(world) : 0;
          }
          for (int r = 0; r < world; ++r)
            for (std::size_t i = 0; i < held.size(); ++i) held[i] += out.array(r, kParameters[p].name, "residual")[i];
          for (std::size_t i = 0; i < fed.size(); ++i)
            ASSERT_EQ(fed[i], delivered[i] + held[i]) << wire << select << " " << p << " element " << i;
        }
      }
}

}  // namespace
}  // namespace thinwire::test
