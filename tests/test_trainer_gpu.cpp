// Which rank of the C++ trainer takes which GPU; the rest of that file needs GPUs, or MPI's ranks.

#include <gtest/gtest.h>

#include "launch/trainer/gpu.hpp"

namespace thinwire::launch {
namespace {

TEST(TrainerGpu, OneRankTakesOneGpu) {
  for (int place = 0; place < 4; ++place) {
    const GpuChoice choice = choose_gpu(place, 4, 8, false);
    EXPECT_EQ(choice.device, place);
    EXPECT_EQ(choice.refusal, "");
  }
}

TEST(TrainerGpu, MoreRanksThanGpusAreRefused) {
  EXPECT_NE(choose_gpu(0, 3, 2, false).refusal.find("3 ranks for 2 GPUs: start one rank per GPU"), std::string::npos);
  EXPECT_NE(choose_gpu(0, 2, 1, false).refusal.find("2 ranks for 1 GPU:"), std::string::npos);
  EXPECT_NE(choose_gpu(0, 1, 0, false).refusal.find("no GPU"), std::string::npos);
}

TEST(TrainerGpu, RanksThatAreHostsOfTheirOwnShareGpus) {
  EXPECT_EQ(choose_gpu(1, 2, 1, true).device, 0);
  EXPECT_EQ(choose_gpu(4, 5, 3, true).device, 1);
  EXPECT_EQ(choose_gpu(4, 5, 3, true).refusal, "");
  EXPECT_NE(choose_gpu(0, 2, 0, true).refusal, "");  // none is none, whoever shares it
}

}  // namespace
}  // namespace thinwire::launch
