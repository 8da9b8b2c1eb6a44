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

// Sizes and masks, the same for forward and backward.
struct ProblemParams {
  int batch;
  int num_heads;     // N
  int num_kv_heads;  // K
  int group;         // N / K
  int q_len;         // T
  int kv_len;        // S
  int head_dim;      // true H, may be less than the tile's
  int head_dim_v;
  float scale;       // of the logits, natural
  float scale_log2;  // scale * log2(e)
  int query_offset;  // position of query 0 where query_offsets is null
  int window_left;   // visible keys before the position; INT_MAX: all
  int window_right;  // and after it; 0 is causal; INT_MAX: all
  // [batch, num_kv_heads]: one value per sequence, repeated so that batch and head axes shard alike
  const int* query_offsets;
  const int* q_lengths;
  const int* kv_lengths;
};

struct FwdParams {
  ProblemParams problem;
  TensorArg q, k, v, out;
  float* lse;  // [batch, num_heads, q_len], natural log
};

// A CUtensorMap of the driver, which the copy engine reads from the kernel's parameters.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

struct FwdSm90Params {
  TensorMap q, k, v;
  FwdParams fwd;
  int paired;  // work items are pairs of row tiles, one from each end of the rows
};

struct BwdParams {
  ProblemParams problem;
  TensorArg q, k, v, out, dout;
  const float* lse;
  const float* dlse;  // [batch, num_heads, q_len] or null
  TensorArg dq, dk, dv;
  float* scratch;            // ScratchFloats() of plan.h per (batch, kv head)
  long long scratch_stride;  // floats per (batch, kv head)
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_KERNELS_PARAMS_H_
