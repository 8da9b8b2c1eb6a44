// What the two Hopper backward kernels share: their tiles in shared memory, the producer that fills
// them, and the walk over query heads and row tiles that all roles follow.
#ifndef JAX_FLASHATTN_CC_KERNELS_BWD_TILES_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_BWD_TILES_SM90_CUH_

#include "kv_source.cuh"
#include "logits.cuh"
#include "mask.cuh"
#include "panels_sm90.cuh"

namespace jfa {

// kExchanged: panels of kBlockN keys x 64 rows through which the consumer warpgroups exchange P^T
// and dS^T.
template <class C, int kExchanged>
struct BwdTilesSm90 {
  static constexpr MaskKind kMask = static_cast<MaskKind>(C::kMask);
  static constexpr int kM = C::kBlockM, kN = C::kBlockN;
  static constexpr int kThreads = C::kWarps * kWarpSize;
  // Of a section of heads (ScheduleWork). dQ's sums count: beyond the L2 they take four times the
  // bandwidth that Q and dO do.
  static constexpr int kLeastTiles = 256;
  static constexpr int kGroupThreads = 128;
  static constexpr int kConsumers = C::kWarps / 4 - 1;  // warpgroups
  static constexpr int kConsumerThreads = kConsumers * kGroupThreads;
  // What one thread may hold. A CTA of three warpgroups starts with 168 for each; claiming more
  // than was released would wait for ever.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(kConsumers == 2 && kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168,
                "registers are shared out among three warpgroups");

  // Tiles lie in shared memory as panels of 64 columns: rows of 128 bytes, whose 16-byte chunks are
  // permuted by the row's number modulo 8 (the 128-byte swizzle of TMA and wgmma).
  static constexpr int kPanelColumns = 64;
  static constexpr int kRowBytes = 2 * kPanelColumns;
  static constexpr int kPanels = (C::kHeadDim + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelsV = (C::kHeadDimV + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelBytesM = kM * kRowBytes;
  static constexpr int kPanelBytesN = kN * kRowBytes;
  static constexpr int kBytesK = kPanels * kPanelBytesN, kBytesV = kPanelsV * kPanelBytesN;
  static constexpr int kBytesQ = kPanels * kPanelBytesM, kBytesDo = kPanelsV * kPanelBytesM;
  static constexpr int kStatBytes = kM * 4;

  static constexpr int kSmemK = 0;
  static constexpr int kSmemV = kSmemK + kBytesK;
  static constexpr int kSmemQ = kSmemV + kBytesV;
  static constexpr int kSmemDo = kSmemQ + C::kStages * kBytesQ;
  static constexpr int kSmemExchange = kSmemDo + C::kStages * kBytesDo;
  static constexpr int kSmemStats = kSmemExchange + kExchanged * kPanelBytesN;
  static constexpr int kSmemBarriers = kSmemStats + C::kStages * 2 * kStatBytes;
  static constexpr int kSmemBytes = kSmemBarriers + 8 * (1 + 4 * C::kStages);
  enum Barrier {
    kFullKv = 0,
    kFullQ = 1,  // and the statistics
    kEmptyQ = kFullQ + C::kStages,
    kFullDo = kEmptyQ + C::kStages,
    kEmptyDo = kFullDo + C::kStages,
  };
  // One of each consumer warpgroup; kernels have more from kOther on.
  enum NamedBarrier { kGroup = 1, kOther = kGroup + kConsumers };

  static_assert(C::kHeadDim % 32 == 0 && C::kHeadDimV % 32 == 0, "half a panel is the least");
  static_assert(kM == kPanelColumns, "the rows are one panel of dS^T, and M of the product for dQ");
  static_assert(kSmemBytes == C::kSmemBytes, "plan.cc and the kernel must agree on shared memory");
  static_assert(BwdScratch::kRowPadding % kM == 0, "row statistics are read in whole tiles");
  static_assert(4 * kConsumers <= kN / 8, "SlopePartials() of plan.h counts on it");

  using Walk = RowWalk<kMask, C::kSegments, kM, kN>;
  using Ids = SegmentIds<C::kSegments>;
  using Logits = LogitMap<C::kSoftcap, C::kAlibi>;
  using Mask = BandMask<kMask>;
  using Ring = RingPosition<C::kStages>;

  // What the CTA walks: (query head of the group, row tile), rows fastest.
  struct Step {
    int head, block;
    JFA_DEVICE Step Next(const Walk& walk) const {
      const int next = walk.Next(block);
      return next < walk.rows.end ? Step{head, next} : Step{head + 1, walk.First()};
    }
  };

  // The tile and who works on it; all roles know it.
  struct Work {
    WorkItem item;
    int tile, key0, head_begin, head_end;
    Sequence sequence;
  };

  static JFA_DEVICE uint32 Address(uint32 smem, int barrier, int stage = 0) {
    return smem + kSmemBarriers + 8 * (barrier + stage);
  }

  // --- producer: one warp, of which one lane orders the copies ---------------------------------

  static JFA_DEVICE void Produce(const BwdParams& params, uint32 smem, const Work& work,
                                 const Walk& walk) {
    if (walk.First() >= walk.rows.end) return;
    const Sequence& sequence = work.sequence;
    const int lane = ReadLaneIndex(), batch = work.item.batch;
    const bool leader = lane == 0;
    if (leader) {
      const uint32 full = Address(smem, kFullKv);
      const int row = sequence.kv_begin + work.key0;
      MbarrierArriveExpect(full, kBytesK + kBytesV);
      LoadPanels<kPanels, kPanelBytesN, kPanelColumns>(&params.maps.k, smem + kSmemK, full, row,
                                                       work.item.head, batch, kL2EvictFirst);
      LoadPanels<kPanelsV, kPanelBytesN, kPanelColumns>(&params.maps.v, smem + kSmemV, full, row,
                                                        work.item.head, batch, kL2EvictFirst);
    }
    Ring ring;
    for (Step step{work.head_begin, walk.First()}; step.head < work.head_end;
         step = step.Next(walk)) {
      const int row0 = step.block * kM;
      const BwdScratch scratch = BwdScratch::Of<C::kDqSums, C::kHeadDim>(params, sequence, batch,
                                                                         step.head, work.item.head);
      const uint32 full_q = Address(smem, kFullQ, ring.stage),
                   full_do = Address(smem, kFullDo, ring.stage);
      MbarrierWait(Address(smem, kEmptyQ, ring.stage), ring.parity ^ 1);
      const uint32 stats = smem + kSmemStats + ring.stage * 2 * kStatBytes;
#pragma unroll
      for (int i = lane * 4; i < 2 * kM; i += kWarpSize * 4) {
        CpAsync16(stats + i * 4, (i < kM ? scratch.lse_log2 + i : scratch.delta + i - kM) + row0,
                  16);
      }
      MbarrierArriveAfterCopies(full_q);
      if (leader) {
        LoadTile<kPanels, kPanelBytesM, kPanelColumns>(
            &params.maps.q, smem + kSmemQ + ring.stage * kBytesQ, full_q, sequence.q_begin + row0,
            step.head, batch, kL2EvictLast);
        MbarrierWait(Address(smem, kEmptyDo, ring.stage), ring.parity ^ 1);
        LoadTile<kPanelsV, kPanelBytesM, kPanelColumns>(
            &params.maps.dout, smem + kSmemDo + ring.stage * kBytesDo, full_do,
            sequence.q_begin + row0, step.head, batch, kL2EvictLast);
      }
      __syncwarp();
      ring.Advance();
    }
  }

  // --- consumers --------------------------------------------------------------------------------

  // Scores of a warpgroup, keys x kRows rows, and the same in 16 bits, the left operand of a
  // product.
  template <int kRows>
  using Scores = float[1][kRows / 8][4];
  template <int kRows>
  using Fragments = uint32[kRows / 16][4];

  // d = A B^T, started: both operands with the inner dimension, kColumns long, along rows.
  template <int kRows, int kColumns, int kPanelBytesA, int kPanelBytesB>
  static JFA_DEVICE void ScoreGemm(Scores<kRows>& d, uint32 smem_a, uint32 smem_b) {
    const uint64 a = PanelDescriptor(smem_a, 16), b = PanelDescriptor(smem_b, 16);
    Pin(d);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kColumns / 16; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      Wgmma<kRows>::template Ss<C::kBf16, false, false>(
          d, a + ((panel * kPanelBytesA + within) >> 4), b + ((panel * kPanelBytesB + within) >> 4),
          step > 0);
    }
    WgmmaCommit();
    Pin(d);
  }

  // d += A B, started: A is P^T or dS^T of a warpgroup's keys, B dO or Q.
  template <int kColumns>
  static JFA_DEVICE void GradientGemm(float (&d)[1][kColumns / 8][4], const Fragments<kM>& a,
                                      uint32 smem_b) {
    const uint64 b = PanelDescriptor(smem_b, kPanelBytesM);
    Pin(d);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kM / 16; ++step) {
      Wgmma<kColumns>::template Rs<C::kBf16, true>(d, a[step], b + ((step * 16 * kRowBytes) >> 4),
                                                   1);
    }
    WgmmaCommit();
    Pin(d);
  }

  // Where a lane's elements of a block of scores are: element n, e is of key + e / 2 * 8 and row
  // + 8 * n + e % 2.
  struct Place {
    int key, row;
  };
  // Of a warpgroup whose block begins at (key0, row0).
  static JFA_DEVICE Place PlaceIn(int key0, int row0) {
    const int thread = ReadThreadIndex() % kGroupThreads;
    return {key0 + thread / kWarpSize * 16 + thread % kWarpSize / 4, row0 + thread % 4 * 2};
  }

  // The block's first row, not the lane's, tells whether there is anything to hide.
  template <int kRows>
  static JFA_DEVICE void Hide(Scores<kRows>& s, const Mask& mask, const Ids& ids, const Walk& walk,
                              const Step& step, int key0, int row0) {
    const Place place = PlaceIn(key0, row0);
    if (mask.template NeedsMask<kRows, 64>(row0, key0)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Window seeing = mask.RowsOf(place.key + 8 * half).From(place.row);
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (!mask.InRows(seeing, 8 * n + e)) s[0][n][2 * half + e] = -Infinity();
          }
        }
      }
    }
    if constexpr (C::kSegments) {
      if (walk.queries.template RangeOf<kM>(step.block).IsOneWith(walk.own)) return;
      const int own[2] = {ids.keys.Id(place.key), ids.keys.Id(place.key + 8)};
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int id = ids.queries.Id(place.row + 8 * n + e);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (id != own[half]) s[0][n][2 * half + e] = -Infinity();
          }
        }
      }
    }
  }

  // One lane per warp: a buffer is free when all consumer warps say so, each after all its lanes.
  static JFA_DEVICE void Arrive(uint32 barrier) {
    __syncwarp();
    MbarrierArriveWarp(barrier);
  }

  // A warpgroup's 64 keys, from `first_key` of the panel on, x kRows rows.
  template <int kRows>
  static JFA_DEVICE void StoreScores(const Fragments<kRows>& x, uint32 panel, int first_key) {
    const uint32 place = StmatrixPlace(panel, first_key, ReadThreadIndex() % kGroupThreads);
#pragma unroll
    for (int step = 0; step < kRows / 16; ++step) {
      Stmatrix4(place ^ (step * 32), x[step]);
    }
  }

  // Where a thread adds up its part of dQ: of a warpgroup's 64 rows, columns from `column` on. The
  // place is kept, since to compute it anew takes longer than the adds of a tile.
  struct DqSums {
    float* target;  // in the head's first row tile
    int rows;       // of the sequence, from the warp's first one on

    static JFA_DEVICE DqSums Of(const BwdParams& params, const Work& work, int column) {
      const BwdScratch scratch = BwdScratch::Of<true, C::kHeadDim>(
          params, work.sequence, work.item.batch, work.head_begin, work.item.head);
      const int warp = ReadThreadIndex() % kGroupThreads / kWarpSize;
      return {scratch.dq + warp * 16 * C::kHeadDim + column * 16 + DqElement(0, 0, ReadLaneIndex()),
              work.sequence.q_len - warp * 16};
    }
    JFA_DEVICE void NextHead(const BwdParams& params) {
      target += BwdScratch::PerHead<true, C::kHeadDim>(params);
    }
    template <int kColumns>
    JFA_DEVICE void Add(const float (&dq)[1][kColumns / 8][4], int row_tile) const {
      if (row_tile * kM >= rows) return;
      float* place = target + static_cast<int64>(row_tile) * (kM * C::kHeadDim);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        const float (&left)[4] = dq[0][2 * n];
        const float (&right)[4] = dq[0][2 * n + 1];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          RedAdd4(place + n * 256 + half * 128, left[2 * half], left[2 * half + 1], right[2 * half],
                  right[2 * half + 1]);
        }
      }
    }
  };

  // Each warp's sum into a place of its own, so that the sum of all has one order.
  static JFA_DEVICE void StoreSlope(const BwdParams& params, const Work& work, int head,
                                    float dslope) {
    const float sum = WarpSum(dslope);
    const int thread = ReadThreadIndex() - kGroupThreads;
    if (thread % kWarpSize == 0) {
      const int64 row = static_cast<int64>(work.item.batch) * params.problem.num_heads + head;
      params
          .dslopes[row * params.slope_partials + work.tile * 4 * kConsumers + thread / kWarpSize] =
          sum;
    }
  }

  // What all threads know alike, so that ptxas keeps it in uniform registers.
  static JFA_DEVICE int Uniform(int x) { return __shfl_sync(kFullWarp, x, 0); }
  static JFA_DEVICE void MakeUniform(Sequence& s) {
    s.q_len = Uniform(s.q_len);
    s.kv_len = Uniform(s.kv_len);
    s.kv_rows = Uniform(s.kv_rows);
    s.q_begin = Uniform(s.q_begin);
    s.kv_begin = Uniform(s.kv_begin);
    s.scratch_begin = Uniform(s.scratch_begin);
    s.offset = Uniform(s.offset);
  }

  // The kernel: what every thread of a CTA does first, then the producer, and `consume` in each
  // consumer warpgroup.
  template <class Consume>
  static JFA_DEVICE void RunRoles(const BwdParams& params, unsigned char* smem_pointer,
                                  const Consume& consume) {
    const ProblemParams& problem = params.problem;
    const uint32 smem = SmemAddress(smem_pointer);
    const int group = __shfl_sync(kFullWarp, threadIdx.x / kGroupThreads, 0);
    // Key tile 0 is seen by most rows of a causal mask, so tiles in order are longest first.
    Work work;
    work.item = ScheduleWork(blockIdx.x, NumTiles<C::kPacked, kN>(problem, problem.kv_len),
                             problem.batch, problem.num_kv_heads, 1,
                             static_cast<int64>(problem.q_len) * problem.group *
                                 (problem.head_dim * (C::kDqSums ? 6 : 2) + problem.head_dim_v * 2),
                             C::kL2Bytes / 2, kMask, kLeastTiles);
    work.tile = work.item.block;
    if (!SelectKeys<C::kPacked, kN>(problem, work.item, work.sequence)) return;
    work.item = {Uniform(work.item.block), Uniform(work.item.batch), Uniform(work.item.head)};
    MakeUniform(work.sequence);
    work.key0 = work.item.block * kN;
    work.head_begin = work.item.head * problem.group;
    work.head_end = work.head_begin + problem.group;
    const Mask mask(problem, work.sequence);
    const Ids ids(problem, work.item.batch, work.item.head);
    const Walk walk =
        Walk::template Of<kThreads>(mask, ids, work.key0, reinterpret_cast<int*>(smem_pointer));

    if (threadIdx.x == 0) {
      TmaPrefetch(&params.maps.q);
      TmaPrefetch(&params.maps.k);
      TmaPrefetch(&params.maps.v);
      TmaPrefetch(&params.maps.dout);
      MbarrierInit(Address(smem, kFullKv), 1);
      for (int stage = 0; stage < C::kStages; ++stage) {
        MbarrierInit(Address(smem, kFullQ, stage), 1 + kWarpSize);
        MbarrierInitWarps(Address(smem, kEmptyQ, stage), 4 * kConsumers);
        MbarrierInit(Address(smem, kFullDo, stage), 1);
        MbarrierInitWarps(Address(smem, kEmptyDo, stage), 4 * kConsumers);
      }
      FenceMbarrierInit();
    }
    if constexpr (C::kSegments) FenceProxyAsync();  // the walk was found through shared memory
    __syncthreads();
    if (group == 0) {
      ReleaseRegisters<kProducerRegisters>();
      if (threadIdx.x < kWarpSize) Produce(params, smem, work, walk);
    } else {
      ClaimRegisters<kConsumerRegisters>();
      consume(smem, work, mask, ids, walk, group - 1);
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_BWD_TILES_SM90_CUH_
