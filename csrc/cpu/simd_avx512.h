// Vec: 16 float32 in one AVX-512 register.  Included by simd.h inside its anonymous namespace.

constexpr int kLanes = 16;

struct Vec {
  __m512 v;
};

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a * b + c with the sign of the product turned.
inline Vec negative_multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// The second operand where either is NaN.
inline Vec max_keeping_nan_of_second(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
// a * 2^n for an integral n.
inline Vec scale_by_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline Vec load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

inline __m256i to_bfloat16(Vec a) {
#ifdef __AVX512BF16__
  const __m256bh rounded = _mm512_cvtneps_pbh(a.v);
  __m256i bits;
  memcpy(&bits, &rounded, sizeof bits);
  return bits;
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
}

template <bool kStream>
inline void store(float* p, Vec a) {
  kStream ? _mm512_stream_ps(p, a.v) : _mm512_storeu_ps(p, a.v);
}
template <bool kStream>
inline void store_half(void* p, __m256i bits) {
  auto* q = static_cast<__m256i*>(p);
  kStream ? _mm256_stream_si256(q, bits) : _mm256_storeu_si256(q, bits);
}
template <bool kStream>
inline void store(BFloat16* p, Vec a) {
  store_half<kStream>(p, to_bfloat16(a));
}
template <bool kStream>
inline void store(Float16* p, Vec a) {
  store_half<kStream>(p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void finish_streaming() { _mm_sfence(); }
