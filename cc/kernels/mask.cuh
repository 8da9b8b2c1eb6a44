// Who sees whom: the one definition of visibility, and the blocks to visit that follow from it.
//
// Query i sees key j iff  j < kv_len,  i < q_len,  the ids of their segments are equal, and
//
//   low <= j - i < high     with low = offset - window_left, high = offset + window_right + 1
//   or j < sink_tokens      (and j - i < high, if causal)
//
//         j ->  sinks      low    high
//     i        |###|. . . . |#######|. . .
//     |        |###|. . . . . |#######|. .
//     v        |###|. . . . . . |#######|.
//
// Causal masks have no low side, full masks neither; both have no sinks.
#ifndef JAX_FLASHATTN_CC_KERNELS_MASK_CUH_
#define JAX_FLASHATTN_CC_KERNELS_MASK_CUH_

#include "kv_source.cuh"
#include "segments.cuh"

namespace jfa {

struct BlockRange {
  int begin, end;
  JFA_DEVICE bool IsEmpty() const { return begin >= end; }
};

struct Window {
  int begin, end;
  int sink_end;  // keys below are seen too
  JFA_DEVICE Window From(int origin) const {
    return {begin - origin, end - origin, sink_end - origin};
  }
};

template <MaskKind kKind>
struct BandMask {
  static constexpr bool kHasLow = kKind == MaskKind::kLocal;
  static constexpr bool kHasHigh = kKind != MaskKind::kFull;
  static constexpr bool kHasSinks = kKind == MaskKind::kLocal;

  int q_len, kv_len;
  int low, high;
  int sink_tokens;
  bool is_causal;

  // Offsets and windows may be any int. Clamping to [-q_len, kv_len] changes no visible pair, and
  // lets later sums with a row or key number stay inside int (lengths are below 2^30).
  JFA_DEVICE BandMask(const ProblemParams& p, const Sequence& sequence)
      : q_len(sequence.q_len),
        kv_len(sequence.kv_len),
        sink_tokens(Min(p.sink_tokens, sequence.kv_len)),
        is_causal(p.is_causal) {
    const int64 least = -static_cast<int64>(q_len), most = kv_len, offset = sequence.offset;
    low = p.window_left == kIntMax ? -q_len
                                   : static_cast<int>(Clamp(offset - p.window_left, least, most));
    high = p.window_right == kIntMax
               ? kv_len
               : static_cast<int>(Clamp(offset + p.window_right + 1, least, most));
  }

  // Key blocks in which some row of [row_begin, row_end) sees a key of the band.
  template <int kBlockN>
  JFA_DEVICE BlockRange KeyBlocks(int row_begin, int row_end) const {
    const int last = Min(row_end, q_len) - 1;
    if (row_begin > last) return {0, 0};
    const int key_end = kHasHigh ? Min(kv_len, last + high) : kv_len;
    const int key_begin = kHasLow ? Max(0, row_begin + low) : 0;
    if (key_begin >= key_end) return {0, 0};
    return {key_begin / kBlockN, CeilDiv(key_end, kBlockN)};
  }
  // Blocks [0, end) in which some of them sees a sink token.
  template <int kBlockN>
  JFA_DEVICE int SinkBlocks(int row_begin, int row_end) const {
    const int last = Min(row_end, q_len) - 1;
    if (!kHasSinks || row_begin > last) return 0;
    const int end = is_causal ? Min(sink_tokens, last + high) : sink_tokens;
    return end > 0 ? CeilDiv(end, kBlockN) : 0;
  }

  // Row blocks that see some key of [key_begin, key_end).
  template <int kBlockM>
  JFA_DEVICE BlockRange RowBlocks(int key_begin, int key_end) const {
    const int last = Min(key_end, kv_len) - 1;
    if (key_begin > last) return {0, 0};
    const bool has_sink = kHasSinks && key_begin < sink_tokens;
    const bool from_start = !kHasHigh || (has_sink && !is_causal);
    const int row_begin = from_start ? 0 : Max(0, key_begin - high + 1);
    const int row_end = kHasLow && !has_sink ? Min(q_len, last - low + 1) : q_len;
    if (row_begin >= row_end) return {0, 0};
    return {row_begin / kBlockM, CeilDiv(row_end, kBlockM)};
  }

  // Whether a tile that starts at (row, key) holds a pair that the band or the end of the keys
  // hides. Rows beyond q_len don't count: nobody reads their results.
  template <int kBlockM, int kBlockN>
  JFA_DEVICE bool NeedsMask(int row, int key) const {
    return NeedsMask(row, row + kBlockM - 1, key, key + kBlockN - 1);
  }
  JFA_DEVICE bool NeedsMask(int first_row, int last_row, int first_key, int last_key) const {
    bool needs = last_key >= kv_len;
    if constexpr (kHasHigh) needs |= last_key - first_row >= high;
    if constexpr (kHasLow) needs |= first_key - last_row < low;
    return needs;
  }

  // Keys that a row sees; rows that see a key. As windows rather than tests of pairs, because a
  // lane then needs two registers per row and one compare with a constant per pair and side.
  JFA_DEVICE Window KeysOf(int row) const {
    const int end = kHasHigh ? Min(kv_len, row + high) : kv_len;
    return {kHasLow ? row + low : -kFar, end, is_causal ? Min(sink_tokens, end) : sink_tokens};
  }
  JFA_DEVICE Window RowsOf(int key) const {
    const bool is_sink = kHasSinks && key < sink_tokens;
    const int begin = kHasHigh && !(is_sink && !is_causal) ? key - high + 1 : -kFar;
    const int end = kHasLow && !is_sink ? key - low + 1 : kFar;
    return {begin, key < kv_len ? end : -kFar, 0};
  }
  static JFA_DEVICE bool InKeys(const Window& window, int key) {
    if constexpr (!kHasLow) return key < window.end;
    return (key < window.end && key >= window.begin) || key < window.sink_end;
  }
  static JFA_DEVICE bool InRows(const Window& window, int row) {
    return row < window.end && (!kHasHigh || row >= window.begin);
  }

 private:
  static constexpr int kFar = 1 << 30;  // beyond any row or key, far from overflow
};

// The key blocks in which some row sees a key: [0, sink_blocks) for the sink tokens, and those of
// the band, which don't overlap them.
struct KeyBlockSet {
  BlockRange band;
  int sink_blocks;

  template <int kBlockN, class Mask>
  static JFA_DEVICE KeyBlockSet Of(const Mask& mask, int row_begin, int row_end) {
    KeyBlockSet set = {mask.template KeyBlocks<kBlockN>(row_begin, row_end),
                       mask.template SinkBlocks<kBlockN>(row_begin, row_end)};
    if (set.band.IsEmpty()) {
      set.band = {set.sink_blocks, set.sink_blocks};
    } else if (set.sink_blocks > set.band.begin) {
      // They touch: the sinks may even reach beyond the band.
      set.band.end = Max(set.band.end, set.sink_blocks);
      set.sink_blocks = set.band.begin;
    }
    return set;
  }

  JFA_DEVICE int Count() const { return sink_blocks + band.end - band.begin; }
  // Block number `index` from the left.
  JFA_DEVICE int At(int index) const {
    return index < sink_blocks ? index : band.begin + index - sink_blocks;
  }
};

// The key blocks that a tile of rows visits, from the right to the left: those of the band, then
// those of the sink tokens. -1 is the end.
template <MaskKind kKind, bool kSegments, int kBlockM, int kBlockN>
struct KeyWalk {
  BlockRange band;
  int sink_blocks;
  SegmentSide<kSegments> keys;
  SegmentRange own;    // ids of the rows
  SegmentRange ahead;  // ids of the block below the one returned last
  bool one_segment;    // whether all pairs of the block returned last have one id

  template <int kThreads>
  static JFA_DEVICE KeyWalk Of(const BandMask<kKind>& mask, const SegmentIds<kSegments>& ids,
                               int row0, int* smem) {
    KeyWalk walk;
    const KeyBlockSet set = KeyBlockSet::Of<kBlockN>(mask, row0, row0 + kBlockM);
    walk.band = set.band;
    walk.sink_blocks = set.sink_blocks;
    walk.keys = ids.keys;
    if constexpr (kSegments) {
      walk.own = ids.queries.template RangeOf<kBlockM>(row0 / kBlockM);
      ids.keys.template Narrow<kBlockN, kThreads>(walk.own, &walk.band.begin, &walk.band.end, smem);
      if (walk.band.IsEmpty()) walk.band = {walk.sink_blocks, walk.sink_blocks};
    }
    return walk;
  }

  JFA_DEVICE int First() {
    const int block = Below(band.end);
    if constexpr (kSegments) ahead = Range(block);
    return Settle(block, block >= band.begin);
  }
  JFA_DEVICE int Next(int block) { return Settle(Below(block), false); }

 private:
  // The first block from `block` on that meets the rows' ids, whose range is in `ahead`. Ids are
  // read a block ahead, so that nobody waits for them; nor if it is known that they meet.
  JFA_DEVICE int Settle(int block, bool known_to_meet) {
    if constexpr (kSegments) {
      SegmentRange range = ahead;
      if (!known_to_meet) {
        while (block >= 0 && !range.Meets(own)) {
          block = Below(block);
          range = Range(block);
        }
      }
      one_segment = range.IsOneWith(own);
      ahead = Range(Below(block));
    }
    return block;
  }
  JFA_DEVICE SegmentRange Range(int block) const {
    return keys.template RangeOf<kBlockN>(Max(block, 0));
  }
  JFA_DEVICE int Below(int block) const {
    --block;
    if (block >= band.begin) return block;
    return BandMask<kKind>::kHasSinks ? Min(block, sink_blocks - 1) : -1;
  }
};

// The row blocks that a tile of keys visits, in order; `end` is the end.
template <MaskKind kKind, bool kSegments, int kBlockM, int kBlockN>
struct RowWalk {
  BlockRange rows;
  SegmentSide<kSegments> queries;
  SegmentRange own;  // ids of the keys

  template <int kThreads>
  static JFA_DEVICE RowWalk Of(const BandMask<kKind>& mask, const SegmentIds<kSegments>& ids,
                               int key0, int* smem) {
    RowWalk walk;
    walk.rows = mask.template RowBlocks<kBlockM>(key0, key0 + kBlockN);
    walk.queries = ids.queries;
    if constexpr (kSegments) {
      walk.own = ids.keys.template RangeOf<kBlockN>(key0 / kBlockN);
      ids.queries.template Narrow<kBlockM, kThreads>(walk.own, &walk.rows.begin, &walk.rows.end,
                                                     smem);
    }
    return walk;
  }

  JFA_DEVICE int First() const { return Next(rows.begin - 1); }
  JFA_DEVICE int Next(int block) const {
    do {
      ++block;
    } while (block < rows.end && !queries.template Meets<kBlockM>(block, own));
    return block;
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_MASK_CUH_
