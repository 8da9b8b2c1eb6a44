// Backward attention with mma.sync: dK and dV, and dQ by atomic adds.
//
//   one CTA = one key tile of one key head; it walks the query heads of the group and their rows
//
//        rows i (kBlockM at a time) ->
//       +-----------+
//   j   |  S^T, P^T |   S^T  = K Q^T            dV += P^T dO
//  keys | dP^T, dS^T|   dP^T = V dO^T           dK += dS^T Q
//       +-----------+   dS   = P (dP - delta)   dQ += dS K      (f32 sums in global memory)
//
// Warps       all alike, arranged three times anew, since the three products have other shapes:
//             S^T and dP^T  kWarpsScoreN over keys x the rest over rows;
//             dK and dV     kWarpsKvN over keys x the rest over columns;
//             dQ            kWarpsDqM over rows x the rest over columns.
//             P^T and dS^T pass between them through shared memory. Giving each warp 16 keys for
//             all rows would keep P^T in registers, but needs a quarter more reads of Q and dO, and
//             shared-memory reads are what bounds this kernel.
// Barriers    __syncthreads: (1) Q, dO of this step are there, and P, dS of the last are done with;
//             (2) P, dS are there; with kStages 1 (3) Q, dO are done with: load the next ones,
//             under the dQ product.
// Shared      K, V kBlockN * (kHeadDim + kHeadDimV); Q, dO kStages * kBlockM * (same); P^T, dS^T
//             2 * kBlockN * kBlockM; times 2 bytes; LSE and delta kStages * kBlockM * 8 bytes.
// Registers   dK and dV kBlockN * (kHeadDim + kHeadDimV) / threads, S and dP (or dQ) at one time
//             2 * kBlockM * kBlockN / threads.
#ifndef JAX_FLASHATTN_CC_KERNELS_BWD_SM80_CUH_
#define JAX_FLASHATTN_CC_KERNELS_BWD_SM80_CUH_

#include "kv_source.cuh"
#include "logits.cuh"
#include "mask.cuh"

namespace jfa {

template <class C>
struct BwdSm80 {
  static constexpr MaskKind kMask = static_cast<MaskKind>(C::kMask);
  static constexpr int kThreads = C::kWarps * kWarpSize;
  static constexpr int kWarpsScoreM = C::kWarps / C::kWarpsScoreN;
  static constexpr int kWarpsKvD = C::kWarps / C::kWarpsKvN;
  static constexpr int kWarpsDqD = C::kWarps / C::kWarpsDqM;
  static constexpr int kM = C::kBlockM, kN = C::kBlockN;

  using TileK = SmemTile<kN, C::kHeadDim>;
  using TileV = SmemTile<kN, C::kHeadDimV>;
  using TileQ = SmemTile<kM, C::kHeadDim>;
  using TileDo = SmemTile<kM, C::kHeadDimV>;
  using TileP = SmemTile<kN, kM>;
  static constexpr int kRowStatBytes = kM * 4;
  static constexpr int kSmemBytes = TileK::kBytes + TileV::kBytes +
                                    C::kStages * (TileQ::kBytes + TileDo::kBytes) +
                                    2 * TileP::kBytes + C::kStages * 2 * kRowStatBytes;

  // 16 x 16 blocks per warp in each of the three arrangements.
  static constexpr int kScoreN = kN / 16 / C::kWarpsScoreN, kScoreM = kM / 16 / kWarpsScoreM;
  static constexpr int kKvN = kN / 16 / C::kWarpsKvN;
  static constexpr int kKvD = C::kHeadDim / 16 / kWarpsKvD, kKvDv = C::kHeadDimV / 16 / kWarpsKvD;
  static constexpr int kDqM = kM / 16 / C::kWarpsDqM, kDqD = C::kHeadDim / 16 / kWarpsDqD;

  static_assert(kScoreN * 16 * C::kWarpsScoreN == kN && kScoreM * 16 * kWarpsScoreM == kM,
                "warps must tile the scores in whole 16 x 16 blocks");
  static_assert(kKvN * 16 * C::kWarpsKvN == kN && kKvD * 16 * kWarpsKvD == C::kHeadDim &&
                    kKvDv * 16 * kWarpsKvD == C::kHeadDimV,
                "warps must tile dK and dV in whole 16 x 16 blocks");
  static_assert(kDqM * 16 * C::kWarpsDqM == kM && kDqD * 16 * kWarpsDqD == C::kHeadDim,
                "warps must tile dQ in whole 16 x 16 blocks");
  static_assert(kSmemBytes == C::kSmemBytes, "plan.cc and the kernel must agree on shared memory");
  static_assert(BwdScratch::kRowPadding % kM == 0, "row statistics are read in whole tiles");
  static_assert(C::kStages == 1 || C::kStages == 2, "the loop knows one or two buffers");
  static_assert(C::kWarps <= kN / 8, "SlopePartials() of plan.h counts on it");
  static_assert(2 * kM * 4 / 16 <= kThreads, "one thread copies one chunk of the row statistics");

  // This warp's place in an arrangement with kOuter warps along the outer dimension. Found anew for
  // each product: dozens of addresses follow from it, and kept from step to step they would spill.
  template <int kOuter>
  struct Place {
    int lane, outer, inner;
    JFA_DEVICE Place() {
      const int thread = ReadThreadIndex(), warp = thread / kWarpSize;
      lane = thread % kWarpSize;
      outer = warp % kOuter;
      inner = warp / kOuter;
    }
  };

  using Walk = RowWalk<kMask, C::kSegments, kM, kN>;
  using Ids = SegmentIds<C::kSegments>;
  using Logits = LogitMap<C::kSoftcap, C::kAlibi>;

  // What the CTA walks: (query head of the group, row tile), rows fastest.
  struct Step {
    int head, block;
    JFA_DEVICE Step Next(const Walk& walk) const {
      const int next = walk.Next(block);
      return next < walk.rows.end ? Step{head, next} : Step{head + 1, walk.First()};
    }
  };

  static JFA_DEVICE void LoadStep(const BwdParams& params, const Sequence& sequence, int batch,
                                  const Step& step, uint32 smem_q, uint32 smem_do,
                                  uint32 smem_stats) {
    const ProblemParams& problem = params.problem;
    const int row0 = step.block * kM;
    const TileLoader<TileQ, kThreads, C::kAligned> load_q(
        RowPointer(params.q, batch, step.head, sequence.q_begin), params.q.row_stride,
        problem.head_dim);
    const TileLoader<TileDo, kThreads, C::kAligned> load_do(
        RowPointer(params.dout, batch, step.head, sequence.q_begin), params.dout.row_stride,
        problem.head_dim_v);
    load_q.Load(smem_q, row0, sequence.q_len);
    load_do.Load(smem_do, row0, sequence.q_len);
    const int thread = ReadThreadIndex();
    if (thread < 2 * kM / 4) {
      const BwdScratch scratch =
          BwdScratch::Of<C::kDqSums, C::kHeadDim>(params, sequence, batch, step.head);
      const int part = thread / (kM / 4), index = thread % (kM / 4) * 4;
      CpAsync16(smem_stats + part * kRowStatBytes + index * 4,
                (part == 0 ? scratch.lse_log2 : scratch.delta) + row0 + index, 16);
    }
  }

  // Adds this warp's part of a dQ tile to the sums, block by block.
  static JFA_DEVICE void AddDq(float* sums, const float (&dq)[kDqM][2 * kDqD][4], int row0,
                               int q_len, int part_m, int part_d, int lane) {
#pragma unroll
    for (int m = 0; m < kDqM; ++m) {
      const int row_block = row0 / 16 + part_m + C::kWarpsDqM * m;
      if (row_block * 16 < q_len) {
#pragma unroll
        for (int n = 0; n < kDqD; ++n) {
          float* block =
              sums +
              (static_cast<int64>(row_block) * (C::kHeadDim / 16) + part_d + kWarpsDqD * n) * 256;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float (&left)[4] = dq[m][2 * n];
            const float (&right)[4] = dq[m][2 * n + 1];
#if __CUDA_ARCH__ >= 900
            RedAdd4(block + DqElement(half, 0, lane), left[2 * half], left[2 * half + 1],
                    right[2 * half], right[2 * half + 1]);
#else
            RedAdd(block + DqElement(half, 0, lane), left[2 * half]);
            RedAdd(block + DqElement(half, 1, lane), left[2 * half + 1]);
            RedAdd(block + DqElement(half, 2, lane), right[2 * half]);
            RedAdd(block + DqElement(half, 3, lane), right[2 * half + 1]);
#endif
          }
        }
      }
    }
  }

  template <class Tile, int kD>
  static JFA_DEVICE void StageGradient(uint32 tile, float (&acc)[kKvN][2 * kD][4], float factor,
                                       int part_n, int part_d, int lane) {
#pragma unroll
    for (int j = 0; j < kKvN; ++j) {
      const BlockWriter<Tile, kWarpsKvD> writer(tile, 16 * (part_n + C::kWarpsKvN * j), part_d,
                                                lane);
#pragma unroll
      for (int n = 0; n < kD; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          acc[j][2 * n][e] *= factor;
          acc[j][2 * n + 1][e] *= factor;
        }
        uint32 r[4];
        PackBlock<C::kBf16>(r, acc[j][2 * n], acc[j][2 * n + 1]);
        writer.Store(0, n, r);
      }
    }
  }

  static JFA_DEVICE void Run(const BwdParams& params, unsigned char* smem) {
    const ProblemParams& problem = params.problem;
    // Key tile 0 is seen by most rows of a causal mask, so tiles in order are longest first.
    WorkItem work =
        ScheduleWork(blockIdx.x, NumTiles<C::kPacked, kN>(problem, problem.kv_len), problem.batch,
                     problem.num_kv_heads, 1,
                     static_cast<int64>(problem.q_len) * problem.group *
                         (problem.head_dim * (C::kDqSums ? 6 : 2) + problem.head_dim_v * 2),
                     C::kL2Bytes / 2, kMask);
    const int tile = work.block;
    Sequence sequence;
    if (!SelectKeys<C::kPacked, kN>(problem, work, sequence)) return;
    const int key0 = work.block * kN;
    const BandMask<kMask> mask(problem, sequence);
    const Ids ids(problem, work.batch, work.head);
    const Walk walk = Walk::template Of<kThreads>(mask, ids, key0, reinterpret_cast<int*>(smem));
    Logits logits(problem, sequence, work.batch, work.head * problem.group);

    const uint32 smem_k = SmemAddress(smem);
    const uint32 smem_v = smem_k + TileK::kBytes;
    const uint32 smem_q = smem_v + TileV::kBytes;
    const uint32 smem_do = smem_q + C::kStages * TileQ::kBytes;
    const uint32 smem_p = smem_do + C::kStages * TileDo::kBytes;
    const uint32 smem_ds = smem_p + TileP::kBytes;
    const uint32 smem_stats = smem_ds + TileP::kBytes;

    float dk[kKvN][2 * kKvD][4], dv[kKvN][2 * kKvDv][4];
    Clear(dk);
    Clear(dv);

    if (walk.First() < walk.rows.end) {
      const TileLoader<TileK, kThreads, C::kAligned> load_k(
          RowPointer(params.k, work.batch, work.head, sequence.kv_begin), params.k.row_stride,
          problem.head_dim);
      const TileLoader<TileV, kThreads, C::kAligned> load_v(
          RowPointer(params.v, work.batch, work.head, sequence.kv_begin), params.v.row_stride,
          problem.head_dim_v);
      load_k.Load(smem_k, key0, sequence.kv_len);
      load_v.Load(smem_v, key0, sequence.kv_len);

      Step step{work.head * problem.group, walk.First()};
      const int head_end = step.head + problem.group;
      LoadStep(params, sequence, work.batch, step, smem_q, smem_do, smem_stats);
      CpAsyncCommit();

      uint32 stage = 0;
      float dslope = 0.f;
#pragma unroll 1
      while (step.head < head_end) {
        const int row0 = step.block * kM;
        const Step next = step.Next(walk);
        const uint32 q = smem_q + stage * TileQ::kBytes;
        const uint32 dout = smem_do + stage * TileDo::kBytes;
        const uint32 stats = smem_stats + stage * 2 * kRowStatBytes;

        CpAsyncWait<0>();
        __syncthreads();  // (1)
        if (C::kStages == 2 && next.head < head_end) {
          const uint32 other = stage ^ 1;
          LoadStep(params, sequence, work.batch, next, smem_q + other * TileQ::kBytes,
                   smem_do + other * TileDo::kBytes, smem_stats + other * 2 * kRowStatBytes);
          CpAsyncCommit();
        }

        Scores(mask, ids, walk, step, logits, q, dout, stats, smem_k, smem_v, smem_p, smem_ds, key0,
               dslope);
        __syncthreads();  // (2)

        {
          const Place<C::kWarpsKvN> kv;
          Gemm<C::kBf16, kM / 16>(
              dv, Operand<TileP, Side::kA, false, C::kWarpsKvN>(smem_p, kv.outer, kv.lane),
              Operand<TileDo, Side::kB, true, kWarpsKvD>(dout, kv.inner, kv.lane));
          Gemm<C::kBf16, kM / 16>(
              dk, Operand<TileP, Side::kA, false, C::kWarpsKvN>(smem_ds, kv.outer, kv.lane),
              Operand<TileQ, Side::kB, true, kWarpsKvD>(q, kv.inner, kv.lane));
        }
        if (C::kStages == 1) {
          __syncthreads();  // (3)
          if (next.head < head_end) {
            LoadStep(params, sequence, work.batch, next, smem_q, smem_do, smem_stats);
            CpAsyncCommit();
          }
        }
        if constexpr (C::kDqSums) {
          const Place<C::kWarpsDqM> at;
          float dq[kDqM][2 * kDqD][4];
          Clear(dq);
          Gemm<C::kBf16, kN / 16>(
              dq, Operand<TileP, Side::kA, true, C::kWarpsDqM>(smem_ds, at.outer, at.lane),
              Operand<TileK, Side::kB, true, kWarpsDqD>(smem_k, at.inner, at.lane));
          const BwdScratch scratch =
              BwdScratch::Of<true, C::kHeadDim>(params, sequence, work.batch, step.head);
          AddDq(scratch.dq, dq, row0, sequence.q_len, at.outer, at.inner, at.lane);
        }
        if (C::kStages == 2) stage ^= 1;
        if (C::kAlibi && next.head != step.head) {
          if constexpr (C::kDslopes) StoreSlope(params, work.batch, step.head, tile, dslope);
          dslope = 0.f;
          if (next.head < head_end) logits.SetHead(problem, work.batch, next.head);
        }
        step = next;
      }
      __syncthreads();  // K and V make room for dK and dV
    }

    const Place<C::kWarpsKvN> kv;
    StageGradient<TileK, kKvD>(smem_k, dk, problem.scale, kv.outer, kv.inner, kv.lane);
    StageGradient<TileV, kKvDv>(smem_v, dv, 1.f, kv.outer, kv.inner, kv.lane);
    __syncthreads();
    StoreTile<TileK, kThreads, C::kAligned>(
        smem_k, RowPointer(params.dk, work.batch, work.head, sequence.kv_begin),
        params.dk.row_stride, problem.head_dim, key0, sequence.kv_rows);
    StoreTile<TileV, kThreads, C::kAligned>(
        smem_v, RowPointer(params.dv, work.batch, work.head, sequence.kv_begin),
        params.dv.row_stride, problem.head_dim_v, key0, sequence.kv_rows);
  }

  // Each warp's sum into a place of its own, so that the sum of all has one order.
  static JFA_DEVICE void StoreSlope(const BwdParams& params, int batch, int head, int tile,
                                    float dslope) {
    const float sum = WarpSum(dslope);
    const int thread = ReadThreadIndex();
    if (thread % kWarpSize == 0) {
      const int64 row = static_cast<int64>(batch) * params.problem.num_heads + head;
      params.dslopes[row * params.slope_partials + tile * C::kWarps + thread / kWarpSize] = sum;
    }
  }

  // The key of this lane's element r / 2, r % 2, and its first row in a block.
  static JFA_DEVICE int KeyOf(const Place<C::kWarpsScoreN>& place, int key0, int r) {
    return key0 + 16 * (place.outer + C::kWarpsScoreN * (r / 2)) + place.lane / 4 + r % 2 * 8;
  }
  static JFA_DEVICE int RowOf(const Place<C::kWarpsScoreN>& place, int row0) {
    return row0 + 16 * place.inner + place.lane % 4 * 2;
  }
  // Element (i, e) along a lane's rows, from RowOf on.
  static constexpr JFA_DEVICE int RowStep(int i, int e) {
    return 16 * kWarpsScoreM * (i / 2) + i % 2 * 8 + e;
  }

  // S^T and dP^T of one step, and from them P^T and dS^T into shared memory.
  static JFA_DEVICE void Scores(const BandMask<kMask>& mask, const Ids& ids, const Walk& walk,
                                const Step& step, const Logits& logits, uint32 q, uint32 dout,
                                uint32 stats, uint32 smem_k, uint32 smem_v, uint32 smem_p,
                                uint32 smem_ds, int key0, float& dslope) {
    const int row0 = step.block * kM;
    const Place<C::kWarpsScoreN> place;
    const int score_n = place.outer, score_m = place.inner, lane = place.lane;
    float s[kScoreN][2 * kScoreM][4], dp[kScoreN][2 * kScoreM][4];
    Clear(s);
    Gemm<C::kBf16, C::kHeadDim / 16>(
        s, Operand<TileK, Side::kA, false, C::kWarpsScoreN>(smem_k, score_n, lane),
        Operand<TileQ, Side::kB, false, kWarpsScoreM>(q, score_m, lane));
    Clear(dp);
    Gemm<C::kBf16, C::kHeadDimV / 16>(
        dp, Operand<TileV, Side::kA, false, C::kWarpsScoreN>(smem_v, score_n, lane),
        Operand<TileDo, Side::kB, false, kWarpsScoreM>(dout, score_m, lane));

    if (mask.template NeedsMask<kM, kN>(row0, key0)) {
#pragma unroll
      for (int r = 0; r < 2 * kScoreN; ++r) {
        const Window seeing = mask.RowsOf(KeyOf(place, key0, r)).From(RowOf(place, row0));
#pragma unroll
        for (int i = 0; i < 2 * kScoreM; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (!mask.InRows(seeing, RowStep(i, e))) s[r / 2][i][r % 2 * 2 + e] = -Infinity();
          }
        }
      }
    }
    if constexpr (C::kSegments) {
      if (!walk.queries.template RangeOf<kM>(step.block).IsOneWith(walk.own)) {
        int own[2 * kScoreN];
#pragma unroll
        for (int r = 0; r < 2 * kScoreN; ++r) own[r] = ids.keys.Id(KeyOf(place, key0, r));
#pragma unroll
        for (int i = 0; i < 2 * kScoreM; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int id = ids.queries.Id(RowOf(place, row0) + RowStep(i, e));
#pragma unroll
            for (int r = 0; r < 2 * kScoreN; ++r) {
              if (id != own[r]) s[r / 2][i][r % 2 * 2 + e] = -Infinity();
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kScoreM; ++i) {
      float2 lse[2], delta[2];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const uint32 at = stats + (16 * (score_m + kWarpsScoreM * i) + 8 * side + lane % 4 * 2) * 4;
        lse[side] = LoadSharedFloat2(at);
        delta[side] = LoadSharedFloat2(at + kRowStatBytes);
      }
#pragma unroll
      for (int j = 0; j < kScoreN; ++j) {
        float p[2][4], ds[2][4];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float l = e % 2 ? lse[side].y : lse[side].x;
            const float d = e % 2 ? delta[side].y : delta[side].x;
            const float distance =
                logits.Distance(RowOf(place, row0) + RowStep(2 * i + side, e % 2),
                                KeyOf(place, key0, 2 * j + e / 2));
            const Weight weight = Weigh(logits, s[j][2 * i + side][e], distance, l);
            const float dlogit = weight.p * (dp[j][2 * i + side][e] - d);
            if constexpr (C::kDslopes) dslope -= dlogit * fabsf(distance);
            p[side][e] = weight.p;
            ds[side][e] = dlogit * weight.slope;
          }
        }
        const int row = 16 * C::kWarpsScoreN * j;
        uint32 r[4];
        PackBlock<C::kBf16>(r, p[0], p[1]);
        BlockWriter<TileP, kWarpsScoreM>(smem_p, 16 * score_n, score_m, lane).Store(row, i, r);
        PackBlock<C::kBf16>(r, ds[0], ds[1]);
        BlockWriter<TileP, kWarpsScoreM>(smem_ds, 16 * score_n, score_m, lane).Store(row, i, r);
      }
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_BWD_SM80_CUH_
