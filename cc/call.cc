// Checks and address arithmetic only; no FFI, no CUDA.
#include "cc/call.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <initializer_list>
#include <string>
#include <utility>

namespace jfa {
namespace {

// Sums of two positions must fit an int in the kernels.
constexpr int64_t kMaxLength = int64_t{1} << 30;
// Kernels read and write 16 bytes at a time, of integers one. XLA aligns buffers to more.
constexpr uintptr_t kAlignment = 16;
constexpr uintptr_t kIntegerAlignment = 4;

const char* Name(ElementType dtype) {
  switch (dtype) {
    case ElementType::kF16:
      return "float16";
    case ElementType::kBF16:
      return "bfloat16";
    case ElementType::kF32:
      return "float32";
    case ElementType::kS32:
      return "int32";
    case ElementType::kOther:
      return "another dtype ";
  }
  return "";
}

std::string ShapeText(ElementType dtype, const int64_t* dims, size_t rank) {
  std::string text = std::string(Name(dtype)) + "[";
  for (size_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

std::string Text(const Tensor& x) { return ShapeText(x.dtype, x.dims, x.rank); }

// Operands, then results, one after the other. The first error stays, later ones are dropped.
class Reader {
 public:
  Reader(const TensorList& args, const TensorList& rets, Memory memory)
      : args_(args), rets_(rets), memory_(memory) {}

  // An operand of any shape with that many axes.
  Tensor NextOfRank(const char* name, size_t rank) {
    Tensor x = NextArg(name);
    if (status_.ok() && x.rank != rank) {
      Fail(std::string("operand ") + name + " must have " + std::to_string(rank) + " axes, got " +
           Text(x));
    }
    return x;
  }

  void* NextArg(const char* name, ElementType dtype, std::initializer_list<int64_t> dims) {
    return Expect("operand ", name, NextArg(name), dtype, dims);
  }

  void* NextRet(const char* name, ElementType dtype, std::initializer_list<int64_t> dims) {
    const Tensor x = Next("result ", name, rets_, &next_ret_);
    return Expect("result ", name, x, dtype, dims);
  }

  void ExpectEnd() {
    if (args_.size != next_arg_) {
      Fail("expected " + std::to_string(next_arg_) + " operands, got " +
           std::to_string(args_.size));
    }
    if (rets_.size != next_ret_) {
      Fail("expected " + std::to_string(next_ret_) + " results, got " + std::to_string(rets_.size));
    }
  }

  // Address of `x`, checked where there is memory.
  void* Data(const char* name, const Tensor& x) {
    if (!status_.ok() || memory_ == Memory::kNone) return nullptr;
    const bool empty = std::any_of(x.dims, x.dims + x.rank, [](int64_t d) { return d == 0; });
    if (empty) return nullptr;
    if (x.data == nullptr) Fail(std::string(name) + " has no memory");
    const auto address = reinterpret_cast<uintptr_t>(x.data);
    const uintptr_t alignment = x.dtype == ElementType::kS32 ? kIntegerAlignment : kAlignment;
    if (address % alignment != 0) {
      Fail(std::string(name) + " must be aligned to " + std::to_string(alignment) +
           " bytes, got address " + std::to_string(address));
    }
    return x.data;
  }

  void Fail(std::string message) {
    if (status_.ok()) status_ = InvalidArgument("jax_flashattn: " + std::move(message));
  }

  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }

 private:
  Tensor NextArg(const char* name) { return Next("operand ", name, args_, &next_arg_); }

  Tensor Next(const char* kind, const char* name, const TensorList& list, size_t* next) {
    const size_t index = (*next)++;
    if (status_.ok() && index < list.size) return list.items[index];
    Fail(kind + std::to_string(index) + " (" + name + ") is missing");
    return {};
  }

  void* Expect(const char* kind, const char* name, const Tensor& x, ElementType dtype,
               std::initializer_list<int64_t> dims) {
    if (!status_.ok()) return nullptr;
    if (x.dtype != dtype || x.rank != dims.size() ||
        !std::equal(dims.begin(), dims.end(), x.dims)) {
      Fail(std::string(kind) + name + " must be " + ShapeText(dtype, dims.begin(), dims.size()) +
           ", got " + Text(x));
      return nullptr;
    }
    return Data(name, x);
  }

  const TensorList& args_;
  const TensorList& rets_;
  Memory memory_;
  Status status_;
  size_t next_arg_ = 0;
  size_t next_ret_ = 0;
};

// q, k and v: where the sizes come from, and the first checks on them.
void ReadInputs(Op op, const Attributes& attrs, Reader& reader, Call* call) {
  const Tensor q = reader.NextOfRank("q", 5);
  const Tensor k = reader.NextOfRank("k", 4);
  const Tensor v = reader.NextOfRank("v", 4);
  if (!reader.ok()) return;
  Problem& sizes = call->sizes;
  sizes = {q.dims[0], q.dims[1], q.dims[2], q.dims[3], k.dims[2]};
  call->head_dim = q.dims[4];
  call->head_dim_v = v.dims[3];
  call->dtype = q.dtype;
  if (q.dtype != ElementType::kF16 && q.dtype != ElementType::kBF16) {
    reader.Fail("operand q must be float16 or bfloat16, got " + Text(q));
  }
  for (const auto& [name, x] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}}) {
    if (std::any_of(x->dims, x->dims + x->rank,
                    [](int64_t d) { return d < 0 || d > kMaxLength; })) {
      reader.Fail(std::string("operand ") + name + " must have axes of 0 to 2^30, got " + Text(*x));
    }
  }
  if (!reader.ok()) return;
  if (sizes.num_kv_heads < 1 || sizes.group < 1 || call->head_dim < 1 || call->head_dim_v < 1 ||
      sizes.num_kv_heads * sizes.group > kMaxLength || sizes.batch * sizes.num_kv_heads > INT_MAX) {
    reader.Fail("heads and head dims must be at least 1 and heads not huge, got q " + Text(q) +
                ", v " + Text(v));
  }
  const auto expect = [&](const char* name, const Tensor& x, int64_t dim) {
    const std::array<int64_t, 4> dims = {sizes.batch, sizes.num_kv_heads, sizes.kv_len, dim};
    if (x.dtype != q.dtype || !std::equal(dims.begin(), dims.end(), x.dims)) {
      reader.Fail(std::string("operand ") + name + " must be " +
                  ShapeText(q.dtype, dims.data(), dims.size()) + ", got " + Text(x));
    }
  };
  expect("k", k, call->head_dim);
  expect("v", v, call->head_dim_v);
  if (!(attrs.scale > 0) || !std::isfinite(attrs.scale)) {
    reader.Fail("attribute scale must be positive and finite, got " + std::to_string(attrs.scale));
  }
  call->q = reader.Data("q", q);
  call->k = reader.Data("k", k);
  call->v = reader.Data("v", v);
  call->variant = {op,
                   q.dtype == ElementType::kBF16 ? DType::kBF16 : DType::kF16,
                   static_cast<int>(call->head_dim),
                   static_cast<int>(call->head_dim_v),
                   attrs.is_causal ? Mask::kCausal : Mask::kFull,
                   op == Op::kBwd && attrs.deterministic};
}

void ReadOptional(const Attributes& attrs, Reader& reader, Call* call) {
  const int64_t B = call->sizes.batch, K = call->sizes.num_kv_heads;
  const auto read = [&](bool given, const char* name) {
    return given ? reader.NextArg(name, ElementType::kS32, {B, K}) : nullptr;
  };
  call->query_offset = read(attrs.has_query_offset, "query_offset");
  call->q_lengths = read(attrs.has_q_lengths, "q_lengths");
  call->kv_lengths = read(attrs.has_kv_lengths, "kv_lengths");
}

// [batch, token, head, dim] memory.
TensorArg ToTensorArg(void* data, int64_t length, int64_t heads, int64_t dim) {
  return {data, length * heads * dim, heads * dim, dim};
}

ProblemParams ToProblemParams(const Attributes& attrs, const Call& call) {
  ProblemParams p{};
  p.batch = static_cast<int>(call.sizes.batch);
  p.num_kv_heads = static_cast<int>(call.sizes.num_kv_heads);
  p.group = static_cast<int>(call.sizes.group);
  p.num_heads = p.num_kv_heads * p.group;
  p.q_len = static_cast<int>(call.sizes.q_len);
  p.kv_len = static_cast<int>(call.sizes.kv_len);
  p.head_dim = static_cast<int>(call.head_dim);
  p.head_dim_v = static_cast<int>(call.head_dim_v);
  p.scale = attrs.scale;
  p.scale_log2 = static_cast<float>(attrs.scale * 1.4426950408889634);
  // Positions beyond any length mean the same, and sums with them must not overflow.
  p.query_offset = static_cast<int>(std::clamp(attrs.query_offset, -kMaxLength, kMaxLength));
  p.window_left = INT_MAX;
  p.window_right = attrs.is_causal ? 0 : INT_MAX;
  p.query_offsets = static_cast<const int*>(call.query_offset);
  p.q_lengths = static_cast<const int*>(call.q_lengths);
  p.kv_lengths = static_cast<const int*>(call.kv_lengths);
  return p;
}

}  // namespace

Status ReadCall(Op op, const Attributes& attrs, const TensorList& args, const TensorList& rets,
                Memory memory, Call* call) {
  Reader reader(args, rets, memory);
  ReadInputs(op, attrs, reader, call);
  if (!reader.ok()) return reader.status();
  const ElementType dtype = call->dtype;
  const int64_t B = call->sizes.batch, K = call->sizes.num_kv_heads, G = call->sizes.group,
                T = call->sizes.q_len, S = call->sizes.kv_len, H = call->head_dim,
                Hv = call->head_dim_v;
  if (op == Op::kFwd) {
    ReadOptional(attrs, reader, call);
    call->out = reader.NextRet("out", dtype, {B, K, G, T, Hv});
    call->lse = reader.NextRet("lse", ElementType::kF32, {B, K, G, T});
  } else {
    call->out = reader.NextArg("out", dtype, {B, K, G, T, Hv});
    call->lse = reader.NextArg("lse", ElementType::kF32, {B, K, G, T});
    call->dout = reader.NextArg("dout", dtype, {B, K, G, T, Hv});
    if (attrs.has_dlse) call->dlse = reader.NextArg("dlse", ElementType::kF32, {B, K, G, T});
    ReadOptional(attrs, reader, call);
    call->dq = reader.NextRet("dq", dtype, {B, K, G, T, H});
    call->dk = reader.NextRet("dk", dtype, {B, K, S, H});
    call->dv = reader.NextRet("dv", dtype, {B, K, S, Hv});
    call->scratch_floats = std::max<int64_t>(1, ScratchFloats(call->variant, G, T, S));
    call->scratch = reader.NextRet("scratch", ElementType::kF32, {B, K, call->scratch_floats});
  }
  reader.ExpectEnd();
  return reader.status();
}

FwdParams ToFwdParams(const Attributes& attrs, const Call& call) {
  FwdParams p{};
  p.problem = ToProblemParams(attrs, call);
  p.q = ToTensorArg(call.q, p.problem.q_len, p.problem.num_heads, call.head_dim);
  p.k = ToTensorArg(call.k, p.problem.kv_len, p.problem.num_kv_heads, call.head_dim);
  p.v = ToTensorArg(call.v, p.problem.kv_len, p.problem.num_kv_heads, call.head_dim_v);
  p.out = ToTensorArg(call.out, p.problem.q_len, p.problem.num_heads, call.head_dim_v);
  p.lse = static_cast<float*>(call.lse);
  return p;
}

BwdParams ToBwdParams(const Attributes& attrs, const Call& call) {
  BwdParams p{};
  p.problem = ToProblemParams(attrs, call);
  p.q = ToTensorArg(call.q, p.problem.q_len, p.problem.num_heads, call.head_dim);
  p.k = ToTensorArg(call.k, p.problem.kv_len, p.problem.num_kv_heads, call.head_dim);
  p.v = ToTensorArg(call.v, p.problem.kv_len, p.problem.num_kv_heads, call.head_dim_v);
  p.out = ToTensorArg(call.out, p.problem.q_len, p.problem.num_heads, call.head_dim_v);
  p.dout = ToTensorArg(call.dout, p.problem.q_len, p.problem.num_heads, call.head_dim_v);
  p.lse = static_cast<const float*>(call.lse);
  p.dlse = static_cast<const float*>(call.dlse);
  p.dq = ToTensorArg(call.dq, p.problem.q_len, p.problem.num_heads, call.head_dim);
  p.dk = ToTensorArg(call.dk, p.problem.kv_len, p.problem.num_kv_heads, call.head_dim);
  p.dv = ToTensorArg(call.dv, p.problem.kv_len, p.problem.num_kv_heads, call.head_dim_v);
  p.scratch = static_cast<float*>(call.scratch);
  p.scratch_stride = call.scratch_floats;
  return p;
}

}  // namespace jfa
