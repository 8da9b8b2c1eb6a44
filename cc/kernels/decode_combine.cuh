// Merges the partial results that the decode kernel left of tiles which several CTAs share.
//
// Such a tile has a first boundary between two stretches (decode_share.cuh). Each row of each of
// them is merged by 1 << merge_log2 warps, which take the parts in turns and then add up what they
// have; a lane has four columns at a time. The order is that of the CTAs, then of the warps:
// results repeat bit by bit.
#ifndef JAX_FLASHATTN_CC_KERNELS_DECODE_COMBINE_CUH_
#define JAX_FLASHATTN_CC_KERNELS_DECODE_COMBINE_CUH_

#include "decode_share.cuh"

namespace jfa {

template <class C>
struct DecodeCombine {
  static constexpr int kAtOnce = 8;

  // Values under a reference, and reference and sum of their weights.
  struct Part {
    float4 x;
    float2 total;

    JFA_DEVICE Part()
        : x(make_float4(0, 0, 0, 0)), total(make_float2(-OnlineSoftmax<1>::kNothingSeen, 0.f)) {}
    JFA_DEVICE void RaiseTo(float lowest) {
      const float reference = fmaxf(total.x, lowest), factor = Exp2(total.x - reference);
      x = make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
      total = make_float2(reference, total.y * factor);
    }
    // One whose reference is no higher.
    JFA_DEVICE void AddLower(const Part& other) {
      const float weight = Exp2(other.total.x - total.x);
      x.x = fmaf(weight, other.x.x, x.x);
      x.y = fmaf(weight, other.x.y, x.y);
      x.z = fmaf(weight, other.x.z, x.z);
      x.w = fmaf(weight, other.x.w, x.w);
      total.y = fmaf(weight, other.total.y, total.y);
    }
  };

  // The CTA whose stretch begins at the first boundary within a tile: that number `index` of those
  // that have one, or of all, if all visit the same blocks. num_ctas if there is none. By a whole
  // warp.
  static JFA_DEVICE int FindBoundary(const DecodeScratch& scratch, const DecodeParams& params,
                                     int num_tiles, int index) {
    constexpr int kMostCtas = 384;  // kMostDecodeCtas of plan_decode.cc
    constexpr int kSteps = kMostCtas / kWarpSize;
    const int lane = ReadLaneIndex();
    const DecodeScratch::Header header = *scratch.header;
    const Stretches stretches(header.total, header.num_ctas);
    const ProblemParams& p = params.fwd.problem;
    if (p.q_lengths == nullptr && p.kv_lengths == nullptr && p.query_offsets == nullptr) {
      const int blocks = header.total / num_tiles, start = index * blocks;  // of each tile
      const int cta = stretches.OwnerOf(start) + 1;
      const bool is_within = cta < header.num_ctas && stretches.Begin(cta) < start + blocks;
      return is_within ? cta : header.num_ctas;
    }
    int start[kSteps];
    // All are asked for before one is looked at.
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int cta = i * kWarpSize + lane;
      start[i] = -1;
      if (cta < params.num_ctas && cta > 0) {
        const DecodeScratch::Record tile = scratch.records[cta];
        if (tile.batch >= 0) start[i] = tile.tile_start;
      }
    }
    int found = header.num_ctas, seen = 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int cta = i * kWarpSize + lane;
      const bool is_first =
          start[i] >= 0 && cta < header.num_ctas && stretches.Begin(cta - 1) <= start[i];
      const uint32 firsts = __ballot_sync(kFullWarp, is_first);
      const bool is_it = is_first && seen + __popc(firsts & ((1u << lane) - 1)) == index;
      const uint32 it = __ballot_sync(kFullWarp, is_it);
      if (it != 0) found = i * kWarpSize + __ffs(it) - 1;
      seen += __popc(firsts);
    }
    return found;
  }

  static JFA_DEVICE void Run(const DecodeParams& params) {
    const ProblemParams& p = params.fwd.problem;
    const DecodeScratch scratch = DecodeScratch::Of<C::kRows>(params);
    const int num_units = CeilDiv(p.num_kv_heads, C::kTileHeads) * params.row_tiles;
    const int row_groups = CeilDiv(scratch.rows_stored, C::kWarps >> params.merge_log2);
    const int num_shared = Min(p.batch * num_units, params.num_ctas - 1);  // tiles, at most
    WaitForKernelBefore();
    DecodeScratch::Header header;
    header.parts = params.all_parts;
    if (header.parts == 0) header = *scratch.header;
    if (header.parts == 1) return;
    for (int i = blockIdx.x; i < num_shared * row_groups; i += gridDim.x) {
      const int index = i / row_groups;
      Merge(params, scratch, header, num_units, index, i - index * row_groups);
    }
  }

 private:
  // Some rows of the shared tile number `index`.
  static JFA_DEVICE void Merge(const DecodeParams& params, const DecodeScratch& scratch,
                               const DecodeScratch::Header& header, int num_units, int index,
                               int row_group) {
    __shared__ float4 parts_x[C::kWarps][kWarpSize];
    __shared__ float2 parts_total[C::kWarps][kWarpSize];
    const ProblemParams& problem = params.fwd.problem;
    const int log2 = params.merge_log2;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int share = warp & ((1 << log2) - 1);
    const int row = row_group * (C::kWarps >> log2) + (warp >> log2);
    const int num_tiles = problem.batch * num_units;
    // The first CTA that shares the tile with one before it, and how many do.
    int cta, num_parts, batch, unit;
    if (header.parts > 0) {
      cta = index * header.parts + 1;
      num_parts = header.parts;
      batch = index / num_units;
      unit = index - batch * num_units;
    } else {
      // Where there are fewer tiles than CTAs, there is a place in the grid for each of them only.
      cta = num_tiles < params.num_ctas - 1 ? FindBoundary(scratch, params, num_tiles, index)
                                            : 1 + index;
      // The record of a CTA that has none isn't used.
      const DecodeScratch::Record tile = scratch.records[Min(cta, params.num_ctas - 1)];
      const Stretches stretches(header.total, header.num_ctas);
      if (cta >= header.num_ctas || tile.batch < 0 || stretches.Begin(cta - 1) > tile.tile_start) {
        return;
      }
      num_parts = stretches.OwnerOf(tile.tile_end - 1) - cta + 2;
      batch = tile.batch;
      unit = tile.unit;
    }
    const DecodeRows<C::kRows, C::kTileHeads> rows(params, batch, unit);
    const bool has_row = rows.Exists(problem, row);

    const Sequence sequence = Sequence::Dense(problem, batch, 0);
    const int token = rows.TokenOf(problem, row), head = rows.HeadOf(problem, row);
    for (int column0 = 0; column0 < problem.head_dim_v; column0 += 4 * kWarpSize) {
      const int column = column0 + 4 * lane;
      const bool has_columns = has_row && column < problem.head_dim_v;
      Part sum;
      if (has_columns) {
        // In one pass, as by an online softmax. All are asked for before one is waited for.
        for (int part = share; part < num_parts; part += kAtOnce << log2) {
          Part parts_of[kAtOnce];
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const int p = part + (i << log2);
            if (p >= num_parts) continue;
            const int partial = DecodeScratch::PartialOf(
                cta - 1 + p, p == 0 ? DecodeScratch::kTail : DecodeScratch::kHead);
            parts_of[i].total = scratch.RowsOf(partial)[row];
            parts_of[i].x = *reinterpret_cast<const float4*>(
                scratch.OutOf(partial) + static_cast<int64>(row) * problem.head_dim_v + column);
          }
          float reference = parts_of[0].total.x;
#pragma unroll
          for (int i = 1; i < kAtOnce; ++i) reference = fmaxf(reference, parts_of[i].total.x);
          sum.RaiseTo(reference);
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) sum.AddLower(parts_of[i]);
        }
      }
      if (log2 > 0) {
        __syncthreads();  // the last columns' have been read
        parts_x[warp][lane] = sum.x;
        parts_total[warp][lane] = sum.total;
        __syncthreads();
        for (int i = 1; share == 0 && i < 1 << log2; ++i) {
          Part other;
          other.x = parts_x[warp + i][lane];
          other.total = parts_total[warp + i][lane];
          sum.RaiseTo(other.total.x);
          sum.AddLower(other);
        }
      }
      if (has_columns && share == 0) {
        StoreResult<C::kBf16>(params.fwd, sequence, batch, head, token, column, sum.x, sum.total);
      }
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_DECODE_COMBINE_CUH_
