// One vector type per ISA, so that the kernels are written once.
//
//   Vec, IVec   kWidth lanes of float / int32 (16 with AVX-512, 8 with AVX2, 4 otherwise)
//   LoadF       kWidth elements of float, BF16 or F16 as a Vec;   StoreF   the way back
//   Transpose   kWidth x kWidth in registers
//
// Compiled once per ISA into that ISA's namespace (JFA_ISA_NAMESPACE). Nothing here or in the
// headers above it may use inline functions or templates of std: the linker keeps one copy of
// those for all translation units, and it could keep the AVX-512 one.
#ifndef JAX_FLASHATTN_CC_CPU_SIMD_H_
#define JAX_FLASHATTN_CC_CPU_SIMD_H_

#include <cstdint>

#include "scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Of the _mm512 intrinsics only the maskz forms: gcc 12 warns of an uninitialised operand in the
// plain ones. With all lanes on they are the same instruction.

#define JFA_INLINE static inline __attribute__((always_inline))

namespace jfa::cpu::JFA_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IVec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t UVec __attribute__((vector_size(kWidth * 4)));
typedef uint16_t HVec __attribute__((vector_size(kWidth * 2)));

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInf = __builtin_inff();

JFA_INLINE Vec Broadcast(float x) { return x - Vec{}; }
JFA_INLINE IVec BroadcastI(int32_t x) { return x + IVec{}; }

// Through memcpy: tiles are aligned, but rows of a tensor need not be, and on the CPUs at hand an
// unaligned instruction on an aligned address costs nothing.
JFA_INLINE Vec Load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
JFA_INLINE void Store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
JFA_INLINE IVec LoadI(const int32_t* p) {
  IVec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

JFA_INLINE Vec Abs(Vec v) { return (Vec)((UVec)v & 0x7fffffffu); }

JFA_INLINE Vec Select(IVec mask, Vec a, Vec b) { return mask ? a : b; }

// max_ps returns its second operand when either is NaN, so a NaN in `b` is kept.
JFA_INLINE Vec VecMax(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE__)
  return _mm_max_ps(a, b);
#else
  return vmaxq_f32(a, b);
#endif
}

JFA_INLINE bool AnyGreater(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#elif defined(__SSE__)
  return _mm_movemask_ps(_mm_cmpgt_ps(a, b)) != 0;
#else
  return vmaxvq_u32(vcgtq_f32(a, b)) != 0;
#endif
}

JFA_INLINE float Sum(Vec v) {
  float s = 0;
  for (int i = 0; i < kWidth; ++i) s += v[i];
  return s;
}

// 2^x for x < 127: relative error 2e-7, 0 below -126, NaN kept. Degree 5 on [-1/2, 1/2].
JFA_INLINE Vec Exp2(Vec x) {
  // Adding 1.5 * 2^23 rounds to an integer; the extra 127 leaves that integer, as a biased
  // exponent, in the lowest bits.
  const Vec magic = Broadcast(12582912.0f + 127.0f);
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p = Broadcast(0.0013276471519207225f);
  p = p * f + 0.009675541330666986f;
  p = p * f + 0.055507132749617195f;
  p = p * f + 0.24022119723934132f;
  p = p * f + 0.6931469670638646f;
  p = p * f + 1.0000000716546555f;
  const Vec y = p * (Vec)((IVec)shifted << 23);
  return Select(x < -126.0f, Vec{}, y);
}

// Error up to 2 ulp, NaN kept. Small arguments by a polynomial (Cephes' tanhf), since 1 - e would
// lose there what Exp2 does not.
JFA_INLINE Vec Tanh(Vec x) {
  const Vec a = Abs(x);
  const Vec z = x * x;
  Vec p = Broadcast(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec small = p * z * x + x;
  const Vec e = Exp2(a * (-2 * kLog2E));
  const Vec large = (1 - e) / (1 + e);
  const UVec sign = (UVec)x & 0x80000000u;
  return Select(a < 0.625f, small, (Vec)((UVec)large | sign));
}

// ---- Conversions -------------------------------------------------------------------------------

JFA_INLINE Vec LoadF(const float* p) { return Load(p); }
JFA_INLINE void StoreF(float* p, Vec v) { Store(p, v); }

JFA_INLINE HVec LoadHalves(const void* p) {
  HVec h;
  __builtin_memcpy(&h, p, sizeof(h));
  return h;
}

JFA_INLINE Vec LoadF(const BF16* p) {
  return (Vec)(__builtin_convertvector(LoadHalves(p), UVec) << 16);
}

JFA_INLINE void StoreF(BF16* p, Vec v) {
  const UVec u = (UVec)v;
  const UVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const UVec bits = v != v ? (u >> 16) | 0x40u : rounded;
  const HVec h = __builtin_convertvector(bits, HVec);
  __builtin_memcpy(p, &h, sizeof(h));
}

JFA_INLINE Vec LoadF(const F16* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, (__m256i)LoadHalves(p));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)LoadHalves(p));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
  const UVec h = __builtin_convertvector(LoadHalves(p), UVec);
  UVec o = (h & 0x7fffu) << 13;
  const UVec exponent = o & (0x7c00u << 13);
  o += 112u << 23;
  const UVec inf_nan = o + (112u << 23);
  // A subnormal half: subtracting 2^-14 normalises what sits below its leading one.
  const Vec subnormal = (Vec)(o + (1u << 23)) - (Vec)(113u << 23 | UVec{});
  o = exponent == (0x7c00u << 13) ? inf_nan : o;
  o = exponent == 0u ? (UVec)subnormal : o;
  return (Vec)(o | (h & 0x8000u) << 16);
#endif
}

JFA_INLINE void StoreF(F16* p, Vec v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  const __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  const uint16x4_t h = vreinterpret_u16_f16(vcvt_f16_f32(v));
#else
  const UVec sign = (UVec)v & 0x80000000u;
  const UVec u = (UVec)v ^ sign;
  // Adding 0.5 lets the FPU round at the place where a subnormal half ends.
  const UVec half = 126u << 23 | UVec{};
  const UVec subnormal = (UVec)((Vec)u + (Vec)half) - half;
  const UVec normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  UVec o = u < (113u << 23) ? subnormal : normal;
  o = u >= (143u << 23) ? (0x7c00u | UVec{}) : o;
  o = u > (255u << 23) ? (0x7e00u | UVec{}) : o;
  const HVec h = __builtin_convertvector(o | sign >> 16, HVec);
#endif
  __builtin_memcpy(p, &h, sizeof(h));
}

// ---- Transpose ---------------------------------------------------------------------------------

JFA_INLINE void Interleave(Vec a, Vec b, Vec* low, Vec* high) {
#if defined(__AVX512F__)
  *low = __builtin_shuffle(a, b, IVec{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
  *high =
      __builtin_shuffle(a, b, IVec{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#elif defined(__AVX2__)
  *low = __builtin_shuffle(a, b, IVec{0, 8, 1, 9, 2, 10, 3, 11});
  *high = __builtin_shuffle(a, b, IVec{4, 12, 5, 13, 6, 14, 7, 15});
#else
  *low = __builtin_shuffle(a, b, IVec{0, 4, 1, 5});
  *high = __builtin_shuffle(a, b, IVec{2, 6, 3, 7});
#endif
}

// log2(kWidth) perfect shuffles of all elements are the transposition.
JFA_INLINE void Transpose(Vec (&m)[kWidth]) {
  Vec t[kWidth];
#pragma GCC unroll 4
  for (int stride = 1; stride < kWidth; stride *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) {
      Interleave(m[i], m[i + kWidth / 2], &t[2 * i], &t[2 * i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) m[i] = t[i];
  }
}

}  // namespace jfa::cpu::JFA_ISA_NAMESPACE

#endif  // JAX_FLASHATTN_CC_CPU_SIMD_H_
