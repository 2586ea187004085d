#pragma once
// The MPI transport (host spans). Only its users include this header: it needs mpi.h. What a build knows of MPI is in
// collectives/mpi/version.hpp.

#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX 1  // the C++ bindings would make every includer link a library that Open MPI 5 no longer has
#endif
#include <mpi.h>

#include <cstddef>
#include <memory>

#include "collectives/communicator.hpp"

namespace thinwire {

/// A group of the ranks of `comm` (an intracommunicator) on a duplicate of it: our messages and error handler never meet the caller's, and
/// `comm` may be freed. Collective over `comm`; waits at most the default timeout() for the others.
///
/// Threads: any_thread() is whether MPI provides MPI_THREAD_MULTIPLE. Where it does not, this call, all collectives and the destructor
/// belong to one thread.
///
/// Deadlines: every collective is polled until timeout(). MPI progresses only inside its calls, so the polling thread spins a little, then
/// yields, then sleeps in steps of 50 us. split() waits for all ranks within the deadline; MPI_Comm_split itself, which follows, knows
/// none. Past 2^31 bytes every call works.
///
/// Sums are made in rank order, rounded to the dtype after each addition, so their bits are those of loopback. An all_reduce moves 2(N −
/// 1)/N of its buffer (up to 8 KiB: N − 1, in one collective) and stages 8 MiB at a time. MPI_Iallreduce would promise no equal bits, and
/// Open MPI's is no faster.
///
/// Errors: MPI cannot take back a collective in flight. After a timeout, an abort or a transport error MPI may still read and write the
/// spans of the failed call whenever this process makes another MPI call, on any communicator, and MPI_Finalize may wait for ever. So the
/// way on is: report, keep those spans, MPI_Abort. The destructor of a failed communicator frees nothing, so it cannot hang; one destroyed
/// after MPI_Finalize frees nothing either.
///
/// abort() tells the peers by small messages that they look for while they wait; one that these do not reach leaves by its own deadline or
/// by MPI_Abort. On a thread that must not call MPI it makes this rank's calls fail, and the messages go out with the call in flight, or
/// the next, of the thread that may.
///
/// Sizes that differ between ranks end as transport errors or timeouts, never as overflows; MPI does not always see them.
/// @throws invalid_argument: MPI not running, MPI_COMM_NULL, an intercommunicator. transport, timeout: as all calls.
std::unique_ptr<Communicator> make_mpi(MPI_Comm comm);

namespace detail {

/// Sizes at which a call is cut into several messages.
struct MpiLimits {
  std::size_t message = std::size_t(1) << 30;  ///< bytes of one message; MPI counts in int
  std::size_t block = std::size_t(8) << 20;    ///< bytes that an all_reduce stages at once, at least 4 x world
};

/// make_mpi with other limits: for tests, which reach the cut paths with small buffers so.
std::unique_ptr<Communicator> make_mpi_with_limits(MPI_Comm comm, MpiLimits limits);

}  // namespace detail
}  // namespace thinwire
