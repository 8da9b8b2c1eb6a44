// The CPU kernels' interface: what one call computes, and who runs its tasks.
//
// Memory is BTNH throughout: q and out [batch, q_len, num_heads, head_dim(_v)], k and v
// [batch, kv_len, num_kv_heads, head_dim(_v)], lse [batch, num_heads, q_len], all contiguous.
// Nothing here knows of XLA or Python: handlers.cc fills these structs from FFI buffers.
#ifndef JAX_FLASHATTN_CC_CPU_ATTENTION_H_
#define JAX_FLASHATTN_CC_CPU_ATTENTION_H_

#include <cstdint>
#include <functional>

namespace jfa::cpu {

enum class DType { kF32, kBF16, kF16 };

// What is attended to: sizes, masks and scale. Pointers that are null mean "not given".
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
  bool is_causal;
  int64_t query_offset;          // position of query 0 where query_offsets is null
  const int32_t* query_offsets;  // [batch]
  const int32_t* q_lengths;      // [batch], clamped to [0, q_len]
  const int32_t* kv_lengths;     // [batch], clamped to [0, kv_len]
};

struct FwdArgs {
  Problem problem;
  const void* q;
  const void* k;
  const void* v;
  void* out;
  float* lse;  // natural log; -inf where a row sees nothing
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
  float* dq_accum;  // scratch of BwdScratchFloats floats, uninitialised, any alignment of 4
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

// Number of floats that BwdArgs::dq_accum must hold. Depends on shapes only.
int64_t BwdScratchFloats(int64_t batch, int64_t q_len, int64_t num_heads, int64_t num_kv_heads,
                         int64_t head_dim);

// "avx512", "avx2" or "baseline": what runs on this machine. JFA_CPU_ISA may lower it (tests).
const char* Isa();

}  // namespace jfa::cpu

#endif  // JAX_FLASHATTN_CC_CPU_ATTENTION_H_
