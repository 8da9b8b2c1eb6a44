// What the Hopper kernel's producers order of the copy engine: tiles of Q, and blocks of K and V,
// dense or in pages.
#ifndef JAX_FLASHATTN_CC_KERNELS_COPIES_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_COPIES_SM90_CUH_

#include "panels_sm90.cuh"
#include "tiles_sm90.cuh"

namespace jfa {

template <class C>
struct CopiesSm90 {
  static constexpr int kRowBytes = 128;                       // of a box, which the engine swizzles
  static constexpr int kKeyColumns = C::kFp8 ? 128 : 64;      // elements in them
  static constexpr int kPanelBytes = C::kBlockN * kRowBytes;  // of a block of keys
  using Tile = typename TilesSm90<C>::Tile;

  // Where a block of keys is: of a paged call each lane knows the rows of one box.
  struct KeyPlace {
    int row = -1, head, batch;  // row -1: nowhere
    int num_boxes;

    JFA_DEVICE void Set(const FwdSm90Params& params, const Tile& tile, int block) {
      const int key0 = block * C::kBlockN;
      head = tile.kv_head;
      if constexpr (C::kPaged) {
        const PagesArg& pages = params.fwd.pages;
        const int key = key0 + ReadLaneIndex() * params.box_rows,
                  left = tile.sequence.kv_len - key0;
        // What lies beyond the keys isn't looked at.
        num_boxes = Min(C::kBlockN, left + params.box_rows - 1) / params.box_rows;
        const bool valid = block >= 0 && key < tile.sequence.kv_len;
        batch = valid ? PageOf(pages, tile.sequence.table_row, key) : 0;
        row = key & ((1 << pages.page_log2) - 1);
      } else {
        row = tile.sequence.kv_begin + key0;
        batch = tile.batch;
      }
    }
  };

  // A block of K or V, when its buffer is empty. All lanes wait for that: one that waits alone
  // polls on and on, where a warp sleeps.
  template <int kPanelCount>
  static JFA_DEVICE void LoadKeys(const FwdSm90Params& params, const TensorMap* map, uint32 target,
                                  uint32 full, uint32 empty, uint32 parity, const KeyPlace& place,
                                  bool leader) {
    MbarrierWait(empty, parity ^ 1);
    if constexpr (C::kPaged) {
      const int lane = ReadLaneIndex();
      if (leader) {
        MbarrierArriveExpect(full, place.num_boxes * params.box_rows * kRowBytes * kPanelCount);
      }
      __syncwarp();
      if (lane < place.num_boxes) {
#pragma unroll
        for (int panel = 0; panel < kPanelCount; ++panel) {
          TmaLoad(target + panel * kPanelBytes + lane * params.box_rows * kRowBytes, map, full,
                  panel * kKeyColumns, place.row, place.head, place.batch, kL2EvictLast);
        }
      }
      __syncwarp();
    } else if (leader) {
      LoadTile<kPanelCount, kPanelBytes, kKeyColumns>(map, target, full, place.row, place.head,
                                                      place.batch, kL2EvictLast);
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_COPIES_SM90_CUH_
