// Rows of a wgmma accumulator, straight from registers to memory in 16-byte pieces.
#ifndef JAX_FLASHATTN_CC_KERNELS_ROW_PIECES_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_ROW_PIECES_SM90_CUH_

#include "ptx_sm90.cuh"
#include "tile.cuh"

namespace jfa {

// Four words of each of four lanes: lane t gets everybody's word t.
JFA_DEVICE void TransposeWords(uint32 (&w)[4], int t) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool high = t & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32 got = __shfl_xor_sync(kFullWarp, high ? w[i] : w[i | bit], bit);
      (high ? w[i] : w[i | bit]) = got;
    }
  }
}

// Two neighbours times `factor`, or zeros: a select, not a product with zero, for x may be NaN
// where it isn't valid.
template <bool kBf16>
JFA_DEVICE uint32 PackPair(const float* x, float factor, bool valid) {
  return valid ? Pack16<kBf16>(x[0] * factor, x[1] * factor) : 0;
}

// A lane's row `half` (0: lane / 4, 1: + 8) of its warp's 16: the four lanes that share it exchange
// columns until each has 16 consecutive bytes. All lanes of a warp call it; `valid` and `writes`
// may differ.
template <bool kBf16, int kBlocks>
JFA_DEVICE void StoreRow(const float (&x)[1][kBlocks][4], int half, float factor, bool valid,
                         uint16* row, int columns, bool writes) {
  const int t = ReadLaneIndex() % 4;
  uint16* target = row + 8 * t;
  const int left = writes ? columns - 8 * t : 0;  // columns from `target` on
#pragma unroll
  for (int n = 0; n < kBlocks / 4; ++n) {
    uint32 w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      w[i] = PackPair<kBf16>(&x[0][4 * n + i][2 * half], factor, valid);
    }
    TransposeWords(w, t);
    StoreGlobal16(target + 32 * n, w, 32 * n < left);
  }
}

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_ROW_PIECES_SM90_CUH_
