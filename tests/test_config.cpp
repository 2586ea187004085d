// The configuration grammar: every key, every refusal, canonical text, and what is made of a Config. The round trips compare with values
// that the test chose itself, so they share nothing with the parser.

#include <gtest/gtest.h>

#include <algorithm>
#include <clocale>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <locale>
#include <random>
#include <string>
#include <vector>

#include "compressors/core/error.hpp"
#include "compressors/core/isa.hpp"
#include "compressors/core/registry.hpp"

namespace thinwire {
namespace {

/// The message of the invalid_config that `text` is refused with; fails the test if it is accepted or refused otherwise.
std::string refusal(const std::string& text) {
  try {
    const Config config = Config::parse(text);
    ADD_FAILURE() << "accepted: " << text << " as " << config.str();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::invalid_config) << text;
    return error.what();
  }
  return {};
}

constexpr char kTopkDefaults[] = "codec=topk:density=0.01,wire=fp32,select=sampled,index=auto";
constexpr char kDgcDefaults[] = "feedback=dgc:momentum=0.9,nesterov=0,mask=1,clip_norm=0";
constexpr char kRest[] = "min_numel=16384 start_step=0 timeout=600 seed=0 check_every=0";

TEST(Config, DefaultIsDense) {
  const Config config;
  EXPECT_EQ(config.str(), std::string("codec=none feedback=none target=gradient exchange=auto policy=none ") + kRest);
  EXPECT_EQ(config.codec().name, "none");
  EXPECT_EQ(config.feedback().name, "none");
  EXPECT_EQ(config.target().name, "gradient");
  EXPECT_EQ(config.exchange().name, "auto");
  EXPECT_EQ(config.policy().name, "none");
  EXPECT_EQ(config.min_numel(), 16384u);
  EXPECT_EQ(config.start_step(), 0u);
  EXPECT_EQ(config.timeout_seconds(), 600.0);
  EXPECT_EQ(config.seed(), 0u);
  EXPECT_EQ(config.check_every(), 0u);
  EXPECT_EQ(config, Config::parse("codec=none"));
}

TEST(Config, EveryDefaultIsPrinted) {
  EXPECT_EQ(Config::parse("codec=topk:density=0.01").str(),
            std::string(kTopkDefaults) + " feedback=none target=gradient exchange=auto policy=none " + kRest);
  EXPECT_EQ(Config::parse("codec=topk:density=0.01 feedback=ef14").feedback().str(), "ef14:decay=1,lr_rescale=0,residual=fp32");
  EXPECT_EQ("feedback=" + Config::parse("codec=topk:density=0.01 feedback=dgc").feedback().str(), kDgcDefaults);
  EXPECT_EQ(Config::parse("codec=topk:density=0.01 policy=warmup:steps=7").policy().str(),
            "warmup:densities=0.25/0.0625/0.015625/0.004,steps=7");
}

TEST(Config, EveryKeyTakesEveryValue) {
  const struct {
    const char* text;
    const char* printed;
  } cases[] = {
      {"codec=topk:density=1", "codec=topk:density=1,wire=fp32"},
      {"codec=topk:density=5e-324", "codec=topk:density=5e-324,"},
      {"codec=topk:density=.5,wire=fp32", "density=0.5,wire=fp32,"},
      {"codec=topk:wire=bf16,density=.5", "density=0.5,wire=bf16,"},
      {"codec=topk:density=.5,wire=fp16", "wire=fp16,"},
      {"codec=topk:density=.5,select=sampled", "select=sampled,"},
      {"codec=topk:density=.5,select=exact", "select=exact,"},
      {"codec=topk:density=.5,index=auto", "index=auto "},
      {"codec=topk:density=.5,index=u32", "index=u32 "},
      {"codec=topk:density=.5,index=u16", "index=u16 "},
      {"codec=topk:density=.5,index=bitmap", "index=bitmap "},
      {"codec=topk:density=.5 feedback=none", "feedback=none "},
      {"codec=topk:density=.5 feedback=ef14:decay=0.75", "feedback=ef14:decay=0.75,lr_rescale=0,residual=fp32 "},
      {"codec=topk:density=.5 feedback=ef14:lr_rescale=1", "lr_rescale=1,"},
      {"codec=topk:density=.5 feedback=ef14:residual=bf16", "residual=bf16 "},
      {"codec=topk:density=.5 feedback=ef21:worker_ema=.5,init=zero", "feedback=ef21:worker_ema=0.5,init=zero,estimate=fp32 "},
      {"codec=topk:density=.5 feedback=ef21:init=compressed", "feedback=ef21:worker_ema=1,init=compressed,estimate=fp32 "},
      {"codec=topk:density=.5 feedback=ef21:estimate=grid", "estimate=grid "},
      {"codec=sign feedback=econtrol", "feedback=econtrol:eta=auto,worker_ema=1,init=dense,residual=fp32,estimate=fp32 "},
      {"econtrol:residual=bf16,estimate=grid", "residual=bf16,estimate=grid "},
      {"codec=sign feedback=econtrol:eta=theory", "eta=theory,"},
      {"codec=sign feedback=econtrol:eta=paper", "eta=paper,"},
      {"codec=sign:scale=l2 feedback=econtrol:eta=.250", "eta=0.25,"},
      {"codec=sign feedback=econtrol:eta=0", "eta=0,"},
      {"codec=topk:density=.5 feedback=dgc:momentum=0", "feedback=dgc:momentum=0,"},
      {"codec=topk:density=.5 feedback=dgc:momentum=0.9999999999999999", "momentum=0.9999999999999999,"},
      {"codec=topk:density=.5 feedback=dgc:nesterov=1", "nesterov=1,"},
      {"codec=topk:density=.5 feedback=dgc:mask=0", "mask=0,"},
      {"codec=topk:density=.5 feedback=dgc:clip_norm=2.5", "clip_norm=2.5 "},
      {"codec=none target=gradient", "target=gradient "},
      {"codec=none exchange=auto", "exchange=auto "},
      {"codec=topk:density=.5 exchange=gather", "exchange=gather "},
      {"codec=none policy=none", "policy=none "},
      {"codec=topk:density=.001 policy=warmup:densities=1/.5/.25,steps=10", "policy=warmup:densities=1/0.5/0.25,steps=10 "},
      {"codec=topk:density=.5 policy=warmup:steps=18446744073709551615", ",steps=18446744073709551615 "},
      {"min_numel=0", "min_numel=0 "},
      {"start_step=100", "start_step=100 "},
      {"timeout=0.5", "timeout=0.5 "},
      {"timeout=1e9", "timeout=1e+09 "},
      {"seed=18446744073709551615", "seed=18446744073709551615 "},
      {"check_every=50", "check_every=50"},
  };
  for (const auto& [text, printed] : cases) {
    SCOPED_TRACE(text);
    const Config config = Config::parse(text);
    EXPECT_NE(config.str().find(printed), std::string::npos) << config.str();
    EXPECT_EQ(Config::parse(config.str()), config);
  }
}

TEST(Config, NumbersHaveOneText) {
  for (const char* same : {"0.001", "1e-3", ".001", "0.0010", "1E-3", "0.1e-2", "10e-4"}) {
    const Config config = Config::parse(std::string("codec=topk:density=") + same);
    EXPECT_EQ(config.codec().text("density"), "0.001") << same;
    EXPECT_EQ(config.codec().number("density"), 0.001) << same;
  }
  EXPECT_EQ(Config::parse("dgc:clip_norm=-0"), Config::parse("dgc"));  // one zero, or equal configs would print differently
  EXPECT_EQ(Config::parse("min_numel=00016").min_numel(), 16u);
}

TEST(Config, DgcPresetIsASettingOfTheSlots) {
  EXPECT_EQ(Config::parse("dgc:density=0.01").str(),
            std::string(kTopkDefaults) + " " + kDgcDefaults + " target=gradient exchange=auto policy=none " + kRest);
  EXPECT_EQ(Config::parse("dgc"), Config::parse("codec=topk:density=0.001 feedback=dgc"));
  EXPECT_EQ(Config::parse("dgc:density=0.02,momentum=0.5,nesterov=1,mask=0,clip_norm=3,warmup_steps=40,wire=fp16,select=exact"),
            Config::parse("codec=topk:density=0.02,wire=fp16,select=exact feedback=dgc:momentum=0.5,nesterov=1,mask=0,clip_norm=3 "
                          "policy=warmup:densities=0.25/0.0625/0.015625/0.004,steps=40"));
}

TEST(Config, SlotsAfterAPresetReplaceItsOwn) {
  EXPECT_EQ(Config::parse("dgc:density=0.1 start_step=100"), Config::parse("codec=topk:density=0.1 feedback=dgc start_step=100"));
  EXPECT_EQ(Config::parse("dgc:nesterov=1 codec=topk:density=0.5"), Config::parse("codec=topk:density=0.5 feedback=dgc:nesterov=1"));
  EXPECT_EQ(Config::parse("dgc feedback=ef14"), Config::parse("codec=topk:density=0.001 feedback=ef14"));
  EXPECT_EQ(Config::parse("dgc policy=none"), Config::parse("dgc"));
  EXPECT_EQ(Config::parse("dgc codec=none feedback=none"), Config());
}

TEST(Config, BlanksMeanNothingBesidePunctuation) {
  const Config plain = Config::parse("codec=topk:density=0.25,wire=bf16 feedback=ef14 policy=warmup:densities=0.5/0.25,steps=3");
  EXPECT_EQ(
      Config::parse("  codec = topk : density = 0.25 , wire=bf16\n\tfeedback= ef14\r\n policy =warmup:densities=0.5 / 0.25,\n steps=3\v\f"),
      plain);
  EXPECT_EQ(Config::parse("feedback=ef14 policy=warmup:steps=3,densities=0.5/0.25 codec=topk:wire=bf16,density=0.25"),
            plain);  // nor does order
  EXPECT_EQ(Config::parse(" dgc :density=0.5"), Config::parse("dgc:density=0.5"));
}

TEST(Config, RefusalsSayWhatWhereAndWhatIsAllowed) {
  const struct {
    const char* text;
    std::vector<std::string> fragments;
  } cases[] = {
      // the whole
      {"", {"the configuration is empty", "codec=none", "dgc", "min_numel"}},
      {" \t\n", {"the configuration is empty"}},
      {"codec=none codec=topk:density=0.1", {"the slot codec is given twice"}},
      {"seed=1 seed=1", {"the slot seed is given twice"}},
      {"dgc dgc", {"the preset 'dgc' must come first"}},
      {"codec=none dgc", {"the preset 'dgc' must come first"}},
      // slots and presets
      {"codek=none", {"unknown slot 'codek'", "did you mean 'codec'", "feedback", "check_every"}},
      {"start_setp=3", {"unknown slot 'start_setp'", "did you mean 'start_step'"}},
      {"=none", {"unknown slot ''", "slots: codec"}},
      {"frobnicate=1", {"unknown slot 'frobnicate'; slots: codec"}},
      {"dgc density=0.1", {"unknown slot 'density'", "a key of dgc, econtrol, codec=topk"}},
      {"dcg:density=0.1", {"unknown preset 'dcg'", "did you mean 'dgc'", "presets: dgc"}},
      {"DGC", {"unknown preset 'DGC'", "did you mean 'dgc'"}},
      {"onebit_lamb", {"unknown preset 'onebit_lamb'", "presets: dgc, onebit_adam"}},
      {"topk:density=0.1", {"'topk' is not a preset", "write codec=topk:density=0.1"}},
      {"codec", {"the slot 'codec' has no value", "write codec="}},
      {",", {"unknown preset ','"}},
      // names
      {"codec=tokp:density=0.1", {"codec=tokp is unknown", "did you mean 'topk'", "allowed: none, topk"}},
      {"codec=", {"codec= is unknown", "allowed: none, topk"}},
      {"codec=quantize", {"codec=quantize is unknown", "allowed: none, topk, sign"}},
      {"codec=quantize:bits=4", {"codec=quantize is unknown"}},
      {"codec=lowrank:rank=4", {"codec=lowrank is unknown"}},
      {"feedback=ef22", {"feedback=ef22 is unknown", "did you mean 'ef21'", "allowed: none, ef14, ef21, econtrol, dgc"}},
      {"feedback=econtrol", {"feedback=econtrol needs a codec that leaves something out", "codec=none sends everything"}},
      {"codec=sign feedback=econtrol:estimate=grid", {"feedback=econtrol:estimate=grid", "needs codec=topk:wire=fp32, not codec=sign;"}},
      {"codec=topk:density=0.1,wire=bf16 feedback=ef21:estimate=grid",
       {"feedback=ef21:estimate=grid", "needs codec=topk:wire=fp32, not codec=topk:wire=bf16; or choose estimate=fp32"}},
      {"codec=topk:density=0.1 feedback=ef14:residual=fp16", {"ef14: residual=fp16 is not valid", "allowed: fp32, bf16"}},
      {"codec=topk:density=0.1 feedback=ef21:residual=bf16", {"ef21: unknown key 'residual'", "worker_ema, init, estimate"}},
      {"codec=topk:density=0.1 feedback=econtrol:eta=-1", {"econtrol: eta=-1 is outside [0, inf)"}},
      {"codec=topk:density=0.1 feedback=econtrol:eta=nan",
       {"econtrol: eta=nan is not", "allowed: auto, theory, paper, or a number in [0, inf)"}},
      {"codec=topk:density=0.1 feedback=econtrol:eta=autp", {"did you mean 'auto'"}},
      {"codec=topk:density=0.1 feedback=ef21:eta=0.1", {"ef21: unknown key 'eta'", "worker_ema, init"}},
      {"codec=topk:density=0.1 feedback=ef21:worker_ema=0", {"ef21: worker_ema=0 is outside (0, 1]"}},
      {"codec=sign:scale=l2 feedback=econtrol", {"eta=auto takes eta from the codec's contraction", "Choose scale=l1", "eta a number"}},
      {"codec=sign feedback=ef21 target=momentum:freeze=3", {"target=momentum goes with feedback=ef14 or none"}},
      {"target=velocity", {"target=velocity is unknown", "allowed: gradient, momentum"}},
      {"exchange=ring", {"exchange=ring is unknown", "allowed: auto, gather, two_phase"}},
      {"exchange=linear", {"exchange=linear is unknown"}},
      {"policy=lgreco", {"policy=lgreco is unknown", "allowed: none, warmup"}},
      {"policy=warmpu:steps=1", {"policy=warmpu is unknown", "did you mean 'warmup'"}},
      // keys
      {"codec=topk", {"topk: density must be given", "(0, 1]"}},
      {"codec=topk:wire=fp32", {"topk: density must be given"}},
      {"codec=topk:", {"topk: '' is not key=value", "its keys are density, wire, select, index"}},
      {"codec=topk:0.1", {"topk: '0.1' is not key=value", "density, wire, select, index"}},
      {"codec=topk:density=0.1,", {"topk: '' is not key=value"}},
      {"codec=topk:density=0.1,,wire=fp32", {"topk: '' is not key=value"}},
      {"codec=topk:desnity=0.1", {"topk: unknown key 'desnity'", "did you mean 'density'"}},
      {"codec=topk:density=0.1,block=3", {"topk: unknown key 'block'; its keys are density, wire, select, index"}},
      {"codec=topk:density=0.1,density=0.1", {"topk: density is given twice"}},
      {"codec=topk:density=0.1, feedback=ef14", {"topk: unknown key 'feedback'", "a slot", "not a comma"}},
      {"codec=none:density=0.1", {"codec=none: unknown key 'density'", "it takes no keys"}},
      {"feedback=none:", {"feedback=none: '' is not key=value; it takes no keys"}},
      {"dgc:densty=0.1", {"dgc: unknown key 'densty'", "did you mean 'density'", "warmup_steps"}},
      {"codec=topk:density=0.1 feedback=ef14:lr_rescal=1",
       {"ef14: unknown key 'lr_rescal'", "did you mean 'lr_rescale'", "its keys are decay, lr_rescale, residual"}},
      {"codec=topk:density=0.1 policy=warmup", {"warmup: steps must be given", "[1, inf)"}},
      // numbers
      {"codec=topk:density=1.5", {"topk: density=1.5 is outside (0, 1]"}},
      {"codec=topk:density=0", {"topk: density=0 is outside (0, 1]"}},
      {"codec=topk:density=-0", {"topk: density=-0 is outside (0, 1]"}},
      {"codec=topk:density=-0.1", {"topk: density=-0.1 is outside (0, 1]"}},
      {"codec=topk:density=1.0000000000000002", {"is outside (0, 1]"}},
      {"codec=topk:density=", {"topk: density= is not a finite decimal number", "(0, 1]"}},
      {"codec=topk:density=abc", {"topk: density=abc is not a finite decimal number"}},
      {"codec=topk:density=0.1x", {"density=0.1x is not a finite decimal number"}},
      {"codec=topk:density=0,5", {"topk: density=0 is outside (0, 1]"}},
      {"codec=topk:density=1%", {"density=1% is not a finite decimal number"}},
      {"codec=topk:density=+0.1", {"density=+0.1 is not a finite decimal number"}},
      {"codec=topk:density=0x1p-3", {"density=0x1p-3 is not a finite decimal number"}},
      {"codec=topk:density=nan", {"density=nan is not a finite decimal number"}},
      {"codec=topk:density=inf", {"density=inf is not a finite decimal number"}},
      {"codec=topk:density=-infinity", {"is not a finite decimal number"}},
      {"codec=topk:density=1e-999", {"density=1e-999 is not a finite decimal number"}},
      {"codec=topk:density=0.1 feedback=ef14:decay=0", {"ef14: decay=0 is outside (0, 1]"}},
      {"codec=topk:density=0.1 feedback=ef14:decay=1.01", {"ef14: decay=1.01 is outside (0, 1]"}},
      {"codec=topk:density=0.1 feedback=dgc:momentum=1", {"feedback=dgc: momentum=1 is outside [0, 1)"}},
      {"dgc:momentum=-0.1", {"dgc: momentum=-0.1 is outside [0, 1)"}},
      {"dgc:clip_norm=-1", {"dgc: clip_norm=-1 is outside [0, inf)"}},
      {"dgc:clip_norm=inf", {"dgc: clip_norm=inf is not a finite decimal number"}},
      {"timeout=0", {"timeout=0 is outside (0, 1e9]"}},
      {"timeout=-5", {"timeout=-5 is outside (0, 1e9]"}},
      {"timeout=1e10", {"timeout=1e10 is outside (0, 1e9]"}},
      {"timeout=10s", {"timeout=10s is not a finite decimal number"}},
      {"min_numel=-1", {"min_numel=-1 is not a whole number", "[0, inf)"}},
      {"min_numel=1.5", {"min_numel=1.5 is not a whole number"}},
      {"min_numel=1e6", {"min_numel=1e6 is not a whole number"}},
      {"seed=18446744073709551616", {"seed=18446744073709551616 is not a whole number of 64 bits"}},
      {"start_step=x", {"start_step=x is not a whole number"}},
      {"check_every=", {"check_every= is not a whole number"}},
      {"dgc:warmup_steps=-1", {"dgc: warmup_steps=-1 is not a whole number"}},
      {"codec=topk:density=0.1 policy=warmup:steps=0", {"warmup: steps=0 is outside [1, inf)"}},
      {"codec=topk:density=0.1 policy=warmup:steps=1,densities=", {"warmup: densities=: entry '' is not a finite decimal number"}},
      {"codec=topk:density=0.1 policy=warmup:steps=1,densities=0.5/", {"densities=0.5/: entry '' is not"}},
      {"codec=topk:density=0.1 policy=warmup:steps=1,densities=0.5/2", {"densities=0.5/2: entry '2' is outside (0, 1]"}},
      // words and flags
      {"codec=topk:density=0.1,wire=fp8", {"topk: wire=fp8 is not valid", "allowed: fp32, bf16, fp16"}},
      {"codec=topk:density=0.1,wire=BF16", {"topk: wire=BF16 is not valid", "did you mean 'bf16'"}},
      {"codec=topk:density=0.1,select=exakt", {"topk: select=exakt is not valid", "did you mean 'exact'", "sampled, exact"}},
      {"codec=topk:density=0.1,index=u8", {"topk: index=u8 is not valid", "allowed: auto, u32, u16, bitmap"}},
      {"dgc:mask=2", {"dgc: mask=2 is neither 0 nor 1"}},
      {"dgc:nesterov=true", {"dgc: nesterov=true is neither 0 nor 1"}},
      // combinations
      {"feedback=dgc", {"feedback=dgc needs a sparse codec", "codec=none"}},
      {"dgc codec=none", {"feedback=dgc needs a sparse codec", "codec=none"}},
      {"feedback=ef14", {"feedback=ef14", "codec=none", "nothing to feed back"}},
      {"policy=warmup:steps=3", {"policy=warmup needs a sparse codec", "codec=none"}},
      {"dgc:warmup_steps=3 codec=none feedback=none", {"policy=warmup needs a sparse codec"}},
      // a slot that would drop what a preset was given
      {"dgc:density=0.1,wire=bf16 codec=topk:density=0.5", {"codec=topk:density=0.5", "preset dgc", "density=0.1 would be lost"}},
      {"dgc:wire=fp32 codec=topk:density=0.5", {"wire=fp32 would be lost"}},
      {"dgc:warmup_steps=5 policy=none", {"policy=none", "warmup_steps=5 would be lost"}},
      {"onebit_adam:freeze=1,clip_norm=0.5 target=momentum:freeze=7", {"preset onebit_adam", "freeze=1 would be lost"}},
      {"onebit_adam:block=64,scale=l2 codec=sign", {"block=64 would be lost"}},
      {"onebit_adam:freeze=5 target=gradient", {"target=gradient", "freeze=5 would be lost"}},
      {"codec=none exchange=gather", {"exchange=gather", "codec=none", "exchange=auto"}},
      {"exchange=two_phase", {"exchange=two_phase needs a codec", "codec=sign", "codec=none"}},
      {"dgc exchange=two_phase", {"exchange=two_phase needs a codec", "codec=topk", "exchange=auto"}},
      {"target=momentum", {"target=momentum", "codec=sign", "codec=none"}},
      {"onebit_adam codec=topk:density=0.1", {"target=momentum", "codec=sign", "codec=topk"}},
      {"codec=sign feedback=dgc", {"feedback=dgc needs a sparse codec; codec=sign is dense"}},
      {"codec=sign policy=warmup:steps=3", {"policy=warmup needs a sparse codec", "codec=sign"}},
      {"codec=sign:block=100", {"sign: block=100 is not a multiple of 8"}},
      {"codec=sign:block=0", {"sign: block=0 is outside [8, 1073741824]"}},
      {"codec=sign:block=tensr", {"sign: block=tensr is not valid", "did you mean 'tensor'", "or an integer in [8, 1073741824]"}},
      {"onebit_adam:freeze=-1", {"onebit_adam: freeze=-1 is not valid", "allowed: auto, or an integer in [1, inf)"}},
      {"onebit_adam:freeze=0", {"onebit_adam: freeze=0 is outside [1, inf)"}},
      {"onebit_adam:beta1=1", {"onebit_adam: beta1=1 is outside [0, 1)"}},
  };
  for (const auto& [text, fragments] : cases) {
    const std::string message = refusal(text);
    for (const std::string& fragment : fragments) {
      EXPECT_NE(message.find(fragment), std::string::npos) << text << "\n  says: " << message << "\n  lacks: " << fragment;
    }
  }
}

TEST(Config, MessagesArePrintableAndBounded) {
  const std::string garbage("codec=\x00\xff\x1b[31m\xc3\xa4", 16);
  const std::string message = refusal(garbage);
  EXPECT_NE(message.find("\\x00\\xff\\x1b"), std::string::npos) << message;
  for (const char c : message) EXPECT_TRUE(c >= 0x20 && c < 0x7f) << int(c);
  for (const char* before : {"codec=", "seed=", "codec=topk:density=", "codec=topk:", "dgc:wire=", "", "policy=warmup:densities="}) {
    EXPECT_LT(refusal(before + std::string(100000, 'x')).size(), 600u) << before;
  }
}

TEST(Config, EqualityIsOfValues) {
  const Config config = Config::parse("dgc:density=0.01");
  for (const char* other : {"dgc:density=0.02", "dgc:density=0.01,wire=bf16", "dgc:density=0.01,mask=0", "dgc:density=0.01 exchange=gather",
                            "dgc:density=0.01 policy=warmup:steps=1", "dgc:density=0.01 min_numel=1", "dgc:density=0.01 start_step=1",
                            "dgc:density=0.01 timeout=1", "dgc:density=0.01 seed=1", "dgc:density=0.01 check_every=1"}) {
    EXPECT_NE(config, Config::parse(other)) << other;
    EXPECT_NE(config.str(), Config::parse(other).str()) << other;
  }
}

TEST(Config, LocaleChangesNothing) {
  struct Comma : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const std::string expected = Config::parse("codec=topk:density=0.125 timeout=1234567.5").str();
  const std::string c_before = std::setlocale(LC_ALL, nullptr);
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Comma));
  for (const char* name : {"de_DE.UTF-8", "de_DE", "fr_FR.UTF-8"}) {
    if (std::setlocale(LC_ALL, name) != nullptr) break;  // where the machine has one; std::locale above works everywhere
  }
  EXPECT_EQ(Config::parse("codec=topk:density=0.125 timeout=1234567.5").str(), expected);
  std::locale::global(before);
  std::setlocale(LC_ALL, c_before.c_str());
}

/// A double in (0, 1): uniform, or of any magnitude, so that shortest texts of all lengths and exponents appear.
double any_fraction(std::mt19937_64& rng) {
  const double uniform = std::generate_canonical<double, 53>(rng) * (1 - 0x1p-53) + 0x1p-54;
  return rng() % 2 ? uniform : std::ldexp(uniform, -int(rng() % 1000));
}

/// 17 digits identify a double; printf is another implementation than the library's.
std::string long_form(double value) {
  char text[64];
  std::snprintf(text, sizeof text, "%.17g", value);
  return text;
}

TEST(Config, RandomRoundTrips) {
  std::mt19937_64 rng(20240611);
  const auto pick = [&](std::vector<std::string> words) { return words[rng() % words.size()]; };
  for (int i = 0; i < 3000; ++i) {
    const double density = any_fraction(rng), momentum = any_fraction(rng), decay = any_fraction(rng), timeout = any_fraction(rng) * 1e9;
    const std::string wire = pick({"fp32", "bf16", "fp16"}), select = pick({"sampled", "exact"}),
                      index = pick({"auto", "u32", "u16", "bitmap"});
    const std::string mask = pick({"0", "1"}), nesterov = pick({"0", "1"}), feedback = pick({"none", "ef14", "dgc"}),
                      exchange = pick({"auto", "gather"});
    const std::uint64_t min_numel = rng() >> (rng() % 64), start_step = rng() >> (rng() % 64), seed = rng(), check_every = rng() % 100;
    std::vector<double> densities(rng() % 6);
    for (double& entry : densities) entry = any_fraction(rng);

    std::vector<std::string> keys = {"density=" + long_form(density), "wire=" + wire, "select=" + select, "index=" + index};
    std::shuffle(keys.begin(), keys.end(), rng);
    std::string codec = "codec=topk";
    for (std::size_t k = 0; k < keys.size(); ++k) codec += (k == 0 ? ":" : ",") + keys[k];
    std::vector<std::string> slots = {codec,
                                      "exchange=" + exchange,
                                      "min_numel=" + std::to_string(min_numel),
                                      "start_step=" + std::to_string(start_step),
                                      "timeout=" + long_form(timeout),
                                      "seed=" + std::to_string(seed),
                                      "check_every=" + std::to_string(check_every)};
    if (feedback == "none") slots.push_back("feedback=none");
    if (feedback == "ef14") slots.push_back("feedback=ef14:decay=" + long_form(decay));
    if (feedback == "dgc") slots.push_back("feedback=dgc:momentum=" + long_form(momentum) + ",nesterov=" + nesterov + ",mask=" + mask);
    if (!densities.empty()) {
      std::string list;
      for (const double entry : densities) list += (list.empty() ? "" : "/") + long_form(entry);
      slots.push_back("policy=warmup:steps=" + std::to_string(1 + seed / 2) + ",densities=" + list);
    }
    std::shuffle(slots.begin(), slots.end(), rng);
    std::string text;
    for (const std::string& slot : slots) text += slot + std::string(1 + rng() % 3, " \t\n"[rng() % 3]);

    SCOPED_TRACE(text);
    const Config config = Config::parse(text);
    EXPECT_EQ(config.codec().number("density"), density);
    EXPECT_EQ(config.codec().text("wire"), wire);
    EXPECT_EQ(config.codec().text("select"), select);
    EXPECT_EQ(config.codec().text("index"), index);
    EXPECT_EQ(config.feedback().name, feedback);
    if (feedback == "ef14") { EXPECT_EQ(config.feedback().number("decay"), decay); }
    if (feedback == "dgc") {
      EXPECT_EQ(config.feedback().number("momentum"), momentum);
      EXPECT_EQ(config.feedback().flag("nesterov"), nesterov == "1");
      EXPECT_EQ(config.feedback().flag("mask"), mask == "1");
    }
    EXPECT_EQ(config.exchange().name, exchange);
    if (!densities.empty()) {
      EXPECT_EQ(config.policy().numbers("densities"), densities);
      EXPECT_EQ(config.policy().integer("steps"), 1 + seed / 2);
    }
    EXPECT_EQ(config.min_numel(), min_numel);
    EXPECT_EQ(config.start_step(), start_step);
    EXPECT_EQ(config.timeout_seconds(), timeout);
    EXPECT_EQ(config.seed(), seed);
    EXPECT_EQ(config.check_every(), check_every);

    const Config again = Config::parse(config.str());
    ASSERT_EQ(again, config) << config.str();
    ASSERT_EQ(again.str(), config.str());
  }
}

/// Parses; anything but success or invalid_config fails the test. Returns whether it was accepted, and then holds it to the round trip.
bool survives(const std::string& text) {
  try {
    const Config config = Config::parse(text);
    EXPECT_EQ(Config::parse(config.str()), config) << text;
    return true;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::invalid_config) << error.what();
    EXPECT_STRNE(error.what(), "");
  }
  return false;
}

TEST(Config, RandomBytesAreOnlyRefused) {
  std::mt19937_64 rng(7);
  for (int i = 0; i < 20000; ++i) {
    std::string text(rng() % 80, '\0');
    for (char& c : text) c = char(rng());
    survives(text);
  }
}

TEST(Config, RandomSentencesAndMutations) {
  // Words of the grammar in random order reach deeper than bytes; a few are valid, which shows that the generator is not idle.
  const std::vector<std::string> words = {
      "codec",  "feedback", "target", "exchange", "policy", "min_numel", "timeout",  "seed",      "dgc",     "topk", "none", "ef14",
      "warmup", "gather",   "auto",   "density",  "steps",  "decay",     "momentum", "wire",      "fp16",    "mask", "0",    "1",
      "0.5",    "1e-3",     "nan",    "-1",       "=",      "=",         "=",        ":",         ":",       ",",    " ",    " ",
      "/",      "inf",      "1e999",  "gradient", "select", "exact",     "index",    "densities", "nesterov"};
  const std::vector<std::string> seeds = {
      "dgc:density=0.001,momentum=0.9,warmup_steps=10 start_step=100 timeout=5",
      "codec=topk:density=0.01,wire=bf16,select=exact,index=u16 feedback=ef14:decay=0.5 exchange=gather seed=3",
      "codec=topk:density=0.01 policy=warmup:densities=0.5/0.25,steps=3 min_numel=1 check_every=9"};
  std::mt19937_64 rng(8);
  int accepted = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string text;
    for (std::size_t n = rng() % 24; n > 0; --n) text += words[rng() % words.size()];
    accepted += survives(text);

    text = seeds[rng() % seeds.size()];
    for (std::size_t n = 1 + rng() % 3; n > 0; --n) {
      const std::size_t at = rng() % text.size(), kind = rng() % 4;
      if (kind == 0) text.erase(at, 1 + rng() % 4);
      if (kind == 1) text.insert(at, words[rng() % words.size()]);
      if (kind == 2) text[at] = char(rng());
      if (kind == 3) text.insert(at, text.substr(rng() % text.size(), rng() % 20));
      if (text.empty()) text = " ";
    }
    accepted += survives(text);
  }
  EXPECT_GT(accepted, 100);
}

TEST(Grammar, TablesDescribeThemselves) {
  const std::string help = grammar::help();
  const auto check_name = [&](const grammar::Name& name) {
    EXPECT_FALSE(name.help.empty()) << name.name;
    EXPECT_NE(help.find(name.name), std::string::npos) << name.name;
    for (const grammar::Key& key : name.keys) {
      EXPECT_FALSE(key.help.empty()) << key.name;
      EXPECT_NE(help.find(key.name), std::string::npos) << key.name;
    }
  };
  // Every fallback is valid and canonical: written out, it changes nothing. Keys without one get a value that all their intervals contain.
  const auto written_out = [](const grammar::Name& name) {
    std::string text(name.name);
    for (const grammar::Key& key : name.keys) {
      text += (&key == name.keys.data() ? ":" : ",") + std::string(key.name) + "=" + std::string(key.fallback.empty() ? "1" : key.fallback);
    }
    return text;
  };
  for (const grammar::Slot& slot : grammar::slots()) {
    for (const grammar::Name& name : slot.names) {
      SCOPED_TRACE(std::string(slot.name) + "=" + std::string(name.name));
      check_name(name);
      const std::string text = std::string(slot.name) + "=" + written_out(name);
      const bool of_sign = name.name == "two_phase" || name.name == "momentum";
      const std::string codec = slot.name == "codec"                   ? ""
                                : name.name == slot.names.front().name ? "codec=none "
                                : of_sign                              ? "codec=sign "
                                                                       : "codec=topk:density=1 ";
      EXPECT_NE((Config::parse(codec + text).str() + " ").find(text + " "), std::string::npos);
    }
    if (slot.names.empty()) {
      EXPECT_EQ(slot.plain.name, slot.name);
      const std::string text = std::string(slot.name) + "=" + std::string(slot.plain.fallback);
      EXPECT_EQ(Config::parse(text), Config()) << text;
      EXPECT_NE((Config().str() + " ").find(" " + text + " "), std::string::npos) << text;
    }
  }
  for (const grammar::Preset& preset : grammar::presets()) {
    check_name(preset.name);
    EXPECT_EQ(Config::parse(written_out(preset.name)), Config::parse(preset.name.name));
  }
}

TEST(Config, OneBitAdamIsASettingOfTheSlots) {
  EXPECT_EQ(Config::parse("onebit_adam:beta1=0.95,freeze=200,clip_norm=2,scale=l2,block=tensor"),
            Config::parse("codec=sign:scale=l2,block=tensor feedback=ef14 target=momentum:beta1=0.95,freeze=200,clip_norm=2"));
  EXPECT_EQ(Config::parse("onebit_adam:freeze=0200").target().text("freeze"), "200");
  const Recursion recursion = make_recursion(Config::parse("onebit_adam:clip_norm=2"));
  EXPECT_TRUE(recursion.averaged);
  EXPECT_EQ(recursion.kind, Recursion::Kind::error_feedback);
  EXPECT_EQ(recursion.clip_norm, 2.0f);
}

TEST(Spec, AsksOnlyForWhatIsThere) {
  const Spec spec = Config::parse("codec=topk:density=0.5,wire=bf16").codec();
  EXPECT_EQ(spec.str(), "topk:density=0.5,wire=bf16,select=sampled,index=auto");
  for (const auto& wrong : {std::pair("nothing", "topk has no key 'nothing'"), std::pair("wire", "not a number")}) {
    try {
      spec.number(wrong.first);
      ADD_FAILURE() << wrong.first;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::internal);
      EXPECT_NE(std::string(error.what()).find(wrong.second), std::string::npos) << error.what();
    }
  }
  EXPECT_THROW(spec.integer("density"), Error);
  EXPECT_THROW(spec.numbers("wire"), Error);
  EXPECT_EQ(Spec{}.str(), "");
}

TEST(Registry, Recursions) {
  EXPECT_EQ(make_recursion(Config()), Recursion{});
  Recursion ef14;
  ef14.kind = Recursion::Kind::error_feedback;
  ef14.decay = 0.75f;
  EXPECT_EQ(make_recursion(Config::parse("codec=topk:density=1 feedback=ef14:decay=0.75")), ef14);
  Recursion dgc;
  dgc.kind = Recursion::Kind::momentum_correction;
  dgc.momentum = 0.9f;
  dgc.mask = true;
  EXPECT_EQ(make_recursion(Config::parse("dgc")), dgc);
  dgc.momentum = 0.5f;
  dgc.mask = false;
  dgc.nesterov = true;
  dgc.clip_norm = 2.5f;
  EXPECT_EQ(make_recursion(Config::parse("dgc:momentum=0.5,mask=0,nesterov=1,clip_norm=2.5")), dgc);
}

TEST(Registry, RoundingToFloatStaysInside) {
  EXPECT_LT(make_recursion(Config::parse("dgc:momentum=0.9999999999999999")).momentum, 1.0f);
  EXPECT_GT(make_recursion(Config::parse("codec=topk:density=1 feedback=ef14:decay=1e-300")).decay, 0.0f);
  EXPECT_GT(make_recursion(Config::parse("dgc:clip_norm=1e-300")).clip_norm, 0.0f);  // 0 would mean: off
  EXPECT_EQ(make_recursion(Config::parse("dgc:clip_norm=1e300")).clip_norm, std::numeric_limits<float>::max());
  EXPECT_EQ(make_recursion(Config::parse("dgc:clip_norm=0")).clip_norm, 0.0f);
  EXPECT_GT(make_recursion(Config::parse("econtrol:eta=1e-300")).given_eta, 0.0f);  // 0 would mean: EF21
  EXPECT_EQ(make_recursion(Config::parse("econtrol:eta=0")).given_eta, 0.0f);
}

TEST(Registry, Codecs) {
  EXPECT_EQ(make_codec(Config()), nullptr);
  const auto codec = make_codec(Config::parse("codec=topk:density=0.25,select=exact"), Isa::scalar);
  ASSERT_NE(codec, nullptr);
  EXPECT_EQ(codec->combine(), Combine::gather);
  Segment segment;
  segment.count = 1000;
  segment.setting.density = 0.25;
  EXPECT_EQ(codec->target(segment), 250u);
  for (const char* wire : {"fp32", "bf16", "fp16"}) {
    for (const char* select : {"sampled", "exact"}) {
      for (const char* index : {"auto", "u32", "u16", "bitmap"}) {
        EXPECT_NE(make_codec(Config::parse(std::string("codec=topk:density=0.01,wire=") + wire + ",select=" + select + ",index=" + index)),
                  nullptr);
      }
    }
  }
}

TEST(Isa, WordsAndTheCpu) {
  EXPECT_EQ(parse_isa("scalar"), Isa::scalar);
  EXPECT_TRUE(cpu_supports(Isa::scalar));
  EXPECT_TRUE(cpu_supports(parse_isa("auto")));
  EXPECT_TRUE(cpu_supports(active_isa()));
  EXPECT_LE(cpu_supports(Isa::avx512), cpu_supports(Isa::avx2));  // the wide twins may use the narrow ones for tails
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (cpu_supports(isa)) {
      EXPECT_EQ(parse_isa(to_string(isa)), isa);
      EXPECT_GE(parse_isa("auto"), isa);
    } else {
      try {
        parse_isa(to_string(isa));
        ADD_FAILURE() << to_string(isa);
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), Errc::invalid_config);
        EXPECT_NE(std::string(error.what()).find("this CPU lacks"), std::string::npos) << error.what();
      }
    }
  }
  for (const char* wrong : {"", "AVX2", "avx", "sse4.2", "avx2 "}) {
    try {
      parse_isa(wrong);
      ADD_FAILURE() << wrong;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::invalid_config);
      EXPECT_NE(std::string(error.what()).find("auto, scalar, avx2, avx512"), std::string::npos) << error.what();
    }
  }
}

// active_isa() reads the environment once per process, so a child that starts afresh is asked.
TEST(IsaDeathTest, TheEnvironmentDecides) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  const auto ask = [](const char* word) {
    setenv("THINWIRE_ISA", word, 1);
    try {
      std::fprintf(stderr, "uses %s\n", to_string(active_isa()));
    } catch (const Error& error) { std::fprintf(stderr, "%s: %s\n", to_string(error.code()), error.what()); }
    std::exit(0);
  };
  const char* const before = std::getenv("THINWIRE_ISA");
  const std::string saved = before == nullptr ? "" : before;
  unsetenv("THINWIRE_ISA");
  EXPECT_EXIT(ask("scalar"), testing::ExitedWithCode(0), "uses scalar");
  EXPECT_EXIT(ask("mmx"), testing::ExitedWithCode(0), "invalid_config: THINWIRE_ISA=mmx: .*auto, scalar, avx2, avx512");
  const std::string best = std::string("uses ") + to_string(parse_isa("auto"));
  EXPECT_EXIT(ask(""), testing::ExitedWithCode(0), best);
  if (before != nullptr) setenv("THINWIRE_ISA", saved.c_str(), 1);
}

}  // namespace
}  // namespace thinwire
