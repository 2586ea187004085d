// The fused pass of the sign codec: against the oracle, against the unfused composition, and the same bits on every ISA.

#include "tests/sign_fixture.hpp"

namespace thinwire {
namespace {

template <class T>
class SignStream : public OnBackend<T> {};
TYPED_TEST_SUITE(SignStream, Backends, BackendName);

struct Pass {
  std::vector<std::size_t> counts;
  std::vector<std::uint32_t> ends = {};
  DType dtype = DType::fp32;
  bool wild = false, masked = false;
  Output output = {};
};

// Messages, scales and bits by the definitions; the payload of encode() of that message; what they leave behind: all the same as stream(),
// to the bit.
template <class T>
void fused_is_unfused(const Recursion& recursion, const SignOptions& options, const Pass& pass, unsigned seed) {
  SignRig fused(T::kBackend, options, recursion, pass.counts, pass.ends), here(T::kBackend, options, no_feedback(), pass.counts, pass.ends),
      reference(Isa::scalar, options, no_feedback(), pass.counts, pass.ends);
  for (SignRig* rig : {&fused, &here, &reference}) {
    rig->output = pass.output;
    if (pass.masked) rig->mask(seed);
  }
  for (std::size_t s = 0; s < pass.counts.size(); ++s) fused.factors[s] = s % 3 == 2 ? 0.3f : 1.0f;
  fused.age(seed, pass.wild && has_estimate(recursion));
  for (unsigned step = 0; step < 2; ++step) {
    fused.step = here.step = reference.step = step;
    const auto grad = oracle::to_bytes(gradients(fused.numel, 17 * step + seed, pass.wild), pass.dtype);
    const auto name = [&] {
      return describe(recursion) + describe(options) + " grad " + to_string(pass.dtype) + " step " + std::to_string(step);
    };
    const auto momentum = fused.momentum, mean_estimate = fused.mean_estimate;
    const auto expected = fused.expect(grad, pass.dtype);
    fused.stream(grad, pass.dtype);
    ASSERT_EQ(fused.flags, expected.flags) << name();
    const auto signs = fused.signs();
    for (std::size_t s = 0; s < pass.counts.size(); ++s) {
      const auto where = [&] { return name() + " n " + std::to_string(pass.counts[s]); };
      expect_same_bits(signs[s].scales, expected.signs[s].scales, where);
      ASSERT_EQ(signs[s].bits, expected.signs[s].bits) << where();
      expect_same_bits(fused.residual[s], expected.residual[s], where);
      expect_same_bits(fused.estimate[s], expected.estimate[s], where);
      expect_same_bits(fused.average[s], expected.average[s], where);
      expect_same_bits(fused.mean_estimate[s], mean_estimate[s], where);
      expect_same_bits(fused.momentum[s], momentum[s], where);
      if (testing::Test::HasFatalFailure()) return;
    }

    std::vector<float> message(fused.numel, NAN);
    for (std::size_t s = 0; s < pass.counts.size(); ++s)
      std::copy(expected.message[s].begin(), expected.message[s].end(), message.begin() + std::ptrdiff_t(fused.segments[s].first));
    for (SignRig* unfused : {&here, &reference}) {
      unfused->prepare();
      unfused->codec->encode(0, unfused->plan(), host_bytes(std::as_const(message).data(), message.size()), {}, {},
                             SignRig::bytes(unfused->workspace), SignRig::bytes(unfused->payload), Stream::host());
      for (std::size_t r = 0; r < fused.parts(); ++r)  // the message has forgotten which of its elements met a bad gradient
        std::memcpy(&unfused->payload[r * unfused->payload.size() / fused.parts() + 8], &expected.flags, 4);
      ASSERT_EQ(fused.payload, unfused->payload) << name() << (unfused == &here ? " here" : " on the reference");
    }
  }
}

TYPED_TEST(SignStream, FusedIsUnfused) {
  const Pass pass = {{0, 1, 7, 8, 9, 63, 64, 65, 127, 129, 511, 513, 1023, 1024, 1025, 4095, 4097, 8191, 8193, 9001}};
  unsigned seed = 0;
  for (const auto& recursion : sign_recursions()) {
    for (const Scale scale : kScales) {
      for (const std::size_t block : kBlocks) {
        fused_is_unfused<TypeParam>(recursion, with(scale, block), pass, ++seed);
        if (this->HasFatalFailure()) return;
      }
    }
  }
}

TYPED_TEST(SignStream, FusedIsUnfusedOnHalfGradientsMasksPartsAndNonfiniteOnes) {
  unsigned seed = 1000;
  for (const auto& recursion : sign_recursions()) {
    for (const std::size_t block : kBlocks) {
      for (const DType dtype : kTypes) {
        const Scale scale = kScales[++seed % 2];
        Pass pass{{33, 1000, 0, 9001, 260, 700}, {0, 2, 5, 6, 6}, dtype, true, true};
        if (seed % 3 == 0) pass.output = {DType::bf16, 0.25f};
        if (seed % 3 == 1) pass.output = {DType::fp16, 1.0f / 3};
        fused_is_unfused<TypeParam>(recursion, with(scale, block), pass, seed);
        if (this->HasFatalFailure()) return;
      }
    }
  }
}

// More blocks of 4096 than there are partials in double.
TYPED_TEST(SignStream, TensorsOfManyBlocks) {
  for (const Scale scale : kScales) {
    for (const std::size_t block : {std::size_t(0), std::size_t(65536), std::size_t(1024)}) {
      for (const auto& recursion : {averaged(ef14()), econtrol(0.25f)}) {
        const bool masked = !has_estimate(recursion);
        fused_is_unfused<TypeParam>(recursion, with(scale, block), {{70 * 4096 + 77, 65536}, {}, DType::fp32, true, masked}, 5);
        if (this->HasFatalFailure()) return;
      }
    }
  }
}

// A mean of 1 + 2^-24 + 2^-52 lies just above the middle of two floats. The last term is two sums of 2^-34, of blocks 1 and 65: together
// they are half of the least that a sum of 2^19 holds, apart they vanish.
TYPED_TEST(SignStream, TheOrderOfBlockSumsIsVisible) {
  SignRig rig(TypeParam::kBackend, with(Scale::l1, 0), no_feedback(), {128 * 4096});
  std::vector<float> grad(rig.numel, 0.0f);
  std::fill_n(grad.begin() + 1, 4096, 128.0f);
  grad[1 + 1 * 4096 + 5] = grad[1 + 65 * 4096 + 3000] = 0x1p-34f;
  grad[1 + 2 * 4096] = 0x1p-5f;
  rig.stream(grad);
  EXPECT_EQ(rig.signs()[0].scales[0], 1 + 0x1p-23f);
}

// Invariant 17: what is decoded is ±scale by the one predicate, for every length and every kind of element.
TYPED_TEST(SignStream, BitsRoundTripAtEveryLength) {
  const float kinds[] = {1.5f, -0.0f, 0.0f, NAN, -1e-42f, 1e-42f, -2.0f, INFINITY, -INFINITY, -1.1754944e-38f, 0.25f};
  for (std::size_t n = 1; n <= 2050; n = n < 140 || n > 2040 ? n + 1 : n + 61) {
    SignRig rig(TypeParam::kBackend, with(Scale::l1, 0), no_feedback(), {n});
    std::vector<float> grad(rig.numel);
    for (std::size_t i = 0; i < n; ++i) grad[1 + i] = kinds[(i * 7 + n) % 11];
    rig.stream(grad);
    const auto signs = rig.signs();
    const float scale = signs[0].scales[0];
    const auto out = rig.decode({rig.payload});
    for (std::size_t i = 0; i < n; ++i) {
      const float x = grad[1 + i];
      const bool bit = !std::isfinite(x) || !(x < 0);  // a non-finite gradient is no news: 0
      ASSERT_EQ(signs[0].bits[i], bit) << "n " << n << " element " << i << " " << x;
      ASSERT_EQ(out[1 + i], bit ? scale : -scale) << "n " << n << " element " << i << " " << x;
    }
    ASSERT_EQ(out.front(), kGap);
    ASSERT_EQ(out.back(), kGap);
  }
}

// Scales that the output holds as they are: decoding into it rounds nothing. A loss scale that is no power of two costs the products by
// 1/f and f one fp32 rounding each, 2^-24 of the value, far below half a step of 16 bits: the same value comes out.
TYPED_TEST(SignStream, ScalesFitTheOutput) {
  for (const DType dtype : {DType::bf16, DType::fp16}) {
    for (const float factor : {1.0f, 0.125f, 1024.0f, 1.0f / 3, 7.7f}) {
      for (const auto& recursion : {no_feedback(), ef14()}) {
        SignRig rig(TypeParam::kBackend, with(Scale::l1, 64), recursion, {1000, 77});
        rig.output = {dtype, factor};
        auto grad = gradients(rig.numel, 8, false);
        for (std::size_t i = 0; i < grad.size(); ++i) grad[i] = std::fmax(std::fabs(grad[i]), 0.1f) * (i % 2 != 0 ? 1.0f : -1.0f);
        rig.stream(grad);
        const auto signs = rig.signs();
        const auto half = rig.decode_as(dtype, {rig.payload}, factor, std::vector<std::byte>(2 * rig.numel));
        const auto exact = rig.decode({rig.payload}, factor);
        std::size_t rounded = 0;
        for (std::size_t s = 0; s < 2; ++s) {
          for (std::size_t i = 0; i < rig.segments[s].count; ++i) {
            const std::size_t at = rig.segments[s].first + i;
            const double out = oracle::element(half, at, dtype);
            ASSERT_NEAR(exact[at], out, std::fabs(out) * 0x1p-23) << to_string(dtype) << " factor " << factor;
            if (factor == 1.0f) { ASSERT_EQ(signs[s].value(i, 64), out); }
            if (factor != 1.0f / 3 && factor != 7.7f) { ASSERT_EQ(exact[at], out); }
            if (recursion.kind == Recursion::Kind::error_feedback) {  // the error is of what was sent
              ASSERT_EQ(rig.residual[s][i], grad[at] - signs[s].value(i, 64));
            }
          }
          for (std::size_t b = 0; b < signs[s].scales.size(); ++b) {
            double sum = 0;
            const std::size_t from = 64 * b, count = std::min<std::size_t>(64, rig.segments[s].count - from);
            for (std::size_t i = from; i < from + count; ++i) sum += std::fabs(grad[rig.segments[s].first + i]);
            rounded += std::fabs(signs[s].scales[b] - sum / double(count)) > 0x1p-16 * sum / double(count);
          }
        }
        EXPECT_GT(rounded, 5u) << "scales were short already";
      }
    }
  }
}

// What 16 bits cannot hold is cut, and what is cut stays.
TYPED_TEST(SignStream, ScalesBeyondTheOutputAreCut) {
  SignRig rig(TypeParam::kBackend, with(Scale::l1, 8), ef14(), {8});
  rig.output = {DType::fp16, 1.0f};
  rig.stream(std::vector<float>(rig.numel, 100000.0f));
  EXPECT_EQ(rig.signs()[0].scales, std::vector<float>{65504.0f});
  EXPECT_EQ(rig.residual[0], std::vector<float>(8, 100000.0f - 65504.0f));
  const auto half = rig.decode_as(DType::fp16, {rig.payload}, 1, std::vector<std::byte>(2 * rig.numel));
  EXPECT_EQ(rig.flags, 0u);
  EXPECT_EQ(oracle::element(half, 1, DType::fp16), 65504.0f);
}

TYPED_TEST(SignStream, NonfiniteGradientsRaiseTheFlagAndEnterNoState) {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    for (const auto& recursion : sign_recursions()) {
      for (const std::size_t n : {100, 6000}) {
        SignRig clean(TypeParam::kBackend, with(Scale::l2, 0), recursion, {n}),
            poisoned(TypeParam::kBackend, with(Scale::l2, 0), recursion, {n});
        clean.age(2), poisoned.age(2);
        auto grad = gradients(clean.numel, 1, false);
        grad[51] = has_estimate(recursion) ? clean.estimate[0][50] : 0;  // no news
        clean.stream(grad);
        grad[51] = bad;
        poisoned.stream(grad);
        EXPECT_EQ(clean.flags, 0u);
        EXPECT_EQ(poisoned.flags, unsigned(kFlagNonfinite));
        EXPECT_EQ(poisoned.signs(), clean.signs());
        for (std::size_t a = 0; a < clean.arrays().size(); ++a) EXPECT_EQ(*poisoned.arrays()[a], *clean.arrays()[a]) << describe(recursion);
        std::uint32_t header;
        std::memcpy(&header, &poisoned.payload[8], 4);
        EXPECT_EQ(header, unsigned(kFlagNonfinite));
      }
    }
  }
}

// A message beyond the largest float does not exist: the news is dropped, and what was held is sent on.
TYPED_TEST(SignStream, AnOverflowingAccumulatorDropsItsNews) {
  for (const auto& recursion : {ef14(), ef14(0.75f), averaged(ef14()), averaged(ef14(0.75f))}) {
    SignRig rig(TypeParam::kBackend, with(Scale::l1, 64), recursion, {64});
    rig.beta1[0] = 0.125f;
    rig.residual[0][20] = 3e38f;
    rig.momentum[0][20] = 1e37f;
    std::vector<float> grad(rig.numel, 0.0f);
    grad[1 + 20] = 3e38f;
    rig.stream(grad);
    const float held = recursion.decay * 3e38f, message = recursion.averaged ? held + 0.125f * 1e37f : held;
    EXPECT_EQ(rig.flags, unsigned(kFlagNonfinite));
    EXPECT_EQ(rig.signs()[0].scales[0], message / 64);
    EXPECT_EQ(rig.residual[0][20], message - message / 64);
  }
}

// Sums past the largest float are taken in double; the mean is a float again.
TYPED_TEST(SignStream, SumsBeyondFp32StayFinite) {
  for (const Scale scale : kScales) {
    for (const std::size_t block : {std::size_t(1024), std::size_t(0)}) {
      for (const auto& recursion : sign_recursions()) {
        SignRig rig(TypeParam::kBackend, with(scale, block), recursion, {1024, 10000});
        rig.beta1 = {0.5f, 0.5f};
        for (auto* array : {&rig.momentum, &rig.average})
          for (auto& values : *array) std::fill(values.begin(), values.end(), 2e38f);
        const std::vector<float> grad(rig.numel, 2e38f);
        const auto expected = rig.expect(oracle::to_bytes(grad, DType::fp32), DType::fp32);
        rig.stream(grad);
        EXPECT_EQ(rig.flags, 0u);
        EXPECT_EQ(rig.signs(), expected.signs);
        for (const auto& segment : rig.signs())
          for (const float s : segment.scales) EXPECT_NEAR(s, 2e38f, 2e38f * 0x1p-22f) << describe(rig.options);  // an average rounds
      }
    }
  }
}

TYPED_TEST(SignStream, DeadElementsHaveNoState) {
  for (const auto& recursion : sign_recursions()) {
    for (const std::size_t block : {std::size_t(24), std::size_t(1024), std::size_t(0)}) {
      SignRig rig(TypeParam::kBackend, with(Scale::l1, block), recursion, {70, 1000, 3, 6000, 500});
      rig.mask(9);
      rig.age(1);
      std::vector<std::vector<std::vector<float>>> before;
      for (const auto* array : rig.arrays()) before.push_back(*array);
      auto grad = gradients(rig.numel, 3, true);
      for (std::size_t s = 0; s < 5; ++s) {
        for (std::size_t i = 0; i < rig.segments[s].count; ++i) {
          if (!rig.alive(s, i)) grad[rig.segments[s].first + i] = i % 2 != 0 ? NAN : 3e38f;  // of no interest to anything
        }
      }
      rig.stream(grad);
      const auto out = rig.decode({rig.payload, rig.payload});
      std::size_t dead = 0;
      for (std::size_t s = 0; s < 5; ++s) {
        for (std::size_t i = 0; i < rig.segments[s].count; ++i) {
          if (rig.alive(s, i)) continue;
          ++dead;
          for (std::size_t a = 0; a < before.size(); ++a)
            ASSERT_EQ(float_bits((*rig.arrays()[a])[s][i]), float_bits(before[a][s][i])) << describe(recursion);
          ASSERT_EQ(float_bits(out[rig.segments[s].first + i]), 0u);
        }
      }
      EXPECT_GT(dead, 1500u);
      const auto signs = rig.signs();
      EXPECT_EQ(signs[4].scales, std::vector<float>(signs[4].scales.size(), 0.0f)) << "nothing of it is alive";
      for (const float scale : signs[0].scales) EXPECT_LT(scale, 1e37f);
    }
  }
}

// A mask that covers a parameter, and a part of the parameter from element 8k on: the part's mask starts at byte k.
TYPED_TEST(SignStream, PartsTakeTheirMasksFromTheirFirstByte) {
  const std::size_t n = 1000, from = 504;
  SignRig whole(TypeParam::kBackend, with(Scale::l1, 8), ef14(), {n}), part(TypeParam::kBackend, with(Scale::l1, 8), ef14(), {n - from});
  whole.mask(3);
  part.masks = whole.masks;
  part.segments[0].live = whole.masks[0].data() + from / 8;
  const auto grad = gradients(whole.numel, 4, false);
  std::vector<float> rest(grad.begin() + from, grad.end());
  whole.stream(grad);
  part.stream(rest);
  const auto a = whole.signs()[0], b = part.signs()[0];
  EXPECT_EQ(std::vector<float>(a.scales.begin() + from / 8, a.scales.end()), b.scales);
  EXPECT_EQ(std::vector<bool>(a.bits.begin() + from, a.bits.end()), b.bits);
  EXPECT_EQ(std::vector<float>(whole.residual[0].begin() + from, whole.residual[0].end()), part.residual[0]);
}

// Invariant 18: how long the longest part makes every payload touches no scale, no bit and no residual.
TYPED_TEST(SignStream, PaddingIsZeroAndTouchesNothing) {
  const std::vector<std::size_t> counts = {1000, 5, 0, 3000, 64};
  for (const std::size_t block : {std::size_t(24), std::size_t(1024), std::size_t(0)}) {
    std::vector<oracle::Signs> reference;
    std::vector<std::vector<float>> residual;
    for (const std::vector<std::uint32_t>& ends :
         {std::vector<std::uint32_t>{5}, {1, 2, 3, 4, 5}, {0, 0, 4, 5}, {2, 5, 5, 5, 5, 5}, {0, 5}}) {
      SignRig rig(TypeParam::kBackend, with(Scale::l2, block), averaged(ef14()), counts, ends);
      rig.age(6);
      rig.stream(oracle::to_bytes(gradients(rig.numel, 5, false), DType::fp32), DType::fp32, kFlagJoined);
      std::size_t bytes = 0;
      for (std::size_t r = 0; r < ends.size(); ++r) bytes = std::max(bytes, oracle::sign_bytes(rig.part(r), rig.options));
      EXPECT_EQ(rig.codec->layout(rig.plan()).part_capacity, bytes);
      const auto signs = rig.signs();  // throws where padding is not zero
      for (std::size_t r = 0; r < ends.size(); ++r) EXPECT_EQ(rig.payload[r * bytes + 8], std::byte(kFlagJoined)) << "part " << r;
      if (reference.empty()) reference = signs, residual = rig.residual;
      EXPECT_EQ(signs, reference);
      EXPECT_EQ(rig.residual, residual);
    }
  }
}

TYPED_TEST(SignStream, FlagsGoIntoTheHeaderAndBack) {
  SignRig rig(TypeParam::kBackend, {}, ef14(), {});
  rig.stream(oracle::to_bytes({}, DType::fp32), DType::fp32, kFlagJoined);
  EXPECT_EQ(rig.flags, unsigned(kFlagJoined));
  EXPECT_EQ(rig.payload.size(), 64u);
  EXPECT_EQ(rig.payload[8], std::byte(kFlagJoined));
}

// residual + sent = rho·e + (1 − beta1)·g, which averaged forms reach by taking beta1·m off again; exact on integers, as blocks are of 2^k.
TYPED_TEST(SignStream, TakeBackReturnsWhatWasSent) {
  for (const auto& recursion : {ef14(), ef14(0.5f), averaged(ef14()), averaged(ef14(0.5f))}) {
    for (const std::size_t block : {std::size_t(8), std::size_t(1024), std::size_t(8192)}) {
      for (const bool masked : {false, true}) {
        SignRig rig(TypeParam::kBackend, with(Scale::l1, block), recursion, {8192, 16384, 8192}, {1, 1, 3});
        if (masked) {
          rig.mask(2);
          for (auto& mask : rig.masks)  // a quarter alive of each byte: a power of two again
            for (auto& byte : mask) byte = 0x42;
        }
        std::mt19937 random(4);
        std::vector<float> grad(rig.numel);
        for (auto& x : grad) x = float(int(random() % 15) - 7);
        for (std::size_t s = 0; s < 3; ++s) {
          rig.beta1[s] = 0.5f;
          for (auto& m : rig.momentum[s]) m = float(int(random() % 7) - 3);
          for (auto& e : rig.residual[s]) e = float(int(random() % 7) - 3);
        }
        const auto before = rig.residual;
        rig.stream(grad);
        const auto after = rig.residual;
        const std::uint32_t good = kFlagJoined, bad = kFlagNonfinite;
        rig.take_back(&good);
        EXPECT_EQ(rig.residual, after);
        rig.take_back(masked ? nullptr : &bad);
        for (std::size_t s = 0; s < 3; ++s) {
          for (std::size_t i = 0; i < before[s].size(); ++i) {
            const float g = grad[rig.segments[s].first + i], held = recursion.decay * before[s][i];
            const float expected = rig.alive(s, i) ? held + (recursion.averaged ? 0.5f * g : g) : before[s][i];
            ASSERT_EQ(rig.residual[s][i], expected) << describe(recursion) << describe(rig.options) << " element " << i;
          }
        }
      }
    }
  }
  for (const auto& recursion : {no_feedback(), averaged(no_feedback())}) {
    SignRig none(TypeParam::kBackend, {}, recursion, {100});
    none.age(3);
    const auto momentum = none.momentum;
    none.stream(gradients(none.numel, 1, false));
    none.take_back();  // nothing to return to
    EXPECT_EQ(none.momentum, momentum);
  }
}

}  // namespace
}  // namespace thinwire
