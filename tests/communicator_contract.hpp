#pragma once
// What every Communicator promises, as a typed suite: Backend::worlds() are the sizes it can run here, Backend::run(world, body) calls
// body(communicator) as every rank and passes on what it threw. Only what leaves the group usable; failures are tested where a transport's
// failures can be made.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "collectives/communicator.hpp"
#include "compressors/core/error.hpp"

namespace thinwire::test {

inline Bytes raw(std::vector<std::uint8_t>& v) { return host_bytes(v.data(), v.size(), DType::u8); }

/// The byte at `i` of what `from` sends to `to`: different for all neighbours, so a swapped or shifted slot shows.
inline std::uint8_t stamp(int from, int to, std::size_t i) {
  return std::uint8_t(31 * from + 7 * to + 13 * int(i % 251) + int(i / 251) + 1);
}

inline std::vector<std::uint8_t> stamped(int from, int to, std::size_t bytes) {
  std::vector<std::uint8_t> v(bytes);
  for (std::size_t i = 0; i < bytes; ++i) v[i] = stamp(from, to, i);
  return v;
}

/// Rounds to `digits` significant binary digits, ties to even, through the FPU's own nearbyint: shares nothing with
/// compressors/core/dtype.hpp.
inline double round_to(double x, int digits, int least_exponent) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent = 0;
  std::frexp(x, &exponent);
  const int unit = std::max(exponent - digits, least_exponent);
  return std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
}

struct Half {  // one 2-byte format by its parameters
  DType dtype;
  int digits, mantissa_bits, least_exponent, bias;
  std::uint16_t encode(double x) const {  // x must be representable
    if (x == 0) return std::signbit(x) ? 0x8000 : 0;
    int exponent = 0;
    const double m = std::frexp(std::abs(x), &exponent);  // in [0.5, 1)
    const std::uint16_t sign = x < 0 ? 0x8000 : 0;
    if (exponent - digits < least_exponent) return std::uint16_t(sign | unsigned(std::ldexp(std::abs(x), -least_exponent)));
    const unsigned fraction = unsigned(std::ldexp(m, digits)) - (1u << mantissa_bits);
    return std::uint16_t(sign | (unsigned(exponent - 1 + bias) << mantissa_bits) | fraction);
  }
};
inline constexpr Half kBf16{DType::bf16, 8, 7, -133, 127};
inline constexpr Half kFp16{DType::fp16, 11, 10, -24, 15};

template <class Fn>
void expect_error(Errc code, const char* says, Fn fn) {
  try {
    fn();
    ADD_FAILURE() << "nothing was thrown; expected " << to_string(code) << " with \"" << says << "\"";
  } catch (const Error& e) {
    EXPECT_EQ(to_string(e.code()), std::string(to_string(code))) << e.what();
    EXPECT_NE(std::string(e.what()).find(says), std::string::npos) << e.what();
  }
}

inline constexpr std::size_t kSizes[] = {0, 1, 2, 3, 8, 255, 256, 257, 4095, 4097, 65537, 200003};

template <class Backend>
class CommunicatorContract : public ::testing::Test {
 protected:
  template <class Body>
  void each(Body body) {
    for (const int world : Backend::worlds()) {
      SCOPED_TRACE("world " + std::to_string(world));
      Backend::run(world, body);
    }
  }
};
TYPED_TEST_SUITE_P(CommunicatorContract);

TYPED_TEST_P(CommunicatorContract, AllGatherKeepsRankOrder) {
  this->each([](Communicator& c) {
    for (const std::size_t n : kSizes) {
      auto mine = stamped(c.rank(), 0, n);
      std::vector<std::uint8_t> all(n * std::size_t(c.size()), 0xee), expected;
      for (int r = 0; r < c.size(); ++r) {
        const auto part = stamped(r, 0, n);
        expected.insert(expected.end(), part.begin(), part.end());
      }
      c.all_gather(raw(mine), raw(all));
      ASSERT_EQ(all, expected) << n << " bytes on rank " << c.rank();
      std::vector<std::uint8_t> place(all.size(), 0xee);
      std::copy(mine.begin(), mine.end(), place.begin() + std::ptrdiff_t(n) * c.rank());
      c.all_gather(raw(place).sub(n * std::size_t(c.rank()), n), raw(place));
      ASSERT_EQ(place, expected) << "in place, " << n << " bytes on rank " << c.rank();
    }
  });
}

TYPED_TEST_P(CommunicatorContract, AllToAllTransposes) {
  this->each([](Communicator& c) {
    for (const std::size_t slot : kSizes) {
      std::vector<std::uint8_t> send, expected;
      for (int r = 0; r < c.size(); ++r) {
        const auto to = stamped(c.rank(), r, slot), from = stamped(r, c.rank(), slot);
        send.insert(send.end(), to.begin(), to.end());
        expected.insert(expected.end(), from.begin(), from.end());
      }
      std::vector<std::uint8_t> recv(expected.size(), 0xee);
      c.all_to_all(raw(send), raw(recv));
      ASSERT_EQ(recv, expected) << slot << " bytes on rank " << c.rank();
    }
  });
}

TYPED_TEST_P(CommunicatorContract, AllToAllOfUnequalAndEmptySlots) {
  this->each([](Communicator& c) {
    for (const std::size_t unit : {std::size_t(0), std::size_t(1), std::size_t(777), std::size_t(50001)}) {
      const auto bytes = [&](int from, int to) { return std::size_t((3 * from + 5 * to + from * to) % 4) * unit; };  // some are zero
      std::vector<std::uint8_t> send, expected;
      std::vector<std::size_t> send_bytes, recv_bytes;
      for (int r = 0; r < c.size(); ++r) {
        const auto to = stamped(c.rank(), r, bytes(c.rank(), r)), from = stamped(r, c.rank(), bytes(r, c.rank()));
        send.insert(send.end(), to.begin(), to.end());
        expected.insert(expected.end(), from.begin(), from.end());
        send_bytes.push_back(to.size());
        recv_bytes.push_back(from.size());
      }
      std::vector<std::uint8_t> recv(expected.size(), 0xee);
      c.all_to_all_v(raw(send), send_bytes, raw(recv), recv_bytes);
      ASSERT_EQ(recv, expected) << "unit " << unit << " on rank " << c.rank();
    }
  });
}

// The host transports add in rank order, so the sum is known to the bit; each rank compares with it, hence with each other.
TYPED_TEST_P(CommunicatorContract, AllReduceAddsFloatsInRankOrder) {
  this->each([](Communicator& c) {
    for (const std::size_t n : kSizes) {
      std::vector<float> mine(n), expected(n);
      for (int r = 0; r < c.size(); ++r) {
        std::mt19937 random(unsigned(100 * r + 7));
        std::normal_distribution<float> normal;
        for (std::size_t i = 0; i < n; ++i) {
          const float x = i % 97 == 5 ? -0.0f : normal(random) * std::ldexp(1.0f, int(i % 40) - 20);
          if (r == c.rank()) mine[i] = x;
          expected[i] = r == 0 ? x : expected[i] + x;
        }
      }
      c.all_reduce(host_bytes(mine.data(), n));
      ASSERT_TRUE(n == 0 || std::memcmp(mine.data(), expected.data(), 4 * n) == 0) << n << " elements on rank " << c.rank();
    }
  });
}

TYPED_TEST_P(CommunicatorContract, AllReduceRoundsHalvesAfterEachAddition) {
  this->each([](Communicator& c) {
    for (const Half& format : {kBf16, kFp16}) {
      for (const std::size_t n : {std::size_t(0), std::size_t(1), std::size_t(9), std::size_t(4099), std::size_t(70001)}) {
        std::vector<std::uint16_t> mine(n), expected(n);
        std::vector<double> sum(n);
        for (int r = 0; r < c.size(); ++r) {
          std::mt19937 random(unsigned(100 * r + 11));
          std::normal_distribution<double> normal;
          for (std::size_t i = 0; i < n; ++i) {
            const double x = round_to(normal(random) * std::ldexp(1.0, int(i % 24) - 18), format.digits, format.least_exponent);
            if (r == c.rank()) mine[i] = format.encode(x);
            sum[i] = r == 0 ? x : round_to(sum[i] + x, format.digits, format.least_exponent);
          }
        }
        for (std::size_t i = 0; i < n; ++i) expected[i] = format.encode(sum[i]);
        c.all_reduce(host_bytes(mine.data(), n, format.dtype));
        ASSERT_EQ(mine, expected) << to_string(format.dtype) << ", " << n << " elements on rank " << c.rank();
      }
    }
  });
}

TYPED_TEST_P(CommunicatorContract, AllReduceOfNonFiniteValuesHasTheSameBitsEverywhere) {
  this->each([](Communicator& c) {
    const std::uint32_t odd[] = {0x7fc00001u, 0xffc12345u, 0x7f800000u, 0xff800000u, 0x7f7fffffu, 0x00000001u, 0x80000000u};
    std::vector<std::uint32_t> mine(1001);
    for (std::size_t i = 0; i < mine.size(); ++i) mine[i] = odd[(i * 3 + std::size_t(c.rank()) * (1 + i % 5)) % 7];
    c.all_reduce(host_bytes(mine.data(), mine.size(), DType::fp32));
    std::vector<std::uint32_t> all(mine.size() * std::size_t(c.size()));
    c.all_gather(host_bytes(mine.data(), mine.size(), DType::fp32), host_bytes(all.data(), all.size(), DType::fp32));
    for (std::size_t i = 0; i < all.size(); ++i) ASSERT_EQ(all[i], mine[i % mine.size()]) << i;
  });
}

TYPED_TEST_P(CommunicatorContract, BroadcastFromEveryRoot) {
  this->each([](Communicator& c) {
    for (int root = 0; root < c.size(); ++root) {
      for (const std::size_t n : kSizes) {
        auto data = stamped(c.rank(), 1, n);
        c.broadcast(raw(data), root);
        ASSERT_EQ(data, stamped(root, 1, n)) << n << " bytes from " << root << " on rank " << c.rank();
      }
    }
  });
}

TYPED_TEST_P(CommunicatorContract, SplitIntoADuplicateKeepsRanksAndTraffic) {
  this->each([](Communicator& c) {
    const auto twin = c.split(0, c.rank());
    ASSERT_EQ(twin->rank(), c.rank());
    ASSERT_EQ(twin->size(), c.size());
    EXPECT_EQ(twin->timeout(), c.timeout());
    EXPECT_STREQ(twin->transport(), c.transport());
    const std::uint64_t before = c.traffic().payload_bytes;
    for (int round = 0; round < 20; ++round) {  // two groups of the same ranks, in turns
      float a = float(c.rank() + round), b = float(c.rank() * round);
      twin->all_reduce(host_bytes(&a, 1));
      c.all_reduce(host_bytes(&b, 1));
      const int n = c.size();
      ASSERT_EQ(a, float(n * (n - 1) / 2 + n * round));
      ASSERT_EQ(b, float(n * (n - 1) / 2 * round));
    }
    EXPECT_EQ(c.traffic().payload_bytes - before, 80u);
    EXPECT_EQ(twin->traffic().payload_bytes, 80u);
  });
}

TYPED_TEST_P(CommunicatorContract, SplitByColourOrdersByKeyThenRank) {
  this->each([](Communicator& c) {
    const auto part = c.split(c.rank() % 2, -c.rank());  // odd and even ranks, backwards
    const int size = (c.size() + 1 - c.rank() % 2) / 2;
    ASSERT_EQ(part->size(), size);
    ASSERT_EQ(part->rank(), size - 1 - c.rank() / 2);
    std::vector<std::uint8_t> mine{std::uint8_t(c.rank())}, all(std::size_t(size), 0xee);
    part->all_gather(raw(mine), raw(all));
    for (int i = 0; i < size; ++i) ASSERT_EQ(all[std::size_t(i)], c.rank() % 2 + 2 * (size - 1 - i));
    const auto same_key = c.split(3, 5);
    ASSERT_EQ(same_key->rank(), c.rank());
    const auto alone = part->split(part->rank(), 0);  // a split of a split, down to one rank
    ASSERT_EQ(alone->size(), 1);
    float x = 4;
    alone->all_reduce(host_bytes(&x, 1));
    EXPECT_EQ(x, 4);
    expect_error(Errc::invalid_argument, "colour", [&] { (void)c.split(-1, 0); });
    c.barrier();
  });
}

TYPED_TEST_P(CommunicatorContract, TrafficIsWhatTheCallsHandOver) {
  this->each([](Communicator& parent) {
    const auto c = parent.split(0, parent.rank());
    const auto n = std::size_t(c->size());
    const double others = double(n - 1), world = double(n);
    std::vector<std::uint8_t> a(24 * n), b(24 * n);
    EXPECT_EQ(c->traffic().calls, 0u);
    c->all_gather(raw(a).sub(0, 24), raw(b));
    EXPECT_EQ(c->traffic().payload_bytes, 24u);
    EXPECT_DOUBLE_EQ(c->traffic().wire_bytes, 24 * others);
    c->all_to_all(raw(a), raw(b));
    EXPECT_EQ(c->traffic().payload_bytes, 24 + 24 * n);
    EXPECT_DOUBLE_EQ(c->traffic().wire_bytes, 48 * others);
    c->all_reduce(host_bytes(a.data(), 3, DType::fp32));
    EXPECT_EQ(c->traffic().payload_bytes, 36 + 24 * n);
    EXPECT_DOUBLE_EQ(c->traffic().wire_bytes, 48 * others + 24 * others / world);
    const auto before = c->traffic();
    c->broadcast(raw(a).sub(0, 5), c->size() - 1);
    const bool root = c->rank() == c->size() - 1;
    EXPECT_EQ(c->traffic().payload_bytes - before.payload_bytes, root ? 5u : 0u);
    EXPECT_NEAR(c->traffic().wire_bytes - before.wire_bytes, root ? 5 * others : 0, 1e-9);  // a difference of doubles below 2^10
    c->barrier();
    EXPECT_EQ(c->traffic().calls, 5u);
    EXPECT_THROW(c->all_gather(raw(a), raw(b).sub(0, 1)), Error);
    EXPECT_EQ(c->traffic().calls, 5u) << "a refused call was counted";
  });
}

TYPED_TEST_P(CommunicatorContract, BadArgumentsAreRefusedAndTheGroupGoesOn) {
  this->each([](Communicator& c) {
    const auto n = std::size_t(c.size());
    std::vector<std::uint8_t> a(8 * n + 8), b(8 * n + 8);
    std::vector<std::size_t> eights(n, 8), wrong(n, 8), huge(n + 1, 8);
    const auto bad = Errc::invalid_argument;
    expect_error(bad, "need", [&] { c.all_gather(raw(a).sub(0, 8), raw(b)); });
    expect_error(bad, "null", [&] { c.all_gather(Bytes{nullptr, 8}, raw(b).sub(0, 8 * n)); });
    expect_error(bad, "overlap", [&] { c.all_gather(raw(a).sub(4, 8), raw(a).sub(0, 8 * n)); });
    expect_error(bad, "recv", [&] { c.all_to_all(raw(a).sub(0, 8 * n), raw(b)); });
    if (n > 1) expect_error(bad, "equal slots", [&] { c.all_to_all(raw(a).sub(0, 8 * n + 1), raw(b).sub(0, 8 * n + 1)); });
    expect_error(bad, "overlap", [&] { c.all_to_all(raw(a).sub(0, 8 * n), raw(a).sub(4, 8 * n)); });
    expect_error(bad, "sizes", [&] { c.all_to_all_v(raw(a).sub(0, 8 * n), huge, raw(b).sub(0, 8 * n), eights); });
    expect_error(bad, "slots", [&] { c.all_to_all_v(raw(a), eights, raw(b).sub(0, 8 * n), eights); });
    wrong[std::size_t(c.rank())] = 16;
    expect_error(bad, "itself", [&] { c.all_to_all_v(raw(a).sub(0, 8 * n), eights, raw(b), wrong); });
    expect_error(bad, "u8", [&] { c.all_reduce(raw(a)); });
    expect_error(bad, "whole number", [&] { c.all_reduce(Bytes{raw(a).data, 7, DType::fp32}); });
    expect_error(bad, "root", [&] { c.broadcast(raw(a), c.size()); });
    expect_error(bad, "root", [&] { c.broadcast(raw(a), -1); });
    expect_error(Errc::unsupported, "cuda", [&] { c.all_reduce(Bytes{raw(a).data, 8, DType::fp32, Place::cuda, 0}); });
    float x = 1;
    c.all_reduce(host_bytes(&x, 1));
    EXPECT_EQ(x, float(n));
  });
}

// Slots of odd sizes put floats at odd addresses; a bucket's view may too.
TYPED_TEST_P(CommunicatorContract, AllReduceTakesAnyAlignment) {
  this->each([](Communicator& c) {
    std::vector<std::uint8_t> bytes(4 * 33 + 1);
    std::vector<float> values(33);
    for (std::size_t i = 0; i < 33; ++i) values[i] = float(i) + float(c.rank());
    std::memcpy(bytes.data() + 1, values.data(), 4 * 33);
    c.all_reduce({raw(bytes).data + 1, 4 * 33, DType::fp32});
    std::memcpy(values.data(), bytes.data() + 1, 4 * 33);
    for (std::size_t i = 0; i < 33; ++i) ASSERT_EQ(values[i], float(c.size()) * float(i) + float(c.size() * (c.size() - 1) / 2));
  });
}

REGISTER_TYPED_TEST_SUITE_P(CommunicatorContract, AllGatherKeepsRankOrder, AllToAllTransposes, AllToAllOfUnequalAndEmptySlots,
                            AllReduceAddsFloatsInRankOrder, AllReduceRoundsHalvesAfterEachAddition,
                            AllReduceOfNonFiniteValuesHasTheSameBitsEverywhere, BroadcastFromEveryRoot,
                            SplitIntoADuplicateKeepsRanksAndTraffic, SplitByColourOrdersByKeyThenRank, TrafficIsWhatTheCallsHandOver,
                            BadArgumentsAreRefusedAndTheGroupGoesOn, AllReduceTakesAnyAlignment);

}  // namespace thinwire::test
