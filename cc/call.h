// One custom call: operands and attributes -> checked sizes and addresses -> kernel parameters.
//
// Logical shapes, which layouts map to [batch, token, head, dim] memory:
//   q, dq [B, K, G, T, H]   k, dk [B, K, S, H]   v, dv [B, K, S, Hv]   out, dout [B, K, G, T, Hv]
//   lse, dlse f32 [B, K, G, T]
// forward:  q, k, v, optional arrays -> out, lse, tile_counter s32 [B, K, 1] (programs exported
//           before there was one have none)
// backward: q, k, v, out, lse, dout, dlse if given, optional arrays
//           -> dq, dk, dv, dslopes f32 [B, K, G, SlopePartials()] if asked for,
//              scratch f32 [B, K, max(1, ScratchFloats())]
// serve:    q, k, v, optional arrays -> out, lse, scratch f32 [B, K, any]: decoding (attribute
//           `rows` above 0), or forward over pages.
// Paged calls (of serve alone) have k [K, pages, tokens of a page, H], v likewise, and all other
// arrays with K before B. Layouts keep the memory of both kinds the same; k's and v's may be
// [pages, tokens, K, H] or, with attribute `heads_first`, [pages, K, tokens, H].
// Optional arrays, those that attribute `aux` names, in the order of its bits:
//   query_offset s32 [B, K], packed [B, K, n]   q_lengths, kv_lengths s32 [B, K]
//   q_segment_ids s32 [B, K, T] and their ranges [B, K, ceil(T / 32), 2]   the same for keys, S
//   alibi_slopes, sinks f32 [B, K, G]   cu_seqlens_q, cu_seqlens_kv s32 [B, K, n + 1]
//   page_table s32 [K or 1, B, M]   qk_scale, v_scale f32 [B, K], for 8-bit floats
// With cu_seqlens the call is packed: n sequences, T and S count all tokens. A packed call over
// pages has no cu_seqlens_kv, but kv_lengths [K, B, n] and page_table [K or 1, B, n, M].
#ifndef JAX_FLASHATTN_CC_CALL_H_
#define JAX_FLASHATTN_CC_CALL_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "cc/aux_bits.h"
#include "cc/kernels/params.h"
#include "cc/plan.h"
#include "cc/status.h"

namespace jfa {

// Bits of attribute `fp8`: fp8_attribute of _lowering_cuda.py.
enum Fp8Bit : int64_t {
  kFp8 = 1 << 0,  // k, v and, without kWideQ, q are 8-bit floats: e4m3, or
  kE5m2Q = 1 << 1,
  kE5m2K = 1 << 2,
  kE5m2V = 1 << 3,
  kTwoLevel = 1 << 4,
  kWideQ = 1 << 5,  // q is of 16 bits
  kAllFp8 = (1 << 6) - 1,
};

// In the order of the handlers' attributes.
struct Attributes {
  float scale;
  float soft_cap;  // 0: none
  bool is_causal;
  int64_t query_offset;
  int64_t window_left;  // -1: open
  int64_t window_right;
  int64_t sink_tokens;
  int64_t aux;
  bool is_bf16;  // of the output, and of inputs that aren't of 8 bits
  int64_t head_dim;
  int64_t head_dim_v;
  int64_t arch;
  // Forward and serve; 0 in backward.
  int64_t fp8 = 0;
  // Forward only.
  int64_t schedule = 0;   // Schedule of plan.h
  int64_t kv_len = 0;     // S, for the choice of tiles; 0: unknown
  int64_t sm_margin = 0;  // forward and serve: multiprocessors left to others
  // Backward only.
  bool deterministic = false;
  bool has_dlse = false;
  bool has_dslopes = false;
  // Serve only.
  int64_t rows = 0;  // decode: queries of one key head; 0: the forward kernel
  bool heads_first = false;

  bool Has(AuxBit bit) const { return (aux & bit) != 0; }
};

enum class ElementType { kF16, kBF16, kF32, kS32, kE4m3, kE5m2, kOther };

struct Tensor {
  ElementType dtype;
  const int64_t* dims;
  size_t rank;
  void* data;
};

// Operands or results. `size` is the true number; no valid call has more than `items` holds, of
// which those beyond are left as they are.
struct TensorList {
  std::array<Tensor, 20> items;
  size_t size = 0;
};

// Sizes and addresses of one call; addresses are null where nothing is given, or it is empty.
struct Call {
  Variant variant{};
  Problem sizes{};
  void *q = nullptr, *k = nullptr, *v = nullptr, *out = nullptr, *lse = nullptr;
  void *dout = nullptr, *dlse = nullptr, *dq = nullptr, *dk = nullptr, *dv = nullptr;
  void *dslopes = nullptr, *scratch = nullptr, *tile_counter = nullptr;
  int64_t scratch_floats = 0, slope_partials = 0;
  void *query_offset = nullptr, *q_lengths = nullptr, *kv_lengths = nullptr;
  void *q_segment_ids = nullptr, *q_segment_ranges = nullptr;
  void *kv_segment_ids = nullptr, *kv_segment_ranges = nullptr;
  void *alibi_slopes = nullptr, *sinks = nullptr;
  void *cu_seqlens_q = nullptr, *cu_seqlens_kv = nullptr;
  void *qk_scale = nullptr, *v_scale = nullptr;
  void* page_table = nullptr;
  int64_t num_pages = 0, page_size = 0, max_pages = 0;  // of a paged call
};

// The kernel family that tests force: JFA_FORCE_FAMILY is sm80 or sm90; read once.
Status ForcedFamily(Family* family);

// How many CTAs share a tile of decoding, which tests force: JFA_FORCE_CLUSTER is 0 (all share all
// tiles), 1, 2, 4 or 8; read once. -1 if it isn't set.
Status ForcedCluster(int* size);

// What a handler runs; kServe decides by its attributes between the two others that it can.
enum class Target { kFwd, kBwd, kServe };

// What changes code, and the checks of attributes; from these alone, since a runtime need not show
// operands while it compiles.
Status ReadVariant(Target target, const Attributes& attrs, Variant* variant);

// Checks all operands and results against the attributes, of which ReadVariant made `variant`; the
// error names the operand, what was expected and what was there.
Status ReadCall(Target target, const Attributes& attrs, const Variant& variant,
                const TensorList& args, const TensorList& rets, Call* call);

FwdParams ToFwdParams(const Attributes& attrs, const Call& call);
// Without what depends on the kernel: boxes, CTAs, tiles.
DecodeParams ToDecodeParams(const Attributes& attrs, const Call& call);
BwdParams ToBwdParams(const Attributes& attrs, const Call& call);

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_CALL_H_
