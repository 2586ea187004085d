#include "launch/trainer/options.hpp"

#include <sstream>

#include "compressors/core/error.hpp"

namespace thinwire::launch {

void declare(CLI::App& app, Options& o) {
  app.add_option("--config", o.config, "thinwire configuration, such as dgc:density=0.01")->capture_default_str();
  app.add_option("--device", o.device,
                 "cpu, or cuda: one rank per GPU, gradients over NCCL. Several ranks share a GPU where each has an NCCL_HOSTID of its own")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--epochs", o.epochs)->check(CLI::Range(1, 1000000))->capture_default_str();
  app.add_option("--batch", o.batch, "images per rank and step")->check(CLI::Range(1, 1000000))->capture_default_str();
  app.add_option("--optimizer", o.optimizer, "auto: adam (AdamW) where the config's target is the momentum, else sgd")
      ->check(CLI::IsMember({"auto", "sgd", "adam"}))
      ->capture_default_str();
  app.add_option("--lr", o.lr, "learning rate of the first step, which falls to 0 linearly; default 0.05, with adam 0.001")
      ->check(CLI::Range(0.0, 1e6));
  app.add_option("--momentum", o.momentum, "of sgd; under feedback=dgc the config's own counts")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--beta2", o.beta2, "of adam's variance; its beta1 is the config's, else 0.9")
      ->check(CLI::Range(0.0, 0.999999))
      ->capture_default_str();
  app.add_option("--weight-decay", o.weight_decay)->check(CLI::Range(0.0, 1e6))->capture_default_str();
  app.add_option("--seed", o.seed, "of the initial parameters and of the order of the images")->capture_default_str();
  app.add_option("--data", o.data,
                 "folder with the four idx files; default: Debian's package dataset-fashion-mnist, or scikit-learn's digits from setup")
      ->type_name("DIR");
  app.add_option("--subset", o.subset, "train on the first N images and test on the first N / 5; 0: all")
      ->check(CLI::Range(0, 1000000000))
      ->capture_default_str();
  app.add_option("--bucket-kb", o.bucket_kb, "gradients go to the reducer in buckets of about this size")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
  app.add_option("--timeout", o.timeout, "seconds after which a silent peer is an error; a timeout in the config counts instead")
      ->check(CLI::Range(1.0, 1e9))
      ->capture_default_str();
  app.add_option("--json", o.json, "write the results: one row per epoch")->type_name("FILE");
}

bool uses_adam(const Options& options, const Config& config) {
  return options.optimizer == "adam" || (options.optimizer == "auto" && config.target().name == "momentum");
}

double learning_rate(const Options& options, const Config& config) {
  return options.lr.value_or(uses_adam(options, config) ? 0.001 : 0.05);
}

void check_optimizer(const Options& options, const Config& config) {
  if (config.target().name == "momentum" && options.optimizer == "sgd")
    fail(Errc::invalid_config, "target=momentum puts Adam's momentum into the gradients: --optimizer sgd does not go with it");
  if (config.target().name == "momentum" && config.target().text("freeze") == "auto")
    fail(Errc::invalid_config,
         "target=momentum: this trainer freezes the variance at a step, freeze=auto is the Python optimizer's; give freeze=STEP");
  if (config.feedback().name == "dgc" && options.optimizer == "adam")
    fail(Errc::invalid_config, "feedback=dgc applies momentum in the reducer: --optimizer adam does not go with it");
}

Config with_timeout(const std::string& config, double seconds) {
  std::istringstream words(config);
  for (std::string word; words >> word;) {
    if (word.starts_with("timeout=")) return Config::parse(config);
  }
  std::ostringstream whole;
  whole << config << " timeout=" << seconds;
  return Config::parse(whole.str());
}

}  // namespace thinwire::launch
