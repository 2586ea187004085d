// What stays dense beside a payload: who owns what, and the rank-order sum, the same bits whether it travels raw or through owners.

#include "collectives/passengers.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <vector>

#include "collectives/ownership.hpp"
#include "tests/reducer_oracle.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

TEST(OwnedPart, CoversEveryElementOnceInRankOrder) {
  for (int world = 1; world <= 17; ++world)
    for (const std::size_t n : {0, 1, 7, 8, 9, 15, 16, 17, 55, 56, 57, 63, 64, 65, 1000, 4096, 99991}) {
      std::size_t next = 0;
      for (int r = 0; r < world; ++r) {
        const Range part = owned_part(n, world, r);
        ASSERT_EQ(part.first, next) << n << " " << world << " " << r;
        ASSERT_LE(part.first + part.count, n);
        next += part.count;
      }
      EXPECT_EQ(next, n);
    }
}

TEST(OwnedPart, IsInEightsAndOnlyTheLastOnesAreShort) {
  for (int world = 1; world <= 9; ++world)
    for (std::size_t n = 0; n < 400; ++n) {
      const std::size_t full = 8 * ((n + 8 * std::size_t(world) - 1) / (8 * std::size_t(world)));
      bool short_seen = false;
      for (int r = 0; r < world; ++r) {
        const Range part = owned_part(n, world, r);
        if (short_seen) EXPECT_EQ(part.count, 0u);
        if (part.count != full) short_seen = true;
        if (part.count != 0) EXPECT_EQ(part.first % 8, 0u);
        EXPECT_LE(part.count, full);
      }
    }
  EXPECT_EQ(owned_part(8, 4, 0).count, 8u);
  EXPECT_EQ(owned_part(8, 4, 3).count, 0u);
  EXPECT_EQ(owned_part(100, 3, 2).first, 80u);
  EXPECT_EQ(owned_part(100, 3, 2).count, 20u);
}

Vec type_numbers(int rank, std::size_t n, DType dtype) {
  Vec x(n);
  for (std::size_t i = 0; i < n; ++i) x[i] = as_type(real_number(11, 0, rank, 0, i), dtype);
  return x;
}

TEST(SumInRankOrder, IsTheSumInRankOrderTimesTheFactor) {
  for (const DType from : {DType::fp32, DType::bf16, DType::fp16})
    for (const DType to : {DType::fp32, DType::bf16, DType::fp16})
      for (const std::size_t n : {0, 1, 17, 2047, 2048, 2049, 5000})
        for (const int world : {1, 2, 3, 7}) {
          std::vector<GradBuffer> messages;
          std::vector<ConstBytes> views;
          std::vector<Vec> values;
          messages.reserve(std::size_t(world));
          for (int r = 0; r < world; ++r) {
            values.push_back(type_numbers(r, n, from));
            GradBuffer& m = messages.emplace_back(from, n);
            for (std::size_t i = 0; i < n; ++i) m.set(i, values.back()[i]);
            views.push_back(m.view());
          }
          GradBuffer out(to, n);
          std::uint32_t flags = 0;
          const float factor = 1.0f / float(world);
          sum_in_rank_order(views, factor, out.view(), &flags);
          EXPECT_EQ(flags, 0u);
          for (std::size_t i = 0; i < n; ++i) {
            float sum = 0;
            for (const Vec& x : values) sum += x[i];
            ASSERT_EQ(out.get(i), as_type(sum * factor, to)) << i;
          }
        }
}

TEST(SumInRankOrder, FlagsWhatIsNotFiniteWhereverItComesFrom) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const auto flags_of = [](float a, float b, float factor, DType to) {
    const ConstBytes views[] = {host_bytes(&a, 1), host_bytes(&b, 1)};
    GradBuffer out(to, 1);
    std::uint32_t flags = 0;
    sum_in_rank_order(views, factor, out.view(), &flags);
    return flags;
  };
  const std::uint32_t bad = kFlagNonfinite;
  EXPECT_EQ(flags_of(1, nan, 0.5f, DType::fp32), bad);
  EXPECT_EQ(flags_of(-inf, 1, 0.5f, DType::bf16), bad);
  EXPECT_EQ(flags_of(3e38f, 3e38f, 0.5f, DType::fp32), bad);  // the sum overflows
  EXPECT_EQ(flags_of(60000, 60000, 0.5f, DType::fp16), 0u);   // the sum is beyond fp16, the mean is not
  EXPECT_EQ(flags_of(60000, 60000, 1.0f, DType::fp16), bad);
  EXPECT_EQ(flags_of(65519, 65519, 0.5f, DType::fp16), 0u);   // rounds to 65504
  EXPECT_EQ(flags_of(65520, 65520, 0.5f, DType::fp16), bad);  // rounds to infinity
  EXPECT_EQ(flags_of(3.4e38f, 0, 1.0f, DType::bf16), bad);    // rounds beyond bf16's largest
  EXPECT_EQ(flags_of(0, -0.0f, 1.0f, DType::fp32), 0u);
}

TEST(Passengers, FillNanAndScaleServeAllTypes) {
  for (const DType dtype : {DType::fp32, DType::bf16, DType::fp16}) {
    GradBuffer data(dtype, 7);
    for (std::size_t i = 0; i < 7; ++i) data.set(i, float(i));
    std::uint32_t flags = 0;
    scale_in_place(data.view(), 0.5f, &flags);
    EXPECT_EQ(flags, 0u);
    for (std::size_t i = 0; i < 7; ++i) EXPECT_EQ(data.get(i), float(i) / 2);
    fill_nan(data.view());
    for (std::size_t i = 0; i < 7; ++i) EXPECT_NE(data.get(i), data.get(i));
    scale_in_place(data.view(), 1.0f, &flags);
    EXPECT_EQ(flags, std::uint32_t(kFlagNonfinite));
    fill_nan({});
  }
}

/// A bucket of dense tensors only, some with state, in any dtype; `plan` and `states` as the reducer would make them.
struct Bucket {
  std::vector<ParameterSlot> slots;
  std::vector<float> state;
  std::vector<std::uint32_t> ids;
  std::size_t count = 0;

  explicit Bucket(const std::vector<std::pair<std::size_t, bool>>& tensors) : state(1) {
    for (const auto& [numel, stateful] : tensors) {
      ParameterSlot slot;
      slot.numel = numel;
      if (stateful) slot.state.array[0] = state.data();  // never touched here: only that it is there counts
      slots.push_back(slot);
      ids.push_back(std::uint32_t(ids.size()));
      count += numel;
    }
  }
};

struct NoCodec final : Codec {
  Combine combine() const noexcept override { return Combine::gather; }
  std::size_t memory(const Segment&) const noexcept override { return 0; }
  const char* memory_name() const noexcept override { return ""; }
  double nominal_delta(const Segment&) const noexcept override { return 1; }
  std::size_t target(const Segment&) const noexcept override { return 0; }
  WireLayout layout(const Plan&) const override { return {64, 0}; }
  void stream(const Recursion&, const Plan&, ConstBytes, const StateView&, Bytes, Bytes, std::uint32_t*, const PassCounts&,
              Stream) const override {}
  void empty(const Plan&, Bytes, std::uint32_t, Stream) const override {}
  void encode(int, const Plan&, ConstBytes, ConstBytes, const StateView&, Bytes, Bytes, Stream) const override {}
  void decode(const Plan&, std::span<const ConstBytes>, float, Bytes, Bytes, std::uint32_t*, Stream) const override {}
  void take_back(const Recursion&, const Plan&, ConstBytes, const StateView&, const std::uint32_t*, Stream) const override {}
};

// Both ways of the same messages, simulated rank by rank without a transport.
TEST(Passengers, OwnersAndRawGiveTheSameBits) {
  const std::vector<std::pair<std::size_t, bool>> stateless = {{20000, false}, {3, false}, {0, false}, {30001, false}};
  const std::vector<std::pair<std::size_t, bool>> mixed = {{20000, true}, {5, false}, {30001, false}, {77, true}, {1, true}};
  for (const auto& tensors : {stateless, mixed})
    for (const DType dtype : {DType::fp32, DType::bf16, DType::fp16})
      for (const int world : {2, 3, 4, 7}) {
        Bucket b(tensors);
        const NoCodec codec;
        // Under EF14 a tensor with a residual is stateful, one without is not: both groups in one bucket.
        const Recursion recursion{.kind = Recursion::Kind::error_feedback};
        std::vector<BucketPlan> plans;
        for (int r = 0; r < world; ++r) plans.push_back(make_bucket_plan(b.ids, dtype, false, b.slots, &codec, recursion, world, r));
        ASSERT_TRUE(plans[0].owners);
        const std::size_t raw_bytes = plans[0].passengers[0].bytes() + plans[0].passengers[1].bytes();
        std::vector<std::vector<std::byte>> messages;
        for (int r = 0; r < world; ++r) {
          auto& m = messages.emplace_back(raw_bytes);
          std::size_t at = 0, i = 0;
          for (const Passengers& group : plans[0].passengers)
            for (std::size_t j = 0; j < group.count; ++j, at += size_of(group.dtype), ++i) {
              GradBuffer one(group.dtype, 1);
              one.set(0, as_type(real_number(23, 0, r, 0, i), group.dtype));
              std::memcpy(m.data() + at, one.view().data, size_of(group.dtype));
            }
        }
        const float factors[2] = {1.0f / float(world) * 8, 1.0f / float(world)};
        const auto bytes = [](std::vector<std::byte>& v) { return host_bytes(v.data(), v.size(), DType::u8); };

        GradBuffer raw(dtype, b.count);
        std::vector<ConstBytes> views;
        for (auto& m : messages) views.push_back(bytes(m));
        std::uint32_t flags = 0;
        place_raw(plans[0], views, factors, raw.view(), &flags);

        // Every rank's send buffer: element by element from the raw messages, as BucketPlan::shares says.
        std::vector<std::vector<std::byte>> sent;
        for (int r = 0; r < world; ++r) {
          const BucketPlan& plan = plans[std::size_t(r)];
          auto& send = sent.emplace_back(plan.sent_bytes(), std::byte{0xee});
          std::size_t end = 0;
          for (int owner = 0; owner < world; end += plan.send_bytes[std::size_t(owner++)]) {
            std::size_t out = end, group_start = 0;
            for (const Passengers& group : plan.passengers) {
              std::size_t packed = 0;
              for (const Segment& segment : group.segments) {
                const Range part = owned_part(segment.count, world, owner);
                const std::size_t size = size_of(group.dtype);
                for (std::size_t i = 0; i < part.count * size; ++i)
                  send[out++] = messages[std::size_t(r)][group_start + (packed + part.first) * size + i];
                packed += segment.count;
              }
              group_start += group.bytes();
            }
          }
          clear_padding(plan, bytes(send));
        }
        GradBuffer owned(dtype, b.count);
        for (std::size_t i = 0; i < b.count; ++i) owned.set(i, 77.0f);
        for (int owner = 0; owner < world; ++owner) {
          const BucketPlan& plan = plans[std::size_t(owner)];
          std::vector<std::byte> received, finished(plan.contribution - plan.layout.part_capacity);
          for (int from = 0; from < world; ++from) {
            std::size_t first = 0;
            for (int r = 0; r < owner; ++r) first += plans[std::size_t(from)].send_bytes[std::size_t(r)];
            const auto begin = sent[std::size_t(from)].begin() + std::ptrdiff_t(first);
            ASSERT_EQ(plans[std::size_t(from)].send_bytes[std::size_t(owner)], plan.recv_bytes[std::size_t(from)]);
            received.insert(received.end(), begin, begin + std::ptrdiff_t(plan.recv_bytes[std::size_t(from)]));
          }
          const std::size_t used =
              finish_owned(plan, world, owner, bytes(received), plan.recv_bytes.front(), factors, bytes(finished), &flags);
          ASSERT_LE(used, finished.size());
          place_owned(plans[0], owner, bytes(finished), owned.view());
        }
        EXPECT_EQ(flags, 0u);
        for (std::size_t i = 0; i < b.count; ++i) ASSERT_EQ(float_bits(raw.get(i)), float_bits(owned.get(i))) << i << " world " << world;
      }
}

TEST(BucketPlan, SwitchesToOwnersAbove64KiB) {
  const NoCodec codec;
  for (const DType dtype : {DType::fp32, DType::bf16, DType::fp16}) {
    const std::size_t limit = 65536 / size_of(dtype);
    for (const std::size_t n : {limit - 1, limit, limit + 1}) {
      const Bucket b({{n, false}});
      for (const int world : {1, 2}) {
        const BucketPlan plan = make_bucket_plan(b.ids, dtype, false, b.slots, &codec, {}, world, 0);
        EXPECT_EQ(plan.owners, world > 1 && n > limit) << to_string(dtype) << " " << n;
        EXPECT_EQ(plan.contribution % 64, 0u);
      }
    }
  }
  // With state messages are fp32, whatever the gradient is.
  const Bucket b({{16384, true}}), more({{16385, true}});
  const Recursion dgc{.kind = Recursion::Kind::momentum_correction};
  EXPECT_FALSE(make_bucket_plan(b.ids, DType::bf16, false, b.slots, &codec, dgc, 2, 0).owners);
  EXPECT_TRUE(make_bucket_plan(more.ids, DType::bf16, false, more.slots, &codec, dgc, 2, 0).owners);
}

}  // namespace
}  // namespace thinwire::test
