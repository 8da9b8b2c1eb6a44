// Visibility: row t of a sequence sees what VisibleKeys says, less the keys of other segments.
// Everything the kernels and the schedule know of masks, and the blocks of keys to visit, follows
// from that one function.
//
// Rows, keys and positions count from the start of a sequence. A row is live if it exists (below
// q_len) and VisibleKeys gives it a key. Dead rows are never read, get zero results, and do not
// make a block count as partly masked.
#ifndef JAX_FLASHATTN_CC_CPU_MASK_H_
#define JAX_FLASHATTN_CC_CPU_MASK_H_

#include <cstdint>

#include "attention.h"
#include "scalar.h"

namespace jfa::cpu {

// Where the tokens of one sequence lie: a batch element, or a part of one if sequences are packed.
// The first q_len of its q_size query tokens exist; the others are padding, and likewise for keys.
struct Sequence {
  int64_t batch;
  int64_t q_begin;  // within the batch element
  int64_t q_size;
  int64_t q_len;
  int64_t kv_begin;
  int64_t kv_size;
  int64_t kv_len;
  int64_t offset;            // position of row 0
  const int32_t* q_ids;      // segment of each row, or null
  const int32_t* kv_ids;     // segment of each key, or null
  const int32_t* pages;      // its row of the page table, or null
  int64_t num_row_tiles;     // of one key head
  int64_t row_tiles_before;  // of one key head, in the sequences before this one
};

// [0, sink_hi) and [lo, hi). They do not touch: where sinks reach the window, lo is 0 and sink_hi
// is 0. Without a window, or where it is empty, sink_hi is 0 too.
struct KeyRange {
  int64_t lo;
  int64_t hi;
  int64_t sink_hi;
};

static inline KeyRange VisibleKeys(const Problem& p, const Sequence& seq, int64_t t) {
  if (t >= seq.q_len) return {0, 0, 0};
  const int64_t position = t + seq.offset;
  const int64_t end = p.is_causal ? Clamp(position + 1, 0, seq.kv_len) : seq.kv_len;
  const int64_t lo = p.window_left < 0 ? 0 : Clamp(position - p.window_left, 0, end);
  const int64_t hi = p.window_right < 0 ? end : Clamp(position + p.window_right + 1, 0, end);
  const int64_t sink_hi = Min(p.sink_tokens, end);
  if (lo >= hi) return {0, sink_hi, 0};
  if (sink_hi >= lo) return {0, Max(hi, sink_hi), 0};
  return {lo, hi, sink_hi};
}

// How many rows see `key`, leaving segments out: VisibleKeys from the other side, for the schedule.
static inline int64_t CountRowsThatSee(const Problem& p, const Sequence& seq, int64_t key) {
  const bool is_sink = key < p.sink_tokens;
  const int64_t right = p.is_causal ? 0 : is_sink ? -1 : p.window_right;
  const int64_t left = is_sink ? -1 : p.window_left;
  const int64_t lo = right < 0 ? 0 : Clamp(key - right - seq.offset, 0, seq.q_len);
  const int64_t hi = left < 0 ? seq.q_len : Clamp(key + left - seq.offset + 1, lo, seq.q_len);
  return hi - lo;
}

struct IdRange {
  int32_t lo;
  int32_t hi;

  bool IsOne() const { return lo == hi; }
  bool Contains(int32_t id) const { return lo <= id && id <= hi; }
  bool Meets(const IdRange& other) const { return lo <= other.hi && other.lo <= hi; }
};

static inline IdRange RangeOf(const int32_t* ids, int64_t count) {
  IdRange range = {INT32_MAX, INT32_MIN};
  for (int64_t i = 0; i < count; ++i) {
    range.lo = Min(range.lo, ids[i]);
    range.hi = Max(range.hi, ids[i]);
  }
  return range;
}

// What the live rows of a tile see, taken together: decides on blocks without looking at rows.
struct alignas(64) RowSpan {
  int64_t lo, hi, sink_hi;                 // hulls: keys that some row sees
  int64_t full_lo, full_hi, full_sink_hi;  // keys that every row sees
  IdRange ids;

  static RowSpan Empty() {
    return {INT64_MAX, 0, 0, 0, INT64_MAX, INT64_MAX, {INT32_MAX, INT32_MIN}};
  }
  void AddRow(const KeyRange& keys) {
    lo = Min(lo, keys.lo);
    hi = Max(hi, keys.hi);
    sink_hi = Max(sink_hi, keys.sink_hi);
    full_lo = Max(full_lo, keys.lo);
    full_hi = Min(full_hi, keys.hi);
    full_sink_hi = Min(full_sink_hi, keys.lo == 0 ? keys.hi : keys.sink_hi);
  }
  void AddId(int32_t id) {
    ids.lo = Min(ids.lo, id);
    ids.hi = Max(ids.hi, id);
  }
  int64_t First() const { return sink_hi > 0 ? 0 : lo; }
  bool IsFull(int64_t begin, int64_t end) const {
    return (full_lo <= begin && end <= full_hi) || end <= full_sink_hi;
  }
};

// The keys [begin, end) of a sequence, all of them valid.
struct KeyBlock {
  int64_t begin;
  int64_t end;
  IdRange ids;  // unspecified without segments
};

static inline KeyBlock MakeKeyBlock(const Sequence& seq, int64_t begin, int64_t end) {
  KeyBlock block = {begin, end, {0, 0}};
  if (seq.kv_ids) block.ids = RangeOf(seq.kv_ids + begin, end - begin);
  return block;
}

// What must be compared for each row and key.
enum class Test { kNone, kRange, kRangeAndSegment };

// The part of a block from the first to the last key that the rows of a tile may see.
struct SeenKeys {
  int64_t begin;
  int num_keys;  // 0: skip the block
  Test test;
  const int32_t* ids;  // from `begin` on, or null
};

static inline SeenKeys See(const Sequence& seq, const RowSpan& span, const KeyBlock& block) {
  constexpr SeenKeys kNothing = {0, 0, Test::kNone, nullptr};
  int64_t lo = Max(block.begin, span.lo), hi = Min(block.end, span.hi);
  if (block.begin < span.sink_hi) {
    hi = Max(lo < hi ? hi : 0, Min(block.end, span.sink_hi));
    lo = block.begin;
  }
  if (lo >= hi) return kNothing;
  Test test = span.IsFull(lo, hi) ? Test::kNone : Test::kRange;
  if (!seq.kv_ids) return {lo, static_cast<int>(hi - lo), test, nullptr};

  if (!span.ids.Meets(block.ids)) return kNothing;
  IdRange ids = block.ids;
  if (!ids.IsOne()) {
    while (lo < hi && !span.ids.Contains(seq.kv_ids[lo])) ++lo;
    while (lo < hi && !span.ids.Contains(seq.kv_ids[hi - 1])) --hi;
    if (lo == hi) return kNothing;
    ids = RangeOf(seq.kv_ids + lo, hi - lo);
    test = span.IsFull(lo, hi) ? Test::kNone : Test::kRange;
  }
  if (!span.ids.IsOne() || !ids.IsOne()) test = Test::kRangeAndSegment;
  return {lo, static_cast<int>(hi - lo), test, seq.kv_ids + lo};
}

}  // namespace jfa::cpu

#endif  // JAX_FLASHATTN_CC_CPU_MASK_H_
