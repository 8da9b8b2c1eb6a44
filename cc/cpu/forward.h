// Forward of one task: up to a few row tiles of one (sequence, key head), over the keys they
// see.
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
// A soft cap or ALiBi turns scores into logits in a pass of its own; the softmax' scale is 1 then.
#ifndef JAX_FLASHATTN_CC_CPU_FORWARD_H_
#define JAX_FLASHATTN_CC_CPU_FORWARD_H_

#include "isa.h"
#include "key_source.h"
#include "logits.h"
#include "mask.h"
#include "microkernel.h"
#include "row_tile.h"
#include "simd.h"
#include "tile.h"

namespace jfa::cpu::JFA_ISA_NAMESPACE {

constexpr int kKeyBlock = kFwdKeyBlock;

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

static void ApplyLogitRule(const LogitRule& rule, const RowTile& rows, const SeenKeys& keys,
                           float* s) {
  for (int lane = 0; lane < rows.num_lanes; lane += kWidth) {
    const Vec slope = Load(rows.slope + lane), position = Load(rows.position + lane);
    for (int j = 0; j < keys.num_keys; ++j) {
      float* sj = s + j * rows.num_lanes + lane;
      const float key = static_cast<float>(keys.begin + j);
      Store(sj, ToLogit(rule, Load(sj), slope, position, key).value);
    }
  }
}

// While the maximum rises by less than this, in log2, the one before stays in use: probabilities up
// to 256 are as precise as those up to 1, and O^T need not be scaled anew.
constexpr float kSlack = 8;

// Turns scores into probabilities for C vectors of lanes; returns whether a maximum rose.
template <int C, Test kTest>
static bool SoftmaxColumns(FwdTile* tile, float scale_log2, int lane, const SeenKeys& keys,
                           float* s) {
  const int ld = tile->rows.num_lanes;
  Vec old_max[C], new_max[C];
#pragma GCC unroll 4
  for (int v = 0; v < C; ++v) new_max[v] = old_max[v] = Load(tile->max + lane + v * kWidth);
  for (int j = 0; j < keys.num_keys; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) {
      float* sj = s + j * ld + lane + v * kWidth;
      Vec x = Load(sj);
      if (kTest != Test::kNone) {
        const IVec visible = Visible<kTest>(tile->rows, lane + v * kWidth, keys, j);
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
    const IVec rises = (new_max[v] - old_max[v]) * scale_log2 > kSlack;
    new_max[v] = Select(rises, new_max[v], old_max[v]);
    // A row that has seen nothing yet: -inf - (-inf) would be NaN.
    base[v] = Select(new_max[v] == -kInf, Vec{}, new_max[v]);
    const Vec alpha = Exp2((old_max[v] - base[v]) * scale_log2);
    Store(tile->alpha + lane + v * kWidth, alpha);
    Store(tile->max + lane + v * kWidth, new_max[v]);
    sum[v] = Load(tile->sum + lane + v * kWidth) * alpha;
    rose |= AnyGreater(new_max[v], old_max[v]);
  }
  for (int j = 0; j < keys.num_keys; ++j) {
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

template <Test kTest>
static bool Softmax(FwdTile* tile, float scale_log2, const SeenKeys& keys, float* s) {
  constexpr int kCols = kWidth == 4 ? 2 : 4;
  bool rose = false;
  int lane = 0;
  for (; lane + kCols * kWidth <= tile->rows.num_lanes; lane += kCols * kWidth) {
    rose |= SoftmaxColumns<kCols, kTest>(tile, scale_log2, lane, keys, s);
  }
  for (; lane < tile->rows.num_lanes; lane += kWidth) {
    rose |= SoftmaxColumns<1, kTest>(tile, scale_log2, lane, keys, s);
  }
  return rose;
}

static bool SoftmaxOfSeen(FwdTile* tile, float scale_log2, const SeenKeys& keys, float* s) {
  switch (keys.test) {
    case Test::kNone:
      return Softmax<Test::kNone>(tile, scale_log2, keys, s);
    case Test::kRange:
      return Softmax<Test::kRange>(tile, scale_log2, keys, s);
    case Test::kRangeAndSegment:
      return Softmax<Test::kRangeAndSegment>(tile, scale_log2, keys, s);
  }
  __builtin_unreachable();
}

// What the softmax still has to multiply scores by.
static float SoftmaxScale(const Problem& p) { return HasPlainLogits(p) ? p.scale : 1.0f; }

// k and v: from the first of `keys` on.
static inline void ForwardBlock(const Problem& p, FwdTile* tile, const SeenKeys& keys,
                                const float* k, const float* v, float* s) {
  const int lanes = tile->rows.num_lanes;
  const int vecs = lanes / kWidth;
  const int h = static_cast<int>(p.head_dim), hv = static_cast<int>(p.head_dim_v);
  Gemm<kAlongK>(keys.num_keys, vecs, h, k, LeadingDim(h), tile->q, lanes, s, lanes, false);
  if (!HasPlainLogits(p)) ApplyLogitRule(MakeLogitRule(p), tile->rows, keys, s);
  const bool rose = SoftmaxOfSeen(tile, SoftmaxScale(p) * kLog2E, keys, s);
  if (rose && tile->started) {
    for (int l = 0; l < lanes; l += kWidth) {
      const Vec alpha = Load(tile->alpha + l);
      for (int d = 0; d < hv; ++d) {
        float* o = tile->o + d * lanes + l;
        Store(o, Load(o) * alpha);
      }
    }
  }
  Gemm<kAlongM>(hv, vecs, keys.num_keys, v, LeadingDim(hv), s, lanes, tile->o, lanes,
                tile->started);
  tile->started = true;
}

// Output and LSE of a row tile.
template <class T>
static void StoreResults(const FwdArgs& args, const FwdTile& tile) {
  const Problem& p = args.problem;
  const RowTile& rows = tile.rows;
  const int hv = static_cast<int>(p.head_dim_v);
  T* out[kRowTile];
  float factors[kRowTile];
  for (int i = 0; i < rows.num_lanes; ++i) {
    out[i] = nullptr;
    factors[i] = 0;
    if (i >= rows.num_rows) continue;
    T* dst = static_cast<T*>(args.out) + rows.btn[i] * hv;
    const float sink = p.sinks && rows.exists[i] ? p.sinks[rows.head[i]] : -kInf;
    // Not for rows without a visible key: O^T may hold anything there.
    if (!rows.IsLive(i) || tile.sum[i] == 0) {
      args.lse[rows.bnt[i]] = sink;
      ZeroRows(dst, 0, 1, hv);
      continue;
    }
    float base = tile.max[i] * SoftmaxScale(p), weight = 1, sum = tile.sum[i];
    if (sink > -kInf) {
      const float max = base;
      base = Max(max, sink);
      weight = __builtin_expf(max - base);
      sum = sum * weight + __builtin_expf(sink - base);
    }
    args.lse[rows.bnt[i]] = base + __builtin_logf(sum);
    factors[i] = weight / sum;
    out[i] = dst;
    PrefetchRow(dst, hv);
  }
  StoreTransposed(tile.o, rows.num_lanes, hv, factors, out);
}

// What a task that visits a part of the keys leaves: maxima, sums, O^T.
static size_t ForwardPartialFloats(const Problem& p) {
  return 2 * kRowTile + static_cast<size_t>(p.head_dim_v) * FwdLanes(p);
}

static void SavePartial(const Problem& p, const FwdTile& tile, float* partial) {
  const size_t floats = static_cast<size_t>(p.head_dim_v) * tile.rows.num_lanes;
  __builtin_memcpy(partial, tile.max, sizeof(tile.max));
  __builtin_memcpy(partial + kRowTile, tile.sum, sizeof(tile.sum));
  partial += 2 * kRowTile;
  if (tile.started) {
    __builtin_memcpy(partial, tile.o, floats * sizeof(float));
  } else {
    __builtin_memset(partial, 0, floats * sizeof(float));
  }
}

// Results of a row tile from those of all parts of its keys, in their order.
template <class T>
static void MergeTask(const FwdArgs& args, const Merge& merge, float* scratch) {
  const Problem& p = args.problem;
  const Task& task = merge.task;
  FwdTile* tile = reinterpret_cast<FwdTile*>(scratch);
  MakeRowTile(p, *task.sequence, task.kv_head, task.begin, task.end, &tile->rows);
  tile->o = scratch + RoundUp(sizeof(FwdTile), 64) / sizeof(float);
  const int lanes = tile->rows.num_lanes, hv = static_cast<int>(p.head_dim_v);
  const float scale_log2 = SoftmaxScale(p) * kLog2E;
  const int64_t stride = ForwardPartialFloats(p);
  for (int l = 0; l < lanes; l += kWidth) {
    Vec max = Broadcast(-kInf);
    for (int64_t i = 0; i < merge.num_parts; ++i) {
      max = VecMax(max, Load(merge.partials + i * stride + l));
    }
    const Vec base = Select(max == -kInf, Vec{}, max);
    Vec sum = Vec{};
    for (int d = 0; d < hv; ++d) Store(tile->o + d * lanes + l, Vec{});
    for (int64_t i = 0; i < merge.num_parts; ++i) {
      const float* partial = merge.partials + i * stride;
      const Vec weight = Exp2((Load(partial + l) - base) * scale_log2);
      sum += Load(partial + kRowTile + l) * weight;
      for (int d = 0; d < hv; ++d) {
        float* o = tile->o + d * lanes + l;
        Store(o, Load(o) + Load(partial + 2 * kRowTile + d * lanes + l) * weight);
      }
    }
    Store(tile->max + l, max);
    Store(tile->sum + l, sum);
  }
  StoreResults<T>(args, *tile);
}

template <class T>
static void ForwardTask(const FwdArgs& args, const Task& task, float* scratch) {
  const Problem& p = args.problem;
  const Sequence& seq = *task.sequence;
  const int h = static_cast<int>(p.head_dim), hv = static_cast<int>(p.head_dim_v);
  const int ldk = LeadingDim(h), ldv = LeadingDim(hv);

  float* k = scratch;
  float* v = k + kKeyBlock * ldk;
  float* s = v + kKeyBlock * ldv;
  float* tiles = s + kKeyBlock * FwdLanes(p);
  const auto tile_at = [&](int i) {
    return reinterpret_cast<FwdTile*>(tiles + i * FwdTileFloats(p));
  };

  int num_tiles = 0;
  int64_t first = seq.kv_len, last = 0;
  for (int64_t row = task.begin; row < task.end; row += kRowTile, ++num_tiles) {
    FwdTile* tile = tile_at(num_tiles);
    RowTile& rows = tile->rows;
    MakeRowTile(p, seq, task.kv_head, row, task.end, &rows);
    tile->q = reinterpret_cast<float*>(tile) + RoundUp(sizeof(FwdTile), 64) / sizeof(float);
    tile->o = tile->q + h * rows.num_lanes;
    tile->started = false;
    const T* q[kRowTile];
    for (int i = 0; i < rows.num_lanes; ++i) {
      q[i] = rows.IsLive(i) ? static_cast<const T*>(args.q) + rows.btn[i] * h : nullptr;
      tile->max[i] = -kInf;
      tile->sum[i] = 0;
    }
    for (int i = 0; i < rows.num_lanes; ++i) PrefetchRow(q[i], h);
    LoadTransposed(q, rows.num_lanes, h, tile->q);
    first = Min(first, rows.span.First());
    last = Max(last, rows.span.hi);
  }

  first = Max(first, task.key_begin);
  last = Min(last, task.key_end);
  const KeySource source = MakeKeySource(p, seq, task.kv_head);
  for (int64_t key = first; key < last; key += kKeyBlock) {
    const KeyBlock block = MakeKeyBlock(seq, key, Min(key + kKeyBlock, last));
    bool loaded = false;
    for (int i = 0; i < num_tiles; ++i) {
      FwdTile* tile = tile_at(i);
      const SeenKeys keys = See(seq, tile->rows.span, block);
      if (keys.num_keys == 0) continue;
      if (!loaded) {
        LoadKeys(source, static_cast<const T*>(args.k), key, block.end, h, k, ldk);
        LoadKeys(source, static_cast<const T*>(args.v), key, block.end, hv, v, ldv);
        loaded = true;
      }
      const int64_t skipped = keys.begin - key;
      ForwardBlock(p, tile, keys, k + skipped * ldk, v + skipped * ldv, s);
    }
  }
  if (task.partial) return SavePartial(p, *tile_at(0), task.partial);
  for (int i = 0; i < num_tiles; ++i) StoreResults<T>(args, *tile_at(i));
}

}  // namespace jfa::cpu::JFA_ISA_NAMESPACE

#endif  // JAX_FLASHATTN_CC_CPU_FORWARD_H_
