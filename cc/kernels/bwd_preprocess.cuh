// Before the backward: delta = rowsum(dO * O) - dLSE and LSE in log2 units, both padded to whole
// tiles, and zeros where dQ and the slopes' gradient will be summed.
//
// One CTA = 128 rows of one query head; kLanes lanes share a row, 16 bytes each. No shared memory.
// Bound by memory: O and dO are read once. A row that counts for nothing (beyond the length, or one
// that saw no key) gets LSE +inf, so that its recomputed P is 0, and delta 0.
#ifndef JAX_FLASHATTN_CC_KERNELS_BWD_PREPROCESS_CUH_
#define JAX_FLASHATTN_CC_KERNELS_BWD_PREPROCESS_CUH_

#include "kv_source.cuh"

namespace jfa {

template <class C>
struct BwdPreprocess {
  static constexpr int kThreads = C::kWarps * kWarpSize;
  static constexpr int kRows = BwdScratch::kRowPadding;
  // Smallest power of two that covers a row in 8-element chunks.
  static constexpr int kLanes = C::kHeadDimV <= 32    ? 4
                                : C::kHeadDimV <= 64  ? 8
                                : C::kHeadDimV <= 128 ? 16
                                                      : 32;
  static constexpr int kRowStep = kThreads / kLanes;
  static_assert(kLanes * 8 >= C::kHeadDimV, "one 16-byte chunk per lane covers the row");
  static_assert(kRows % kRowStep == 0, "rows are walked in whole steps");

  static JFA_DEVICE float Product(const uint16* out, const uint16* dout, int count) {
    float sum = 0.f;
    if constexpr (C::kAligned) {
      if (count > 0) {
        const uint4 a = *reinterpret_cast<const uint4*>(out);
        const uint4 b = *reinterpret_cast<const uint4*>(dout);
        const uint32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum += ToFloat<C::kBf16>(static_cast<uint16>(x[i])) *
                 ToFloat<C::kBf16>(static_cast<uint16>(y[i]));
          sum += ToFloat<C::kBf16>(static_cast<uint16>(x[i] >> 16)) *
                 ToFloat<C::kBf16>(static_cast<uint16>(y[i] >> 16));
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < count) sum += ToFloat<C::kBf16>(out[i]) * ToFloat<C::kBf16>(dout[i]);
      }
    }
    return sum;
  }

  static JFA_DEVICE void Run(const BwdParams& params) {
    const ProblemParams& problem = params.problem;
    const int thread = threadIdx.x;
    const uint32 num_tiles = NumTiles<C::kPacked, kRows>(problem, problem.q_len);
    const uint32 head_index = blockIdx.x / num_tiles;
    const int tile = static_cast<int>(blockIdx.x - head_index * num_tiles);
    const int batch = head_index / problem.num_heads, head = head_index % problem.num_heads;
    if (params.dslopes != nullptr && tile == 0) {
      float* partials = params.dslopes + static_cast<int64>(head_index) * params.slope_partials;
      for (int i = thread; i < params.slope_partials; i += kThreads) partials[i] = 0.f;
    }
    WorkItem work = {tile, batch, head};
    Sequence sequence;
    if (!SelectQueries<C::kPacked, kRows>(problem, false, work, sequence)) return;
    const int row0 = work.block * kRows;
    const BwdScratch scratch =
        BwdScratch::Of<C::kDqSums, C::kHeadDim>(params, sequence, batch, head);

    const int column = thread % kLanes * 8;
    const uint16* out = RowPointer(params.out, batch, head, sequence.q_begin) + column;
    const uint16* dout = RowPointer(params.dout, batch, head, sequence.q_begin) + column;
    const int64 lse_row = LseRow(problem, batch, head) + sequence.q_begin;
#pragma unroll 4
    for (int step = 0; step < kRows; step += kRowStep) {
      const int row = row0 + step + thread / kLanes;
      const bool in_length = row < sequence.q_len;
      float sum = in_length
                      ? Product(out + row * params.out.row_stride,
                                dout + row * params.dout.row_stride, problem.head_dim_v - column)
                      : 0.f;
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(kFullWarp, sum, distance);
      }
      if (thread % kLanes == 0) {
        float lse = in_length ? params.lse[lse_row + row] : -Infinity();
        const bool counts = lse != -Infinity();
        if (counts && params.dlse != nullptr) sum -= params.dlse[lse_row + row];
        scratch.lse_log2[row] = counts ? lse * kLog2e : Infinity();
        scratch.delta[row] = counts ? sum : 0.f;
      }
    }
    if constexpr (C::kDqSums) {
      float4* dq = reinterpret_cast<float4*>(scratch.dq + static_cast<int64>(row0) * C::kHeadDim);
#pragma unroll 4
      for (int i = thread; i < kRows * C::kHeadDim / 4; i += kThreads) {
        dq[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      }
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_BWD_PREPROCESS_CUH_
