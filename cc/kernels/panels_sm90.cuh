// Tiles in shared memory as Hopper's copy engine and wgmma want them: panels of rows of 128 bytes,
// whose 16-byte chunks are permuted by the row's number modulo 8 (the 128-byte swizzle).
#ifndef JAX_FLASHATTN_CC_KERNELS_PANELS_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_PANELS_SM90_CUH_

#include "ptx_sm90.cuh"

namespace jfa {

// Rows that lie together in memory, by one lane; kColumns elements make a row of a panel.
template <int kPanels, int kPanelBytes, int kColumns>
JFA_DEVICE void LoadPanels(const TensorMap* map, uint32 target, uint32 barrier, int row, int head,
                           int batch, uint64 policy) {
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    TmaLoad(target + panel * kPanelBytes, map, barrier, panel * kColumns, row, head, batch, policy);
  }
}
// The same, and all that the engine brings for this phase of the barrier.
template <int kPanels, int kPanelBytes, int kColumns>
JFA_DEVICE void LoadTile(const TensorMap* map, uint32 target, uint32 barrier, int row, int head,
                         int batch, uint64 policy) {
  MbarrierArriveExpect(barrier, kPanels * kPanelBytes);
  LoadPanels<kPanels, kPanelBytes, kColumns>(map, target, barrier, row, head, batch, policy);
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

// Where Stmatrix4 writes a warpgroup's 64 x 16 block of 16 bits whose rows begin at `row0` of a
// panel, for one of its 128 threads. The block 16 columns to the right is at that XOR 32.
JFA_DEVICE uint32 StmatrixPlace(uint32 panel, int row0, int thread) {
  const int lane = thread % kWarpSize;
  return panel + (row0 + thread / kWarpSize * 16 + (lane & 15)) * 128 +
         (((lane >> 4) ^ (lane & 7)) << 4);
}

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_PANELS_SM90_CUH_
