// The rows that are computed together, one per vector lane: where each lies and what it sees.
#ifndef JAX_FLASHATTN_CC_CPU_ROW_TILE_H_
#define JAX_FLASHATTN_CC_CPU_ROW_TILE_H_

#include "isa.h"
#include "mask.h"
#include "simd.h"

namespace jfa::cpu::JFA_ISA_NAMESPACE {

// The rows [begin, begin + num_rows) of one (sequence, key head), at most kRowTile.
struct RowTile {
  int64_t begin;
  int num_rows;
  int num_lanes;  // num_rows rounded up to whole vectors
  RowSpan span;
  // Per lane. A dead row sees [0, 0).
  int32_t lo[kRowTile];
  int32_t hi[kRowTile];
  int32_t sink_hi[kRowTile];
  int32_t id[kRowTile];   // segment
  float slope[kRowTile];  // of ALiBi, or 0
  float position[kRowTile];
  bool exists[kRowTile];   // neither padding nor beyond num_rows
  int64_t head[kRowTile];  // in a [B, N] array
  int64_t btn[kRowTile];   // in a [B, T, N] array
  int64_t bnt[kRowTile];   // in a [B, N, T] array

  bool IsLive(int i) const { return lo[i] < hi[i]; }
};

static inline void MakeRowTile(const Problem& p, const Sequence& seq, int64_t kv_head,
                               int64_t begin, int64_t end, RowTile* tile) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  tile->begin = begin;
  tile->num_rows = static_cast<int>(Min<int64_t>(kRowTile, end - begin));
  tile->num_lanes = (tile->num_rows + kWidth - 1) / kWidth * kWidth;
  tile->span = RowSpan::Empty();
  int64_t head = kv_head * group + begin / seq.q_size;
  int64_t t = begin % seq.q_size;
  for (int i = 0; i < tile->num_lanes; ++i) {
    KeyRange keys = {0, 0, 0};
    tile->id[i] = 0;
    tile->slope[i] = tile->position[i] = 0;
    tile->exists[i] = i < tile->num_rows && t < seq.q_len;
    if (i < tile->num_rows) {
      const int64_t token = seq.q_begin + t;
      keys = VisibleKeys(p, seq, t);
      tile->head[i] = seq.batch * p.num_heads + head;
      tile->btn[i] = (seq.batch * p.q_len + token) * p.num_heads + head;
      tile->bnt[i] = tile->head[i] * p.q_len + token;
      if (keys.lo < keys.hi) {
        tile->span.AddRow(keys);
        if (seq.q_ids) {
          tile->id[i] = seq.q_ids[t];
          tile->span.AddId(seq.q_ids[t]);
        }
        if (p.alibi_slopes) {
          tile->slope[i] = p.alibi_slopes[tile->head[i]];
          tile->position[i] = static_cast<float>(t + seq.offset);
        }
      }
    }
    tile->lo[i] = static_cast<int32_t>(keys.lo);
    tile->hi[i] = static_cast<int32_t>(keys.hi);
    tile->sink_hi[i] = static_cast<int32_t>(keys.sink_hi);
    if (++t == seq.q_size) {
      t = 0;
      ++head;
    }
  }
}

// Lanes, from `lane` on, that see key j of those at hand.
template <Test kTest>
JFA_INLINE IVec Visible(const RowTile& tile, int lane, const SeenKeys& keys, int j) {
  const IVec key = BroadcastI(static_cast<int32_t>(keys.begin) + j);
  const IVec in_window = (key >= LoadI(tile.lo + lane)) & (key < LoadI(tile.hi + lane));
  const IVec visible = in_window | (key < LoadI(tile.sink_hi + lane));
  if (kTest != Test::kRangeAndSegment) return visible;
  return visible & (BroadcastI(keys.ids[j]) == LoadI(tile.id + lane));
}

}  // namespace jfa::cpu::JFA_ISA_NAMESPACE

#endif  // JAX_FLASHATTN_CC_CPU_ROW_TILE_H_
