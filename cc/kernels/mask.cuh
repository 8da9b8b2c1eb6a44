// Who sees whom: the one definition of visibility, and the block ranges that follow from it.
//
// Query i sees key j iff  low <= j - i < high,  j < kv_len,  i < q_len,
// with low = offset - window_left, high = offset + window_right + 1: a band along the diagonal.
//
//         j ->      low    high
//     i    . . . . |#######|. . .
//     |    . . . . . |#######|. .
//     v    . . . . . . |#######|.
//
// Causal masks have no low side, full masks neither. (Segments and sink tokens will join here.)
#ifndef JAX_FLASHATTN_CC_KERNELS_MASK_CUH_
#define JAX_FLASHATTN_CC_KERNELS_MASK_CUH_

#include "tile.cuh"

namespace jfa {

enum class MaskKind { kFull, kCausal, kLocal };

struct BlockRange {
  int begin, end;
};

struct Window {
  int begin, end;
  JFA_DEVICE Window From(int origin) const { return {begin - origin, end - origin}; }
};

template <MaskKind kKind>
struct BandMask {
  static constexpr bool kHasLow = kKind == MaskKind::kLocal;
  static constexpr bool kHasHigh = kKind != MaskKind::kFull;

  int q_len, kv_len;
  int low, high;

  // Offsets and windows may be any int. Clamping to [-q_len, kv_len] changes no visible pair, and
  // lets later sums with a row or key number stay inside int (lengths are below 2^30).
  JFA_DEVICE BandMask(int num_q, int num_kv, int offset, int window_left, int window_right)
      : q_len(num_q), kv_len(num_kv) {
    const int64 least = -static_cast<int64>(num_q), most = num_kv;
    low = window_left == kIntMax
              ? -num_q
              : static_cast<int>(Clamp(static_cast<int64>(offset) - window_left, least, most));
    high =
        window_right == kIntMax
            ? num_kv
            : static_cast<int>(Clamp(static_cast<int64>(offset) + window_right + 1, least, most));
  }

  // Key blocks that some row of [row_begin, row_end) sees.
  template <int kBlockN>
  JFA_DEVICE BlockRange KeyBlocks(int row_begin, int row_end) const {
    const int last = Min(row_end, q_len) - 1;
    if (row_begin > last) return {0, 0};
    const int key_end = kHasHigh ? Min(kv_len, last + high) : kv_len;
    const int key_begin = kHasLow ? Max(0, row_begin + low) : 0;
    if (key_begin >= key_end) return {0, 0};
    return {key_begin / kBlockN, CeilDiv(key_end, kBlockN)};
  }

  // Row blocks that see some key of [key_begin, key_end).
  template <int kBlockM>
  JFA_DEVICE BlockRange RowBlocks(int key_begin, int key_end) const {
    const int last = Min(key_end, kv_len) - 1;
    if (key_begin > last) return {0, 0};
    const int row_begin = kHasHigh ? Max(0, key_begin - high + 1) : 0;
    const int row_end = kHasLow ? Min(q_len, last - low + 1) : q_len;
    if (row_begin >= row_end) return {0, 0};
    return {row_begin / kBlockM, CeilDiv(row_end, kBlockM)};
  }

  // Whether a tile that starts at (row, key) holds a hidden pair that its caller must hide. Rows
  // beyond q_len don't count: nobody reads their results.
  template <int kBlockM, int kBlockN>
  JFA_DEVICE bool NeedsMask(int row, int key) const {
    bool needs = key + kBlockN > kv_len;
    if constexpr (kHasHigh) needs |= key + kBlockN - 1 - row >= high;
    if constexpr (kHasLow) needs |= key - (row + kBlockM - 1) < low;
    return needs;
  }

  // Keys that a row sees; rows that see a key. As windows rather than tests of pairs, because a
  // lane then needs two registers per row and one compare with a constant per pair and side.
  JFA_DEVICE Window KeysOf(int row) const {
    return {kHasLow ? row + low : -kFar, kHasHigh ? Min(kv_len, row + high) : kv_len};
  }
  JFA_DEVICE Window RowsOf(int key) const {
    const int end = kHasLow ? key - low + 1 : kFar;
    return {kHasHigh ? key - high + 1 : -kFar, key < kv_len ? end : -kFar};
  }
  static JFA_DEVICE bool InKeys(const Window& window, int key) {
    return key < window.end && (!kHasLow || key >= window.begin);
  }
  static JFA_DEVICE bool InRows(const Window& window, int row) {
    return row < window.end && (!kHasHigh || row >= window.begin);
  }

 private:
  static constexpr int kFar = 1 << 30;  // beyond any row or key, far from overflow
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_MASK_CUH_
