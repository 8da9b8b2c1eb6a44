// Scalar helpers of the kernels. All static: the linker must not merge copies that were compiled
// for different instruction sets (see simd.h).
#ifndef JAX_FLASHATTN_CC_CPU_SCALAR_H_
#define JAX_FLASHATTN_CC_CPU_SCALAR_H_

#include <cstdint>

namespace jfa::cpu {

template <class A>
static inline A Min(A a, A b) {
  return a < b ? a : b;
}
template <class A>
static inline A Max(A a, A b) {
  return a > b ? a : b;
}

static inline int64_t Clamp(int64_t x, int64_t lo, int64_t hi) {
  return x < lo ? lo : x > hi ? hi : x;
}

}  // namespace jfa::cpu

#endif  // JAX_FLASHATTN_CC_CPU_SCALAR_H_
