// Merges the partial results that the decode kernel left of tiles which several CTAs share.
//
// One CTA per boundary between two stretches (decode_share.cuh) and kWarps rows: it merges the tile
// in which the boundary lies, if it is the first one in it; a warp has one row, a lane four columns
// of its outputs at a time. The order of the parts is that of the CTAs: results repeat bit by bit.
#ifndef JAX_FLASHATTN_CC_KERNELS_DECODE_COMBINE_CUH_
#define JAX_FLASHATTN_CC_KERNELS_DECODE_COMBINE_CUH_

#include "decode_share.cuh"

namespace jfa {

template <class C>
struct DecodeCombine {
  static JFA_DEVICE void Run(const DecodeParams& params) {
    const ProblemParams& problem = params.fwd.problem;
    const DecodeScratch scratch = DecodeScratch::Of<C::kRows>(params);
    const int row_groups = CeilDiv(scratch.rows_stored, C::kWarps);
    const int cta = 1 + blockIdx.x / row_groups;
    const int row = blockIdx.x % row_groups * C::kWarps + threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    WaitForKernelBefore();
    // Both are asked for before one is waited for; the record of a CTA that has none isn't used.
    const DecodeScratch::Header header = *scratch.header;
    const DecodeScratch::Record tile = scratch.records[cta];
    const Stretches stretches(header.total, header.num_ctas);
    if (cta >= header.num_ctas || tile.batch < 0 || stretches.Begin(cta - 1) > tile.tile_start) {
      return;
    }
    const DecodeRows<C::kRows, C::kTileHeads> rows(params, tile.batch, tile.unit);
    if (!rows.Exists(problem, row)) return;

    const int num_parts = stretches.OwnerOf(tile.tile_end - 1) - cta + 2;
    const auto cta_of = [&](int part) { return cta - 1 + part; };
    const auto which = [](int part) {
      return part == 0 ? DecodeScratch::kTail : DecodeScratch::kHead;
    };
    const Sequence sequence = Sequence::Dense(problem, tile.batch, 0);
    const int token = rows.TokenOf(problem, row), head = rows.HeadOf(problem, row);
    for (int column = lane * 4; column < problem.head_dim_v; column += 4 * kWarpSize) {
      float4 sum = make_float4(0, 0, 0, 0);
      float2 total = make_float2(-OnlineSoftmax<1>::kNothingSeen, 0.f);  // reference, sum
      // In one pass, as by an online softmax: all of several parts is asked for at once.
#pragma unroll 8
      for (int part = 0; part < num_parts; ++part) {
        const float2 stat = scratch.RowsOf(cta_of(part), which(part))[row];
        const float4 x =
            *reinterpret_cast<const float4*>(scratch.OutOf(cta_of(part), which(part)) +
                                             static_cast<int64>(row) * problem.head_dim_v + column);
        const float reference = fmaxf(total.x, stat.x);
        const float old = Exp2(total.x - reference), weight = Exp2(stat.x - reference);
        sum.x = fmaf(weight, x.x, sum.x * old);
        sum.y = fmaf(weight, x.y, sum.y * old);
        sum.z = fmaf(weight, x.z, sum.z * old);
        sum.w = fmaf(weight, x.w, sum.w * old);
        total = make_float2(reference, fmaf(weight, stat.y, total.y * old));
      }
      StoreResult<C::kBf16>(params.fwd, sequence, tile.batch, head, token, column, sum, total);
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_DECODE_COMBINE_CUH_
