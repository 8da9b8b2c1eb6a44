// Chooses the ISA, cuts a call into tasks and hands them to the executor.
//
// The only file here that uses std, and compiled without ISA flags: see simd.h.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "attention.h"
#include "isa.h"

namespace jfa::cpu {
namespace {

const Kernels& ChooseKernels() {
  const char* limit = std::getenv("JFA_CPU_ISA");
  const auto allowed = [limit](const char* isa) {
    if (!limit || !std::strcmp(limit, "avx512")) return true;
    return !std::strcmp(limit, "avx2") && !std::strcmp(isa, "avx2");
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && allowed("avx512")) return avx512::kKernels;
  if (has_avx2 && allowed("avx2")) return avx2::kKernels;
#else
  static_cast<void>(allowed);
#endif
  return baseline::kKernels;
}

const Kernels& Isas() {
  static const Kernels& kernels = ChooseKernels();
  return kernels;
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// One block of tiles per worker, on its own cache lines.
class Scratch {
 public:
  bool Allocate(int workers, size_t floats) {
    for (int i = 0; i < workers; ++i) {
      const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
      blocks_.emplace_back(static_cast<float*>(std::aligned_alloc(64, bytes)));
      if (!blocks_.back()) return false;
    }
    return true;
  }
  float* operator[](int worker) const { return blocks_[worker].get(); }

 private:
  std::vector<std::unique_ptr<float, Free>> blocks_;
};

// How much a task of query rows costs, to start the long ones first: only order matters.
int64_t LastPosition(const Problem& p, const Task& task) {
  if (task.end - task.begin >= p.q_len) return p.q_len;
  const int64_t last = (task.end - 1) % p.q_len;
  return last < task.begin % p.q_len ? p.q_len : last;
}

// All (batch, key head), each with [0, size) in pieces of `step`.
std::vector<Task> MakeTasks(const Problem& p, int64_t size, int64_t step) {
  std::vector<Task> tasks;
  tasks.reserve(p.batch * p.num_kv_heads * CeilDiv(size, step));
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      for (int64_t begin = 0; begin < size; begin += step) {
        tasks.push_back({b, head, begin, std::min(begin + step, size)});
      }
    }
  }
  return tasks;
}

void LongestRowsFirst(const Problem& p, std::vector<Task>* tasks) {
  if (!p.is_causal) return;
  std::stable_sort(tasks->begin(), tasks->end(), [&p](const Task& a, const Task& b) {
    return LastPosition(p, a) > LastPosition(p, b);
  });
}

int64_t GroupRows(const Problem& p) { return p.num_heads / p.num_kv_heads * p.q_len; }

// Row tiles that share each converted key block: as many as leave every worker several tasks and
// keep Q and O of all tiles within half of a typical L2. Eight were 3% faster than four.
int RowTilesPerTask(const Problem& p, int workers) {
  constexpr int64_t kMaxTiles = 8, kTasksPerWorker = 4, kL2Share = 512 * 1024;
  const int64_t tile_bytes = kRowTile * (p.head_dim + p.head_dim_v) * sizeof(float);
  const int64_t tiles = CeilDiv(GroupRows(p), kRowTile);
  int64_t n = std::min({kMaxTiles, kL2Share / tile_bytes, tiles});
  while (n > 1 && p.batch * p.num_kv_heads * CeilDiv(tiles, n) < kTasksPerWorker * workers) --n;
  return static_cast<int>(std::max<int64_t>(n, 1));
}

int64_t SavedFloatsPerTile(int64_t head_dim) { return kRowTile * (2 + head_dim); }

// Whether whole heads as tasks keep the workers busy. Going by rows and by keys instead costs
// seven products for five.
bool EnoughHeads(const Problem& p, int workers) {
  const int64_t tasks = p.batch * p.num_kv_heads;
  return 7 * tasks >= 5 * CeilDiv(tasks, workers) * workers;
}

}  // namespace

bool Forward(const FwdArgs& args, Executor& executor) {
  const Problem& p = args.problem;
  const Kernels& kernels = Isas();
  const int workers = executor.num_workers();
  const int row_tiles = RowTilesPerTask(p, workers);
  std::vector<Task> tasks = MakeTasks(p, GroupRows(p), int64_t{row_tiles} * kRowTile);
  LongestRowsFirst(p, &tasks);
  if (tasks.empty()) return true;
  Scratch scratch;
  if (!scratch.Allocate(workers, kernels.forward_scratch_floats(p, row_tiles))) return false;
  executor.ParallelFor(tasks.size(), [&](int worker, int64_t task) {
    kernels.forward(args, tasks[task], scratch[worker]);
  });
  return true;
}

bool Backward(const BwdArgs& args, Executor& executor) {
  const Problem& p = args.problem;
  const Kernels& kernels = Isas();
  const int workers = executor.num_workers();
  Scratch scratch;
  if (!scratch.Allocate(workers, kernels.backward_scratch_floats(p))) return false;
  BwdArgs aligned = args;
  aligned.dq_accum =
      reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(args.dq_accum) + 63) / 64 * 64);
  const auto run = [&](BwdPass pass, const std::vector<Task>& tasks) {
    if (tasks.empty()) return;
    executor.ParallelFor(tasks.size(), [&](int worker, int64_t task) {
      kernels.backward(aligned, pass, tasks[task], scratch[worker]);
    });
  };
  if (EnoughHeads(p, workers)) {
    run(BwdPass::kAll, MakeTasks(p, 1, 1));
    return true;
  }
  std::vector<Task> rows = MakeTasks(p, GroupRows(p), kRowTile);
  LongestRowsFirst(p, &rows);
  run(BwdPass::kDQ, rows);
  // Early keys are seen by most rows, and come first within a head already.
  std::vector<Task> keys = MakeTasks(p, p.kv_len, kernels.backward_key_block(p, BwdPass::kDKV));
  std::stable_sort(keys.begin(), keys.end(),
                   [](const Task& a, const Task& b) { return a.begin < b.begin; });
  run(BwdPass::kDKV, keys);
  return true;
}

int64_t BwdScratchFloats(int64_t batch, int64_t q_len, int64_t num_heads, int64_t num_kv_heads,
                         int64_t head_dim) {
  const int64_t row_tiles = CeilDiv(num_heads / num_kv_heads * q_len, kRowTile);
  constexpr int64_t kAlignment = 16;
  return batch * num_kv_heads * row_tiles * SavedFloatsPerTile(head_dim) + kAlignment;
}

const char* Isa() { return Isas().name; }

}  // namespace jfa::cpu
