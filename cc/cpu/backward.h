// Backward of one task. For a block of keys and a tile of query rows, as in forward.h with rows as
// lanes (` means transposed, P and dS are [keys][lanes]):
//
//   P` = exp(L` - lse)    dP` = V dO`    dL` = P` * (dP` - D),  D = rowsum(dO * O) - dlse
//   dS` = dL` * (1 - tanh^2)  where logits L` are capped, else dL`
//   dV += P` dO              dK += dS` Q                                    (kDKV, kAll)
//   dQ` += K` dS`            dslope -= rowsum(dL` * distance)               (kDQ, kAll)
//
// kAll: one task is a (sequence, key head); key blocks outside, row tiles inside, dQ` in f32 among
// what is saved of a tile between visits. Five products per block.
// kDQ, kDKV: for when there are too few heads for the workers. A kDQ task is a row tile, a kDKV
// task a key block, each keeps its sums to itself; seven products in all. kDQ comes first: it
// leaves D, lse and the tiles' spans for kDKV. Spans lie apart from the rest, so that passing over
// tiles that do not see a block of keys reads little.
// Either way every sum has one owner and one order, so results do not depend on timing.
//
// Saved, per row tile: D [64], lse [64], dslope [64], dQ` [H][64].
#ifndef JAX_FLASHATTN_CC_CPU_BACKWARD_H_
#define JAX_FLASHATTN_CC_CPU_BACKWARD_H_

#include "isa.h"
#include "logits.h"
#include "mask.h"
#include "microkernel.h"
#include "row_tile.h"
#include "simd.h"
#include "tile.h"

namespace jfa::cpu::JFA_ISA_NAMESPACE {

// A wide block packs Q and dO less often; K, V, dK, dV and two blocks of scores are to fit in L2.
// With heads up to 128 wide 256 keys are 2% to 7% faster than 128, but as tasks too few.
static int BackwardKeyBlock(const Problem& p, BwdPass pass) {
  const int64_t dims = p.head_dim + p.head_dim_v;
  if (dims <= 256 && pass == BwdPass::kAll) return 256;
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

// One row tile's part of what is saved.
struct SavedRows {
  float *d, *lse, *dslope, *dq_t;
};

template <class T>
struct BwdState {
  const BwdArgs* args;
  const Problem* p;
  const SavedTiles* saved;
  const Task* task;
  const Sequence* seq;
  LogitRule logit_rule;
  int h, hv, ldk, ldv, key_block;
  int64_t num_group_rows;
  float *k, *v, *dk, *dv, *s, *dp, *q, *dout, *q_t, *dout_t, *dq_t;
  RowTile rows;
  const T* q_rows[kRowTile];
  const T* dout_rows[kRowTile];

  int64_t SavedIndex(int64_t row) const {
    const int64_t before = seq->row_tiles_before * p->num_kv_heads;
    return before + task->kv_head * seq->num_row_tiles + row / kRowTile;
  }
  RowSpan* SpanAt(int64_t row) const { return saved->spans + SavedIndex(row); }
  SavedRows Saved() const {
    float* d = saved->floats + SavedIndex(rows.begin) * SavedFloatsPerTile(p->head_dim);
    return {d, d + kRowTile, d + 2 * kRowTile, d + 3 * kRowTile};
  }
  // The first key of the sequence, among all rows of k or v.
  int64_t FirstKeyRow() const {
    return (seq->batch * p->kv_len + seq->kv_begin) * p->num_kv_heads + task->kv_head;
  }
};

template <class T>
static void InitState(const BwdArgs& args, const SavedTiles& saved, BwdPass pass, const Task& task,
                      float* scratch, BwdState<T>* st) {
  const Problem& p = args.problem;
  st->args = &args;
  st->p = &p;
  st->saved = &saved;
  st->task = &task;
  st->seq = task.sequence;
  st->logit_rule = MakeLogitRule(p);
  st->h = static_cast<int>(p.head_dim);
  st->hv = static_cast<int>(p.head_dim_v);
  st->ldk = LeadingDim(st->h);
  st->ldv = LeadingDim(st->hv);
  st->num_group_rows = p.num_heads / p.num_kv_heads * st->seq->q_size;
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
  MakeRowTile(*st->p, *st->seq, st->task->kv_head, begin, st->num_group_rows, &st->rows);
  for (int i = 0; i < st->rows.num_lanes; ++i) {
    const bool live = st->rows.IsLive(i);
    const int64_t row = live ? st->rows.btn[i] : 0;
    st->q_rows[i] = live ? static_cast<const T*>(st->args->q) + row * st->h : nullptr;
    st->dout_rows[i] = live ? static_cast<const T*>(st->args->dout) + row * st->hv : nullptr;
  }
}

// Starts what is saved of the rows at hand. A row that sees nothing gets lse = inf, which makes its
// P zero.
template <class T>
static void InitSaved(const BwdState<T>& st) {
  *st.SpanAt(st.rows.begin) = st.rows.span;
  const SavedRows saved = st.Saved();
  __builtin_memset(saved.dslope, 0, kRowTile * sizeof(float));
  const BwdArgs& args = *st.args;
  for (int i = 0; i < st.rows.num_lanes; ++i) {
    saved.d[i] = 0;
    saved.lse[i] = kInf;
    if (!st.rows.IsLive(i)) continue;
    const int64_t row = st.rows.bnt[i];
    if (args.lse[row] == -kInf) continue;
    const T* out = static_cast<const T*>(args.out) + st.rows.btn[i] * st.hv;
    const T* dout = st.dout_rows[i];
    Vec sum = Vec{};
    int c = 0;
    for (; c + kWidth <= st.hv; c += kWidth) sum += LoadF(out + c) * LoadF(dout + c);
    if (c < st.hv) sum += LoadPartial(out + c, st.hv - c) * LoadPartial(dout + c, st.hv - c);
    saved.d[i] = Sum(sum) - (args.dlse ? args.dlse[row] : 0.0f);
    saved.lse[i] = args.lse[row];
  }
}

template <class T>
static void LoadKeys(const BwdState<T>& st, int64_t begin, int num_keys) {
  const int64_t heads = st.p->num_kv_heads;
  const int64_t row = st.FirstKeyRow() + begin * heads;
  LoadRows(static_cast<const T*>(st.args->k) + row * st.h, heads * st.h, num_keys, st.h, st.k,
           st.ldk);
  LoadRows(static_cast<const T*>(st.args->v) + row * st.hv, heads * st.hv, num_keys, st.hv, st.v,
           st.ldv);
}

// Scores to P, dP to dS, in place; adds to saved.dslope unless that is null.
template <Test kTest, bool kPlain>
static void Gradients(const LogitRule& rule, const RowTile& rows, const SavedRows& saved,
                      const SeenKeys& keys, float* s, float* dp) {
  const int lanes = rows.num_lanes;
  for (int lane = 0; lane < lanes; lane += kWidth) {
    const Vec d = Load(saved.d + lane);
    const Vec lse = Load(saved.lse + lane);
    const Vec slope = Load(rows.slope + lane), position = Load(rows.position + lane);
    Vec dslope = Vec{};
    for (int j = 0; j < keys.num_keys; ++j) {
      const int at = j * lanes + lane;
      Logit logit;
      if (kPlain) {
        logit.value = Load(s + at) * rule.scale;
      } else {
        logit = ToLogit(rule, Load(s + at), slope, position, static_cast<float>(keys.begin + j));
      }
      Vec p = Exp2((logit.value - lse) * kLog2E);
      if (kTest != Test::kNone) p = Select(Visible<kTest>(rows, lane, keys, j), p, Vec{});
      Store(s + at, p);
      Vec ds = p * (Load(dp + at) - d);
      if (!kPlain) {
        dslope -= ds * logit.distance;
        ds *= 1 - logit.tanh * logit.tanh;
      }
      Store(dp + at, ds);
    }
    if (!kPlain && saved.dslope) {
      Store(saved.dslope + lane, Load(saved.dslope + lane) + dslope);
    }
  }
}

template <bool kPlain>
static void GradientsOfSeen(const LogitRule& rule, const RowTile& rows, const SavedRows& saved,
                            const SeenKeys& keys, float* s, float* dp) {
  switch (keys.test) {
    case Test::kNone:
      return Gradients<Test::kNone, kPlain>(rule, rows, saved, keys, s, dp);
    case Test::kRange:
      return Gradients<Test::kRange, kPlain>(rule, rows, saved, keys, s, dp);
    case Test::kRangeAndSegment:
      return Gradients<Test::kRangeAndSegment, kPlain>(rule, rows, saved, keys, s, dp);
  }
}

// Some keys of the block that is loaded from key `begin` on against the rows at hand. Q` and dO`
// (and, for dK and dV, Q and dO) are packed.
template <class T>
static void BackwardBlock(const BwdState<T>& st, int64_t begin, const SeenKeys& keys, bool want_dkv,
                          float* dq_t) {
  const RowTile& rows = st.rows;
  const int lanes = rows.num_lanes;
  const int vecs = lanes / kWidth;
  const int64_t skipped = keys.begin - begin;
  const float* k = st.k + skipped * st.ldk;
  const float* v = st.v + skipped * st.ldv;
  Gemm<kAlongK>(keys.num_keys, vecs, st.h, k, st.ldk, st.q_t, lanes, st.s, lanes, false);
  Gemm<kAlongK>(keys.num_keys, vecs, st.hv, v, st.ldv, st.dout_t, lanes, st.dp, lanes, false);
  const auto gradients = HasPlainLogits(*st.p) ? GradientsOfSeen<true> : GradientsOfSeen<false>;
  SavedRows saved = st.Saved();
  // Without dq_t other tasks have these rows at hand too, and one before has summed their dslope.
  if (!dq_t) saved.dslope = nullptr;
  gradients(st.logit_rule, rows, saved, keys, st.s, st.dp);
  if (want_dkv) {
    Gemm<kAlongK>(keys.num_keys, RoundUp(st.hv, kWidth) / kWidth, rows.num_rows, st.s, lanes,
                  st.dout, st.ldv, st.dv + skipped * st.ldv, st.ldv, true);
    Gemm<kAlongK>(keys.num_keys, RoundUp(st.h, kWidth) / kWidth, rows.num_rows, st.dp, lanes, st.q,
                  st.ldk, st.dk + skipped * st.ldk, st.ldk, true);
  }
  if (dq_t) {
    Gemm<kAlongM>(st.h, vecs, keys.num_keys, k, st.ldk, st.dp, lanes, dq_t, lanes, true);
  }
}

template <class T>
static void StoreRowResults(const BwdState<T>& st, const float* dq_t) {
  const float* dslope = st.Saved().dslope;
  T* rows[kRowTile];
  float factors[kRowTile];
  for (int i = 0; i < st.rows.num_lanes; ++i) {
    rows[i] = nullptr;
    factors[i] = st.p->scale;
    if (i >= st.rows.num_rows) continue;
    if (st.args->dslopes_rows) st.args->dslopes_rows[st.rows.bnt[i]] = dslope[i];
    T* dst = static_cast<T*>(st.args->dq) + st.rows.btn[i] * st.h;
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
  if (want_dkv) {
    // First, since it goes along the rows, which is the order that memory likes.
    LoadRows(st.q_rows, st.rows.num_rows, st.h, st.q, st.ldk);
    LoadRows(st.dout_rows, st.rows.num_rows, st.hv, st.dout, st.ldv);
  }
  LoadTransposed(st.q_rows, lanes, st.h, st.q_t);
  LoadTransposed(st.dout_rows, lanes, st.hv, st.dout_t);
}

// dK and dV of the keys [begin, end), and with `accumulate_rows` what they add to dQ` and dslope.
template <class T>
static void KeyBlocks(BwdState<T>* st, int64_t begin, int64_t end, bool accumulate_rows) {
  const Problem& p = *st->p;
  const Sequence& seq = *st->seq;
  const int64_t dk_stride = p.num_kv_heads * st->h, dv_stride = p.num_kv_heads * st->hv;
  T* dk = static_cast<T*>(st->args->dk) + st->FirstKeyRow() * st->h;
  T* dv = static_cast<T*>(st->args->dv) + st->FirstKeyRow() * st->hv;
  const int64_t live_end = Min(end, seq.kv_len);
  for (int64_t key = begin; key < live_end; key += st->key_block) {
    const KeyBlock block = MakeKeyBlock(seq, key, Min(key + st->key_block, live_end));
    const int num_keys = static_cast<int>(block.end - key);
    LoadKeys(*st, key, num_keys);
    __builtin_memset(st->dk, 0, num_keys * st->ldk * sizeof(float));
    __builtin_memset(st->dv, 0, num_keys * st->ldv * sizeof(float));
    for (int64_t row = 0; row < st->num_group_rows; row += kRowTile) {
      const SeenKeys keys = See(seq, *st->SpanAt(row), block);
      if (keys.num_keys == 0) continue;
      SelectRows(st, row);
      LoadRowOperands(*st, true);
      BackwardBlock(*st, key, keys, true, accumulate_rows ? st->Saved().dq_t : nullptr);
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
    InitSaved(*st);
    __builtin_memset(st->Saved().dq_t, 0, st->rows.num_lanes * st->h * sizeof(float));
  }
  KeyBlocks(st, 0, st->seq->kv_size, true);
  for (int64_t row = 0; row < st->num_group_rows; row += kRowTile) {
    SelectRows(st, row);
    StoreRowResults(*st, st->Saved().dq_t);
  }
}

template <class T>
static void DQTask(BwdState<T>* st) {
  for (int64_t row = st->task->begin; row < st->task->end; row += kRowTile) {
    SelectRows(st, row);
    InitSaved(*st);
    LoadRowOperands(*st, false);
    __builtin_memset(st->dq_t, 0, st->rows.num_lanes * st->h * sizeof(float));
    const RowSpan& span = st->rows.span;
    for (int64_t key = span.First(); key < span.hi; key += st->key_block) {
      const KeyBlock block = MakeKeyBlock(*st->seq, key, Min(key + st->key_block, span.hi));
      const SeenKeys keys = See(*st->seq, span, block);
      if (keys.num_keys == 0) continue;
      LoadKeys(*st, keys.begin, keys.num_keys);
      BackwardBlock(*st, keys.begin, keys, false, st->dq_t);
    }
    StoreRowResults(*st, st->dq_t);
  }
}

template <class T>
static void BackwardTask(const BwdArgs& args, const SavedTiles& saved, BwdPass pass,
                         const Task& task, float* scratch) {
  BwdState<T> st;
  InitState(args, saved, pass, task, scratch, &st);
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
