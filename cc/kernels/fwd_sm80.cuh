// Forward attention with mma.sync: sm_80, 86, 89, 120, and any newer one without its own kernel.
//
//   one CTA = one row tile of one query head        keys, right to left ->
//                 kHeadDim                      kBlockN   kBlockN
//            +--------------+                  +---------+---------+
//   kBlockM  |  Q (shared)  |   x  K^T  =  S   |  block  |  block  |   P = exp2(S - ref), in
//            +--------------+                  +---------+---------+   registers, feeds P V
//
// Warps       all alike; warp w owns the 16-row blocks w, w + kWarps, ... (kRowBlocks of them: two
//             where registers allow, since each K and V fragment read is then used twice).
// Blocks      right to left: the ones that a causal mask or the end of the keys cut come first.
//             Which ones is KeyWalk's business; scores become logits in LogitMap.
// Barriers    only __syncthreads. kStages 1: K and V have one buffer each; V loads during Q K^T,
//             the next K during softmax and P V; two barriers a block. kStages 2: K and V have two
//             buffers, loaded a block ahead; one barrier a block.
// 8-bit K, V  with kFp8: two elements to a 16-bit column, turned into f16 by fragments_fp8.cuh.
// Shared      Q kBlockM * kHeadDim, K and V kStages * kBlockN * (kHeadDim + kHeadDimV), times 2
//             bytes; the output tile reuses all of it. plan.cc computes the same sum.
// Registers   output kRowBlocks * kHeadDimV / 2, scores kRowBlocks * kBlockN / 2, Q too with
//             kQInRegs (kRowBlocks * kHeadDim / 4), and about 60 more.
#ifndef JAX_FLASHATTN_CC_KERNELS_FWD_SM80_CUH_
#define JAX_FLASHATTN_CC_KERNELS_FWD_SM80_CUH_

#include "fragments_fp8.cuh"
#include "kv_source.cuh"
#include "row_scores.cuh"
#include "softmax.cuh"

namespace jfa {

template <class C>
struct FwdSm80 {
  static constexpr MaskKind kMask = static_cast<MaskKind>(C::kMask);
  static constexpr int kThreads = C::kWarps * kWarpSize;
  static constexpr int kRowBlocks = C::kBlockM / (16 * C::kWarps);
  static constexpr int kKeyBlocks = C::kBlockN / 16;
  static constexpr int kDimBlocks = C::kHeadDim / 16;
  static constexpr int kOutBlocks = C::kHeadDimV / 16;

  using TileQ = SmemTile<C::kBlockM, C::kHeadDim>;
  static constexpr int kElements = C::kFp8 ? 2 : 1;  // of K and V in 16 bits
  using TileK = SmemTile<C::kBlockN, C::kHeadDim / kElements>;
  using TileV = SmemTile<C::kBlockN, C::kHeadDimV / kElements>;
  using TileO = SmemTile<C::kBlockM, C::kHeadDimV>;
  static constexpr int kStageBytes = TileK::kBytes + TileV::kBytes;
  static constexpr int kInputBytes = TileQ::kBytes + C::kStages * kStageBytes;
  // The output tile is staged where the inputs were; with wide values it may be the larger one.
  static constexpr int kSmemBytes = kInputBytes > TileO::kBytes ? kInputBytes : TileO::kBytes;

  static_assert(C::kBlockM == kRowBlocks * 16 * C::kWarps, "every warp owns whole 16-row blocks");
  static_assert(C::kStages == 1 || C::kStages == 2, "the loop knows one or two buffers");
  static_assert(kSmemBytes == C::kSmemBytes, "plan.cc and the kernel must agree on shared memory");

  using Output = float[kRowBlocks][2 * kOutBlocks][4];
  using Place = RowScores<C::kWarps, kRowBlocks, kKeyBlocks>;
  using Scores = typename Place::Array;
  using OperandQ = Operand<TileQ, Side::kA, false, C::kWarps>;
  using OperandK = Operand<TileK, Side::kB, false, 1>;
  using OperandV = Operand<TileV, Side::kB, true, 1>;

  // acc += Q K^T
  static JFA_DEVICE void ScoreGemm(Scores& s, const uint32 (&q)[kRowBlocks][kDimBlocks][4],
                                   const OperandQ& op_q, const OperandK& op_k) {
    if constexpr (C::kFp8) {
      const auto load_q = [&](uint32(&a)[4], int m, int block) {
        if constexpr (C::kQInRegs) {
#pragma unroll
          for (int e = 0; e < 4; ++e) a[e] = q[m][block][e];
        } else {
          op_q.Load(a, m, block);
        }
      };
      const auto load_k = [&](uint32(&b)[4], int n, int step) { op_k.Load(b, n, step); };
      ScoreGemm8<C::kE5m2K, kDimBlocks / 2>(s, load_q, load_k);
    } else if constexpr (C::kQInRegs) {
#pragma unroll
      for (int k = 0; k < kDimBlocks; ++k) {
        uint32 a[kRowBlocks][4];
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
          for (int e = 0; e < 4; ++e) a[m][e] = q[m][k][e];
        }
        MmaRow<C::kBf16>(s, a, op_k, k);
      }
    } else {
      Gemm<C::kBf16, kDimBlocks>(s, op_q, op_k);
    }
  }

  // out += P V. Weights are computed 16 keys at a time, just before the product that needs them, so
  // that the exponentials of one step can run under the tensor work of the step before.
  static JFA_DEVICE void OutputGemm(Output& out, const Scores& s,
                                    OnlineSoftmax<kRowBlocks>& softmax, const OperandV& op_v) {
#pragma unroll
    for (int k = 0; k < kKeyBlocks; ++k) {
      uint32 p[kRowBlocks][4];
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        float w[2][4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) w[n][e] = softmax.Weigh(2 * m + e / 2, s[m][2 * k + n][e]);
        }
        PackBlock<C::kBf16 && !C::kFp8>(p[m], w[0], w[1]);
      }
      if constexpr (C::kFp8) {
        OutputGemm8<C::kE5m2V>(out, p, [&](uint32(&b)[4], int n) { op_v.Load(b, n, k); });
      } else {
        MmaRow<C::kBf16>(out, p, op_v, k);
      }
    }
  }

  // Queries for 8-bit keys, each warp's own rows in place; the factor that their scores want.
  static JFA_DEVICE float PrepareRows(uint32 smem_q) {
    constexpr int kChunks = C::kHeadDim / 8;
    const int first = 16 * (ReadThreadIndex() / kWarpSize);
    const auto at = [=](int row, int chunk) { return smem_q + TileQ::Offset(row, chunk); };
    int exponent = 0;
    if constexpr (C::kBf16) {
      for (int m = 0; m < kRowBlocks; ++m) {
        exponent = Max(exponent, LargestExponent<kChunks>(at, first + 16 * C::kWarps * m, 16));
      }
      __syncwarp();
    }
    const QueryScale scale(exponent);
    for (int m = 0; m < kRowBlocks; ++m) {
      PrepareQueries<C::kBf16, kChunks>(at, first + 16 * C::kWarps * m, 16, scale);
    }
    __syncwarp();
    return C::kBf16 ? scale.back : 1.f;
  }

  // Where the results go.
  struct TilePlace {
    int batch, head, row0;
    int q_begin, q_len, q_rows;
  };

  static JFA_DEVICE void Run(const FwdParams& params, unsigned char* smem) {
    const ProblemParams& problem = params.problem;
    WorkItem work = ScheduleWork(
        blockIdx.x, NumTiles<C::kPacked, C::kBlockM>(problem, problem.q_len), problem.batch,
        problem.num_heads, problem.group,
        static_cast<int64>(problem.kv_len) * (problem.head_dim + problem.head_dim_v) * 2,
        C::kL2Bytes / 2, kMask);
    Sequence sequence;
    // Under a causal mask the last rows see most: longest tiles first.
    if (!SelectQueries<C::kPacked, C::kBlockM>(problem, kMask != MaskKind::kFull, work, sequence)) {
      return;
    }
    const int row0 = work.block * C::kBlockM;
    const int kv_head = work.head / problem.group;

    const BandMask<kMask> mask(problem, sequence);
    const SegmentIds<C::kSegments> ids(problem, work.batch, kv_head);
    const uint32 smem_q = SmemAddress(smem);
    const uint32 smem_k = smem_q + TileQ::kBytes;
    const uint32 smem_v = smem_k + C::kStages * TileK::kBytes;

    // Queries first: they travel while the walk is found.
    const TileLoader<TileQ, kThreads, C::kAligned> load_q(
        RowPointer(params.q, work.batch, work.head, sequence.q_begin), params.q.row_stride,
        problem.head_dim);
    load_q.Load(smem_q, row0, sequence.q_len);
    CpAsyncCommit();
    auto walk = KeyWalk<kMask, C::kSegments, C::kBlockM, C::kBlockN>::template Of<kThreads>(
        mask, ids, row0, reinterpret_cast<int*>(smem + TileQ::kBytes));
    const auto& keys = ColumnsOf<C::kFp8>(params.k);
    const auto& values = ColumnsOf<C::kFp8>(params.v);
    const auto load_k = MakeKeyLoader<TileK, kThreads, C::kAligned, C::kPaged>(
        params, keys, problem.head_dim / kElements, sequence, work.batch, kv_head);
    const auto load_v = MakeKeyLoader<TileV, kThreads, C::kAligned, C::kPaged>(
        params, values, problem.head_dim_v / kElements, sequence, work.batch, kv_head);

    Output out;
    Clear(out);
    LogitMap<C::kSoftcap, C::kAlibi> logits(problem, sequence, work.batch, work.head);
    OnlineSoftmax<kRowBlocks> softmax(logits.Scale());
    uint32 q[kRowBlocks][kDimBlocks][4];
    int block = walk.First();

    if (block >= 0) {
      load_k.Load(smem_k, block * C::kBlockN, sequence.kv_len);
      if (C::kStages == 2) load_v.Load(smem_v, block * C::kBlockN, sequence.kv_len);
      CpAsyncCommit();
      if constexpr (C::kQInRegs || C::kFp8) {
        CpAsyncWait<0>();
        __syncthreads();
      }
      if constexpr (C::kFp8) {
        logits.ScaleScores(PrepareRows(smem_q) * ScoreScale(params, work.batch, kv_head));
        softmax.scale = logits.Scale();
      }
      if constexpr (C::kQInRegs) {
        const OperandQ op_q(smem_q, threadIdx.x / kWarpSize, threadIdx.x % kWarpSize);
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
          for (int k = 0; k < kDimBlocks; ++k) op_q.Load(q[m][k], m, k);
        }
      }
    }

    // What only the end needs waits in shared memory: through the loop registers are scarce.
    __shared__ TilePlace place;
    if (threadIdx.x == 0) {
      place = {work.batch, work.head, row0, sequence.q_begin, sequence.q_len, sequence.q_rows};
    }

    uint32 stage = 0;
#pragma unroll 1
    while (block >= 0) {
      const int key0 = block * C::kBlockN;
      [[maybe_unused]] const bool one_segment = walk.one_segment;
      const int next = walk.Next(block);
      CpAsyncWait<0>();
      __syncthreads();  // this block's K (and V) is there; all warps are done with the one before
      if constexpr (C::kStages == 1) {
        load_v.Load(smem_v, key0, sequence.kv_len);
        CpAsyncCommit();
      } else if (next >= 0) {
        load_k.Load(smem_k + (stage ^ 1) * TileK::kBytes, next * C::kBlockN, sequence.kv_len);
        load_v.Load(smem_v + (stage ^ 1) * TileV::kBytes, next * C::kBlockN, sequence.kv_len);
        CpAsyncCommit();
      }

      Scores s;
      Clear(s);
      {
        // Addresses are found anew in each block: kept through the loop they would spill.
        const int thread = ReadThreadIndex();
        ScoreGemm(s, q, OperandQ(smem_q, thread / kWarpSize, thread % kWarpSize),
                  OperandK(smem_k + stage * TileK::kBytes, 0, thread % kWarpSize));
      }

      if constexpr (!logits.kPlain) Place::Apply(s, logits, row0, key0);
      // One loop for cut and whole blocks: a branch around the mask costs nothing beside a block's
      // products, and the code, its compile time and its cache footprint are half as large.
      if (mask.template NeedsMask<C::kBlockM, C::kBlockN>(row0, key0)) {
        Place::HideBand(s, mask, row0, key0);
      }
      if constexpr (C::kSegments) {
        if (!one_segment) {
          Place::HideOtherSegments(s, ids, row0, key0);
        }
      }

      if constexpr (C::kStages == 1) {
        CpAsyncWait<0>();
        __syncthreads();  // V is there; all warps are done with K
        if (next >= 0) {
          load_k.Load(smem_k, next * C::kBlockN, sequence.kv_len);
          CpAsyncCommit();
        }
      }
      softmax.Observe(s, out);
      OutputGemm(out, s, softmax, OperandV(smem_v + stage * TileV::kBytes, 0, ReadLaneIndex()));
      if constexpr (C::kStages == 2) stage ^= 1;
      block = next;
    }

    CpAsyncWait<0>();
    __syncthreads();  // the inputs' shared memory becomes the output's
    const TilePlace tile = place;
    const int thread = ReadThreadIndex(), lane = thread % kWarpSize, warp = thread / kWarpSize;
    float* lse = params.lse + LseRow(problem, tile.batch, tile.head) + tile.q_begin;
    const float sink =
        params.sinks == nullptr
            ? -Infinity()
            : params.sinks[static_cast<int64>(tile.batch) * problem.num_heads + tile.head];
    float v_scale = 1.f;
    if constexpr (C::kFp8) {
      AdjoinColumns(out);
      v_scale = ValueScale(params, tile.batch, tile.head / problem.group);
    }
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      const int block_row = 16 * (warp + C::kWarps * m);
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        RowResult result = softmax.Finalize(2 * m + half, sink);
        const int row = tile.row0 + block_row + lane / 4 + 8 * half;
        // Padding rows were zeros that saw every key: their mean of V must not get out.
        if (row >= tile.q_len) result = {0.f, -Infinity()};
        factor[half] = C::kFp8 ? result.normalizer * v_scale : result.normalizer;
        if (lane % 4 == 0 && row < tile.q_rows) lse[row] = result.lse;
      }
      const BlockWriter<TileO, 1> writer(smem_q, block_row, 0, lane);
#pragma unroll
      for (int n = 0; n < kOutBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          out[m][2 * n][e] *= factor[e / 2];
          out[m][2 * n + 1][e] *= factor[e / 2];
        }
        uint32 r[4];
        PackBlock<C::kBf16>(r, out[m][2 * n], out[m][2 * n + 1]);
        if constexpr (C::kFp8) {
          StoreAdjoined<TileO>(smem_q, block_row, n, lane, r);
        } else {
          writer.Store(0, n, r);
        }
      }
    }
    __syncthreads();
    StoreTile<TileO, kThreads, C::kAligned>(
        smem_q, RowPointer(params.out, tile.batch, tile.head, tile.q_begin), params.out.row_stride,
        problem.head_dim_v, tile.row0, tile.q_rows);
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_FWD_SM80_CUH_
