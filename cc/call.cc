// Checks and address arithmetic only; no FFI, no CUDA.
#include "cc/call.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

namespace jfa {
namespace {

// Sums of two positions must fit an int in the kernels.
constexpr int64_t kMaxLength = int64_t{1} << 30;
// Kernels read and write 16 bytes of q, k, v, their gradients and scratch at a time, single words
// of the optional arrays. XLA aligns buffers to more.
constexpr uintptr_t kAlignment = 16;
constexpr uintptr_t kWordAlignment = 4;
constexpr int64_t kLeastPage = 8, kLargestPage = 256;
constexpr int64_t kSegmentBlock = 32;  // SegmentSide::kGranule

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
    case ElementType::kE4m3:
      return "float8_e4m3fn";
    case ElementType::kE5m2:
      return "float8_e5m2";
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
  Reader(const TensorList& args, const TensorList& rets) : args_(args), rets_(rets) {}

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

  // The last operand but `after`, and the last result, wherever reading stands.
  const Tensor& LastArg(size_t after) const { return Last(args_, after); }
  const Tensor& LastRet() const { return Last(rets_, 0); }

  bool HasMoreRets() const { return rets_.size > next_ret_; }

  void ExpectEnd() {
    if (args_.size != next_arg_) {
      Fail("expected " + std::to_string(next_arg_) + " operands, got " +
           std::to_string(args_.size));
    }
    if (rets_.size != next_ret_) {
      Fail("expected " + std::to_string(next_ret_) + " results, got " + std::to_string(rets_.size));
    }
  }

  // Address of `x`, checked where it isn't empty.
  void* Data(const char* name, const Tensor& x) {
    if (!status_.ok()) return nullptr;
    const bool empty = std::any_of(x.dims, x.dims + x.rank, [](int64_t d) { return d == 0; });
    if (empty) return nullptr;
    if (x.data == nullptr) Fail(std::string(name) + " has no memory");
    const auto address = reinterpret_cast<uintptr_t>(x.data);
    const uintptr_t alignment = x.dtype == ElementType::kS32 ? kWordAlignment : kAlignment;
    if ((address & (alignment - 1)) != 0) {
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
  static const Tensor& Last(const TensorList& list, size_t after) {
    static const Tensor kNone{};
    return list.size <= after || list.size > list.items.size() ? kNone
                                                               : list.items[list.size - 1 - after];
  }

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
  Status status_;
  size_t next_arg_ = 0;
  size_t next_ret_ = 0;
};

std::string CheckAttributes(Target target, const Attributes& a) {
  const auto got = [](const char* name, const char* expected, auto value) {
    return std::string("attribute ") + name + " must be " + expected + ", got " +
           std::to_string(value);
  };
  if (!(a.scale > 0) || !std::isfinite(a.scale)) {
    return got("scale", "positive and finite", a.scale);
  }
  if (!(a.soft_cap >= 0) || !std::isfinite(a.soft_cap)) {
    return got("soft_cap", "0 or positive and finite", a.soft_cap);
  }
  if (a.window_left < -1) return got("window_left", "at least -1", a.window_left);
  if (a.window_right < -1) return got("window_right", "at least -1", a.window_right);
  if (a.sink_tokens < 0) return got("sink_tokens", "at least 0", a.sink_tokens);
  if ((a.aux & ~int64_t{kAllAux}) != 0) return got("aux", "a set of 12 bits", a.aux);
  if (a.fp8 < 0 || a.fp8 > kAllFp8 || (a.fp8 != 0 && (a.fp8 & kFp8) == 0)) {
    return got("fp8", "0 or an odd number below 64", a.fp8);
  }
  if (a.fp8 != 0 && target == Target::kBwd) return got("fp8", "0 in backward", a.fp8);
  if ((a.fp8 & kWideQ) != 0 ? (a.fp8 & (kE5m2Q | kTwoLevel)) != 0
                            : a.fp8 != 0 && target == Target::kServe) {
    return got("fp8", "of queries that fit the call", a.fp8);
  }
  if (a.schedule < 0 || a.schedule > 2) return got("schedule", "0, 1 or 2", a.schedule);
  if (a.sm_margin < 0) return got("sm_margin", "at least 0", a.sm_margin);
  if (a.sm_margin > 0 && a.schedule == 1) return got("sm_margin", "0 with a grid", a.sm_margin);
  if (a.kv_len < 0) return got("kv_len", "at least 0", a.kv_len);
  if (a.fp8 == 0 && (a.aux & (kQkScale | kVScale)) != 0) {
    return got("aux", "without scales unless inputs are of 8 bits", a.aux);
  }
  if (a.Has(kQSegmentIds) != a.Has(kKvSegmentIds)) {
    return got("aux", "with segment ids of both sides or of none", a.aux);
  }
  if (a.Has(kPageTable)) {
    if (target != Target::kServe || !a.Has(kKvLengths) ||
        (a.aux & (kQSegmentIds | kCuSeqlensKv)) != 0) {
      return got("aux", "with kv_lengths, without segment ids and cu_seqlens_kv if paged", a.aux);
    }
  } else if (a.Has(kCuSeqlensQ) != a.Has(kCuSeqlensKv)) {
    return got("aux", "with cu_seqlens of both sides or of none", a.aux);
  }
  if (a.Has(kCuSeqlensQ) && (a.aux & (kQLengths | kQSegmentIds)) != 0) {
    return got("aux", "without lengths and segment ids if packed", a.aux);
  }
  if (a.Has(kCuSeqlensQ) && !a.Has(kPageTable) && a.Has(kKvLengths)) {
    return got("aux", "without lengths if packed", a.aux);
  }
  if (a.rows < 0 || a.rows > kMaxLength) return got("rows", "0 to 2^30", a.rows);
  if (a.rows > 0 && (a.aux & (kQSegmentIds | kCuSeqlensQ)) != 0) {
    return got("aux", "without segment ids and cu_seqlens if decoding", a.aux);
  }
  if (target == Target::kBwd && a.Has(kSinks))
    return got("aux", "without sinks in backward", a.aux);
  if (a.has_dslopes && !a.Has(kAlibiSlopes)) {
    return got("aux", "with alibi_slopes if their gradient is asked for", a.aux);
  }
  for (const auto& [name, dim] :
       {std::pair{"head_dim", a.head_dim}, {"head_dim_v", a.head_dim_v}}) {
    if (dim < 1 || dim > kMaxLength) return got(name, "at least 1", dim);
  }
  if (a.arch != 0 && (a.arch < 50 || a.arch > 999)) {
    return got("arch", "0 (the device at hand) or compute capability major * 10 + minor", a.arch);
  }
  return "";
}

// Of an input that isn't one of 8 bits, or of one with this bit of attribute `fp8`.
ElementType InputType(const Attributes& attrs, Fp8Bit e5m2) {
  const bool wide = e5m2 == kE5m2Q && (attrs.fp8 & kWideQ) != 0;
  if (attrs.fp8 != 0 && !wide)
    return (attrs.fp8 & e5m2) != 0 ? ElementType::kE5m2 : ElementType::kE4m3;
  return attrs.is_bf16 ? ElementType::kBF16 : ElementType::kF16;
}

// How many operands come after all others.
size_t ScalesOf(const Attributes& attrs) {
  return size_t{attrs.Has(kQkScale)} + size_t{attrs.Has(kVScale)};
}

// q, k and v: where the sizes come from, and the first checks on them.
void ReadInputs(const Attributes& attrs, Reader& reader, Call* call) {
  const Tensor q = reader.NextOfRank("q", 5);
  const Tensor k = reader.NextOfRank("k", 4);
  const Tensor v = reader.NextOfRank("v", 4);
  if (!reader.ok()) return;
  Problem& sizes = call->sizes;
  sizes = {q.dims[0], q.dims[1], q.dims[2], q.dims[3], k.dims[2], 0};
  const bool paged = attrs.Has(kPageTable);
  if (paged) {
    std::swap(sizes.batch, sizes.num_kv_heads);
    call->num_pages = k.dims[1];
    call->page_size = k.dims[2];
  }
  const ElementType dtype = InputType(attrs, kE5m2Q);
  if (q.dtype != dtype) {
    reader.Fail(std::string("operand q must be ") + Name(dtype) + ", got " + Text(q));
  }
  if (q.dims[4] != attrs.head_dim) {
    reader.Fail("operand q must have head dim " + std::to_string(attrs.head_dim) + ", got " +
                Text(q));
  }
  for (const auto& [name, x] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}}) {
    if (std::any_of(x->dims, x->dims + x->rank,
                    [](int64_t d) { return d < 0 || d > kMaxLength; })) {
      reader.Fail(std::string("operand ") + name + " must have axes of 0 to 2^30, got " + Text(*x));
    }
  }
  if (!reader.ok()) return;
  if (sizes.num_kv_heads < 1 || sizes.group < 1 || sizes.num_kv_heads * sizes.group > kMaxLength ||
      sizes.batch * sizes.num_kv_heads > INT_MAX) {
    reader.Fail("heads must be at least 1 and not huge, got q " + Text(q) + ", v " + Text(v));
  }
  if (paged) {
    const int64_t size = call->page_size;
    if (size < kLeastPage || size > kLargestPage || (size & (size - 1)) != 0 ||
        call->num_pages < 1) {
      reader.Fail("pages must be at least one, of 8, 16, 32, 64, 128 or 256 tokens, got k " +
                  Text(k));
    }
    const Tensor& table = reader.LastArg(ScalesOf(attrs));
    if (table.rank < 3 || table.dims[table.rank - 1] < 0 ||
        table.dims[table.rank - 1] * size > kMaxLength) {
      reader.Fail(
          "operand page_table must have at least 3 axes and span at most 2^30 tokens, got " +
          Text(table));
    }
    if (!reader.ok()) return;
    call->max_pages = table.dims[table.rank - 1];
    sizes.kv_len = call->max_pages * size;
  }
  const auto expect = [&](const char* name, const Tensor& x, ElementType type, int64_t dim) {
    const std::array<int64_t, 4> dims =
        paged ? std::array<int64_t, 4>{sizes.num_kv_heads, call->num_pages, call->page_size, dim}
              : std::array<int64_t, 4>{sizes.batch, sizes.num_kv_heads, sizes.kv_len, dim};
    if (x.dtype != type || !std::equal(dims.begin(), dims.end(), x.dims)) {
      reader.Fail(std::string("operand ") + name + " must be " +
                  ShapeText(type, dims.data(), dims.size()) + ", got " + Text(x));
    }
  };
  expect("k", k, InputType(attrs, kE5m2K), attrs.head_dim);
  expect("v", v, InputType(attrs, kE5m2V), attrs.head_dim_v);
  call->q = reader.Data("q", q);
  call->k = reader.Data("k", k);
  call->v = reader.Data("v", v);
}

void ReadOptional(const Attributes& attrs, Reader& reader, Call* call) {
  const Problem& sizes = call->sizes;
  const bool packed = attrs.Has(kCuSeqlensQ), paged = attrs.Has(kPageTable);
  // The table of a paged call or the boundaries of another come last but for scales.
  const Tensor& last = reader.LastArg(ScalesOf(attrs));
  // The two leading axes.
  const int64_t B = paged ? sizes.num_kv_heads : sizes.batch;
  const int64_t K = paged ? sizes.batch : sizes.num_kv_heads;
  if (packed && paged) {
    if (last.rank != 4 || last.dims[2] < 1 || last.dims[2] > kMaxLength) {
      reader.Fail("operand page_table must be int32[K or 1, B, sequences, pages], got " +
                  Text(last));
      return;
    }
    call->sizes.num_sequences = last.dims[2];
  } else if (packed) {
    // How many sequences there are is told by the boundaries.
    const Tensor& ends = last;
    if (ends.rank != 3 || ends.dims[2] < 2 || ends.dims[2] > kMaxLength) {
      reader.Fail("operand cu_seqlens_kv must be int32[B, K, sequences + 1], got " + Text(ends));
      return;
    }
    call->sizes.num_sequences = ends.dims[2] - 1;
  }
  const int64_t n = sizes.num_sequences;
  const auto read = [&](AuxBit bit, const char* name, std::initializer_list<int64_t> dims,
                        ElementType dtype = ElementType::kS32) {
    return attrs.Has(bit) ? reader.NextArg(name, dtype, dims) : nullptr;
  };
  const auto blocks = [](int64_t length) { return (length + kSegmentBlock - 1) / kSegmentBlock; };
  call->query_offset = packed ? read(kQueryOffset, "query_offset", {B, K, n})
                              : read(kQueryOffset, "query_offset", {B, K});
  call->q_lengths = read(kQLengths, "q_lengths", {B, K});
  call->kv_lengths =
      packed ? read(kKvLengths, "kv_lengths", {B, K, n}) : read(kKvLengths, "kv_lengths", {B, K});
  call->q_segment_ids = read(kQSegmentIds, "q_segment_ids", {B, K, sizes.q_len});
  call->q_segment_ranges = read(kQSegmentIds, "q_segment_ranges", {B, K, blocks(sizes.q_len), 2});
  call->kv_segment_ids = read(kKvSegmentIds, "kv_segment_ids", {B, K, sizes.kv_len});
  call->kv_segment_ranges =
      read(kKvSegmentIds, "kv_segment_ranges", {B, K, blocks(sizes.kv_len), 2});
  call->alibi_slopes = read(kAlibiSlopes, "alibi_slopes", {B, K, sizes.group}, ElementType::kF32);
  call->sinks = read(kSinks, "sinks", {B, K, sizes.group}, ElementType::kF32);
  call->cu_seqlens_q = read(kCuSeqlensQ, "cu_seqlens_q", {B, K, n + 1});
  call->cu_seqlens_kv = read(kCuSeqlensKv, "cu_seqlens_kv", {B, K, n + 1});
  if (paged) {
    // The same for all key heads: repeated only where XLA may split them.
    const int64_t heads = last.dims[0] == 1 ? 1 : sizes.num_kv_heads;
    call->page_table =
        packed ? read(kPageTable, "page_table", {heads, sizes.batch, n, call->max_pages})
               : read(kPageTable, "page_table", {heads, sizes.batch, call->max_pages});
  }
  call->qk_scale = read(kQkScale, "qk_scale", {B, K}, ElementType::kF32);
  call->v_scale = read(kVScale, "v_scale", {B, K}, ElementType::kF32);
}

// [batch, token, head, dim] memory.
TensorArg ToTensorArg(void* data, int64_t length, int64_t heads, int64_t dim) {
  return {data, length * heads * dim, heads * dim, dim};
}

// Pages: [page, token, head, dim] memory, or [page, head, token, dim].
TensorArg ToPagesTensorArg(void* data, const Attributes& attrs, const Call& call, int64_t dim) {
  const int64_t heads = call.sizes.num_kv_heads, page = call.page_size * heads * dim;
  if (attrs.heads_first) return {data, page, dim, call.page_size * dim};
  return {data, page, heads * dim, dim};
}

int ToInt(int64_t x) { return static_cast<int>(std::clamp<int64_t>(x, INT_MIN, INT_MAX)); }

ProblemParams ToProblemParams(const Attributes& attrs, const Call& call) {
  ProblemParams p{};
  p.batch = static_cast<int>(call.sizes.batch);
  p.num_kv_heads = static_cast<int>(call.sizes.num_kv_heads);
  p.group = static_cast<int>(call.sizes.group);
  p.num_heads = p.num_kv_heads * p.group;
  p.q_len = static_cast<int>(call.sizes.q_len);
  p.kv_len = static_cast<int>(call.sizes.kv_len);
  p.head_dim = call.variant.head_dim;
  p.head_dim_v = call.variant.head_dim_v;
  p.num_sequences = static_cast<int>(call.sizes.num_sequences);
  p.scale = attrs.scale;
  // Never 0, which would make NaN of a hidden logit: any tiny scale gives the same weights.
  p.scale_log2 = std::max(static_cast<float>(attrs.scale * 1.4426950408889634), 1e-37f);
  p.soft_cap = attrs.soft_cap;
  p.is_causal = attrs.is_causal;
  p.query_offset = ToInt(attrs.query_offset);
  p.window_left = attrs.window_left < 0 ? INT_MAX : ToInt(attrs.window_left);
  p.window_right = attrs.is_causal          ? 0
                   : attrs.window_right < 0 ? INT_MAX
                                            : ToInt(attrs.window_right);
  p.sink_tokens = ToInt(attrs.sink_tokens);
  p.scratch_rows = static_cast<int>(ScratchRows(call.sizes.q_len, call.sizes.num_sequences));
  p.query_offsets = static_cast<const int*>(call.query_offset);
  p.q_lengths = static_cast<const int*>(call.q_lengths);
  p.kv_lengths = static_cast<const int*>(call.kv_lengths);
  p.q_segment_ids = static_cast<const int*>(call.q_segment_ids);
  p.q_segment_ranges = static_cast<const int*>(call.q_segment_ranges);
  p.kv_segment_ids = static_cast<const int*>(call.kv_segment_ids);
  p.kv_segment_ranges = static_cast<const int*>(call.kv_segment_ranges);
  p.alibi_slopes = static_cast<const float*>(call.alibi_slopes);
  p.cu_seqlens_q = static_cast<const int*>(call.cu_seqlens_q);
  p.cu_seqlens_kv = static_cast<const int*>(call.cu_seqlens_kv);
  return p;
}

}  // namespace

Status ForcedFamily(Family* family) {
  static const char* const named = std::getenv("JFA_FORCE_FAMILY");
  const std::string_view name = named != nullptr ? named : "";
  *family = name == "sm80" ? Family::kSm80 : name == "sm90" ? Family::kSm90 : Family::kAny;
  if (*family != Family::kAny || name.empty()) return OkStatus();
  return InvalidArgument("jax_flashattn: JFA_FORCE_FAMILY: expected sm80 or sm90, got " +
                         std::string(name));
}

Status ForcedCluster(int* size) {
  static const char* const given = std::getenv("JFA_FORCE_CLUSTER");
  const std::string_view text = given != nullptr ? given : "";
  *size = -1;
  if (text.empty()) return OkStatus();
  for (int known : {0, 1, 2, 4, 8}) {
    if (text == std::to_string(known)) *size = known;
  }
  if (*size >= 0) return OkStatus();
  return InvalidArgument("jax_flashattn: JFA_FORCE_CLUSTER: expected 0, 1, 2, 4 or 8, got " +
                         std::string(text));
}

Status ReadVariant(Target target, const Attributes& attrs, Variant* variant) {
  const std::string error = CheckAttributes(target, attrs);
  if (!error.empty()) return InvalidArgument("jax_flashattn: " + error);
  const bool local = attrs.window_left >= 0 || (attrs.window_right >= 0 && !attrs.is_causal);
  variant->op = target == Target::kBwd ? Op::kBwd : attrs.rows > 0 ? Op::kDecode : Op::kFwd;
  variant->dtype = attrs.is_bf16 ? DType::kBF16 : DType::kF16;
  variant->head_dim = ToInt(attrs.head_dim);
  variant->head_dim_v = ToInt(attrs.head_dim_v);
  variant->mask = local ? Mask::kLocal : attrs.is_causal ? Mask::kCausal : Mask::kFull;
  variant->softcap = attrs.soft_cap > 0;
  variant->alibi = attrs.Has(kAlibiSlopes);
  variant->segments = attrs.Has(kQSegmentIds);
  variant->packed = attrs.Has(kCuSeqlensQ);
  variant->deterministic = attrs.deterministic;
  variant->dslopes = attrs.has_dslopes;
  variant->fp8 = attrs.fp8 != 0 && (attrs.fp8 & kWideQ) == 0;
  variant->fp8_kv = (attrs.fp8 & kWideQ) != 0;
  variant->e5m2_q = (attrs.fp8 & kE5m2Q) != 0;
  variant->e5m2_k = (attrs.fp8 & kE5m2K) != 0;
  variant->e5m2_v = (attrs.fp8 & kE5m2V) != 0;
  variant->two_level = (attrs.fp8 & kTwoLevel) != 0;
  variant->paged = attrs.Has(kPageTable) && variant->op == Op::kFwd;
  variant->rows = attrs.rows;
  variant->keys = LengthOf(attrs.kv_len);
  variant->schedule = static_cast<Schedule>(attrs.schedule);
  variant->heads_first = variant->fp8_kv && attrs.heads_first;
  return ForcedFamily(&variant->family);
}

Status ReadCall(Target target, const Attributes& attrs, const Variant& variant,
                const TensorList& args, const TensorList& rets, Call* call) {
  call->variant = variant;
  Reader reader(args, rets);
  ReadInputs(attrs, reader, call);
  if (!reader.ok()) return reader.status();
  const ElementType dtype = attrs.is_bf16 ? ElementType::kBF16 : ElementType::kF16;
  const Problem& sizes = call->sizes;
  const int64_t B = sizes.batch, K = sizes.num_kv_heads, G = sizes.group, T = sizes.q_len,
                S = sizes.kv_len, H = attrs.head_dim, Hv = attrs.head_dim_v;
  if (target == Target::kServe) {
    ReadOptional(attrs, reader, call);
    const bool paged = attrs.Has(kPageTable);
    const int64_t first = paged ? K : B, second = paged ? B : K;
    if (attrs.rows != 0 && attrs.rows != T * G) {
      reader.Fail("attribute rows must be the queries of one key head, " + std::to_string(T * G) +
                  ", got " + std::to_string(attrs.rows));
    }
    call->out = reader.NextRet("out", dtype, {first, second, G, T, Hv});
    call->lse = reader.NextRet("lse", ElementType::kF32, {first, second, G, T});
    const Tensor& scratch = reader.LastRet();
    const int64_t floats = scratch.rank == 3 ? scratch.dims[2] : 0;
    call->scratch = reader.NextRet("scratch", ElementType::kF32, {first, second, floats});
    call->scratch_floats = B * K * floats;
    call->sizes.scratch_floats = call->scratch_floats;
    call->sizes.head_dim_v = Hv;
    JFA_RETURN_IF_ERROR(ForcedCluster(&call->sizes.forced_cluster));
    call->sizes.page_size = paged ? call->page_size : 0;
    call->sizes.alike = (attrs.aux & (kQueryOffset | kQLengths | kKvLengths)) == 0;
  } else if (target == Target::kFwd) {
    if (attrs.kv_len != 0 && attrs.kv_len != S) {
      reader.Fail("attribute kv_len must be 0 or the length of k, " + std::to_string(S) + ", got " +
                  std::to_string(attrs.kv_len));
    }
    ReadOptional(attrs, reader, call);
    call->out = reader.NextRet("out", dtype, {B, K, G, T, Hv});
    call->lse = reader.NextRet("lse", ElementType::kF32, {B, K, G, T});
    // Programs exported before there was a counter have none.
    if (reader.HasMoreRets()) {
      call->tile_counter = reader.NextRet("tile_counter", ElementType::kS32, {B, K, 1});
      call->sizes.has_counter = call->tile_counter != nullptr;
    }
  } else {
    call->out = reader.NextArg("out", dtype, {B, K, G, T, Hv});
    call->lse = reader.NextArg("lse", ElementType::kF32, {B, K, G, T});
    call->dout = reader.NextArg("dout", dtype, {B, K, G, T, Hv});
    if (attrs.has_dlse) call->dlse = reader.NextArg("dlse", ElementType::kF32, {B, K, G, T});
    ReadOptional(attrs, reader, call);
    if (!reader.ok()) return reader.status();
    call->dq = reader.NextRet("dq", dtype, {B, K, G, T, H});
    call->dk = reader.NextRet("dk", dtype, {B, K, S, H});
    call->dv = reader.NextRet("dv", dtype, {B, K, S, Hv});
    call->slope_partials = SlopePartials(S, sizes.num_sequences);
    if (attrs.has_dslopes) {
      call->dslopes = reader.NextRet("dslopes", ElementType::kF32, {B, K, G, call->slope_partials});
    }
    call->scratch_floats =
        std::max<int64_t>(1, ScratchFloats(call->variant, G, T, sizes.num_sequences));
    call->scratch = reader.NextRet("scratch", ElementType::kF32, {B, K, call->scratch_floats});
  }
  reader.ExpectEnd();
  return reader.status();
}

FwdParams ToFwdParams(const Attributes& attrs, const Call& call) {
  FwdParams p{};
  p.problem = ToProblemParams(attrs, call);
  p.q = ToTensorArg(call.q, p.problem.q_len, p.problem.num_heads, call.variant.head_dim);
  if (attrs.Has(kPageTable)) {
    p.k = ToPagesTensorArg(call.k, attrs, call, call.variant.head_dim);
    p.v = ToPagesTensorArg(call.v, attrs, call, call.variant.head_dim_v);
    p.pages.table = static_cast<const int*>(call.page_table);
    p.pages.max_pages = ToInt(call.max_pages);
    p.pages.num_pages = ToInt(call.num_pages);
    while ((int64_t{1} << p.pages.page_log2) < call.page_size) ++p.pages.page_log2;
  } else {
    p.k = ToTensorArg(call.k, p.problem.kv_len, p.problem.num_kv_heads, call.variant.head_dim);
    p.v = ToTensorArg(call.v, p.problem.kv_len, p.problem.num_kv_heads, call.variant.head_dim_v);
  }
  p.out = ToTensorArg(call.out, p.problem.q_len, p.problem.num_heads, call.variant.head_dim_v);
  p.sinks = static_cast<const float*>(call.sinks);
  p.lse = static_cast<float*>(call.lse);
  p.qk_scales = static_cast<const float*>(call.qk_scale);
  p.v_scales = static_cast<const float*>(call.v_scale);
  return p;
}

DecodeParams ToDecodeParams(const Attributes& attrs, const Call& call) {
  DecodeParams p{};
  p.fwd = ToFwdParams(attrs, call);
  p.rows = ToInt(call.sizes.q_len * call.sizes.group);
  p.scratch = static_cast<float*>(call.scratch);
  return p;
}

BwdParams ToBwdParams(const Attributes& attrs, const Call& call) {
  BwdParams p{};
  p.problem = ToProblemParams(attrs, call);
  p.q = ToTensorArg(call.q, p.problem.q_len, p.problem.num_heads, call.variant.head_dim);
  p.k = ToTensorArg(call.k, p.problem.kv_len, p.problem.num_kv_heads, call.variant.head_dim);
  p.v = ToTensorArg(call.v, p.problem.kv_len, p.problem.num_kv_heads, call.variant.head_dim_v);
  p.out = ToTensorArg(call.out, p.problem.q_len, p.problem.num_heads, call.variant.head_dim_v);
  p.dout = ToTensorArg(call.dout, p.problem.q_len, p.problem.num_heads, call.variant.head_dim_v);
  p.lse = static_cast<const float*>(call.lse);
  p.dlse = static_cast<const float*>(call.dlse);
  p.dq = ToTensorArg(call.dq, p.problem.q_len, p.problem.num_heads, call.variant.head_dim);
  p.dk = ToTensorArg(call.dk, p.problem.kv_len, p.problem.num_kv_heads, call.variant.head_dim);
  p.dv = ToTensorArg(call.dv, p.problem.kv_len, p.problem.num_kv_heads, call.variant.head_dim_v);
  p.dslopes = static_cast<float*>(call.dslopes);
  p.slope_partials = static_cast<int>(call.slope_partials);
  p.scratch = static_cast<float*>(call.scratch);
  p.scratch_stride = call.scratch_floats;
  return p;
}

}  // namespace jfa
