// Tiles of 64 rows and more in decode.cuh: products by warpgroups, which read each key from shared
// memory once for 64 rows, and what becomes of their results.
#ifndef JAX_FLASHATTN_CC_KERNELS_DECODE_WGMMA_CUH_
#define JAX_FLASHATTN_CC_KERNELS_DECODE_WGMMA_CUH_

#include "decode_share.cuh"
#include "ptx_sm90.cuh"
#include "softmax.cuh"

namespace jfa {

// PanelQ, PanelN: 64 columns of the queries, and of a block of keys or values, swizzled.
template <class C, class PanelQ, class PanelN>
struct DecodeWgmma {
  static constexpr int kWarpgroupThreads = 4 * kWarpSize;
  static constexpr int kDimSteps = C::kHeadDim / 16, kKeySteps = C::kBlockN / 16;

  // Of a thread. The producers' warpgroup keeps what it needs, the consumers share the rest.
  static constexpr int kProducerRegisters = 56;
  template <int kConsumers>
  static JFA_DEVICE constexpr int Registers() {
    return (65536 / C::kMinBlocks - kWarpgroupThreads * kProducerRegisters) / kConsumers / 8 * 8;
  }

  using Weights = uint32[kKeySteps][4];  // 16-bit, fragments of the product with the values

  // s = Q K^T for the 64 rows of the warp's group, started; `row_warp` must be uniform.
  static JFA_DEVICE void StartScores(float (&s)[1][2 * kKeySteps][4], uint32 smem_q, uint32 smem_k,
                                     int row_warp) {
    const uint64 q = PanelDescriptor(smem_q + row_warp / 4 * 64 * PanelQ::kPitch, 16),
                 k = PanelDescriptor(smem_k, 16);
    Pin(s);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kDimSteps; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      Wgmma<C::kBlockN>::template Ss<C::kBf16, false>(
          s, q + ((panel * PanelQ::kBytes + within) >> 4),
          k + ((panel * PanelN::kBytes + within) >> 4), step > 0);
    }
    WgmmaCommit();
    Pin(s);
  }

  // Logits to weights, which add up in the softmax's sums.
  static JFA_DEVICE void Weigh(float (&s)[1][2 * kKeySteps][4], OnlineSoftmax<1>& softmax) {
#pragma unroll
    for (int n = 0; n < 2 * kKeySteps; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[0][n][e] = softmax.Weigh(e / 2, s[0][n][e]);
    }
  }
  static JFA_DEVICE void Pack(Weights& p, const float (&s)[1][2 * kKeySteps][4]) {
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      PackBlock<C::kBf16>(p[step], s[0][2 * step], s[0][2 * step + 1]);
    }
  }

  // out += P V, started.
  static JFA_DEVICE void StartOutputs(float (&out)[1][C::kHeadDimV / 8][4], const Weights& p,
                                      uint32 smem_v) {
    const uint64 v = PanelDescriptor(smem_v, PanelN::kBytes);
    Pin(out);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      Wgmma<C::kHeadDimV>::template Rs<C::kBf16, true>(out, p[step],
                                                       v + ((step * 16 * PanelN::kPitch) >> 4), 1);
    }
    WgmmaCommit();
    Pin(out);
  }

  // Results of one tile, whose rows each are with one warp: final ones if the whole tile was
  // visited here, else a partial one in scratch. They go through the memory of the warp's own
  // queries, 32 columns at a time: rows of 128 bytes are written faster than pieces of 32.
  static JFA_DEVICE void Store(const DecodeParams& params,
                               const DecodeRows<C::kRows, C::kTileHeads>& rows,
                               const Sequence& sequence, int partial,
                               const float (&out)[1][C::kHeadDimV / 8][4],
                               const OnlineSoftmax<1>& softmax, uint32 smem_q, int row_warp,
                               int lane) {
    constexpr int kColumns = 32, kBlocks = kColumns / 8;
    const ProblemParams& problem = params.fwd.problem;
    const DecodeScratch scratch = DecodeScratch::Of<C::kRows>(params);
    const uint32 own = smem_q + row_warp * 16 * PanelQ::kPitch;
    // Four columns of a row.
    const auto at = [=](int row, int chunk) {
      return own + row * PanelQ::kPitch + (chunk ^ (row % 4 * 2)) * 16;
    };
    float2 total[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] = make_float2(-softmax.neg_reference[half], QuadSum(softmax.sum[half]));
    }
#pragma unroll
    for (int first = 0; first < C::kHeadDimV; first += kColumns) {
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          const float* x = out[0][first / 8 + n] + 2 * half;
          StoreShared8(at(lane / 4 + 8 * half, 2 * n + lane % 4 / 2) + lane % 2 * 8,
                       __float_as_uint(x[0]), __float_as_uint(x[1]));
        }
      }
      __syncwarp();
      const int column = first + lane % 8 * 4;
#pragma unroll
      for (int pass = 0; pass < 4; ++pass) {
        const int own_row = 4 * pass + lane / 8, row = 16 * row_warp + own_row;
        // From a lane that has the row.
        const float2 mine = total[pass / 2];
        const int source = own_row % 8 * 4;
        const float2 all = make_float2(__shfl_sync(kFullWarp, mine.x, source),
                                       __shfl_sync(kFullWarp, mine.y, source));
        const uint4 bits = LoadShared16(at(own_row, lane % 8));
        const float4 x = make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y),
                                     __uint_as_float(bits.z), __uint_as_float(bits.w));
        if (row >= rows.num || column >= problem.head_dim_v) continue;
        if (partial >= 0) {
          if (column == 0) scratch.RowsOf(partial)[row] = all;
          *reinterpret_cast<float4*>(scratch.OutOf(partial) +
                                     static_cast<int64>(row) * problem.head_dim_v + column) = x;
        } else {
          StoreResult<C::kBf16>(params.fwd, sequence, rows.batch, rows.HeadOf(problem, row),
                                rows.TokenOf(problem, row), column, x, all);
        }
      }
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_DECODE_WGMMA_CUH_
