// thinwire_bench_teacher: the teacher-student gates over the real engine, ranks as threads. Exit 1 if a gate does not hold.

#include <CLI/CLI.hpp>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "bench/quality_teacher.hpp"

namespace thinwire::bench {
namespace {

nlohmann::json json_of(const Outcome& outcome) {
  return {{"method", outcome.name},
          {"config", outcome.config},
          {"world", kWorld},
          {"epoch", kSteps * kBatch * kWorld / kTrain},
          {"loss", outcome.loss},
          {"test_loss", outcome.test_loss},
          {"accuracy", outcome.accuracy},
          {"seconds", outcome.seconds},
          {"steps", kSteps},
          {"payload_bytes", outcome.payload_bytes},
          {"dense_bytes", outcome.dense_bytes},
          {"fingerprint", outcome.fingerprint},
          {"seed", outcome.seed}};
}

int run(int argc, char** argv) {
  std::uint64_t seeds = 3;
  std::string only, file;
  CLI::App app("Teacher-student gates: a student 64-128-10, 4 ranks as threads, 3000 steps, every method over the real engine.");
  app.add_option("--seeds", seeds, "seeds per method; the gates hold for the mean of 3")->check(CLI::Range(1, 1000))->capture_default_str();
  app.add_option("--only", only, "a method's name; what its gates are relative to runs too");
  app.add_option("--json", file, "where to write {\"rows\": [...]}");
  CLI11_PARSE(app, argc, argv);

  std::vector<Outcome> means;
  nlohmann::json rows = nlohmann::json::array();
  std::printf("%-26s %6s %10s %10s %10s %12s %8s\n", "method", "seeds", "loss", "test loss", "accuracy%", "dense/sent", "s");
  for (const Method& method : kMethods) {
    if (!needed(method.name, only)) continue;
    Outcome mean;
    mean.name = method.name;
    for (std::uint64_t seed = 0; seed < seeds; ++seed) {
      const Outcome outcome = train_teacher_student(method, seed);
      rows.push_back(json_of(outcome));
      mean.loss += outcome.loss / double(seeds);
      mean.test_loss += outcome.test_loss / double(seeds);
      mean.accuracy += outcome.accuracy / double(seeds);
      mean.seconds += outcome.seconds;
      mean.payload_bytes = outcome.payload_bytes;
      mean.dense_bytes = outcome.dense_bytes;
    }
    // An all-reduce's buffer against the payloads: what this rank hands to the transport, dense over compressed.
    const double raw = double(kSteps) * double(Network::kNumel) * sizeof(float);
    std::printf("%-26s %6llu %10.4f %10.4g %10.2f %12.1f %8.1f\n", method.name, static_cast<unsigned long long>(seeds), mean.loss,
                mean.test_loss, mean.accuracy * 100, raw / double(mean.payload_bytes), mean.seconds);
    std::fflush(stdout);
    means.push_back(mean);
  }
  if (means.empty()) {
    std::fprintf(stderr, "--only %s: the methods are", only.c_str());
    for (const Method& method : kMethods) std::fprintf(stderr, " %s", method.name);
    std::fprintf(stderr, "\n");
    return 2;
  }
  if (!file.empty()) {
    std::ofstream out(file);
    out << nlohmann::json{{"rows", rows}}.dump(1) << "\n";
    if (!out) {
      std::fprintf(stderr, "cannot write %s\n", file.c_str());
      return 1;
    }
  }
  const std::vector<std::string> lines = violated(means, seeds < 3 ? 1 : 0);
  for (const std::string& line : lines) std::printf("gate violated: %s\n", line.c_str());
  if (lines.empty()) std::printf("all gates hold\n");
  return lines.empty() ? 0 : 1;
}

}  // namespace
}  // namespace thinwire::bench

int main(int argc, char** argv) {
  try {
    return thinwire::bench::run(argc, argv);
  } catch (const thinwire::Error& e) {
    std::fprintf(stderr, "%s: %s\n", thinwire::to_string(e.code()), e.what());
    return 1;
  }
}
