// What dispatch.cc and the per-ISA translation units share: tasks, and one table of functions per
// ISA. No code here that the linker could merge across translation units: see simd.h.
#ifndef JAX_FLASHATTN_CC_CPU_ISA_H_
#define JAX_FLASHATTN_CC_CPU_ISA_H_

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "mask.h"

namespace jfa::cpu {

// Query rows of one (sequence, key head) are numbered r = g * q_size + t over the G query heads
// that read that key head, and cut into tiles of kRowTile. So the group shares each key block, and
// decoding (one token) still has several rows.
constexpr int kRowTile = 64;

// Forward visits keys in blocks of so many.
constexpr int kFwdKeyBlock = 64;

struct Task {
  const Sequence* sequence;
  int64_t kv_head;
  int64_t begin;  // rows (forward, and backward for dq) or keys (backward for dk, dv)
  int64_t end;
  int64_t cost;  // visible pairs, roughly
  // Forward of one row tile whose keys are shared out: the part that this task visits, and where
  // it leaves its result (forward_partial_floats).
  int64_t key_begin = 0;
  int64_t key_end = INT64_MAX;
  float* partial = nullptr;
};

// The results of all parts of a row tile's keys, one behind the other.
struct Merge {
  Task task;
  const float* partials;
  int64_t num_parts;
};

// What backward keeps of each row tile from visit to visit, numbered by sequence, then key head,
// then tile: what its rows see, and SavedFloatsPerTile floats (see backward.h).
struct SavedTiles {
  RowSpan* spans;
  float* floats;
};

static inline int64_t SavedFloatsPerTile(int64_t head_dim) { return kRowTile * (3 + head_dim); }

// kAll: a task is a whole (sequence, key head), five products per block. kDQ then kDKV: tasks are
// rows, then keys; seven products, but as many tasks as there are tiles.
enum class BwdPass { kAll, kDQ, kDKV };

struct Kernels {
  const char* name;
  size_t (*forward_scratch_floats)(const Problem& problem, int row_tiles);
  void (*forward)(const FwdArgs& args, const Task& task, float* scratch);
  size_t (*forward_partial_floats)(const Problem& problem);
  void (*merge)(const FwdArgs& args, const Merge& merge, float* scratch);
  size_t (*backward_scratch_floats)(const Problem& problem);
  int (*backward_key_block)(const Problem& problem, BwdPass pass);
  void (*backward)(const BwdArgs& args, const SavedTiles& saved, BwdPass pass, const Task& task,
                   float* scratch);
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
