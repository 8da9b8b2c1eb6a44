// Chooses the ISA, cuts a call into tasks and hands them to the executor.
//
// The only file here that uses std, and compiled without ISA flags: see simd.h.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <queue>
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
      const size_t bytes = (floats * sizeof(float) + 64) / 64 * 64;  // never 0
      blocks_.emplace_back(static_cast<float*>(std::aligned_alloc(64, bytes)));
      if (!blocks_.back()) return false;
    }
    return true;
  }
  float* operator[](int worker) const { return blocks_[worker].get(); }

 private:
  std::vector<std::unique_ptr<float, Free>> blocks_;
};

int64_t GroupSize(const Problem& p) { return p.num_heads / p.num_kv_heads; }

// The sequences of all batch elements, which together own every token once. Tokens that belong to
// no packed sequence are padding of two more, before the first and behind the last.
std::vector<Sequence> MakeSequences(const Problem& p) {
  std::vector<Sequence> sequences;
  int64_t row_tiles = 0;
  const auto add = [&](Sequence seq) {
    seq.num_row_tiles = CeilDiv(GroupSize(p) * seq.q_size, kRowTile);
    seq.row_tiles_before = row_tiles;
    row_tiles += seq.num_row_tiles;
    sequences.push_back(seq);
  };
  const auto offset = [&p](int64_t i) {
    return p.query_offsets ? p.query_offsets[i] : p.query_offset;
  };
  for (int64_t b = 0; b < p.batch; ++b) {
    Sequence seq{};
    seq.batch = b;
    if (!p.cu_seqlens_q) {
      seq.q_size = p.q_len;
      seq.kv_size = p.kv_len;
      seq.q_len = p.q_lengths ? Clamp(p.q_lengths[b], 0, p.q_len) : p.q_len;
      seq.kv_len = p.kv_lengths ? Clamp(p.kv_lengths[b], 0, p.kv_len) : p.kv_len;
      seq.offset = offset(b);
      if (p.q_segment_ids) {
        seq.q_ids = p.q_segment_ids + b * p.q_len;
        seq.kv_ids = p.kv_segment_ids + b * p.kv_len;
      }
      if (p.page_table) seq.pages = p.page_table + b * p.pages_per_seq;
      add(seq);
      continue;
    }
    const int64_t n = p.num_sequences;
    const int32_t* q_ends = p.cu_seqlens_q + b * (n + 1);
    const int32_t* kv_ends = p.page_table ? nullptr : p.cu_seqlens_kv + b * (n + 1);
    for (int64_t s = -1; s <= n; ++s) {
      const bool owned = s >= 0 && s < n;
      seq.q_begin += seq.q_size;
      seq.q_size = (s < n ? Clamp(q_ends[s + 1], seq.q_begin, p.q_len) : p.q_len) - seq.q_begin;
      seq.q_len = owned ? seq.q_size : 0;
      if (p.page_table) {
        seq.pages = owned ? p.page_table + (b * n + s) * p.pages_per_seq : nullptr;
        seq.kv_len = seq.kv_size = owned ? Clamp(p.kv_lengths[b * n + s], 0, p.kv_len) : 0;
      } else {
        seq.kv_begin += seq.kv_size;
        seq.kv_size =
            (s < n ? Clamp(kv_ends[s + 1], seq.kv_begin, p.kv_len) : p.kv_len) - seq.kv_begin;
        seq.kv_len = owned ? seq.kv_size : 0;
      }
      seq.offset = owned ? offset(b * n + s) : 0;
      add(seq);
    }
  }
  return sequences;
}

// The costs leave segments out: they decide on order only.
int64_t RowsCost(const Problem& p, const Sequence& seq, int64_t begin, int64_t end) {
  int64_t cost = 0;
  for (int64_t row = begin; row < end; row += kRowTile) {
    const int64_t rows = std::min<int64_t>(kRowTile, end - row);
    const KeyRange keys = VisibleKeys(p, seq, (row + rows - 1) % seq.q_size);
    cost += rows * (keys.hi - keys.lo + keys.sink_hi);
  }
  return cost;
}

int64_t KeysCost(const Problem& p, const Sequence& seq, int64_t begin, int64_t end) {
  return (end - begin) * CountRowsThatSee(p, seq, begin + (end - begin) / 2);
}

void LongestFirst(std::vector<Task>* tasks) {
  std::stable_sort(tasks->begin(), tasks->end(),
                   [](const Task& a, const Task& b) { return a.cost > b.cost; });
}

enum class Axis { kRows, kKeys };

// All (sequence, key head), each with its rows or keys in pieces of `step`.
std::vector<Task> MakeTasks(const Problem& p, const std::vector<Sequence>& sequences, Axis axis,
                            int64_t step) {
  std::vector<Task> tasks;
  for (const Sequence& seq : sequences) {
    const int64_t size = axis == Axis::kRows ? GroupSize(p) * seq.q_size : seq.kv_size;
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      for (int64_t begin = 0; begin < size; begin += step) {
        const int64_t end = std::min(begin + step, size);
        const auto cost = axis == Axis::kRows ? RowsCost : KeysCost;
        tasks.push_back({&seq, head, begin, end, cost(p, seq, begin, end)});
      }
    }
  }
  LongestFirst(&tasks);
  return tasks;
}

// All (sequence, key head), each whole.
std::vector<Task> MakeHeadTasks(const Problem& p, const std::vector<Sequence>& sequences) {
  std::vector<Task> tasks;
  for (const Sequence& seq : sequences) {
    if (seq.q_size == 0 && seq.kv_size == 0) continue;
    const int64_t cost = RowsCost(p, seq, 0, GroupSize(p) * seq.q_size);
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      tasks.push_back({&seq, head, 0, 0, cost});
    }
  }
  LongestFirst(&tasks);
  return tasks;
}

// Row tiles that share each converted key block: as many as leave every worker several tasks and
// keep Q and O of all tiles within half of a typical L2. Eight were 3% faster than four.
int RowTilesPerTask(const Problem& p, const std::vector<Sequence>& sequences, int workers) {
  constexpr int64_t kMaxTiles = 8, kTasksPerWorker = 4, kL2Share = 512 * 1024;
  const int64_t tile_bytes = kRowTile * (p.head_dim + p.head_dim_v) * sizeof(float);
  const auto num_tasks = [&](int64_t tiles_per_task) {
    int64_t tasks = 0;
    for (const Sequence& seq : sequences) tasks += CeilDiv(seq.num_row_tiles, tiles_per_task);
    return p.num_kv_heads * tasks;
  };
  int64_t n = 1;
  for (const Sequence& seq : sequences) n = std::max(n, seq.num_row_tiles);
  n = std::max<int64_t>(1, std::min({kMaxTiles, kL2Share / tile_bytes, n}));
  while (n > 1 && num_tasks(n) < kTasksPerWorker * workers) --n;
  return static_cast<int>(n);
}

// Tasks, some of which visit a part of their keys, and the merges that these call for.
struct SplitTasks {
  std::vector<Task> tasks;
  std::vector<Merge> merges;
  int64_t num_partials = 0;

  void KeepPartialsAt(float* memory, size_t floats_each) {
    auto merge = merges.begin();
    int64_t part = 0;
    for (Task& task : tasks) {
      if (task.key_end == INT64_MAX) continue;
      if (part == 0) merge->partials = memory;
      task.partial = memory;
      memory += floats_each;
      if (++part == merge->num_parts) {
        part = 0;
        ++merge;
      }
    }
  }
};

// The keys that some row of a sequence sees, from the first to the last.
struct Keys {
  int64_t begin, end;
};

Keys AllVisibleKeys(const Problem& p, const Sequence& seq) {
  RowSpan span = RowSpan::Empty();
  for (int64_t t = 0; t < seq.q_len; ++t) {
    const KeyRange keys = VisibleKeys(p, seq, t);
    if (keys.lo < keys.hi) span.AddRow(keys);
  }
  return span.hi > 0 ? Keys{span.First(), span.hi} : Keys{0, 0};
}

// Decoding may have fewer (sequence, key head) than there are workers: where there are few row
// tiles, and a sequence has one, its keys are shared out too. Into how many parts depends on sizes
// alone, so that results are the same bits on any number of workers.
SplitTasks SplitKeys(const Problem& p, const std::vector<Sequence>& sequences,
                     const std::vector<Task>& tasks) {
  constexpr int64_t kMostTasks = 256, kLeastKeys = 1024;
  int64_t tiles = 0;
  for (const Sequence& seq : sequences) tiles += p.num_kv_heads * seq.num_row_tiles;
  SplitTasks split;
  for (const Task& task : tasks) {
    int64_t num_parts = 1, part_keys = 0;
    Keys keys = {0, 0};
    if (task.sequence->num_row_tiles == 1 && 2 * tiles <= kMostTasks) {
      keys = AllVisibleKeys(p, *task.sequence);
      const int64_t num_keys = keys.end - keys.begin;
      const int64_t least = std::max(kLeastKeys, CeilDiv(num_keys, kMostTasks / tiles));
      part_keys = CeilDiv(least, kFwdKeyBlock) * kFwdKeyBlock;
      num_parts = CeilDiv(num_keys, part_keys);
    }
    if (num_parts < 2) {
      split.tasks.push_back(task);
      continue;
    }
    split.merges.push_back({task, nullptr, num_parts});
    split.num_partials += num_parts;
    for (int64_t i = 0; i < num_parts; ++i) {
      Task part = task;
      part.key_begin = keys.begin + i * part_keys;
      part.key_end = part.key_begin + part_keys;
      split.tasks.push_back(part);
    }
  }
  return split;
}

// Whether whole heads as tasks keep the workers busy. Going by rows and by keys instead costs
// seven products for five.
bool KeepBusy(const std::vector<Task>& head_tasks, int workers) {
  std::priority_queue<int64_t, std::vector<int64_t>, std::greater<int64_t>> busy_until;
  for (int i = 0; i < workers; ++i) busy_until.push(0);
  int64_t total = 0, all_done = 0;
  for (const Task& task : head_tasks) {
    const int64_t done = busy_until.top() + task.cost;
    busy_until.pop();
    busy_until.push(done);
    total += task.cost;
    all_done = std::max(all_done, done);
  }
  return 7 * total >= 5 * all_done * workers;
}

constexpr int64_t kAlignment = 64;  // of what is saved
static_assert(sizeof(RowSpan) == kAlignment, "all of the spans are whole cache lines");

}  // namespace

bool Forward(const FwdArgs& args, Executor& executor) {
  const Problem& p = args.problem;
  const Kernels& kernels = Isas();
  const int workers = executor.num_workers();
  const std::vector<Sequence> sequences = MakeSequences(p);
  const int row_tiles = RowTilesPerTask(p, sequences, workers);
  SplitTasks split =
      SplitKeys(p, sequences, MakeTasks(p, sequences, Axis::kRows, int64_t{row_tiles} * kRowTile));
  if (split.tasks.empty()) return true;
  Scratch scratch, partials;
  if (!scratch.Allocate(workers, kernels.forward_scratch_floats(p, row_tiles)) ||
      !partials.Allocate(1, split.num_partials * kernels.forward_partial_floats(p))) {
    return false;
  }
  split.KeepPartialsAt(partials[0], kernels.forward_partial_floats(p));
  executor.ParallelFor(split.tasks.size(), [&](int worker, int64_t task) {
    kernels.forward(args, split.tasks[task], scratch[worker]);
  });
  executor.ParallelFor(split.merges.size(), [&](int worker, int64_t merge) {
    kernels.merge(args, split.merges[merge], scratch[worker]);
  });
  return true;
}

bool Backward(const BwdArgs& args, Executor& executor) {
  const Problem& p = args.problem;
  const Kernels& kernels = Isas();
  const int workers = executor.num_workers();
  Scratch scratch;
  if (!scratch.Allocate(workers, kernels.backward_scratch_floats(p))) return false;
  const std::vector<Sequence> sequences = MakeSequences(p);
  int64_t row_tiles = 0;
  for (const Sequence& seq : sequences) row_tiles += p.num_kv_heads * seq.num_row_tiles;
  const uintptr_t aligned =
      CeilDiv(reinterpret_cast<uintptr_t>(args.scratch), kAlignment) * kAlignment;
  RowSpan* const spans = reinterpret_cast<RowSpan*>(aligned);
  const SavedTiles saved = {spans, reinterpret_cast<float*>(spans + row_tiles)};
  const auto run = [&](BwdPass pass, const std::vector<Task>& tasks) {
    if (tasks.empty()) return;
    executor.ParallelFor(tasks.size(), [&](int worker, int64_t task) {
      kernels.backward(args, saved, pass, tasks[task], scratch[worker]);
    });
  };
  const std::vector<Task> head_tasks = MakeHeadTasks(p, sequences);
  if (KeepBusy(head_tasks, workers)) {
    run(BwdPass::kAll, head_tasks);
    return true;
  }
  run(BwdPass::kDQ, MakeTasks(p, sequences, Axis::kRows, kRowTile));
  const int key_block = kernels.backward_key_block(p, BwdPass::kDKV);
  run(BwdPass::kDKV, MakeTasks(p, sequences, Axis::kKeys, key_block));
  return true;
}

int64_t BwdScratchFloats(int64_t batch, int64_t q_len, int64_t num_heads, int64_t num_kv_heads,
                         int64_t head_dim, int64_t num_sequences) {
  // Each packed sequence, and the padding on either side, may begin a tile that it does not fill.
  const int64_t partial_tiles = num_sequences > 0 ? num_sequences + 2 : 0;
  const int64_t row_tiles = CeilDiv(num_heads / num_kv_heads * q_len, kRowTile) + partial_tiles;
  const int64_t floats_per_tile = sizeof(RowSpan) / sizeof(float) + SavedFloatsPerTile(head_dim);
  return batch * num_kv_heads * row_tiles * floats_per_tile + kAlignment / sizeof(float);
}

const char* Isa() { return Isas().name; }

}  // namespace jfa::cpu
