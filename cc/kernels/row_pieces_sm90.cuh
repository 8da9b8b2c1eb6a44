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

// A lane's row `half` (0: lane / 4, 1: + 8) of its warp's 16: the four lanes that share it exchange
// columns until each has 16 consecutive bytes. All lanes of a warp call it; `writes` may differ.
template <bool kBf16, int kBlocks>
JFA_DEVICE void StoreRow(const float (&x)[1][kBlocks][4], int half, float factor, uint16* row,
                         int columns, bool writes) {
  const int t = ReadLaneIndex() % 4;
#pragma unroll
  for (int n = 0; n < kBlocks / 4; ++n) {
    uint32 w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &x[0][4 * n + i][2 * half];
      w[i] = Pack16<kBf16>(pair[0] * factor, pair[1] * factor);
    }
    TransposeWords(w, t);
    const int column = 32 * n + 8 * t;
    if (writes && column < columns) StoreGlobal16(row + column, w);
  }
}

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_ROW_PIECES_SM90_CUH_
