// Backward attention for Hopper: dK and dV, and dQ by atomic adds; wgmma fed by the copy engine.
//
//   one CTA = one key tile of one key head; it walks the query heads of the group and their rows
//
//                       rows i (kBlockM at a time) ->
//                      +-----------+
//   64 keys,           |  S^T, P^T |   S^T  = K Q^T            dV += P^T dO
//   warpgroup 1     j  | dP^T, dS^T|   dP^T = V dO^T           dK += dS^T Q
//                      +-----------+   dS   = P (dP - delta)   dQ += dS K     (f32 sums in global
//   64 keys,           |           |                                           memory)
//   warpgroup 2        +-----------+
//
// Roles       Warpgroup 0 gives its registers away; its first warp produces: it copies K and V
// once,
//             then Q, dO and the rows' statistics step by step. Each other warpgroup consumes: it
//             owns 64 keys, whose P^T and dS^T stay in registers for dV and dK.
// dQ          needs all keys: dS^T goes through shared memory, and each warpgroup then makes half
// of
//             the product's columns and adds them up in global memory.
// Overlap     P is computed under dP = V dO^T, dS under dV, the adds of dQ under dK. The other
//             warpgroup's products fill what is left.
// Barriers    full and empty mbarriers of each buffer; one named barrier a step, when dS^T is
// there.
//             Two buffers of dS^T: who passes the barrier of a step has read that of the last one.
// Shared      K, V kBlockN * (kHeadDim + kHeadDimV); Q, dO kStages * kBlockM * (same); dS^T
//             2 * kBlockN * kBlockM; times 2 bytes; LSE and delta kStages * kBlockM * 8 bytes.
// Registers   dK and dV kHeadDim / 2 + kHeadDimV / 2, S and dP kBlockM, of 240.
#ifndef JAX_FLASHATTN_CC_KERNELS_BWD_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_BWD_SM90_CUH_

#include "kv_source.cuh"
#include "logits.cuh"
#include "mask.cuh"
#include "ptx_sm90.cuh"
#include "row_pieces_sm90.cuh"

namespace jfa {

template <class C>
struct BwdSm90 {
  static constexpr MaskKind kMask = static_cast<MaskKind>(C::kMask);
  static constexpr int kM = C::kBlockM, kN = C::kBlockN;
  static constexpr int kThreads = C::kWarps * kWarpSize;
  static constexpr int kGroupThreads = 128;
  static constexpr int kGroupKeys = 64;  // of one warpgroup: M of wgmma
  static constexpr int kConsumers = kN / kGroupKeys;
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
  static constexpr int kPanels = C::kHeadDim / kPanelColumns;
  static constexpr int kPanelsV = C::kHeadDimV / kPanelColumns;
  static constexpr int kPanelBytesM = kM * kRowBytes;
  static constexpr int kPanelBytesN = kN * kRowBytes;
  static constexpr int kBytesK = kPanels * kPanelBytesN, kBytesV = kPanelsV * kPanelBytesN;
  static constexpr int kBytesQ = kPanels * kPanelBytesM, kBytesDo = kPanelsV * kPanelBytesM;
  static constexpr int kBytesDs = kPanelBytesN;
  static constexpr int kDqColumns = C::kHeadDim / kConsumers;  // of one warpgroup
  static constexpr int kStatBytes = kM * 4;

  static constexpr int kSmemK = 0;
  static constexpr int kSmemV = kSmemK + kBytesK;
  static constexpr int kSmemQ = kSmemV + kBytesV;
  static constexpr int kSmemDo = kSmemQ + C::kStages * kBytesQ;
  static constexpr int kSmemDs = kSmemDo + C::kStages * kBytesDo;
  static constexpr int kSmemStats = kSmemDs + 2 * kBytesDs;
  static constexpr int kSmemBarriers = kSmemStats + C::kStages * 2 * kStatBytes;
  static constexpr int kSmemBytes = kSmemBarriers + 8 * (1 + 4 * C::kStages);
  enum Barrier {
    kFullKv = 0,
    kFullQ = 1,  // and the statistics
    kEmptyQ = kFullQ + C::kStages,
    kFullDo = kEmptyQ + C::kStages,
    kEmptyDo = kFullDo + C::kStages,
  };
  enum NamedBarrier { kDsReady = 1, kGroup = 2 };  // kGroup: one of each consumer warpgroup

  static_assert(kN % kGroupKeys == 0 && C::kWarps == 4 * (kConsumers + 1),
                "a consumer warpgroup owns 64 keys; one more produces");
  static_assert(C::kHeadDim % kPanelColumns == 0 && C::kHeadDimV % kPanelColumns == 0,
                "head dims are whole panels");
  static_assert(kM == kPanelColumns, "the rows are one panel of dS^T, and M of the product for dQ");
  static_assert(kDqColumns % 16 == 0 && kPanelColumns % kDqColumns == 0,
                "a warpgroup's columns of dQ are in one panel");
  static_assert(kSmemBytes == C::kSmemBytes, "plan.cc and the kernel must agree on shared memory");
  static_assert(BwdScratch::kRowPadding % kM == 0, "row statistics are read in whole tiles");
  static_assert(4 * kConsumers <= kN / 8, "SlopePartials() of plan.h counts on it");

  using Walk = RowWalk<kMask, C::kSegments, kM, kN>;
  using Ids = SegmentIds<C::kSegments>;
  using Logits = LogitMap<C::kSoftcap, C::kAlibi>;
  using Mask = BandMask<kMask>;
  using Ring = RingPosition<C::kStages>;
  using Scores = float[1][kM / 8][4];    // keys x rows
  using Fragments = uint32[kM / 16][4];  // the same in 16 bits, the left operand of a product
  using DqPart = float[1][kDqColumns / 8][4];

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

  template <int kPanelCount, int kPanelBytes>
  static JFA_DEVICE void Load(const TensorMap* map, uint32 target, uint32 barrier, int row,
                              int head, int batch, uint64 policy) {
#pragma unroll
    for (int panel = 0; panel < kPanelCount; ++panel) {
      TmaLoad(target + panel * kPanelBytes, map, barrier, panel * kPanelColumns, row, head, batch,
              policy);
    }
  }

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
      Load<kPanels, kPanelBytesN>(&params.maps.k, smem + kSmemK, full, row, work.item.head, batch,
                                  kL2EvictFirst);
      Load<kPanelsV, kPanelBytesN>(&params.maps.v, smem + kSmemV, full, row, work.item.head, batch,
                                   kL2EvictFirst);
    }
    Ring ring;
    for (Step step{work.head_begin, walk.First()}; step.head < work.head_end;
         step = step.Next(walk)) {
      const int row0 = step.block * kM;
      const BwdScratch scratch =
          BwdScratch::Of<C::kDqSums, C::kHeadDim>(params, sequence, batch, step.head);
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
        MbarrierArriveExpect(full_q, kBytesQ);
        Load<kPanels, kPanelBytesM>(&params.maps.q, smem + kSmemQ + ring.stage * kBytesQ, full_q,
                                    sequence.q_begin + row0, step.head, batch, kL2EvictLast);
        MbarrierWait(Address(smem, kEmptyDo, ring.stage), ring.parity ^ 1);
        MbarrierArriveExpect(full_do, kBytesDo);
        Load<kPanelsV, kPanelBytesM>(&params.maps.dout, smem + kSmemDo + ring.stage * kBytesDo,
                                     full_do, sequence.q_begin + row0, step.head, batch,
                                     kL2EvictLast);
      }
      __syncwarp();
      ring.Advance();
    }
  }

  // --- consumers --------------------------------------------------------------------------------

  // d = A B^T, started: both operands with the inner dimension along rows.
  template <int kPanelCount, int kPanelBytesA, int kPanelBytesB>
  static JFA_DEVICE void ScoreGemm(Scores& d, uint32 smem_a, uint32 smem_b) {
    const uint64 a = PanelDescriptor(smem_a, 16), b = PanelDescriptor(smem_b, 16);
    Pin(d);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < 4 * kPanelCount; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      Wgmma<kM>::template Ss<C::kBf16, false, false>(d, a + ((panel * kPanelBytesA + within) >> 4),
                                                     b + ((panel * kPanelBytesB + within) >> 4),
                                                     step > 0);
    }
    WgmmaCommit();
    Pin(d);
  }

  // d += A B, started: A is P^T or dS^T, B dO or Q.
  template <int kColumns>
  static JFA_DEVICE void GradientGemm(float (&d)[1][kColumns / 8][4], const Fragments& a,
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

  // d = dS K, a warpgroup's columns of it, started.
  static JFA_DEVICE void DqGemm(DqPart& d, uint32 smem_ds, uint32 smem_k, int group) {
    const int column = group * kDqColumns;
    const uint64 a = PanelDescriptor(smem_ds, 16),
                 b = PanelDescriptor(
                     smem_k + column / kPanelColumns * kPanelBytesN + column % kPanelColumns * 2,
                     16);
    Pin(d);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kN / 16; ++step) {
      const uint64 offset = (step * 16 * kRowBytes) >> 4;
      Wgmma<kDqColumns>::template Ss<C::kBf16, true, true>(d, a + offset, b + offset, step > 0);
    }
    WgmmaCommit();
    Pin(d);
  }

  // This lane's keys and rows of a block of scores.
  static JFA_DEVICE int FirstKey(int key0) {
    const int thread = ReadThreadIndex();
    return key0 + (thread - kGroupThreads) / kWarpSize * 16 + thread % kWarpSize / 4;
  }
  static JFA_DEVICE int FirstRow(int row0) { return row0 + ReadLaneIndex() % 4 * 2; }

  static JFA_DEVICE void Hide(Scores& s, const Mask& mask, const Ids& ids, const Walk& walk,
                              const Step& step, int key0, int group) {
    const int row0 = step.block * kM;
    if (mask.template NeedsMask<kM, kGroupKeys>(row0, key0 + group * kGroupKeys)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Window seeing = mask.RowsOf(FirstKey(key0) + 8 * half).From(FirstRow(row0));
#pragma unroll
        for (int n = 0; n < kM / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (!mask.InRows(seeing, 8 * n + e)) s[0][n][2 * half + e] = -Infinity();
          }
        }
      }
    }
    if constexpr (C::kSegments) {
      if (walk.queries.template RangeOf<kM>(step.block).IsOneWith(walk.own)) return;
      const int own[2] = {ids.keys.Id(FirstKey(key0)), ids.keys.Id(FirstKey(key0) + 8)};
#pragma unroll
      for (int n = 0; n < kM / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int id = ids.queries.Id(FirstRow(row0) + 8 * n + e);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (id != own[half]) s[0][n][2 * half + e] = -Infinity();
          }
        }
      }
    }
  }

  // Of a tile's rows from `first` on: they may hold NaN, which a weight of zero doesn't silence.
  // TMA zeroes what lies beyond the array, this what lies beyond a sequence's length.
  template <int kPanelCount, int kPanelBytes>
  static JFA_DEVICE void ClearRows(uint32 tile, int first, int end) {
    for (int i = first * 8 + static_cast<int>(ReadThreadIndex() % kGroupThreads); i < end * 8;
         i += kGroupThreads) {
#pragma unroll
      for (int panel = 0; panel < kPanelCount; ++panel) {
        StoreShared16(tile + panel * kPanelBytes + i * 16, make_uint4(0, 0, 0, 0));
      }
    }
  }

  // One lane per warp: a buffer is free when all consumer warps say so.
  static JFA_DEVICE void Arrive(uint32 barrier) {
    if (ReadLaneIndex() == 0) MbarrierArrive(barrier);
  }

  static JFA_DEVICE void StoreDs(const Fragments& ds, uint32 smem_ds, int group) {
    const int thread = ReadThreadIndex() % kGroupThreads, lane = thread % kWarpSize;
    const uint32 base = smem_ds +
                        (group * kGroupKeys + thread / kWarpSize * 16 + (lane & 15)) * kRowBytes +
                        (((lane >> 4) ^ (lane & 7)) << 4);
#pragma unroll
    for (int step = 0; step < kM / 16; ++step) {
      Stmatrix4(base ^ (step * 32), ds[step]);
    }
  }

  static JFA_DEVICE void AddDq(float* sums, const DqPart& dq, int row0, int q_len, int group) {
    const int thread = ReadThreadIndex() % kGroupThreads, lane = thread % kWarpSize;
    const int row_block = row0 / 16 + thread / kWarpSize;
    if (row_block * 16 >= q_len) return;
    float* block =
        sums +
        (static_cast<int64>(row_block) * (C::kHeadDim / 16) + group * (kDqColumns / 16)) * 256 +
        DqElement(0, 0, lane);
#pragma unroll
    for (int n = 0; n < kDqColumns / 16; ++n) {
      const float (&left)[4] = dq[0][2 * n];
      const float (&right)[4] = dq[0][2 * n + 1];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        RedAdd4(block + n * 256 + half * 128, left[2 * half], left[2 * half + 1], right[2 * half],
                right[2 * half + 1]);
      }
    }
  }

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

  static JFA_DEVICE void Consume(const BwdParams& params, uint32 smem, const Work& work,
                                 const Mask& mask, const Ids& ids, const Walk& walk, int group) {
    const ProblemParams& problem = params.problem;
    const Sequence& sequence = work.sequence;
    const int batch = work.item.batch, key0 = work.key0;
    // Or P waits for dP: a cap leaves a factor of dS behind, for which there are no registers.
    constexpr bool kEarlyDv = !C::kSoftcap;
    float dk[1][C::kHeadDim / 8][4], dv[1][C::kHeadDimV / 8][4];
    Clear(dk);
    Clear(dv);
    Pin(dk);
    Pin(dv);

    if (walk.First() < walk.rows.end) {
      MbarrierWait(Address(smem, kFullKv), 0);
      const int keys = sequence.kv_len - key0;
      if (keys < kN && sequence.kv_begin + sequence.kv_len != problem.kv_len) {
        const int first = Max(keys, group * kGroupKeys), end = (group + 1) * kGroupKeys;
        ClearRows<kPanels, kPanelBytesN>(smem + kSmemK, first, end);
        ClearRows<kPanelsV, kPanelBytesN>(smem + kSmemV, first, end);
        FenceProxyAsync();
        NamedBarrierSync(kGroup + group, kGroupThreads);
      }
      const uint32 smem_k = smem + kSmemK + group * kGroupKeys * kRowBytes,
                   smem_v = smem + kSmemV + group * kGroupKeys * kRowBytes;
      const bool rows_end_early = sequence.q_begin + sequence.q_len != problem.q_len;

      Logits logits(problem, sequence, batch, work.head_begin);
      Step step{work.head_begin, walk.First()};
      Ring ring;
      uint32 smem_ds = smem + kSmemDs, other_ds = smem_ds + kBytesDs;
      float dslope = 0.f;
#pragma unroll 1
      while (step.head < work.head_end) {
        const int row0 = step.block * kM;
        const Step next = step.Next(walk);
        const uint32 q = smem + kSmemQ + ring.stage * kBytesQ;
        const uint32 dout = smem + kSmemDo + ring.stage * kBytesDo;
        const uint32 stats =
            smem + kSmemStats + ring.stage * 2 * kStatBytes + ReadLaneIndex() % 4 * 8;

        MbarrierWait(Address(smem, kFullQ, ring.stage), ring.parity);
        if (rows_end_early && row0 + kM > sequence.q_len) {
          // Every warpgroup for itself: writing a zero twice does no harm.
          MbarrierWait(Address(smem, kFullDo, ring.stage), ring.parity);
          ClearRows<kPanels, kPanelBytesM>(q, sequence.q_len - row0, kM);
          ClearRows<kPanelsV, kPanelBytesM>(dout, sequence.q_len - row0, kM);
          FenceProxyAsync();
          NamedBarrierSync(kGroup + group, kGroupThreads);
        }
        Scores s, dp;
        ScoreGemm<kPanels, kPanelBytesN, kPanelBytesM>(s, smem_k, q);
        MbarrierWait(Address(smem, kFullDo, ring.stage), ring.parity);
        ScoreGemm<kPanelsV, kPanelBytesN, kPanelBytesM>(dp, smem_v, dout);

        const auto dlogit = [&](int n, int e, float delta, float slope) {
          const float x = s[0][n][e] * (dp[0][n][e] - delta);
          if constexpr (C::kDslopes) {
            dslope -= x * fabsf(logits.Distance(FirstRow(row0) + 8 * n + e % 2,
                                                FirstKey(key0) + e / 2 * 8));
          }
          return x * slope;
        };
        if constexpr (kEarlyDv) {
          WgmmaWait<1>();
        } else {
          WgmmaWait<0>();
          Pin(dp);
        }
        Pin(s);
        Hide(s, mask, ids, walk, step, key0, group);
        Fragments p, ds;
#pragma unroll
        for (int n = 0; n < kM / 8; ++n) {
          const float2 lse = LoadSharedFloat2(stats + n * 32);
          [[maybe_unused]] float2 delta;
          if constexpr (!kEarlyDv) delta = LoadSharedFloat2(stats + n * 32 + kStatBytes);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float distance =
                logits.Distance(FirstRow(row0) + 8 * n + e % 2, FirstKey(key0) + e / 2 * 8);
            const Weight weight = Weigh(logits, s[0][n][e], distance, e % 2 ? lse.y : lse.x);
            s[0][n][e] = weight.p;
            if constexpr (!kEarlyDv) {
              dp[0][n][e] = dlogit(n, e, e % 2 ? delta.y : delta.x, weight.slope);
            }
          }
          if (n % 2 == 1) {
            PackBlock<C::kBf16>(p[n / 2], s[0][n - 1], s[0][n]);
            if constexpr (!kEarlyDv) PackBlock<C::kBf16>(ds[n / 2], dp[0][n - 1], dp[0][n]);
          }
        }
        GradientGemm<C::kHeadDimV>(dv, p, dout);

        if constexpr (kEarlyDv) {
          WgmmaWait<1>();
          Pin(dp);
#pragma unroll
          for (int n = 0; n < kM / 8; ++n) {
            const float2 delta = LoadSharedFloat2(stats + n * 32 + kStatBytes);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              dp[0][n][e] = dlogit(n, e, e % 2 ? delta.y : delta.x, 1.f);
            }
            if (n % 2 == 1) PackBlock<C::kBf16>(ds[n / 2], dp[0][n - 1], dp[0][n]);
          }
        }
        if constexpr (C::kDqSums) {
          StoreDs(ds, smem_ds, group);
          FenceProxyAsync();
          NamedBarrierSync(kDsReady, kConsumerThreads);
          DqPart dq;
          DqGemm(dq, smem_ds, smem + kSmemK, group);
          GradientGemm<C::kHeadDim>(dk, ds, q);
          WgmmaWait<1>();
          Pin(dv);
          Pin(dq);
          Arrive(Address(smem, kEmptyDo, ring.stage));
          const BwdScratch scratch =
              BwdScratch::Of<true, C::kHeadDim>(params, sequence, batch, step.head);
          AddDq(scratch.dq, dq, row0, sequence.q_len, group);
          const uint32 swap = smem_ds;
          smem_ds = other_ds;
          other_ds = swap;
        } else {
          GradientGemm<C::kHeadDim>(dk, ds, q);
          WgmmaWait<1>();
          Pin(dv);
          Arrive(Address(smem, kEmptyDo, ring.stage));
        }
        WgmmaWait<0>();
        Pin(dk);
        Arrive(Address(smem, kEmptyQ, ring.stage));
        ring.Advance();
        if (C::kAlibi && next.head != step.head) {
          if constexpr (C::kDslopes) StoreSlope(params, work, step.head, dslope);
          dslope = 0.f;
          if (next.head < work.head_end) logits.SetHead(problem, batch, next.head);
        }
        step = next;
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = FirstKey(key0) + 8 * half;
      const bool writes = key < sequence.kv_rows;
      const int row = sequence.kv_begin + key, head = work.item.head;
      StoreRow<C::kBf16>(dk, half, problem.scale, RowPointer(params.dk, batch, head, row),
                         problem.head_dim, writes);
      StoreRow<C::kBf16>(dv, half, 1.f, RowPointer(params.dv, batch, head, row), problem.head_dim_v,
                         writes);
    }
  }

  static JFA_DEVICE void Run(const BwdParams& params, unsigned char* smem_pointer) {
    const ProblemParams& problem = params.problem;
    const uint32 smem = SmemAddress(smem_pointer);
    const int group = __shfl_sync(kFullWarp, threadIdx.x / kGroupThreads, 0);
    // Key tile 0 is seen by most rows of a causal mask, so tiles in order are longest first.
    Work work;
    work.item = ScheduleWork(blockIdx.x, NumTiles<C::kPacked, kN>(problem, problem.kv_len),
                             problem.batch, problem.num_kv_heads, 1,
                             static_cast<int64>(problem.q_len) * problem.group *
                                 (problem.head_dim * (C::kDqSums ? 6 : 2) + problem.head_dim_v * 2),
                             C::kL2Bytes, kMask);
    work.tile = work.item.block;
    if (!SelectKeys<C::kPacked, kN>(problem, work.item, work.sequence)) return;
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
        MbarrierInit(Address(smem, kEmptyQ, stage), 4 * kConsumers);
        MbarrierInit(Address(smem, kFullDo, stage), 1);
        MbarrierInit(Address(smem, kEmptyDo, stage), 4 * kConsumers);
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
      Consume(params, smem, work, mask, ids, walk, group - 1);
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_BWD_SM90_CUH_
