// What dispatch.cc and the per-ISA translation units share: tasks, and one table of functions per
// ISA. Only plain data here, so that no code is compiled twice with different flags.
#ifndef JAX_FLASHATTN_CC_CPU_ISA_H_
#define JAX_FLASHATTN_CC_CPU_ISA_H_

#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace jfa::cpu {

// Query rows of one (batch, key head) are numbered r = g * T + t over the G query heads that read
// that key head, and cut into tiles of kRowTile. So the group shares each key block, and decoding
// (T = 1) still has several rows.
constexpr int kRowTile = 64;

struct Task {
  int64_t batch;
  int64_t kv_head;
  int64_t begin;  // rows (forward, and backward for dq) or keys (backward for dk, dv)
  int64_t end;
};

// kAll: a task is a whole (batch, key head), five products per block. kDQ then kDKV: tasks are
// rows, then keys; seven products, but as many tasks as there are tiles.
enum class BwdPass { kAll, kDQ, kDKV };

struct Kernels {
  const char* name;
  size_t (*forward_scratch_floats)(const Problem& problem, int row_tiles);
  void (*forward)(const FwdArgs& args, const Task& task, float* scratch);
  size_t (*backward_scratch_floats)(const Problem& problem);
  int (*backward_key_block)(const Problem& problem, BwdPass pass);
  void (*backward)(const BwdArgs& args, BwdPass pass, const Task& task, float* scratch);
};

namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace baseline {
extern const Kernels kKernels;
}

}  // namespace jfa::cpu

#endif  // JAX_FLASHATTN_CC_CPU_ISA_H_
