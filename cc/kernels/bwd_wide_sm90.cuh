// Backward attention for Hopper at head dims over 128, whose dK and dV of 64 keys are more than one
// warpgroup can hold: warpgroups own columns.
//
//   one CTA = 64 keys of one key head; it walks the query heads of the group and their rows
//
//              rows i, 64 at a time            columns of dK, dV and dQ, in panels of 64
//             +---------+---------+           +-------------------+-------------------+
//   j   keys  | warp-   | warp-   |   S^T     |                   |                   |   dV += P^T
//   dO
//             | group 1 | group 2 |   dP^T    |    warpgroup 1    |    warpgroup 2    |   dK +=
//             dS^T Q
//             +---------+---------+           +-------------------+-------------------+   dQ = dS K
//
// Roles       as in bwd_sm90.cuh. Each consumer makes half of the rows of P^T and dS^T, and both go
//             through shared memory, since the products that follow need all rows.
// Barriers    full and empty mbarriers of each buffer; one named barrier a step, when P^T and dS^T
//             are there. Two buffers of each: who passes the barrier of a step has read that of the
//             last one.
// Shared      K, V kBlockN * (kHeadDim + kHeadDimV); Q, dO kStages * kBlockM * (same); P^T and dS^T
//             4 * kBlockN * kBlockM; times 2 bytes; LSE and delta kStages * kBlockM * 8 bytes.
// Registers   dK, dV and dQ 32 for each panel, which are dealt out evenly; S and dP 16 each, of
// 240.
#ifndef JAX_FLASHATTN_CC_KERNELS_BWD_WIDE_SM90_CUH_
#define JAX_FLASHATTN_CC_KERNELS_BWD_WIDE_SM90_CUH_

#include "bwd_tiles_sm90.cuh"
#include "row_pieces_sm90.cuh"

namespace jfa {

template <class C>
struct BwdWideSm90 {
  using Tiles = BwdTilesSm90<C, 4>;
  static constexpr int kM = C::kBlockM, kN = C::kBlockN;
  static constexpr int kRows = kM / Tiles::kConsumers;  // of scores, of one warpgroup
  static constexpr int kRowBytes = Tiles::kRowBytes, kPanelColumns = Tiles::kPanelColumns;
  static constexpr int kPanelBytesM = Tiles::kPanelBytesM, kPanelBytesN = Tiles::kPanelBytesN;
  static constexpr int kPanels = Tiles::kPanels, kPanelsV = Tiles::kPanelsV;
  static_assert(kN == 64, "the keys are M of wgmma");
  static_assert(C::kHeadDim % kPanelColumns == 0 && C::kHeadDimV % kPanelColumns == 0,
                "warpgroups own whole panels");

  using Scores = typename Tiles::template Scores<kRows>;
  using Fragments = typename Tiles::template Fragments<kRows>;

  // The panels of one warpgroup: half of dK's and dQ's, and as many of dV's as make both even.
  struct Share {
    int first, count, first_v, count_v;
  };
  static constexpr Share ShareOf(int group) {
    const int half = (kPanels + 1) / 2, even = (2 * kPanels + kPanelsV) / 2 - 2 * half;
    const int half_v = even < 0 ? 0 : even > kPanelsV ? kPanelsV : even;
    return group == 0 ? Share{0, half, 0, half_v}
                      : Share{half, kPanels - half, half_v, kPanelsV - half_v};
  }
  template <int kPanelCount>
  using Columns = float[1][(kPanelCount > 0 ? kPanelCount : 1) * 8][4];

  // d += A B, started: A is P^T or dS^T in shared memory, B columns of dO or Q.
  template <int kPanelCount>
  static JFA_DEVICE void GradientGemm(Columns<kPanelCount>& d, uint32 smem_a, uint32 smem_b) {
    if constexpr (kPanelCount > 0) {
      const uint64 a = PanelDescriptor(smem_a, 16), b = PanelDescriptor(smem_b, kPanelBytesM);
      Pin(d);
      WgmmaFence();
#pragma unroll
      for (int step = 0; step < kM / 16; ++step) {
        Wgmma<kPanelCount * 64>::template Ss<C::kBf16, true>(d, a + ((step * 32) >> 4),
                                                             b + ((step * 16 * kRowBytes) >> 4), 1);
      }
    }
    WgmmaCommit();
    if constexpr (kPanelCount > 0) Pin(d);
  }

  // d = dS K, columns of it, started.
  template <int kPanelCount>
  static JFA_DEVICE void DqGemm(Columns<kPanelCount>& d, uint32 smem_ds, uint32 smem_k) {
    if constexpr (kPanelCount > 0) {
      const uint64 a = PanelDescriptor(smem_ds, 16), b = PanelDescriptor(smem_k, kPanelBytesN);
      Pin(d);
      WgmmaFence();
#pragma unroll
      for (int step = 0; step < kN / 16; ++step) {
        const uint64 offset = (step * 16 * kRowBytes) >> 4;
        Wgmma<kPanelCount * 64>::template Ss<C::kBf16, true, true>(d, a + offset, b + offset,
                                                                   step > 0);
      }
    }
    WgmmaCommit();
    if constexpr (kPanelCount > 0) Pin(d);
  }

  template <int kGroup>
  static JFA_DEVICE void Consume(const BwdParams& params, uint32 smem,
                                 const typename Tiles::Work& work, const typename Tiles::Mask& mask,
                                 const typename Tiles::Ids& ids, const typename Tiles::Walk& walk) {
    constexpr Share kShare = ShareOf(kGroup);
    const ProblemParams& problem = params.problem;
    const Sequence& sequence = work.sequence;
    const int batch = work.item.batch, key0 = work.key0;
    Columns<kShare.count> dk;
    Columns<kShare.count_v> dv;
    Clear(dk);
    Clear(dv);
    Pin(dk);
    Pin(dv);

    if (walk.First() < walk.rows.end) {
      MbarrierWait(Tiles::Address(smem, Tiles::kFullKv), 0);
      const uint32 smem_k = smem + Tiles::kSmemK, smem_v = smem + Tiles::kSmemV;
      const int keys = sequence.kv_len - key0;
      // Every warpgroup clears padding for itself: writing a zero twice does no harm.
      if (keys < kN && sequence.kv_begin + sequence.kv_len != problem.kv_len) {
        Tiles::template ClearRows<kPanels, kPanelBytesN>(smem_k, keys, kN);
        Tiles::template ClearRows<kPanelsV, kPanelBytesN>(smem_v, keys, kN);
        FenceProxyAsync();
        NamedBarrierSync(Tiles::kGroup + kGroup, Tiles::kGroupThreads);
      }
      const bool rows_end_early = sequence.q_begin + sequence.q_len != problem.q_len;

      typename Tiles::Logits logits(problem, sequence, batch, work.head_begin);
      typename Tiles::Step step{work.head_begin, walk.First()};
      typename Tiles::Ring ring;
      uint32 exchange = smem + Tiles::kSmemExchange, other = exchange + 2 * kPanelBytesN;
      float dslope = 0.f;
#pragma unroll 1
      while (step.head < work.head_end) {
        const int row0 = step.block * kM;
        const typename Tiles::Step next = step.Next(walk);
        const uint32 q = smem + Tiles::kSmemQ + ring.stage * Tiles::kBytesQ;
        const uint32 dout = smem + Tiles::kSmemDo + ring.stage * Tiles::kBytesDo;
        const uint32 stats = smem + Tiles::kSmemStats + ring.stage * 2 * Tiles::kStatBytes +
                             kGroup * kRows * 4 + ReadLaneIndex() % 4 * 8;

        MbarrierWait(Tiles::Address(smem, Tiles::kFullQ, ring.stage), ring.parity);
        if (rows_end_early && row0 + kM > sequence.q_len) {
          MbarrierWait(Tiles::Address(smem, Tiles::kFullDo, ring.stage), ring.parity);
          Tiles::template ClearRows<kPanels, kPanelBytesM>(q, sequence.q_len - row0, kM);
          Tiles::template ClearRows<kPanelsV, kPanelBytesM>(dout, sequence.q_len - row0, kM);
          FenceProxyAsync();
          NamedBarrierSync(Tiles::kGroup + kGroup, Tiles::kGroupThreads);
        }
        Scores s, dp;
        Tiles::template ScoreGemm<kRows, C::kHeadDim, kPanelBytesN, kPanelBytesM>(
            s, smem_k, q + kGroup * kRows * kRowBytes);
        MbarrierWait(Tiles::Address(smem, Tiles::kFullDo, ring.stage), ring.parity);
        Tiles::template ScoreGemm<kRows, C::kHeadDimV, kPanelBytesN, kPanelBytesM>(
            dp, smem_v, dout + kGroup * kRows * kRowBytes);
        WgmmaWait<0>();
        Pin(s);
        Pin(dp);

        const int first_row = row0 + kGroup * kRows;
        Tiles::template Hide<kRows>(s, mask, ids, walk, step, key0, first_row);
        const typename Tiles::Place place = Tiles::PlaceIn(key0, first_row);
        Fragments p, ds;
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n) {
          const float2 lse = LoadSharedFloat2(stats + n * 32);
          const float2 delta = LoadSharedFloat2(stats + n * 32 + Tiles::kStatBytes);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float distance =
                logits.Distance(place.row + 8 * n + e % 2, place.key + e / 2 * 8);
            const Weight weight = Weigh(logits, s[0][n][e], distance, e % 2 ? lse.y : lse.x);
            const float dlogit = weight.p * (dp[0][n][e] - (e % 2 ? delta.y : delta.x));
            if constexpr (C::kDslopes) dslope -= dlogit * fabsf(distance);
            s[0][n][e] = weight.p;
            dp[0][n][e] = dlogit * weight.slope;
          }
          if (n % 2 == 1) {
            PackBlock<C::kBf16>(p[n / 2], s[0][n - 1], s[0][n]);
            PackBlock<C::kBf16>(ds[n / 2], dp[0][n - 1], dp[0][n]);
          }
        }
        const uint32 smem_p = exchange, smem_ds = exchange + kPanelBytesN;
        Tiles::template StoreScores<kRows>(p, smem_p, 0, kGroup * kRows);
        Tiles::template StoreScores<kRows>(ds, smem_ds, 0, kGroup * kRows);
        FenceProxyAsync();
        NamedBarrierSync(Tiles::kExchange, Tiles::kConsumerThreads);

        constexpr int kCount = kShare.count, kFirst = kShare.first;
        const auto add_dq = [&](const Columns<kShare.count>& dq) {
          if constexpr (kCount > 0) {
            const BwdScratch scratch = BwdScratch::Of<true, C::kHeadDim>(params, sequence, batch,
                                                                         step.head, work.item.head);
            Tiles::template AddDq<kCount * 64>(scratch.dq, dq, row0, sequence.q_len, kFirst * 64);
          }
        };
        const auto start_dv = [&] {
          GradientGemm<kShare.count_v>(dv, smem_p, dout + kShare.first_v * kPanelBytesM);
        };
        const auto start_dk = [&] {
          GradientGemm<kShare.count>(dk, smem_ds, q + kShare.first * kPanelBytesM);
        };
        // One warpgroup adds while the other one multiplies.
        if constexpr (C::kDqSums && kGroup == 1) {
          Columns<kShare.count> dq;
          DqGemm<kShare.count>(dq, smem_ds, smem_k + kShare.first * kPanelBytesN);
          WgmmaWait<0>();
          Pin(dq);
          add_dq(dq);
          start_dv();
          start_dk();
          WgmmaWait<1>();
        } else if constexpr (C::kDqSums) {
          start_dv();
          Columns<kShare.count> dq;
          DqGemm<kShare.count>(dq, smem_ds, smem_k + kShare.first * kPanelBytesN);
          start_dk();
          WgmmaWait<1>();
          Pin(dq);
          add_dq(dq);
        } else {
          start_dv();
          start_dk();
          WgmmaWait<1>();
        }
        Pin(dv);
        Tiles::Arrive(Tiles::Address(smem, Tiles::kEmptyDo, ring.stage));
        WgmmaWait<0>();
        Pin(dk);
        Tiles::Arrive(Tiles::Address(smem, Tiles::kEmptyQ, ring.stage));
        ring.Advance();
        const uint32 swap = exchange;
        exchange = other;
        other = swap;
        if (C::kAlibi && next.head != step.head) {
          if constexpr (C::kDslopes) Tiles::StoreSlope(params, work, step.head, dslope);
          dslope = 0.f;
          if (next.head < work.head_end) logits.SetHead(problem, batch, next.head);
        }
        step = next;
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = Tiles::PlaceIn(key0, 0).key + 8 * half;
      const bool writes = key < sequence.kv_rows;
      const int row = sequence.kv_begin + key, head = work.item.head;
      if constexpr (kShare.count > 0) {
        constexpr int kFirst = kShare.first * kPanelColumns;
        StoreRow<C::kBf16>(dk, half, problem.scale,
                           RowPointer(params.dk, batch, head, row) + kFirst,
                           problem.head_dim - kFirst, writes);
      }
      if constexpr (kShare.count_v > 0) {
        constexpr int kFirst = kShare.first_v * kPanelColumns;
        StoreRow<C::kBf16>(dv, half, 1.f, RowPointer(params.dv, batch, head, row) + kFirst,
                           problem.head_dim_v - kFirst, writes);
      }
    }
  }

  static JFA_DEVICE void Run(const BwdParams& params, unsigned char* smem_pointer) {
    Tiles::RunRoles(params, smem_pointer,
                    [&](uint32 smem, const auto& work, const auto& mask, const auto& ids,
                        const auto& walk, int group) {
                      if (group == 0) {
                        Consume<0>(params, smem, work, mask, ids, walk);
                      } else {
                        Consume<1>(params, smem, work, mask, ids, walk);
                      }
                    });
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_BWD_WIDE_SM90_CUH_
