// Kernel sources to cubins: NVRTC behind a memory cache and a disk cache.
//
// A key is the SHA-256 of everything that can change the cubin (schema, the sources that are really
// included, options, architecture, NVRTC version) and of nothing else: no path, no time. All
// functions may be called from any number of threads at once.
#ifndef JAX_FLASHATTN_CC_JIT_H_
#define JAX_FLASHATTN_CC_JIT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cc/cubin.h"
#include "cc/plan.h"
#include "cc/status.h"

namespace jfa::jit {

struct CompiledKernel {
  std::string key;
  std::string symbol;
  std::string cubin;
  std::string log;  // NVRTC's and ptxas's; best effort
  std::string arch_name;
  KernelResources resources;
};

enum class Origin { kCompiled, kDisk, kMemory };
const char* OriginName(Origin origin);  // "compiled", "disk", "memory"

struct Result {
  std::shared_ptr<const CompiledKernel> kernel;
  Origin origin = Origin::kCompiled;
};

// The cubin of one kernel, from memory, from disk, or compiled now. One compile per key runs in a
// process, other callers wait for it. A failure goes to all who waited and isn't remembered.
// With JFA_DISABLE_JIT=1, what isn't cached fails with "KernelNotCachedError: ...".
Status GetOrCompile(const KernelSpec& kernel, int arch, Result* result);

// The same for any source text, the layer under it: for tests of the cache.
Status GetOrCompileSource(const std::string& symbol, const std::string& source,
                          const std::string& arch_name, Result* result);

// All kernels of a plan, in its order; they are compiled side by side.
Status CompilePlan(const Plan& plan, int arch, std::vector<Result>* results);

// Plans and compiles what a call of this variant needs, so that the call finds it cached.
Status Warm(const Variant& variant, int arch, std::vector<Result>* results);

// The key alone.
Status CacheKey(const std::string& symbol, const std::string& source, const std::string& arch_name,
                std::string* key);

struct JitStats {
  int64_t compiles = 0;
  int64_t compile_failures = 0;
  int64_t disk_hits = 0;
  int64_t memory_hits = 0;     // waiting for another thread's compile counts as one
  int64_t store_failures = 0;  // the entry stayed in memory only
  double compile_ms = 0;       // in NVRTC, summed over threads
  double disk_ms = 0;          // reading entries, found or not
  double key_ms = 0;
  std::string last_store_error;
};
JitStats Stats();

// Drops the memory cache, for tests. Kernels in use stay alive.
void ClearMemory();

// Where entries are kept; empty if there is no such place.
std::string CacheDir();

// One hash over cc/kernels/* (as JFA_KERNEL_DIR overrides them) and plan.{cc,h}, the same as
// `cd cc && LC_ALL=C sha256sum kernels/* plan.cc plan.h | sha256sum`.
std::string KernelSourcesSha256();

}  // namespace jfa::jit

#endif  // JAX_FLASHATTN_CC_JIT_H_
