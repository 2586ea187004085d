#pragma once
// What the teacher-student comparison trains, and what each method must reach beside its reference.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "compressors/core/error.hpp"

namespace thinwire::bench {

enum class Rule { sgd, adam };

struct Method {
  const char* name;
  const char* config;
  Rule rule;
  float momentum = 0;           ///< of SGD after the mean; DGC has it in the hook, Adam's is the config's
  std::size_t dead_inputs = 0;  ///< inputs that are 0 in training and not in the test: a sensor that was off
  bool masks = true;            ///< 1-bit Adam tells the reducer where the frozen variance is 0
};

/// Every layer's matrix is compressed, biases stay dense; top-k with exchange=gather, so that nothing is quietly sent dense. 450 steps are
/// 15 % of the training.
inline constexpr Method kMethods[] = {
    {"dense", "codec=none", Rule::sgd, 0.9f},
    {"dgc_1%", "dgc:density=0.01,mask=0 exchange=gather min_numel=1", Rule::sgd},
    {"dgc_1%_mask", "dgc:density=0.01 exchange=gather min_numel=1", Rule::sgd},
    {"dgc_1%_mask_warmup", "dgc:density=0.01,warmup_steps=128 exchange=gather min_numel=1", Rule::sgd},
    {"dgc_0.1%", "dgc:density=0.001,mask=0 exchange=gather min_numel=1", Rule::sgd},
    {"dgc_0.1%_mask", "dgc:density=0.001 exchange=gather min_numel=1", Rule::sgd},
    {"ef14_1%", "codec=topk:density=0.01 feedback=ef14 exchange=gather min_numel=1", Rule::sgd, 0.9f},
    {"topk_1%_no_feedback", "codec=topk:density=0.01 exchange=gather min_numel=1", Rule::sgd, 0.9f},
    {"dgc_100%_mask", "dgc:density=1 exchange=gather min_numel=1", Rule::sgd},
    {"adam", "codec=none", Rule::adam},
    {"onebit_adam", "onebit_adam:freeze=450 min_numel=1", Rule::adam},
    {"onebit_adam_tensor", "onebit_adam:freeze=450,block=tensor min_numel=1", Rule::adam},
    {"onebit_adam_l2", "onebit_adam:freeze=450,scale=l2 min_numel=1", Rule::adam},
    {"onebit_adam_l2_tensor", "onebit_adam:freeze=450,scale=l2,block=tensor min_numel=1", Rule::adam},
    {"onebit_adam_freeze_5%", "onebit_adam:freeze=150 min_numel=1", Rule::adam},
    {"onebit_adam_freeze_1%", "onebit_adam:freeze=30 min_numel=1", Rule::adam},
    {"onebit_gradients_adam", "codec=sign feedback=ef14 min_numel=1", Rule::adam},
    {"onebit_gradients_adam_l2", "codec=sign:scale=l2 feedback=ef14 min_numel=1", Rule::adam},
    {"adam_dead", "codec=none", Rule::adam, 0, 8},
    {"onebit_adam_dead", "onebit_adam:freeze=450 min_numel=1", Rule::adam, 0, 8},
    {"onebit_adam_dead_no_masks", "onebit_adam:freeze=450 min_numel=1", Rule::adam, 0, 8, false},
};

struct Outcome {
  std::string name, config, fingerprint;
  std::uint64_t seed = 0, payload_bytes = 0;
  double loss = 0, test_loss = 0, accuracy = 0, seconds = 0, dense_bytes = 0;  ///< loss of the training set, accuracy of the test set
};

/// What a method must reach relative to another one; means over the seeds. A loss that is not finite is larger than any.
struct Gate {
  const char* method;
  const char* reference;
  double loss_at_most;         ///< × the reference's
  double loss_at_least;        ///< × the reference's: methods that must be seen to be worse
  double points_at_most;       ///< accuracy below the reference's, in points
  double test_loss_least = 0;  ///< × the reference's
};

inline constexpr double kAny = std::numeric_limits<double>::infinity();

/// Published behaviour, not taste. DGC: without masking 1 % optimises as dense does; masking and .1 % keep the accuracy; without feedback
/// training is clearly worse; masking at density 1 removes the momentum. 1-bit Adam: trains as Adam does; 1-bit gradients under a full Adam
/// do worse than it (1.056 and 1.507 times its loss; over ten seeds 1.01 to 1.13 and 1.39 to 1.68); inputs that were dead before the freeze
/// cost nothing with masks, and blow up without.
inline constexpr Gate kGates[] = {
    {"dgc_1%", "dense", 1.1, 0, 1},
    {"dgc_1%_mask", "dense", kAny, 0, 1},
    {"dgc_1%_mask_warmup", "dense", kAny, 0, 1},
    {"dgc_0.1%", "dense", kAny, 0, 2},
    {"dgc_0.1%_mask", "dense", kAny, 0, 2},
    {"ef14_1%", "dense", kAny, 0, 1},
    {"topk_1%_no_feedback", "dense", kAny, 2, 100},
    {"dgc_100%_mask", "dense", kAny, 2, 100},
    {"onebit_adam", "adam", 1.05, 0, 1},
    {"onebit_adam_tensor", "adam", 1.05, 0, 1},
    {"onebit_adam_l2", "adam", 1.05, 0, 1},
    {"onebit_adam_l2_tensor", "adam", 1.05, 0, 1},
    {"onebit_adam_freeze_5%", "adam", kAny, 0, 1},
    {"onebit_adam_freeze_1%", "adam", kAny, 0, 2},
    {"onebit_gradients_adam", "onebit_adam", kAny, 1.02, 100},
    {"onebit_gradients_adam_l2", "onebit_adam_l2", kAny, 1.2, 100},
    {"onebit_adam_dead", "adam_dead", 1.05, 0, 1},
    {"onebit_adam_dead_no_masks", "adam_dead", kAny, 0, 100, 10},
};

/// Whether `method` is `only`, or what the gates of `only`, and theirs, are relative to. All are where `only` is empty.
inline bool needed(const std::string& method, const std::string& only) {
  if (only.empty() || only == method) return true;
  for (const Gate& gate : kGates) {
    if (only == gate.method && needed(method, gate.reference)) return true;
  }
  return false;
}

inline const Outcome* find(const std::vector<Outcome>& outcomes, const std::string& name) {
  for (const Outcome& outcome : outcomes) {
    if (outcome.name == name) return &outcome;
  }
  return nullptr;
}

/// One line per gate that does not hold; `means` has one outcome per method, and the reference of each. `slack_points`: for fewer seeds
/// than three, whose mean is noisier.
inline std::vector<std::string> violated(const std::vector<Outcome>& means, double slack_points) {
  std::vector<std::string> lines;
  for (const Gate& gate : kGates) {
    const Outcome *outcome = find(means, gate.method), *reference = find(means, gate.reference);
    if (outcome == nullptr) continue;
    THINWIRE_EXPECTS(reference != nullptr,
                     std::string("the gate of ") + gate.method + " is relative to " + gate.reference + ", which was not run");
    const double factor = outcome->loss / reference->loss, points = (reference->accuracy - outcome->accuracy) * 100;
    char line[240];
    if (!(factor <= gate.loss_at_most && factor >= gate.loss_at_least)) {
      std::snprintf(line, sizeof line, "%s: loss %.4f is %.3fx that of %s, allowed are %.2fx to %.3gx", gate.method, outcome->loss, factor,
                    gate.reference, gate.loss_at_least, gate.loss_at_most);
      lines.push_back(line);
    }
    if (!(points <= gate.points_at_most + slack_points)) {
      std::snprintf(line, sizeof line, "%s: accuracy %.2f %% is %.2f points below %s, allowed are %.2f", gate.method,
                    outcome->accuracy * 100, points, gate.reference, gate.points_at_most + slack_points);
      lines.push_back(line);
    }
    if (!(outcome->test_loss / reference->test_loss >= gate.test_loss_least)) {
      std::snprintf(line, sizeof line, "%s: test loss %.4g is %.3gx that of %s, at least %.3gx must be seen", gate.method,
                    outcome->test_loss, outcome->test_loss / reference->test_loss, gate.reference, gate.test_loss_least);
      lines.push_back(line);
    }
  }
  return lines;
}

}  // namespace thinwire::bench
