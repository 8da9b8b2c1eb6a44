// Segment ids: a query sees a key only if their ids are equal. Whole blocks are told apart by their
// lowest and highest id, which is exact for sorted ids and safe for any.
#ifndef JAX_FLASHATTN_CC_KERNELS_SEGMENTS_CUH_
#define JAX_FLASHATTN_CC_KERNELS_SEGMENTS_CUH_

#include "params.h"
#include "tile.cuh"

namespace jfa {

struct SegmentRange {
  int low, high;
  JFA_DEVICE bool Meets(const SegmentRange& other) const {
    return low <= other.high && other.low <= high;
  }
  // One id, the same on both sides: no pair has to be compared.
  JFA_DEVICE bool IsOneWith(const SegmentRange& other) const {
    return low == high && other.low == low && other.high == low;
  }
};

// The ids of one side, queries or keys, of one (batch, head).
template <bool kOn>
struct SegmentSide {
  template <int kBlock>
  JFA_DEVICE bool Meets(int, const SegmentRange&) const {
    return true;
  }
};

template <>
struct SegmentSide<true> {
  static constexpr int kGranule = 32;  // tokens of a range in memory: SEGMENT_BLOCK in Python

  const int* ids;
  const int2* ranges;  // lowest and highest id
  int length;

  JFA_DEVICE int Id(int token) const { return __ldg(ids + Min(token, length - 1)); }

  template <int kBlock>
  JFA_DEVICE SegmentRange RangeOf(int block) const {
    static_assert(kBlock % kGranule == 0, "a block is a whole number of ranges");
    const int last = (length - 1) / kGranule;
    SegmentRange range = {kIntMax, -kIntMax - 1};
#pragma unroll
    for (int i = 0; i < kBlock / kGranule; ++i) {
      // The last range again changes nothing.
      const int2 ends = __ldg(ranges + Min(block * (kBlock / kGranule) + i, last));
      range.low = Min(range.low, ends.x);
      range.high = Max(range.high, ends.y);
    }
    return range;
  }

  template <int kBlock>
  JFA_DEVICE bool Meets(int block, const SegmentRange& other) const {
    return RangeOf<kBlock>(block).Meets(other);
  }

  // Moves the ends of a range of blocks inwards to blocks that meet `other`. All threads of the CTA
  // look at once, since one after the other would cost a sorted document hundreds of steps. `smem`:
  // two ints per warp, free again on return; not used where kThreads is a warp that works alone.
  template <int kBlock, int kThreads>
  JFA_DEVICE void Narrow(const SegmentRange& other, int* begin, int* end, int* smem) const {
    constexpr int kWarps = kThreads / kWarpSize;
    int first = *end, last = -1;
#pragma unroll 4  // loads in flight together
    for (int block = *begin + static_cast<int>(threadIdx.x % kThreads); block < *end;
         block += kThreads) {
      if (Meets<kBlock>(block, other)) {
        first = Min(first, block);
        last = Max(last, block);
      }
    }
    first = WarpMin(first);
    last = WarpMax(last);
    if constexpr (kWarps > 1) {
      if (threadIdx.x % kWarpSize == 0) {
        smem[threadIdx.x / kWarpSize] = first;
        smem[kWarps + threadIdx.x / kWarpSize] = last;
      }
      __syncthreads();
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        first = Min(first, smem[warp]);
        last = Max(last, smem[kWarps + warp]);
      }
      __syncthreads();
    }
    *begin = first;
    *end = last + 1;
  }
};

template <bool kOn>
struct SegmentIds {
  SegmentSide<kOn> queries, keys;

  JFA_DEVICE SegmentIds(const ProblemParams& p, int batch, int kv_head) {
    if constexpr (kOn) {
      const int64 head = static_cast<int64>(batch) * p.num_kv_heads + kv_head;
      queries = Side(p.q_segment_ids, p.q_segment_ranges, head, p.q_len);
      keys = Side(p.kv_segment_ids, p.kv_segment_ranges, head, p.kv_len);
    }
  }

 private:
  static JFA_DEVICE SegmentSide<kOn> Side(const int* ids, const int* ranges, int64 head,
                                          int length) {
    const int num_ranges = CeilDiv(length, SegmentSide<kOn>::kGranule);
    return {ids + head * length, reinterpret_cast<const int2*>(ranges) + head * num_ranges, length};
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_SEGMENTS_CUH_
