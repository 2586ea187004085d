#pragma once
// States, statistics and replays as Python's dicts. With the GIL.

#include <pybind11/pybind11.h>

#include "collectives/reducer.hpp"
#include "compressors/core/config.hpp"

namespace thinwire::torch_ext {

namespace py = pybind11;

/// Arrays are float tensors by parameter and name; what a state does not have is left out.
py::dict dict_of(const ReducerState& state);
/// @throws pybind11's errors where something is missing or of another type: thinwire.checkpoint has looked before.
ReducerState state_of(const py::dict& dict);
py::dict dict_of(const Stats& stats);
/// Runs a configuration over recorded gradients, name -> tensor (steps, world, *shape), without the GIL while it runs. @throws
/// invalid_argument naming the tensor that does not fit.
py::dict replay_dict(const Config& config, const py::dict& grads, bool record_payloads);

}  // namespace thinwire::torch_ext
