// Ratio policies: which density holds at which step.

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "compressors/core/error.hpp"
#include "compressors/core/registry.hpp"
#include "compressors/ratio/warmup.hpp"

namespace thinwire {
namespace {

constexpr std::uint64_t kForever = std::numeric_limits<std::uint64_t>::max();

std::vector<double> sequence(const RatioPolicy& policy, std::uint64_t count) {
  std::vector<double> densities;
  for (std::uint64_t step = 0; step < count; ++step) densities.push_back(policy.setting(step, 0).density);
  return densities;
}

std::vector<double> sequence(const std::string& config, std::uint64_t count) {
  return sequence(*make_policy(Config::parse(config)), count);
}

TEST(Policy, ThePapersSequence) {
  // Lin et al. 2018: sparsity 75, 93.75, 98.4375, 99.6, 99.9 %, here two steps each. Decimal constants of the paper, so equality is exact.
  EXPECT_EQ(sequence("dgc:density=0.001,warmup_steps=2", 12),
            (std::vector<double>{0.25, 0.25, 0.0625, 0.0625, 0.015625, 0.015625, 0.004, 0.004, 0.001, 0.001, 0.001, 0.001}));
  EXPECT_EQ(sequence("codec=topk:density=0.001 policy=warmup:steps=1", 6),
            (std::vector<double>{0.25, 0.0625, 0.015625, 0.004, 0.001, 0.001}));
}

TEST(Policy, EntriesBelowTheFinalDensityAreLeftOut) {
  EXPECT_EQ(sequence("dgc:density=0.01,warmup_steps=1", 5), (std::vector<double>{0.25, 0.0625, 0.015625, 0.01, 0.01}));
  EXPECT_EQ(sequence("dgc:density=0.004,warmup_steps=1", 5), (std::vector<double>{0.25, 0.0625, 0.015625, 0.004, 0.004}));
  EXPECT_EQ(sequence("dgc:density=0.1,warmup_steps=3", 5), (std::vector<double>{0.25, 0.25, 0.25, 0.1, 0.1}));
  EXPECT_EQ(sequence("dgc:density=0.5,warmup_steps=3", 2), (std::vector<double>{0.5, 0.5}));
  // An entry equal to the final density is not below it.
  EXPECT_EQ(sequence("codec=topk:density=0.1 policy=warmup:densities=0.1/0.5,steps=1", 3), (std::vector<double>{0.1, 0.5, 0.1}));
  // Left out before counting: the entries after a gap move up instead of repeating the final density.
  EXPECT_EQ(sequence("codec=topk:density=0.1 policy=warmup:densities=0.05/0.5/0.01/0.2,steps=2", 6),
            (std::vector<double>{0.5, 0.5, 0.2, 0.2, 0.1, 0.1}));
}

TEST(Policy, NoPolicyIsTheCodecsOwnDensity) {
  EXPECT_EQ(sequence("dgc:density=0.02", 3), (std::vector<double>{0.02, 0.02, 0.02}));
  EXPECT_EQ(make_policy(Config::parse("dgc:density=0.02"))->setting(kForever, 9).density, 0.02);
  EXPECT_EQ(make_policy(Config())->setting(0, 0).density, 1.0);
}

TEST(Policy, AllParametersAlikeAndTheFutureIsFinal) {
  const auto policy = make_policy(Config::parse("dgc:density=0.001,warmup_steps=5"));
  for (const std::uint32_t parameter : {0u, 1u, 77u, std::numeric_limits<std::uint32_t>::max()}) {
    EXPECT_EQ(policy->setting(4, parameter).density, 0.25);
    EXPECT_EQ(policy->setting(5, parameter).density, 0.0625);
    EXPECT_EQ(policy->setting(19, parameter).density, 0.004);
    EXPECT_EQ(policy->setting(20, parameter).density, 0.001);
    EXPECT_EQ(policy->setting(kForever, parameter).density, 0.001);
  }
}

TEST(Policy, EnormousStepsDoNotOverflow) {
  const WarmupPolicy policy({0.5, 0.25}, kForever, 0.125);
  EXPECT_EQ(policy.setting(0, 0).density, 0.5);
  EXPECT_EQ(policy.setting(kForever - 1, 0).density, 0.5);
  EXPECT_EQ(policy.setting(kForever, 0).density, 0.25);
}

TEST(Policy, BadArgumentsAreRefused) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(WarmupPolicy({0.5}, 0, 0.1), Error);
  for (const double wrong : {0.0, -0.5, 1.5, nan}) {
    EXPECT_THROW(WarmupPolicy({0.5}, 1, wrong), Error) << wrong;
    EXPECT_THROW(WarmupPolicy({0.5, wrong}, 1, 0.1), Error) << wrong;
  }
}

}  // namespace
}  // namespace thinwire
