// The twin of mpi.cpp in a build without MPI. make_mpi() itself needs mpi.h to be named, so nobody can call it here.

#include "collectives/mpi/version.hpp"

namespace thinwire {

bool built_with_mpi() noexcept { return false; }
std::string mpi_standard() { return {}; }
std::string mpi_library() { return {}; }

}  // namespace thinwire
