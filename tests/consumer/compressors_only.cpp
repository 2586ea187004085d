// compressors without collectives: the configuration is parsed, a codec made, and a wrong configuration is an error that a user can read.
#include <cstdio>
#include <cstring>

#include "compressors/core/error.hpp"
#include "compressors/core/registry.hpp"

int main() {
  const auto codec = thinwire::make_codec(thinwire::Config::parse("dgc:density=0.01"));
  bool refused = false;
  try {
    thinwire::Config::parse("codec=topk:density=1.5");
  } catch (const thinwire::Error& error) {
    refused = std::strstr(error.what(), "1.5") != nullptr;
    std::printf("refused: %s\n", error.what());
  }
  return codec && refused ? 0 : 1;
}
