// Kernel arguments: the only file that both host C++ and device code (NVRTC) include.
//
// Strides are in elements. Rows of the last axis are contiguous. A null pointer means "not given".
#ifndef JAX_FLASHATTN_CC_KERNELS_PARAMS_H_
#define JAX_FLASHATTN_CC_KERNELS_PARAMS_H_

namespace jfa {

struct TensorArg {
  void* data;
  long long batch_stride;
  long long row_stride;  // from one token to the next
  long long head_stride;
};

// Sizes, masks and biases, the same for forward and backward.
//
// Small arrays repeat their values over the key heads, so that batch and head axes shard alike. A
// packed call has num_sequences > 0: q_len and kv_len count all its tokens.
struct ProblemParams {
  int batch;
  int num_heads;     // N
  int num_kv_heads;  // K
  int group;         // N / K
  int q_len;         // T
  int kv_len;        // S
  int num_sequences;
  int head_dim;  // true H, may be less than the tile's
  int head_dim_v;
  float scale;       // of the logits, natural; positive
  float scale_log2;  // scale * log2(e)
  float soft_cap;    // 0: none
  int is_causal;
  int query_offset;              // position of query 0 where query_offsets is null
  int window_left;               // visible keys before the position; INT_MAX: all
  int window_right;              // and after it; 0 is causal; INT_MAX: all
  int sink_tokens;               // keys below are not hidden by the window
  int scratch_rows;              // rows of the backward's scratch for one (batch, query head)
  const int* query_offsets;      // [batch, num_kv_heads] or [batch, num_kv_heads, num_sequences]
  const int* q_lengths;          // [batch, num_kv_heads]
  const int* kv_lengths;         // [batch, num_kv_heads]
  const int* q_segment_ids;      // [batch, num_kv_heads, q_len]
  const int* q_segment_ranges;   // [batch, num_kv_heads, ceil(q_len / 32), 2]: lowest, highest id
  const int* kv_segment_ids;     // [batch, num_kv_heads, kv_len]
  const int* kv_segment_ranges;  // [batch, num_kv_heads, ceil(kv_len / 32), 2]
  const float* alibi_slopes;     // [batch, num_heads]
  const int* cu_seqlens_q;       // [batch, num_kv_heads, num_sequences + 1]
  const int* cu_seqlens_kv;      // [batch, num_kv_heads, num_sequences + 1]
};

// Where the keys of paged sequences are. Then k's and v's batch_stride is that from page to page, a
// row of them is a token of a page, and kv_len is what a row of the table can hold.
struct PagesArg {
  const int* table;  // [batch, max_pages], or [batch, num_sequences, max_pages]; null: not paged
  int max_pages;
  int num_pages;
  int page_log2;  // tokens of a page
};

struct FwdParams {
  ProblemParams problem;
  TensorArg q, k, v, out;
  PagesArg pages;
  const float* sinks;  // [batch, num_heads], natural logits
  float* lse;          // [batch, num_heads, q_len], natural log
  // 8-bit floats only: factors of the scores and of the output.
  const float* qk_scales;  // [batch, num_kv_heads]
  const float* v_scales;   // [batch, num_kv_heads]
};

// A CUtensorMap of the driver, which the copy engine reads from the kernel's parameters.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

struct FwdSm90Params {
  TensorMap q, k, v, out;
  FwdParams fwd;
  int box_rows;       // of k's and v's boxes: a block of keys, or what of it is surely in one page
  unsigned* counter;  // of work items that CTAs have taken beside their first; null: in turn
  int paired;         // work items are pairs of row tiles, one from each end of the rows
};

struct DecodeParams {
  TensorMap k, v;  // where the copy engine is used
  int box_rows;    // rows of their boxes: a block of keys, or what of it is surely in one page
  FwdParams fwd;
  int num_ctas;    // that share the key blocks
  int parts_log2;  // Config::kParts: how many CTAs, a cluster, share one tile
  int parts;       // else: how many CTAs share a tile where all visit as many blocks; 0: a line
  int rows;        // queries of a tile's key heads: q_len * group, times 2 for pairs
  int row_tiles;   // tiles of kRows of them
  int merge_log2;  // DecodeCombine: how many warps merge a row
  int all_parts;   // the same as `parts` where all visit as many blocks for sure; or 0
  float* scratch;  // DecodeScratch in decode_share.cuh
};

struct BwdParams {
  struct {
    TensorMap q, k, v, dout;
  } maps;  // where the copy engine is used
  ProblemParams problem;
  TensorArg q, k, v, out, dout;
  const float* lse;
  const float* dlse;  // [batch, num_heads, q_len] or null
  TensorArg dq, dk, dv;
  float* dslopes;      // [batch, num_heads, slope_partials] or null; their sum is the gradient
  int slope_partials;  // SlopePartials() of plan.h
  float* scratch;      // ScratchFloats() of plan.h per (batch, kv head)
  long long scratch_stride;  // floats per (batch, kv head)
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_PARAMS_H_
