// The main of tests whose ranks are processes: every rank runs the same tests in the same order, and the run fails if one rank's do.
// --funneled: MPI serves the main thread alone.

#include <gtest/gtest.h>

#include <cstdio>
#include <string_view>

#include "collectives/mpi/mpi.hpp"

int main(int argc, char** argv) {
  const bool funneled = argc > 1 && std::string_view(argv[1]) == "--funneled";
  int provided = 0;
  MPI_Init_thread(&argc, &argv, funneled ? MPI_THREAD_FUNNELED : MPI_THREAD_MULTIPLE, &provided);
  if (funneled && provided == MPI_THREAD_MULTIPLE) {
    std::fprintf(stderr, "this MPI gives MPI_THREAD_MULTIPLE to those who ask for less: the run would show nothing\n");
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
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
