// Once the layout has settled a step allocates nothing: on no rank, in no thread, whatever the config.

#include <gtest/gtest.h>

#include "tests/allocation_count.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

const std::vector<Parameter> kModel = {{"w", {60, 100}}, {"bias", {60}}, {"v", {9, 300}}, {"big", {17000}}};

void expect_no_allocation(const std::string& config, const ReducerOptions& reducer_options, DType dtype) {
  run_ranks(3, [&](std::shared_ptr<Communicator> communicator) {
    const int rank = communicator->rank();
    GradientReducer reducer(communicator, Config::parse(config), kModel, reducer_options);
    const Ids first = {3, 2}, second = {1, 0};
    GradBuffer a(dtype, 19700), b(dtype, 6060);
    const auto fill = [&](GradBuffer& grad, std::size_t n, int step, bool bad) {
      for (std::size_t i = 0; i < n; ++i) grad.set(i, float((i * 7 + std::size_t(step + rank)) % 61) - 30);
      if (bad) grad.set(n / 2, std::numeric_limits<float>::quiet_NaN());
    };
    const auto step = [&](int t) {
      fill(a, 19700, t, false);
      fill(b, 6060, t, t % 5 == 4 && rank == 1);  // bad steps take the same way
      ReduceOptions options;
      options.joined = t % 7 == 6 && rank == 2;
      Work one = reducer.reduce(first, a.view(), Stream::host(), options), two = reducer.reduce(second, b.view(), Stream::host(), options);
      two.wait();
      one.wait();
    };
    for (int t = 0; t < 10; ++t) step(t);  // every kind of step once; settings have settled
    communicator->barrier();
    const long before = allocations();
    communicator->barrier();
    for (int t = 10; t < 40; ++t) step(t);
    communicator->barrier();
    const long after = allocations();
    communicator->barrier();
    EXPECT_EQ(after, before) << config << (reducer_options.step_verdict ? " step verdict" : "")
                             << (reducer_options.inline_queue ? " inline" : "");
  });
}

TEST(ReducerAllocations, NoneInAStep) {
  for (const char* config :
       {"codec=topk:density=0.02 feedback=dgc exchange=gather min_numel=1",
        "codec=topk:density=0.02,select=exact,wire=bf16 feedback=dgc:clip_norm=1 exchange=gather min_numel=1 check_every=1",
        "codec=topk:density=0.05,wire=fp16,index=bitmap feedback=ef14 min_numel=1 policy=warmup:steps=1,densities=0.9/0.2",
        "codec=topk:density=0.02 feedback=dgc exchange=gather min_numel=1 start_step=1000", "codec=none",
        "codec=sign feedback=ef14 min_numel=1", "codec=sign feedback=none min_numel=1", "onebit_adam:freeze=3,clip_norm=1 min_numel=1",
        "codec=sign feedback=ef14 target=momentum:freeze=2 exchange=gather min_numel=1"})
    for (const bool verdict : {false, true})
      for (const bool inline_queue : {false, true}) {
        ReducerOptions options;
        options.step_verdict = verdict;
        options.inline_queue = inline_queue;
        expect_no_allocation(config, options, inline_queue ? DType::fp32 : DType::bf16);
      }
}

// The counter counts: a layout that changes does allocate.
TEST(ReducerAllocations, ANewLayoutIsSeen) {
  run_ranks(1, [](std::shared_ptr<Communicator> communicator) {
    GradientReducer reducer(communicator, Config::parse("dgc:density=0.02 exchange=gather min_numel=1"), kModel);
    Vec all(25760);
    const Ids one = {0, 1, 2, 3}, other = {3, 2, 1, 0};
    reducer.reduce(one, host_bytes(all.data(), all.size())).wait();
    const long before = allocations();
    reducer.reduce(other, host_bytes(all.data(), all.size())).wait();
    EXPECT_GT(allocations(), before);
  });
}

}  // namespace
}  // namespace thinwire::test
