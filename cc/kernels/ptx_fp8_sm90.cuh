// Hopper's matrix products of 8-bit floats, and their conversions, one instruction per function.
//
// Both operands must lie with the product's inner dimension along rows: there is no transposed
// form.
#ifndef JAX_FLASHATTN_CC_KERNELS_PTX_FP8_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_PTX_FP8_SM90_CUH_

#include "ptx_sm90.cuh"

namespace jfa {

// Four floats as e4m3, the first in the lowest byte; beyond 448 they saturate.
JFA_DEVICE uint32 PackE4m3(float a, float b, float c, float d) {
  uint32 r;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(r)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return r;
}

// d += a b for a warpgroup, a 64 x 32, b 32 x kN, d 64 x kN in f32, as Wgmma.
//   Ss  a from shared memory, Rs  a from registers and of e4m3
template <int kN>
struct WgmmaFp8;

// clang-format off
#define JFA_WGMMA8_SS(TYPE_A, TYPE_B, kN, LIST, OUT, I0, I1, I2)                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2 ", 0;\n"                                  \
               "wgmma.mma_async.sync.aligned.m64n" #kN "k32.f32." TYPE_A "." TYPE_B " {" LIST     \
               "}, %" #I0 ", %" #I1 ", p, 1, 1;\n}"                                               \
               : OUT() : "l"(a), "l"(b), "r"(accumulate))
#define JFA_WGMMA8_RS(TYPE_B, kN, LIST, OUT, I0, I1, I2, I3, I4, I5)                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5 ", 0;\n"                                  \
               "wgmma.mma_async.sync.aligned.m64n" #kN "k32.f32.e4m3." TYPE_B " {" LIST "}, {%"   \
               #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", p, 1, 1;\n}"                       \
               : OUT() : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
#define JFA_DEFINE_WGMMA8(kN, LIST, OUT, I0, I1, I2, I3, I4, I5)                                 \
  template <>                                                                                     \
  struct WgmmaFp8<kN> {                                                                           \
    template <bool kE5m2A, bool kE5m2B>                                                           \
    static JFA_DEVICE void Ss(float (&d)[1][kN / 8][4], uint64 a, uint64 b, int accumulate) {     \
      if constexpr (kE5m2A && kE5m2B) {                                                           \
        JFA_WGMMA8_SS("e5m2", "e5m2", kN, LIST, OUT, I0, I1, I2);                                 \
      } else if constexpr (kE5m2A) {                                                              \
        JFA_WGMMA8_SS("e5m2", "e4m3", kN, LIST, OUT, I0, I1, I2);                                 \
      } else if constexpr (kE5m2B) {                                                              \
        JFA_WGMMA8_SS("e4m3", "e5m2", kN, LIST, OUT, I0, I1, I2);                                 \
      } else {                                                                                    \
        JFA_WGMMA8_SS("e4m3", "e4m3", kN, LIST, OUT, I0, I1, I2);                                 \
      }                                                                                           \
    }                                                                                             \
    template <bool kE5m2B>                                                                        \
    static JFA_DEVICE void Rs(float (&d)[1][kN / 8][4], const uint32 (&a)[4], uint64 b,           \
                              int accumulate) {                                                   \
      if constexpr (kE5m2B) {                                                                     \
        JFA_WGMMA8_RS("e5m2", kN, LIST, OUT, I0, I1, I2, I3, I4, I5);                             \
      } else {                                                                                    \
        JFA_WGMMA8_RS("e4m3", kN, LIST, OUT, I0, I1, I2, I3, I4, I5);                             \
      }                                                                                           \
    }                                                                                             \
  };

JFA_DEFINE_WGMMA8(64, JFA_L4, JFA_D4, 32, 33, 34, 35, 36, 37)
JFA_DEFINE_WGMMA8(96, JFA_L6, JFA_D6, 48, 49, 50, 51, 52, 53)
JFA_DEFINE_WGMMA8(128, JFA_L8, JFA_D8, 64, 65, 66, 67, 68, 69)
JFA_DEFINE_WGMMA8(160, JFA_L10, JFA_D10, 80, 81, 82, 83, 84, 85)
JFA_DEFINE_WGMMA8(192, JFA_L12, JFA_D12, 96, 97, 98, 99, 100, 101)
JFA_DEFINE_WGMMA8(224, JFA_L14, JFA_D14, 112, 113, 114, 115, 116, 117)
JFA_DEFINE_WGMMA8(256, JFA_L16, JFA_D16, 128, 129, 130, 131, 132, 133)
// clang-format on

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_PTX_FP8_SM90_CUH_
