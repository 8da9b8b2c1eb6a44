// Merging within a cluster: its CTAs have each visited a part of one tile's key blocks
// (decode.cuh).
//
//   CTA 0   outputs |s0|s1|s2|s3|      Each sends slice s of its partial result to CTA s, into the
//   CTA 1   outputs |s0|s1|s2|s3|      memory where K and V were, and all its rows' references and
//   ...                                sums to everybody. CTA s merges what it got, in the order of
//                                      the senders, and writes it out.
//
// One launch, no scratch, nothing that depends on timing. Data bring their own completion, by the
// bytes that an mbarrier counts; nobody waits to send but for memory to become free (Arrive), and
// nobody exits before all has come.
#ifndef JAX_FLASHATTN_CC_KERNELS_DECODE_CLUSTER_CUH_
#define JAX_FLASHATTN_CC_KERNELS_DECODE_CLUSTER_CUH_

#include "barriers.cuh"
#include "ptx_sm90.cuh"
#include "softmax.cuh"

namespace jfa {

// Used by kThreads threads of each CTA, from number 0 on; the others have exited or will.
template <int kRows, int kColumns, int kThreads>
struct DecodeCluster {
  static constexpr int kMostCtas = 8;
  // References and sums [sender][row], then slices [sender][item of four columns].
  static constexpr int kItemsAt = 8 * kMostCtas * kRows;
  static constexpr int kBytes = kItemsAt + 16 * (kRows * kColumns / 4 + kMostCtas);

  uint32 memory, barrier;  // kBytes, and an mbarrier that expects one arrival
  int log2, rank;          // of the number of CTAs; of this one
  int num_rows, groups;    // of four columns
  int items, each;         // of the tile, row by row; of a slice

  JFA_DEVICE DecodeCluster(uint32 memory, uint32 barrier, int cluster_log2, int num_rows,
                           int num_columns)
      : memory(memory),
        barrier(barrier),
        log2(cluster_log2),
        rank(blockIdx.x & ((1 << cluster_log2) - 1)),
        num_rows(num_rows),
        groups(num_columns / 4),
        items(num_rows * groups),
        each((items + (1 << cluster_log2) - 1) >> cluster_log2) {}

  // From here on `memory` belongs to the others.
  static JFA_DEVICE void Arrive() { ClusterArrive(); }
  // After it one may send.
  static JFA_DEVICE void Wait() { ClusterWait(); }

  JFA_DEVICE void SendRow(int row, float2 total, int target) const {
    StoreToCta(MapToCta(memory + 8 * (rank * kRows + row), target), MapToCta(barrier, target),
               total);
  }
  JFA_DEVICE void SendItem(int row, int column, float4 x) const {
    const int item = row * groups + column / 4, target = item / each;
    const uint32 at = memory + kItemsAt + 16 * (rank * each + item - target * each);
    StoreToCta(MapToCta(at, target), MapToCta(barrier, target), x);
  }

  // Merges this CTA's slice: store(row, column, x, total) for four columns at a time.
  template <class Store>
  JFA_DEVICE void Merge(const float2* totals, const float4* parts, const Store& store) const {
    const int num_ctas = 1 << log2, first = Min(rank * each, items);
    const int num_items = Min(items - first, each);
    if (ReadThreadIndex() == 0) {
      MbarrierArriveExpect(barrier, num_ctas * (8 * num_rows + 16 * num_items));
    }
    MbarrierWait(barrier, 0);
    for (int i = ReadThreadIndex(); i < num_items; i += kThreads) {
      const int row = (first + i) / groups, column = (first + i - row * groups) * 4;
      float2 total = make_float2(totals[row].x, 0.f);
#pragma unroll 4
      for (int s = 1; s < num_ctas; ++s) total.x = fmaxf(total.x, totals[s * kRows + row].x);
      float4 x = make_float4(0, 0, 0, 0);
#pragma unroll 4
      for (int s = 0; s < num_ctas; ++s) {
        const float2 sent = totals[s * kRows + row];
        const float4 y = parts[s * each + i];
        const float weight = Exp2(sent.x - total.x);
        total.y = fmaf(weight, sent.y, total.y);
        x.x = fmaf(weight, y.x, x.x);
        x.y = fmaf(weight, y.y, x.y);
        x.z = fmaf(weight, y.z, x.z);
        x.w = fmaf(weight, y.w, x.w);
      }
      store(row, column, x, total);
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_DECODE_CLUSTER_CUH_
