// The contract under mpirun.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <thread>

#include "collectives/mpi/mpi.hpp"
#include "collectives/mpi/version.hpp"
#include "tests/communicator_contract.hpp"

namespace thinwire::test {
namespace {

int world() {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

void run_with(detail::MpiLimits limits, const std::function<void(Communicator&)>& body) {
  const auto c = detail::make_mpi_with_limits(MPI_COMM_WORLD, limits);
  c->set_timeout(std::chrono::milliseconds(60000));
  body(*c);
}

struct Plain {
  static std::vector<int> worlds() { return {world()}; }
  static void run(int, const std::function<void(Communicator&)>& body) { run_with({}, body); }
};
/// Every size above 1000 bytes takes the paths of calls above 2^31 bytes.
struct Cut {
  static std::vector<int> worlds() { return {world()}; }
  static void run(int, const std::function<void(Communicator&)>& body) { run_with({.message = 1000, .block = 4096}, body); }
};
INSTANTIATE_TYPED_TEST_SUITE_P(Mpi, CommunicatorContract, Plain);
INSTANTIATE_TYPED_TEST_SUITE_P(MpiCut, CommunicatorContract, Cut);

TEST(MpiGroup, KnowsItsLibrary) {
  EXPECT_TRUE(built_with_mpi());
  EXPECT_GE(mpi_standard(), "3.1");
  EXPECT_FALSE(mpi_library().empty());
}

TEST(MpiGroup, RefusesWhatIsNoGroup) {
  expect_error(Errc::invalid_argument, "MPI_COMM_NULL", [] { make_mpi(MPI_COMM_NULL); });
  expect_error(Errc::invalid_argument, "message of 0", [] { detail::make_mpi_with_limits(MPI_COMM_WORLD, {.message = 0}); });
}

TEST(MpiGroup, OutlivesTheCallersCommunicatorAndLeavesItsHandlerAlone) {
  MPI_Comm mine = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, 0, -Plain::worlds()[0], &mine);
  MPI_Errhandler before, after;
  MPI_Comm_get_errhandler(mine, &before);
  const auto c = make_mpi(mine);
  MPI_Comm_get_errhandler(mine, &after);
  EXPECT_EQ(before, after);
  MPI_Errhandler_free(&before);
  MPI_Errhandler_free(&after);
  MPI_Comm_free(&mine);
  float x = 1;
  c->all_reduce(host_bytes(&x, 1));
  EXPECT_EQ(x, float(world()));
}

// A queue thread on a duplicate, the caller's own traffic on the same ranks meanwhile.
TEST(MpiGroup, AnotherThreadMayCallWhereMpiAllowsIt) {
  const auto c = make_mpi(MPI_COMM_WORLD);
  int provided = 0;
  MPI_Query_thread(&provided);
  ASSERT_EQ(c->any_thread(), provided == MPI_THREAD_MULTIPLE);
  if (!c->any_thread()) GTEST_SKIP() << "MPI provides no MPI_THREAD_MULTIPLE";
  const auto twin = c->split(0, c->rank());
  std::vector<float> sums(30000, 1);
  std::thread queue([&] {
    for (int i = 0; i < 10; ++i) twin->all_reduce(host_bytes(sums.data(), sums.size()));
  });
  for (int i = 0; i < 10; ++i) {
    int one = 1, sum = 0;
    MPI_Allreduce(&one, &sum, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    ASSERT_EQ(sum, world());
    c->barrier();
  }
  queue.join();
  EXPECT_EQ(sums.front(), float(std::pow(world(), 10)));  // at most 4^10: exact
  EXPECT_EQ(sums.front(), sums.back());
}

// The real thing, once: slots and totals beyond an int. 2.2 GB on each of two ranks.
TEST(MpiGroup, SlowMoreThanTwoToThe31Bytes) {
  if (world() != 2) GTEST_SKIP() << "runs on 2 ranks: memory";
  const auto c = make_mpi(MPI_COMM_WORLD);
  const std::size_t slot = 1'100'000'123;
  std::vector<std::uint8_t> all(2 * slot);
  std::uint8_t* own = all.data() + std::size_t(c->rank()) * slot;
  for (std::size_t i = 0; i < slot; i += 4093) own[i] = stamp(c->rank(), 0, i);
  own[slot - 1] = 77;
  c->all_gather(host_bytes(own, slot, DType::u8), raw(all));
  for (int r = 0; r < 2; ++r) {
    for (std::size_t i = 0; i < slot - 1; i += 4093) ASSERT_EQ(all[std::size_t(r) * slot + i], stamp(r, 0, i)) << i << " of rank " << r;
    ASSERT_EQ(all[std::size_t(r + 1) * slot - 1], 77);
  }
  if (c->rank() == 1) std::fill(all.begin(), all.end(), std::uint8_t(0));
  c->broadcast(raw(all), 0);
  for (std::size_t i = 0; i < slot - 1; i += 4093) ASSERT_EQ(all[slot + i], stamp(1, 0, i)) << i;
  ASSERT_EQ(all.back(), 77);
}

}  // namespace
}  // namespace thinwire::test
