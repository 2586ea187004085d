#pragma once
// The command line of thinwire_train; the words are those of launch/options.py.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>

#include "compressors/core/config.hpp"

namespace thinwire::launch {

struct Options {
  std::string config = "codec=none", data, json, device = "cpu", optimizer = "auto";
  std::int64_t epochs = 3, batch = 64, subset = 0, bucket_kb = 1024;
  std::uint64_t seed = 0;
  std::optional<double> lr;
  double momentum = 0.9, beta2 = 0.99, weight_decay = 0, timeout = 120;
};

/// Adam where --optimizer says so, or leaves it to a config whose target is the momentum.
bool uses_adam(const Options& options, const Config& config);
/// Of the first step.
double learning_rate(const Options& options, const Config& config);
/// @throws Error{invalid_config} if the config needs another optimizer than was asked for, or leaves the freeze to one.
void check_optimizer(const Options& options, const Config& config);

void declare(CLI::App& app, Options& options);

/// `config` with a timeout slot, unless it has one of its own.
Config with_timeout(const std::string& config, double seconds);

}  // namespace thinwire::launch
