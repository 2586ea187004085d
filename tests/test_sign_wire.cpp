// Payloads of signs: their layout, their sums, and what a receiver does with bytes that no sender wrote.

#include <limits>

#include "compressors/core/error.hpp"
#include "tests/sign_fixture.hpp"

namespace thinwire {
namespace {

template <class T>
class SignWire : public OnBackend<T> {};
TYPED_TEST_SUITE(SignWire, Backends, BackendName);

// Bytes by hand: 12 elements and 3, blocks of 8.
TYPED_TEST(SignWire, TheDocumentedExample) {
  SignRig rig(TypeParam::kBackend, with(Scale::l1, 8), no_feedback(), {12, 3});
  rig.step = 5;
  std::vector<float> grad(rig.numel, 0.0f);
  const float x[12] = {1, -1, 2, -2, 3, -3, 4, -0.0f, -6, 2, 2, -2}, y[3] = {0.5f, -0.25f, -0.75f};
  std::copy(x, x + 12, grad.begin() + std::ptrdiff_t(rig.segments[0].first));
  std::copy(y, y + 3, grad.begin() + std::ptrdiff_t(rig.segments[1].first));
  rig.stream(grad);
  ASSERT_EQ(rig.payload.size(), 80u);
  const unsigned char expected[16] = {0, 0, 0, 0x40, 0, 0, 0x40, 0x40, 0, 0, 0, 0x3f, 0xd5, 0x06, 0x01, 0};  // 2, 3, 0.5
  for (std::size_t i = 0; i < 16; ++i) EXPECT_EQ(int(rig.payload[64 + i]), int(expected[i])) << "byte " << 64 + i;
}

TYPED_TEST(SignWire, LayoutIsTheDocumentedOne) {
  const std::vector<std::size_t> counts = {0, 1, 7, 8, 9, 1023, 1024, 1025, 4095, 4097, 65537};
  for (const std::size_t block : {8, 24, 512, 1024, 4096, 8192, 0}) {
    SignRig rig(TypeParam::kBackend, with(Scale::l1, block), no_feedback(), counts);
    std::size_t bytes = 64;
    for (const std::size_t n : counts) bytes += 4 * (block == 0 ? n != 0 : (n + block - 1) / block) + (n + 7) / 8;
    EXPECT_EQ(rig.codec->layout(rig.plan()).part_capacity, (bytes + 7) / 8 * 8);
    rig.stream(gradients(rig.numel, 3, false));
    rig.signs();  // throws on anything that the format does not allow
    EXPECT_EQ(rig.codec->memory(rig.segments[1]), 0u);
    EXPECT_STREQ(rig.codec->memory_name(), "");
    EXPECT_EQ(rig.codec->target(rig.segments[5]), 1023u);
    EXPECT_EQ(rig.codec->combine(), Combine::reencode);
  }
}

/// factor × the ranks' values, neighbouring pairs first, by the oracle's reading of the payloads. Gaps and dead elements as they must be.
std::vector<float> sum_of_pairs(const SignRig& rig, const std::vector<std::vector<oracle::Signs>>& ranks, float factor) {
  std::vector<float> out(rig.numel, kGap);
  for (std::size_t s = 0; s < rig.segments.size(); ++s) {
    for (std::size_t i = 0; i < rig.segments[s].count; ++i) {
      float sum = 0;
      for (std::size_t r = 0; r < ranks.size(); r += 2) {
        float pair = ranks[r][s].value(i, rig.block(s));
        if (r + 1 < ranks.size()) pair += ranks[r + 1][s].value(i, rig.block(s));
        sum = r == 0 ? pair : sum + pair;
      }
      out[rig.segments[s].first + i] = rig.alive(s, i) ? sum * factor : 0.0f;
    }
  }
  return out;
}

template <class T>
void decodes(SignRig& rig, std::size_t world, float factor) {
  std::vector<std::vector<std::byte>> payloads;
  std::vector<std::vector<oracle::Signs>> ranks;
  for (std::size_t r = 0; r < world; ++r) {
    rig.stream(gradients(rig.numel, unsigned(r + 3 * world), false));
    payloads.push_back(rig.payload);
    ranks.push_back(rig.signs());
  }
  const auto name = [&] { return "world " + std::to_string(world) + describe(rig.options); };
  const auto sum = sum_of_pairs(rig, ranks, factor);
  rig.flags = 0;
  expect_same_bits(rig.decode(payloads, factor), sum, name);
  EXPECT_EQ(rig.flags, 0u);
  for (const DType dtype : {DType::bf16, DType::fp16}) {
    std::vector<std::byte> gaps(2 * rig.numel);
    for (std::size_t i = 0; i < gaps.size(); ++i) gaps[i] = std::byte(i % 2 == 0 ? 0x34 : 0x12);
    const auto half = rig.decode_as(dtype, payloads, factor, std::move(gaps));
    for (std::size_t i = 0; i < rig.numel; ++i) {
      std::uint16_t got;
      std::memcpy(&got, &half[2 * i], 2);
      const bool gap = sum[i] == kGap;  // no mean is that by chance
      ASSERT_EQ(got, gap ? 0x1234 : oracle::nearest_bits(sum[i], dtype, false)) << name() << " element " << i << " is " << sum[i];
    }
  }
  EXPECT_EQ(rig.flags, 0u);
}

TYPED_TEST(SignWire, DecodeSumsPairsOfRanksFirst) {
  for (const std::size_t world : {1, 2, 3, 4, 7, 8, 70}) {
    for (const std::size_t block : {24, 1024, 5000, 0}) {
      for (const bool masked : {false, true}) {
        if (world > 8 && block != 1024) continue;
        SignRig rig(TypeParam::kBackend, with(world % 2 != 0 ? Scale::l2 : Scale::l1, block), no_feedback(), {1, 33, 9000, 64, 0, 1025});
        if (masked) rig.mask(unsigned(world));
        decodes<TypeParam>(rig, world, 1.0f / float(world));
        if (this->HasFatalFailure()) return;
      }
    }
  }
}

// Pairs first is another sum than rank by rank: the scales here tell them apart.
TYPED_TEST(SignWire, ThePairsAreVisibleInTheSum) {
  SignRig rig(TypeParam::kBackend, with(Scale::l1, 8), no_feedback(), {8});
  std::vector<std::vector<std::byte>> payloads;
  for (const float x : {1.0f, 0x1p-24f, 0x1p-24f, 0x1p-24f}) {
    rig.stream(std::vector<float>(rig.numel, x));
    payloads.push_back(rig.payload);
  }
  EXPECT_EQ(rig.decode(payloads)[1], 1.0f + 0x1p-23f);  // (1 + 2^-24) + (2^-24 + 2^-24); one after the other all three would vanish
}

// Outputs from which on stores go past the caches, at every alignment of a float.
TYPED_TEST(SignWire, LargeOutputsGoTheSameWay) {
  const std::size_t n = (std::size_t(1) << 18) + 77;
  SignRig rig(TypeParam::kBackend, with(Scale::l1, 1024), no_feedback(), {n});
  const auto grad = gradients(rig.numel, 5, false);
  rig.stream(grad);
  const auto first = rig.payload;
  const auto a = rig.signs();
  rig.stream(gradients(rig.numel, 6, false));
  const auto want = sum_of_pairs(rig, {a, rig.signs()}, 0.5f);
  const std::size_t reach = 20;
  const ConstBytes wires[] = {SignRig::bytes(std::as_const(first)), SignRig::bytes(std::as_const(rig.payload))};
  for (std::size_t shift = 0; shift < reach; ++shift) {
    rig.segments[0].first = shift;
    const WireLayout layout = rig.codec->layout(rig.plan());
    rig.workspace.resize(std::max(layout.workspace, 2 * layout.per_payload));
    std::vector<float> out(n + reach, kGap);
    rig.codec->decode(rig.plan(), wires, 0.5f, SignRig::bytes(rig.workspace), host_bytes(out.data(), out.size()), &rig.flags,
                      Stream::host());
    for (std::size_t i = 0; i < out.size(); ++i) {
      const bool inside = i >= shift && i < shift + n;
      ASSERT_EQ(float_bits(out[i]), float_bits(inside ? want[1 + i - shift] : kGap)) << "shift " << shift << " element " << i;
    }
    if (TypeParam::kBackend.cuda && shift == 4) return;  // there, what is not whole 16-byte words is one case
  }
}

TYPED_TEST(SignWire, ANonfiniteSumOrAnOverflowingRoundingRaisesTheFlag) {
  for (const std::size_t n : {8, 100}) {
    SignRig rig(TypeParam::kBackend, with(Scale::l1, 8), no_feedback(), {n});
    rig.stream(std::vector<float>(rig.numel, 3e38f));
    EXPECT_EQ(rig.flags, 0u);
    rig.decode({rig.payload});
    EXPECT_EQ(rig.flags, 0u);
    rig.decode({rig.payload, rig.payload});
    EXPECT_EQ(rig.flags, unsigned(kFlagNonfinite));
    rig.flags = 0;
    const auto half = rig.decode_as(DType::fp16, {rig.payload}, 1, std::vector<std::byte>(2 * rig.numel));
    EXPECT_EQ(rig.flags, unsigned(kFlagNonfinite));
    EXPECT_EQ(oracle::element(half, 5, DType::fp16), INFINITY);
    rig.flags = 0;
    const auto upper = rig.decode_as(DType::bf16, {rig.payload}, 1.2f, std::vector<std::byte>(2 * rig.numel));
    EXPECT_EQ(rig.flags, unsigned(kFlagNonfinite));
    EXPECT_EQ(oracle::element(upper, 5, DType::bf16), INFINITY);
  }
}

TYPED_TEST(SignWire, EmptyPayloadsDecodeToNothingAndCarryTheirFlags) {
  SignRig rig(TypeParam::kBackend, with(Scale::l1, 1024), ef14(), {100, 7000}, {1, 2});
  rig.stream(gradients(rig.numel, 3, false));
  rig.prepare();
  rig.codec->empty(rig.plan(), SignRig::bytes(rig.payload), kFlagJoined, Stream::host());
  for (const auto& signs : rig.signs())
    for (const float scale : signs.scales) EXPECT_EQ(scale, 0.0f);
  const std::size_t capacity = rig.payload.size() / 2;
  for (std::size_t r = 0; r < 2; ++r) EXPECT_EQ(rig.payload[r * capacity + 8], std::byte(kFlagJoined));

  SignRig talks(TypeParam::kBackend, with(Scale::l1, 1024), no_feedback(), {100, 7000});
  talks.stream(gradients(rig.numel, 4, false));
  const auto signs = talks.signs();
  const auto said = talks.payload;
  talks.prepare();
  talks.codec->empty(talks.plan(), SignRig::bytes(talks.payload), kFlagJoined, Stream::host());
  const auto out = talks.decode({said, talks.payload}, 0.5f);
  EXPECT_EQ(talks.flags, unsigned(kFlagJoined));
  for (std::size_t i = 0; i < 100; ++i) EXPECT_EQ(out[1 + i], 0.5f * signs[0].value(i, 1024));
  for (const float x : talks.decode({talks.payload})) EXPECT_TRUE(x == 0.0f || x == kGap);
}

/// Phase two of an owner: a plan's parts are decoded one by one, each by a plan of its own.
TYPED_TEST(SignWire, PartsAreDecodedByTheirOwners) {
  SignRig rig(TypeParam::kBackend, with(Scale::l1, 24), ef14(), {1000, 50, 3000}, {1, 3});
  rig.mask(2);
  rig.stream(gradients(rig.numel, 3, false));
  const auto signs = rig.signs();
  const std::size_t capacity = rig.payload.size() / 2;
  for (std::size_t r = 0; r < 2; ++r) {
    Plan own = rig.plan();
    own.segments = rig.part(r);
    own.part_end = {};
    const WireLayout layout = rig.codec->layout(own);
    EXPECT_LE(layout.part_capacity, capacity);
    std::vector<std::byte> workspace(std::max(layout.workspace, layout.per_payload));
    std::vector<float> out(rig.numel, kGap);
    const ConstBytes wire = SignRig::bytes(std::as_const(rig.payload)).sub(r * capacity, capacity);
    rig.codec->decode(own, {&wire, 1}, 1, SignRig::bytes(workspace), host_bytes(out.data(), out.size()), &rig.flags, Stream::host());
    for (std::size_t s = 0; s < 3; ++s) {
      for (std::size_t i = 0; i < rig.segments[s].count; ++i) {
        const bool mine = (s == 0) == (r == 0);
        const float expected = !mine ? kGap : rig.alive(s, i) ? signs[s].value(i, 24) : 0.0f;
        ASSERT_EQ(out[rig.segments[s].first + i], expected) << "part " << r << " segment " << s << " element " << i;
      }
    }
    const ConstBytes others = SignRig::bytes(std::as_const(rig.payload)).sub((1 - r) * capacity, capacity);
    EXPECT_THROW(
        rig.codec->decode(own, {&others, 1}, 1, SignRig::bytes(workspace), host_bytes(out.data(), out.size()), &rig.flags, Stream::host()),
        Error);
  }
}

/// The text of the corrupt_payload error, or "" if the bytes decode.
std::string refusal(SignRig& rig, const std::vector<std::byte>& payload, std::size_t length) {
  // Exactly so many: a read past the end is seen by AddressSanitizer.
  const std::vector<std::byte> given(payload.begin(), payload.begin() + std::ptrdiff_t(length));
  try {
    rig.decode({rig.payload, given});
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::corrupt_payload) << error.what();
    return error.what();
  }
  return "";
}

TYPED_TEST(SignWire, CorruptPayloadsAreNamed) {
  SignRig rig(TypeParam::kBackend, with(Scale::l1, 64), no_feedback(), {100, 9000});
  rig.step = 7;
  rig.stream(gradients(rig.numel, 1, false));
  const auto good = rig.payload;
  EXPECT_EQ(refusal(rig, good, good.size()), "");
  const auto expect = [&](const std::vector<std::byte>& payload, std::size_t length, std::initializer_list<const char*> words) {
    const std::string text = refusal(rig, payload, length);
    EXPECT_NE(text.find("rank 1"), std::string::npos) << text;
    for (const char* word : words) EXPECT_NE(text.find(word), std::string::npos) << '"' << text << "\" lacks \"" << word << '"';
  };
  for (const std::size_t length : {std::size_t(0), std::size_t(63), std::size_t(64), good.size() - 8})
    expect(good, length, {std::to_string(length).c_str()});
  auto shorter = good;  // and says so itself
  const std::uint64_t bytes = good.size() - 8;
  std::memcpy(&shorter[16], &bytes, 8);
  expect(shorter, bytes, {std::to_string(bytes).c_str(), std::to_string(good.size()).c_str()});
  const struct {
    std::size_t at;
    int bytes;
    std::uint64_t value;
    const char* field;
  } fields[] = {{0, 4, 0x50575755, "magic"}, {4, 2, 2, "version"}, {6, 1, 1, "codec"}, {7, 1, 1, "round"}, {8, 4, 4, "flags"},
                {12, 4, 3, "segments"},      {16, 8, 99, "bytes"}, {24, 8, 5, "plan"}, {32, 8, 6, "step"}};
  for (const auto& field : fields) {
    auto bad = good;
    std::memcpy(&bad[field.at], &field.value, std::size_t(field.bytes));
    expect(bad, bad.size(), {field.field});
    EXPECT_EQ(refusal(rig, good, good.size()), "");
  }
  const struct {
    float scale;
    const char* word;
  } scales[] = {{std::numeric_limits<float>::quiet_NaN(), "nan"}, {std::numeric_limits<float>::infinity(), "inf"}, {-1.5f, "-1.5"}};
  for (const auto& bad_scale : scales) {
    for (const std::size_t which : {0, 2, 142}) {  // the last of 2 + 141
      auto bad = good;
      std::memcpy(&bad[64 + 4 * which], &bad_scale.scale, 4);
      expect(bad, bad.size(), {("scale " + std::to_string(which)).c_str(), "of 143", bad_scale.word});
    }
  }
  auto joined = good;
  joined[8] = std::byte(kFlagJoined);
  rig.flags = 0;
  EXPECT_EQ(refusal(rig, joined, joined.size()), "");
  EXPECT_EQ(rig.flags, unsigned(kFlagJoined));
  rig.step = 8;
  EXPECT_NE(refusal(rig, good, good.size()).find("step"), std::string::npos);
}

// Nothing is written before everything was validated.
TYPED_TEST(SignWire, ARefusedPayloadWritesNothing) {
  SignRig rig(TypeParam::kBackend, with(Scale::l1, 64), no_feedback(), {5000});
  rig.stream(gradients(rig.numel, 1, false));
  auto bad = rig.payload;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::memcpy(&bad[64 + 4 * 78], &nan, 4);
  std::vector<float> out(rig.numel, kGap);
  const ConstBytes wires[] = {SignRig::bytes(std::as_const(rig.payload)), SignRig::bytes(std::as_const(bad))};
  const WireLayout layout = rig.codec->layout(rig.plan());
  rig.workspace.resize(std::max(layout.workspace, 2 * layout.per_payload));
  EXPECT_THROW(
      rig.codec->decode(rig.plan(), wires, 1, SignRig::bytes(rig.workspace), host_bytes(out.data(), out.size()), nullptr, Stream::host()),
      Error);
  EXPECT_EQ(out, std::vector<float>(rig.numel, kGap));
}

// Any bytes: an error or a result, never a fault. (The fuzz target goes on for longer.)
TYPED_TEST(SignWire, MutatedPayloadsNeverFault) {
  std::mt19937 random(12);
  std::size_t refused = 0, accepted = 0;
  for (const std::size_t block : {8, 1024, 0}) {
    SignRig rig(TypeParam::kBackend, with(Scale::l1, block), no_feedback(), {5, 3000, 9000});
    rig.stream(gradients(rig.numel, 1, false));
    for (int round = 0; round < 60; ++round) {
      auto bad = rig.payload;
      const unsigned changes = random() % 4 + 1;
      for (unsigned c = 0; c < changes; ++c) {
        const std::size_t reach = round % 3 == 0 ? bad.size() : round % 3 == 1 ? 76 : std::min<std::size_t>(bad.size(), 400);
        bad[random() % reach] = std::byte(random());
      }
      (refusal(rig, bad, round % 10 == 9 ? random() % bad.size() : bad.size()).empty() ? accepted : refused) += 1;
    }
  }
  EXPECT_GT(refused, 50u);
  EXPECT_GT(accepted, 20u);
}

TYPED_TEST(SignWire, RefusedCallsChangeNothing) {
  SignRig rig(TypeParam::kBackend, with(Scale::l1, 64), averaged(ef14()), {100, 200}, {1, 2});
  const auto grad = gradients(rig.numel, 1, false);
  rig.prepare();
  const auto code = [&](auto&& call) {
    try {
      call();
    } catch (const Error& error) { return to_string(error.code()); }
    return "no error";
  };
  const auto stream = [&](std::size_t elements, std::size_t wire, const Recursion& recursion, const StateView& state) {
    rig.codec->stream(recursion, rig.plan(), host_bytes(grad.data(), elements), state, SignRig::bytes(rig.workspace),
                      SignRig::bytes(rig.payload).sub(0, wire), nullptr, {}, Stream::host());
  };
  const std::size_t bytes = rig.payload.size();
  const StateView sound = rig.state();
  StateView no_beta = sound;
  no_beta.beta1 = nullptr;
  Recursion correction;
  correction.kind = Recursion::Kind::momentum_correction;
  EXPECT_STREQ(code([&] { stream(rig.numel, bytes - 8, rig.recursion, sound); }), "invalid_argument");
  EXPECT_STREQ(code([&] { stream(rig.numel, bytes / 2, rig.recursion, sound); }), "invalid_argument");
  EXPECT_STREQ(code([&] { stream(rig.numel - 2, bytes, rig.recursion, sound); }), "invalid_argument");
  EXPECT_STREQ(code([&] { stream(rig.numel, bytes, rig.recursion, {}); }), "invalid_argument");
  EXPECT_STREQ(code([&] { stream(rig.numel, bytes, rig.recursion, no_beta); }), "invalid_argument");
  EXPECT_STREQ(code([&] { stream(rig.numel, bytes, correction, sound); }), "invalid_argument");
  EXPECT_STREQ(code([&] { make_on(TypeParam::kBackend, with(Scale::l1, 12)); }), "invalid_argument");
  const auto take_back = [&](const StateView& state) {
    rig.codec->take_back(rig.recursion, rig.plan(), SignRig::bytes(std::as_const(rig.payload)), state, nullptr, Stream::host());
  };
  EXPECT_STREQ(code([&] { take_back(no_beta); }), "invalid_argument");
  if (!TypeParam::kBackend.cuda) {
    EXPECT_STREQ(code([&] { take_back({}); }), "invalid_argument");
  }  // there the table has it
  for (const auto& residual : rig.residual) {
    for (const float v : residual) ASSERT_EQ(v, 0);
  }
  EXPECT_EQ(rig.payload, std::vector<std::byte>(bytes, std::byte{0xa5}));
}

// Options that read the same bytes differently do not meet: their payloads' fingerprints differ.
TYPED_TEST(SignWire, OtherOptionsAreAnotherPlan) {
  SignRig rig(TypeParam::kBackend, with(Scale::l1, 512), no_feedback(), {512});
  rig.stream(gradients(rig.numel, 1, false));
  for (const SignOptions& other : {with(Scale::l1, 1024), with(Scale::l1, 0), with(Scale::l2, 512)}) {
    SignRig receiver(TypeParam::kBackend, other, no_feedback(), {512});
    receiver.stream(gradients(rig.numel, 1, false));
    const std::string text = refusal(receiver, rig.payload, rig.payload.size());
    EXPECT_NE(text.find("plan fingerprint"), std::string::npos) << text;
  }
}

// What the owners of a two-phase exchange send: a payload for each part, all decoded in one call, each alone into its own segments.
TYPED_TEST(SignWire, EachPartFromItsOwnPayload) {
  for (const std::size_t block : {24, 1024, 0}) {
    SignRig rig(TypeParam::kBackend, with(Scale::l1, block), no_feedback(), {9000, 100, 1, 5000, 0, 700}, {2, 2, 5, 6});
    rig.mask(4);
    rig.stream(gradients(rig.numel, 5, false));
    const auto signs = rig.signs();
    const std::size_t capacity = rig.payload.size() / rig.parts();
    std::vector<std::vector<std::byte>> payloads;
    for (std::size_t r = 0; r < rig.parts(); ++r)
      payloads.emplace_back(rig.payload.begin() + std::ptrdiff_t(r * capacity), rig.payload.begin() + std::ptrdiff_t((r + 1) * capacity));
    std::vector<float> want(rig.numel, kGap);
    for (std::size_t s = 0; s < rig.segments.size(); ++s)
      for (std::size_t i = 0; i < rig.segments[s].count; ++i)
        want[rig.segments[s].first + i] = rig.alive(s, i) ? signs[s].value(i, rig.block(s)) * 4.0f : 0.0f;
    EXPECT_EQ(rig.decode(payloads, 4.0f), want);

    Plan padded{rig.part(2), {}, rig.step};
    padded.payload_bytes = capacity;
    EXPECT_EQ(rig.codec->layout(padded).part_capacity, capacity);

    const float negative = -1;
    std::memcpy(payloads[2].data() + 64, &negative, 4);
    std::string said;
    std::vector<std::byte> out = oracle::to_bytes(std::vector<float>(rig.numel, kGap), DType::fp32);
    const std::vector<std::byte> before = out;
    std::vector<ConstBytes> wires;
    for (const auto& p : payloads) wires.push_back(SignRig::bytes(p));
    try {
      rig.codec->decode(rig.plan(), wires, 1, SignRig::bytes(rig.workspace), {out.data(), out.size(), DType::fp32, Place::host, 0}, nullptr,
                        Stream::host());
    } catch (const Error& error) { said = error.what(); }
    EXPECT_NE(said.find("payload of rank 2: scale 0"), std::string::npos) << said;
    EXPECT_EQ(out, before) << "something was written before all was checked";
  }
}

}  // namespace
}  // namespace thinwire
