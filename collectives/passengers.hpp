#pragma once
// The rank-order dense sum for what stays dense beside a payload (DESIGN: at most two collectives per bucket). Every function here is a
// local step on host memory; the engine makes the collective calls between them. Sums run over ranks 0, 1, 2, … in fp32 and are multiplied
// once, so the bits do not depend on the way taken.

#include <cstdint>
#include <span>

#include "collectives/bucket_plan.hpp"
#include "compressors/core/span.hpp"

namespace thinwire {

/// out[i] = factor × Σ_r messages[r][i], rounded once to out.dtype. ORs kFlagNonfinite into *flags if a result is not finite. All messages
/// have out's count.
void sum_in_rank_order(std::span<const ConstBytes> messages, float factor, Bytes out, std::uint32_t* flags);
/// out = factor × Σ_r elements [first, first + out.size()) of fp32 message r, in rank order.
void sum_in_rank_order(std::span<const ConstBytes> messages, std::size_t first, float factor, std::span<float> out);

/// Owners, step 1: the send buffer holds, for rank 0, its parts of group 0, then of group 1, then for rank 1, … (BucketPlan::shares); the
/// bytes that pad every rank's share become zero.
void clear_padding(const BucketPlan& bucket, Bytes send);

/// Owners, step 2: `received` holds one share per rank, `stride` bytes from one to the next; writes this rank's finished means, in the
/// bucket's dtype, group 0 then group 1, and returns their bytes.
std::size_t finish_owned(const BucketPlan& bucket, int world, int rank, ConstBytes received, std::size_t stride, const float factors[2],
                         Bytes finished, std::uint32_t* flags);

/// two_phase, dense: what the owner holds back travels as world × residual in its own message, so that the mean holds it once. `message`:
/// this group's, packed, fp32.
void add_server_residuals(const Passengers& group, int world, Bytes message);
/// After a finite verdict: they have been sent.
void clear_server_residuals(const Passengers& group);

/// Owners, step 3: puts what owner `rank` finished into the bucket.
void place_owned(const BucketPlan& bucket, int rank, ConstBytes finished, Bytes grad);

/// Raw: sums all ranks' packed messages (one pointer per rank) straight into the bucket.
void place_raw(const BucketPlan& bucket, std::span<const ConstBytes> messages, const float factors[2], Bytes grad, std::uint32_t* flags);

/// Every element of the bucket becomes NaN: the result of a non-finite verdict.
void fill_nan(Bytes grad);

/// data *= factor in data.dtype; ORs kFlagNonfinite into *flags if a result is not finite.
void scale_in_place(Bytes data, float factor, std::uint32_t* flags);

}  // namespace thinwire
