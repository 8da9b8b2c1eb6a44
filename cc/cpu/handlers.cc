// XLA FFI handlers of the CPU kernels: buffers -> Problem and pointers, checked, nothing else.
//
// Python has checked already; here the checks keep a hand-written or stale custom call from reading
// out of bounds. Operands are plain BTNH arrays.
#include "cc/cpu/handlers.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "cc/aux_bits.h"
#include "cc/cpu/attention.h"
#include "xla/ffi/api/ffi.h"

namespace jfa::cpu {
namespace {

namespace ffi = xla::ffi;

// Work sharing on XLA's intra-op pool. The caller takes tasks too and waits only for tasks that
// somebody has begun, so a pool that is busy, or whose every thread waits here, can't deadlock.
class PoolExecutor final : public Executor {
 public:
  explicit PoolExecutor(ffi::ThreadPool pool) : pool_(pool) {}

  int num_workers() const override {
    return static_cast<int>(std::max<int64_t>(1, pool_.num_threads()));
  }

  void ParallelFor(int64_t num_tasks, const std::function<void(int, int64_t)>& body) override {
    if (num_tasks <= 0) return;
    // Helpers may start after this call has returned: what they touch then is shared, not ours.
    struct Shared {
      std::atomic<int64_t> next{0};
      std::mutex mutex;
      std::condition_variable all_done;
      int64_t num_done = 0;
    };
    auto shared = std::make_shared<Shared>();
    auto work = [shared, num_tasks, body_ptr = &body](int worker) {
      int64_t finished = 0;
      for (int64_t task; (task = shared->next.fetch_add(1)) < num_tasks; ++finished) {
        (*body_ptr)(worker, task);
      }
      if (finished == 0) return;
      std::lock_guard<std::mutex> lock(shared->mutex);
      shared->num_done += finished;
      if (shared->num_done == num_tasks) shared->all_done.notify_all();
    };
    const int64_t num_helpers = std::min<int64_t>(num_workers(), num_tasks) - 1;
    for (int64_t i = 0; i < num_helpers; ++i) {
      pool_.Schedule([work, worker = static_cast<int>(i + 1)] { work(worker); });
    }
    work(0);
    std::unique_lock<std::mutex> lock(shared->mutex);
    shared->all_done.wait(lock, [&] { return shared->num_done == num_tasks; });
  }

 private:
  ffi::ThreadPool pool_;
};

// What all handlers have, in this order.
struct Attributes {
  float scale;
  float soft_cap;  // 0: none
  bool is_causal;
  int64_t query_offset;
  int64_t window_left;  // -1: open
  int64_t window_right;
  int64_t sink_tokens;
  int64_t aux;

  bool Has(AuxBit bit) const { return (aux & bit) != 0; }
};

std::string Join(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(dims[i]);
  }
  return text + "]";
}

std::string DTypeName(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::F32:
      return "float32";
    case ffi::BF16:
      return "bfloat16";
    case ffi::F16:
      return "float16";
    case ffi::S32:
      return "int32";
    default:
      return "dtype " + std::to_string(static_cast<int>(dtype));
  }
}

// The first thing found wrong with a call's operands; later checks are skipped.
class Checker {
 public:
  bool ok() const { return message_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument(message_); }

  void Fail(std::string message) {
    if (ok()) message_ = "jax_flashattn: " + std::move(message);
  }

  bool Rank(const ffi::AnyBuffer& x, std::string_view name, size_t rank) {
    if (ok() && x.dimensions().size() != rank) {
      Fail(std::string(name) + " must have " + std::to_string(rank) + " axes, got " +
           std::to_string(x.dimensions().size()));
    }
    return ok();
  }

  void Expect(const ffi::AnyBuffer& x, std::string_view name, ffi::DataType dtype,
              const std::vector<int64_t>& dims) {
    if (!ok()) return;
    const std::vector<int64_t> got(x.dimensions().begin(), x.dimensions().end());
    if (x.element_type() != dtype || got != dims) {
      Fail(std::string(name) + " must be " + DTypeName(dtype) + Join(dims) + ", got " +
           DTypeName(x.element_type()) + Join(got));
    }
  }

 private:
  std::string message_;
};

// Operands or results, one after the other; asking for one too many is an error, and so is one left
// over.
template <class Remaining>
class Buffers {
 public:
  Buffers(const Remaining& buffers, const char* kind, Checker& check)
      : buffers_(buffers), kind_(kind), check_(check) {}

  // Null if there is none.
  const ffi::AnyBuffer* Next(std::string_view name) { return At(next_++, name); }
  const ffi::AnyBuffer* Last(std::string_view name) { return At(buffers_.size() - 1, name); }

  // The memory of the next one, null unless it is as expected.
  void* Take(std::string_view name, ffi::DataType dtype, const std::vector<int64_t>& dims) {
    const ffi::AnyBuffer* x = Next(name);
    if (x != nullptr) check_.Expect(*x, name, dtype, dims);
    return check_.ok() ? x->untyped_data() : nullptr;
  }

  void ExpectEnd() {
    if (next_ < buffers_.size()) {
      check_.Fail("expected " + std::to_string(next_) + " " + kind_ + "s, got " +
                  std::to_string(buffers_.size()));
    }
  }

 private:
  static const ffi::AnyBuffer& Unwrap(ffi::AnyBuffer& x) { return x; }
  static const ffi::AnyBuffer& Unwrap(ffi::Result<ffi::AnyBuffer>& x) { return *x; }

  const ffi::AnyBuffer* At(size_t i, std::string_view name) {
    if (i < buffers_.size()) {
      auto buffer = buffers_.template get<ffi::AnyBuffer>(i);
      if (buffer.has_value()) return &held_.emplace_back(Unwrap(*buffer));
    }
    check_.Fail(std::string(kind_) + " " + std::string(name) + " is missing");
    return nullptr;
  }

  Remaining buffers_;
  const char* kind_;
  Checker& check_;
  size_t next_ = 0;
  std::deque<ffi::AnyBuffer> held_;
};

using Operands = Buffers<ffi::RemainingArgs>;
using Results = Buffers<ffi::RemainingRets>;

std::vector<int64_t> QDims(const Problem& p) { return {p.batch, p.q_len, p.num_heads, p.head_dim}; }
std::vector<int64_t> KeyDims(const Problem& p, int64_t dim) {
  if (p.page_size == 0) return {p.batch, p.kv_len, p.num_kv_heads, dim};
  if (p.heads_first) return {p.num_pages, p.num_kv_heads, p.page_size, dim};
  return {p.num_pages, p.page_size, p.num_kv_heads, dim};
}
std::vector<int64_t> KDims(const Problem& p) { return KeyDims(p, p.head_dim); }
std::vector<int64_t> VDims(const Problem& p) { return KeyDims(p, p.head_dim_v); }
std::vector<int64_t> OutDims(const Problem& p) {
  return {p.batch, p.q_len, p.num_heads, p.head_dim_v};
}
std::vector<int64_t> LseDims(const Problem& p) { return {p.batch, p.num_heads, p.q_len}; }

enum class Keys { kDense, kPaged };

void CheckAttributes(const Attributes& a, Keys keys, Checker& check) {
  const auto expect = [&check](bool ok, const char* name, const char* expected, auto value) {
    if (ok) return;
    check.Fail(std::string("attribute ") + name + " must be " + expected + ", got " +
               std::to_string(value));
  };
  expect(a.scale > 0 && std::isfinite(a.scale), "scale", "positive and finite", a.scale);
  expect(a.soft_cap >= 0 && std::isfinite(a.soft_cap), "soft_cap", "0 or positive and finite",
         a.soft_cap);
  expect(a.window_left >= -1, "window_left", "at least -1", a.window_left);
  expect(a.window_right >= -1, "window_right", "at least -1", a.window_right);
  expect(a.sink_tokens >= 0, "sink_tokens", "at least 0", a.sink_tokens);
  expect((a.aux & ~int64_t{kAllAux}) == 0, "aux", "a set of 12 bits", a.aux);
  expect((a.aux & (kQkScale | kVScale)) == 0, "aux", "without scales: inputs are dequantized",
         a.aux);
  expect(a.Has(kQSegmentIds) == a.Has(kKvSegmentIds), "aux",
         "with segment ids of both sides or of none", a.aux);
  if (keys == Keys::kPaged) {
    expect(a.Has(kPageTable) && a.Has(kKvLengths), "aux", "with page_table and kv_lengths", a.aux);
    expect((a.aux & (kQSegmentIds | kCuSeqlensKv)) == 0, "aux",
           "without segment ids and cu_seqlens_kv if paged", a.aux);
    expect(!a.Has(kCuSeqlensQ) || !a.Has(kQLengths), "aux", "without q_lengths if packed", a.aux);
    return;
  }
  expect(!a.Has(kPageTable), "aux", "without page_table", a.aux);
  expect(a.Has(kCuSeqlensQ) == a.Has(kCuSeqlensKv), "aux",
         "with cu_seqlens of both sides or of none", a.aux);
  expect(!a.Has(kCuSeqlensQ) || (a.aux & (kQLengths | kKvLengths | kQSegmentIds)) == 0, "aux",
         "without lengths and segment ids if packed", a.aux);
}

DType ReadDType(const ffi::AnyBuffer& q, Checker& check) {
  switch (q.element_type()) {
    case ffi::F32:
      return DType::kF32;
    case ffi::BF16:
      return DType::kBF16;
    case ffi::F16:
      return DType::kF16;
    default:
      check.Fail("q must be float32, bfloat16 or float16, got " + DTypeName(q.element_type()));
      return DType::kF32;
  }
}

// Sizes and dtype from q, k, v, all three checked against each other. heads_first says how pages
// are laid out; their kv_len is left to ReadPageTable.
Problem ReadProblem(const Attributes& attrs, Keys keys, bool heads_first, const ffi::AnyBuffer& q,
                    const ffi::AnyBuffer& k, const ffi::AnyBuffer& v, Checker& check) {
  Problem p{};
  CheckAttributes(attrs, keys, check);
  if (!check.Rank(q, "q", 4) || !check.Rank(k, "k", 4) || !check.Rank(v, "v", 4)) return p;
  const auto qd = q.dimensions(), kd = k.dimensions(), vd = v.dimensions();
  p.dtype = ReadDType(q, check);
  p.batch = qd[0];
  p.q_len = qd[1];
  p.num_heads = qd[2];
  p.head_dim = qd[3];
  p.head_dim_v = vd[3];
  if (keys == Keys::kPaged) {
    p.heads_first = heads_first;
    p.num_pages = kd[0];
    p.page_size = kd[heads_first ? 2 : 1];
    p.num_kv_heads = kd[heads_first ? 1 : 2];
    if (p.num_pages < 1 || p.page_size < 1) {
      check.Fail("there must be at least 1 page of at least 1 token, got " +
                 std::to_string(p.num_pages) + " of " + std::to_string(p.page_size));
    }
  } else {
    p.kv_len = kd[1];
    p.num_kv_heads = kd[2];
  }
  if (p.num_heads < 1 || p.num_kv_heads < 1 || p.head_dim < 1 || p.head_dim_v < 1) {
    check.Fail("heads and head dims must be at least 1, got q " + Join(QDims(p)) + ", v " +
               Join(VDims(p)));
  } else if (p.num_heads % p.num_kv_heads != 0) {
    check.Fail("the heads of q must be a multiple of the heads of k, got " +
               std::to_string(p.num_heads) + " and " + std::to_string(p.num_kv_heads));
  } else if (p.q_len > INT32_MAX || p.kv_len > INT32_MAX) {
    check.Fail("lengths must be below 2^31, got q " + Join(QDims(p)) + ", k " + Join(KDims(p)));
  }
  check.Expect(k, "k", q.element_type(), KDims(p));
  check.Expect(v, "v", q.element_type(), VDims(p));
  // Far beyond every position, so that it changes nothing, and sums of two do not overflow.
  constexpr int64_t kFar = int64_t{1} << 40;
  p.scale = attrs.scale;
  p.soft_cap = attrs.soft_cap;
  p.is_causal = attrs.is_causal;
  p.query_offset = std::clamp(attrs.query_offset, -kFar, kFar);
  p.window_left = std::min(attrs.window_left, 2 * kFar);
  p.window_right = std::min(attrs.window_right, 2 * kFar);
  p.sink_tokens = attrs.sink_tokens;
  return p;
}

// What only the table tells, which comes last: how long the keys may be, and if packed how many
// sequences there are.
void ReadPageTable(const Attributes& attrs, Operands& operands, Checker& check, Problem& p) {
  const bool packed = attrs.Has(kCuSeqlensQ);
  const ffi::AnyBuffer* table = operands.Last("page_table");
  if (table == nullptr || !check.Rank(*table, "page_table", packed ? 3 : 2)) return;
  p.pages_per_seq = table->dimensions().back();
  if (packed) p.num_sequences = table->dimensions()[1];
  if (p.pages_per_seq < 1 || (packed && p.num_sequences < 1)) {
    check.Fail("page_table must be of at least 1 sequence and 1 page");
  } else if (p.pages_per_seq > INT32_MAX / p.page_size) {
    check.Fail("lengths must be below 2^31, got " + std::to_string(p.pages_per_seq) + " pages of " +
               std::to_string(p.page_size));
  }
  p.kv_len = p.pages_per_seq * p.page_size;
}

void ReadOptional(const Attributes& attrs, Operands& operands, Checker& check, Problem& p) {
  const bool packed = attrs.Has(kCuSeqlensQ);
  if (packed && attrs.Has(kCuSeqlensKv)) {
    // How many sequences there are only the boundaries tell, and they come last.
    const ffi::AnyBuffer* ends = operands.Last("cu_seqlens_kv");
    if (ends == nullptr || !check.Rank(*ends, "cu_seqlens_kv", 2)) return;
    p.num_sequences = ends->dimensions()[1] - 1;
    if (p.num_sequences < 1) {
      check.Fail("cu_seqlens_kv must be of at least 1 sequence, got " +
                 std::to_string(p.num_sequences + 1) + " boundaries");
    }
  }
  const auto ints = [&](AuxBit bit, const char* name, const std::vector<int64_t>& dims) {
    return attrs.Has(bit) ? static_cast<const int32_t*>(operands.Take(name, ffi::S32, dims))
                          : nullptr;
  };
  const auto floats = [&](AuxBit bit, const char* name, const std::vector<int64_t>& dims) {
    return attrs.Has(bit) ? static_cast<const float*>(operands.Take(name, ffi::F32, dims))
                          : nullptr;
  };
  const int64_t B = p.batch, N = p.num_heads, n = p.num_sequences;
  const std::vector<int64_t> per_sequence = packed ? std::vector{B, n} : std::vector{B};
  p.query_offsets = ints(kQueryOffset, "query_offset", per_sequence);
  p.q_lengths = ints(kQLengths, "q_lengths", {B});
  p.kv_lengths = ints(kKvLengths, "kv_lengths", per_sequence);
  p.q_segment_ids = ints(kQSegmentIds, "q_segment_ids", {B, p.q_len});
  p.kv_segment_ids = ints(kKvSegmentIds, "kv_segment_ids", {B, p.kv_len});
  p.alibi_slopes = floats(kAlibiSlopes, "alibi_slopes", {B, N});
  p.sinks = floats(kSinks, "sinks", {B, N});
  p.cu_seqlens_q = ints(kCuSeqlensQ, "cu_seqlens_q", {B, n + 1});
  p.cu_seqlens_kv = ints(kCuSeqlensKv, "cu_seqlens_kv", {B, n + 1});
  std::vector<int64_t> table = per_sequence;
  table.push_back(p.pages_per_seq);
  p.page_table = ints(kPageTable, "page_table", table);
}

ffi::Error OutOfMemory() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    "jax_flashattn: no memory for the kernels' tiles");
}

ffi::Error RunForward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                      const Attributes& attrs, Keys keys, bool heads_first) {
  Checker check;
  Operands operands(args, "operand", check);
  Results results(rets, "result", check);
  const auto *q = operands.Next("q"), *k = operands.Next("k"), *v = operands.Next("v");
  if (!check.ok()) return check.error();
  FwdArgs call{};
  Problem& p = call.problem;
  p = ReadProblem(attrs, keys, heads_first, *q, *k, *v, check);
  if (check.ok() && keys == Keys::kPaged) ReadPageTable(attrs, operands, check, p);
  if (!check.ok()) return check.error();
  const ffi::DataType dtype = q->element_type();
  call.q = q->untyped_data();
  call.k = k->untyped_data();
  call.v = v->untyped_data();
  ReadOptional(attrs, operands, check, p);
  call.out = results.Take("out", dtype, OutDims(p));
  call.lse = static_cast<float*>(results.Take("lse", ffi::F32, LseDims(p)));
  operands.ExpectEnd();
  results.ExpectEnd();
  if (!check.ok()) return check.error();

  PoolExecutor executor(pool);
  return Forward(call, executor) ? ffi::Error::Success() : OutOfMemory();
}

ffi::Error Fwd(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
               const Attributes& attrs) {
  return RunForward(pool, args, rets, attrs, Keys::kDense, false);
}

ffi::Error Paged(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                 const Attributes& attrs, bool heads_first) {
  return RunForward(pool, args, rets, attrs, Keys::kPaged, heads_first);
}

ffi::Error Bwd(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
               const Attributes& attrs, bool has_dlse) {
  Checker check;
  Operands operands(args, "operand", check);
  Results results(rets, "result", check);
  const auto *q = operands.Next("q"), *k = operands.Next("k"), *v = operands.Next("v");
  if (!check.ok()) return check.error();
  BwdArgs call{};
  Problem& p = call.problem;
  p = ReadProblem(attrs, Keys::kDense, false, *q, *k, *v, check);
  if (attrs.Has(kSinks)) check.Fail("attribute aux must be without sinks in backward");
  if (!check.ok()) return check.error();
  const ffi::DataType dtype = q->element_type();
  call.q = q->untyped_data();
  call.k = k->untyped_data();
  call.v = v->untyped_data();
  call.out = operands.Take("out", dtype, OutDims(p));
  call.lse = static_cast<const float*>(operands.Take("lse", ffi::F32, LseDims(p)));
  call.dout = operands.Take("dout", dtype, OutDims(p));
  if (has_dlse) {
    call.dlse = static_cast<const float*>(operands.Take("dlse", ffi::F32, LseDims(p)));
  }
  ReadOptional(attrs, operands, check, p);
  call.dq = results.Take("dq", dtype, QDims(p));
  call.dk = results.Take("dk", dtype, KDims(p));
  call.dv = results.Take("dv", dtype, VDims(p));
  if (attrs.Has(kAlibiSlopes)) {
    call.dslopes_rows = static_cast<float*>(results.Take("dslopes_rows", ffi::F32, LseDims(p)));
  }
  if (!check.ok()) return check.error();  // before sizes go into arithmetic
  const int64_t scratch_floats =
      BwdScratchFloats(1, p.q_len, p.num_heads, p.num_kv_heads, p.head_dim, p.num_sequences);
  call.scratch = static_cast<float*>(results.Take("scratch", ffi::F32, {p.batch, scratch_floats}));
  operands.ExpectEnd();
  results.ExpectEnd();
  if (!check.ok()) return check.error();

  PoolExecutor executor(pool);
  return Backward(call, executor) ? ffi::Error::Success() : OutOfMemory();
}

// The handlers proper, by whose signature FFI decodes a call: Attributes' members in their order,
// and what one handler has beyond them.
template <auto run, typename... More>
ffi::Error Handle(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                  float scale, float soft_cap, bool is_causal, int64_t query_offset,
                  int64_t window_left, int64_t window_right, int64_t sink_tokens, int64_t aux,
                  More... more) {
  const Attributes attrs = {scale,       soft_cap,     is_causal,   query_offset,
                            window_left, window_right, sink_tokens, aux};
  return run(pool, args, rets, attrs, more...);
}

constexpr auto kFwd = Handle<Fwd>;
constexpr auto kBwd = Handle<Bwd, bool>;
constexpr auto kPaged = Handle<Paged, bool>;

auto Bind() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<float>("scale")
      .Attr<float>("soft_cap")
      .Attr<bool>("is_causal")
      .Attr<int64_t>("query_offset")
      .Attr<int64_t>("window_left")
      .Attr<int64_t>("window_right")
      .Attr<int64_t>("sink_tokens")
      .Attr<int64_t>("aux");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FwdExecute, kFwd, Bind());
XLA_FFI_DEFINE_HANDLER_SYMBOL(BwdExecute, kBwd, Bind().Attr<bool>("has_dlse"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(PagedExecute, kPaged, Bind().Attr<bool>("heads_first"));

}  // namespace jfa::cpu
