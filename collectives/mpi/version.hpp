#pragma once
// What this build knows of MPI, for programs that may have been built without it.

#include <string>

namespace thinwire {

bool built_with_mpi() noexcept;
/// The MPI standard of the library that is loaded now, such as "3.1"; empty in a build without MPI. Needs no MPI_Init.
std::string mpi_standard();
/// What the loaded library says of itself, such as "Open MPI v4.1.4, …"; empty in a build without MPI. Needs no MPI_Init.
std::string mpi_library();

}  // namespace thinwire
