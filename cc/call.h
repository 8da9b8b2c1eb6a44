// One custom call: operands and attributes -> checked sizes and addresses -> kernel parameters.
//
// Logical shapes, which layouts map to [batch, token, head, dim] memory:
//   q, dq [B, K, G, T, H]   k, dk [B, K, S, H]   v, dv [B, K, S, Hv]   out, dout [B, K, G, T, Hv]
//   lse, dlse f32 [B, K, G, T]   query_offset, q_lengths, kv_lengths s32 [B, K]
//   scratch f32 [B, K, max(1, ScratchFloats())]
// forward:  q, k, v, then of query_offset, q_lengths, kv_lengths what is given -> out, lse
// backward: q, k, v, out, lse, dout, dlse if given, then as above -> dq, dk, dv, scratch
#ifndef JAX_FLASHATTN_CC_CALL_H_
#define JAX_FLASHATTN_CC_CALL_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "cc/kernels/params.h"
#include "cc/plan.h"
#include "cc/status.h"

namespace jfa {

struct Attributes {
  float scale;
  bool is_causal;
  int64_t query_offset;
  bool has_query_offset;
  bool has_q_lengths;
  bool has_kv_lengths;
  int64_t arch;
  bool deterministic;
  bool has_dlse;
};

enum class ElementType { kF16, kBF16, kF32, kS32, kOther };

struct Tensor {
  ElementType dtype;
  const int64_t* dims;
  size_t rank;
  void* data;
};

// Operands or results. `size` is the true number; no valid call has more than `items` holds.
struct TensorList {
  std::array<Tensor, 12> items;
  size_t size = 0;
};

// Whether operands have memory: they do in Execute, before that only shapes.
enum class Memory { kNone, kDevice };

// Sizes and addresses of one call; the addresses are null before Execute.
struct Call {
  Variant variant{};
  Problem sizes{};
  ElementType dtype{};
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;
  void *q = nullptr, *k = nullptr, *v = nullptr, *out = nullptr, *lse = nullptr;
  void *dout = nullptr, *dlse = nullptr, *dq = nullptr, *dk = nullptr, *dv = nullptr;
  void* scratch = nullptr;
  int64_t scratch_floats = 0;
  void *query_offset = nullptr, *q_lengths = nullptr, *kv_lengths = nullptr;

  // No query or no key: results are filled, nothing is launched.
  bool IsEmpty() const { return sizes.batch == 0 || sizes.q_len == 0 || sizes.kv_len == 0; }
};

// Checks everything; the error names the operand, what was expected and what was there.
Status ReadCall(Op op, const Attributes& attrs, const TensorList& args, const TensorList& rets,
                Memory memory, Call* call);

FwdParams ToFwdParams(const Attributes& attrs, const Call& call);
BwdParams ToBwdParams(const Attributes& attrs, const Call& call);

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_CALL_H_
