// Peers that die, stall, abort or send garbage: an error on every survivor within the deadline, naming rank, step and bucket, the same at
// every later call, and never a hang, also when a reducer goes while work is under way.

#include <gtest/gtest.h>

#include <atomic>

#include "tests/faulty_transport.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

using std::chrono::milliseconds;

const std::vector<Parameter> kModel = {{"a", {4, 5}}, {"b", {3}}, {"c", {20, 20}}};
const Ids kFirst = {0, 1}, kSecond = {2};

/// A rank of a run with two buckets per step.
struct Rank {
  std::shared_ptr<Communicator> communicator;
  std::unique_ptr<GradientReducer> reducer;
  Vec first = Vec(23, 1.0f), second = Vec(400, 2.0f);

  Rank(std::shared_ptr<Communicator> c, const std::string& config, ReducerOptions options = {}) : communicator(std::move(c)) {
    reducer = std::make_unique<GradientReducer>(communicator, Config::parse(config), kModel, std::move(options));
  }
  Work start_first() { return reducer->reduce(kFirst, host_bytes(first.data(), first.size())); }
  Work start_second() { return reducer->reduce(kSecond, host_bytes(second.data(), second.size())); }
  void step() {
    Work one = start_first(), two = start_second();
    one.wait();
    two.wait();
  }
  /// Whatever is called from now on throws the same.
  void expect_sticky(const std::string& words) {
    const auto same = [&](const std::function<void()>& call) {
      try {
        call();
        ADD_FAILURE() << "no error";
      } catch (const Error& e) { EXPECT_EQ(e.what(), words); }
    };
    same([&] { start_first(); });
    same([&] { start_second(); });
    same([&] { start_first(); });
    EXPECT_NO_THROW((void)reducer->stats());  // counters can still be read
    same([&] { (void)reducer->state(); });
    same([&] { reducer->flush(); });
  }
};

std::string config(const std::string& more = "") { return "codec=topk:density=0.1 feedback=dgc exchange=gather min_numel=1" + more; }

/// Two collectives per bucket, of which the first gives every rank other bytes; under 1-bit Adam after one dense step.
const std::vector<std::string> kTwoPhase = {"codec=sign:block=64 feedback=ef14 min_numel=1", "onebit_adam:freeze=1,block=64 min_numel=1"};

/// The first error that a rank meets in up to `steps` steps, and that it sticks.
std::string error_of(Rank& rank, Errc code, int steps = 1) {
  try {
    for (int i = 0; i < steps; ++i) rank.step();
    ADD_FAILURE() << "no error";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code) << e.what();
    EXPECT_NE(std::string(e.what()).find("rank " + std::to_string(rank.reducer->rank()) + ", step "), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find(", bucket "), std::string::npos) << e.what();
    rank.expect_sticky(e.what());
    return e.what();
  }
  return {};
}

/// Lets ranks leave only together, without a collective: a group that failed has none.
struct Meeting {
  std::atomic<int> here{0};
  void wait(int world) {
    ++here;
    while (here < world) std::this_thread::yield();
  }
};

TEST(ReducerFailures, ADeadRankIsAnErrorOnEverySurvivor) {
  for (const std::string& c : {config(), config(" start_step=100"), std::string("codec=none"), kTwoPhase[0], kTwoPhase[1]})
    for (const bool inline_queue : {false, true}) {
      Meeting end;
      run_ranks(3, [&](std::shared_ptr<Communicator> communicator) {
        Rank rank(std::move(communicator), c, {.inline_queue = inline_queue});
        for (int i = 0; i < 2; ++i) rank.step();
        if (rank.reducer->rank() == 1) {
          rank.reducer.reset();
          rank.communicator.reset();
        } else {
          const std::string what = error_of(rank, Errc::peer_lost);
          EXPECT_NE(what.find("step 2, bucket a … b (2 parameters)"), std::string::npos) << what;
          EXPECT_TRUE(what.find("rank 1") != std::string::npos || what.find("abort") != std::string::npos) << what;
        }
        end.wait(3);
      });
    }
}

void expect_stalled_rank_found(const std::string& config, bool inline_queue) {
  Meeting failed, end;
  run_ranks(3, [&](std::shared_ptr<Communicator> communicator) {
    Rank rank(std::move(communicator), config + " timeout=0.3", {.inline_queue = inline_queue});
    rank.step();
    if (rank.reducer->rank() == 2) {
      failed.wait(3);  // it does nothing until the others have given up
      try {
        rank.step();
        ADD_FAILURE() << "a late rank went on alone";
      } catch (const Error& e) { rank.expect_sticky(e.what()); }
    } else {
      try {
        rank.step();
        ADD_FAILURE() << "no error";
      } catch (const Error& e) {
        EXPECT_TRUE(e.code() == Errc::timeout || e.code() == Errc::peer_lost) << e.what();  // whoever waited less is told by the other
        EXPECT_NE(std::string(e.what()).find("step 1, bucket a"), std::string::npos) << e.what();
        rank.expect_sticky(e.what());
      }
      failed.wait(3);
    }
    end.wait(3);
  });
}

TEST(ReducerFailures, AStalledRankIsAnErrorWithinTheDeadline) {
  for (const std::string& c : {config(), kTwoPhase[0], kTwoPhase[1]})
    for (const bool inline_queue : {false, true}) {
      SCOPED_TRACE(c);
      expect_stalled_rank_found(c, inline_queue);
    }
}

TEST(ReducerFailures, AFlushOnOneRankAloneIsNamed) {
  for (const bool inline_queue : {false, true}) {
    Meeting end;
    run_ranks(3, [&](std::shared_ptr<Communicator> communicator) {
      Rank rank(std::move(communicator), config(" timeout=0.5"), {.inline_queue = inline_queue});
      rank.step();
      const bool flushes = rank.reducer->rank() == 1;
      if (flushes) rank.reducer->flush();
      std::string what;
      try {
        rank.step();
        ADD_FAILURE() << "no error";
      } catch (const Error& e) { what = e.what(); }
      // The others are told by the rank that knows, unless they gave up before it.
      if (flushes) EXPECT_NE(what.find("flush() was called before the step"), std::string::npos) << what;
      EXPECT_NE(what.find("step 1"), std::string::npos) << what;
      rank.expect_sticky(what);
      end.wait(3);
    });
  }
}

TEST(ReducerFailures, ATransportErrorReleasesThePeers) {
  Meeting end;
  run_ranks(3, [&](std::shared_ptr<Communicator> communicator) {
    auto faults = std::make_shared<Faults>();
    const int me = communicator->rank();
    if (me == 0)
      faults->before = [](int call) {
        if (call == 3) fail(Errc::transport, "the cable was pulled");
      };
    // call 0 is the fingerprints, 1 and 2 the buckets of step 0, 3 the first of step 1
    auto faulty = std::make_shared<FaultyTransport>(communicator->split(0, me), faults);
    Rank rank(faulty, config());
    const std::string what = error_of(rank, me == 0 ? Errc::transport : Errc::peer_lost, 3);
    EXPECT_NE(what.find("the cable was pulled"), std::string::npos) << what;
    EXPECT_NE(what.find("rank 0, step 1, bucket a … b (2 parameters)"), std::string::npos) << what;
    end.wait(3);
  });
}

TEST(ReducerFailures, ACorruptPayloadIsNamedWhereItIsSeenAndReleasesTheOthers) {
  // Of rank 0's payload, as rank 2 receives it in the second bucket of step 1: magic, plan fingerprint, step, entry count, an index.
  for (const std::size_t byte : {0, 24, 33, 67, 71}) {
    Meeting end;
    run_ranks(3, [&](std::shared_ptr<Communicator> communicator) {
      const int me = communicator->rank();
      auto faults = std::make_shared<Faults>();
      if (me == 2)
        faults->gathered = [byte](int call, Bytes received, std::size_t) {
          if (call == 4) received.data[byte] ^= std::byte{0xff};
        };
      Rank rank(std::make_shared<FaultyTransport>(communicator->split(0, me), faults),
                "codec=topk:density=0.1,select=exact,index=u32 feedback=dgc exchange=gather min_numel=1");
      const std::string what = error_of(rank, me == 2 ? Errc::corrupt_payload : Errc::peer_lost, 4);
      EXPECT_NE(what.find("rank 2, step 1, bucket c: payload of rank 0"), std::string::npos) << byte << ": " << what;
      if (byte > 64) { EXPECT_NE(what.find("(parameter 2 'c')"), std::string::npos) << byte << ": " << what; }
      end.wait(3);
    });
  }
}

// Of the second bucket of step 1, what rank 2 receives: as an owner rank 0's part of it, then rank 1's means. Magic, plan fingerprint,
// step, a scale.
TEST(ReducerFailures, ACorruptPayloadOfEitherPhaseIsNamed) {
  for (const std::string& c : kTwoPhase)
    for (const bool second : {false, true})
      for (const std::size_t byte : {0, 24, 33, 67}) {
        SCOPED_TRACE(c + (second ? " second" : " first") + " phase, byte " + std::to_string(byte));
        const int dense = c == kTwoPhase[1] ? 1 : 0;  // steps that take an all-reduce
        Meeting end;
        run_ranks(3, [&](std::shared_ptr<Communicator> communicator) {
          const int me = communicator->rank();
          auto faults = std::make_shared<Faults>();
          if (me == 2 && second)
            faults->gathered = [=](int call, Bytes received, std::size_t share) {  // the fingerprints are call 0
              if (call == 4 - 2 * dense) received.data[share + byte] ^= std::byte{0xff};
            };
          if (me == 2 && !second)
            faults->exchanged = [=](int call, Bytes received) {
              if (call == 3 - 2 * dense) received.data[byte] ^= std::byte{0xff};
            };
          Rank rank(std::make_shared<FaultyTransport>(communicator->split(0, me), faults), c);
          const std::string what = error_of(rank, me == 2 ? Errc::corrupt_payload : Errc::peer_lost, 4);
          EXPECT_NE(what.find(std::string("rank 2, step 1, bucket c: payload of rank ") + (second ? "1" : "0")), std::string::npos) << what;
          end.wait(3);
        });
      }
}

// Random damage anywhere in what arrives: an error or another mean, never a fault; replicas that differ are caught by the fingerprint.
TEST(ReducerFailures, AnyDamageIsSurvived) {
  const std::string configs[] = {config(" check_every=2"), kTwoPhase[0] + " check_every=2", kTwoPhase[1] + " check_every=2"};
  for (int round = 0; round < 120; ++round) {
    Meeting end;
    run_ranks(2, [&](std::shared_ptr<Communicator> communicator) {
      const int me = communicator->rank();
      auto faults = std::make_shared<Faults>();
      const auto damage = [round](int call, Bytes received) {
        for (int i = 0; i < 1 + round % 3; ++i) {
          const std::uint64_t x = draw(99, std::uint64_t(round), std::uint64_t(call), std::uint64_t(i), 0);
          received.data[x % received.size] ^= std::byte(1 + (x >> 32) % 255);
        }
      };
      if (me == 1) {
        faults->gathered = [=](int call, Bytes received, std::size_t) {
          if (call != 0) damage(call, received);  // 0: the fingerprints
        };
        if (round % 2 == 0) faults->exchanged = [=](int call, Bytes received) { damage(call + 1000, received); };
      }
      Rank rank(std::make_shared<FaultyTransport>(communicator->split(0, me), faults), configs[round % 3]);
      try {
        for (int i = 0; i < 4; ++i) rank.step();
      } catch (const Error& e) {
        EXPECT_TRUE(e.code() == Errc::corrupt_payload || e.code() == Errc::peer_lost || e.code() == Errc::internal) << e.what();
        rank.expect_sticky(e.what());
      }
      end.wait(2);
    });
  }
}

TEST(ReducerFailures, ADriftedReplicaIsFound) {
  for (const int drift : {2, 6, 0}) {  // the call that is damaged
    Meeting end;
    run_ranks(3, [&](std::shared_ptr<Communicator> communicator) {
      const int me = communicator->rank();
      auto faults = std::make_shared<Faults>();
      // Calls: fingerprints, then two buckets per step, and the replicas' fingerprints after every third step. A bit of the last
      // value of rank 0's payload changes in the second bucket of step 0 or 2: it decodes, to another number.
      if (me == 1 && drift != 0)
        faults->gathered = [drift](int call, Bytes received, std::size_t) {
          if (call == drift) received.data[64 + 4 + 4 * 40 + 4 * 39 + 2] ^= std::byte{1};
        };
      Rank rank(std::make_shared<FaultyTransport>(communicator->split(0, me), faults),
                "codec=topk:density=0.1,select=exact,index=u32 feedback=dgc exchange=gather min_numel=1 check_every=3");
      for (int i = 0; i < 2; ++i) rank.step();
      if (drift != 0) {
        const std::string what = error_of(rank, Errc::internal);
        EXPECT_NE(what.find("step 2"), std::string::npos) << what;
        EXPECT_NE(what.find("drifted"), std::string::npos) << what;
      } else {
        for (int i = 0; i < 8; ++i) rank.step();
      }
      end.wait(3);
    });
  }
}

TEST(ReducerFailures, AReducerThatGoesWithWorkUnderWayReleasesEverybody) {
  for (int round = 0; round < 10; ++round) {
    Meeting started, end;
    run_ranks(3, [&](std::shared_ptr<Communicator> communicator) {
      Rank rank(std::move(communicator), config());
      rank.step();
      if (rank.reducer->rank() == 2) {  // never comes; its own end is no error of its own
        started.wait(3);
        end.wait(3);
        return;
      }
      Work one = rank.start_first(), two = rank.start_second(), three = rank.start_first();
      started.wait(3);
      if (rank.reducer->rank() == 0) {
        if (round % 2 == 0) std::this_thread::sleep_for(milliseconds(5));
        rank.reducer.reset();
        for (Work* work : {&one, &two, &three}) {
          EXPECT_TRUE(work->done());
          expect_error(Errc::peer_lost, {"rank 0", "closed"}, [&] { work->wait(); });
        }
      } else {
        expect_error(Errc::peer_lost, {"rank 1, step 1, bucket a"}, [&] { one.wait(); });
        expect_error(Errc::peer_lost, {"rank 1, step 1, bucket a"}, [&] { three.wait(); });
      }
      end.wait(3);
    });
  }
}

TEST(ReducerFailures, CloseWaitsForWorkThatEnds) {
  run_ranks(2, [](std::shared_ptr<Communicator> communicator) {
    Rank rank(std::move(communicator), config());
    Work one = rank.start_first(), two = rank.start_second();
    rank.reducer->close(std::chrono::seconds(60));
    one.wait();
    two.wait();
    rank.communicator->barrier();
  });
}

TEST(ReducerFailures, WorkOutlivesItsReducer) {
  run_ranks(2, [](std::shared_ptr<Communicator> communicator) {
    Rank rank(communicator, config());
    Work one = rank.start_first(), two = rank.start_second();
    two.wait();
    communicator->barrier();
    rank.reducer.reset();
    EXPECT_TRUE(one.done() && two.done());
    one.wait();
    two.wait();
  });
}

// Two reducers and the user's own collectives between their calls, on one group: each has a communicator of its own.
TEST(ReducerFailures, ReducersAndUsersCollectivesDoNotMeet) {
  run_ranks(3, [](std::shared_ptr<Communicator> communicator) {
    Rank one(communicator, config()), two(communicator, config(" start_step=2"));
    for (int i = 0; i < 20; ++i) {
      Work a = one.start_first(), b = two.start_first();
      float x = float(communicator->rank());
      communicator->all_reduce(host_bytes(&x, 1));
      EXPECT_EQ(x, 3.0f);
      Work c = two.start_second(), d = one.start_second();
      communicator->barrier();
      for (Work* work : {&d, &c, &b, &a}) work->wait();
    }
    communicator->barrier();
  });
}

}  // namespace
}  // namespace thinwire::test
