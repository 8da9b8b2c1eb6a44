// One PTX instruction per function. Shared-memory addresses are 32-bit, 16-bit floats travel in
// pairs as the bits of a uint32 (low half first).
#ifndef JAX_FLASHATTN_CC_KERNELS_PTX_CUH_
#define JAX_FLASHATTN_CC_KERNELS_PTX_CUH_

#include "base.cuh"

namespace jfa {

JFA_DEVICE uint32 SmemAddress(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// Volatile on purpose: what follows from these is computed again where it is used, instead of being
// held in registers all through a loop that has none to spare.
JFA_DEVICE int ReadThreadIndex() {
  int i;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
  return i;
}
JFA_DEVICE int ReadLaneIndex() {
  int i;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(i));
  return i;
}

// --- global -> shared, asynchronous -----------------------------------------------------------

// Copies 16 bytes, of which the first `bytes` (0 or 16) are read and the rest are zeros.
JFA_DEVICE void CpAsync16(uint32 smem, const void* gmem, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem),
               "r"(bytes)
               : "memory");
}
JFA_DEVICE void CpAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
JFA_DEVICE void CpAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- shared memory ----------------------------------------------------------------------------

JFA_DEVICE void Ldmatrix4(uint32 (&r)[4], uint32 smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}
JFA_DEVICE void Ldmatrix4Trans(uint32 (&r)[4], uint32 smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}
#if __CUDA_ARCH__ >= 900
JFA_DEVICE void Stmatrix4(uint32 smem, const uint32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
#endif
JFA_DEVICE void StoreShared4(uint32 smem, uint32 value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(smem), "r"(value) : "memory");
}
JFA_DEVICE void StoreShared8(uint32 smem, uint32 low, uint32 high) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(smem), "r"(low), "r"(high) : "memory");
}
JFA_DEVICE void StoreShared16(uint32 smem, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
JFA_DEVICE uint4 LoadShared16(uint32 smem) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(smem)
               : "memory");
  return v;
}
JFA_DEVICE float2 LoadSharedFloat2(uint32 smem) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(smem) : "memory");
  return v;
}

// --- tensor cores: d += a b, a 16 x 16 row-major, b 16 x 8 column-major, d 16 x 8 in f32 --------

template <bool kBf16>
JFA_DEVICE void Mma16x8x16(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  if constexpr (kBf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// --- arithmetic -------------------------------------------------------------------------------

// 2^x; 0 for -inf.
JFA_DEVICE float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
JFA_DEVICE float Log2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
JFA_DEVICE float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Relative error 2^-11: below the rounding of the weights that follow from it.
JFA_DEVICE float Tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <bool kBf16>
JFA_DEVICE uint32 Pack16(float low, float high) {
  uint32 r;
  if constexpr (kBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  }
  return r;
}
template <bool kBf16>
JFA_DEVICE float ToFloat(uint16 bits) {
  if constexpr (kBf16) {
    return __uint_as_float(static_cast<uint32>(bits) << 16);
  } else {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
  }
}

// Bytes of a (0 to 3) and b (4 to 7), chosen by the hex digits of the selector, last one lowest.
template <uint32 kSelector>
JFA_DEVICE uint32 Permute(uint32 a, uint32 b) {
  uint32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "n"(kSelector));
  return r;
}

// --- a kernel that starts before the end of the one before it (sm_90) ----------------------------

// Everything that the kernel before has written is there.
JFA_DEVICE void WaitForKernelBefore() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The kernel behind may start once all CTAs say so.
JFA_DEVICE void LetKernelBehindStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- global memory ----------------------------------------------------------------------------

JFA_DEVICE void RedAdd(float* gmem, float value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(gmem), "f"(value) : "memory");
}
#if __CUDA_ARCH__ >= 900
JFA_DEVICE void RedAdd4(float* gmem, float a, float b, float c, float d) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(gmem), "f"(a), "f"(b), "f"(c),
               "f"(d)
               : "memory");
}
#endif

// --- the four lanes that share a row of an accumulator ------------------------------------------

JFA_DEVICE float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}
JFA_DEVICE float QuadSum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// --- a whole warp -------------------------------------------------------------------------------

JFA_DEVICE int WarpMin(int x) {
  int y;
  asm volatile("redux.sync.min.s32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
  return y;
}
JFA_DEVICE int WarpMax(int x) {
  int y;
  asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
  return y;
}
JFA_DEVICE float WarpSum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, distance);
  }
  return x;
}

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_PTX_CUH_
