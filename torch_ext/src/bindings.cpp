// What Python sees of thinwire: _C. Arguments are checked here, errors get their Python types here, and the GIL is released around
// everything that may wait.

#include <pybind11/chrono.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include <array>
#include <cstring>

#include "collectives/nccl/version.hpp"
#include "compressors/core/device.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/isa.hpp"
#include "compressors/core/registry.hpp"
#include "thinwire/build.hpp"
#include "torch_ext/src/estimate.hpp"
#include "torch_ext/src/hook.hpp"
#include "torch_ext/src/replay.hpp"

namespace thinwire::torch_ext {
namespace {

constexpr std::array kCodes = {Errc::invalid_config, Errc::invalid_argument, Errc::corrupt_payload, Errc::peer_lost, Errc::timeout,
                               Errc::transport,      Errc::device,           Errc::unsupported,     Errc::internal};
std::array<PyObject*, kCodes.size()> error_types{};  // thinwire.errors' classes, owned for the life of the process

PyObject* type_of(Errc code) noexcept {
  PyObject* type = error_types[std::size_t(code)];
  return type ? type : PyExc_RuntimeError;
}

/// What autograd carries: its exceptions become Python's by python_type(), which is asked for with the GIL held.
struct RaisedError final : torch::PyTorchError {
  RaisedError(Errc code, const char* what) : torch::PyTorchError(what), code_(code) {}
  PyObject* python_type() override { return type_of(code_); }
  Errc code_;
};

std::exception_ptr translate(std::exception_ptr error) noexcept {
  try {
    std::rethrow_exception(error);
  } catch (const Error& e) { return std::make_exception_ptr(RaisedError(e.code(), e.what())); } catch (...) {
    return std::current_exception();
  }
}

void set_error_types(const py::dict& types) {
  for (const Errc code : kCodes) error_types[std::size_t(code)] = py::object(types[to_string(code)]).release().ptr();
}

/// torch ships no Gloo headers: its Python face makes the group.
c10::intrusive_ptr<c10d::Backend> make_gloo(c10::intrusive_ptr<c10d::Store> store, int rank, int size, std::chrono::milliseconds timeout) {
  const py::gil_scoped_acquire gil;
  try {
    const py::object made =
        py::module_::import("torch.distributed").attr("ProcessGroupGloo")(py::cast(std::move(store)), rank, size, timeout);
    return made.cast<c10::intrusive_ptr<c10d::Backend>>();
  } catch (py::error_already_set& error) {
    const std::string text = error.what();
    const bool late = text.find("imed out") != std::string::npos || text.find("imeout") != std::string::npos;
    fail(late ? Errc::timeout : Errc::transport,
         "making a Gloo group of " + std::to_string(size) + " ranks: " + text.substr(0, text.find('\n')));
  }
}

/// One slot's value as the grammar writes it.
std::string slot_text(const py::handle& value) {
  if (py::isinstance<py::bool_>(value)) return value.cast<bool>() ? "1" : "0";
  return py::str(value).cast<std::string>();
}

Config config_of_slots(const py::args& positional, const py::kwargs& slots) {
  if (!positional.empty())
    fail(Errc::invalid_config, "Config takes slots by name: Config(codec=..., feedback=...); Config.parse takes a text");
  std::string text;
  for (const auto& [name, value] : slots) {
    if (value.is_none()) continue;
    const std::string word = slot_text(value);
    if (word.empty() || word.find_first_of(" \t\n\r") != std::string::npos) {  // a blank would begin another slot
      fail(Errc::invalid_config, py::str(name).cast<std::string>() + "=\"" + word + "\": a slot's value is one word without blanks");
    }
    text += (text.empty() ? "" : " ") + py::str(name).cast<std::string>() + "=" + word;
  }
  return text.empty() ? Config() : Config::parse(text);
}

at::Tensor tensor_of(const std::vector<float>& values) {
  at::Tensor tensor = at::empty({std::int64_t(values.size())}, at::kFloat);
  if (!values.empty()) std::memcpy(tensor.data_ptr<float>(), values.data(), values.size() * sizeof(float));
  return tensor;
}

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

using Names = std::optional<std::vector<std::pair<std::string, at::Tensor>>>;

std::shared_ptr<Engine> make_engine(const c10::intrusive_ptr<c10d::Store>& store, const std::string& prefix, int rank, int size,
                                    const Config& config, const Names& names, const std::optional<at::Tensor>& loss_scale,
                                    bool momentum_elsewhere) {
  std::optional<std::vector<NamedParameter>> parameters;
  if (names) {
    parameters.emplace();
    for (const auto& [name, tensor] : *names) parameters->push_back({name, tensor});
  }
  EngineOptions options;
  options.translate = &translate;
  options.momentum_elsewhere = momentum_elsewhere;
  if (loss_scale) {
    if (!(loss_scale->is_cpu() || loss_scale->is_cuda()) || loss_scale->scalar_type() != at::kFloat || loss_scale->numel() != 1) {
      fail(Errc::invalid_argument, "the grad scaler's scale must be one float32 on the CPU or a GPU, not " +
                                       std::to_string(loss_scale->numel()) + " " + c10::toString(loss_scale->scalar_type()) + " on " +
                                       loss_scale->device().str());
    }
    options.loss_scale = *loss_scale;
  }
  const py::gil_scoped_release no_gil;
  const auto timeout = std::chrono::milliseconds(std::max<std::int64_t>(1, std::int64_t(config.timeout_seconds() * 1000)));
  auto own = c10::make_intrusive<c10d::PrefixStore>(prefix, store);
  options.make_device_group = [own, rank, size, timeout, attempts = std::make_shared<int>(0)](int device) {
    return make_device_group(*own, (*attempts)++, rank, size, device, timeout);
  };
  auto communicator = std::make_shared<C10dCommunicator>(own, rank, size, make_gloo, timeout);
  return std::make_shared<Engine>(std::move(communicator), config, std::move(parameters), options);
}

GradientReducer& ready(GradientReducer* reducer, const char* what) {
  if (reducer == nullptr)
    fail(Errc::invalid_argument, std::string(what) + ": the parameters are not known before the first step; give named_parameters");
  return *reducer;
}

/// Runs without the GIL on the reducer, which waits for what is queued; after close() too.
template <class Call>
auto reading(const Engine& engine, const char* what, Call&& call) {
  const py::gil_scoped_release no_gil;
  return call(ready(engine.reducer(), what));
}

/// The same, but refused after close().
template <class Call>
void changing(const Engine& engine, const char* what, Call&& call) {
  const py::gil_scoped_release no_gil;
  call(ready(engine.open_reducer(), what));
}

using Given = std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>, double>;  // momentum, live bits, beta1

void freeze(const Engine& engine, const std::vector<Given>& given) {
  std::vector<at::Tensor> kept;  // what the spans point into
  const auto on_host = [&](const std::optional<at::Tensor>& tensor, at::ScalarType type) {
    return tensor ? kept.emplace_back(tensor->detach().to(at::kCPU, type).contiguous()) : at::Tensor();
  };
  std::vector<Handover> handover;
  for (const auto& [momentum, live, beta1] : given) {
    Handover& one = handover.emplace_back();
    one.beta1 = float(beta1);
    if (const at::Tensor m = on_host(momentum, at::kFloat); m.defined()) one.momentum = {m.const_data_ptr<float>(), std::size_t(m.numel())};
    if (const at::Tensor l = on_host(live, at::kByte); l.defined()) one.live = {l.const_data_ptr<std::uint8_t>(), std::size_t(l.numel())};
  }
  changing(engine, "freeze", [&](GradientReducer& r) { r.freeze(handover); });
}

/// A Python tensor inside an IValue, as torch's Python hooks give it. Its last owner needs the GIL.
struct TensorObject final : c10::ivalue::PyObjectHolder {
  explicit TensorObject(const at::Tensor& of) : tensor(of), object(py::cast(of).release().ptr()) {}
  ~TensorObject() override {
    const py::gil_scoped_acquire gil;
    Py_DECREF(object);
  }
  PyObject* getPyObject() override { return object; }
  c10::InferredType tryToInferType() override { return c10::InferredType(c10::TensorType::get()); }
  c10::IValue toIValue(const c10::TypePtr&, std::optional<std::int32_t>) override { return tensor; }
  std::string toStr() override { return "tensor"; }
  std::vector<at::Tensor> extractTensors() override { return {tensor}; }

  at::Tensor tensor;
  PyObject* object;
};

/// torch's Python hooks return a future that holds a Python object. It is wrapped here, by the thread that has the GIL; the reducer's
/// thread only hands it on.
std::shared_ptr<torch::jit::PythonFutureWrapper> submit(Engine& engine, c10d::GradBucket& bucket) {
  c10::IValue result(c10::intrusive_ptr<c10::ivalue::PyObjectHolder>(c10::make_intrusive<TensorObject>(bucket.getBuffer())));
  const py::gil_scoped_release no_gil;
  return std::make_shared<torch::jit::PythonFutureWrapper>(engine.submit(bucket, std::move(result), true));
}

py::dict replay_dict(const Config& config, const py::dict& grads, bool record_payloads) {
  if (grads.empty()) fail(Errc::invalid_argument, "replay: no gradients were given");
  std::vector<Recording> recordings;
  std::vector<at::Tensor> tensors;
  std::optional<at::ScalarType> type;
  std::int64_t steps = 0, world = 0;
  for (const auto& [key, value] : grads) {
    const std::string name = py::str(key).cast<std::string>();
    if (!THPVariable_Check(value.ptr())) fail(Errc::invalid_argument, "replay: " + name + " is not a tensor");
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

py::list estimate_list(const Config& config, std::uint64_t numel, int world) {
  py::list stages;
  for (const Estimate& stage : estimate(config, numel, world)) {
    py::dict one;
    one["stage"] = stage.stage;
    one["first_step"] = stage.first_step;
    one["density"] = stage.density;
    one["compressed"] = stage.compressed;
    one["payload_bytes"] = stage.payload_bytes;
    one["wire_bytes"] = stage.wire_bytes;
    one["dense_bytes"] = stage.dense_bytes;
    stages.append(std::move(one));
  }
  return stages;
}

py::dict isa_info() {
  py::dict info;
  py::list supported;
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (cpu_supports(isa)) supported.append(to_string(isa));
  }
  info["isa"] = to_string(active_isa());
  info["isas_built"] = std::vector<std::string>{to_string(Isa::scalar), to_string(Isa::avx2), to_string(Isa::avx512)};
  info["isas_of_this_cpu"] = std::move(supported);
  info["torch_built"] = TORCH_VERSION;
  return info;
}

/// What this build and this process know of GPUs; None where a part is not there.
py::dict device_info() {
  const auto text = [](const std::string& value) -> py::object { return value.empty() ? py::object(py::none()) : py::str(value); };
  py::dict info;
  py::list devices;
  for (int device = 0; device < device_count(); ++device) devices.append(describe_device(device));
  info["cuda_built"] = text(kCudaVersion);
  info["nccl_built"] = text(nccl_compiled());
  info["devices"] = std::move(devices);
  info["refusal"] = device_refusal();
  return info;
}

void bind_config(py::module_& m) {
  py::class_<Config> config(m, "Config",
                            "A configuration: immutable, hashable, comparable. str() prints every slot with every default filled in.");
  config.def(py::init(&config_of_slots))
      .def_static(
          "parse", [](const std::string& text) { return Config::parse(text); }, py::arg("text"))
      .def("__str__", &Config::str)
      .def("__repr__", [](const Config& c) { return "Config.parse('" + c.str() + "')"; })
      .def("__eq__",
           [](const Config& c, const py::object& other) { return py::isinstance<Config>(other) && c == other.cast<const Config&>(); })
      .def("__hash__", [](const Config& c) { return py::hash(py::str(c.str())); })
      .def("__reduce__",
           [](const Config& c) {  // pickle cannot name a function of an extension's class
             return py::make_tuple(py::module_::import("thinwire.config").attr("_parse"), py::make_tuple(c.str()));
           })
      .def("keys_of",
           [](const Config& c, const std::string& slot) -> std::map<std::string, std::string> {
             for (const auto& [name, spec] : {std::pair{"codec", &c.codec()},
                                              {"feedback", &c.feedback()},
                                              {"target", &c.target()},
                                              {"exchange", &c.exchange()},
                                              {"policy", &c.policy()}}) {
               if (slot == name) return {spec->values.begin(), spec->values.end()};
             }
             fail(Errc::invalid_argument, "no slot with keys is called " + slot);
           })
      .def_property_readonly("codec", [](const Config& c) { return c.codec().str(); })
      .def_property_readonly("feedback", [](const Config& c) { return c.feedback().str(); })
      .def_property_readonly("target", [](const Config& c) { return c.target().str(); })
      .def_property_readonly("exchange", [](const Config& c) { return c.exchange().str(); })
      .def_property_readonly("policy", [](const Config& c) { return c.policy().str(); })
      .def_property_readonly("min_numel", &Config::min_numel)
      .def_property_readonly("start_step", &Config::start_step)
      .def_property_readonly("timeout", &Config::timeout_seconds)
      .def_property_readonly("seed", &Config::seed)
      .def_property_readonly("check_every", &Config::check_every);
}

void bind_engine(py::module_& m) {
  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine", "The reducer behind a hook. Internal: use HookState.")
      .def(py::init(&make_engine), py::arg("store"), py::arg("prefix"), py::arg("rank"), py::arg("size"), py::arg("config"),
           py::arg("names"), py::arg("loss_scale"), py::arg("momentum_elsewhere") = false)
      .def("submit", &submit, py::arg("bucket"))
      .def("known", [](const Engine& e) { return e.reducer() != nullptr; })
      .def("step", [](const Engine& e) { return reading(e, "step", [](GradientReducer& r) { return r.step(); }); })
      .def("stats", [](const Engine& e) { return dict_of(reading(e, "stats", [](GradientReducer& r) { return r.stats(); })); })
      .def("take_notice", &Engine::take_notice)
      .def("state", [](const Engine& e) { return dict_of(reading(e, "state_dict", [](GradientReducer& r) { return r.state(); })); })
      .def(
          "load_state",
          [](Engine& e, const std::vector<py::dict>& dicts, std::vector<Layout> layouts, const std::string& refused) {
            std::vector<ReducerState> states;
            for (const py::dict& dict : dicts) states.push_back(state_of(dict));
            changing(e, "load_state_dict", [&](GradientReducer& r) {
              r.load_state(states, refused);
              if (r.frozen()) r.freeze();  // masks and beta1s come with the optimizer, which sees to it that its state is loaded too
            });
            e.set_layouts(std::move(layouts));
          },
          py::arg("states"), py::arg("layouts") = std::vector<Layout>(), py::arg("refused") = "")
      .def("layouts", &Engine::layouts)
      .def("frozen", [](const Engine& e) { return reading(e, "frozen", [](GradientReducer& r) { return r.frozen(); }); })
      .def("averages",
           [](const Engine& e, std::uint32_t parameter) {
             return reading(e, "averages", [&](GradientReducer& r) { return r.averages(parameter); });
           })
      .def("freeze", &freeze, py::arg("handover"))
      .def(
          "describe_optimizer",
          [](const Engine& e, const std::string& words, std::uint64_t from, std::uint64_t every, std::uint64_t within) {
            changing(e, "describe_optimizer", [&](GradientReducer& r) { r.describe_optimizer(words, {from, every, within}); });
          },
          py::arg("words"), py::arg("freeze_from"), py::arg("freeze_every"), py::arg("freeze_within"))
      .def(
          "rescale_residuals",
          [](const Engine& e, const std::vector<float>& factors) {
            changing(e, "on_lr_change", [&](GradientReducer& r) { r.rescale_residuals(factors); });
          },
          py::arg("factors"))
      .def("flush", [](const Engine& e) { changing(e, "flush", [](GradientReducer& r) { r.flush(); }); })
      .def("resynchronize", [](const Engine& e) { changing(e, "resynchronize", [](GradientReducer& r) { r.resynchronize(); }); })
      .def("reset", [](const Engine& e) { changing(e, "reset", [](GradientReducer& r) { r.reset(); }); })
      .def(
          "close", [](Engine& e, std::int64_t limit_ms) { e.close(std::chrono::milliseconds(limit_ms)); }, py::arg("limit_ms") = 0,
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const Error& e) { PyErr_SetString(type_of(e.code()), e.what()); } catch (const RaisedError& e) {
      PyErr_SetString(type_of(e.code_), e.what());
    }
  });
  m.def("set_error_types", &set_error_types);
  // A pybind11 with another internals id imports well and then knows none of torch's types: the caller tries one.
  m.def("takes_store", [](const c10::intrusive_ptr<c10d::Store>& store) { return bool(store); });
  bind_config(m);
  bind_engine(m);
  m.def(
      "install",
      [](c10d::Reducer& reducer, std::shared_ptr<Engine> engine) { reducer.register_comm_hook(make_comm_hook(std::move(engine))); },
      py::call_guard<py::gil_scoped_release>());
  m.def("replay", &replay_dict, py::arg("config"), py::arg("grads"), py::arg("record_payloads"));
  m.def("estimate", &estimate_list, py::arg("config"), py::arg("numel"), py::arg("world"));
  m.def("grammar_help", &grammar::help);
  m.def("config_warnings", &grammar::warnings, py::arg("config"));
  m.def("config_hints", &grammar::hints, py::arg("config"));
  m.attr("VARIANCE_FLOOR") = kVarianceFloor;
  m.attr("UNUSUAL_UPDATE") = kUnusualUpdate;
  m.def("isa_info", &isa_info);
  m.def("device_info", &device_info);
}

}  // namespace thinwire::torch_ext
