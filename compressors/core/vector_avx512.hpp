#pragma once
// One vector of 16 floats, the vocabulary in which the vector twins are written once for all widths. A piece: an ISA's own file includes it
// under its target pragma, after <immintrin.h> and every other header.

#include "compressors/core/dtype.hpp"

namespace thinwire::simd {

struct Avx512 {
  using V = __m512;
  using Mask = __mmask16;
  static constexpr std::uint32_t kWidth = 16;

  static V set(float x) noexcept { return _mm512_set1_ps(x); }
  static V load(const float* p) noexcept { return _mm512_loadu_ps(p); }
  static void store(float* p, V x) noexcept { _mm512_storeu_ps(p, x); }
  template <bool streaming>
  static void store_out(float* p, V x) noexcept {
    streaming ? _mm512_stream_ps(p, x) : _mm512_store_ps(p, x);
  }
  template <DType dtype>
  static V load_grad(const void* grad, std::size_t i) noexcept {
    if constexpr (dtype == DType::fp32) {
      return _mm512_loadu_ps(static_cast<const float*>(grad) + i);
    } else {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const std::uint16_t*>(grad) + i));
      if constexpr (dtype == DType::bf16) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      return _mm512_cvtph_ps(half);
    }
  }

  static V abs(V x) noexcept { return _mm512_abs_ps(x); }
  static Mask not_less(V x, V y) noexcept { return _mm512_cmp_ps_mask(x, y, _CMP_NLT_UQ); }  // true for NaN
  static Mask below_zero(V x) noexcept { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ); }
  /// Bit i: whether element i of four vectors' is below zero.
  using Word = std::uint64_t;
  static Word negatives_of_four(const V* x) noexcept {
    return std::uint64_t(below_zero(x[0])) | std::uint64_t(below_zero(x[1])) << 16 | std::uint64_t(below_zero(x[2])) << 32 |
           std::uint64_t(below_zero(x[3])) << 48;
  }
  /// Of magnitudes: the larger one, where infinity is larger than any number and a NaN than that.
  static V larger_bits(V x, V y) noexcept { return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(x), _mm512_castps_si512(y))); }
  /// A lane of a word's low bits.
  static Mask mask_of(std::uint64_t word) noexcept { return Mask(word); }
  /// Four numbers, to be looked up by two bits.
  static V table(const float* four) noexcept { return _mm512_broadcast_f32x4(_mm_loadu_ps(four)); }
  /// Element i of 16: the table's entry for bits 2i and 2i + 1 of word `k` of 32 bits. `step`: of narrower vectors.
  static V look_up(V table, const void* words, std::size_t k, std::size_t) noexcept {
    std::int32_t pairs;
    std::memcpy(&pairs, static_cast<const char*>(words) + 4 * k, 4);
    const __m512i shift = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutevar_ps(table, _mm512_srlv_epi32(_mm512_set1_epi32(pairs), shift));  // it looks at two bits only
  }
  using Indices = __m512i;
  /// Element i: the table's entry for bits 0 and 1 of index i; the others do not matter.
  static V look_up(V table, Indices i) noexcept { return _mm512_permutevar_ps(table, i); }
  /// The same for sixteen numbers and four bits.
  static constexpr bool kSixteen = true;
  static V look_up_sixteen(const float* sixteen, Indices i) noexcept { return _mm512_permutexvar_ps(i, _mm512_loadu_ps(sixteen)); }
  static Indices indices(const std::uint8_t* bytes) noexcept {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  template <int bits>
  static Indices shift(Indices i) noexcept {
    return _mm512_srli_epi32(i, bits);
  }
  /// A register of bytes.
  using Bytes = __m512i;
  static constexpr std::size_t kBytes = 64;
  static Bytes load_bytes(const std::uint8_t* p) noexcept { return _mm512_loadu_si512(p); }
  static void store_bytes(std::uint8_t* p, Bytes x) noexcept { _mm512_storeu_si512(p, x); }
  /// In every byte the bits of a under mask << s change places with those of b under mask.
  template <int s>
  static void swap_bits(Bytes& a, Bytes& b, int mask) noexcept {
    const Bytes t = _mm512_and_si512(_mm512_xor_si512(_mm512_srli_epi64(a, s), b), _mm512_set1_epi8(char(mask)));
    b = _mm512_xor_si512(b, t);
    a = _mm512_xor_si512(a, _mm512_slli_epi64(t, s));
  }
  /// Units of 1, 2 or 4 bytes of a and b in turn, 16 bytes by 16 bytes: of their lower or higher 8.
  template <int unit, bool high>
  static Bytes zip(Bytes a, Bytes b) noexcept {
    if constexpr (unit == 1) return high ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
    if constexpr (unit == 2) return high ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
    return high ? _mm512_unpackhi_epi32(a, b) : _mm512_unpacklo_epi32(a, b);
  }
  static void stream_halves(float* p, V x) noexcept {
    _mm256_stream_ps(p, _mm512_castps512_ps256(x));
    _mm256_stream_ps(p + 8, _mm512_extractf32x8_ps(x, 1));
  }
  static Mask lanes(bool all) noexcept { return Mask(all ? 0xffff : 0); }
  static Mask either(Mask a, Mask b) noexcept { return Mask(a | b); }
  static Mask both(Mask a, Mask b) noexcept { return Mask(a & b); }
  static bool any(Mask m) noexcept { return m != 0; }
  static std::uint32_t bits(Mask m) noexcept { return m; }
  static std::uint32_t first_bit(std::uint64_t bits) noexcept { return std::uint32_t(_tzcnt_u64(bits)); }  // 64 where there is none
  /// GCC 12 would gather neighbouring offsets into vectors lane by lane, at two to three times the cost.
  static void store_offset(std::uint16_t* p, std::uint32_t offset) noexcept { asm("movw %w1, %0" : "=m"(*p) : "r"(offset)); }
  /// Moves the lanes of m to the front: whole vectors are stored (a compressing store is microcoded on Zen 4), the next pack overwrites the
  /// rest. @returns how many.
  static std::uint32_t pack(Mask m, std::uint32_t first, V x, std::uint16_t* index, float* value) noexcept {
    const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i offsets = _mm512_add_epi32(places, _mm512_set1_epi32(int(first)));
    _mm512_storeu_ps(value, _mm512_maskz_compress_ps(m, x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(index), _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(m, offsets)));
    return std::uint32_t(_mm_popcnt_u32(m));
  }
  /// target += the first values of x, one for each bit of the word's low lanes.
  static void add_where(std::uint32_t word, V x, float* target) noexcept {
    const auto m = Mask(word);
    const V t = load(target);
    store(target, _mm512_mask_add_ps(t, m, t, _mm512_maskz_expand_ps(m, x)));
  }
  static V zero_where(Mask m, V x) noexcept { return _mm512_maskz_mov_ps(Mask(~m), x); }
  static V choose(Mask m, V yes, V no) noexcept { return _mm512_mask_mov_ps(no, m, yes); }

  /// float_to_bf16 as a float, for any x but NaN.
  static V nearest_even_bf16(V x) noexcept {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_castsi512_ps(_mm512_and_si512(r, _mm512_set1_epi32(int(0xffff0000))));
  }
  static V with_sign_of(V a, V x) noexcept { return _mm512_or_ps(a, _mm512_and_ps(x, _mm512_set1_ps(-0.0f))); }
  /// wire_round for finite x.
  static V round_bf16(V x) noexcept {
    const __m512i a = _mm512_castps_si512(abs(nearest_even_bf16(x)));
    return with_sign_of(_mm512_castsi512_ps(_mm512_min_epu32(a, _mm512_set1_epi32(0x7f7f0000))), x);
  }
  static V round_fp16(V x) noexcept {
    const V a = _mm512_min_ps(abs(x), set(kFp16Max));
    return with_sign_of(_mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)), x);
  }
  /// What float_to_bf16 and float_to_fp16 mean as floats: overflow to infinity, NaN to the positive quiet one.
  static V nearest_bf16(V x) noexcept {
    return choose(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), set(bits_float(0x7fc00000u)), nearest_even_bf16(x));
  }
  static V nearest_fp16(V x) noexcept {
    return choose(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), set(bits_float(0x7fc00000u)),
                  _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)));
  }
  /// x is representable.
  static void store_bf16(std::uint16_t* p, V x) noexcept {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16)));
  }
  static void store_fp16(std::uint16_t* p, V x) noexcept {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace thinwire::simd
