#pragma once
// One vector of 8 floats, the vocabulary in which the vector twins are written once for all widths. A piece: an ISA's own file includes it
// under its target pragma, after <immintrin.h> and every other header.

#include "compressors/core/dtype.hpp"

namespace thinwire::simd {

/// Byte j of entry m: the place of the j-th set bit of m.
constexpr std::array<std::uint64_t, 256> make_places() noexcept {
  std::array<std::uint64_t, 256> table{};
  for (unsigned m = 0; m < 256; ++m) {
    int j = 0;
    for (std::uint64_t place = 0; place < 8; ++place) {
      if (((m >> place) & 1u) != 0) table[m] |= place << (8 * j++);
    }
  }
  return table;
}
alignas(64) inline constexpr std::array<std::uint64_t, 256> kPlaces = make_places();

/// Per mask of eight lanes: for each lane, how many of the lanes before it are set.
constexpr std::array<std::uint64_t, 256> make_ranks() {
  std::array<std::uint64_t, 256> table{};
  for (unsigned m = 0; m < 256; ++m) {
    std::uint64_t rank = 0;
    for (int lane = 0; lane < 8; ++lane) {
      table[m] |= rank << (8 * lane);
      rank += (m >> lane) & 1u;
    }
  }
  return table;
}
alignas(64) inline constexpr std::array<std::uint64_t, 256> kRanks = make_ranks();

struct Avx2 {
  using V = __m256;
  using Mask = __m256;
  static constexpr std::uint32_t kWidth = 8;

  static V set(float x) noexcept { return _mm256_set1_ps(x); }
  static V load(const float* p) noexcept { return _mm256_loadu_ps(p); }
  static void store(float* p, V x) noexcept { _mm256_storeu_ps(p, x); }
  template <bool streaming>
  static void store_out(float* p, V x) noexcept {
    streaming ? _mm256_stream_ps(p, x) : _mm256_store_ps(p, x);
  }
  template <DType dtype>
  static V load_grad(const void* grad, std::size_t i) noexcept {
    if constexpr (dtype == DType::fp32) {
      return _mm256_loadu_ps(static_cast<const float*>(grad) + i);
    } else {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const std::uint16_t*>(grad) + i));
      if constexpr (dtype == DType::bf16) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
      return _mm256_cvtph_ps(half);
    }
  }

  static V abs(V x) noexcept { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  static Mask not_less(V x, V y) noexcept { return _mm256_cmp_ps(x, y, _CMP_NLT_UQ); }  // true for NaN
  static Mask below_zero(V x) noexcept { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ); }
  /// Bit i: whether element i of four vectors' is below zero.
  using Word = std::uint32_t;
  static Word negatives_of_four(const V* x) noexcept {
    __m256i below[4];
    for (int j = 0; j < 4; ++j) below[j] = _mm256_castps_si256(below_zero(x[j]));
    // Packing goes lane by lane: low halves, then high halves.
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(below[0], below[1]), _mm256_packs_epi32(below[2], below[3]));
    const __m256i places = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return std::uint32_t(_mm256_movemask_epi8(_mm256_permutevar8x32_epi32(bytes, places)));
  }
  /// Of magnitudes: the larger one, where infinity is larger than any number and a NaN than that.
  static V larger_bits(V x, V y) noexcept { return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(x), _mm256_castps_si256(y))); }
  /// A lane of a word's low bits.
  static Mask mask_of(std::uint64_t word) noexcept {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(word & 255)), each), each));
  }
  /// Four numbers, to be looked up by two bits.
  static V table(const float* four) noexcept { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four)); }
  /// Element i of 16: the table's entry for bits 2i and 2i + 1 of word `k` of 32 bits. `step` 1: elements 8 to 15.
  static V look_up(V table, const void* words, std::size_t k, std::size_t step) noexcept {
    std::int32_t pairs;
    std::memcpy(&pairs, static_cast<const char*>(words) + 4 * k + 2 * step,
                4);  // of the last half the upper bits are the next word's: unused
    const __m256i shift = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    return _mm256_permutevar_ps(table, _mm256_srlv_epi32(_mm256_set1_epi32(pairs), shift));  // it looks at two bits only
  }
  using Indices = __m256i;
  /// Element i: the table's entry for bits 0 and 1 of index i; the others do not matter.
  static V look_up(V table, Indices i) noexcept { return _mm256_permutevar_ps(table, i); }
  static constexpr bool kSixteen = false;  // eight entries at once are all that there is
  static V look_up_sixteen(const float*, Indices) noexcept { return set(0.0f); }
  static Indices indices(const std::uint8_t* bytes) noexcept {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  }
  template <int bits>
  static Indices shift(Indices i) noexcept {
    return _mm256_srli_epi32(i, bits);
  }
  /// A register of bytes.
  using Bytes = __m256i;
  static constexpr std::size_t kBytes = 32;
  static Bytes load_bytes(const std::uint8_t* p) noexcept { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_bytes(std::uint8_t* p, Bytes x) noexcept { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  /// In every byte the bits of a under mask << s change places with those of b under mask.
  template <int s>
  static void swap_bits(Bytes& a, Bytes& b, int mask) noexcept {
    const Bytes t = _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi64(a, s), b), _mm256_set1_epi8(char(mask)));
    b = _mm256_xor_si256(b, t);
    a = _mm256_xor_si256(a, _mm256_slli_epi64(t, s));
  }
  /// Units of 1, 2 or 4 bytes of a and b in turn, 16 bytes by 16 bytes: of their lower or higher 8.
  template <int unit, bool high>
  static Bytes zip(Bytes a, Bytes b) noexcept {
    if constexpr (unit == 1) return high ? _mm256_unpackhi_epi8(a, b) : _mm256_unpacklo_epi8(a, b);
    if constexpr (unit == 2) return high ? _mm256_unpackhi_epi16(a, b) : _mm256_unpacklo_epi16(a, b);
    return high ? _mm256_unpackhi_epi32(a, b) : _mm256_unpacklo_epi32(a, b);
  }
  static void stream_halves(float* p, V x) noexcept {
    _mm_stream_ps(p, _mm256_castps256_ps128(x));
    _mm_stream_ps(p + 4, _mm256_extractf128_ps(x, 1));
  }
  static Mask lanes(bool all) noexcept { return _mm256_castsi256_ps(_mm256_set1_epi32(all ? -1 : 0)); }
  static Mask either(Mask a, Mask b) noexcept { return _mm256_or_ps(a, b); }
  static Mask both(Mask a, Mask b) noexcept { return _mm256_and_ps(a, b); }
  static bool any(Mask m) noexcept { return _mm256_movemask_ps(m) != 0; }
  static std::uint32_t bits(Mask m) noexcept { return std::uint32_t(_mm256_movemask_ps(m)); }
  static std::uint32_t first_bit(std::uint64_t bits) noexcept { return std::uint32_t(_tzcnt_u64(bits)); }  // 64 where there is none
  /// GCC 12 would gather neighbouring offsets into vectors lane by lane, at two to three times the cost.
  static void store_offset(std::uint16_t* p, std::uint32_t offset) noexcept { asm("movw %w1, %0" : "=m"(*p) : "r"(offset)); }
  /// Moves the lanes of m to the front: whole vectors are stored, the next pack overwrites the rest. @returns how many.
  static std::uint32_t pack(Mask m, std::uint32_t first, V x, std::uint16_t* index, float* value) noexcept {
    const auto hits = bits(m);
    const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kPlaces[hits]));
    _mm256_storeu_ps(value, _mm256_permutevar8x32_ps(x, _mm256_cvtepu8_epi32(places)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(index), _mm_add_epi16(_mm_cvtepu8_epi16(places), _mm_set1_epi16(short(first))));
    return std::uint32_t(_mm_popcnt_u32(hits));
  }
  /// target += the first values of x, one for each bit of the word's low lanes.
  static void add_where(std::uint32_t word, V x, float* target) noexcept {
    const auto bits = std::uint8_t(word);
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), each), each);
    const __m128i ranks = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kRanks[bits]));
    const V t = load(target);
    store(target, choose(_mm256_castsi256_ps(set), t + _mm256_permutevar8x32_ps(x, _mm256_cvtepu8_epi32(ranks)), t));
  }
  static V zero_where(Mask m, V x) noexcept { return _mm256_andnot_ps(m, x); }
  static V choose(Mask m, V yes, V no) noexcept { return _mm256_blendv_ps(no, yes, m); }

  /// float_to_bf16 as a float, for any x but NaN.
  static V nearest_even_bf16(V x) noexcept {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    return _mm256_castsi256_ps(_mm256_and_si256(r, _mm256_set1_epi32(int(0xffff0000))));
  }
  static V with_sign_of(V a, V x) noexcept { return _mm256_or_ps(a, _mm256_and_ps(x, _mm256_set1_ps(-0.0f))); }
  /// wire_round for finite x.
  static V round_bf16(V x) noexcept {
    const __m256i a = _mm256_castps_si256(abs(nearest_even_bf16(x)));
    return with_sign_of(_mm256_castsi256_ps(_mm256_min_epu32(a, _mm256_set1_epi32(0x7f7f0000))), x);
  }
  static V round_fp16(V x) noexcept {
    const V a = _mm256_min_ps(abs(x), set(kFp16Max));
    return with_sign_of(_mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)), x);
  }
  /// What float_to_bf16 and float_to_fp16 mean as floats: overflow to infinity, NaN to the positive quiet one.
  static V nearest_bf16(V x) noexcept {
    return choose(_mm256_cmp_ps(x, x, _CMP_UNORD_Q), set(bits_float(0x7fc00000u)), nearest_even_bf16(x));
  }
  static V nearest_fp16(V x) noexcept {
    return choose(_mm256_cmp_ps(x, x, _CMP_UNORD_Q), set(bits_float(0x7fc00000u)),
                  _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)));
  }
  /// x is representable.
  static void store_bf16(std::uint16_t* p, V x) noexcept {
    const __m256i half = _mm256_srli_epi32(_mm256_castps_si256(x), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store_fp16(std::uint16_t* p, V x) noexcept {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace thinwire::simd
