// XLA FFI handlers of the CPU kernels: buffers -> Problem and pointers, checked, nothing else.
//
// Python has checked already; here the checks keep a hand-written or stale custom call from reading
// out of bounds. Operands are plain BTNH arrays.
#include "cc/cpu/handlers.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

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

// Which optional operands follow, in AUX_NAMES' order of _spec.py.
struct Attributes {
  float scale;
  bool is_causal;
  int64_t query_offset;
  bool has_query_offset;
  bool has_q_lengths;
  bool has_kv_lengths;
};

// Operands one after the other; asking for one too many is an error, and so is one left over.
class Operands {
 public:
  Operands(ffi::RemainingArgs args, Checker& check) : args_(args), check_(check) {}

  const ffi::AnyBuffer* Next(std::string_view name) {
    auto buffer = next_ < args_.size() ? args_.get<ffi::AnyBuffer>(next_)
                                       : ffi::Unexpected(ffi::Error::InvalidArgument("missing"));
    ++next_;
    if (buffer.has_error()) {
      check_.Fail("operand " + std::string(name) + " is missing");
      return nullptr;
    }
    held_.push_back(std::make_unique<ffi::AnyBuffer>(*buffer));
    return held_.back().get();
  }

  void ExpectEnd() {
    if (next_ < args_.size()) {
      check_.Fail("expected " + std::to_string(next_) + " operands, got " +
                  std::to_string(args_.size()));
    }
  }

 private:
  ffi::RemainingArgs args_;
  Checker& check_;
  size_t next_ = 0;
  std::vector<std::unique_ptr<ffi::AnyBuffer>> held_;
};

std::vector<int64_t> QDims(const Problem& p) { return {p.batch, p.q_len, p.num_heads, p.head_dim}; }
std::vector<int64_t> KDims(const Problem& p) {
  return {p.batch, p.kv_len, p.num_kv_heads, p.head_dim};
}
std::vector<int64_t> VDims(const Problem& p) {
  return {p.batch, p.kv_len, p.num_kv_heads, p.head_dim_v};
}
std::vector<int64_t> OutDims(const Problem& p) {
  return {p.batch, p.q_len, p.num_heads, p.head_dim_v};
}
std::vector<int64_t> LseDims(const Problem& p) { return {p.batch, p.num_heads, p.q_len}; }

// Sizes and dtype from q, k, v, all three checked against each other.
Problem ReadProblem(const Attributes& attrs, const ffi::AnyBuffer& q, const ffi::AnyBuffer& k,
                    const ffi::AnyBuffer& v, Checker& check) {
  Problem p{};
  if (!check.Rank(q, "q", 4) || !check.Rank(k, "k", 4) || !check.Rank(v, "v", 4)) return p;
  const auto qd = q.dimensions(), kd = k.dimensions(), vd = v.dimensions();
  p.batch = qd[0];
  p.q_len = qd[1];
  p.num_heads = qd[2];
  p.head_dim = qd[3];
  p.kv_len = kd[1];
  p.num_kv_heads = kd[2];
  p.head_dim_v = vd[3];
  switch (q.element_type()) {
    case ffi::F32:
      p.dtype = DType::kF32;
      break;
    case ffi::BF16:
      p.dtype = DType::kBF16;
      break;
    case ffi::F16:
      p.dtype = DType::kF16;
      break;
    default:
      check.Fail("q must be float32, bfloat16 or float16, got " + DTypeName(q.element_type()));
  }
  if (p.num_heads < 1 || p.num_kv_heads < 1 || p.head_dim < 1 || p.head_dim_v < 1) {
    check.Fail("heads and head dims must be at least 1, got q " + Join(QDims(p)) + ", v " +
               Join(VDims(p)));
  } else if (p.num_heads % p.num_kv_heads != 0) {
    check.Fail("the heads of q must be a multiple of the heads of k, got " +
               std::to_string(p.num_heads) + " and " + std::to_string(p.num_kv_heads));
  }
  check.Expect(k, "k", q.element_type(), KDims(p));
  check.Expect(v, "v", q.element_type(), VDims(p));
  if (!(attrs.scale > 0)) check.Fail("scale must be positive, got " + std::to_string(attrs.scale));
  p.scale = attrs.scale;
  p.is_causal = attrs.is_causal;
  p.query_offset = attrs.query_offset;
  return p;
}

void ReadOptional(const Attributes& attrs, Operands& operands, Checker& check, Problem& p) {
  const auto read = [&](bool given, const char* name, const int32_t*& pointer) {
    if (!given) return;
    const ffi::AnyBuffer* x = operands.Next(name);
    if (x == nullptr) return;
    check.Expect(*x, name, ffi::S32, {p.batch});
    pointer = static_cast<const int32_t*>(x->untyped_data());
  };
  read(attrs.has_query_offset, "query_offset", p.query_offsets);
  read(attrs.has_q_lengths, "q_lengths", p.q_lengths);
  read(attrs.has_kv_lengths, "kv_lengths", p.kv_lengths);
  operands.ExpectEnd();
}

ffi::Error OutOfMemory() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    "jax_flashattn: no memory for the kernels' tiles");
}

ffi::Error Fwd(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> out,
               ffi::Result<ffi::AnyBuffer> lse, float scale, bool is_causal, int64_t query_offset,
               bool has_query_offset, bool has_q_lengths, bool has_kv_lengths) {
  const Attributes attrs{scale,         is_causal,     query_offset, has_query_offset,
                         has_q_lengths, has_kv_lengths};
  Checker check;
  Operands operands(args, check);
  const auto *q = operands.Next("q"), *k = operands.Next("k"), *v = operands.Next("v");
  if (!check.ok()) return check.error();
  Problem p = ReadProblem(attrs, *q, *k, *v, check);
  ReadOptional(attrs, operands, check, p);
  check.Expect(*out, "out", q->element_type(), OutDims(p));
  check.Expect(*lse, "lse", ffi::F32, LseDims(p));
  if (!check.ok()) return check.error();

  PoolExecutor executor(pool);
  const FwdArgs call{p,
                     q->untyped_data(),
                     k->untyped_data(),
                     v->untyped_data(),
                     out->untyped_data(),
                     lse->typed_data<float>()};
  return Forward(call, executor) ? ffi::Error::Success() : OutOfMemory();
}

ffi::Error Bwd(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> dq,
               ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv,
               ffi::Result<ffi::AnyBuffer> scratch, float scale, bool is_causal,
               int64_t query_offset, bool has_query_offset, bool has_q_lengths, bool has_kv_lengths,
               bool has_dlse) {
  const Attributes attrs{scale,         is_causal,     query_offset, has_query_offset,
                         has_q_lengths, has_kv_lengths};
  Checker check;
  Operands operands(args, check);
  const auto *q = operands.Next("q"), *k = operands.Next("k"), *v = operands.Next("v"),
             *out = operands.Next("out"), *lse = operands.Next("lse"),
             *dout = operands.Next("dout"), *dlse = has_dlse ? operands.Next("dlse") : nullptr;
  if (!check.ok()) return check.error();
  Problem p = ReadProblem(attrs, *q, *k, *v, check);
  ReadOptional(attrs, operands, check, p);
  const ffi::DataType dtype = q->element_type();
  check.Expect(*out, "out", dtype, OutDims(p));
  check.Expect(*lse, "lse", ffi::F32, LseDims(p));
  check.Expect(*dout, "dout", dtype, OutDims(p));
  if (dlse != nullptr) check.Expect(*dlse, "dlse", ffi::F32, LseDims(p));
  check.Expect(*dq, "dq", dtype, QDims(p));
  check.Expect(*dk, "dk", dtype, KDims(p));
  check.Expect(*dv, "dv", dtype, VDims(p));
  if (!check.ok()) return check.error();
  check.Expect(*scratch, "scratch", ffi::F32,
               {p.batch, BwdScratchFloats(1, p.q_len, p.num_heads, p.num_kv_heads, p.head_dim)});
  if (!check.ok()) return check.error();

  PoolExecutor executor(pool);
  const BwdArgs call{p,
                     q->untyped_data(),
                     k->untyped_data(),
                     v->untyped_data(),
                     out->untyped_data(),
                     lse->typed_data<float>(),
                     dout->untyped_data(),
                     dlse != nullptr ? dlse->typed_data<float>() : nullptr,
                     dq->untyped_data(),
                     dk->untyped_data(),
                     dv->untyped_data(),
                     scratch->typed_data<float>()};
  return Backward(call, executor) ? ffi::Error::Success() : OutOfMemory();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FwdExecute, Fwd,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()  // out
                                  .Ret<ffi::AnyBuffer>()  // lse
                                  .Attr<float>("scale")
                                  .Attr<bool>("is_causal")
                                  .Attr<int64_t>("query_offset")
                                  .Attr<bool>("has_query_offset")
                                  .Attr<bool>("has_q_lengths")
                                  .Attr<bool>("has_kv_lengths"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(BwdExecute, Bwd,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()  // dq
                                  .Ret<ffi::AnyBuffer>()  // dk
                                  .Ret<ffi::AnyBuffer>()  // dv
                                  .Ret<ffi::AnyBuffer>()  // scratch
                                  .Attr<float>("scale")
                                  .Attr<bool>("is_causal")
                                  .Attr<int64_t>("query_offset")
                                  .Attr<bool>("has_query_offset")
                                  .Attr<bool>("has_q_lengths")
                                  .Attr<bool>("has_kv_lengths")
                                  .Attr<bool>("has_dlse"));

}  // namespace jfa::cpu
