// Compressed gradients in a C++ training loop of your own: one include, three objects, one call per bucket.
//   mpirun -np 2 build/launch/mpi_loop
#include <cstdio>

#include "thinwire/thinwire.hpp"

int main(int argc, char** argv) {
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  try {
    const std::shared_ptr<thinwire::Communicator> world = thinwire::make_mpi(MPI_COMM_WORLD);
    const auto config = thinwire::Config::parse("codec=topk:density=0.05 feedback=ef14");
    thinwire::GradientReducer reducer(world, config, {{"w", {256, 1024}}});
    std::vector<float> w(256 * 1024, 1.0f), grad(w.size());
    for (int step = 0; step < 400; ++step) {
      for (std::size_t i = 0; i < w.size(); ++i) grad[i] = w[i] - float(world->rank());  // the optimum is the mean of all ranks' numbers
      reducer.reduce(std::vector<std::uint32_t>{0}, thinwire::host_bytes(grad.data(), grad.size())).wait();
      for (std::size_t i = 0; i < w.size(); ++i) w[i] -= 0.02f * grad[i];  // grad is the mean now
    }
    if (world->rank() == 0) std::printf("w[0] = %.3f, factor %.1f\n", double(w[0]), reducer.stats().factor);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  MPI_Finalize();
}
