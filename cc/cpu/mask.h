// Visibility: query position t of a batch element sees the keys [lo, hi). Everything the kernels
// know of masks, and the ranges of key blocks to visit, follows from that one function.
//
// A row is live if it exists (below q_length) and sees a key. Dead rows are never read, get zero
// results, and do not make a block count as partly masked.
#ifndef JAX_FLASHATTN_CC_CPU_MASK_H_
#define JAX_FLASHATTN_CC_CPU_MASK_H_

#include "isa.h"
#include "simd.h"

namespace jfa::cpu::JFA_ISA_NAMESPACE {

struct Mask {
  int64_t q_len;
  int64_t kv_len;
  int64_t offset;
  bool is_causal;
};

struct KeyRange {
  int64_t lo;
  int64_t hi;
};

static inline int64_t Clamp(int64_t x, int64_t lo, int64_t hi) {
  return x < lo ? lo : x > hi ? hi : x;
}

static inline Mask MakeMask(const Problem& p, int64_t batch) {
  Mask mask;
  mask.q_len = p.q_lengths ? Clamp(p.q_lengths[batch], 0, p.q_len) : p.q_len;
  mask.kv_len = p.kv_lengths ? Clamp(p.kv_lengths[batch], 0, p.kv_len) : p.kv_len;
  mask.offset = p.query_offsets ? p.query_offsets[batch] : p.query_offset;
  mask.is_causal = p.is_causal;
  return mask;
}

static inline KeyRange VisibleKeys(const Mask& mask, int64_t t) {
  if (t >= mask.q_len) return {0, 0};
  if (!mask.is_causal) return {0, mask.kv_len};
  return {0, Clamp(t + mask.offset + 1, 0, mask.kv_len)};
}

// The rows [begin, begin + num_rows) of one (batch, key head), at most kRowTile.
struct RowTile {
  int64_t begin;
  int num_rows;
  int num_lanes;               // num_rows rounded up to whole vectors
  int64_t range_lo, range_hi;  // keys that some row sees
  int64_t full_lo, full_hi;    // keys that every live row sees
  int32_t lo[kRowTile];
  int32_t hi[kRowTile];
  int32_t head[kRowTile];  // query head within the group
  int64_t t[kRowTile];

  bool IsLive(int i) const { return i < num_rows && lo[i] < hi[i]; }
  bool IsFull(int64_t key_begin, int64_t key_end) const {
    return full_lo <= key_begin && key_end <= full_hi;
  }
};

static inline void MakeRowTile(const Problem& p, const Mask& mask, int64_t begin, int64_t end,
                               RowTile* tile) {
  tile->begin = begin;
  tile->num_rows = static_cast<int>(Min<int64_t>(kRowTile, end - begin));
  tile->num_lanes = (tile->num_rows + kWidth - 1) / kWidth * kWidth;
  tile->range_lo = tile->full_hi = p.kv_len;
  tile->range_hi = tile->full_lo = 0;
  int64_t head = begin / p.q_len;
  int64_t t = begin % p.q_len;
  for (int i = 0; i < tile->num_lanes; ++i) {
    KeyRange range = {0, 0};
    if (i < tile->num_rows) range = VisibleKeys(mask, t);
    tile->lo[i] = static_cast<int32_t>(range.lo);
    tile->hi[i] = static_cast<int32_t>(range.hi);
    tile->head[i] = static_cast<int32_t>(head);
    tile->t[i] = t;
    if (range.lo < range.hi) {
      tile->range_lo = Min(tile->range_lo, range.lo);
      tile->range_hi = Max(tile->range_hi, range.hi);
      tile->full_lo = Max(tile->full_lo, range.lo);
      tile->full_hi = Min(tile->full_hi, range.hi);
    }
    if (++t == p.q_len) {
      t = 0;
      ++head;
    }
  }
}

// Lanes of tile that see `key`, from lane `lane` on.
JFA_INLINE IVec Visible(const RowTile& tile, int lane, int32_t key) {
  const IVec j = BroadcastI(key);
  return (j >= LoadI(tile.lo + lane)) & (j < LoadI(tile.hi + lane));
}

}  // namespace jfa::cpu::JFA_ISA_NAMESPACE

#endif  // JAX_FLASHATTN_CC_CPU_MASK_H_
