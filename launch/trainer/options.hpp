#pragma once
// The command line of thinwire_train; the words are those of launch/options.py.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

#include "compressors/core/config.hpp"

namespace thinwire::launch {

struct Options {
  std::string config = "codec=none", data, json, device = "cpu";
  std::int64_t epochs = 3, batch = 64, subset = 0, bucket_kb = 1024;
  std::uint64_t seed = 0;
  double lr = 0.05, momentum = 0.9, weight_decay = 0, timeout = 120;
};

void declare(CLI::App& app, Options& options);

/// `config` with a timeout slot, unless it has one of its own.
Config with_timeout(const std::string& config, double seconds);

}  // namespace thinwire::launch
