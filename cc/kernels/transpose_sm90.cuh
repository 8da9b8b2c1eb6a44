// A block of V of 8-bit floats [keys, dims] in shared memory, transposed to [dims, keys]: what the
// tensor cores want, for 8-bit products only take operands with the inner dimension along rows.
//
// ldmatrix.trans moves pairs of bytes: lane (c, t), c = lane / 4, gets of 8 x 8 pairs keys 2t and
// 2t + 1, dims 2c and 2c + 1. Of two such registers, 8 keys apart, byte permutes make one of dim 2c
// and one of dim 2c + 1, which stmatrix writes as four neighbours of a row of V^T. So
//   keys  2t, 2t + 1, 2t + 8, 2t + 9 of 16 end at 4t .. 4t + 3. That is also which keys a lane's
//         accumulators of S hold where the operand P wants four neighbours: P needs no exchange.
//   dims  come as eight even and eight odd ones. Rows 2c of 1024 bytes would meet in half of the
//         banks; so dim 8g + 2t + e of 16 becomes row 8e + 2t + g: eight rows in eight places, and
//         a lane finds the output's neighbouring columns among its own registers (Unpermute).
// Source and target lie in panels of 128-byte rows under the 128-byte swizzle.
#ifndef JAX_FLASHATTN_CC_KERNELS_TRANSPOSE_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_TRANSPOSE_SM90_CUH_

#include "ptx_fp8_sm90.cuh"

namespace jfa {

// For kWarps warps, of which the first is warp 1 of the CTA.
template <int kKeys, int kDims, int kWarps, int kMostAtOnce>
struct TransposeSm90 {
  static constexpr int kRowBytes = 128;
  static constexpr int kChunks = kDims / 16;                         // of 16 bytes in a row of V
  static constexpr int kBatch = kChunks % 4 == 0 ? kMostAtOnce : 2;  // chunks read at once
  static constexpr int kBatches = kChunks / kBatch;                  // per 32 keys
  static constexpr int kItems = kBatches * (kKeys / 32);
  static_assert(kMostAtOnce == 2 || kMostAtOnce == 4, "a batch is a power of two: see `from`");
  static_assert(kChunks % kBatch == 0 && kKeys % 32 == 0, "whole items only");

  // The bytes of a register of V^T whose keys are below `count`.
  static JFA_DEVICE uint32 KeyMask(int count, int t) {
    const int low = Clamp(count - 2 * t, 0, 2), high = Clamp(count - 2 * t - 8, 0, 2);
    return ((1u << 8 * low) - 1) | ((1u << 8 * high) - 1) << 16;
  }

  // Keys from `count` on become zero: padding may hold NaN, which a weight of zero doesn't silence.
  static JFA_DEVICE void Block(uint32 source, uint32 target, int count) {
    const int lane = ReadLaneIndex(), warp = ReadThreadIndex() / kWarpSize - 1;
    // ldmatrix: this lane's key. stmatrix: its row, of even dims or odd, and which 16 keys.
    const int row = (lane & 8) + 2 * (lane & 3) + (lane >> 2 & 1), half = lane >> 4;
#pragma unroll 1
    for (int item = warp; item < kItems; item += kWarps) {
      const int step = item / kBatches, chunk0 = item % kBatches * kBatch;
      const uint32 from = source + (32 * step + lane) * kRowBytes +
                          chunk0 / 8 * (kKeys * kRowBytes) + (((chunk0 ^ lane) & 7) << 4);
      const uint32 to = target + step / 4 * (kDims * kRowBytes) + (16 * chunk0 + row) * kRowBytes +
                        (((step % 4 * 2 + half) ^ (row & 7)) << 4);
      uint32 r[kBatch][4];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) Ldmatrix4Trans(r[i], from ^ (i << 4));
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const uint32 a = r[i][0], b = r[i][1], c = r[i][2], d = r[i][3];
        r[i][0] = Permute<0x6420>(a, b);
        r[i][1] = Permute<0x7531>(a, b);
        r[i][2] = Permute<0x6420>(c, d);
        r[i][3] = Permute<0x7531>(c, d);
      }
      if (count < 32 * (step + 1)) {
        const uint32 mask0 = KeyMask(count - 32 * step, lane & 3),
                     mask1 = KeyMask(count - 32 * step - 16, lane & 3);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          r[i][0] &= mask0;
          r[i][1] &= mask0;
          r[i][2] &= mask1;
          r[i][3] &= mask1;
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) Stmatrix4(to + i * 16 * kRowBytes, r[i]);
    }
  }

  // Output of V's columns in their order from that of V^T's rows.
  template <int kN>
  static JFA_DEVICE void Unpermute(float (&sorted)[1][kN][4], const float (&out)[1][kN][4]) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sorted[0][n][e] = out[0][n / 2 * 2 + e % 2][e / 2 * 2 + n % 2];
      }
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_TRANSPOSE_SM90_CUH_
