#pragma once
// The same runs over the real engine: ranks as threads, each with its own GradientReducer over loopback and its own replica of x.

#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "bench/control_reference.hpp"
#include "collectives/communicator.hpp"
#include "collectives/reducer.hpp"
#include "compressors/core/config.hpp"
#include "compressors/core/span.hpp"

namespace thinwire::bench {

/// Calls body(communicator) as every rank; what one throws is thrown here.
template <class Body>
void as_ranks(int world, Body&& body) {
  auto communicators = make_loopback(world);
  std::vector<std::exception_ptr> errors(communicators.size());
  {
    std::vector<std::jthread> threads;
    for (std::size_t r = 0; r < communicators.size(); ++r) {
      threads.emplace_back([&, r] {
        try {
          body(std::move(communicators[r]));
        } catch (...) { errors[r] = std::current_exception(); }
      });
    }
  }
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

/// The gradients go through the engine as fp32. Residuals are read every `Descent::every` steps. `drift`: max |H − mean h| after the last
/// one.
inline Run run_engine(const Problem& problem, const std::string& config, const Descent& descent, double* drift = nullptr) {
  Run out;
  std::vector<ReducerState> states(std::size_t(problem.world()));
  as_ranks(problem.world(), [&](std::unique_ptr<Communicator> communicator) {
    const int rank = communicator->rank();
    ReducerOptions options;
    options.inline_queue = true;
    GradientReducer reducer(std::move(communicator), Config::parse(config), {{"x", {problem.size(), 1}}}, options);
    const std::vector<std::uint32_t> bucket = {0};
    Vector x = problem.start();
    std::vector<float> grad(problem.size());
    Run run;
    double residual = 0;
    while (follow(run, descent, problem.distance(x), residual)) {  // the same on all ranks
      Vector g = problem.gradient(rank, x);
      add_noise(g, descent.sigma, rank, run.steps);
      for (std::size_t j = 0; j < g.size(); ++j) grad[j] = float(g[j]);
      reducer.reduce(bucket, host_bytes(grad.data(), grad.size())).wait();
      for (std::size_t j = 0; j < x.size(); ++j) x[j] -= descent.gamma * double(grad[j]);
      ++run.steps;
      if (rank == 0 && run.steps % descent.every == 0) residual = reducer.stats().parameters[0].residual_norm;
    }
    if (rank == 0) out = run;
    if (drift != nullptr) states[std::size_t(rank)] = reducer.state();
  });
  for (std::size_t j = 0; j < problem.size() && drift != nullptr; ++j) {
    double mean = 0;
    for (const ReducerState& state : states) mean += double(state.parameters.at("x").at("estimate")[j]) / double(states.size());
    *drift = std::max(*drift, std::fabs(mean - double(states[0].parameters.at("x").at("mean_estimate")[j])));
  }
  return out;
}

}  // namespace thinwire::bench
