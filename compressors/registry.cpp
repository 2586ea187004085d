// The one file that names every family: a new codec, feedback or policy is a folder and its lines here. The tables are the grammar;
// core/config.cpp reads them and knows no name of its own but the slots'.

#include "compressors/core/registry.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "compressors/core/error.hpp"
#include "compressors/ratio/warmup.hpp"
#include "compressors/sign/sign.hpp"
#include "compressors/sign/sign_cuda.hpp"
#include "compressors/topk/topk.hpp"
#include "compressors/topk/topk_cuda.hpp"

namespace thinwire {

namespace grammar {
namespace {

constexpr Key kDensity = {"density", Kind::number, "", "(0, 1]", "entries kept / entries of the tensor"};
constexpr Key kWire = {"wire", Kind::word, "fp32", "fp32|bf16|fp16",
                       "type of the values on the wire; its rounding error stays in the residual"};
constexpr Key kSelect = {"select", Kind::word, "sampled", "sampled|exact",
                         "threshold from a sample (about k entries) or exactly the k largest"};
constexpr Key kMomentum = {"momentum", Kind::number, "0.9", "[0, 1)", "momentum of the correction, before compression"};
constexpr Key kNesterov = {"nesterov", Kind::flag, "0", "0|1", "Nesterov's form of the momentum"};
constexpr Key kMask = {"mask", Kind::flag, "1", "0|1", "momentum factor masking: momentum restarts where an entry was sent"};
constexpr Key kClipNorm = {"clip_norm", Kind::number, "0", "[0, inf)", "global norm to which local gradients are clipped; 0 = off"};

constexpr Key kTopk[] = {
    kDensity, kWire, kSelect, {"index", Kind::word, "auto", "auto|u32|u16|bitmap", "how positions are written; auto = the smallest"}};
constexpr Key kScale = {"scale", Kind::word, "l1", "l1|l2", "of a block: mean magnitude, or root mean square (DeepSpeed's)"};
constexpr Key kBlock = {"block", Kind::integer_or_word, "1024", "tensor|[8, 1073741824]",
                        "elements per scale, a multiple of 8, or one scale for what one rank owns of a tensor"};
constexpr Key kSign[] = {kScale, kBlock};
constexpr Key kBeta1 = {"beta1", Kind::number, "0.9", "[0, 1)", "of the momentum; an optimizer's own counts where there is one"};
constexpr Key kFreeze = {"freeze", Kind::integer_or_word, "auto", "auto|[1, inf)",
                         "synchronised steps that stay dense first; auto: until the optimizer's variance is stable"};
constexpr Key kMomentumTarget[] = {kBeta1, kFreeze, kClipNorm};
constexpr Key kResidual = {"residual", Kind::word, "fp32", "fp32|bf16", "how residuals are stored; bf16: 2 bytes per parameter, rounded"};
constexpr Key kEstimate = {"estimate", Kind::word, "fp32", "fp32|grid",
                           "how a rank's estimates are stored; grid: 2 bytes per parameter, on bf16's grid, of which nothing is lost"};
constexpr Key kEf14[] = {{"decay", Kind::number, "1", "(0, 1]", "what of the residual is kept per step; below 1 forgets"},
                         {"lr_rescale", Kind::flag, "0", "0|1", "the residual keeps its worth when the optimizer's learning rate changes"},
                         kResidual};
constexpr Key kWorkerEma = {"worker_ema", Kind::number, "1", "(0, 1]",
                            "share of the new gradient in a rank's running average, which stands in for it; 1 = off"};
constexpr Key kInit = {"init", Kind::word, "dense", "dense|compressed|zero",
                       "of the estimates: by the last of max(1, start_step) dense steps, the first payload, or 0"};
constexpr Key kEta = {"eta", Kind::number_or_word, "auto", "auto|theory|paper|[0, inf)",
                      "share of the residual in a message; auto: the codec's contraction, theory and paper: smaller ones that are proven"};
constexpr Key kEf21[] = {kWorkerEma, kInit, kEstimate};
constexpr Key kEcontrol[] = {kEta, kWorkerEma, kInit, kResidual, kEstimate};
constexpr Key kDgc[] = {kMomentum, kNesterov, kMask, kClipNorm};
constexpr Key kWarmup[] = {{"densities", Kind::number_list, "0.25/0.0625/0.015625/0.004", "(0, 1]",
                            "one after the other; those below the codec's density are left out"},
                           {"steps", Kind::integer, "", "[1, inf)", "synchronised steps per entry"}};

constexpr Name kCodecs[] = {{"none", {}, "the transport's own all-reduce"},
                            {"topk", kTopk, "the entries of largest magnitude, tensor by tensor"},
                            {"sign", kSign, "one bit per entry, and a scale per block"}};
constexpr Name kFeedbacks[] = {{"none", {}, "what is not sent is lost"},
                               {"ef14", kEf14, "error feedback: what was not sent is added to the next message"},
                               {"ef21", kEf21, "the change of a gradient's estimate is sent, and no residual kept (Richtárik et al. 2021)"},
                               {"econtrol", kEcontrol, "the same and a residual, fed back by degrees (Gao et al. 2024)"},
                               {"dgc", kDgc, "error feedback with momentum correction (Deep Gradient Compression)"}};
constexpr Name kTargets[] = {{"gradient", {}, "gradients are compressed"},
                             {"momentum", kMomentumTarget, "Adam's momentum is, once the variance is frozen (1-bit Adam)"}};
constexpr Name kExchanges[] = {{"auto", {}, "what the codec allows; a tensor travels dense where that sends no more bytes"},
                               {"gather", {}, "every rank receives every payload, whatever it costs"},
                               {"two_phase", {}, "each rank sums its part of every payload and sends the mean on, encoded again"}};
constexpr Name kPolicies[] = {{"none", {}, "the codec's own density throughout"}, {"warmup", kWarmup, "high densities first"}};

constexpr Key kNoKey = {};
constexpr Slot kSlots[] = {
    {"codec", kCodecs, kNoKey},
    {"feedback", kFeedbacks, kNoKey},
    {"target", kTargets, kNoKey},
    {"exchange", kExchanges, kNoKey},
    {"policy", kPolicies, kNoKey},
    {"min_numel",
     {},
     {"min_numel", Kind::integer, "16384", "[0, inf)", "tensors with fewer elements, or fewer than two dimensions, stay dense"}},
    {"start_step", {}, {"start_step", Kind::integer, "0", "[0, inf)", "synchronised steps that stay dense first"}},
    {"timeout", {}, {"timeout", Kind::number, "600", "(0, 1e9]", "seconds per blocking call"}},
    {"seed", {}, {"seed", Kind::integer, "0", "[0, inf)", "of all random numbers: where samples are taken"}},
    {"check_every", {}, {"check_every", Kind::integer, "0", "[0, inf)", "steps between fingerprints of the replicas; 0 = off"}},
};

constexpr Key kDgcPreset[] = {
    {"density", Kind::number, "0.001", "(0, 1]", "entries kept / entries of the tensor"},
    kMomentum,
    kNesterov,
    kMask,
    kClipNorm,
    {"warmup_steps", Kind::integer, "0", "[0, inf)", "synchronised steps per entry of the paper's warm-up; 0 = no warm-up"},
    kWire,
    kSelect};

std::string expand_dgc(const Spec& dgc) {
  std::string slots = "codec=topk:density=" + dgc.text("density") + ",wire=" + dgc.text("wire") + ",select=" + dgc.text("select");
  slots += " feedback=dgc:momentum=" + dgc.text("momentum") + ",nesterov=" + dgc.text("nesterov") + ",mask=" + dgc.text("mask") +
           ",clip_norm=" + dgc.text("clip_norm");
  if (dgc.integer("warmup_steps") > 0) slots += " policy=warmup:steps=" + dgc.text("warmup_steps");
  return slots;
}

constexpr Key kOneBitAdamPreset[] = {kBeta1, kFreeze, kClipNorm, kScale, kBlock};

std::string expand_onebit_adam(const Spec& adam) {
  return "codec=sign:scale=" + adam.text("scale") + ",block=" + adam.text("block") +
         " feedback=ef14 target=momentum:beta1=" + adam.text("beta1") + ",freeze=" + adam.text("freeze") +
         ",clip_norm=" + adam.text("clip_norm");
}

constexpr Key kEcontrolPreset[] = {{"density", Kind::number, "0.1", "(0, 1]", "of codec=topk: entries kept / entries of the tensor"},
                                   kWire,
                                   kSelect,
                                   kEta,
                                   kWorkerEma,
                                   kInit,
                                   kResidual,
                                   kEstimate};

std::string expand_econtrol(const Spec& econtrol) {
  return "codec=topk:density=" + econtrol.text("density") + ",wire=" + econtrol.text("wire") + ",select=" + econtrol.text("select") +
         " feedback=econtrol:eta=" + econtrol.text("eta") + ",worker_ema=" + econtrol.text("worker_ema") +
         ",init=" + econtrol.text("init") + ",residual=" + econtrol.text("residual") + ",estimate=" + econtrol.text("estimate");
}

constexpr Preset kPresets[] = {{{"dgc", kDgcPreset, "Deep Gradient Compression (Lin et al. 2018)"}, expand_dgc},
                               {{"onebit_adam", kOneBitAdamPreset, "1-bit Adam (Tang et al. 2021)"}, expand_onebit_adam},
                               {{"econtrol", kEcontrolPreset, "EControl (Gao et al. 2024) with top-k"}, expand_econtrol}};

/// Whether the codec sends chosen entries, so that there are some that it leaves out and a density to set.
bool is_sparse(const Spec& codec) { return codec.name == "topk"; }

std::string brief(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", x);
  return text;
}

/// Whether a canonical value is one of its key's words.
bool is_word(const std::string& value) { return value.find_first_not_of("abcdefghijklmnopqrstuvwxyz") == std::string::npos; }

std::string describe(const Key& key, const std::string& indent) {
  std::string domain(key.allowed);
  std::replace(domain.begin(), domain.end(), '|', ' ');
  if (key.kind == Kind::integer_or_word) domain.insert(domain.rfind(" [") + 1, "or an integer in ");
  if (key.kind == Kind::number_or_word) domain.insert(domain.rfind(" [") + 1, "or a number in ");
  if (key.kind == Kind::integer) domain = "integer in " + domain;
  if (key.kind == Kind::number) domain = "number in " + domain;
  if (key.kind == Kind::number_list) domain = "numbers in " + domain + ", separated by '/'";
  const std::string fallback = key.fallback.empty() ? "must be given" : "default " + std::string(key.fallback);
  return indent + std::string(key.name) + "  " + std::string(key.help) + " [" + domain + "; " + fallback + "]\n";
}

std::string describe(const Name& name, const std::string& prefix, const std::string& indent) {
  std::string text = indent + prefix + std::string(name.name) + "  " + std::string(name.help) + "\n";
  for (const Key& key : name.keys) text += describe(key, indent + "    ");
  return text;
}

}  // namespace

std::span<const Slot> slots() { return kSlots; }
std::span<const Preset> presets() { return kPresets; }

std::string help() {
  std::string text = "[preset[:key=value,...]] [slot=name[:key=value,...]] ...\n\npresets\n";
  for (const Preset& preset : kPresets) text += describe(preset.name, "", "  ");
  text += "\nslots (the first name is the default)\n";
  for (const Slot& slot : kSlots) {
    for (const Name& name : slot.names) text += describe(name, std::string(slot.name) + "=", "  ");
    if (slot.names.empty()) text += describe(slot.plain, "  ");
  }
  return text;
}

void check_combination(const Config& config) {
  const auto refuse = [](const std::string& what) { fail(Errc::invalid_config, what); };
  const std::string codec = "codec=" + config.codec().name;
  const bool sends_all = config.codec().name == "none";
  if (config.feedback().name == "dgc" && !is_sparse(config.codec())) {
    refuse("feedback=dgc needs a sparse codec; " + codec + " is dense. Choose codec=topk:density=..., or feedback=none");
  }
  if (config.feedback().name != "none" && sends_all) {
    refuse("feedback=" + config.feedback().name + " needs a codec that leaves something out; " + codec +
           " sends everything, so there is nothing to feed back");
  }
  if (config.policy().name == "warmup" && !is_sparse(config.codec())) {
    refuse("policy=warmup needs a sparse codec, whose density it sets; " + codec + " has none");
  }
  if (config.exchange().name == "two_phase" && config.codec().name != "sign") {
    refuse("exchange=two_phase needs a codec whose sums are encoded again, codec=sign; " +
           (sends_all ? codec + " sends no payloads, choose exchange=auto"
                      : "payloads of " + codec + " are gathered, choose exchange=auto or gather"));
  }
  if (config.target().name == "momentum" && config.codec().name != "sign") {
    refuse("target=momentum compresses the momentum by codec=sign; " + codec + " compresses gradients, choose target=gradient");
  }
  const bool estimates = config.feedback().name == "ef21" || config.feedback().name == "econtrol";
  if (config.target().name == "momentum" && estimates) {
    refuse("target=momentum goes with feedback=ef14 or none; feedback=" + config.feedback().name + " estimates gradients");
  }
  if (estimates && config.feedback().text("estimate") == "grid") {
    const bool signs = !is_sparse(config.codec());
    if (signs || config.codec().text("wire") != "fp32") {
      refuse("feedback=" + config.feedback().name +
             ":estimate=grid sends values that take estimates to bf16 numbers, in fp32: it needs codec=topk:wire=fp32, not " + codec +
             (signs ? "" : ":wire=" + config.codec().text("wire")) + "; or choose estimate=fp32");
    }
  }
  if (config.feedback().name == "econtrol" && config.codec().name == "sign" && config.codec().text("scale") == "l2" &&
      is_word(config.feedback().text("eta"))) {
    refuse(
        "feedback=econtrol:eta=" + config.feedback().text("eta") +
        " takes eta from the codec's contraction; codec=sign:scale=l2 has none where a few entries are large. Choose scale=l1, or give eta "
        "a number");
  }
  if (const std::string& block = config.codec().name == "sign" ? config.codec().text("block") : ""; !block.empty() && block != "tensor") {
    if (config.codec().integer("block") % 8 != 0) refuse("sign: block=" + block + " is not a multiple of 8");
  }
  if (config.exchange().name == "gather" && sends_all) {
    refuse("exchange=gather needs a codec, whose payloads it gathers; " + codec +
           " has none and uses the transport's all-reduce. Choose exchange=auto");
  }
}

std::vector<std::string> warnings(const Config& config) {
  std::vector<std::string> out;
  const Spec &codec = config.codec(), &feedback = config.feedback();
  const double density = is_sparse(codec) ? codec.number("density") : 1.0;
  const double contraction = is_sparse(codec) ? density : kSignDelta;
  const bool leaves_out = is_sparse(codec) ? density < 1 : codec.name != "none";
  if (leaves_out && feedback.name == "none") {
    out.push_back("feedback=none with codec=" + codec.name +
                  ": what is not sent is lost, and training may diverge where error feedback converges (three quadratics of Beznosikov et "
                  "al. 2020, ./bench/run error_control); choose feedback=ef14");
  }
  const bool estimates = feedback.name == "ef21" || feedback.name == "econtrol";
  if (feedback.name == "econtrol" && !is_word(feedback.text("eta")) && feedback.number("eta") > 2 * contraction) {
    out.push_back("econtrol: eta=" + feedback.text("eta") + " is above twice the contraction of codec=" + codec.name + ", " +
                  brief(2 * contraction) + ", where the residual grows without bound; eta=auto is " + brief(contraction));
  }
  if (feedback.name != "none" && config.target().name == "gradient" && codec.name == "sign" && codec.text("scale") == "l2") {
    out.push_back("feedback=" + feedback.name +
                  " with codec=sign:scale=l2: that is no contraction where a few entries are large, and the " +
                  (estimates ? "estimates" : "residuals") + " may diverge; choose scale=l1, or watch measured_delta in stats");
  }
  if (estimates && is_sparse(codec) && density < 0.05 && feedback.number("worker_ema") == 1) {
    out.push_back("feedback=" + feedback.name + " at density " + brief(density) +
                  ": with small noisy minibatches its estimates are stale and feedback=ef14 is better; or choose worker_ema=0.1");
  }
  return out;
}

std::vector<std::string> hints(const Config& config) {
  const Spec &codec = config.codec(), &feedback = config.feedback();
  if (codec.name == "none" || feedback.name == "none" || config.target().name == "momentum") return {};
  const bool estimates = feedback.name == "ef21" || feedback.name == "econtrol";
  if (feedback.name == "ef14" && feedback.number("decay") < 1)
    return {"feedback=ef14:decay=" + feedback.text("decay") +
            " forgets: it suits pseudo-gradients of local steps, where .95 stands for the outer momentum (SparseLoCo); for gradients of "
            "single steps choose decay=1"};
  if (!is_sparse(codec)) {
    const std::string adam =
        "under Adam choose onebit_adam: signs of the momentum, with the variance frozen, lose less than signs of gradients";
    if (feedback.name != "econtrol") return {adam};
    return {adam,
            "feedback=econtrol with codec=" + codec.name +
                " is better than feedback=ef14 with large batches, with different data on the ranks and in convex and federated problems, "
                "where ef14 stops at a level" +
                (feedback.number("worker_ema") < 1 ? "" : "; with small noisy minibatches choose ef14 or add worker_ema=0.1")};
  }
  const std::string at = "density " + brief(codec.number("density"));
  if (codec.number("density") < 0.05) {
    if (!estimates)
      return {"feedback=" + feedback.name + " at " + at +
              " suits small noisy minibatches; where ranks have very different data choose feedback=econtrol:worker_ema=0.1"};
    if (feedback.number("worker_ema") == 1) return {};  // there is a warning
    return {"feedback=" + feedback.name + " with worker_ema at " + at +
            " suits ranks with different data, convex and federated problems; with small noisy minibatches of like data choose "
            "feedback=ef14"};
  }
  if (!estimates)
    return {"at " + at + " with large batches, or with different data on the ranks, feedback=econtrol converges where " + feedback.name +
            " stops at a level"};
  if (feedback.name == "ef21" && feedback.number("worker_ema") < 1)
    return {"feedback=ef21 with worker_ema at " + at +
            " suits convex and federated problems; where the loss of training counts choose feedback=econtrol"};
  if (feedback.name == "ef21")
    return {"feedback=ef21 at " + at + " suits gradients with little noise; with minibatches choose feedback=econtrol"};
  return {"feedback=econtrol at " + at + " suits large batches, ranks with different data, convex and federated problems" +
          (feedback.number("worker_ema") < 1 ? "" : "; with small noisy minibatches add worker_ema=0.1")};
}

}  // namespace grammar

namespace {

/// The fp32 nearest to `value` inside [lowest, highest]: a momentum just below 1 must not become 1, a clip norm or
/// an eta just above 0 not "off".
float narrow(double value, float lowest, float highest) { return float(std::clamp(value, double(lowest), double(highest))); }

constexpr float kTiniest = std::numeric_limits<float>::denorm_min();

DType wire_type(const Spec& codec) {
  for (const DType dtype : {DType::fp32, DType::bf16, DType::fp16}) {
    if (codec.text("wire") == to_string(dtype)) return dtype;
  }
  fail(Errc::internal, "no wire type is called " + codec.text("wire"));
}

TopKOptions::Index index_of(const Spec& codec) {
  using Index = TopKOptions::Index;
  const std::string& word = codec.text("index");
  return word == "u32" ? Index::u32 : word == "u16" ? Index::u16 : word == "bitmap" ? Index::bitmap : Index::automatic;
}

TopKOptions topk_options(const Config& config) {
  const Spec& codec = config.codec();
  return {.density = codec.number("density"),
          .wire = wire_type(codec),
          .exact = codec.text("select") == "exact",
          .index = index_of(codec),
          .seed = config.seed()};
}

SignOptions sign_options(const Spec& codec) {
  return {.scale = codec.text("scale") == "l2" ? SignOptions::Scale::l2 : SignOptions::Scale::l1,
          .block = codec.text("block") == "tensor" ? 0 : std::size_t(codec.integer("block"))};
}

}  // namespace

std::unique_ptr<const Codec> make_codec(const Config& config, Isa isa) {
  const Spec& codec = config.codec();
  if (codec.name == "none") return nullptr;
  if (codec.name == "topk") return make_topk(topk_options(config), isa);
  if (codec.name == "sign") return make_sign(sign_options(codec), isa);
  fail(Errc::internal, "codec=" + codec.name + " is in the grammar, but nothing makes it");
}

std::unique_ptr<const Codec> make_device_codec(const Config& config) {
  const Spec& codec = config.codec();
  if (codec.name == "none") return nullptr;
  if (codec.name == "topk") return make_topk_cuda(topk_options(config));
  if (codec.name == "sign") return make_sign_cuda(sign_options(codec));
  fail(Errc::internal, "codec=" + codec.name + " is in the grammar, but nothing makes it for a GPU");
}

Recursion make_recursion(const Config& config) {
  const Spec& feedback = config.feedback();
  Recursion recursion;
  const auto nonnegative = [](double value) { return value == 0 ? 0.0f : narrow(value, kTiniest, std::numeric_limits<float>::max()); };
  if (feedback.name == "ef14") {
    recursion.kind = Recursion::Kind::error_feedback;
    recursion.decay = narrow(feedback.number("decay"), kTiniest, 1.0f);
    recursion.narrow = feedback.text("residual") == "bf16";
  } else if (feedback.name == "dgc") {
    recursion.kind = Recursion::Kind::momentum_correction;
    recursion.momentum = narrow(feedback.number("momentum"), 0.0f, std::nextafter(1.0f, 0.0f));
    recursion.nesterov = feedback.flag("nesterov");
    recursion.mask = feedback.flag("mask");
    recursion.clip_norm = nonnegative(feedback.number("clip_norm"));
  }
  if (feedback.name == "ef21" || feedback.name == "econtrol") {
    recursion.kind = Recursion::Kind::estimate;
    recursion.fresh = narrow(feedback.number("worker_ema"), kTiniest, 1.0f);
    recursion.control = feedback.name == "econtrol";
    recursion.grid = feedback.text("estimate") == "grid";
  }
  if (recursion.control) {
    recursion.narrow = feedback.text("residual") == "bf16";
    const std::string& eta = feedback.text("eta");
    recursion.eta = eta == "auto"     ? Recursion::Eta::automatic
                    : eta == "theory" ? Recursion::Eta::theory
                    : eta == "paper"  ? Recursion::Eta::paper
                                      : Recursion::Eta::number;
    if (recursion.eta == Recursion::Eta::number) recursion.given_eta = nonnegative(feedback.number("eta"));
  }
  if (config.target().name == "momentum") {
    recursion.averaged = true;
    recursion.clip_norm = nonnegative(config.target().number("clip_norm"));
  }
  return recursion;
}

std::unique_ptr<const RatioPolicy> make_policy(const Config& config) {
  const Spec& policy = config.policy();
  const double density = grammar::is_sparse(config.codec()) ? config.codec().number("density") : 1.0;
  if (policy.name == "warmup") return std::make_unique<WarmupPolicy>(policy.numbers("densities"), policy.integer("steps"), density);
  return std::make_unique<WarmupPolicy>(std::vector<double>(), 1, density);  // no entries: the codec's own density from the first step on
}

}  // namespace thinwire
