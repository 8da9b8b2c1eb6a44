// What a consumer warpgroup of the Hopper kernel writes: its 64 rows of output, and their LSE.
#ifndef JAX_FLASHATTN_CC_KERNELS_RESULTS_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_RESULTS_SM90_CUH_

#include "panels_sm90.cuh"
#include "row_pieces_sm90.cuh"
#include "row_scores.cuh"
#include "softmax.cuh"
#include "tiles_sm90.cuh"

namespace jfa {

template <class C>
struct ResultsSm90 {
  static constexpr int kGroupThreads = 128;
  static constexpr int kGroupRows = 64;  // of one warpgroup: M of wgmma
  static constexpr int kOutBlocks = C::kHeadDimV / 16;
  static constexpr int kPanelColumns = 64;
  static constexpr int kRowBytes = 2 * kPanelColumns;
  static constexpr int kPanels = (C::kHeadDimV + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelBytes = kGroupRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;  // in shared memory
  using Output = float[1][2 * kOutBlocks][4];
  using Tile = typename TilesSm90<C>::Tile;

  // Returns the factors of this lane's two rows of output.
  template <class Softmax>
  static JFA_DEVICE float2 StoreLse(const FwdSm90Params& params, const Tile& tile,
                                    const Softmax& softmax) {
    const ProblemParams& problem = params.fwd.problem;
    const Sequence& sequence = tile.sequence;
    float* lse = params.fwd.lse + LseRow(problem, tile.batch, tile.head) + sequence.q_begin;
    const float sink = params.fwd.sinks == nullptr
                           ? -Infinity()
                           : __ldg(params.fwd.sinks +
                                   static_cast<int64>(tile.batch) * problem.num_heads + tile.head);
    const bool writes = ReadLaneIndex() % 4 == 0;
    float normalizer[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowResult result = softmax.Finalize(half, sink);
      const int row = RowScores<4, 1, 1>::RowOf(tile.row0 - kGroupRows, half);
      if (writes && row < sequence.q_rows) {
        lse[row] = row < sequence.q_len ? result.lse : -Infinity();
      }
      normalizer[half] = result.normalizer;
    }
    return make_float2(normalizer[0], normalizer[1]);
  }

  // Normalises and writes out.
  static JFA_DEVICE void Store(const FwdSm90Params& params, uint32 smem_out, int barrier, int group,
                               const Tile& tile, float2 normalizer, const Output& out) {
    // The copy engine knows the array's end, not a packed sequence's.
    if (C::kStageOut &&
        !(C::kPacked && tile.row0 + (group + 1) * kGroupRows > tile.sequence.q_rows)) {
      StoreByEngine(params, smem_out + group * kBytes, barrier, group, tile, normalizer, out);
    } else if (C::kPacked || !C::kStageOut) {
      StoreDirectly(params, tile, normalizer, out);
    }
  }

  // Through shared memory of the warpgroup's own.
  static JFA_DEVICE void StoreByEngine(const FwdSm90Params& params, uint32 smem_out, int barrier,
                                       int group, const Tile& tile, float2 normalizer,
                                       const Output& out) {
    const int thread = ReadThreadIndex() % kGroupThreads;
    if (thread == 0) TmaStoreWaitRead();  // for the tile before
    const int row0 = tile.row0 - kGroupRows, q_len = tile.sequence.q_len;
    const bool valid0 = RowScores<4, 1, 1>::RowOf(row0, 0) < q_len,
               valid1 = RowScores<4, 1, 1>::RowOf(row0, 1) < q_len;
    NamedBarrierSync(barrier, kGroupThreads);
    const uint32 place = StmatrixPlace(smem_out, 0, thread);
#pragma unroll
    for (int n = 0; n < kOutBlocks; ++n) {
      const uint32 r[4] = {PackPair<C::kBf16>(&out[0][2 * n][0], normalizer.x, valid0),
                           PackPair<C::kBf16>(&out[0][2 * n][2], normalizer.y, valid1),
                           PackPair<C::kBf16>(&out[0][2 * n + 1][0], normalizer.x, valid0),
                           PackPair<C::kBf16>(&out[0][2 * n + 1][2], normalizer.y, valid1)};
      Stmatrix4((place ^ (n % 4 * 32)) + n / 4 * kPanelBytes, r);
    }
    FenceProxyAsync();
    NamedBarrierSync(barrier, kGroupThreads);
    if (thread == 0) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        TmaStore(&params.out, smem_out + panel * kPanelBytes, panel * kPanelColumns,
                 tile.sequence.q_begin + tile.row0 + group * kGroupRows, tile.head, tile.batch);
      }
      TmaStoreCommit();
    }
  }

  // The output of a tile without keys. Registers full of zeros are a fifth of what compiling takes
  // at head dim 256, where loops do it; at 64 these cost 1 to 3% up to S 1024, though never run.
  static JFA_DEVICE void StoreZeros(const FwdSm90Params& params, uint32 smem_out, int barrier,
                                    int group, const Tile& tile, float2 normalizer) {
    if constexpr (C::kHeadDimV <= 128) {
      Output zeros;
      Clear(zeros);
      Store(params, smem_out, barrier, group, tile, normalizer, zeros);
      return;
    }
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int row = RowScores<4, 1, 1>::RowOf(tile.row0 - kGroupRows, half);
      if (row >= tile.sequence.q_rows) return;
      uint16* out = RowPointer(params.fwd.out, tile.batch, tile.head, tile.sequence.q_begin + row);
#pragma unroll 1
      for (int column = ReadLaneIndex() % 4 * 8; column < params.fwd.problem.head_dim_v;
           column += 32) {
        StoreGlobal16(out + column, {0, 0, 0, 0}, true);
      }
    }
  }

  // Straight from registers.
  static JFA_DEVICE void StoreDirectly(const FwdSm90Params& params, const Tile& tile,
                                       float2 normalizer, const Output& out) {
    const Sequence& sequence = tile.sequence;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = RowScores<4, 1, 1>::RowOf(tile.row0 - kGroupRows, half);
      StoreRow<C::kBf16>(out, half, half ? normalizer.y : normalizer.x, row < sequence.q_len,
                         RowPointer(params.fwd.out, tile.batch, tile.head, sequence.q_begin + row),
                         params.fwd.problem.head_dim_v, row < sequence.q_rows);
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_RESULTS_SM90_CUH_
