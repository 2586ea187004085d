// How much a reducer holds beside its state: at most world + 1 contributions (the payload and what travels beside it) and one largest
// bucket in fp32. Ranks are threads of this process, so the heap of all of them is counted.

#include <gtest/gtest.h>
#include <malloc.h>

#include <algorithm>

#include "collectives/ownership.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

constexpr std::size_t kMiB = std::size_t(1) << 20;

std::size_t heap() {
  const auto info = mallinfo2();
  return info.uordblks + info.hblkhd;
}

struct MemoryCase {
  const char* config;
  DType dtype;
  std::vector<Parameter> model;
};

std::size_t numel(const Parameter& parameter) {
  std::size_t n = 1;
  for (const std::size_t extent : parameter.shape) n *= extent;
  return n;
}

class ReducerMemory : public testing::TestWithParam<MemoryCase> {};

TEST_P(ReducerMemory, IsBoundedByContributionsAndOneBucket) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer's allocator does not count";
#endif
  const MemoryCase& given = GetParam();
  constexpr int kWorld = 3;
  std::size_t count = 0, beside = 0;
  Ids ids;
  for (const Parameter& parameter : given.model) {
    const std::size_t n = numel(parameter);
    if (parameter.shape.size() < 2) beside += owned_part(n, kWorld, 0).count * size_of(given.dtype);
    count += n;
    ids.push_back(std::uint32_t(ids.size()));
  }
  std::size_t used = 0, payload = 0;
  run_ranks(kWorld, [&](std::shared_ptr<Communicator> communicator) {
    GradBuffer grad(given.dtype, count);
    for (std::size_t i = 0; i < count; ++i) grad.set(i, float((i * 7 + std::size_t(communicator->rank())) % 61) - 30);
    communicator->barrier();
    const std::size_t before = heap();
    communicator->barrier();
    ReducerOptions options;
    if (communicator->rank() == 0) options.record_payload = [&](std::uint64_t, ConstBytes wire) { payload = wire.size; };
    GradientReducer reducer(communicator, Config::parse(given.config), given.model, options);
    for (int step = 0; step < 2; ++step) reducer.reduce(ids, grad.view()).wait();
    communicator->barrier();
    if (communicator->rank() == 0) used = (heap() - before) / kWorld;
    communicator->barrier();
  });
  ASSERT_GT(payload, 0u);
  // Three scratch buffers, and without state a fourth, are rounded up to huge pages; the rest is plans and counts.
  const bool stateless = std::string(given.config).find("feedback=none") != std::string::npos;
  const std::size_t slack = (stateless ? 4 : 3) * 2 * kMiB + kMiB / 2;
  EXPECT_LE(used, (kWorld + 1) * (payload + beside) + count * sizeof(float) + slack);
  EXPECT_GE(used, kWorld * payload);  // the heap is what is counted
}

INSTANTIATE_TEST_SUITE_P(
    Models, ReducerMemory,
    testing::Values(MemoryCase{"dgc:density=0.01", DType::fp32, {{"w", {2048, 4096}}}},
                    MemoryCase{"codec=topk:density=0.05 feedback=ef14", DType::bf16, {{"w", {2048, 4096}}, {"bias", {5000}}}},
                    MemoryCase{"dgc:density=0.01,select=exact exchange=gather", DType::fp32, {{"w", {2048, 4096}}}},
                    MemoryCase{"dgc:density=0.25,select=exact exchange=gather", DType::fp32, {{"w", {2048, 4096}}}},
                    MemoryCase{"dgc:density=0.33,select=exact exchange=gather", DType::fp32, {{"w", {2048, 4096}}}},
                    MemoryCase{"codec=topk:density=0.5,select=exact feedback=ef14 exchange=gather", DType::fp32, {{"w", {2048, 4096}}}},
                    // Almost all of it travels through owners, with momentum as fp32 and without state as it is.
                    MemoryCase{"dgc:density=0.01", DType::fp32, {{"w", {64, 64}}, {"big", {12 * kMiB + 5}}}},
                    MemoryCase{"codec=topk:density=0.01 feedback=ef14", DType::bf16, {{"w", {64, 64}}, {"big", {12 * kMiB + 5}}}},
                    MemoryCase{"codec=topk:density=0.05 feedback=none", DType::fp32, {{"w", {2048, 4096}}, {"bias", {5000}}}},
                    MemoryCase{"onebit_adam:freeze=1", DType::fp32, {{"w", {2048, 4096}}}},
                    MemoryCase{"codec=sign feedback=ef14", DType::bf16, {{"w", {2048, 4096}}, {"bias", {5000}}}}),
    [](const auto& one) { return std::string(one.param.model.back().name) + std::to_string(one.index); });

}  // namespace
}  // namespace thinwire::test
