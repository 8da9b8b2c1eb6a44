// Tiles in shared memory as Hopper's copy engine and wgmma want them: panels of rows of 128 bytes,
// whose 16-byte chunks are permuted by the row's number modulo 8 (the 128-byte swizzle).
#ifndef JAX_FLASHATTN_CC_KERNELS_PANELS_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_PANELS_SM90_CUH_

#include "ptx_sm90.cuh"

namespace jfa {

// Rows that lie together in memory, by one lane; kColumns elements make a row of a panel.
template <int kPanels, int kPanelBytes, int kColumns>
JFA_DEVICE void LoadPanels(uint32 target, const TensorMap* map, uint32 barrier, int row, int head,
                           int batch, uint64 policy) {
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    TmaLoad(target + panel * kPanelBytes, map, barrier, panel * kColumns, row, head, batch, policy);
  }
}

// Zeros in rows [first, end), by one warpgroup. The copy engine writes zeros for what lies beyond
// an array; this is for what lies beyond a sequence's end, which may hold NaN: a weight of zero
// doesn't silence that.
template <int kPanels, int kPanelBytes>
JFA_DEVICE void ClearRows(uint32 tile, int first, int end) {
  constexpr int kThreads = 128;
  for (int i = first * 8 + static_cast<int>(ReadThreadIndex() % kThreads); i < end * 8;
       i += kThreads) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      StoreShared16(tile + panel * kPanelBytes + i * 16, make_uint4(0, 0, 0, 0));
    }
  }
}

// The place for Stmatrix4 of this lane's row of a warpgroup's 64 x 16 block of 16 bits, whose rows
// begin at `row0` of a panel. That of the block 16 columns to the right differs by an XOR with 32.
JFA_DEVICE uint32 StmatrixPlace(uint32 panel, int row0) {
  const int thread = ReadThreadIndex() % 128, lane = thread % kWarpSize;
  return panel + (row0 + thread / kWarpSize * 16 + (lane & 15)) * 128 +
         (((lane >> 4) ^ (lane & 7)) << 4);
}

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_PANELS_SM90_CUH_
