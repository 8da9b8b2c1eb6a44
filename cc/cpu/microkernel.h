// The one matrix product: C[M, N] (+)= A[M, K] B[K, N], all f32.
//
//             N vectors                 A is read by element and broadcast, so it may lie either
//           +-----------+               way round: kAlongK has element (m, k) at a[m * lda + k],
//         K |     B     |               kAlongM at a[k * lda + m]. Rows of B and C are vectors:
//     K     +-----------+               N counts vectors, and rows must be padded to them.
//   +----+  +--+--+--+--+
// M | A  |  |RxC  |     |               An R x C block of C stays in registers for the whole of K.
//   +----+  +--+--+--+--+               K is cut at kDepth so that the panel of B that all blocks
//                                       below one another read stays near.
//
// Register budget, R * C sums + C of B + 1 of A: AVX-512 6 x 4 (29 of 32), AVX2 6 x 2 (15 of 16),
// NEON 6 x 4, SSE 4 x 2 (12 of 16, one more for the product as there is no FMA).
#ifndef JAX_FLASHATTN_CC_CPU_MICROKERNEL_H_
#define JAX_FLASHATTN_CC_CPU_MICROKERNEL_H_

#include "simd.h"

namespace jfa::cpu::JFA_ISA_NAMESPACE {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockRows = 6, kBlockCols = 4;
#elif defined(__AVX2__)
constexpr int kBlockRows = 6, kBlockCols = 2;
#else
constexpr int kBlockRows = 4, kBlockCols = 2;
#endif
// AVX-512: 64 is 2% slower, although a panel of 128 fills a small L1. Others: 128 is 4% slower.
constexpr int kDepth = kWidth == 16 ? 128 : 64;

enum Layout { kAlongK, kAlongM };

template <int R, int C, Layout kLayout>
__attribute__((noinline)) static void GemmBlock(int depth, const float* a, long lda, const float* b,
                                                long ldb, float* c, long ldc, bool accumulate) {
  Vec sum[R][C];
  if (accumulate) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) sum[r][v] = Load(c + r * ldc + v * kWidth);
    }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) sum[r][v] = Vec{};
    }
  }
  for (int k = 0; k < depth; ++k) {
    Vec bk[C];
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) bk[v] = Load(b + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec ar = Broadcast(kLayout == kAlongK ? a[r * lda] : a[r]);
#if defined(__AVX512F__)
      // Else gcc folds the broadcast into each of the C products, and loads become the bottleneck.
      if (C > 1) asm("" : "+v"(ar));
#endif
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) sum[r][v] += ar * bk[v];
    }
    a += kLayout == kAlongK ? 1 : lda;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) Store(c + r * ldc + v * kWidth, sum[r][v]);
  }
}

template <int C, Layout kLayout>
JFA_INLINE void GemmPanel(int m, int depth, const float* a, long lda, const float* b, long ldb,
                          float* c, long ldc, bool accumulate) {
  // A narrow panel needs more rows for as many independent sums as the FMA latency asks for.
  constexpr int kRows = C <= 2 && kBlockCols > 2 ? 8 : kBlockRows;
  const long step = kLayout == kAlongK ? lda : 1;
  int i = 0;
  for (; i + kRows <= m; i += kRows) {
    GemmBlock<kRows, C, kLayout>(depth, a + i * step, lda, b, ldb, c + i * ldc, ldc, accumulate);
  }
  if (kRows > 4 && i + 4 <= m) {
    GemmBlock<4, C, kLayout>(depth, a + i * step, lda, b, ldb, c + i * ldc, ldc, accumulate);
    i += 4;
  }
  if (i + 2 <= m) {
    GemmBlock<2, C, kLayout>(depth, a + i * step, lda, b, ldb, c + i * ldc, ldc, accumulate);
    i += 2;
  }
  if (i < m) {
    GemmBlock<1, C, kLayout>(depth, a + i * step, lda, b, ldb, c + i * ldc, ldc, accumulate);
  }
}

template <Layout kLayout>
static void Gemm(int m, int num_vecs, int depth, const float* a, long lda, const float* b, long ldb,
                 float* c, long ldc, bool accumulate) {
  for (int k = 0; k < depth; k += kDepth) {
    const int dk = Min(kDepth, depth - k);
    const float* ak = a + (kLayout == kAlongK ? k : k * lda);
    const float* bk = b + k * ldb;
    const bool acc = accumulate || k > 0;
    int v = 0;
    for (; v + kBlockCols <= num_vecs; v += kBlockCols) {
      GemmPanel<kBlockCols, kLayout>(m, dk, ak, lda, bk + v * kWidth, ldb, c + v * kWidth, ldc,
                                     acc);
    }
    if (kBlockCols > 2 && v + 2 <= num_vecs) {
      GemmPanel<2, kLayout>(m, dk, ak, lda, bk + v * kWidth, ldb, c + v * kWidth, ldc, acc);
      v += 2;
    }
    if (v < num_vecs) {
      GemmPanel<1, kLayout>(m, dk, ak, lda, bk + v * kWidth, ldb, c + v * kWidth, ldc, acc);
    }
  }
}

}  // namespace jfa::cpu::JFA_ISA_NAMESPACE

#endif  // JAX_FLASHATTN_CC_CPU_MICROKERNEL_H_
