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
// Roles       Warpgroup 0 gives its registers away; its first warp produces: it copies K, V, then
//             Q, dO and the rows' statistics step by step. Each other warpgroup consumes: it owns
//             64 keys, whose P^T and dS^T stay in registers for dV and dK.
// dQ          needs all keys: dS^T goes through shared memory, and each warpgroup then makes half
//             of the product's columns and adds them up in global memory.
// Overlap     A warp that starts a product waits until the tensor cores take it, so a warpgroup's
//             own softmax hides little: the other one's products have to. They take turns: the
//             second makes its part of dQ when the first is done with its own, and stays so far
//             behind. The first, which is ahead, makes dQ of the step before.
// Barriers    full and empty mbarriers of each buffer. One named barrier for each warpgroup's turn;
//             a turn also says that the other's dS^T is there, and that one of the two buffers of
//             dS^T has been read.
// Shared      K, V kBlockN * (kHeadDim + kHeadDimV); Q, dO kStages * kBlockM * (same); dS^T
//             2 * kBlockN * kBlockM; times 2 bytes; LSE and delta kStages * kBlockM * 8 bytes.
// Registers   dK and dV kHeadDim / 2 + kHeadDimV / 2, S and dP kBlockM, of 240.
#ifndef JAX_FLASHATTN_CC_KERNELS_BWD_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_BWD_SM90_CUH_

#include "bwd_rows_sm90.cuh"
#include "bwd_tiles_sm90.cuh"

namespace jfa {

template <class C>
struct BwdSm90 {
  using Tiles = BwdTilesSm90<C, 2>;
  using Rows = BwdRowsSm90<C, Tiles>;
  static constexpr int kM = C::kBlockM, kN = C::kBlockN;
  static constexpr int kGroupKeys = Rows::kGroupKeys;
  static constexpr int kRowBytes = Tiles::kRowBytes, kPanelColumns = Tiles::kPanelColumns;
  static constexpr int kPanelBytesM = Tiles::kPanelBytesM, kPanelBytesN = Tiles::kPanelBytesN;
  // A warpgroup's columns of dQ are in one panel: half of them, or one warpgroup has a panel and
  // the other the rest. Then each has code of its own, else kGroup is -1; and a turn ends after dK,
  // not after dQ (8% faster at head dim 96, 4% slower at 128).
  static constexpr bool kEven = C::kHeadDim / 2 % 32 == 0;
  template <int kGroup>
  static constexpr int kDqColumns = kEven         ? C::kHeadDim / 2
                                    : kGroup == 0 ? kPanelColumns
                                                  : C::kHeadDim - kPanelColumns;
  template <int kGroup>
  static JFA_DEVICE int DqColumn(int group) {
    return kGroup < 0 ? group * kDqColumns<kGroup> : kGroup * kPanelColumns;
  }

  enum NamedBarrier { kTurn = Tiles::kOther };  // one of each consumer warpgroup

  static_assert(kN == kGroupKeys * Tiles::kConsumers, "a consumer warpgroup owns 64 keys");
  static_assert(C::kHeadDim <= 2 * kPanelColumns, "a warpgroup's columns of dQ are in one panel");

  using Scores = typename Tiles::template Scores<kM>;
  using Fragments = typename Tiles::template Fragments<kM>;
  template <int kGroup>
  using DqPart = float[1][kDqColumns<kGroup> / 8][4];

  // d = dS K, a warpgroup's columns of it, started.
  template <int kGroup>
  static JFA_DEVICE void DqGemm(DqPart<kGroup>& d, uint32 smem_ds, uint32 smem_k, int group) {
    const int column = DqColumn<kGroup>(group);
    const uint64 a = PanelDescriptor(smem_ds, 16),
                 b = PanelDescriptor(
                     smem_k + column / kPanelColumns * kPanelBytesN + column % kPanelColumns * 2,
                     16);
    Pin(d);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kN / 16; ++step) {
      const uint64 offset = (step * 16 * kRowBytes) >> 4;
      Wgmma<kDqColumns<kGroup>>::template Ss<C::kBf16, true, true>(d, a + offset, b + offset,
                                                                   step > 0);
    }
    WgmmaCommit();
    Pin(d);
  }

  using Dk = float[1][C::kHeadDim / 8][4];
  using Dv = float[1][C::kHeadDimV / 8][4];

  // Keeps the compiler from computing what follows from it before the loop and keeping that in
  // registers.
  static JFA_DEVICE uint32 Anew(uint32 x) {
    asm volatile("" : "+r"(x));
    return x;
  }

  // S = K Q^T of a step, started when its rows are there.
  static JFA_DEVICE void StartS(Scores& s, uint32 smem, const ProblemParams& problem,
                                const typename Tiles::Work& work, const typename Tiles::Step& step,
                                const typename Tiles::Ring& ring, int group) {
    Rows::template AwaitRows<Tiles::kFullQ>(problem, smem, work, step, ring, group);
    Tiles::template ScoreGemm<kM, C::kHeadDim, kPanelBytesN, kPanelBytesM>(
        s, Anew(smem + Tiles::kSmemK + group * kGroupKeys * kRowBytes),
        smem + Tiles::kSmemQ + ring.stage * Tiles::kBytesQ);
  }

  // dP = V dO^T, likewise.
  static JFA_DEVICE void StartDp(Scores& dp, uint32 smem, const typename Tiles::Ring& ring,
                                 int group) {
    MbarrierWait(Tiles::Address(smem, Tiles::kFullDo, ring.stage), ring.parity);
    Tiles::template ScoreGemm<kM, C::kHeadDimV, kPanelBytesN, kPanelBytesM>(
        dp, Anew(smem + Tiles::kSmemV + group * kGroupKeys * kRowBytes),
        smem + Tiles::kSmemDo + ring.stage * Tiles::kBytesDo);
  }

  template <int kGroup>
  static JFA_DEVICE void WalkSteps(const BwdParams& params, uint32 smem,
                                   const typename Tiles::Work& work,
                                   const typename Tiles::Mask& mask, const typename Tiles::Ids& ids,
                                   const typename Tiles::Walk& walk, int group, Dk& dk, Dv& dv) {
    // Or P waits for dP: a cap leaves a factor of dS behind, for which there are no registers.
    constexpr bool kEarlyDv = !C::kSoftcap;
    const ProblemParams& problem = params.problem;
    const int batch = work.item.batch, first_key = work.key0 + group * kGroupKeys;
    typename Tiles::Logits logits(problem, work.sequence, batch, work.head_begin);
    typename Tiles::Step step{work.head_begin, walk.First()};
    typename Tiles::Ring ring;
    uint32 smem_ds = smem + Tiles::kSmemExchange, other_ds = smem_ds + kPanelBytesN;
    float dslope = 0.f;
    // Of which step dQ is made. The first warpgroup is ahead, so it is one behind with that.
    const bool lags = group == 0;
    typename Tiles::Step of = lags ? typename Tiles::Step{-1, 0} : step;
    typename Tiles::DqSums sums;
    if constexpr (C::kDqSums) sums = Tiles::DqSums::Of(params, work, DqColumn<kGroup>(group));
#pragma unroll 1
    while (step.head < work.head_end) {
      const int row0 = step.block * kM;
      const typename Tiles::Step next = step.Next(walk);
      const uint32 q = smem + Tiles::kSmemQ + ring.stage * Tiles::kBytesQ;
      const uint32 dout = smem + Tiles::kSmemDo + ring.stage * Tiles::kBytesDo;
      const uint32 stats =
          smem + Tiles::kSmemStats + ring.stage * 2 * Tiles::kStatBytes + ReadLaneIndex() % 4 * 8;

      Scores s, dp;
      StartS(s, smem, problem, work, step, ring, group);
      StartDp(dp, smem, ring, group);

      const typename Tiles::Place place = Tiles::PlaceIn(first_key, row0);
      const auto dlogit = [&](int n, int e, float delta, float slope) {
        const float x = s[0][n][e] * (dp[0][n][e] - delta);
        if constexpr (C::kDslopes) {
          dslope -= x * fabsf(logits.Distance(place.row + 8 * n + e % 2, place.key + e / 2 * 8));
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
      Tiles::template Hide<kM>(s, mask, ids, walk, step, first_key, row0);
      Fragments p, ds;
#pragma unroll
      for (int n = 0; n < kM / 8; ++n) {
        const float2 lse = LoadSharedFloat2(stats + n * 32);
        [[maybe_unused]] float2 delta;
        if constexpr (!kEarlyDv) delta = LoadSharedFloat2(stats + n * 32 + Tiles::kStatBytes);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float distance = logits.Distance(place.row + 8 * n + e % 2, place.key + e / 2 * 8);
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
      Tiles::template GradientGemm<C::kHeadDimV>(dv, p, dout);

      if constexpr (kEarlyDv) {
        WgmmaWait<1>();
        Pin(dp);
#pragma unroll
        for (int n = 0; n < kM / 8; ++n) {
          const float2 delta = LoadSharedFloat2(stats + n * 32 + Tiles::kStatBytes);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            dp[0][n][e] = dlogit(n, e, e % 2 ? delta.y : delta.x, 1.f);
          }
          if (n % 2 == 1) PackBlock<C::kBf16>(ds[n / 2], dp[0][n - 1], dp[0][n]);
        }
      }
      if constexpr (C::kDqSums) {
        Tiles::template StoreScores<kM>(ds, smem_ds, group * kGroupKeys);
        FenceProxyAsync();
        if (of.head >= 0) NamedBarrierSync(kTurn + group, Tiles::kConsumerThreads);
        DqPart<kGroup> dq;
        DqGemm<kGroup>(dq, lags ? other_ds : smem_ds, smem + Tiles::kSmemK, group);
        Tiles::template GradientGemm<C::kHeadDim>(dk, ds, q);
        WgmmaWait<1>();
        Pin(dv);
        Pin(dq);
        Tiles::Arrive(Tiles::Address(smem, Tiles::kEmptyDo, ring.stage));
        if constexpr (kEven) NamedBarrierArrive(kTurn + 1 - group, Tiles::kConsumerThreads);
        if (of.head >= 0) sums.template Add<kDqColumns<kGroup>>(dq, of.block);
        const int head = of.head;
        of = lags ? step : next;
        if (head >= 0 && of.head != head) sums.NextHead(params);
        const uint32 swap = smem_ds;
        smem_ds = other_ds;
        other_ds = swap;
      } else {
        Tiles::template GradientGemm<C::kHeadDim>(dk, ds, q);
        WgmmaWait<1>();
        Pin(dv);
        Tiles::Arrive(Tiles::Address(smem, Tiles::kEmptyDo, ring.stage));
      }
      WgmmaWait<0>();
      Pin(dk);
      Tiles::Arrive(Tiles::Address(smem, Tiles::kEmptyQ, ring.stage));
      if constexpr (C::kDqSums && !kEven) {
        NamedBarrierArrive(kTurn + 1 - group, Tiles::kConsumerThreads);
      }
      ring.Advance();
      if (C::kAlibi && next.head != step.head) {
        if constexpr (C::kDslopes) Tiles::StoreSlope(params, work, step.head, dslope);
        dslope = 0.f;
        if (next.head < work.head_end) logits.SetHead(problem, batch, next.head);
      }
      step = next;
    }
    if constexpr (C::kDqSums) {
      if (lags) {
        NamedBarrierSync(kTurn + group, Tiles::kConsumerThreads);
        DqPart<kGroup> dq;
        DqGemm<kGroup>(dq, other_ds, smem + Tiles::kSmemK, group);
        WgmmaWait<0>();
        Pin(dq);
        sums.template Add<kDqColumns<kGroup>>(dq, of.block);
      }
    }
  }

  template <int kGroup>
  static JFA_DEVICE void Consume(const BwdParams& params, uint32 smem,
                                 const typename Tiles::Work& work, const typename Tiles::Mask& mask,
                                 const typename Tiles::Ids& ids, const typename Tiles::Walk& walk,
                                 int group) {
    const ProblemParams& problem = params.problem;
    const int first_key = work.key0 + group * kGroupKeys;
    Dk dk;
    Dv dv;
    Clear(dk);
    Clear(dv);
    Pin(dk);
    Pin(dv);

    if (walk.First() < walk.rows.end) {
      Rows::AwaitKeys(problem, smem, work, group * kGroupKeys, group);
      WalkSteps<kGroup>(params, smem, work, mask, ids, walk, group, dk, dv);
    }

    // Rows of both in turn: one gradient after the other takes more instructions.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = Tiles::PlaceIn(first_key, 0).key + 8 * half;
      Rows::StoreGradient(dk, half, params.dk, work, key, problem.scale, problem.head_dim);
      Rows::StoreGradient(dv, half, params.dv, work, key, 1.f, problem.head_dim_v);
    }
  }

  static JFA_DEVICE void Run(const BwdParams& params, unsigned char* smem_pointer) {
    Tiles::RunRoles(params, smem_pointer,
                    [&](uint32 smem, const auto& work, const auto& mask, const auto& ids,
                        const auto& walk, int group) {
                      if constexpr (kEven) {
                        Consume<-1>(params, smem, work, mask, ids, walk, group);
                      } else if (group == 0) {
                        Consume<0>(params, smem, work, mask, ids, walk, group);
                      } else {
                        Consume<1>(params, smem, work, mask, ids, walk, group);
                      }
                    });
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_BWD_SM90_CUH_
