// The CPU kernels' interface: what one call computes, and who runs its tasks.
//
// Memory is BTNH throughout: q and out [batch, q_len, num_heads, head_dim(_v)], k and v
// [batch, kv_len, num_kv_heads, head_dim(_v)], lse [batch, num_heads, q_len], all contiguous.
// Packed, an element of the batch is a row of sequences one behind the other, and q_len and kv_len
// are its tokens. Paged, k and v are pools of pages that a table gives to the sequences. Nothing
// here knows of XLA or Python: handlers.cc fills these structs.
#ifndef JAX_FLASHATTN_CC_CPU_ATTENTION_H_
#define JAX_FLASHATTN_CC_CPU_ATTENTION_H_

#include <cstdint>
#include <functional>

namespace jfa::cpu {

enum class DType { kF32, kBF16, kF16 };

// What is attended to: sizes, logits and masks. Pointers that are null mean "not given".
//
// With the position i of a query and j of a key counted from the start of their sequence:
//   logit = cap(scale q.k) - slope |i + offset - j|,   cap(x) = soft_cap tanh(x / soft_cap)
//   j is visible if  j <= i + offset  where causal,
//     and  i + offset - window_left <= j <= i + offset + window_right  or  j < sink_tokens,
//     and the segments of i and j are equal.
struct Problem {
  DType dtype;
  int64_t batch;
  int64_t q_len;         // T
  int64_t kv_len;        // S
  int64_t num_heads;     // N
  int64_t num_kv_heads;  // K, divides N; query head n reads key head n / (N / K)
  int64_t head_dim;      // H
  int64_t head_dim_v;    // Hv
  float scale;           // > 0: the maximum is taken before scaling
  float soft_cap;        // 0: none
  bool is_causal;
  int64_t query_offset;   // where query_offsets is null
  int64_t window_left;    // -1: open; far below the range of int64, so that sums do not overflow
  int64_t window_right;   // likewise
  int64_t sink_tokens;    // matter only with a window
  int64_t num_sequences;  // of each batch element, if packed
  const int32_t* query_offsets;  // [batch], packed [batch, num_sequences]
  const int32_t* q_lengths;      // [batch], clamped to [0, q_len]; not if packed
  // [batch], clamped to [0, kv_len]; not if packed, unless paged: [batch, num_sequences]
  const int32_t* kv_lengths;
  const int32_t* q_segment_ids;   // [batch, q_len]; not if packed
  const int32_t* kv_segment_ids;  // [batch, kv_len]; together with q_segment_ids
  const float* alibi_slopes;      // [batch, num_heads]
  const float* sinks;             // [batch, num_heads], logits without a value; forward only
  // [batch, num_sequences + 1], both or none, but only q's if paged. Sequence s has the tokens from
  // [s] to [s + 1]. Values are clamped to the tokens there are and to those before them. Other
  // tokens get zero results.
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_kv;
  // Paged, forward only: k is [num_pages, page_size, num_kv_heads, head_dim], or with the two axes
  // in the middle exchanged (heads_first), and v likewise. Key j of a sequence is token
  // j % page_size of the page that its row of the table names in column j / page_size, clamped to
  // [0, num_pages). kv_len is what a row can name, pages_per_seq * page_size.
  int64_t page_size;
  int64_t num_pages;
  int64_t pages_per_seq;
  bool heads_first;
  const int32_t*
      page_table;  // [batch, pages_per_seq], packed [batch, num_sequences, pages_per_seq]
};

struct FwdArgs {
  Problem problem;
  const void* q;
  const void* k;
  const void* v;
  void* out;
  float* lse;  // natural log, sinks included; -inf where a row sees nothing at all
};

struct BwdArgs {
  Problem problem;
  const void* q;
  const void* k;
  const void* v;
  const void* out;
  const float* lse;
  const void* dout;
  const float* dlse;  // [batch, num_heads, q_len] or null
  void* dq;
  void* dk;
  void* dv;
  float* dslopes_rows;  // [batch, num_heads, q_len]: what each row adds to its head's dslope
  float* scratch;       // of BwdScratchFloats floats, uninitialised, any alignment of 4
};

// Runs body(worker, task) for every task in [0, num_tasks); returns when all are done.
// num_workers() bounds `worker`. Implemented over XLA's intra-op pool, or plain threads in tests.
class Executor {
 public:
  virtual ~Executor() = default;
  virtual int num_workers() const = 0;
  virtual void ParallelFor(int64_t num_tasks,
                           const std::function<void(int worker, int64_t task)>& body) = 0;
};

// Both return false when memory for a worker's tiles can't be had; outputs are then unspecified.
bool Forward(const FwdArgs& args, Executor& executor);
bool Backward(const BwdArgs& args, Executor& executor);

// Number of floats that BwdArgs::scratch must hold. Depends on shapes only; num_sequences is 0
// unless packed.
int64_t BwdScratchFloats(int64_t batch, int64_t q_len, int64_t num_heads, int64_t num_kv_heads,
                         int64_t head_dim, int64_t num_sequences);

// "avx512", "avx2" or "baseline": what runs on this machine. JFA_CPU_ISA may lower it (tests).
const char* Isa();

}  // namespace jfa::cpu

#endif  // JAX_FLASHATTN_CC_CPU_ATTENTION_H_
