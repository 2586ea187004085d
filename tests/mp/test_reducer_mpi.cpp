// The reducer under mpirun: means, payloads, state and bytes are those of the same ranks over loopback, to the bit.

#include <gtest/gtest.h>

#include <cmath>
#include <thread>

#include "collectives/mpi/mpi.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

int of_world(int (*what)(MPI_Comm, int*)) {
  int number = 0;
  what(MPI_COMM_WORLD, &number);
  return number;
}

// Tails, parts that are short or empty, one of several blocks; two that stay dense, below and above what a gather takes raw.
const std::vector<Parameter> kParameters = {{"a", {33, 31}},  {"bias", {17}}, {"b", {2, 5, 7}},
                                            {"c", {3, 6000}}, {"d", {2, 4}},  {"table", {20001}}};
const std::vector<Ids> kOneBucket = {{0, 1, 2, 3, 4, 5}}, kSeveral = {{5}, {3}, {1, 4, 2}, {0}}, kMixed = {{4, 3, 5}, {0, 1}, {2}};

const char* const kConfigs[] = {
    "codec=sign feedback=ef14 exchange=two_phase",
    "codec=sign:scale=l2,block=tensor feedback=none exchange=two_phase",
    "onebit_adam:freeze=2,block=64",
    "codec=sign:block=512 feedback=ef14 exchange=gather",
    "dgc:density=0.05 exchange=gather",
};

// Dyadic: a dense step is summed by the transport, in an order of its own.
Vec gradient(int step, int rank, std::uint32_t p) {
  static const auto grad = numbers(dyadic_number, 11, kParameters);
  return grad(step, rank, p);
}

struct Mpi : testing::Test {
  const int world = of_world(MPI_Comm_size), rank = of_world(MPI_Comm_rank);

  Scenario scenario(const std::string& config) const {
    return {.world = world,
            .config = config + " min_numel=1 timeout=60",
            .parameters = kParameters,
            .steps = 5,
            .grad = gradient,
            .buckets = [](int step) { return step == 0       ? kOneBucket
                                             : step % 2 == 1 ? kSeveral
                                                             : kMixed; },
            .keep_payloads = true};
  }

  void expect_loopbacks(const Scenario& s, detail::MpiLimits limits = {}) const {
    SCOPED_TRACE(s.config + " " + to_string(s.dtype));
    const Outcome want = play(s);
    const Outcome got = play(s, [&](int, const RankBody& body) { body(detail::make_mpi_with_limits(MPI_COMM_WORLD, limits)); });
    const auto r = std::size_t(rank);
    for (std::size_t t = 0; t < want.mean.size(); ++t) {
      for (std::size_t p = 0; p < kParameters.size(); ++p)
        EXPECT_TRUE(same_bits(got.mean[t][r][p], want.mean[t][r][p])) << "step " << t << " " << kParameters[p].name;
      EXPECT_EQ(got.payloads[t][r], want.payloads[t][r]) << "step " << t;
    }
    expect_same_state({got.state[r]}, {want.state[r]});
    EXPECT_EQ(got.stats[r].wire_bytes, want.stats[r].wire_bytes);
    EXPECT_EQ(got.stats[r].payload_bytes, want.stats[r].payload_bytes);
  }
};

TEST_F(Mpi, EveryExchangeIsLoopbacks) {
  for (const char* config : kConfigs) {
    for (const DType dtype : {DType::fp32, DType::bf16}) {
      Scenario s = scenario(config);
      s.dtype = dtype;
      expect_loopbacks(s);
    }
  }
}

TEST_F(Mpi, CallsThatAreCutAreLoopbacks) {
  for (const char* config : kConfigs) expect_loopbacks(scenario(config), {.message = 1000, .block = 4096});
}

// Where MPI serves one thread alone, collectives run in the caller's.
TEST_F(Mpi, WithoutAThreadOfItsOwn) {
  for (const char* config : kConfigs) {
    Scenario s = scenario(config);
    s.reducer.inline_queue = true;
    expect_loopbacks(s);
  }
}

// The rule itself, with nothing set by hand: a queue thread under MPI_THREAD_MULTIPLE, the caller's thread under less (--funneled).
TEST_F(Mpi, WorkIsDoneOnAThreadThatMpiServes) {
  int provided = 0;
  MPI_Query_thread(&provided);
  const std::thread::id caller = std::this_thread::get_id();
  for (const char* config : kConfigs) {
    Scenario s = scenario(config);
    std::vector<std::thread::id> threads;
    s.keep_payloads = false;
    s.reducer.record_payload = [&](std::uint64_t, ConstBytes) { threads.push_back(std::this_thread::get_id()); };
    play(s, [](int, const RankBody& body) { body(make_mpi(MPI_COMM_WORLD)); });
    ASSERT_FALSE(threads.empty()) << config;
    for (const std::thread::id thread : threads) {
      EXPECT_EQ(thread, threads.front()) << config;
      EXPECT_EQ(thread == caller, provided != MPI_THREAD_MULTIPLE) << config;
    }
  }
}

TEST_F(Mpi, NonfiniteGradientsMeetTheSameVerdict) {
  for (const char* config : kConfigs) {
    Scenario s = scenario(config);
    s.grad = [this](int step, int r, std::uint32_t p) {
      Vec g = gradient(step, r, p);
      if (step == 1 && r == 0 && p == 5) g[20000] = INFINITY;
      if (step == 3 && r == world - 1 && p == 3) g[700] = NAN, g[17999] = -INFINITY;
      return g;
    };
    expect_loopbacks(s);
  }
}

}  // namespace
}  // namespace thinwire::test
