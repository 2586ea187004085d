// The main of tests whose ranks are processes: every rank runs the same tests in the same order, and the run fails if one rank's do.

#include <gtest/gtest.h>

#include <cstdio>

#include "collectives/mpi/mpi.hpp"

int main(int argc, char** argv) {
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  ::testing::InitGoogleTest(&argc, argv);
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  if (rank != 0)
    delete ::testing::UnitTest::GetInstance()->listeners().Release(
        ::testing::UnitTest::GetInstance()->listeners().default_result_printer());
  const int failed = RUN_ALL_TESTS();
  if (failed != 0 && rank != 0)
    std::fprintf(stderr, "tests failed on rank %d; run it with mpirun --tag-output and --gtest_filter to see which\n", rank);
  if (failed != 0) MPI_Abort(MPI_COMM_WORLD, 1);  // ranks may no longer be at the same call
  MPI_Finalize();
  return 0;
}
