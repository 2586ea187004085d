// One way for a group of MPI ranks to break per word on the command line; tests/mp/check_failures.py runs it under mpirun and reads what
// the survivors say. reducer-HOW CONFIG breaks a GradientReducer's.

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "collectives/mpi/mpi.hpp"
#include "collectives/reducer.hpp"
#include "compressors/core/error.hpp"

namespace {

using namespace thinwire;
using std::chrono::milliseconds;

void say(int rank, const std::string& text) {
  std::printf("rank %d: %s\n", rank, text.c_str());
  std::fflush(stdout);
}

/// Makes calls until one fails.
void until_error(int rank, const std::function<void()>& call) {
  const auto start = std::chrono::steady_clock::now();
  try {
    while (true) call();
  } catch (const Error& e) {
    const auto ms = std::chrono::duration_cast<milliseconds>(std::chrono::steady_clock::now() - start).count();
    say(rank, std::string(to_string(e.code())) + " after " + std::to_string(ms) + " ms: " + e.what());
  }
}

// The survivors' way out: drop the communicator, which must not wait, let all say what they met, end the job.
[[noreturn]] void end(std::unique_ptr<Communicator>& c, const std::vector<float>& still_in_flight) {
  const int rank = c->rank();
  try {
    c->barrier();
  } catch (const Error& e) { say(rank, std::string("again ") + to_string(e.code())); }
  c.reset();
  say(rank, "destroyed, " + std::to_string(still_in_flight.size()) + " values kept");
  std::this_thread::sleep_for(milliseconds(1500));
  MPI_Abort(MPI_COMM_WORLD, 3);
  std::abort();
}

// Two good steps, then the last rank is gone and the others have a bucket under way in their queue's thread. How they leave: they wait for
// the error (stalled, killed), close (closed), or just drop the reducer (destroyed). The last rank never comes back from here.
[[noreturn]] void break_reducer(std::unique_ptr<Communicator> group, const std::string& how, const std::string& config) {
  const int rank = group->rank();
  const bool last = rank == group->size() - 1;
  const std::vector<Parameter> parameters = {{"a", {300, 200}}, {"bias", {40}}};  // one compressed, one a passenger
  const std::vector<std::uint32_t> ids = {1, 0};
  const std::string timeout = how == "closed" ? " timeout=60" : " timeout=3";
  auto reducer = std::make_unique<GradientReducer>(std::move(group), Config::parse(config + timeout), parameters);
  std::vector<float> grad(60040);
  const auto reduce = [&] {
    for (std::size_t i = 0; i < grad.size(); ++i) grad[i] = float(i % 97) + float(rank);
    return reducer->reduce(ids, host_bytes(grad.data(), grad.size()));
  };
  for (int step = 0; step < 2; ++step) reduce().wait();
  if (last) std::raise(how == "killed" ? SIGKILL : SIGSTOP);
  Work work;
  const auto start = std::chrono::steady_clock::now();
  const auto ms = [&] {
    return std::to_string(std::chrono::duration_cast<milliseconds>(std::chrono::steady_clock::now() - start).count());
  };
  until_error(rank, [&] {
    work = reduce();
    if (how == "closed") reducer->close();
    if (how == "destroyed") reducer.reset();
    work.wait();
  });
  if (how != "destroyed") {
    try {
      reduce();
      say(rank, "a broken reducer went on");
    } catch (const Error& e) { say(rank, std::string("again ") + to_string(e.code())); }
    reducer->close();
    reducer.reset();
  }
  say(rank, "destroyed within " + ms() + " ms, " + std::to_string(grad.size()) + " values kept");
  std::this_thread::sleep_for(milliseconds(1500));
  MPI_Abort(MPI_COMM_WORLD, 3);
  std::abort();
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  int provided = 0;
  MPI_Init_thread(&argc, &argv, mode == "abort-funneled" ? MPI_THREAD_FUNNELED : MPI_THREAD_MULTIPLE, &provided);
  auto c = make_mpi(MPI_COMM_WORLD);
  const bool last = c->rank() == c->size() - 1;
  std::vector<float> data(300000, 1);
  const auto all_reduce = [&] { c->all_reduce(host_bytes(data.data(), data.size())); };
  c->set_timeout(milliseconds(60000));
  all_reduce();

  if (mode.starts_with("reducer-") && argc > 2) break_reducer(std::move(c), mode.substr(mode.find('-') + 1), argv[2]);
  if (mode == "stalled") {
    if (last) std::raise(SIGSTOP);
    c->set_timeout(milliseconds(1000));
    until_error(c->rank(), all_reduce);
    end(c, data);
  }
  if (mode == "killed") {
    if (last) std::raise(SIGKILL);
    c->set_timeout(milliseconds(3000));
    until_error(c->rank(), all_reduce);
    end(c, data);
  }
  if (mode == "abort") {
    if (last) {
      std::this_thread::sleep_for(milliseconds(100));
      c->abort("corrupt payload of bucket 7");
    }
    until_error(c->rank(), all_reduce);
    end(c, data);
  }
  if (mode == "abort-funneled") {  // the abort comes from a thread that must not call MPI, while the one that may is waiting
    std::thread other;
    if (last) {
      other = std::thread([&] {
        std::this_thread::sleep_for(milliseconds(100));
        c->abort("closing");
      });
    }
    if (c->rank() == 0) std::this_thread::sleep_for(milliseconds(1000));
    until_error(c->rank(), all_reduce);
    if (other.joinable()) other.join();
    end(c, data);
  }
  if (mode == "mismatch") {
    c->set_timeout(milliseconds(2000));
    if (last) data.resize(299000);
    until_error(c->rank(), all_reduce);
    c->abort("gave up");  // releases a rank that MPI told nothing
    end(c, data);
  }
  if (mode == "finalized") {  // the communicator outlives MPI
    const int rank = c->rank();
    MPI_Finalize();
    until_error(rank, all_reduce);
    c.reset();
    say(rank, "destroyed");
    return 0;
  }
  std::fprintf(stderr, "usage: fail_mpi stalled | killed | abort | abort-funneled | mismatch | finalized | reducer-HOW CONFIG\n");
  MPI_Abort(MPI_COMM_WORLD, 2);
}
