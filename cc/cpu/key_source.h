// Where the keys and values of one (sequence, key head) lie: one behind the other, or in pages.
#ifndef JAX_FLASHATTN_CC_CPU_KEY_SOURCE_H_
#define JAX_FLASHATTN_CC_CPU_KEY_SOURCE_H_

#include "attention.h"
#include "mask.h"
#include "tile.h"

namespace jfa::cpu::JFA_ISA_NAMESPACE {

// In rows of one token and head each, which k and v number alike.
struct KeySource {
  int64_t first;         // row of key 0; paged, of the first token in page 0
  int64_t stride;        // from one token to the next
  const int32_t* pages;  // null: all keys lie `stride` apart
  int64_t num_pages;
  int64_t page_size;
  int64_t page_stride;
};

static inline KeySource MakeKeySource(const Problem& p, const Sequence& seq, int64_t kv_head) {
  const int64_t K = p.num_kv_heads;
  if (!seq.pages) {
    return {(seq.batch * p.kv_len + seq.kv_begin) * K + kv_head, K, nullptr, 0, 0, 0};
  }
  const int64_t first = p.heads_first ? kv_head * p.page_size : kv_head;
  return {first, p.heads_first ? 1 : K, seq.pages, p.num_pages, p.page_size, p.page_size * K};
}

// Rows of the keys [begin, end) from `base` into a tile. Columns of the table beyond those of the
// keys are not looked at.
template <class T>
static void LoadKeys(const KeySource& source, const T* base, int64_t begin, int64_t end, int cols,
                     float* dst, int ld) {
  const int64_t stride = source.stride * cols;
  if (!source.pages) {
    const T* src = base + (source.first + begin * source.stride) * cols;
    LoadRows(src, stride, static_cast<int>(end - begin), cols, dst, ld);
    return;
  }
  for (int64_t key = begin; key < end;) {
    const int64_t column = key / source.page_size, token = key % source.page_size;
    const int count = static_cast<int>(Min(source.page_size - token, end - key));
    const int64_t page = Clamp(source.pages[column], 0, source.num_pages - 1);
    const int64_t row = source.first + page * source.page_stride + token * source.stride;
    LoadRows(base + row * cols, stride, count, cols, dst, ld);
    dst += static_cast<int64_t>(count) * ld;
    key += count;
  }
}

}  // namespace jfa::cpu::JFA_ISA_NAMESPACE

#endif  // JAX_FLASHATTN_CC_CPU_KEY_SOURCE_H_
