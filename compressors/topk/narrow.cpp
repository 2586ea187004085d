// Passes over narrow state: pieces of it as floats, in L1, for the kernels of any ISA.

#include <algorithm>
#include <cstring>

#include "compressors/topk/topk_codec.hpp"

namespace thinwire::topk {
namespace {

static_assert(kStatePiece % 64 == 0 && kBlock % kStatePiece == 0, "pieces begin with words of the bitmap");

/// `count` elements of a block from `from` on; the arrays that are narrow are the piece's, the others the block's.
Block piece_of(const SegmentPass& pass, const Block& block, std::size_t from, std::size_t count, StatePiece& residual,
               StatePiece& estimate) noexcept {
  Block piece = block;
  piece.grad = static_cast<const std::byte*>(block.grad) + from * size_of(pass.grad_dtype);
  piece.residual = residual.data();
  piece.estimate = estimate.data();
  if (piece.average != nullptr) piece.average += from;
  if (piece.live != nullptr) piece.live += from / 8;
  if (piece.bitmap != nullptr) piece.bitmap += from / 32;
  piece.count = std::uint32_t(count);
  return piece;
}

/// Calls visit(piece, its first element within the block). `stores`: what it does to a narrow residual counts; estimates change only where
/// something is sent, and the caller stores those.
template <class Visit>
void for_pieces(const SegmentPass& pass, std::size_t first, const Block& block, bool stores, Visit&& visit) {
  for (std::size_t i = 0; i < block.count; i += kStatePiece) {
    const std::size_t count = std::min<std::size_t>(kStatePiece, block.count - i);
    StatePiece residual(pass.residual.from(first + i), count), estimate(pass.estimate.from(first + i), count);
    estimate.drop();
    if (!stores) residual.drop();
    visit(piece_of(pass, block, i, count, residual, estimate), std::uint32_t(i));
  }
}

}  // namespace

void stream_narrow(const SegmentPass& pass, std::size_t first, const Block& block, StreamKernel kernel, Emitted& emitted) {
  for_pieces(pass, first, block, block.clear, [&](const Block& piece, std::uint32_t from) {
    const std::uint32_t before = emitted.count, noted = emitted.noted;
    emitted.noted = 0;
    kernel(piece, emitted);
    const StateArray estimate = pass.estimate.from(first + from);
    for (std::uint32_t j = before; j < emitted.count && estimate.narrow() && block.clear; ++j)
      estimate.set(block.index[j], piece.estimate[block.index[j]]);
    for (std::uint32_t j = before; j < emitted.count; ++j) block.index[j] = std::uint16_t(block.index[j] + from);
    // Bits count up to the first piece that did not note them all.
    emitted.noted = noted == from ? from + emitted.noted : noted;
  });
}

void advance_narrow(const SegmentPass& pass, std::size_t first, const Block& block) {
  const AdvanceKernel advance = advance_kernel(pass.form, pass.grad_dtype);
  for_pieces(pass, first, block, true, [&](Block piece, std::uint32_t) {
    if (advance != nullptr) return advance(piece);
    Emitted none;
    piece.clear = false;  // the message is kept
    piece.room = 0;
    range_kernel(pass.form, pass.grad_dtype)(piece, 0, piece.count, none);
  });
}

float message_narrow(const SegmentPass& pass, std::size_t i) noexcept {
  if (!is_live(pass.segment.live, i)) return 0;
  float residual = pass.residual ? pass.residual[i] : 0.0f, estimate = pass.estimate ? pass.estimate[i] : 0.0f, x = 0;
  std::uint16_t index;
  Block one = pass.segment;
  one.grad = static_cast<const std::byte*>(one.grad) + i * size_of(pass.grad_dtype);
  one.residual = &residual;
  one.estimate = &estimate;
  if (one.average != nullptr) one.average += i;
  one.live = nullptr;
  one.count = one.room = 1;
  one.clear = false;
  one.threshold = pass.floor;
  one.index = &index;
  one.value = &x;
  Emitted emitted;
  range_kernel(pass.form, pass.grad_dtype)(one, 0, 1, emitted);
  return x;
}

std::size_t sample_narrow(const SegmentPass& pass, std::uint32_t* magnitudes) {
  const Block& segment = pass.segment;
  const SampleKernel kernel = pass.kernels.sample[std::size_t(pass.form)][std::size_t(pass.grad_dtype)];
  if (sample_size(segment.count) == segment.count) {
    for_pieces(pass, 0, segment, false, [&](const Block& piece, std::uint32_t from) { kernel(piece, pass.draw, magnitudes + from); });
    return segment.count;
  }
  // A kernel takes all of a block as short as a piece, in order: so it is given groups side by side.
  constexpr std::size_t kGroups = kStatePiece / kSampleGroup;
  alignas(64) std::byte grad[kStatePiece * sizeof(float)];
  alignas(64) float residual[kStatePiece], estimate[kStatePiece], average[kStatePiece];
  std::uint8_t live[kStatePiece / 8];
  const std::size_t group_bytes = kSampleGroup * size_of(pass.grad_dtype);
  Block together = segment;
  together.grad = grad;
  together.residual = residual;
  together.estimate = estimate;
  together.average = average;
  if (segment.live != nullptr) together.live = live;
  SampleGroups groups(segment.count, pass.draw);
  for (std::uint64_t taken = 0; taken < groups.taken();) {
    const std::size_t count = std::min<std::size_t>(kGroups, groups.taken() - taken);
    for (std::size_t j = 0; j < count; ++j) {
      const std::size_t from = groups.next(), to = j * kSampleGroup;
      std::memcpy(grad + j * group_bytes, static_cast<const std::byte*>(segment.grad) + from * size_of(pass.grad_dtype), group_bytes);
      if (pass.residual) load_state(pass.residual.from(from), residual + to, kSampleGroup);
      if (pass.estimate) load_state(pass.estimate.from(from), estimate + to, kSampleGroup);
      if (segment.average != nullptr) std::memcpy(average + to, segment.average + from, kSampleGroup * sizeof(float));
      if (segment.live != nullptr) std::memcpy(live + to / 8, segment.live + from / 8, kSampleGroup / 8);
    }
    together.count = std::uint32_t(count * kSampleGroup);
    kernel(together, pass.draw, magnitudes + taken * kSampleGroup);
    taken += count;
  }
  return sample_size(segment.count);
}

}  // namespace thinwire::topk
