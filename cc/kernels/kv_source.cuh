// Where the rows of one (batch, head) are and how many count. Everything that is read from global
// memory to find them is read here, once per tile; packed and paged sequences will live here too.
#ifndef JAX_FLASHATTN_CC_KERNELS_KV_SOURCE_CUH_
#define JAX_FLASHATTN_CC_KERNELS_KV_SOURCE_CUH_

#include "params.h"
#include "tile.cuh"

namespace jfa {

// A tile's place in the work: which block of which (batch, head).
struct WorkItem {
  int block, batch, head;
};

// Linear CTA number -> work. CTAs start roughly in order, so the order is a schedule: heads are
// taken in sections whose streamed data fits in half of the L2, and inside a section all heads'
// block 0 come before any block 1. With long tiles first, the last wave is made of short ones.
JFA_DEVICE WorkItem ScheduleWork(uint32 index, int num_blocks, int batch, int heads, int unit,
                                 int64 bytes_per_unit, int l2_bytes) {
  const int total = batch * heads;
  int units =
      static_cast<int>(Clamp(static_cast<int64>(l2_bytes / 2) / Max(bytes_per_unit, int64{1}),
                             int64{1}, static_cast<int64>(total)));
  const uint32 section_heads =
      static_cast<uint32>(Min(units * static_cast<int64>(unit), static_cast<int64>(total)));
  const uint32 section = index / (section_heads * num_blocks);
  const uint32 rest = index - section * section_heads * num_blocks;
  const uint32 first = section * section_heads;
  const uint32 here = Min(section_heads, static_cast<uint32>(total) - first);
  const uint32 block = rest / here;
  const uint32 head = first + rest - block * here;
  return {static_cast<int>(block), static_cast<int>(head / heads), static_cast<int>(head % heads)};
}

// Lengths and offset of one sequence. Lengths outside [0, T] and [0, S] are clamped.
struct Sequence {
  int q_len, kv_len, offset;

  JFA_DEVICE Sequence(const ProblemParams& p, int batch, int kv_head) {
    const int64 index = static_cast<int64>(batch) * p.num_kv_heads + kv_head;
    q_len = p.q_lengths ? Clamp(p.q_lengths[index], 0, p.q_len) : p.q_len;
    kv_len = p.kv_lengths ? Clamp(p.kv_lengths[index], 0, p.kv_len) : p.kv_len;
    offset = p.query_offsets ? p.query_offsets[index] : p.query_offset;
  }
};

JFA_DEVICE uint16* HeadPointer(const TensorArg& tensor, int batch, int head) {
  return static_cast<uint16*>(tensor.data) + batch * tensor.batch_stride +
         head * tensor.head_stride;
}

// Index of row 0 of a (batch, query head) in LSE-shaped arrays [batch, num_heads, q_len].
JFA_DEVICE int64 LseRow(const ProblemParams& p, int batch, int head) {
  return (static_cast<int64>(batch) * p.num_heads + head) * p.q_len;
}

// The part of the backward's scratch that belongs to one (batch, query head). Rows are padded to
// kRowPadding, so that tiles read and write it without bounds. Written by bwd_preprocess:
//   lse_log2 [rows]  LSE * log2(e); +inf for a row that counts for nothing, which makes its P zero
//   delta    [rows]  rowsum(dO * O) - dLSE
//   dq       [rows / 16][columns / 16][256]  f32 sums of dQ / scale, in 16 x 16 blocks (see
//            DqElement), only with kDqSums
struct BwdScratch {
  static constexpr int kRowPadding = 128;
  float* lse_log2;
  float* delta;
  float* dq;

  template <bool kDqSums, int kHeadDim>
  static JFA_DEVICE BwdScratch Of(const BwdParams& p, int batch, int head) {
    const int64 rows = CeilDiv(p.problem.q_len, kRowPadding) * static_cast<int64>(kRowPadding);
    const int64 per_head = rows * (2 + (kDqSums ? kHeadDim : 0));
    const int kv_head = head / p.problem.group;
    float* base =
        p.scratch +
        (static_cast<int64>(batch) * p.problem.num_kv_heads + kv_head) * p.scratch_stride +
        (head - kv_head * p.problem.group) * per_head;
    return {base, base + rows, base + 2 * rows};
  }
};

// Place of element e of a lane's half (0: row lane / 4, 1: + 8) in a 16 x 16 block of dQ sums:
// what makes the adds of a warp contiguous. sm_90 adds four floats at a time.
JFA_DEVICE int DqElement(int half, int e, int lane) {
#if __CUDA_ARCH__ >= 900
  return half * 128 + lane * 4 + e;
#else
  return half * 128 + e * 32 + lane;
#endif
}

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_KV_SOURCE_CUH_
