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
  // queries, 32 columns at a time: rows of 128 bytes are written faster than pieces of 32. What a
  // row wants is computed before: this code runs once a call, and must be fetched first.
  static JFA_DEVICE void Store(const DecodeParams& params,
                               const DecodeRows<C::kRows, C::kTileHeads>& rows,
                               const Sequence& sequence, int partial,
                               const float (&out)[1][C::kHeadDimV / 8][4],
                               const OnlineSoftmax<1>& softmax, uint32 smem_q, int row_warp,
                               int lane) {
    constexpr int kColumns = 32, kBlocks = kColumns / 8, kPasses = 4;
    const ProblemParams& problem = params.fwd.problem;
    const DecodeScratch scratch = DecodeScratch::Of<C::kRows>(params);
    const bool is_final = partial < 0;
    const uint32 own = smem_q + row_warp * 16 * PanelQ::kPitch;
    // Four columns of a row.
    const auto at = [=](int row, int chunk) {
      return own + row * PanelQ::kPitch + (chunk ^ (row % 4 * 2)) * 16;
    };
    // Or what comes of these would be computed before any key is visited, and kept in registers.
    asm volatile("" : "+r"(lane), "+r"(row_warp));
    // Of the lane's two rows; those that don't exist get any.
    float factor[2] = {1.f, 1.f};
    bool valid[2] = {true, true};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * row_warp + lane / 4 + 8 * half;
      const float2 total = make_float2(-softmax.neg_reference[half], QuadSum(softmax.sum[half]));
      if (row >= rows.num) continue;
      if (!is_final) {
        if (lane % 4 == 0) scratch.RowsOf(partial)[row] = total;
        continue;
      }
      const int head = rows.HeadOf(problem, row), token = rows.TokenOf(problem, row);
      const RowResult result = ResultOf(params.fwd, rows.batch, head, total);
      factor[half] = result.normalizer;
      valid[half] = token < sequence.q_len;  // padding may have made NaN
      if (lane % 4 == 0) {
        params.fwd.lse[LseRow(problem, rows.batch, head) + token] =
            valid[half] ? result.lse : -Infinity();
      }
    }
    // Of the rows that the lane writes, one in each pass.
    unsigned char* target[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = Min(16 * row_warp + 4 * pass + lane / 8, rows.num - 1);
      if (is_final) {
        target[pass] = reinterpret_cast<unsigned char*>(RowPointer(
            params.fwd.out, rows.batch, rows.HeadOf(problem, row), rows.TokenOf(problem, row)));
      } else {
        target[pass] = reinterpret_cast<unsigned char*>(
            scratch.OutOf(partial) + static_cast<int64>(row) * problem.head_dim_v);
      }
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
                       __float_as_uint(valid[half] ? x[0] * factor[half] : 0.f),
                       __float_as_uint(valid[half] ? x[1] * factor[half] : 0.f));
        }
      }
      __syncwarp();
      const int column = first + lane % 8 * 4;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int own_row = 4 * pass + lane / 8;
        if (16 * row_warp + own_row >= rows.num || column >= problem.head_dim_v) continue;
        const uint4 bits = LoadShared16(at(own_row, lane % 8));
        if (is_final) {
          uint2 packed;
          packed.x = Pack16<C::kBf16>(__uint_as_float(bits.x), __uint_as_float(bits.y));
          packed.y = Pack16<C::kBf16>(__uint_as_float(bits.z), __uint_as_float(bits.w));
          *reinterpret_cast<uint2*>(target[pass] + 2 * column) = packed;
        } else {
          *reinterpret_cast<uint4*>(target[pass] + 4 * column) = bits;
        }
      }
    }
  }
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_DECODE_WGMMA_CUH_
