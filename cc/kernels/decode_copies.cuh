// What brings the keys of decode.cuh to its ring of buffers: by the tensor copy engine or by
// cp.async, from dense arrays or from pages.
#ifndef JAX_FLASHATTN_CC_KERNELS_DECODE_COPIES_CUH_
#define JAX_FLASHATTN_CC_KERNELS_DECODE_COPIES_CUH_

#include "barriers.cuh"
#include "decode_share.cuh"
#include "fragments_fp8.cuh"
#include "ptx_sm90.cuh"

namespace jfa {

// Kernel: Decode<C>, whose shared memory and walk these are.
template <class C, class Kernel>
struct DecodeCopies {
  static constexpr int kPanelColumns = Kernel::kPanelColumns, kElements = Kernel::kElements;
  static constexpr int kBlockLog2 = C::kBlockN == 128 ? 7 : C::kBlockN == 64 ? 6 : 5;
  static_assert(C::kBlockN == 1 << kBlockLog2, "keys of a block");
  using PanelN = typename Kernel::PanelN;
  using Walk = typename Kernel::Walk;
  using Blocks = typename Kernel::Blocks;
  using Ring = typename Kernel::Ring;

  // Entries of the page table for the blocks of a visit that are next, 32 of them, one per lane,
  // and the 32 behind these, on their way.
  struct PageWindow {
    int first = 0, end = 0;  // blocks of the visit
    int here, ahead;

    // `per_log2`: entries of a block. Those beyond the visit's or the keys' end are never looked
    // at.
    static JFA_DEVICE int Entry(const PagesArg& pages, const Blocks& tiles,
                                const DecodeVisit& visit, int i, int per_log2) {
      const int lane = ReadLaneIndex();
      i += lane >> per_log2;
      if (i >= visit.num) return 0;
      const int key = tiles.blocks.At(visit.At(i)) * C::kBlockN +
                      ((lane & ((1 << per_log2) - 1)) << pages.page_log2);
      return key < tiles.sequence.kv_len ? PageOf(pages, tiles.sequence.table_row, key) : 0;
    }
    // Makes those of block `i` readable; a visit's blocks come in their order.
    JFA_DEVICE void MoveTo(const PagesArg& pages, const Blocks& tiles, const DecodeVisit& visit,
                           int i, int per_log2) {
      if (i > 0 && i < end) return;
      const int each = kWarpSize >> per_log2;
      here = i > 0 ? ahead : Entry(pages, tiles, visit, i, per_log2);
      ahead = Entry(pages, tiles, visit, i + each, per_log2);
      first = i;
      end = i + each;
    }
    // Entry `rest` of block `i`.
    JFA_DEVICE int PageAt(int i, int rest, int per_log2) const {
      return __shfl_sync(kFullWarp, here, ((i - first) << per_log2) + rest);
    }
  };

  // Where the rows of one block of keys are, for the lane that orders the copy of some of them.
  struct Boxes {
    int num_needed;  // with keys that count
    int kv_head, batch, row;

    // Of block `i` of the visit, which begins with key `key0`.
    JFA_DEVICE Boxes(const DecodeParams& params, const Blocks& tiles, const DecodeVisit& visit,
                     int head, int i, int key0, PageWindow& window)
        : kv_head(head) {
      const PagesArg& pages = params.fwd.pages;
      const Sequence& sequence = tiles.sequence;
      const int first = ReadLaneIndex() * params.box_rows, first_row = key0 + first;
      num_needed = Clamp(CeilDiv(Max(sequence.kv_len - key0, 0), params.box_rows), 0,
                         C::kBlockN / params.box_rows);
      batch = sequence.table_row;
      row = first_row;
      if (pages.table == nullptr) return;
      const int per_log2 = Max(kBlockLog2 - pages.page_log2, 0);
      window.MoveTo(pages, tiles, visit, i, per_log2);
      batch = window.PageAt(i, Min(first >> pages.page_log2, (1 << per_log2) - 1), per_log2);
      row = first_row & ((1 << pages.page_log2) - 1);
    }
  };

  // A block of K or V, by one warp whose lanes each order a box; or by two, for each other box, of
  // which number 0 says how much comes. Number 1 arrives even where it has no box to order. Else
  // nobody would wait for it, and a whole ring behind it would take a buffer's parity for the wrong
  // turn.
  enum Share { kEven, kOdd, kAll };
  static JFA_DEVICE bool SharesBoxes(const PagesArg& pages) {
    return C::kTma && Kernel::kProducerWarps == 4 && pages.table != nullptr;
  }
  template <int kNumPanels>
  static JFA_DEVICE void LoadByEngine(const TensorMap* map, const Boxes& boxes, int box_rows,
                                      uint32 stage, uint32 full, Share share) {
    const int lane = ReadLaneIndex();
    if (lane == 0) {
      if (share == kOdd) {
        MbarrierArrive(full);
      } else {
        MbarrierArriveExpect(full, boxes.num_needed * box_rows * PanelN::kPitch * kNumPanels);
      }
    }
    __syncwarp();
    if (lane < boxes.num_needed && (share == kAll || lane % 2 == share)) {
      const uint32 target = stage + lane * box_rows * PanelN::kPitch;
#pragma unroll
      for (int panel = 0; panel < kNumPanels; ++panel) {
        // The map of pairs has all heads beside each other in a row.
        constexpr bool kPairs = C::kTileHeads == 2;
        const int column = panel * kPanelColumns * kElements + (kPairs ? 128 * boxes.kv_head : 0);
        TmaLoad(target + panel * PanelN::kBytes, map, full, column, boxes.row,
                kPairs ? 0 : boxes.kv_head, boxes.batch, kL2EvictNormal);
      }
    }
  }

  // The same by all producers, 16 bytes each at a time; rows beyond the keys become zeros.
  template <int kNumPanels>
  static JFA_DEVICE void LoadByThreads(const DecodeParams& params, const TensorArg& tensor, int dim,
                                       const Sequence& sequence, int kv_head, int key0,
                                       uint32 stage, uint32 full) {
    constexpr int kChunks = kPanelColumns / 8,
                  kRowStep = Kernel::kProducerWarps * kWarpSize / kChunks;
    const PagesArg& pages = params.fwd.pages;
    const int thread = ReadThreadIndex() - Kernel::kConsumers, chunk = thread % kChunks;
#pragma unroll 4
    for (int i = thread / kChunks; i < C::kBlockN; i += kRowStep) {
      const int key = key0 + i;
      const bool valid = key < sequence.kv_len;
      int batch = sequence.table_row, row = valid ? key : 0;
      if (pages.table != nullptr) {
        batch = valid ? PageOf(pages, sequence.table_row, key) : 0;
        row &= (1 << pages.page_log2) - 1;
      }
      const uint16* source = RowPointer(tensor, batch, kv_head, row) + chunk * 8;
      const uint32 target = stage + PanelN::Offset(i, chunk);
#pragma unroll
      for (int panel = 0; panel < kNumPanels; ++panel) {
        const bool in_row = panel * kPanelColumns + chunk * 8 < dim;
        CpAsync16(target + panel * PanelN::kBytes, source + panel * kPanelColumns,
                  valid && in_row ? 16 : 0);
      }
    }
    MbarrierArriveAfterCopies(full);
  }

  // With the copy engine one warp brings all; or, of pages, the blocks of K, and another one those
  // of V, or two each, because ordering the rows of a page takes a warp 50 ns.
  static JFA_DEVICE void Produce(const DecodeParams& params, uint32 smem) {
    const FwdParams& fwd = params.fwd;
    const bool paged = fwd.pages.table != nullptr;
    const int warp = (ReadThreadIndex() - Kernel::kConsumers) / kWarpSize;
    if (C::kTma && warp > 0 && !paged) return;
    const bool brings_k = warp % 2 == 0, brings_v = warp % 2 == 1 || !paged;
    const Share share = !SharesBoxes(fwd.pages) ? kAll : warp < 2 ? kEven : kOdd;
    Walk walk(params, blockIdx.x);
    Ring ring;
    PageWindow window;
    uint32 stage, full;
    const auto next_stage = [&] {
      MbarrierWait(Kernel::Empty(smem, ring.stage), ring.parity ^ 1);
      stage = smem + ring.stage * Kernel::kStageBytes;
      full = Kernel::Full(smem, ring.stage);
      ring.Advance();
    };
    while (!walk.AtEnd()) {
      const Blocks tiles(fwd.problem, walk.batch);
      const int count = tiles.Count(), kv_head = walk.unit / params.row_tiles;
      const DecodeVisit visit = walk.VisitOf(count);
      for (int i = 0; i < visit.num; ++i) {
        const int key0 = tiles.blocks.At(visit.At(i)) * C::kBlockN;
        if constexpr (C::kTma) {
          const Boxes boxes(params, tiles, visit, kv_head, i, key0, window);
          if (brings_k) {
            next_stage();
            LoadByEngine<Kernel::kPanelsK>(&params.k, boxes, params.box_rows, stage, full, share);
          } else {
            ring.Advance();
          }
          if (brings_v) {
            next_stage();
            LoadByEngine<Kernel::kPanelsV>(&params.v, boxes, params.box_rows, stage, full, share);
          } else {
            ring.Advance();
          }
        } else {
          next_stage();
          LoadByThreads<Kernel::kPanelsK>(params, ColumnsOf<C::kFp8>(fwd.k),
                                          fwd.problem.head_dim / kElements, tiles.sequence, kv_head,
                                          key0, stage, full);
          next_stage();
          LoadByThreads<Kernel::kPanelsV>(params, ColumnsOf<C::kFp8>(fwd.v),
                                          fwd.problem.head_dim_v / kElements, tiles.sequence,
                                          kv_head, key0, stage, full);
        }
      }
      walk.Advance(count);
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_DECODE_COPIES_CUH_
