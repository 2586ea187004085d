// What bad calls get: a refusal that says what was wrong, and nothing changed. What ranks that were set up differently get: the same words.

#include <gtest/gtest.h>

#include <atomic>

#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

const std::vector<Parameter> kModel = {{"a", {4, 5}}, {"b", {3}}, {"c", {2, 2}}};
const char* const kConfig = "codec=topk:density=0.2,select=exact feedback=dgc exchange=gather min_numel=1";

/// One rank alone: nothing to wait for.
struct Alone {
  std::shared_ptr<Communicator> communicator = std::move(make_loopback(1)[0]);
  GradientReducer reducer;
  explicit Alone(const std::string& config = kConfig, ReducerOptions options = {})
      : reducer(communicator, Config::parse(config), kModel, std::move(options)) {}
  void reduce(const Ids& ids, Vec& grad) { reducer.reduce(ids, host_bytes(grad.data(), grad.size())).wait(); }
};

TEST(ReducerErrors, BadReducesAreRefusedAndChangeNothing) {
  for (const bool inline_queue : {false, true}) {
    Alone bad(kConfig, {.inline_queue = inline_queue}), good;
    Vec a(20, 1.0f), bc(7, 2.0f), a2 = a, bc2 = bc;
    bad.reduce({0}, a);
    expect_error(Errc::invalid_argument, {"'a'", "twice", "step 0", "1 of 3"}, [&] { bad.reduce({0}, a); });
    expect_error(Errc::invalid_argument, {"'b'", "twice"}, [&] { bad.reduce({1, 2, 1}, bc); });
    expect_error(Errc::invalid_argument, {"'a'", "twice"}, [&] { bad.reduce({1, 0}, bc); });
    expect_error(Errc::invalid_argument, {"unknown parameter id 3", "below 3"}, [&] { bad.reduce({1, 3}, bc); });
    expect_error(Errc::invalid_argument, {"28 bytes", "2 parameters", "7 elements of fp16"}, [&] {
      bad.reducer.reduce(Ids{1, 2}, host_bytes(bc.data(), 14, DType::fp16));
    });
    expect_error(Errc::invalid_argument, {"12 bytes", "7 elements of fp32"}, [&] {
      bad.reducer.reduce(Ids{1, 2}, host_bytes(bc.data(), 3));
    });
    expect_error(Errc::invalid_argument, {"u8"}, [&] { bad.reducer.reduce(Ids{1, 2}, host_bytes(bc.data(), 28, DType::u8)); });
    for (const float scale : {0.0f, -1.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
      expect_error(Errc::invalid_argument, {"loss_scale"}, [&] {
        bad.reducer.reduce(Ids{1, 2}, host_bytes(bc.data(), 7), Stream::host(), {.loss_scale = scale});
      });
    Bytes elsewhere = host_bytes(bc.data(), 7);
    elsewhere.place = Place::cuda;
    expect_error(Errc::invalid_argument, {"GPU 0", "host memory"}, [&] { bad.reducer.reduce(Ids{1, 2}, elsewhere); });
    expect_error(Errc::invalid_argument, {"'a'", "twice"}, [&] { bad.reducer.pass(Ids{2, 0}, "why", nullptr); });
    EXPECT_EQ(bc, Vec(7, 2.0f));
    bad.reduce({1, 2}, bc);

    good.reduce({0}, a2);
    good.reduce({1, 2}, bc2);
    EXPECT_EQ(a, a2);
    EXPECT_EQ(bc, bc2);
    expect_same_state({bad.reducer.state()}, {good.reducer.state()});
    EXPECT_EQ(bad.reducer.step(), 1u);
  }
}

TEST(ReducerErrors, SomeCallsBelongBetweenSteps) {
  Alone one;
  Vec a(20, 1.0f), bc(7, 2.0f);
  const ReducerState before = one.reducer.state();
  one.reduce({0}, a);
  for (const auto& [name, call] :
       std::vector<std::pair<const char*, std::function<void()>>>{{"flush()", [&] { one.reducer.flush(); }},
                                                                  {"reset()", [&] { one.reducer.reset(); }},
                                                                  {"state()", [&] { (void)one.reducer.state(); }},
                                                                  {"load_state()", [&] { one.reducer.load_state(std::span(&before, 1)); }}})
    expect_error(Errc::invalid_argument, {name, "between steps", "step 0", "1 of 3"}, call);
  EXPECT_EQ(one.reducer.stats().step, 0u);  // reading counters is allowed anywhere
  one.reduce({1, 2}, bc);
  one.reducer.flush();
  one.reducer.reset();
  EXPECT_EQ(one.reducer.stats().step, 1u);
}

TEST(ReducerErrors, ConstructionIsChecked) {
  const auto make = [](std::shared_ptr<Communicator> c, std::vector<Parameter> p) {
    GradientReducer(std::move(c), Config(), std::move(p));
  };
  expect_error(Errc::invalid_argument, {"communicator"}, [&] { make(nullptr, kModel); });
  expect_error(Errc::invalid_argument, {"'a'", "two parameters"}, [&] {
    make(std::move(make_loopback(1)[0]), {{"a", {1}}, {"b", {1}}, {"a", {2}}});
  });
  expect_error(Errc::invalid_argument, {"at least one parameter"}, [&] { make(std::move(make_loopback(1)[0]), {}); });
}

TEST(ReducerErrors, TheCallersCommunicatorKeepsItsDeadlineAndStaysUsable) {
  run_ranks(2, [](std::shared_ptr<Communicator> c) {
    c->set_timeout(std::chrono::milliseconds(34567));
    GradientReducer reducer(c, Config::parse(std::string(kConfig) + " timeout=12"), kModel);
    EXPECT_EQ(c->timeout(), std::chrono::milliseconds(34567));
    c->barrier();
    EXPECT_EQ(c->traffic().payload_bytes, 0u);  // the reducer has a group of its own
  });
}

TEST(ReducerErrors, AClosedReducerRefusesAndCanBeRead) {
  Alone one;
  Vec a(20, 1.0f), bc(7, 2.0f);
  one.reduce({0}, a);
  one.reduce({1, 2}, bc);
  const ReducerState before = one.reducer.state();
  one.reducer.close();
  one.reducer.close();
  expect_error(Errc::invalid_argument, {"reduce() after close()"}, [&] { one.reduce({0}, a); });
  expect_error(Errc::invalid_argument, {"pass() after close()"}, [&] { one.reducer.pass(Ids{0}, "why", nullptr); });
  EXPECT_EQ(one.reducer.stats().step, 1u);
  expect_same_state({one.reducer.state()}, {before});
}

TEST(ReducerErrors, AFailedPassIsStickyAndSaysWhere) {
  for (const bool inline_queue : {false, true}) {
    Alone one(kConfig, {.inline_queue = inline_queue});
    Vec a(20, 1.0f), bc(7, 2.0f);
    Work bad = one.reducer.pass(Ids{0}, "sparse rows", []() -> bool { throw std::runtime_error("no such row"); });
    const std::string first = expect_error(Errc::internal, {"rank 0", "step 0", "no such row"}, [&] { bad.wait(); });
    const auto same = [&](const std::function<void()>& call) { EXPECT_EQ(expect_error(Errc::internal, {}, call), first); };
    same([&] { bad.wait(); });
    for (int again = 0; again < 2; ++again) {
      same([&] { one.reduce({1, 2}, bc); });
      same([&] { one.reducer.pass(Ids{1}, "", nullptr); });
      EXPECT_EQ(one.reducer.stats().step, 0u);  // counters can still be read
      same([&] { (void)one.reducer.state(); });
      same([&] { one.reducer.flush(); });
      same([&] { one.reducer.reset(); });
    }
    EXPECT_EQ(bc, Vec(7, 2.0f));
  }
}

TEST(ReducerErrors, DoneIsCalledOncePerBucketBeforeWaitReturns) {
  struct Calls {
    std::atomic<int> good{0}, bad{0};
    static void note(void* context, std::exception_ptr error) noexcept {
      auto* calls = static_cast<Calls*>(context);
      ++(error ? calls->bad : calls->good);
    }
  };
  for (const bool inline_queue : {false, true}) {
    Calls calls;
    Alone one(kConfig, {.inline_queue = inline_queue});
    Vec a(20, 1.0f), bc(7, 2.0f);
    const ReduceOptions noted{.done = Calls::note, .context = &calls};
    one.reducer.reduce(Ids{0}, host_bytes(a.data(), 20), Stream::host(), noted).wait();
    EXPECT_EQ(calls.good, 1);
    Work work = one.reducer.reduce(Ids{2, 1}, host_bytes(bc.data(), 7), Stream::host(), noted);
    work.wait();
    EXPECT_TRUE(work.done());
    EXPECT_EQ(calls.good, 2);
    Work failing = one.reducer.pass(
        Ids{0}, "", []() -> bool { throw std::runtime_error("x"); }, noted);
    expect_error(Errc::internal, {}, [&] { failing.wait(); });
    EXPECT_EQ(calls.bad, 1);
    EXPECT_EQ(calls.good, 2);
  }
  Work nothing;
  EXPECT_TRUE(nothing.done());
  nothing.wait();
}

// Before there is state of it, by name; what stays dense may be of any size. Under econtrol the codec is asked more about it.
TEST(ReducerErrors, ATensorTooLargeForTheWireIsRefusedAtOnce) {
  const std::vector<Parameter> model = {{"small", {4, 5}}, {"table", {std::size_t(1) << 16, std::size_t(1) << 16}}};
  const std::shared_ptr<Communicator> communicator = std::move(make_loopback(1)[0]);
  for (const char* config : {"dgc:density=0.01 exchange=gather", "codec=topk:density=0.01 feedback=ef14", "econtrol:density=0.01"}) {
    SCOPED_TRACE(config);
    expect_error(Errc::invalid_argument, {"topk: parameter 1 'table' has 4294967296 elements", "at most 2^32 - 1"},
                 [&] { GradientReducer(communicator, Config::parse(config), model); });
  }
  GradientReducer(communicator, Config::parse("codec=none"), model);
}

// ---- ranks that do not fit together

/// Every rank must refuse with the same words after the "rank r, step s, bucket b: " of its own; returns them.
std::string refusal_of_all(int world, const std::function<std::pair<std::string, std::vector<Parameter>>(int rank)>& setup,
                           ReducerOptions (*options)(int rank) = nullptr) {
  std::vector<std::string> words(static_cast<std::size_t>(world));
  run_ranks(world, [&](std::shared_ptr<Communicator> c) {
    const int rank = c->rank();
    const auto [config, parameters] = setup(rank);
    GradientReducer reducer(c, Config::parse(config), parameters, options != nullptr ? options(rank) : ReducerOptions{});
    Vec grad(numel_of(parameters[0]), 1.0f);
    Work work = reducer.reduce(Ids{0}, host_bytes(grad.data(), grad.size()));
    const std::string what = expect_error(Errc::invalid_config, {"rank " + std::to_string(rank) + ", step "}, [&] { work.wait(); });
    EXPECT_EQ(expect_error(Errc::invalid_config, {}, [&] { reducer.flush(); }), what);
    words[std::size_t(rank)] = what.substr(std::min(what.size(), what.find(": ")));
    c->barrier();
  });
  for (const std::string& w : words) EXPECT_EQ(w, words[0]);
  return words[0];
}

TEST(ReducerErrors, DifferentConfigsAreRefusedByAllAlike) {
  const std::string words =
      refusal_of_all(3, [](int rank) { return std::pair(std::string("dgc:density=") + (rank == 1 ? "0.02" : "0.01"), kModel); });
  EXPECT_NE(words.find("rank 1 and rank 0 have different configs"), std::string::npos) << words;
  EXPECT_NE(words.find("density=0.02"), std::string::npos) << words;
  EXPECT_NE(words.find("density=0.01"), std::string::npos) << words;
}

TEST(ReducerErrors, ADifferenceAtTheEndOfALongConfigIsFound) {
  std::string list = "0.9";
  for (int i = 0; i < 200; ++i) list += "/0.9";
  refusal_of_all(2, [&](int rank) {
    return std::pair("codec=topk:density=0.1 policy=warmup:steps=1,densities=" + list + (rank == 1 ? "/0.5" : "/0.6"), kModel);
  });
}

TEST(ReducerErrors, DifferentParametersAreRefusedByAllAlikeNamingTheFirst) {
  const std::string longest(3000, 'x');
  std::string letters;
  for (int i = 0; i < 200; ++i) letters += "ü";  // two bytes each: 299 and 301 are in the middle of one
  struct Case {
    std::vector<Parameter> other;
    std::string says;
  };
  const std::vector<Case> cases = {
      {{{"a", {4, 5}}, {"b", {3}}}, "(2 and 3 of them): the first that differs is number 2: none on rank 2, 'c' of shape (2, 2) on rank 0"},
      {{{"a", {4, 5}}, {"b", {3}}, {"d", {2, 2}}}, "number 2: 'd' of shape (2, 2) on rank 2, 'c' of shape (2, 2) on rank 0"},
      {{{"a", {4, 5}}, {"c", {2, 2}}, {"b", {3}}}, "number 1: 'c' of shape (2, 2) on rank 2, 'b' of shape (3) on rank 0"},
      {{{"a", {5, 4}}, {"b", {3}}, {"c", {2, 2}}}, "(3 and 3 of them): the first that differs is number 0: 'a' of shape (5, 4) on rank 2"},
      {{{"a", {4, 5}}, {"b", {3}}, {"c", {2, 2}}, {"s", {}}}, "number 3: 's' of shape () on rank 2, none on rank 0"},
      {{{"a", {4, 5}}, {longest, {7}}}, "number 1: '" + longest.substr(0, 300) + "…' of shape (7) on rank 2, 'b'"},
      {{{"a", {4, 5}}, {"b" + letters, {7}}}, "number 1: 'b" + letters.substr(0, 298) + "…' of shape (7) on rank 2, 'b'"},
  };
  for (const Case& c : cases) {
    // rank 1 has rank 0's parameters, rank 3 more of them than either, of which nobody speaks
    const auto setup = [&](int rank) {
      std::vector<Parameter> own = rank == 2 ? c.other : kModel;
      if (rank == 3) own.resize(9, {"more", {1}});
      for (std::size_t p = kModel.size(); rank == 3 && p < own.size(); ++p) own[p].name += std::to_string(p);
      return std::pair(std::string(kConfig), own);
    };
    const std::string words = refusal_of_all(4, setup);
    EXPECT_NE(words.find("rank 2 and rank 0 have different parameters"), std::string::npos) << words;
    EXPECT_NE(words.find(c.says), std::string::npos) << words;
  }
}

TEST(ReducerErrors, AScalerOnSomeRanksOnlyIsRefusedByAllAlike) {
  const auto same = [](int) { return std::pair(std::string(kConfig), kModel); };
  const std::string scaler = refusal_of_all(2, same, [](int rank) { return ReducerOptions{.step_verdict = rank == 1}; });
  EXPECT_NE(scaler.find("grad scaler"), std::string::npos) << scaler;
}

}  // namespace
}  // namespace thinwire::test
