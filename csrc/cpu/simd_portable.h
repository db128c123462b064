// Vec: 4 float32 in the vector extension that gcc and clang share (SSE2, NEON, or whatever the target has).
// Included by simd.h inside its anonymous namespace.

constexpr int kLanes = 4;

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t UInt4 __attribute__((vector_size(16)));
typedef uint16_t Half4 __attribute__((vector_size(8)));

struct Vec {
  Float4 v;
};

inline Float4 select(Int4 mask, Float4 a, Float4 b) { return (Float4)(((Int4)a & mask) | ((Int4)b & ~mask)); }
inline UInt4 select(Int4 mask, UInt4 a, UInt4 b) { return (a & (UInt4)mask) | (b & ~(UInt4)mask); }
inline UInt4 all(uint32_t x) { return UInt4{x, x, x, x}; }

inline Vec broadcast(float x) { return {Float4{x, x, x, x}}; }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec negative_multiply_add(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }
inline Vec max_keeping_nan_of_second(Vec a, Vec b) { return {select((Int4)(a.v > b.v), a.v, b.v)}; }
inline bool any_greater(Vec a, Vec b) {
  const Int4 mask = (Int4)(a.v > b.v);
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
}
// In two halves, because 2^n itself is out of range where the result is subnormal.
inline Vec scale_by_power_of_two(Vec a, Vec n) {
  const Float4 magic = broadcast(12582912.0f).v;
  const Int4 whole = (Int4)(n.v + magic) - (Int4)magic, half = whole >> 1;
  const Int4 low = (half + 127) << 23, high = (whole - half + 127) << 23;
  return {a.v * (Float4)low * (Float4)high};
}

inline UInt4 load_half(const void* p) {
  Half4 half;
  memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, UInt4);
}
inline Vec load(const float* p) {
  Vec a;
  memcpy(&a.v, p, sizeof a.v);
  return a;
}
inline Vec load(const BFloat16* p) { return {(Float4)(load_half(p) << 16)}; }
inline Vec load(const Float16* p) {
  const UInt4 half = load_half(p), magnitude = (half & 0x7fff) << 13;
  // Rebiasing by a product gets subnormals right; infinities and NaN get their exponent by hand.
  const Float4 scaled = (Float4)magnitude * 0x1p112f;
  const UInt4 special = magnitude | 0x7f800000;
  const UInt4 bits = select((Int4)(magnitude >= all(0x0f800000)), special, (UInt4)scaled);
  return {(Float4)(bits | ((half & 0x8000) << 16))};
}

inline void store_half(void* p, UInt4 words) {
  const Half4 half = __builtin_convertvector(words, Half4);
  memcpy(p, &half, sizeof half);
}
template <bool kStream>
inline void store(float* p, Vec a) {
  memcpy(p, &a.v, sizeof a.v);
}
template <bool kStream>
inline void store(BFloat16* p, Vec a) {
  const UInt4 bits = (UInt4)a.v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  store_half(p, select((Int4)(a.v != a.v), all(0x7fc0), rounded >> 16));
}
template <bool kStream>
inline void store(Float16* p, Vec a) {
  const UInt4 bits = (UInt4)a.v, magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  const UInt4 odd = (magnitude >> 13) & 1;
  const UInt4 normal = (magnitude - (112u << 23) + 0xfff + odd) >> 13;
  // Below 2^-14 adding 0.5 lines the mantissa up with the subnormal grid, and rounds.
  const UInt4 subnormal = (UInt4)((Float4)magnitude + 0.5f) - 0x3f000000;
  const UInt4 special = select((Int4)(magnitude > all(0x7f800000)), all(0x7e00), all(0x7c00));
  UInt4 half = select((Int4)(magnitude < all(0x38800000)), subnormal, normal);
  half = select((Int4)(magnitude >= all(0x47800000)), special, half);
  store_half(p, half | sign);
}
inline void finish_streaming() {}
