// The contract over Gloo. Ranks are processes, and only torch's Python face makes Gloo groups: this is a module that gloo_rank.py imports
// and runs as every rank. Its tests take the same calls in the same order everywhere.

#include <gtest/gtest.h>
#include <pybind11/chrono.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/communicator_contract.hpp"
#include "torch_ext/src/c10d_communicator.hpp"

namespace thinwire::test {
namespace {

namespace py = pybind11;
using std::chrono::milliseconds;
using torch_ext::C10dCommunicator;

/// Where this process stands: set by run().
struct Here {
  c10::intrusive_ptr<c10d::Store> store;
  int rank = 0, size = 1;
  py::object make_group;
  int groups = 0;  ///< every group meets at a prefix of its own
} here;

std::unique_ptr<C10dCommunicator> new_group(milliseconds timeout = milliseconds(30000)) {
  const auto factory = [](c10::intrusive_ptr<c10d::Store> store, int rank, int size, milliseconds limit) {
    const py::gil_scoped_acquire gil;
    return here.make_group(std::move(store), rank, size, limit).cast<c10::intrusive_ptr<c10d::Backend>>();
  };
  auto store = c10::make_intrusive<c10d::PrefixStore>("group" + std::to_string(here.groups++), here.store);
  return std::make_unique<C10dCommunicator>(std::move(store), here.rank, here.size, factory, timeout);
}

struct Gloo {
  static std::vector<int> worlds() { return {here.size}; }
  static void run(int, const std::function<void(Communicator&)>& body) { body(*new_group()); }
};
INSTANTIATE_TYPED_TEST_SUITE_P(Gloo, CommunicatorContract, Gloo);

std::string key(const char* what) { return what + std::to_string(here.groups); }

// Gloo adds in the order of its ring, which from three ranks on is not that of the ranks: sums that are exact in any order.
TEST(GlooGroup, AllReduceAddsWhatIsExact) {
  const auto c = new_group();
  for (const std::size_t n : kSizes) {
    std::vector<float> mine(n), expected(n);
    for (std::size_t i = 0; i < n; ++i) {
      for (int r = 0; r < c->size(); ++r) expected[i] += float(int(i % 17) - 8 + r) / 4;
      mine[i] = float(int(i % 17) - 8 + c->rank()) / 4;
    }
    for (const Half& format : {kBf16, kFp16}) {
      std::vector<std::uint16_t> halves(n), sums(n);
      for (std::size_t i = 0; i < n; ++i) halves[i] = format.encode(mine[i]), sums[i] = format.encode(expected[i]);
      c->all_reduce(host_bytes(halves.data(), n, format.dtype));
      ASSERT_EQ(halves, sums) << to_string(format.dtype) << ", " << n << " elements on rank " << c->rank();
    }
    c->all_reduce(host_bytes(mine.data(), n));
    ASSERT_EQ(mine, expected) << n << " elements on rank " << c->rank();
  }
}

// What messages travel straight and what goes round the ring, on both sides of the limit.
TEST(GlooGroup, GathersBothWays) {
  const auto c = new_group();
  const std::size_t limit = 512 * 1024 / std::size_t(std::max(1, c->size() - 1));
  for (const std::size_t n : {limit - 1, limit, limit + 1, 2 * limit}) {
    auto mine = stamped(c->rank(), 0, n);
    std::vector<std::uint8_t> all(n * std::size_t(c->size()));
    c->all_gather(raw(mine), raw(all));
    for (int r = 0; r < c->size(); ++r) {
      const auto part = stamped(r, 0, n);
      ASSERT_TRUE(std::equal(part.begin(), part.end(), all.begin() + std::ptrdiff_t(n) * r)) << n << " bytes of rank " << r;
    }
  }
}

TEST(GlooGroup, ABarrierHoldsUntilTheLastRankIsThere) {
  const auto c = new_group();
  const std::string place = key("arrived");
  for (int round = 1; round <= 20; ++round) {
    here.store->add(place, 1);
    c->barrier();
    EXPECT_GE(here.store->add(place, 0), std::int64_t(round) * c->size());
    c->barrier();
  }
}

/// Every call by name, of sizes that go straight and of sizes that go round the ring.
void call(Communicator& c, const std::string& what) {
  const std::size_t n = std::size_t(c.size()), slot = what.ends_with("far") ? 600000 : 16;
  std::vector<std::uint8_t> a(n * slot), b(n * slot);
  if (what.starts_with("all_gather")) c.all_gather(raw(a).sub(0, slot), raw(b));
  if (what.starts_with("all_to_all")) c.all_to_all(raw(a), raw(b));
  if (what.starts_with("all_reduce")) c.all_reduce({raw(a).data, a.size(), DType::fp32});
  if (what.starts_with("broadcast")) c.broadcast(raw(a), c.size() - 1);
  if (what == "barrier") c.barrier();
  if (what == "split") (void)c.split(0, c.rank());
}
const char* const kCalls[] = {"all_gather",     "all_gather far", "all_to_all",    "all_to_all far", "all_reduce",
                              "all_reduce far", "broadcast",      "broadcast far", "barrier",        "split"};

/// What the call ended with, in words; empty if it went well.
std::string failure_of(Communicator& c, const std::string& what, std::vector<Errc> codes) {
  try {
    call(c, what);
  } catch (const Error& e) {
    EXPECT_TRUE(std::find(codes.begin(), codes.end(), e.code()) != codes.end()) << what << ": " << to_string(e.code()) << ": " << e.what();
    return e.what();
  }
  return {};
}

// The last rank does not come to a call before the others have given up; what they leave behind, it meets as an error too.
TEST(GlooGroup, ACallWithoutAPeerEndsWithinTheDeadline) {
  if (here.size == 1) GTEST_SKIP() << "nobody to miss";
  for (const std::string what : kCalls) {
    SCOPED_TRACE(what);
    const auto c = new_group();
    c->barrier();  // connected
    c->set_timeout(milliseconds(400));
    const std::string place = key("gave up");
    if (c->rank() == c->size() - 1) {
      while (here.store->add(place, 0) < c->size() - 1) std::this_thread::sleep_for(milliseconds(5));
      continue;
    }
    // The first to give up shuts its sockets, as a reducer does: to a second one it is the lost peer.
    const std::string text = failure_of(*c, what, {Errc::timeout, Errc::peer_lost});
    EXPECT_NE(text.find("on rank " + std::to_string(c->rank())), std::string::npos) << "\"" << text << "\"";
    c->abort("gave up");
    here.store->add(place, 1);
    EXPECT_NE(failure_of(*c, what, {Errc::peer_lost}), "") << "the group stays unusable";
  }
}

TEST(GlooGroup, AnAbortReleasesTheOwnCallAndEveryPeer) {
  if (here.size == 1) GTEST_SKIP() << "nobody to release";
  for (const std::string what : {"all_gather", "all_to_all far", "all_reduce far", "broadcast", "barrier"}) {
    SCOPED_TRACE(what);
    const auto c = new_group();
    c->barrier();
    const std::string place = key("waiting");
    if (c->rank() == c->size() - 1) {  // it never comes, and gives up while the others wait
      while (here.store->add(place, 0) < c->size() - 1) std::this_thread::sleep_for(milliseconds(5));
      std::this_thread::sleep_for(milliseconds(20));
      c->abort("closing");
      EXPECT_NE(failure_of(*c, what, {Errc::peer_lost}).find("closing"), std::string::npos);
      continue;
    }
    here.store->add(place, 1);
    EXPECT_NE(failure_of(*c, what, {Errc::peer_lost, Errc::transport}), "");  // not its deadline's error
    c->abort("released");
  }
  const auto c = new_group();
  c->barrier();
  std::thread other;
  if (c->rank() == 0) {
    other = std::thread([&] {
      std::this_thread::sleep_for(milliseconds(50));
      c->abort("from another thread");
    });
    EXPECT_NE(failure_of(*c, "all_reduce", {Errc::peer_lost}).find("from another thread"), std::string::npos);
    other.join();
    here.store->set(key("done"), "");
  } else {
    here.store->wait({key("done")}, milliseconds(30000));
  }
}

int run(c10::intrusive_ptr<c10d::Store> store, int rank, int size, py::object make_group, const std::vector<std::string>& options) {
  here = {std::move(store), rank, size, std::move(make_group)};
  std::vector<std::string> words = options;
  words.insert(words.begin(), "test_communicator_gloo");
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  int argc = int(argv.size());
  int failed = 0;
  {
    const py::gil_scoped_release no_gil;
    testing::InitGoogleTest(&argc, argv.data());
    failed = RUN_ALL_TESTS();
  }
  here = {};
  return failed;
}

}  // namespace

PYBIND11_MODULE(test_communicator_gloo, m) {
  m.def("run", &run, py::arg("store"), py::arg("rank"), py::arg("size"), py::arg("make_group"), py::arg("options"));
}

}  // namespace thinwire::test
