// Payloads of top-k: their layout, their sums, and what a receiver does with bytes that no sender wrote. DGC's published vectors go through
// both ends.

#include "compressors/core/error.hpp"
#include "compressors/core/wire.hpp"
#include "tests/topk_fixture.hpp"

namespace thinwire {
namespace {

template <class T>
class TopKWire : public OnBackend<T> {};
TYPED_TEST_SUITE(TopKWire, Backends, BackendName);

using Index = TopKOptions::Index;

TopKOptions with(bool exact, DType wire = DType::fp32, Index index = Index::automatic) {
  TopKOptions o;
  o.exact = exact;
  o.wire = wire;
  o.index = index;
  return o;
}

// n = 8, k = 2, two ranks, m = 1/2, exact: every number is exact in fp32.
struct Vectors {
  Recursion recursion;
  std::vector<std::vector<float>> out;                      // per step
  std::vector<std::vector<std::vector<std::size_t>>> sent;  // per step and rank; empty: not given
  std::vector<std::vector<float>> u, v;                     // final, per rank; empty: not given
};

std::vector<Vectors> vectors() {
  return {
      {dgc(0.5f),
       {{0, 0, 0, 0, 2.5f, 0, 0, 4}, {0, 0, 0, 0, -2.625f, 3.3125f, 0, 0}, {0, 1.75f, 0, 2, 0, 0, 2.078125f, -3.25f}},
       {{{3, 7}, {3, 4}}, {{2, 4}, {2, 5}}, {{3, 6}, {1, 7}}},
       {{-.5f, .5f, 2, 0, 1, -.9375f, 0, 0}, {.75f, 0, -.5f, -.25f, -1.75f, 1, -.96875f, 0}},
       {{1.5f, -1.5f, 2, 0, 1, -.5625f, 0, -.5f}, {1.25f, 0, -.5f, -1.25f, -1.25f, 1, -.78125f, 0}}},
      {dgc(0.5f, false, false),
       {{}, {}, {0, 0, 0, 0, 0, 2.21875f, 2.078125f, -.5f}},
       {{{3, 7}, {3, 4}}, {{2, 4}, {2, 5}}, {{6, 7}, {5, 7}}},
       {{}, {.75f, 2.5f, -.75f, .75f, -.5f, 4.4375f, -.96875f, -7.5f}},
       {{1.5f, -1.5f, 2.25f, 1, -1.875f, -.5625f, 0, 0}, {1.25f, 3.5f, -.75f, 1.75f, 2.5f, 0, -.78125f, 0}}},
      {dgc(0.5f, true),
       {{0, 0, 0, 0, 3.75f, 0, 0, 6}, {0, 0, 0, 0, -4.0625f, 5.03125f, 0, 0}, {0, 2.375f, 0, 2.5f, 0, 0, 3.1015625f, -5.125f}},
       {{}, {}, {}},
       {{-.25f, .25f, 1, 0, .5f, -.46875f, 0, 0}, {}},
       {{1.25f, -1.25f, 3, 0, 1.5f, -1.03125f, 0, -.5f}, {}}},
  };
}

const float kGradients[3][2][8] = {{{1, -2, 3, -4, .5f, .25f, -.125f, 8}, {-1, 2, -3, 4, 5, -.25f, .125f, 0}},
                                   {{.5f, 1, -1, 2, -6, 0, .25f, -.5f}, {2, -2, 1, -1, .5f, 7, 0, 1}},
                                   {{-1, .5f, 2, 1, 1, -1, 4, .25f}, {0, 3, -.5f, .25f, -2, 1, -1, -8}}};

TYPED_TEST(TopKWire, DgcVectors) {
  for (const auto& expected : vectors()) {
    TopKRig rank0(TypeParam::kBackend, with(true), expected.recursion, {8}, 0.25),
        rank1(TypeParam::kBackend, with(true), expected.recursion, {8}, 0.25);
    TopKRig* ranks[] = {&rank0, &rank1};
    for (std::size_t t = 0; t < 3; ++t) {
      for (std::size_t r = 0; r < 2; ++r) {
        std::vector<float> grad(ranks[r]->numel);
        for (std::size_t i = 0; i < 8; ++i) grad[i + 1] = kGradients[t][r][i];
        ranks[r]->step = t;
        ranks[r]->stream(grad);
        if (expected.sent[t].empty()) continue;
        std::vector<std::size_t> sent;
        const auto entries = ranks[r]->entries();
        for (const auto& e : entries[0]) sent.push_back(e.index);
        EXPECT_EQ(sent, expected.sent[t][r]) << "step " << t << " rank " << r;
      }
      const auto out = rank0.decode({rank0.payload, rank1.payload}, 0.5f);
      if (!expected.out[t].empty()) { EXPECT_EQ(std::vector<float>(out.begin() + 1, out.begin() + 9), expected.out[t]) << "step " << t; }
      EXPECT_EQ(out.front(), kGap);
      EXPECT_EQ(out.back(), kGap);
    }
    for (std::size_t r = 0; r < 2; ++r) {
      if (!expected.u[r].empty()) { EXPECT_EQ(ranks[r]->u[0], expected.u[r]) << "rank " << r; }
      if (!expected.v[r].empty()) { EXPECT_EQ(ranks[r]->residual[0], expected.v[r]) << "rank " << r; }
    }
  }
}

TYPED_TEST(TopKWire, LayoutIsTheDocumentedOne) {
  std::size_t turn = 0;
  for (const auto index : {Index::automatic, Index::u32, Index::u16, Index::bitmap}) {
    for (const DType wire : kWires) {
      for (const bool exact : {false, true}) {
        const std::vector<std::size_t> counts = {0, 1, 31, 32, 33, 65535, 65536, 131073};
        ++turn;  // a form of index at every density, with some wire and selection
        for (const double density : {0.0001, 0.01, 0.1, 0.5}) {
          if (turn++ % 2 != 0) continue;
          TopKRig rig(TypeParam::kBackend, with(exact, wire, index), no_feedback(), counts, density);
          std::size_t bytes = 64 + 4 * counts.size();
          for (const auto n : counts) {
            const auto l = oracle::layout(n, density, rig.options);
            bytes += l.index_bytes + l.value_bytes;
          }
          EXPECT_EQ(rig.codec->layout(rig.plan()).part_capacity, bytes);
          rig.stream(gradients(rig.numel, 3, false));
          const auto entries = rig.entries();  // throws on anything that the format does not allow
          for (std::size_t s = 0; s < counts.size(); ++s) EXPECT_EQ(entries[s].size(), rig.kept[s]);
        }
      }
    }
  }
}

TYPED_TEST(TopKWire, DecodeSumsInRankOrder) {
  const std::vector<std::size_t> counts = {1, 33, 9000, 70000, 0};
  for (const auto index : {Index::u32, Index::u16, Index::bitmap}) {
    for (const DType wire : kWires) {
      for (const std::size_t world : {1u, 2u, 3u, 7u}) {
        TopKRig rig(TypeParam::kBackend, with(false, wire, index), no_feedback(), counts, 0.07);
        std::vector<std::vector<std::byte>> payloads;
        std::vector<float> sum(rig.numel, kGap);
        for (const auto& segment : rig.segments) std::fill_n(sum.begin() + std::ptrdiff_t(segment.first), segment.count, 0.0f);
        for (std::size_t r = 0; r < world; ++r) {
          rig.stream(gradients(rig.numel, unsigned(r), false));
          payloads.push_back(rig.payload);
          const auto entries = rig.entries();
          for (std::size_t s = 0; s < counts.size(); ++s) {
            for (const auto& e : entries[s]) sum[rig.segments[s].first + e.index] += e.value;
          }
        }
        const float factor = 1.0f / float(world);
        for (const auto& segment : rig.segments) {
          for (std::size_t i = 0; i < segment.count; ++i) sum[segment.first + i] *= factor;
        }
        rig.flags = 0;
        ASSERT_EQ(rig.decode(payloads, factor), sum) << "world " << world << describe(rig.options);
        EXPECT_EQ(rig.flags, 0u);

        for (const DType dtype : {DType::bf16, DType::fp16}) {
          std::vector<std::uint16_t> half(rig.numel, 0x1234);
          std::vector<ConstBytes> wires;
          for (const auto& p : payloads) wires.push_back({p.data(), p.size(), DType::u8, Place::host, 0});
          rig.codec->decode(rig.plan(), wires, factor, rig.bytes(rig.workspace), host_bytes(half.data(), half.size(), dtype), &rig.flags,
                            Stream::host());
          std::size_t overflowed = 0;
          for (std::size_t s = 0; s < counts.size(); ++s) {
            ASSERT_EQ(half[rig.segments[s].first - 1], 0x1234);
            for (std::size_t i = 0; i < counts[s]; ++i) {
              const std::size_t at = rig.segments[s].first + i;
              ASSERT_EQ(half[at], oracle::nearest_bits(sum[at], dtype, false)) << "element " << i << " is " << sum[at];
              overflowed += !std::isfinite(oracle::half_value(half[at], dtype));
            }
          }
          EXPECT_EQ(overflowed, 0u);
        }
      }
    }
  }
}

TYPED_TEST(TopKWire, LargeOutputsGoTheSameWay) {
  const std::size_t n = (std::size_t(1) << 20) + 77;  // over the bound from which stores go past the caches
  TopKRig rig(TypeParam::kBackend, with(false), no_feedback(), {n}, 0.01);
  rig.stream(gradients(rig.numel, 5, false));
  std::vector<float> sum(rig.numel, 0.0f);
  sum.front() = sum.back() = kGap;
  const auto entries = rig.entries();
  for (const auto& e : entries[0]) sum[1 + e.index] = (0.0f + e.value) * 0.25f;
  EXPECT_EQ(rig.decode({rig.payload}, 0.25f), sum);
}

TYPED_TEST(TopKWire, ANonfiniteSumOrAnOverflowingRoundingRaisesTheFlag) {
  TopKRig rig(TypeParam::kBackend, with(true), no_feedback(), {100}, 0.01);
  std::vector<float> grad(rig.numel, 0.0f);
  grad[50] = 3e38f;
  rig.stream(grad);
  EXPECT_EQ(rig.flags, 0u);
  rig.decode({rig.payload});
  EXPECT_EQ(rig.flags, 0u);
  rig.decode({rig.payload, rig.payload});
  EXPECT_EQ(rig.flags, unsigned(kFlagNonfinite));

  rig.flags = 0;
  std::vector<std::uint16_t> half(rig.numel);
  const ConstBytes wire{rig.payload.data(), rig.payload.size(), DType::u8, Place::host, 0};
  rig.codec->decode(rig.plan(), {&wire, 1}, 1, rig.bytes(rig.workspace), host_bytes(half.data(), half.size(), DType::fp16), &rig.flags,
                    Stream::host());
  EXPECT_EQ(rig.flags, unsigned(kFlagNonfinite));
  EXPECT_EQ(half[50], 0x7c00);
}

TYPED_TEST(TopKWire, EmptyPayloadsDecodeToNothingAndCarryTheirFlags) {
  TopKRig rig(TypeParam::kBackend, with(false), dgc(), {100, 70000}, 0.02);
  rig.prepare();
  rig.codec->empty(rig.plan(), rig.bytes(rig.payload), kFlagJoined, Stream::host());
  for (const auto& entries : rig.entries()) EXPECT_TRUE(entries.empty());
  const auto out = rig.decode({rig.payload, rig.payload}, 0.5f);
  EXPECT_EQ(rig.flags, unsigned(kFlagJoined));
  for (std::size_t i = 0; i < 100; ++i) EXPECT_EQ(out[1 + i], 0.0f);
}

/// The text of the corrupt_payload error, or "" if the bytes decode.
template <class Rig>
std::string refusal(Rig& rig, const std::vector<std::byte>& payload, std::size_t length) {
  std::vector<std::byte> bytes(
      payload.begin(), payload.begin() + std::ptrdiff_t(length));  // exactly so many: a read past the end is seen by AddressSanitizer
  std::vector<float> out(rig.numel, kGap);
  const ConstBytes wires[] = {{rig.payload.data(), rig.payload.size(), DType::u8, Place::host, 0},
                              {bytes.data(), bytes.size(), DType::u8, Place::host, 0}};
  try {
    rig.codec->decode(rig.plan(), wires, 1, rig.bytes(rig.workspace), host_bytes(out.data(), out.size()), nullptr, Stream::host());
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::corrupt_payload) << error.what();
    for (const float x : out) EXPECT_EQ(x, kGap) << "written before everything was validated";
    return error.what();
  }
  return "";
}

TYPED_TEST(TopKWire, CorruptPayloadsAreNamed) {
  const auto put32 = [](std::vector<std::byte>& p, std::size_t at, std::uint32_t x) { std::memcpy(&p[at], &x, 4); };
  const auto put16 = [](std::vector<std::byte>& p, std::size_t at, std::uint16_t x) { std::memcpy(&p[at], &x, 2); };
  const auto expect = [](const std::string& text, std::initializer_list<const char*> words) {
    EXPECT_NE(text.find("rank 1"), std::string::npos) << text;
    for (const char* word : words) EXPECT_NE(text.find(word), std::string::npos) << '"' << text << "\" lacks \"" << word << '"';
  };
  {
    TopKRig rig(TypeParam::kBackend, with(true, DType::fp32, Index::u32), no_feedback(), {100}, 0.1);
    rig.stream(gradients(rig.numel, 1, false));
    const auto good = rig.payload;
    EXPECT_EQ(refusal(rig, good, good.size()), "");
    for (const std::size_t length : {std::size_t(0), std::size_t(63), std::size_t(64), good.size() - 4})
      expect(refusal(rig, good, length), {});
    auto bad = good;
    bad[0] ^= std::byte{1};
    expect(refusal(rig, bad, bad.size()), {"magic"});
    bad = good, put32(bad, 64, 11);
    expect(refusal(rig, bad, bad.size()), {"segment 0", "parameter 3", "kept is 11", "10"});
    bad = good, put32(bad, 68 + 4, 0);
    expect(refusal(rig, bad, bad.size()), {"segment 0", "ascend"});
    bad = good, put32(bad, 68 + 36, 100);
    expect(refusal(rig, bad, bad.size()), {"index 100", "below 100"});
    bad = good, put32(bad, 68 + 40 + 8, 0x7f800000u);
    expect(refusal(rig, bad, bad.size()), {"value 2", "finite"});
  }
  {
    TopKRig rig(TypeParam::kBackend, with(true, DType::bf16, Index::u16), no_feedback(), {65546}, 0.0005);
    std::vector<float> grad(rig.numel, 0.0f);
    for (std::size_t i = 0; i < 33; ++i) grad[1 + (i < 30 ? 100 * i : 65536 + i - 30)] = 1.0f + float(i);
    rig.stream(grad);
    const auto good = rig.payload;
    ASSERT_EQ(rig.kept[0], 33u);
    auto bad = good;
    put32(bad, 68, 31);
    expect(refusal(rig, bad, bad.size()), {"segment 0"});
    bad = good, put32(bad, 72, 0xfffffff0u);
    expect(refusal(rig, bad, bad.size()), {"kept is 33"});
    bad = good, put32(bad, 72, 2);
    expect(refusal(rig, bad, bad.size()), {"32 entries", "33"});
    bad = good, put16(bad, 76 + 2 * 32, 10);
    expect(refusal(rig, bad, bad.size()), {"index 65546"});
    bad = good, put16(bad, 76 + 2 * 5, 400);
    expect(refusal(rig, bad, bad.size()), {"ascend"});
  }
  {
    TopKRig rig(TypeParam::kBackend, with(true, DType::fp16, Index::bitmap), no_feedback(), {40}, 0.1);
    rig.stream(gradients(rig.numel, 1, false));
    auto bad = rig.payload;
    bad[68 + 5] = std::byte{1};
    expect(refusal(rig, bad, bad.size()), {"segment 0"});
    put32(bad, 64, 5);
    expect(refusal(rig, bad, bad.size()), {"kept is 5"});
  }
  {
    TopKRig rig(TypeParam::kBackend, with(true), no_feedback(), {40}, 0.1);
    rig.stream(gradients(rig.numel, 1, false));
    const auto old = rig.payload;
    rig.step = 1;
    rig.stream(gradients(rig.numel, 1, false));
    expect(refusal(rig, old, old.size()), {"step"});
  }
}

// Any bytes: an error or a result, never a fault. (The fuzz target goes on for longer.)
TYPED_TEST(TopKWire, MutatedPayloadsNeverFault) {
  std::mt19937 random(12);
  std::size_t refused = 0, accepted = 0;
  for (const auto index : {Index::u32, Index::u16, Index::bitmap}) {
    for (const DType wire : kWires) {
      TopKRig rig(TypeParam::kBackend, with(false, wire, index), no_feedback(), {5, 3000, 66000}, 0.02);
      rig.stream(gradients(rig.numel, 1, false));
      for (int round = 0; round < 40; ++round) {
        auto bad = rig.payload;
        const unsigned changes = random() % 4 + 1;
        for (unsigned c = 0; c < changes; ++c) {
          const std::size_t reach = round % 3 == 0 ? bad.size() : round % 3 == 1 ? 76 : std::min<std::size_t>(bad.size(), 400);
          bad[random() % reach] = std::byte(random());
        }
        (refusal(rig, bad, round % 10 == 9 ? random() % bad.size() : bad.size()).empty() ? accepted : refused) += 1;
      }
    }
  }
  EXPECT_GT(refused, 100u);
  EXPECT_GT(accepted, 10u);
}

TYPED_TEST(TopKWire, RefusedCallsChangeNothing) {
  TopKRig rig(TypeParam::kBackend, with(false), dgc(), {100, 200}, 0.1);
  const auto grad = gradients(rig.numel, 1, false);
  rig.prepare();
  const auto code = [&](auto&& call) {
    try {
      call();
    } catch (const Error& error) { return to_string(error.code()); }
    return "no error";
  };
  const auto stream = [&](std::size_t elements, std::size_t wire, std::size_t workspace) {
    rig.codec->stream(rig.recursion, rig.plan(), host_bytes(grad.data(), elements), rig.state(), rig.bytes(rig.workspace).sub(0, workspace),
                      rig.bytes(rig.payload).sub(0, wire), nullptr, {}, Stream::host());
  };
  const std::size_t bytes = rig.payload.size(), scratch = rig.workspace.size();
  EXPECT_STREQ(code([&] { stream(rig.numel, bytes - 4, scratch); }), "invalid_argument");
  EXPECT_STREQ(code([&] { stream(rig.numel, bytes, scratch - 1); }), "invalid_argument");
  EXPECT_STREQ(code([&] { stream(rig.numel - 2, bytes, scratch); }), "invalid_argument");
  for (const double density : {0.0, -0.1, 1.5, double(NAN)}) {
    rig.segments[1].setting.density = density;
    EXPECT_STREQ(code([&] { rig.codec->layout(rig.plan()); }), "invalid_argument");
    EXPECT_STREQ(code([&] { stream(rig.numel, bytes, scratch); }), "invalid_argument");
  }
  for (const auto& residual : rig.residual) {
    for (const float v : residual) ASSERT_EQ(v, 0);
  }
}

// Every 16-bit pattern and every tie between two of them, through the codec's own rounding on this ISA.
TYPED_TEST(TopKWire, HalfPrecisionIsNearestEvenEverywhere) {
  for (const DType wire : {DType::bf16, DType::fp16}) {
    const auto& table = oracle::half_table(wire).magnitudes;
    std::vector<float> values;
    for (std::size_t i = 1; i < table.size(); ++i) {
      const auto middle = float((table[i] + table[i - 1]) / 2);
      for (const float x : {float(table[i]), middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY)})
        values.push_back(i % 2 != 0 ? x : -x);
    }
    const float beyond[] = {65519.996f, 65520, 65536, 1e6f, 3.3895314e38f, 3.3961776e38f, 3.4028235e38f};
    for (const float x : beyond) values.push_back(x), values.push_back(-x);
    for (const auto& recursion : {no_feedback(), ef14()}) {
      TopKRig rig(TypeParam::kBackend, with(false, wire), recursion, {values.size()}, 1.0);
      std::vector<float> grad(rig.numel);
      std::copy(values.begin(), values.end(), grad.begin() + 1);
      rig.stream(grad);
      std::vector<float> expected(values.size());
      for (std::size_t i = 0; i < values.size(); ++i) expected[i] = oracle::sent_value(values[i], wire);
      std::vector<float> got(values.size(), 0.0f);
      const auto entries = rig.entries();
      for (const auto& e : entries[0]) got[e.index] = e.value;
      for (std::size_t i = 0; i < values.size(); ++i) {
        ASSERT_EQ(float_bits(got[i]), float_bits(expected[i] == 0 ? 0.0f : expected[i])) << to_string(wire) << " of " << values[i];
        if (recursion.kind != Recursion::Kind::none) {
          ASSERT_EQ(rig.residual[0][i], values[i] - expected[i]) << to_string(wire) << " of " << values[i];
        }
      }
    }
  }
}

TEST(HalfPrecision, ConversionsAgreeWithTheDefinitionOnEveryPattern) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto h = std::uint16_t(bits);
    for (const DType dtype : {DType::bf16, DType::fp16}) {
      const double want = oracle::half_value(h, dtype);
      const float got = dtype == DType::bf16 ? bf16_to_float(h) : fp16_to_float(h);
      if (std::isnan(want)) {
        EXPECT_TRUE(std::isnan(got));
        EXPECT_EQ(dtype == DType::bf16 ? float_to_bf16(got) : float_to_fp16(got), dtype == DType::bf16 ? 0x7fc0 : 0x7e00);
        continue;
      }
      EXPECT_EQ(double(got), want);
      EXPECT_EQ(std::signbit(got), std::signbit(want));
      EXPECT_EQ(dtype == DType::bf16 ? float_to_bf16(got) : float_to_fp16(got), h);
    }
  }
  std::mt19937 random(1);
  for (int i = 0; i < 200000; ++i) {
    const float x = bits_float(std::uint32_t(random()));
    if (!std::isfinite(x)) continue;
    for (const DType dtype : {DType::bf16, DType::fp16}) {
      ASSERT_EQ(dtype == DType::bf16 ? float_to_bf16(x) : float_to_fp16(x), oracle::nearest_bits(x, dtype, false)) << x;
      ASSERT_EQ(wire_round(x, dtype), oracle::sent_value(x, dtype)) << x;
      ASSERT_EQ(wire_round(x, dtype) != 0, magnitude(x) >= wire_floor(dtype)) << x;
    }
  }
}

}  // namespace
}  // namespace thinwire
