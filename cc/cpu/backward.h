// Backward of one task. For a block of keys and a tile of query rows, as in forward.h with rows as
// lanes (` means transposed, P and dS are [keys][lanes]):
//
//   P` = exp(scale K Q` - lse)    dP` = V dO`    dS` = P` * (dP` - D),  D = rowsum(dO * O) - dlse
//   dV += P` dO              dK += dS` Q                                    (kDKV, kAll)
//   dQ` += K` dS`                                                           (kDQ, kAll)
//
// kAll: one task is a (batch, key head); key blocks outside, row tiles inside, dQ` in f32 in
// dq_accum between visits. Five products per block.
// kDQ, kDKV: for when there are too few heads for the workers. A kDQ task is a row tile, a kDKV
// task a key block, each keeps its sums to itself; seven products in all. kDQ comes first: it
// leaves D and lse for kDKV.
// Either way every sum has one owner and one order, so results do not depend on timing.
//
// dq_accum, per (batch, key head) and row tile: D [64], lse [64], dQ` [H][64].
#ifndef JAX_FLASHATTN_CC_CPU_BACKWARD_H_
#define JAX_FLASHATTN_CC_CPU_BACKWARD_H_

#include "isa.h"
#include "mask.h"
#include "microkernel.h"
#include "simd.h"
#include "tile.h"

namespace jfa::cpu::JFA_ISA_NAMESPACE {

// A wide block packs Q and dO less often; K, V, dK, dV and two blocks of scores are to fit in L2.
// With small heads 256 keys are 2% (f32) to 7% (bf16) faster than 128, but as tasks too few.
static int BackwardKeyBlock(const Problem& p, BwdPass pass) {
  const int64_t dims = p.head_dim + p.head_dim_v;
  if (dims <= 128 && pass == BwdPass::kAll) return 256;
  return dims <= 320 ? 128 : 64;
}

static size_t BackwardScratchFloats(const Problem& p) {
  const int keys = BackwardKeyBlock(p, BwdPass::kAll);  // the widest
  const size_t h = p.head_dim, hv = p.head_dim_v;
  const size_t lds = LeadingDim(h) + LeadingDim(hv);
  return 2 * keys * lds                   // K, V, dK, dV
         + 2 * keys * kRowTile            // P, dS
         + kRowTile * (lds + 2 * h + hv)  // Q, dO, both transposed too, and dQ`
      ;
}

template <class T>
struct BwdState {
  const BwdArgs* args;
  const Problem* p;
  const Task* task;
  Mask mask;
  int h, hv, ldk, ldv, key_block;
  int64_t first_head, num_row_tiles, num_group_rows;
  float *k, *v, *dk, *dv, *s, *dp, *q, *dout, *q_t, *dout_t, *dq_t;
  RowTile rows;
  const T* q_rows[kRowTile];
  const T* dout_rows[kRowTile];

  int64_t RowIndex(int lane) const {
    const int64_t position = task->batch * p->q_len + rows.t[lane];
    return position * p->num_heads + first_head + rows.head[lane];
  }
  int64_t LseIndex(int lane) const {
    const int64_t head = task->batch * p->num_heads + first_head + rows.head[lane];
    return head * p->q_len + rows.t[lane];
  }
  // D, lse and dQ` of the row tile at hand.
  float* Saved() const {
    const int64_t tile = rows.begin / kRowTile;
    const int64_t head = task->batch * p->num_kv_heads + task->kv_head;
    return args->dq_accum + (head * num_row_tiles + tile) * kRowTile * (2 + p->head_dim);
  }
};

template <class T>
static void InitState(const BwdArgs& args, BwdPass pass, const Task& task, float* scratch,
                      BwdState<T>* st) {
  const Problem& p = args.problem;
  st->args = &args;
  st->p = &p;
  st->task = &task;
  st->mask = MakeMask(p, task.batch);
  st->h = static_cast<int>(p.head_dim);
  st->hv = static_cast<int>(p.head_dim_v);
  st->ldk = LeadingDim(st->h);
  st->ldv = LeadingDim(st->hv);
  const int64_t group = p.num_heads / p.num_kv_heads;
  st->first_head = task.kv_head * group;
  st->num_group_rows = group * p.q_len;
  st->num_row_tiles = (st->num_group_rows + kRowTile - 1) / kRowTile;
  st->key_block = BackwardKeyBlock(p, pass);
  const auto take = [&scratch](int floats) {
    float* begin = scratch;
    scratch += floats;
    return begin;
  };
  st->k = take(st->key_block * st->ldk);
  st->v = take(st->key_block * st->ldv);
  st->dk = take(st->key_block * st->ldk);
  st->dv = take(st->key_block * st->ldv);
  st->s = take(st->key_block * kRowTile);
  st->dp = take(st->key_block * kRowTile);
  st->q = take(kRowTile * st->ldk);
  st->dout = take(kRowTile * st->ldv);
  st->q_t = take(kRowTile * st->h);
  st->dout_t = take(kRowTile * st->hv);
  st->dq_t = take(kRowTile * st->h);
}

// Points st at the row tile from `begin` on.
template <class T>
static void SelectRows(BwdState<T>* st, int64_t begin) {
  MakeRowTile(*st->p, st->mask, begin, st->num_group_rows, &st->rows);
  for (int i = 0; i < st->rows.num_lanes; ++i) {
    const bool live = st->rows.IsLive(i);
    st->q_rows[i] = live ? static_cast<const T*>(st->args->q) + st->RowIndex(i) * st->h : nullptr;
    st->dout_rows[i] =
        live ? static_cast<const T*>(st->args->dout) + st->RowIndex(i) * st->hv : nullptr;
  }
}

// D and lse of the rows at hand. A dead row gets lse = inf, which makes its P zero.
template <class T>
static void SaveRowSums(const BwdState<T>& st) {
  float* d = st.Saved();
  float* lse = d + kRowTile;
  const BwdArgs& args = *st.args;
  for (int i = 0; i < st.rows.num_lanes; ++i) {
    d[i] = 0;
    lse[i] = kInf;
    if (!st.rows.IsLive(i) || args.lse[st.LseIndex(i)] == -kInf) continue;
    const T* out = static_cast<const T*>(args.out) + st.RowIndex(i) * st.hv;
    const T* dout = st.dout_rows[i];
    Vec sum = Vec{};
    int c = 0;
    for (; c + kWidth <= st.hv; c += kWidth) sum += LoadF(out + c) * LoadF(dout + c);
    if (c < st.hv) sum += LoadPartial(out + c, st.hv - c) * LoadPartial(dout + c, st.hv - c);
    d[i] = Sum(sum) - (args.dlse ? args.dlse[st.LseIndex(i)] : 0.0f);
    lse[i] = args.lse[st.LseIndex(i)];
  }
}

template <class T>
static void LoadKeys(const BwdState<T>& st, int64_t key, int num_keys) {
  const int64_t position = (st.task->batch * st.p->kv_len + key) * st.p->num_kv_heads;
  const int64_t head = position + st.task->kv_head;
  LoadRows(static_cast<const T*>(st.args->k) + head * st.h, st.p->num_kv_heads * st.h, num_keys,
           st.h, st.k, st.ldk);
  LoadRows(static_cast<const T*>(st.args->v) + head * st.hv, st.p->num_kv_heads * st.hv, num_keys,
           st.hv, st.v, st.ldv);
}

// Scores to P, dP to dS, in place.
template <bool kMasked>
static void Gradients(const RowTile& rows, float scale, const float* saved, int64_t key,
                      int num_keys, float* s, float* dp) {
  const int lanes = rows.num_lanes;
  for (int lane = 0; lane < lanes; lane += kWidth) {
    const Vec d = Load(saved + lane);
    const Vec lse = Load(saved + kRowTile + lane);
    for (int j = 0; j < num_keys; ++j) {
      const int at = j * lanes + lane;
      Vec p = Exp2((Load(s + at) * scale - lse) * kLog2E);
      if (kMasked) p = Select(Visible(rows, lane, static_cast<int32_t>(key + j)), p, Vec{});
      Store(s + at, p);
      Store(dp + at, p * (Load(dp + at) - d));
    }
  }
}

// One key block against the rows at hand. Q` and dO` (and, for dK and dV, Q and dO) are packed.
template <class T>
static void BackwardBlock(const BwdState<T>& st, int64_t key, int num_keys, bool want_dkv,
                          float* dq_t) {
  const RowTile& rows = st.rows;
  const int lanes = rows.num_lanes;
  const int vecs = lanes / kWidth;
  Gemm<kAlongK>(num_keys, vecs, st.h, st.k, st.ldk, st.q_t, lanes, st.s, lanes, false);
  Gemm<kAlongK>(num_keys, vecs, st.hv, st.v, st.ldv, st.dout_t, lanes, st.dp, lanes, false);
  if (rows.IsFull(key, key + num_keys)) {
    Gradients<false>(rows, st.p->scale, st.Saved(), key, num_keys, st.s, st.dp);
  } else {
    Gradients<true>(rows, st.p->scale, st.Saved(), key, num_keys, st.s, st.dp);
  }
  if (want_dkv) {
    Gemm<kAlongK>(num_keys, RoundUp(st.hv, kWidth) / kWidth, rows.num_rows, st.s, lanes, st.dout,
                  st.ldv, st.dv, st.ldv, true);
    Gemm<kAlongK>(num_keys, RoundUp(st.h, kWidth) / kWidth, rows.num_rows, st.dp, lanes, st.q,
                  st.ldk, st.dk, st.ldk, true);
  }
  if (dq_t) {
    Gemm<kAlongM>(st.h, vecs, num_keys, st.k, st.ldk, st.dp, lanes, dq_t, lanes, true);
  }
}

template <class T>
static void StoreDQ(const BwdState<T>& st, const float* dq_t) {
  T* rows[kRowTile];
  float factors[kRowTile];
  for (int i = 0; i < st.rows.num_lanes; ++i) {
    rows[i] = nullptr;
    factors[i] = st.p->scale;
    if (i >= st.rows.num_rows) continue;
    T* dst = static_cast<T*>(st.args->dq) + st.RowIndex(i) * st.h;
    if (st.rows.IsLive(i)) {
      rows[i] = dst;
    } else {
      ZeroRows(dst, 0, 1, st.h);
    }
  }
  StoreTransposed(dq_t, st.rows.num_lanes, st.h, factors, rows);
}

template <class T>
static void LoadRowOperands(const BwdState<T>& st, bool want_dkv) {
  const int lanes = st.rows.num_lanes;
  LoadTransposed(st.q_rows, lanes, st.h, st.q_t);
  LoadTransposed(st.dout_rows, lanes, st.hv, st.dout_t);
  if (want_dkv) {
    LoadRows(st.q_rows, st.rows.num_rows, st.h, st.q, st.ldk);
    LoadRows(st.dout_rows, st.rows.num_rows, st.hv, st.dout, st.ldv);
  }
}

// dK and dV of the keys [begin, end), and with `accumulate_dq` what they add to every row's dQ`.
template <class T>
static void KeyBlocks(BwdState<T>* st, int64_t begin, int64_t end, bool accumulate_dq) {
  const Problem& p = *st->p;
  const int64_t dk_stride = p.num_kv_heads * st->h, dv_stride = p.num_kv_heads * st->hv;
  T* dk = static_cast<T*>(st->args->dk) + st->task->batch * p.kv_len * dk_stride +
          st->task->kv_head * st->h;
  T* dv = static_cast<T*>(st->args->dv) + st->task->batch * p.kv_len * dv_stride +
          st->task->kv_head * st->hv;
  const int block = st->key_block;
  const int64_t live_end = Min(end, st->mask.kv_len);
  for (int64_t key = begin; key < live_end; key += block) {
    const int num_keys = static_cast<int>(Min<int64_t>(block, live_end - key));
    LoadKeys(*st, key, num_keys);
    __builtin_memset(st->dk, 0, num_keys * st->ldk * sizeof(float));
    __builtin_memset(st->dv, 0, num_keys * st->ldv * sizeof(float));
    for (int64_t row = 0; row < st->num_group_rows; row += kRowTile) {
      SelectRows(st, row);
      const int64_t seen = Min<int64_t>(num_keys, st->rows.range_hi - key);
      if (seen <= 0 || key + num_keys <= st->rows.range_lo) continue;
      LoadRowOperands(*st, true);
      BackwardBlock(*st, key, static_cast<int>(seen), true,
                    accumulate_dq ? st->Saved() + 2 * kRowTile : nullptr);
    }
    StoreRows(st->dk, st->ldk, num_keys, st->h, p.scale, dk + key * dk_stride, dk_stride);
    StoreRows(st->dv, st->ldv, num_keys, st->hv, 1.0f, dv + key * dv_stride, dv_stride);
  }
  const int64_t pad = Max(begin, live_end);
  ZeroRows(dk + pad * dk_stride, dk_stride, end - pad, st->h);
  ZeroRows(dv + pad * dv_stride, dv_stride, end - pad, st->hv);
}

template <class T>
static void AllTask(BwdState<T>* st) {
  for (int64_t row = 0; row < st->num_group_rows; row += kRowTile) {
    SelectRows(st, row);
    SaveRowSums(*st);
    __builtin_memset(st->Saved() + 2 * kRowTile, 0, st->rows.num_lanes * st->h * sizeof(float));
  }
  KeyBlocks(st, 0, st->p->kv_len, true);
  for (int64_t row = 0; row < st->num_group_rows; row += kRowTile) {
    SelectRows(st, row);
    StoreDQ(*st, st->Saved() + 2 * kRowTile);
  }
}

template <class T>
static void DQTask(BwdState<T>* st) {
  const int block = st->key_block;
  for (int64_t row = st->task->begin; row < st->task->end; row += kRowTile) {
    SelectRows(st, row);
    SaveRowSums(*st);
    LoadRowOperands(*st, false);
    __builtin_memset(st->dq_t, 0, st->rows.num_lanes * st->h * sizeof(float));
    for (int64_t key = st->rows.range_lo; key < st->rows.range_hi; key += block) {
      const int num_keys = static_cast<int>(Min<int64_t>(block, st->rows.range_hi - key));
      LoadKeys(*st, key, num_keys);
      BackwardBlock(*st, key, num_keys, false, st->dq_t);
    }
    StoreDQ(*st, st->dq_t);
  }
}

template <class T>
static void BackwardTask(const BwdArgs& args, BwdPass pass, const Task& task, float* scratch) {
  BwdState<T> st;
  InitState(args, pass, task, scratch, &st);
  switch (pass) {
    case BwdPass::kAll:
      return AllTask(&st);
    case BwdPass::kDQ:
      return DQTask(&st);
    case BwdPass::kDKV:
      return KeyBlocks(&st, task.begin, task.end, false);
  }
}

}  // namespace jfa::cpu::JFA_ISA_NAMESPACE

#endif  // JAX_FLASHATTN_CC_CPU_BACKWARD_H_
