// What to run on a GPU: from static features (Variant) to kernels and from sizes to grids.
//
// Pure functions over plain structs: no CUDA call, no file, no global, so all of it is tested on a
// machine without a GPU. Support rules live here and nowhere else; Python asks through module.cc.
#ifndef JAX_FLASHATTN_CC_PLAN_H_
#define JAX_FLASHATTN_CC_PLAN_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace jfa {

enum class Op { kFwd, kBwd, kDecode };
enum class DType { kF16, kBF16 };  // of the output, and of inputs that aren't of 8 bits
// What the mask does to the code. Causal is the one-sided case that needs no left bound.
enum class Mask { kFull, kCausal, kLocal };

// Kernels that do the same on different hardware. kAny is the plan's own choice; another one is
// taken wherever it supports the variant (a hook for tests: ForcedFamily of call.h).
enum class Family { kAny, kSm80, kSm90 };

// How the forward's row tiles are dealt out: a CTA for each, or CTAs that stay and take one after
// the other, no more of them than multiprocessors. kAny is the plan's own choice.
enum class Schedule { kAny, kGrid, kPersistent };

// What tiles depend on of a dense call's number of keys: up to 1024; up to 4096, or unknown; more.
enum class Length { kShort, kMedium, kLong };
Length LengthOf(int64_t kv_len);

// All that changes code, and the schedule, which not every kernel has. Lengths, offsets, window
// sizes, scale, cap, slopes and group size are run-time values.
struct Variant {
  Op op;
  DType dtype;
  int head_dim;  // true sizes; the plan rounds them to a tile class
  int head_dim_v;
  Mask mask;
  bool softcap;
  bool alibi;
  bool segments;
  bool packed;         // cu_seqlens
  bool deterministic;  // backward only: bitwise repeatable dQ
  bool dslopes;        // backward only: the gradient of ALiBi's slopes
  bool paged;          // keys are in pages; forward only, decode's code is the same for both
  int64_t rows;  // decode only: queries of one key head, q_len * group; rounded to a tile class
  // Inputs of 8-bit floats, e4m3 but for those that are e5m2; not in backward. All three of them,
  // or keys and values alone.
  bool fp8 = false;
  bool fp8_kv = false;
  bool heads_first =
      false;  // decode of them: a head's keys, not a key's heads, are beside each other
  bool e5m2_q = false, e5m2_k = false, e5m2_v = false;
  bool two_level = false;  // products with V are added in f32, block by block
  Family family = Family::kAny;
  Length keys = Length::kMedium;  // forward only
  Schedule schedule = Schedule::kAny;
};

bool operator==(const Variant& a, const Variant& b);

// One kernel, ready to be compiled: the file under cc/kernels/, the fields of its `struct Config`,
// and how it is launched. Two KernelSpecs with the same fields are the same code.
struct KernelSpec {
  std::string file;    // "fwd_sm80.cuh"
  std::string symbol;  // extern "C" name, says the variant: "jfa_fwd_sm80_bf16_d128_causal"
  std::vector<std::pair<std::string, std::string>> config;  // {"kHeadDim", "128"}: name, C++ value
  int threads;
  int smem_bytes;  // dynamic shared memory
  // Rows of the boxes of its tensor maps, which its parameters begin with; 0: it takes none.
  int box_rows_q = 0;
  int box_rows_kv = 0;  // with pages at most: a box never spans two
  int box_heads = 1;    // key heads whose rows a box has beside each other
  // It is launched while the kernel before it runs, and waits for its results by itself.
  bool starts_early = false;
  int q_bytes = 2, kv_bytes = 2;  // of an element of q, and of k and v
  // Fields of `config` as numbers, 0 where there is none: every call asks for them, and a search
  // among names takes longer than all else that a call computes.
  struct {
    int block_m, block_n, rows, tile_heads, head_dim, head_dim_v, min_blocks;
    bool counted, finder_warp;
  } fields = {};
};

// The kernels of one call in launch order (forward: 1; backward: preprocess, main, postprocess;
// decode: by DecodeKernel, of which a call takes the first two or the last, if that is there).
// `error` is non-empty, and kernels empty, when nothing supports the variant on that arch.
struct Plan {
  std::vector<KernelSpec> kernels;
  std::string error;
};

enum DecodeKernel { kDecodeStretches, kDecodeCombine, kDecodeParts };

// arch is major * 10 + minor: 80, 86, 89, 90, 100, 120.
Plan MakePlan(const Variant& variant, int arch);

// Sizes of one call, as Execute sees them (a shard's, under sharding).
struct Problem {
  int64_t batch;
  int64_t num_kv_heads;
  int64_t group;  // query heads per key head
  int64_t q_len;
  int64_t kv_len;
  int64_t num_sequences;  // of a packed batch; 0 if it is dense
  // Decode only: the room for partial results, which bounds the CTAs, and what one row takes.
  int64_t scratch_floats = 0;
  int64_t head_dim_v = 0;
  bool has_counter = false;  // forward only: there is a word of memory to count tiles with
  bool alike = false;        // all its sequences have the same lengths
  int64_t page_size = 0;     // 0: keys aren't in pages
  int forced_cluster = -1;   // CTAs that share a tile, 0 for none; -1: the plan chooses
};

// Whether its CTAs stay: kernel `index` of the plan.
bool StaysOnMultiprocessors(const Plan& plan, int index, const Variant& variant);

// How the Hopper forward's row tiles are shared out.
struct ForwardShare {
  bool counted = false;  // CTAs that stay take tiles as they get free, by a counter, not in turn
  bool paired = false;   // FwdSm90Params::paired: a work item is a long row tile and a short one
};

// Key heads of a decode call's tile.
int DecodeTileHeads(const KernelSpec& kernel);
// Tiles of a decode call's queries of those.
int DecodeRowTiles(const KernelSpec& kernel, const Problem& problem);
// Who visits the key blocks of a decode call.
struct DecodeShare {
  int64_t ctas = 0;               // 0: the call can't be run
  int kernel = kDecodeStretches;  // of the plan: that one, or kDecodeParts
  int parts_log2 = 0;             // kDecodeParts: how many CTAs, a cluster, share one tile
  int parts = 0;                  // kDecodeStretches: of a tile, if all visit as many blocks; or 0
  int merge_log2 = 0;             // kDecodeCombine: how many warps merge a row
};

// Who does what of a call, for all its kernels, on a GPU with that many multiprocessors.
struct Share {
  int multiprocessors = 0;
  ForwardShare forward;
  DecodeShare decode;
};
Share ShareWork(const Plan& plan, const Variant& variant, const Problem& problem,
                int multiprocessors);

struct Grid {
  uint32_t x, y, z;
  uint32_t cluster = 1;  // so many CTAs that follow each other run at the same time
};
// Grid of kernel `index` of the plan. Any zero extent means: nothing to launch.
Grid MakeGrid(const Plan& plan, int index, const Variant& variant, const Problem& problem,
              const Share& share);

// What results that XLA plans must hold for one (batch, kv head); from static sizes only.
// Rows of backward scratch for one query head: sequences are padded to whole tiles.
int64_t ScratchRows(int64_t q_len, int64_t num_sequences);
// float32 words of scratch; 0 for none.
int64_t ScratchFloats(const Variant& variant, int64_t group, int64_t q_len, int64_t num_sequences);
// float32 words of a whole decode call's scratch that let any GPU use all its CTAs.
int64_t DecodeScratchFloats(const Variant& variant, const Problem& problem);
// Places for what warps of key tiles add to the slope of one query head.
int64_t SlopePartials(int64_t kv_len, int64_t num_sequences);

// NVRTC's --gpu-architecture for an arch: "sm_80", "sm_90a".
std::string ArchName(int arch);

// Source that NVRTC compiles: `struct Config {...};`, `#include "<file>"` and the extern "C" entry.
std::string SourceStub(const KernelSpec& kernel);

// One line per kernel for people: symbol, tiles, threads, shared memory.
std::string Describe(const Plan& plan);

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_PLAN_H_
