// Two ranks as threads, one bucket, one include: what the README promises of the installed package.
#include <cmath>
#include <cstdio>
#include <memory>
#include <thinwire/thinwire.hpp>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t kRows = 64, kColumns = 512;

// Gradients are powers of two at 32 places per rank, so top-k keeps all of them and the mean is exact.
std::vector<float> gradient(int rank) {
  std::vector<float> grad(kRows * kColumns, 0.0f);
  for (std::size_t i = 0; i < 32; ++i) grad[i * 1000 + std::size_t(rank)] = float(1 << (i % 8));
  return grad;
}

bool reduce_one_bucket(std::unique_ptr<thinwire::Communicator> communicator) {
  const int rank = communicator->rank();
  std::vector<float> grad = gradient(rank), expected = gradient(0);
  for (std::size_t i = 0; i < expected.size(); ++i) expected[i] = (expected[i] + gradient(1)[i]) / 2;

  const auto config = thinwire::Config::parse("codec=topk:density=0.001,select=exact feedback=ef14 exchange=gather");
  thinwire::GradientReducer reducer(std::move(communicator), config, {{"weight", {kRows, kColumns}}});
  reducer.reduce(std::vector<std::uint32_t>{0}, thinwire::host_bytes(grad.data(), grad.size())).wait();
  std::printf("rank %d: step %llu, factor %.1f\n", rank, static_cast<unsigned long long>(reducer.step()), reducer.stats().factor);
  return grad == expected;
}

}  // namespace

int main() {
  auto ranks = thinwire::make_loopback(2);
  bool right[2] = {false, false};
  std::thread other([&] { right[1] = reduce_one_bucket(std::move(ranks[1])); });
  right[0] = reduce_one_bucket(std::move(ranks[0]));
  other.join();
  std::printf("thinwire %s: %s\n", thinwire::kVersion, right[0] && right[1] ? "the mean is right on both ranks" : "WRONG MEAN");
  return right[0] && right[1] ? 0 : 1;
}
