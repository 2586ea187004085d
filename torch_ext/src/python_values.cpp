// States, statistics and replays as Python's dicts.

#include "torch_ext/src/python_values.hpp"

#include <ATen/ops/empty.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <map>
#include <optional>

#include "compressors/core/error.hpp"
#include "torch_ext/src/replay.hpp"

namespace thinwire::torch_ext {
namespace {

at::Tensor tensor_of(const std::vector<float>& values) {
  at::Tensor tensor = at::empty({std::int64_t(values.size())}, at::kFloat);
  if (!values.empty()) std::memcpy(tensor.data_ptr<float>(), values.data(), values.size() * sizeof(float));
  return tensor;
}

}  // namespace

py::dict dict_of(const ReducerState& state) {
  py::dict parameters;
  for (const auto& [name, arrays] : state.parameters) {
    py::dict tensors;
    for (const auto& [key, values] : arrays) tensors[py::str(key)] = tensor_of(values);
    parameters[py::str(name)] = std::move(tensors);
  }
  py::dict dict;
  dict["step"] = state.step;
  dict["world"] = state.world;
  dict["rank"] = state.rank;
  dict["config"] = state.config;
  dict["started"] = state.started;
  dict["nonfinite_steps"] = state.nonfinite_steps;
  if (state.frozen) dict["frozen"] = *state.frozen;
  if (state.flush) dict["flush"] = true;
  if (state.start_until > 0) dict["start_until"] = state.start_until;
  if (!state.dense.empty()) {
    py::dict dense;
    for (const auto& [name, dtype] : state.dense) dense[py::str(name)] = to_string(dtype);
    dict["dense"] = std::move(dense);
  }
  if (!state.watchdog.empty()) {
    using namespace py::literals;
    py::dict watchdog;
    for (const auto& [name, w] : state.watchdog)
      watchdog[py::str(name)] = py::dict("eta"_a = w.eta, "since"_a = w.since, "ratio"_a = w.ratio, "recent"_a = w.recent,
                                         "grad"_a = w.grad, "grown"_a = w.grown, "cuts"_a = w.cuts);
    dict["watchdog"] = std::move(watchdog);
  }
  dict["parameters"] = std::move(parameters);
  return dict;
}

ReducerState state_of(const py::dict& dict) {
  ReducerState state;
  state.step = dict["step"].cast<std::uint64_t>();
  state.world = dict["world"].cast<int>();
  state.rank = dict["rank"].cast<int>();
  state.config = dict["config"].cast<std::string>();
  state.started = dict["started"].cast<bool>();
  state.nonfinite_steps = dict["nonfinite_steps"].cast<std::uint64_t>();
  if (dict.contains("frozen")) state.frozen = dict["frozen"].cast<std::uint64_t>();
  if (dict.contains("flush")) state.flush = dict["flush"].cast<bool>();
  if (dict.contains("start_until")) state.start_until = dict["start_until"].cast<std::uint64_t>();
  if (dict.contains("dense")) {
    for (const auto& [name, dtype] : dict["dense"].cast<std::map<std::string, std::string>>())
      state.dense[name] = dtype == "bf16" ? DType::bf16 : dtype == "fp16" ? DType::fp16 : DType::fp32;
  }
  if (dict.contains("watchdog")) {
    for (const auto& [name, one] : dict["watchdog"].cast<py::dict>())
      state.watchdog[name.cast<std::string>()] = {
          one["eta"].cast<float>(),   one["since"].cast<std::uint64_t>(), one["ratio"].cast<double>(),      one["recent"].cast<double>(),
          one["grad"].cast<double>(), one["grown"].cast<std::uint32_t>(), one["cuts"].cast<std::uint32_t>()};
  }
  for (const auto& [name, arrays] : dict["parameters"].cast<py::dict>()) {
    auto& parameter = state.parameters[name.cast<std::string>()];
    for (const auto& [key, value] : arrays.cast<py::dict>()) {
      const at::Tensor tensor = value.cast<at::Tensor>().to(at::kCPU, at::kFloat).contiguous();
      const float* data = tensor.const_data_ptr<float>();
      parameter[key.cast<std::string>()].assign(data, data + tensor.numel());
    }
  }
  return state;
}

py::dict dict_of(const Stats& stats) {
  py::dict parameters;
  for (const ParameterStats& p : stats.parameters) {
    py::dict one;
    one["numel"] = p.numel;
    one["compressed"] = p.compressed;
    one["reason"] = p.reason;
    one["density"] = p.density;
    one["kept"] = p.kept;
    one["residual_norm"] = p.residual_norm;
    one["grad_norm"] = p.grad_norm;
    const auto add = [&one](const char* key, const auto& value) {
      if (value) one[key] = *value;
    };
    add("estimate_norm", p.estimate_norm);
    add("measured_delta", p.measured_delta);
    add("stale", p.stale);
    add("eta", p.eta);
    add("eta_cuts", p.eta_cuts);
    add("server_residual_norm", p.server_residual_norm);
    add("momentum_norm", p.momentum_norm);
    add("residual_over_momentum", p.residual_over_momentum);
    if (p.momentum_norm) one["masked"] = p.masked;
    parameters[py::str(p.name)] = std::move(one);
  }
  py::dict dict;
  dict["step"] = stats.step;
  dict["payload_bytes"] = stats.payload_bytes;
  dict["wire_bytes"] = stats.wire_bytes;
  dict["dense_bytes"] = stats.dense_bytes;
  dict["factor"] = stats.factor;
  dict["nonfinite_steps"] = stats.nonfinite_steps;
  dict["state_bytes"] = stats.state_bytes;
  dict["frozen"] = stats.frozen;
  if (stats.resync_error) dict["resync_error"] = *stats.resync_error;
  dict["parameters"] = std::move(parameters);
  return dict;
}

py::dict replay_dict(const Config& config, const py::dict& grads, bool record_payloads) {
  if (grads.empty()) fail(Errc::invalid_argument, "replay: no gradients were given");
  std::vector<Recording> recordings;
  std::vector<at::Tensor> tensors;
  std::optional<at::ScalarType> type;
  std::int64_t steps = 0, world = 0;
  for (const auto& [key, value] : grads) {
    const std::string name = py::str(key).cast<std::string>();
    if (!THPVariable_Check(value.ptr()))
      fail(Errc::invalid_argument, "replay: " + name + " is a " + Py_TYPE(value.ptr())->tp_name + "; torch tensors are needed");
    const at::Tensor tensor = THPVariable_Unpack(value.ptr()).detach().cpu().contiguous();
    if (tensor.dim() < 2 || tensor.size(1) < 1) fail(Errc::invalid_argument, "replay: " + name + " needs the shape (steps, world, *shape)");
    if (!type) type = tensor.scalar_type(), steps = tensor.size(0), world = tensor.size(1);
    if (tensor.scalar_type() != *type)
      fail(Errc::invalid_argument, "replay: " + name + " has another dtype than the first tensor; a bucket has one");
    if (tensor.size(0) != steps || tensor.size(1) != world) {
      fail(Errc::invalid_argument, "replay: " + name + " has " + std::to_string(tensor.size(0)) + " steps of " +
                                       std::to_string(tensor.size(1)) + " ranks, the first tensor " + std::to_string(steps) + " of " +
                                       std::to_string(world));
    }
    recordings.push_back(
        {name, {tensor.sizes().begin() + 2, tensor.sizes().end()}, static_cast<const std::byte*>(tensor.const_data_ptr())});
    tensors.push_back(tensor);
  }
  DType dtype = DType::fp32;
  if (*type == at::kBFloat16) {
    dtype = DType::bf16;
  } else if (*type == at::kHalf) {
    dtype = DType::fp16;
  } else if (*type != at::kFloat) {
    fail(Errc::invalid_argument, "replay: gradients of " + recordings.front().name + " are " + c10::toString(*type) +
                                     "; float32, bfloat16 or float16 are possible");
  }

  ReplayResult result;
  {
    const py::gil_scoped_release no_gil;
    result = replay(config, dtype, std::size_t(steps), world, recordings, record_payloads);
  }
  py::dict mean, dict;
  for (std::size_t p = 0; p < recordings.size(); ++p) {
    std::vector<std::int64_t> shape(tensors[p].sizes().begin(), tensors[p].sizes().end());
    shape.erase(shape.begin() + 1);
    at::Tensor out = at::empty(shape, tensors[p].options());
    if (out.numel() > 0) std::memcpy(out.data_ptr(), result.mean[p].data(), result.mean[p].size());
    mean[py::str(recordings[p].name)] = out;
  }
  at::Tensor bytes = at::empty({steps, world}, at::kLong);
  for (std::size_t i = 0; i < result.payload_bytes.size(); ++i) bytes.data_ptr<std::int64_t>()[i] = std::int64_t(result.payload_bytes[i]);
  py::list state, payloads;
  for (const ReducerState& one : result.state) state.append(dict_of(one));
  for (const auto& step : result.payloads) {
    py::list ranks;
    for (const auto& payload : step) ranks.append(py::bytes(reinterpret_cast<const char*>(payload.data()), payload.size()));
    payloads.append(std::move(ranks));
  }
  dict["mean"] = std::move(mean);
  dict["payload_bytes"] = bytes;
  dict["state"] = std::move(state);
  dict["payloads"] = std::move(payloads);
  dict["stats"] = dict_of(result.stats);
  return dict;
}

}  // namespace thinwire::torch_ext
