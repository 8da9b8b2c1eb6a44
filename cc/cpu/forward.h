// Forward of one task: up to a few row tiles of one (batch, key head), over all keys they see.
//
// Everything is transposed, so that a query row is a vector lane and the softmax, which runs down
// the keys, needs no operation across lanes:
//
//   Q^T [H][lanes]     packed once per row tile
//   S^T [keys][lanes]  = K Q^T, one block of kKeyBlock keys; becomes P^T in place
//   O^T [Hv][lanes]   += V^T P^T
//
// K and V keep their layout; each block is converted to f32 once for all row tiles of the task.
// The scale comes after the maximum is subtracted: folding it into Q, or into one FMA with the
// maximum, would save 1 of 14 instructions an element and round logits of 100 and more visibly.
#ifndef JAX_FLASHATTN_CC_CPU_FORWARD_H_
#define JAX_FLASHATTN_CC_CPU_FORWARD_H_

#include "isa.h"
#include "mask.h"
#include "microkernel.h"
#include "simd.h"
#include "tile.h"

namespace jfa::cpu::JFA_ISA_NAMESPACE {

constexpr int kKeyBlock = 64;

// Softmax state of one row tile, and its O^T.
struct FwdTile {
  RowTile rows;
  float max[kRowTile];
  float sum[kRowTile];
  float alpha[kRowTile];
  bool started;
  float* q;  // [H][lanes]
  float* o;  // [Hv][lanes]
};

static int FwdLanes(const Problem& p) {
  const int64_t rows = p.num_heads / p.num_kv_heads * p.q_len;
  return RoundUp(static_cast<int>(Min<int64_t>(rows, kRowTile)), kWidth);
}

static size_t FwdTileFloats(const Problem& p) {
  return RoundUp(sizeof(FwdTile), 64) / sizeof(float) +
         static_cast<size_t>(p.head_dim + p.head_dim_v) * FwdLanes(p);
}

static size_t ForwardScratchFloats(const Problem& p, int row_tiles) {
  const int lds = LeadingDim(p.head_dim) + LeadingDim(p.head_dim_v) + FwdLanes(p);
  return static_cast<size_t>(kKeyBlock) * lds + row_tiles * FwdTileFloats(p);
}

// Turns scores into probabilities for C vectors of lanes; returns whether a maximum rose.
template <int C, bool kMasked>
static bool SoftmaxColumns(FwdTile* tile, float scale_log2, int lane, int64_t key, int num_keys,
                           float* s) {
  const int ld = tile->rows.num_lanes;
  Vec old_max[C], new_max[C];
#pragma GCC unroll 4
  for (int v = 0; v < C; ++v) new_max[v] = old_max[v] = Load(tile->max + lane + v * kWidth);
  for (int j = 0; j < num_keys; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) {
      float* sj = s + j * ld + lane + v * kWidth;
      Vec x = Load(sj);
      if (kMasked) {
        const IVec visible = Visible(tile->rows, lane + v * kWidth, static_cast<int32_t>(key + j));
        x = Select(visible, x, Broadcast(-kInf));
        Store(sj, x);
      }
      new_max[v] = VecMax(new_max[v], x);
    }
  }
  bool rose = false;
  Vec base[C], sum[C];
#pragma GCC unroll 4
  for (int v = 0; v < C; ++v) {
    // A row that has seen nothing yet: -inf - (-inf) would be NaN.
    base[v] = Select(new_max[v] == -kInf, Vec{}, new_max[v]);
    const Vec alpha = Exp2((old_max[v] - base[v]) * scale_log2);
    Store(tile->alpha + lane + v * kWidth, alpha);
    Store(tile->max + lane + v * kWidth, new_max[v]);
    sum[v] = Load(tile->sum + lane + v * kWidth) * alpha;
    rose |= AnyGreater(new_max[v], old_max[v]);
  }
  for (int j = 0; j < num_keys; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) {
      float* sj = s + j * ld + lane + v * kWidth;
      const Vec p = Exp2((Load(sj) - base[v]) * scale_log2);
      Store(sj, p);
      sum[v] += p;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < C; ++v) Store(tile->sum + lane + v * kWidth, sum[v]);
  return rose;
}

template <bool kMasked>
static bool Softmax(FwdTile* tile, float scale_log2, int64_t key, int num_keys, float* s) {
  constexpr int kCols = kWidth == 4 ? 2 : 4;
  bool rose = false;
  int lane = 0;
  for (; lane + kCols * kWidth <= tile->rows.num_lanes; lane += kCols * kWidth) {
    rose |= SoftmaxColumns<kCols, kMasked>(tile, scale_log2, lane, key, num_keys, s);
  }
  for (; lane < tile->rows.num_lanes; lane += kWidth) {
    rose |= SoftmaxColumns<1, kMasked>(tile, scale_log2, lane, key, num_keys, s);
  }
  return rose;
}

static inline void ForwardBlock(const Problem& p, FwdTile* tile, int64_t key, int num_keys,
                                const float* k, const float* v, float* s) {
  const int lanes = tile->rows.num_lanes;
  const int vecs = lanes / kWidth;
  const int h = static_cast<int>(p.head_dim), hv = static_cast<int>(p.head_dim_v);
  Gemm<kAlongK>(num_keys, vecs, h, k, LeadingDim(h), tile->q, lanes, s, lanes, false);
  const float scale_log2 = p.scale * kLog2E;
  const bool rose = tile->rows.IsFull(key, key + num_keys)
                        ? Softmax<false>(tile, scale_log2, key, num_keys, s)
                        : Softmax<true>(tile, scale_log2, key, num_keys, s);
  if (rose && tile->started) {
    for (int l = 0; l < lanes; l += kWidth) {
      const Vec alpha = Load(tile->alpha + l);
      for (int d = 0; d < hv; ++d) {
        float* o = tile->o + d * lanes + l;
        Store(o, Load(o) * alpha);
      }
    }
  }
  Gemm<kAlongM>(hv, vecs, num_keys, v, LeadingDim(hv), s, lanes, tile->o, lanes, tile->started);
  tile->started = true;
}

template <class T>
static void ForwardTask(const FwdArgs& args, const Task& task, float* scratch) {
  const Problem& p = args.problem;
  const Mask mask = MakeMask(p, task.batch);
  const int h = static_cast<int>(p.head_dim), hv = static_cast<int>(p.head_dim_v);
  const int ldk = LeadingDim(h), ldv = LeadingDim(hv);
  const int64_t first_head = task.kv_head * (p.num_heads / p.num_kv_heads);

  float* k = scratch;
  float* v = k + kKeyBlock * ldk;
  float* s = v + kKeyBlock * ldv;
  float* tiles = s + kKeyBlock * FwdLanes(p);
  const auto tile_at = [&](int i) {
    return reinterpret_cast<FwdTile*>(tiles + i * FwdTileFloats(p));
  };

  int num_tiles = 0;
  int64_t lo = p.kv_len, hi = 0;
  for (int64_t row = task.begin; row < task.end; row += kRowTile, ++num_tiles) {
    FwdTile* tile = tile_at(num_tiles);
    MakeRowTile(p, mask, row, task.end, &tile->rows);
    tile->q = reinterpret_cast<float*>(tile) + RoundUp(sizeof(FwdTile), 64) / sizeof(float);
    tile->o = tile->q + h * tile->rows.num_lanes;
    tile->started = false;
    const T* q[kRowTile];
    for (int i = 0; i < tile->rows.num_lanes; ++i) {
      const int64_t position = task.batch * p.q_len + tile->rows.t[i];
      const int64_t head = first_head + tile->rows.head[i];
      q[i] = tile->rows.IsLive(i)
                 ? static_cast<const T*>(args.q) + (position * p.num_heads + head) * h
                 : nullptr;
      tile->max[i] = -kInf;
      tile->sum[i] = 0;
    }
    LoadTransposed(q, tile->rows.num_lanes, h, tile->q);
    lo = Min(lo, tile->rows.range_lo);
    hi = Max(hi, tile->rows.range_hi);
  }

  const int64_t k_stride = p.num_kv_heads * h, v_stride = p.num_kv_heads * hv;
  const T* k_head =
      static_cast<const T*>(args.k) + task.batch * p.kv_len * k_stride + task.kv_head * h;
  const T* v_head =
      static_cast<const T*>(args.v) + task.batch * p.kv_len * v_stride + task.kv_head * hv;
  for (int64_t key = lo; key < hi; key += kKeyBlock) {
    const int num_keys = static_cast<int>(Min<int64_t>(kKeyBlock, hi - key));
    LoadRows(k_head + key * k_stride, k_stride, num_keys, h, k, ldk);
    LoadRows(v_head + key * v_stride, v_stride, num_keys, hv, v, ldv);
    for (int i = 0; i < num_tiles; ++i) {
      FwdTile* tile = tile_at(i);
      const int64_t seen = Min<int64_t>(num_keys, tile->rows.range_hi - key);
      if (seen <= 0 || key + num_keys <= tile->rows.range_lo) continue;
      ForwardBlock(p, tile, key, static_cast<int>(seen), k, v, s);
    }
  }

  for (int i = 0; i < num_tiles; ++i) {
    FwdTile* tile = tile_at(i);
    const RowTile& rows = tile->rows;
    T* out[kRowTile];
    float factors[kRowTile];
    for (int l = 0; l < rows.num_lanes; ++l) {
      out[l] = nullptr;
      factors[l] = 0;
      if (l >= rows.num_rows) continue;
      const int64_t head = first_head + rows.head[l];
      T* dst = static_cast<T*>(args.out) +
               ((task.batch * p.q_len + rows.t[l]) * p.num_heads + head) * hv;
      float* lse = args.lse + (task.batch * p.num_heads + head) * p.q_len + rows.t[l];
      // Not for rows without a visible key: O^T may hold anything there.
      const bool live = rows.IsLive(l) && tile->sum[l] != 0;
      *lse = live ? tile->max[l] * p.scale + __builtin_logf(tile->sum[l]) : -kInf;
      if (live) {
        factors[l] = 1 / tile->sum[l];
        out[l] = dst;
      } else {
        ZeroRows(dst, 0, 1, hv);
      }
    }
    StoreTransposed(tile->o, rows.num_lanes, hv, factors, out);
  }
}

}  // namespace jfa::cpu::JFA_ISA_NAMESPACE

#endif  // JAX_FLASHATTN_CC_CPU_FORWARD_H_
