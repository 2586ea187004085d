#include "launch/trainer/options.hpp"

#include <sstream>

namespace thinwire::launch {

void declare(CLI::App& app, Options& o) {
  app.add_option("--config", o.config, "thinwire configuration, such as dgc:density=0.01")->capture_default_str();
  app.add_option("--device", o.device,
                 "cpu, or cuda: one rank per GPU, gradients over NCCL. Several ranks share a GPU where each has an NCCL_HOSTID of its own")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--epochs", o.epochs)->check(CLI::Range(1, 1000000))->capture_default_str();
  app.add_option("--batch", o.batch, "images per rank and step")->check(CLI::Range(1, 1000000))->capture_default_str();
  app.add_option("--lr", o.lr, "learning rate of the first step, which falls to 0 linearly")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  app.add_option("--momentum", o.momentum, "of the optimizer; under feedback=dgc the config's own counts")
      ->check(CLI::Range(0.0, 1.0))
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
