// What the C++ trainer's Adam says of its updates, and of tensors that had no gradient until the freeze; its numbers are compared with
// Python's in tests/python/test_launch.py.

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "launch/trainer/adam.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::launch {
namespace {

constexpr std::int64_t kRows = 8, kColumns = 16;

/// Adam over one rank's two tensors, of which only the first has gradients until the freeze at step 2.
struct Training {
  std::vector<torch::Tensor> parameters = {torch::zeros({kRows, kColumns}), torch::zeros({kRows, kColumns})};
  std::unique_ptr<GradientReducer> reducer;
  std::unique_ptr<Adam> adam;

  explicit Training(std::shared_ptr<Communicator> communicator) {
    const Config config = Config::parse("onebit_adam:freeze=2 min_numel=1");
    const std::vector<std::size_t> shape = {kRows, kColumns};
    ReducerOptions options;
    options.momentum_elsewhere = true;
    reducer = std::make_unique<GradientReducer>(std::move(communicator), config, std::vector<Parameter>{{"used", shape}, {"spare", shape}},
                                                options);
    adam = std::make_unique<Adam>(parameters, *reducer, config, 0.999, 0.0);
  }
  /// Of a gradient that is `value` in all of the first tensor. @returns whether it froze.
  bool step(float value) {
    const torch::Tensor grad = torch::cat({torch::full({kRows * kColumns}, value), torch::zeros({kRows * kColumns})});
    const std::uint32_t ids[] = {0, 1};
    reducer->reduce(ids, {reinterpret_cast<std::byte*>(grad.data_ptr<float>()), std::size_t(grad.nbytes()), DType::fp32, Place::host, 0})
        .wait();
    for (std::size_t i = 0; i < 2; ++i)
      parameters[i].mutable_grad() =
          grad.slice(0, std::int64_t(i) * kRows * kColumns, std::int64_t(i + 1) * kRows * kColumns).view({kRows, kColumns}).clone();
    return adam->step(1e-3);
  }
};

TEST(TrainerAdam, NamesTensorsWithoutGradientsAtTheFreeze) {
  test::run_ranks(1, [](std::shared_ptr<Communicator> communicator) {
    Training training(std::move(communicator));
    EXPECT_FALSE(training.step(1));
    EXPECT_EQ(training.adam->take_notice(), "");
    EXPECT_TRUE(training.step(1));
    const std::string said = training.adam->take_notice();
    EXPECT_NE(said.find("at the freeze, step 2, these have had no gradient: 'spare'."), std::string::npos) << said;
    EXPECT_EQ(training.adam->take_notice(), "") << "said twice";
  });
}

TEST(TrainerAdam, KeepsTheLargestUpdateAndSaysAnUnusualOneOnce) {
  test::run_ranks(1, [](std::shared_ptr<Communicator> communicator) {
    Training training(std::move(communicator));
    for (int i = 0; i < 2; ++i) training.step(1);
    training.adam->take_notice();
    double m = 1 - 0.9 * 0.9, largest = 0;  // Adam's without its correction, which is 1 for a gradient of 1
    for (int step = 3; step < 12; ++step) {
      const double g = step == 6 ? 1000 : 1;
      training.step(float(g));
      m = 0.9 * m + 0.1 * g;
      largest = std::max(largest, m / (1 - std::pow(0.9, step)));
      EXPECT_NEAR(training.adam->max_update(false), largest, 1e-4 * largest) << "step " << step;
      const std::string said = training.adam->take_notice();
      if (step != 6) {
        EXPECT_EQ(said, "") << "step " << step;
        continue;
      }
      EXPECT_NE(said.find("an update of 214 times the learning rate by step 6;"), std::string::npos) << said;
      EXPECT_NE(said.find("frozen at step 2"), std::string::npos) << said;
    }
    EXPECT_GT(largest, kUnusualUpdate);
  });
}

}  // namespace
}  // namespace thinwire::launch
