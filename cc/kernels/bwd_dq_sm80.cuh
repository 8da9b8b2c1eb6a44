// dQ alone, without atomics: what `deterministic` runs beside a main kernel that leaves dQ out.
// It recomputes S and dP (7 products instead of 5), and repeats bit by bit.
//
// One CTA = one row tile of one query head; keys are walked as in the forward, and as there warp
// w owns the 16-row blocks w, w + kWarps, ..., and dS stays in registers as operand A of dS K.
// Barriers    __syncthreads only. kStages 2: K and V are loaded a block ahead; 1: after use.
// Shared      Q, dO kBlockM * (kHeadDim + kHeadDimV); K, V kStages * kBlockN * (same), times 2.
// Registers   dQ kRowBlocks * kHeadDim / 2, S and dP kRowBlocks * kBlockN / 2 each.
#ifndef JAX_FLASHATTN_CC_KERNELS_BWD_DQ_SM80_CUH_
#define JAX_FLASHATTN_CC_KERNELS_BWD_DQ_SM80_CUH_

#include "kv_source.cuh"
#include "row_scores.cuh"

namespace jfa {

template <class C>
struct BwdDqSm80 {
  static constexpr MaskKind kMask = static_cast<MaskKind>(C::kMask);
  static constexpr int kThreads = C::kWarps * kWarpSize;
  static constexpr int kRowBlocks = C::kBlockM / (16 * C::kWarps);
  static constexpr int kKeyBlocks = C::kBlockN / 16;
  static constexpr int kDimBlocks = C::kHeadDim / 16;

  using Place = RowScores<C::kWarps, kRowBlocks, kKeyBlocks>;
  using TileQ = SmemTile<C::kBlockM, C::kHeadDim>;
  using TileDo = SmemTile<C::kBlockM, C::kHeadDimV>;
  using TileK = SmemTile<C::kBlockN, C::kHeadDim>;
  using TileV = SmemTile<C::kBlockN, C::kHeadDimV>;
  static constexpr int kSmemBytes =
      TileQ::kBytes + TileDo::kBytes + C::kStages * (TileK::kBytes + TileV::kBytes);

  static_assert(C::kBlockM == kRowBlocks * 16 * C::kWarps, "every warp owns whole 16-row blocks");
  static_assert(kSmemBytes == C::kSmemBytes, "plan.cc and the kernel must agree on shared memory");
  static_assert(BwdScratch::kRowPadding % C::kBlockM == 0, "row statistics are read unchecked");

  static JFA_DEVICE void Run(const BwdParams& params, unsigned char* smem) {
    const ProblemParams& problem = params.problem;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    WorkItem work = ScheduleWork(
        blockIdx.x, NumTiles<C::kPacked, C::kBlockM>(problem, problem.q_len), problem.batch,
        problem.num_heads, problem.group,
        static_cast<int64>(problem.kv_len) * (problem.head_dim + problem.head_dim_v) * 2,
        C::kL2Bytes / 2, kMask);
    Sequence sequence;
    if (!SelectQueries<C::kPacked, C::kBlockM>(problem, kMask != MaskKind::kFull, work, sequence)) {
      return;
    }
    const int row0 = work.block * C::kBlockM;
    const int kv_head = work.head / problem.group;
    const BandMask<kMask> mask(problem, sequence);
    const SegmentIds<C::kSegments> ids(problem, work.batch, kv_head);
    auto walk = KeyWalk<kMask, C::kSegments, C::kBlockM, C::kBlockN>::template Of<kThreads>(
        mask, ids, row0, reinterpret_cast<int*>(smem));

    const uint32 smem_q = SmemAddress(smem);
    const uint32 smem_do = smem_q + TileQ::kBytes;
    const uint32 smem_k = smem_do + TileDo::kBytes;
    const uint32 smem_v = smem_k + C::kStages * TileK::kBytes;
    const TileLoader<TileK, kThreads, C::kAligned> load_k(
        RowPointer(params.k, work.batch, kv_head, sequence.kv_begin), params.k.row_stride,
        problem.head_dim);
    const TileLoader<TileV, kThreads, C::kAligned> load_v(
        RowPointer(params.v, work.batch, kv_head, sequence.kv_begin), params.v.row_stride,
        problem.head_dim_v);

    float dq[kRowBlocks][2 * kDimBlocks][4];
    Clear(dq);

    int block = walk.First();
    if (block >= 0) {
      const TileLoader<TileQ, kThreads, C::kAligned> load_q(
          RowPointer(params.q, work.batch, work.head, sequence.q_begin), params.q.row_stride,
          problem.head_dim);
      const TileLoader<TileDo, kThreads, C::kAligned> load_do(
          RowPointer(params.dout, work.batch, work.head, sequence.q_begin), params.dout.row_stride,
          problem.head_dim_v);
      load_q.Load(smem_q, row0, sequence.q_len);
      load_do.Load(smem_do, row0, sequence.q_len);
      load_k.Load(smem_k, block * C::kBlockN, sequence.kv_len);
      load_v.Load(smem_v, block * C::kBlockN, sequence.kv_len);
      CpAsyncCommit();

      const BwdScratch scratch =
          BwdScratch::Of<false, C::kHeadDim>(params, sequence, work.batch, work.head);
      float lse[2 * kRowBlocks], delta[2 * kRowBlocks];
#pragma unroll
      for (int r = 0; r < 2 * kRowBlocks; ++r) {
        const int row = row0 + 16 * (warp + C::kWarps * (r / 2)) + lane / 4 + 8 * (r % 2);
        lse[r] = scratch.lse_log2[row];
        delta[r] = scratch.delta[row];
      }
      const LogitMap<C::kSoftcap, C::kAlibi> logits(problem, sequence, work.batch, work.head);

      uint32 stage = 0;
#pragma unroll 1
      while (block >= 0) {
        const int key0 = block * C::kBlockN;
        [[maybe_unused]] const bool one_segment = walk.one_segment;
        const int next = walk.Next(block);
        const uint32 k_tile = smem_k + stage * TileK::kBytes;
        const uint32 v_tile = smem_v + stage * TileV::kBytes;
        CpAsyncWait<0>();
        __syncthreads();  // this block is there; all warps are done with the one before
        if (C::kStages == 2 && next >= 0) {
          load_k.Load(smem_k + (stage ^ 1) * TileK::kBytes, next * C::kBlockN, sequence.kv_len);
          load_v.Load(smem_v + (stage ^ 1) * TileV::kBytes, next * C::kBlockN, sequence.kv_len);
          CpAsyncCommit();
        }
        typename Place::Array s, dp;
        Clear(s);
        Gemm<C::kBf16, C::kHeadDim / 16>(
            s, Operand<TileQ, Side::kA, false, C::kWarps>(smem_q, warp, lane),
            Operand<TileK, Side::kB, false, 1>(k_tile, 0, lane));
        Clear(dp);
        Gemm<C::kBf16, C::kHeadDimV / 16>(
            dp, Operand<TileDo, Side::kA, false, C::kWarps>(smem_do, warp, lane),
            Operand<TileV, Side::kB, false, 1>(v_tile, 0, lane));
        if (mask.template NeedsMask<C::kBlockM, C::kBlockN>(row0, key0)) {
          Place::HideBand(s, mask, row0, key0);
        }
        if constexpr (C::kSegments) {
          if (!one_segment) {
            Place::HideOtherSegments(s, ids, row0, key0);
          }
        }
        const Operand<TileK, Side::kB, true, 1> op_k(k_tile, 0, lane);
#pragma unroll
        for (int k = 0; k < kKeyBlocks; ++k) {
          uint32 a[kRowBlocks][4];
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) {
            float ds[2][4];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const int r = 2 * m + e / 2, column = 16 * k + 8 * side + e % 2;
                const float distance =
                    logits.Distance(Place::RowOf(row0, r), Place::KeyOf(key0)) - column;
                const Weight weight = Weigh(logits, s[m][2 * k + side][e], distance, lse[r]);
                ds[side][e] = weight.p * (dp[m][2 * k + side][e] - delta[r]) * weight.slope;
              }
            }
            PackBlock<C::kBf16>(a[m], ds[0], ds[1]);
          }
          MmaRow<C::kBf16>(dq, a, op_k, k);
        }
        if (C::kStages == 1) {
          __syncthreads();  // all warps are done with K and V
          if (next >= 0) {
            load_k.Load(smem_k, next * C::kBlockN, sequence.kv_len);
            load_v.Load(smem_v, next * C::kBlockN, sequence.kv_len);
            CpAsyncCommit();
          }
        } else {
          stage ^= 1;
        }
        block = next;
      }
    }

    __syncthreads();  // Q makes room for dQ
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      const BlockWriter<TileQ, 1> writer(smem_q, 16 * (warp + C::kWarps * m), 0, lane);
#pragma unroll
      for (int n = 0; n < kDimBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          dq[m][2 * n][e] *= problem.scale;
          dq[m][2 * n + 1][e] *= problem.scale;
        }
        uint32 r[4];
        PackBlock<C::kBf16>(r, dq[m][2 * n], dq[m][2 * n + 1]);
        writer.Store(0, n, r);
      }
    }
    __syncthreads();
    StoreTile<TileQ, kThreads, C::kAligned>(
        smem_q, RowPointer(params.dq, work.batch, work.head, sequence.q_begin),
        params.dq.row_stride, problem.head_dim, row0, sequence.q_rows);
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_BWD_DQ_SM80_CUH_
