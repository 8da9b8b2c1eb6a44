// The scores of a row tile times a key block, as the kernels that walk keys hold them: warp w has
// the 16-row blocks w, w + kWarps, ... Where each element is, and what becomes of it before
// softmax.
//
// Row and key numbers are found anew where they are needed: kept through the loop they would spill.
#ifndef JAX_FLASHATTN_CC_KERNELS_ROW_SCORES_CUH_
#define JAX_FLASHATTN_CC_KERNELS_ROW_SCORES_CUH_

#include "logits.cuh"
#include "mask.cuh"

namespace jfa {

template <int kWarps, int kRowBlocks, int kKeyBlocks>
struct RowScores {
  using Array = float[kRowBlocks][2 * kKeyBlocks][4];
  static constexpr int kRows = 2 * kRowBlocks;  // of one lane

  static JFA_DEVICE int RowOf(int row0, int r) {
    const int thread = ReadThreadIndex();
    return row0 + 16 * (thread / kWarpSize + kWarps * (r / 2)) + thread % kWarpSize / 4 + r % 2 * 8;
  }
  // The lane's first key; its others are 8 * n + e further.
  static JFA_DEVICE int KeyOf(int key0) { return key0 + ReadThreadIndex() % 4 * 2; }
  static JFA_DEVICE float& Element(Array& s, int r, int n, int e) {
    return s[r / 2][n][r % 2 * 2 + e];
  }

  template <class Logits>
  static JFA_DEVICE void Apply(Array& s, const Logits& logits, int row0, int key0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float distance = logits.Distance(RowOf(row0, r), KeyOf(key0));
#pragma unroll
      for (int n = 0; n < 2 * kKeyBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = Element(s, r, n, e);
          score = logits.Apply(score, distance - (8 * n + e));
        }
      }
    }
  }

  template <class Mask>
  static JFA_DEVICE void HideBand(Array& s, const Mask& mask, int row0, int key0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Window seen = mask.KeysOf(RowOf(row0, r)).From(KeyOf(key0));
#pragma unroll
      for (int n = 0; n < 2 * kKeyBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!mask.InKeys(seen, 8 * n + e)) Element(s, r, n, e) = -Infinity();
        }
      }
    }
  }

  template <class Ids>
  static JFA_DEVICE void HideOtherSegments(Array& s, const Ids& ids, int row0, int key0) {
    int own[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) own[r] = ids.queries.Id(RowOf(row0, r));
#pragma unroll
    for (int n = 0; n < 2 * kKeyBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int id = ids.keys.Id(KeyOf(key0) + 8 * n + e);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (id != own[r]) Element(s, r, n, e) = -Infinity();
        }
      }
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_ROW_SCORES_CUH_
