// Backward attention for Hopper at head dims over 128, whose dK and dV of 64 keys are more than one
// warpgroup can hold: one warpgroup owns dV, the other one dK.
//
//   one CTA = 64 keys of one key head; it walks the query heads of the group and their rows
//
//   warpgroup 1   S^T = K Q^T    P ---------> dV += P^T dO     dQ of the step before, half of it
//                                | f32           ^
//   warpgroup 2   dP^T = V dO^T  +--> dS ----> dK += dS^T Q    dQ = dS K, the other half
//
// Roles       The producer as in bwd_sm90.cuh. Each consumer has all 64 x 64 scores of a step: P
//             goes from the first to the second through shared memory, thread by thread, since both
//             hold the same elements. P^T and dS^T stay in registers for dV and dK; dS^T goes
//             through shared memory for dQ.
// Overlap     The first warpgroup is half a step ahead, so one multiplies while the other one
//             computes weights or adds up dQ.
// Barriers    full and empty mbarriers of each buffer. Named barriers: P is there, P has been read,
//             dS^T is there (one for each of its two buffers).
// Shared      K, V kBlockN * (kHeadDim + kHeadDimV); Q, dO kStages * kBlockM * (same); dS^T
//             2 * kBlockN * kBlockM; times 2 bytes; P 4 * kBlockN * kBlockM bytes, twice that where
//             the slope of a soft cap goes with it; LSE and delta kStages * kBlockM * 8 bytes.
// Registers   dK or dV up to 128, half of dQ up to 64, S or dP 32, of 240.
#ifndef JAX_FLASHATTN_CC_KERNELS_BWD_WIDE_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_BWD_WIDE_SM90_CUH_

#include "bwd_rows_sm90.cuh"
#include "bwd_tiles_sm90.cuh"

namespace jfa {

template <class C>
struct BwdWideSm90 {
  // The gradient of ALiBi's slopes wants dS without the cap's slope.
  static constexpr bool kSendsSlope = C::kSoftcap && C::kDslopes;
  using Tiles = BwdTilesSm90<C, kSendsSlope ? 6 : 4>;
  using Rows = BwdRowsSm90<C, Tiles>;
  static constexpr int kM = C::kBlockM, kN = C::kBlockN;
  static constexpr int kRowBytes = Tiles::kRowBytes, kPanelColumns = Tiles::kPanelColumns;
  static constexpr int kPanelBytesM = Tiles::kPanelBytesM, kPanelBytesN = Tiles::kPanelBytesN;
  static constexpr int kPanels = Tiles::kPanels;
  static_assert(kN == Rows::kGroupKeys, "both warpgroups work on all keys of the tile");
  static_assert(C::kHeadDim % kPanelColumns == 0 && C::kHeadDimV % kPanelColumns == 0,
                "warpgroups own whole panels of dQ");
  static constexpr int kSmemDs = Tiles::kSmemExchange, kSmemP = kSmemDs + 2 * kPanelBytesN;
  static constexpr int kBytesP = 4 * kM * kN;
  enum NamedBarrier {
    kFullP = Tiles::kOther,
    kEmptyP,
    kFullDs,  // and the next one
  };

  using Scores = typename Tiles::template Scores<kM>;
  using Fragments = typename Tiles::template Fragments<kM>;

  // Panels of dQ.
  static constexpr int FirstPanel(int group) { return group == 0 ? 0 : (kPanels + 1) / 2; }
  static constexpr int CountPanels(int group) {
    return group == 0 ? (kPanels + 1) / 2 : kPanels / 2;
  }
  template <int kColumns>
  using Columns = float[1][kColumns / 8][4];

  // A warpgroup's part of dQ = dS K of a step, from start to end; `release` is called in between,
  // when all products that were started are done.
  template <int kGroup, class Release>
  static JFA_DEVICE void AddDq(const typename Tiles::DqSums& sums, uint32 smem, int row_tile,
                               uint32 smem_ds, const Release& release) {
    constexpr int kColumns = CountPanels(kGroup) * kPanelColumns, kFirst = FirstPanel(kGroup);
    if constexpr (kColumns > 0) {
      Columns<kColumns> dq;
      const uint64 a = PanelDescriptor(smem_ds, 16),
                   b = PanelDescriptor(smem + Tiles::kSmemK + kFirst * kPanelBytesN, kPanelBytesN);
      Pin(dq);
      WgmmaFence();
#pragma unroll
      for (int i = 0; i < kN / 16; ++i) {
        const uint64 offset = (i * 16 * kRowBytes) >> 4;
        Wgmma<kColumns>::template Ss<C::kBf16, true, true>(dq, a + offset, b + offset, i > 0);
      }
      WgmmaCommit();
      WgmmaWait<0>();
      Pin(dq);
      release();
      sums.template Add<kColumns>(dq, row_tile);
    } else {
      WgmmaWait<0>();
      release();
    }
  }

  // The element 4 * i of a thread's part of P, or of the slopes.
  static JFA_DEVICE uint32 PlaceOfP(uint32 smem, int i) {
    const int thread = ReadThreadIndex() % Tiles::kGroupThreads;
    return smem + kSmemP + (i * Tiles::kGroupThreads + thread) * 16;
  }
  static JFA_DEVICE void Send(uint32 place, const float (&x)[4]) {
    StoreShared16(place, make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]),
                                    __float_as_uint(x[2]), __float_as_uint(x[3])));
  }
  static JFA_DEVICE void Receive(float (&x)[4], uint32 place) {
    const uint4 words = LoadShared16(place);
    x[0] = __uint_as_float(words.x);
    x[1] = __uint_as_float(words.y);
    x[2] = __uint_as_float(words.z);
    x[3] = __uint_as_float(words.w);
  }

  static JFA_DEVICE void WalkDv(const BwdParams& params, uint32 smem,
                                const typename Tiles::Work& work, const typename Tiles::Mask& mask,
                                const typename Tiles::Ids& ids, const typename Tiles::Walk& walk,
                                Columns<C::kHeadDimV>& dv) {
    const ProblemParams& problem = params.problem;
    const int batch = work.item.batch, key0 = work.key0;
    typename Tiles::Logits logits(problem, work.sequence, batch, work.head_begin);
    typename Tiles::Step step{work.head_begin, walk.First()}, before{-1, 0};
    typename Tiles::Ring ring;
    int buffer = 0;  // of the step's dS^T
    typename Tiles::DqSums sums;
    if constexpr (C::kDqSums) sums = Tiles::DqSums::Of(params, work, 0);
#pragma unroll 1
    while (step.head < work.head_end) {
      const int row0 = step.block * kM;
      const uint32 stats =
          smem + Tiles::kSmemStats + ring.stage * 2 * Tiles::kStatBytes + ReadLaneIndex() % 4 * 8;
      Rows::template AwaitRows<Tiles::kFullQ>(problem, smem, work, step, ring, 0);
      Scores s;
      Tiles::template ScoreGemm<kM, C::kHeadDim, kPanelBytesN, kPanelBytesM>(
          s, smem + Tiles::kSmemK, smem + Tiles::kSmemQ + ring.stage * Tiles::kBytesQ);
      WgmmaWait<0>();
      Pin(s);
      Tiles::template Hide<kM>(s, mask, ids, walk, step, key0, row0);
      const typename Tiles::Place place = Tiles::PlaceIn(key0, row0);
      if (before.head >= 0) NamedBarrierSync(kEmptyP, Tiles::kConsumerThreads);
      Fragments p;
#pragma unroll
      for (int n = 0; n < kM / 8; ++n) {
        const float2 lse = LoadSharedFloat2(stats + n * 32);
        float sent[4], slopes[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float distance = logits.Distance(place.row + 8 * n + e % 2, place.key + e / 2 * 8);
          const Weight weight = Weigh(logits, s[0][n][e], distance, e % 2 ? lse.y : lse.x);
          s[0][n][e] = weight.p;
          sent[e] = kSendsSlope ? weight.p : weight.p * weight.slope;
          slopes[e] = weight.slope;
        }
        Send(PlaceOfP(smem, n), sent);
        if constexpr (kSendsSlope) Send(PlaceOfP(smem, n) + kBytesP, slopes);
        if (n % 2 == 1) PackBlock<C::kBf16>(p[n / 2], s[0][n - 1], s[0][n]);
      }
      NamedBarrierArrive(kFullP, Tiles::kConsumerThreads);
      Tiles::Arrive(Tiles::Address(smem, Tiles::kEmptyQ, ring.stage));
      MbarrierWait(Tiles::Address(smem, Tiles::kFullDo, ring.stage), ring.parity);
      Tiles::template GradientGemm<C::kHeadDimV>(
          dv, p, smem + Tiles::kSmemDo + ring.stage * Tiles::kBytesDo);
      const auto release = [&] {
        Pin(dv);
        Tiles::Arrive(Tiles::Address(smem, Tiles::kEmptyDo, ring.stage));
      };
      if (C::kDqSums && before.head >= 0) {
        const int last = buffer ^ 1;
        NamedBarrierSync(kFullDs + last, Tiles::kConsumerThreads);
        AddDq<0>(sums, smem, before.block, smem + kSmemDs + last * kPanelBytesN, release);
      } else {
        WgmmaWait<0>();
        release();
      }
      ring.Advance();
      buffer ^= 1;
      const typename Tiles::Step next = step.Next(walk);
      if (C::kAlibi && next.head != step.head && next.head < work.head_end) {
        logits.SetHead(problem, batch, next.head);
      }
      if (C::kDqSums && before.head >= 0 && before.head != step.head) sums.NextHead(params);
      before = step;
      step = next;
    }
    if constexpr (C::kDqSums) {
      const int last = buffer ^ 1;
      NamedBarrierSync(kFullDs + last, Tiles::kConsumerThreads);
      AddDq<0>(sums, smem, before.block, smem + kSmemDs + last * kPanelBytesN, [] {});
    }
  }

  static JFA_DEVICE void WalkDk(const BwdParams& params, uint32 smem,
                                const typename Tiles::Work& work, const typename Tiles::Walk& walk,
                                Columns<C::kHeadDim>& dk) {
    const int key0 = work.key0;
    const typename Tiles::Logits logits(params.problem, work.sequence, work.item.batch,
                                        work.head_begin);
    typename Tiles::Step step{work.head_begin, walk.First()};
    typename Tiles::Ring ring;
    int buffer = 0;
    typename Tiles::DqSums sums;
    if constexpr (C::kDqSums) {
      sums = Tiles::DqSums::Of(params, work, FirstPanel(1) * kPanelColumns);
    }
    float dslope = 0.f;
#pragma unroll 1
    while (step.head < work.head_end) {
      const int row0 = step.block * kM;
      const typename Tiles::Step next = step.Next(walk);
      const uint32 stats = smem + Tiles::kSmemStats + ring.stage * 2 * Tiles::kStatBytes +
                           Tiles::kStatBytes + ReadLaneIndex() % 4 * 8;
      Rows::template AwaitRows<Tiles::kFullDo>(params.problem, smem, work, step, ring, 1);
      Scores dp;
      Tiles::template ScoreGemm<kM, C::kHeadDimV, kPanelBytesN, kPanelBytesM>(
          dp, smem + Tiles::kSmemV, smem + Tiles::kSmemDo + ring.stage * Tiles::kBytesDo);
      MbarrierWait(Tiles::Address(smem, Tiles::kFullQ, ring.stage), ring.parity);
      WgmmaWait<0>();
      Pin(dp);
      Tiles::Arrive(Tiles::Address(smem, Tiles::kEmptyDo, ring.stage));
      NamedBarrierSync(kFullP, Tiles::kConsumerThreads);
      const typename Tiles::Place place = Tiles::PlaceIn(key0, row0);
      Fragments ds;
#pragma unroll
      for (int n = 0; n < kM / 8; ++n) {
        const float2 delta = LoadSharedFloat2(stats + n * 32);
        float weights[4];
        Receive(weights, PlaceOfP(smem, n));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          dp[0][n][e] = weights[e] * (dp[0][n][e] - (e % 2 ? delta.y : delta.x));
          if constexpr (C::kDslopes) {
            dslope -= dp[0][n][e] *
                      fabsf(logits.Distance(place.row + 8 * n + e % 2, place.key + e / 2 * 8));
          }
        }
        if constexpr (kSendsSlope) {
          float slopes[4];
          Receive(slopes, PlaceOfP(smem, n) + kBytesP);
#pragma unroll
          for (int e = 0; e < 4; ++e) dp[0][n][e] *= slopes[e];
        }
        if (n % 2 == 1) PackBlock<C::kBf16>(ds[n / 2], dp[0][n - 1], dp[0][n]);
      }
      if (next.head < work.head_end) NamedBarrierArrive(kEmptyP, Tiles::kConsumerThreads);
      const uint32 smem_ds = smem + kSmemDs + buffer * kPanelBytesN;
      if constexpr (C::kDqSums) {
        Tiles::template StoreScores<kM>(ds, smem_ds, 0);
        FenceProxyAsync();
        NamedBarrierArrive(kFullDs + buffer, Tiles::kConsumerThreads);
      }
      Tiles::template GradientGemm<C::kHeadDim>(dk, ds,
                                                smem + Tiles::kSmemQ + ring.stage * Tiles::kBytesQ);
      const auto release = [&] {
        Pin(dk);
        Tiles::Arrive(Tiles::Address(smem, Tiles::kEmptyQ, ring.stage));
      };
      if constexpr (C::kDqSums) {
        NamedBarrierSync(Tiles::kGroup + 1, Tiles::kGroupThreads);
        AddDq<1>(sums, smem, step.block, smem_ds, release);
        if (next.head != step.head) sums.NextHead(params);
      } else {
        WgmmaWait<0>();
        release();
      }
      ring.Advance();
      buffer ^= 1;
      if (C::kDslopes && next.head != step.head) {
        Tiles::StoreSlope(params, work, step.head, dslope);
        dslope = 0.f;
      }
      step = next;
    }
  }

  static JFA_DEVICE void Consume(const BwdParams& params, uint32 smem,
                                 const typename Tiles::Work& work, const typename Tiles::Mask& mask,
                                 const typename Tiles::Ids& ids, const typename Tiles::Walk& walk,
                                 int group) {
    const ProblemParams& problem = params.problem;
    const bool walks = walk.First() < walk.rows.end;
    if (walks) Rows::AwaitKeys(problem, smem, work, 0, group);
    if (group == 0) {
      Columns<C::kHeadDimV> dv;
      Clear(dv);
      Pin(dv);
      if (walks) WalkDv(params, smem, work, mask, ids, walk, dv);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = Tiles::PlaceIn(work.key0, 0).key + 8 * half;
        Rows::StoreGradient(dv, half, params.dv, work, key, 1.f, problem.head_dim_v);
      }
    } else {
      Columns<C::kHeadDim> dk;
      Clear(dk);
      Pin(dk);
      if (walks) WalkDk(params, smem, work, walk, dk);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = Tiles::PlaceIn(work.key0, 0).key + 8 * half;
        Rows::StoreGradient(dk, half, params.dk, work, key, problem.scale, problem.head_dim);
      }
    }
  }

  static JFA_DEVICE void Run(const BwdParams& params, unsigned char* smem_pointer) {
    Tiles::RunRoles(params, smem_pointer,
                    [&](uint32 smem, const auto&... rest) { Consume(params, smem, rest...); });
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_BWD_WIDE_SM90_CUH_
