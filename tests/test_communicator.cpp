// The contract over ranks as threads, and what only a transport that sees all its ranks can promise: who is missing, who aborted, whose
// call does not fit.

#include <gtest/gtest.h>

#include <atomic>
#include <exception>
#include <functional>
#include <limits>
#include <thread>

#include "tests/allocation_count.hpp"
#include "tests/communicator_contract.hpp"

namespace thinwire::test {
namespace {

using std::chrono::milliseconds;

/// Runs body(rank's communicator) on `world` threads; a thread that ends destroys its communicator. The communicators' own deadline ends
/// whatever hangs.
void run_ranks(int world, const std::function<void(std::unique_ptr<Communicator>&)>& body, milliseconds timeout = milliseconds(60000)) {
  auto ranks = make_loopback(world);
  std::vector<std::exception_ptr> errors(ranks.size());
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    ranks[r]->set_timeout(timeout);
    threads.emplace_back([&, r] {
      try {
        body(ranks[r]);
      } catch (...) { errors[r] = std::current_exception(); }
      ranks[r].reset();
    });
  }
  for (auto& t : threads) t.join();
  for (const auto& e : errors) {
    if (e) std::rethrow_exception(e);
  }
}

struct Loopback {
  static std::vector<int> worlds() { return {1, 2, 3, 4, 7}; }
  static void run(int world, const std::function<void(Communicator&)>& body) {
    run_ranks(world, [&](std::unique_ptr<Communicator>& c) { body(*c); });
  }
};
INSTANTIATE_TYPED_TEST_SUITE_P(Loopback, CommunicatorContract, Loopback);

TEST(LoopbackGroup, RefusesAnEmptyWorld) {
  expect_error(Errc::invalid_argument, "world 0", [] { make_loopback(0); });
  expect_error(Errc::invalid_argument, "world -3", [] { make_loopback(-3); });
}

TEST(LoopbackGroup, BarrierHoldsUntilTheLastRankIsThere) {
  std::atomic<int> arrived{0};
  run_ranks(4, [&](auto& c) {
    for (int round = 1; round <= 50; ++round) {
      ++arrived;
      c->barrier();
      EXPECT_GE(arrived.load(), 4 * round);
      c->barrier();
    }
  });
}

TEST(LoopbackGroup, ATimeoutNamesThisRankTheCallAndWhoIsMissing) {
  for (const char* call : {"all_gather", "all_to_all", "all_reduce", "broadcast", "barrier", "split"}) {
    SCOPED_TRACE(call);
    std::atomic<int> out{0};
    run_ranks(4, [&](auto& c) {
      const int rank = c->rank();
      if (rank == 1 || rank == 3) {
        while (out < 2) std::this_thread::yield();
        // Late: the others have given up, and nothing of theirs may be touched.
        expect_error(Errc::timeout, "ranks 1, 3", [&] { c->barrier(); });
        return;
      }
      c->set_timeout(milliseconds(100));
      expect_error(Errc::timeout, "ranks 1, 3", [&] {
        try {
          std::vector<std::uint8_t> a(16), b(16);
          const std::string what = call;
          if (what == "all_gather") c->all_gather(raw(a).sub(0, 4), raw(b));
          if (what == "all_to_all") c->all_to_all(raw(a), raw(b));
          if (what == "all_reduce") c->all_reduce({raw(a).data, 16, DType::fp32});
          if (what == "broadcast") c->broadcast(raw(a), 1);
          if (what == "barrier") c->barrier();
          if (what == "split") (void)c->split(0, 0);
        } catch (const Error& e) {
          EXPECT_NE(std::string(e.what()).find("loopback rank " + std::to_string(rank) + " of 4: " + call), std::string::npos) << e.what();
          ++out;
          throw;
        }
        ++out;
      });
      expect_error(Errc::timeout, "ranks 1, 3", [&] { c->barrier(); });  // the group stays unusable
    });
  }
}

TEST(LoopbackGroup, AnAbortReleasesEveryWaiterAndSaysWhoAndWhy) {
  run_ranks(4, [](auto& c) {
    if (c->rank() == 2) {
      std::this_thread::sleep_for(milliseconds(20));
      c->abort("corrupt payload of bucket 7");
      c->abort("a second reason");
    }
    expect_error(Errc::peer_lost, "rank 2 aborted: corrupt payload of bucket 7", [&] { c->barrier(); });
    expect_error(Errc::peer_lost, "rank 2 aborted: corrupt payload of bucket 7", [&] { (void)c->split(0, 0); });
  });
}

TEST(LoopbackGroup, AnAbortFromAnotherThreadReleasesTheOwnCall) {
  std::atomic<bool> released{false};
  run_ranks(2, [&](auto& c) {
    if (c->rank() == 1) {
      while (!released) std::this_thread::yield();  // rank 0 waits for this rank until the abort
      expect_error(Errc::peer_lost, "closing", [&] { c->barrier(); });
      return;
    }
    std::thread other([&] {
      std::this_thread::sleep_for(milliseconds(20));
      c->abort("closing");
    });
    float x = 1;
    expect_error(Errc::peer_lost, "closing", [&] { c->all_reduce(host_bytes(&x, 1)); });
    released = true;
    other.join();
  });
}

TEST(LoopbackGroup, ADestroyedCommunicatorIsALostPeer) {
  for (const bool early : {true, false}) {
    run_ranks(3, [&](auto& c) {
      c->barrier();
      if (c->rank() == 1) {
        if (!early) std::this_thread::sleep_for(milliseconds(30));
        c.reset();
        return;
      }
      if (early) std::this_thread::sleep_for(milliseconds(30));
      expect_error(Errc::peer_lost, "lost rank 1", [&] { c->barrier(); });
    });
  }
}

TEST(LoopbackGroup, LeavingAfterTheLastCallHurtsNobody) {
  for (int round = 0; round < 200; ++round) {
    run_ranks(3, [](auto& c) {
      float x = 1;
      c->all_reduce(host_bytes(&x, 1));
      EXPECT_EQ(x, 3);
    });
  }
}

TEST(LoopbackGroup, CallsThatDoNotFitTogetherAreAnErrorOnAllRanks) {
  const auto mismatch = [](const char* says, std::function<void(Communicator&)> call) {
    run_ranks(3, [&](auto& c) { expect_error(Errc::transport, says, [&] { call(*c); }); });
  };
  mismatch("rank 2 calls barrier", [](Communicator& c) {
    float x = 1;
    if (c.rank() == 2) return c.barrier();
    c.all_reduce(host_bytes(&x, 1));
  });
  mismatch("rank 1 calls all_gather of 5 bytes", [](Communicator& c) {
    const std::size_t n = c.rank() == 1 ? 5 : 4;
    std::vector<std::uint8_t> a(n), b(3 * n);
    c.all_gather(raw(a), raw(b));
  });
  mismatch("rank 2 calls all_reduce of 8 bytes bf16", [](Communicator& c) {
    std::vector<std::uint8_t> a(8);
    c.all_reduce({raw(a).data, 8, c.rank() == 2 ? DType::bf16 : DType::fp32});
  });
  mismatch("root", [](Communicator& c) {
    std::vector<std::uint8_t> a(8);
    c.broadcast(raw(a), c.rank() / 2);
  });
  mismatch("rank 0 sends 9 bytes to rank 1, which expects 8", [](Communicator& c) {
    std::vector<std::size_t> send(3, 8), recv(3, 8);
    if (c.rank() == 0) send[1] = 9;
    std::vector<std::uint8_t> a(c.rank() == 0 ? 25 : 24), b(24);
    c.all_to_all_v(raw(a), send, raw(b), recv);
  });
}

// A rank that fails leaves its call only when no peer reads its spans any more. ASan and TSan see it if not.
TEST(LoopbackGroup, AnAbortInTheMiddleOfTrafficTouchesNoDeadMemory) {
  for (int round = 0; round < 40; ++round) {
    std::vector<Communicator*> aborter(1);
    std::atomic<bool> ready{false};
    std::thread late([&] {
      while (!ready) std::this_thread::yield();
      std::this_thread::sleep_for(std::chrono::microseconds(50 * round));
      aborter[0]->abort("in the middle");
    });
    std::atomic<int> ended{0};
    run_ranks(4, [&](auto& c) {
      if (c->rank() == 0) {
        aborter[0] = c.get();
        ready = true;
      }
      try {
        while (true) {
          const auto data = std::make_unique<std::vector<float>>(50000, 1.0f);  // dies with the call
          c->all_reduce(host_bytes(data->data(), data->size()));
        }
      } catch (const Error& e) { EXPECT_EQ(e.code(), Errc::peer_lost) << e.what(); }
      ++ended;
      while (c->rank() == 0 && ended < 4) std::this_thread::yield();
      if (c->rank() == 0) late.join();
    });
  }
}

TEST(LoopbackGroup, ALongTimeoutDoesNotOverflow) {
  run_ranks(2, [](auto& c) {
    c->set_timeout(milliseconds(std::numeric_limits<milliseconds::rep>::max()));
    for (int i = 0; i < 10; ++i) c->barrier();
  });
}

TEST(LoopbackGroup, CallsAllocateNothing) {
  std::atomic<long> before{0};
  run_ranks(3, [&](auto& c) {
    std::vector<std::uint8_t> a(48 * 3), b(48 * 3), slots_b(48 * 3);
    const std::vector<std::size_t> slots(3, 48);
    const auto all_calls = [&] {
      c->all_gather(raw(a).sub(0, 48), raw(b));
      c->all_to_all(raw(a), raw(b));
      c->all_to_all_v(raw(a), slots, raw(b), slots);
      c->all_reduce(host_bytes(a.data(), 30, DType::fp32));
      c->broadcast(raw(a), 1);
      c->barrier();
    };
    all_calls();
    c->barrier();
    if (c->rank() == 0) before = allocations();
    c->barrier();
    for (int i = 0; i < 100; ++i) all_calls();
    c->barrier();
    if (c->rank() == 0) { EXPECT_EQ(allocations(), before.load()); }
    c->barrier();
  });
}

}  // namespace
}  // namespace thinwire::test
