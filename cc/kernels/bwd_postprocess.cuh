// After the backward: dQ = scale * (f32 sums), rounded and brought from 16 x 16 blocks into rows.
//
// One CTA = 32 rows of one query head; a warp takes whole blocks. No shared memory: four lanes
// write the 16 bytes of an 8-column piece of a row, and L2 joins the pieces.
#ifndef JAX_FLASHATTN_CC_KERNELS_BWD_POSTPROCESS_CUH_
#define JAX_FLASHATTN_CC_KERNELS_BWD_POSTPROCESS_CUH_

#include "kv_source.cuh"

namespace jfa {

template <class C>
struct BwdPostprocess {
  static constexpr int kRows = 32;
  static constexpr int kColumnBlocks = C::kHeadDim / 16;
  static constexpr int kBlocks = kRows / 16 * kColumnBlocks;
  static_assert(kBlocks % C::kWarps == 0, "warps take the same number of blocks");

  static JFA_DEVICE void StorePair(uint16* row, int column, int dim, float low, float high) {
    const uint32 pair = Pack16<C::kBf16>(low, high);
    if constexpr (C::kAligned) {
      if (column < dim) *reinterpret_cast<uint32*>(row + column) = pair;
    } else {
      if (column < dim) row[column] = static_cast<uint16>(pair);
      if (column + 1 < dim) row[column + 1] = static_cast<uint16>(pair >> 16);
    }
  }

  static JFA_DEVICE void Run(const BwdParams& params) {
    const ProblemParams& problem = params.problem;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const uint32 num_tiles = NumTiles<C::kPacked, kRows>(problem, problem.q_len);
    const uint32 head_index = blockIdx.x / num_tiles;
    const int batch = head_index / problem.num_heads, head = head_index % problem.num_heads;
    WorkItem work = {static_cast<int>(blockIdx.x - head_index * num_tiles), batch, head};
    Sequence sequence;
    if (!SelectQueries<C::kPacked, kRows>(problem, false, work, sequence)) return;
    const int row0 = work.block * kRows;
    const BwdScratch scratch = BwdScratch::Of<true, C::kHeadDim>(params, sequence, batch, head);
    const float* sums = scratch.dq + static_cast<int64>(row0) * C::kHeadDim;
    uint16* dq = RowPointer(params.dq, batch, head, sequence.q_begin);
#pragma unroll
    for (int i = 0; i < kBlocks / C::kWarps; ++i) {
      const int block = warp * (kBlocks / C::kWarps) + i;
      const int column = block % kColumnBlocks * 16 + lane % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          x[e] = problem.scale * sums[block * 256 + DqElement(half, e, lane)];
        }
        const int row = row0 + block / kColumnBlocks * 16 + lane / 4 + 8 * half;
        if (row < sequence.q_rows) {
          uint16* target = dq + row * params.dq.row_stride;
          StorePair(target, column, problem.head_dim, x[0], x[1]);
          StorePair(target, column + 8, problem.head_dim, x[2], x[3]);
        }
      }
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_BWD_POSTPROCESS_CUH_
