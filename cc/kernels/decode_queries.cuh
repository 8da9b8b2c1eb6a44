// The queries of a tile of decode.cuh on their way to shared memory.
#ifndef JAX_FLASHATTN_CC_KERNELS_DECODE_QUERIES_CUH_
#define JAX_FLASHATTN_CC_KERNELS_DECODE_QUERIES_CUH_

#include "barriers.cuh"
#include "decode_share.cuh"
#include "fragments_fp8.cuh"

namespace jfa {

// Kernel: Decode<C>, whose consumers call these together.
template <class C, class Kernel>
struct DecodeQueries {
  using PanelQ = typename Kernel::PanelQ;
  using Rows = typename Kernel::Rows;
  static constexpr int kConsumers = Kernel::kConsumers;

  static constexpr int kChunks = C::kHeadDim / 8, kItems = C::kRows * kChunks;
  static constexpr int kPasses = (kItems + kConsumers - 1) / kConsumers;
  static constexpr int kAtOnce = kPasses < 8 ? kPasses : 8;
  using Values = uint4[kAtOnce];

  // Asks for items `first`, first + kConsumers and so on, of the first num_rows of a tile; zeros
  // behind, and where a row's key head isn't.
  static JFA_DEVICE void Fetch(const DecodeParams& params, const Rows& rows, int num_rows,
                               int first, Values& values) {
    const ProblemParams& problem = params.fwd.problem;
#pragma unroll
    for (int pass = 0; pass < kAtOnce; ++pass) {
      const int i = first + pass * kConsumers, row = i / kChunks;
      const int own = i % kChunks - rows.PartOf(problem, row) * (kChunks / 2);
      const bool valid =
          row < num_rows && rows.Exists(problem, row) && own >= 0 && own * 8 < problem.head_dim;
      values[pass] = make_uint4(0, 0, 0, 0);
      if (valid) {
        values[pass] = __ldg(reinterpret_cast<const uint4*>(RowPointer(params.fwd.q, rows.batch,
                                                                       rows.HeadOf(problem, row),
                                                                       rows.TokenOf(problem, row)) +
                                                            own * 8));
      }
    }
  }
  static JFA_DEVICE void Put(const Values& values, int first, uint32 smem_q) {
#pragma unroll
    for (int pass = 0; pass < kAtOnce; ++pass) {
      const int i = first + pass * kConsumers, row = i / kChunks, chunk = i % kChunks;
      if (i >= kItems) break;
      StoreShared16(smem_q + chunk / 8 * PanelQ::kBytes + PanelQ::Offset(row, chunk % 8),
                    values[pass]);
    }
  }
  static JFA_DEVICE void Load(const DecodeParams& params, const Rows& rows, int num_rows,
                              uint32 smem_q) {
#pragma unroll 1
    for (int first = ReadThreadIndex(); first < kItems; first += kAtOnce * kConsumers) {
      Values values;
      Fetch(params, rows, num_rows, first, values);
      Put(values, first, smem_q);
    }
  }

  // Queries of a tile with 8-bit keys, in place; the factor that the scores want for it. The warps
  // that share rows share the work.
  static JFA_DEVICE float Prepare(const FwdParams& params, const Rows& rows, uint32 smem_q,
                                  int row_warp, int key_warp) {
    constexpr int kOwn = 16 / Kernel::kKeyWarps;
    const auto at = [=](int row, int chunk) {
      return smem_q + chunk / 8 * PanelQ::kBytes + PanelQ::Offset(row, chunk % 8);
    };
    const ProblemParams& problem = params.problem;
    float scale[C::kTileHeads], largest = 0.f;
#pragma unroll
    for (int part = 0; part < C::kTileHeads; ++part) {
      scale[part] = ScoreScale(params, rows.batch, rows.KeyHead(problem, part));
      largest = fmaxf(largest, scale[part]);
    }
    // Scores have one factor: what a head's is less goes to its queries.
    const auto of_row = [&](int row) {
      if constexpr (C::kTileHeads == 1) return 1.f;
      const float own = rows.PartOf(problem, row) == 0 ? scale[0] : scale[C::kTileHeads - 1];
      return own == largest ? 1.f : own / largest;
    };
    float factor = largest;
    int exponent = 0;
    if constexpr (C::kBf16) {
      exponent = LargestExponent<kChunks>(at, 16 * row_warp, 16);
      factor *= QueryScale(exponent).back;
      NamedBarrierSync(Kernel::kConsumersDone, kConsumers);  // all have seen the rows
    }
    PrepareQueries<C::kBf16, kChunks>(at, 16 * row_warp + kOwn * key_warp, kOwn,
                                      QueryScale(exponent), of_row);
    NamedBarrierSync(Kernel::kConsumersDone, kConsumers);
    return factor;
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_DECODE_QUERIES_CUH_
