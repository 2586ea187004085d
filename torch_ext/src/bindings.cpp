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

#include "collectives/nccl/version.hpp"
#include "compressors/core/device.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/isa.hpp"
#include "compressors/core/registry.hpp"
#include "thinwire/build.hpp"
#include "torch_ext/src/estimate.hpp"
#include "torch_ext/src/hook.hpp"
#include "torch_ext/src/python_values.hpp"

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
