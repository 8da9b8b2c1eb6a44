// Memory cache -> disk cache -> NVRTC. The map's lock is held for look-ups only.
#include "cc/jit.h"

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>

#include "cc/disk_cache.h"
#include "cc/driver.h"
#include "cc/kernel_sources.h"
#include "cc/sha256.h"
#include "cc/sources.h"

namespace jfa::jit {
namespace {

// Part of every key. Raise it when a key of the same parts would come to mean another cubin.
constexpr char kSchema[] = "jfa-jit-1";

using driver::Nvrtc;

class Timer {
 public:
  double Milliseconds() const {
    return std::chrono::duration<double, std::milli>(Clock::now() - start_).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now();
};

struct SharedStats {
  std::mutex mutex;
  JitStats stats;
};

SharedStats& Shared() {
  static auto* shared = new SharedStats;
  return *shared;
}

template <typename Change>
void Count(Change change) {
  std::lock_guard<std::mutex> lock(Shared().mutex);
  change(Shared().stats);
}

// All that goes into one compile, and so into its key.
struct Job {
  std::string symbol;
  std::string source;
  std::string arch_name;
  SourceFiles headers;
  std::vector<std::string> options;
  const Nvrtc* nvrtc = nullptr;
  std::string key;
};

bool AtLeast(const Nvrtc& nvrtc, int major, int minor) {
  return nvrtc.major > major || (nvrtc.major == major && nvrtc.minor >= minor);
}

std::vector<std::string> Options(const Nvrtc& nvrtc, const std::string& arch_name) {
  std::vector<std::string> options = {
      "--gpu-architecture=" + arch_name,  // sm_XX: a cubin for exactly this GPU, never PTX
      "--std=c++17",
      "--device-as-default-execution-space",
      "--ptxas-options=-v",  // the log then has register counts and spills
  };
  // NVRTC's own cache, from 12.9 on, drops the log on a hit, and we have one of our own.
  if (AtLeast(nvrtc, 12, 9)) options.push_back("--no-cache");
  return options;
}

// The NVRTC that first knows an architecture, where that is newer than the oldest one we take.
Status CheckArch(const Nvrtc& nvrtc, const std::string& arch_name) {
  struct Minimum {
    std::string_view digits;
    int major, minor;
  };
  static constexpr Minimum kMinimums[] = {{"100", 12, 8}, {"101", 12, 8}, {"103", 12, 9},
                                          {"110", 13, 0}, {"120", 12, 8}, {"121", 12, 9}};
  for (const Minimum& minimum : kMinimums) {
    if (arch_name.substr(0, 6) == "sm_" + std::string(minimum.digits) &&
        !AtLeast(nvrtc, minimum.major, minimum.minor)) {
      return FailedPrecondition("jax_flashattn: " + arch_name + " needs NVRTC " +
                                std::to_string(minimum.major) + "." +
                                std::to_string(minimum.minor) + " or newer, found " +
                                nvrtc.VersionText() + " (" + nvrtc.path +
                                "); upgrade nvidia-cuda-nvrtc (nvidia-cuda-nvrtc-cu12 for CUDA "
                                "12) or set JFA_NVRTC_PATH to a newer one");
    }
  }
  return OkStatus();
}

Status MakeJob(const std::string& symbol, const std::string& source, const std::string& arch_name,
               Job* job) {
  const Nvrtc* nvrtc;
  JFA_RETURN_IF_ERROR(driver::GetNvrtc(&nvrtc));
  JFA_RETURN_IF_ERROR(CheckArch(*nvrtc, arch_name));
  const Timer timer;
  *job = {symbol, source, arch_name, IncludedFiles(source), Options(*nvrtc, arch_name), nvrtc, ""};

  Sha256 hash;
  hash.UpdateField(kSchema).UpdateField(nvrtc->VersionText()).UpdateField(arch_name);
  hash.UpdateField(std::to_string(job->options.size()));
  for (const std::string& option : job->options) hash.UpdateField(option);
  for (const auto& file : job->headers) hash.UpdateField(file->name).UpdateField(file->sha256);
  hash.UpdateField(symbol).UpdateField(source);
  job->key = hash.FinishHex();
  Count([&](JitStats& stats) { stats.key_ms += timer.Milliseconds(); });
  return OkStatus();
}

class Program {
 public:
  explicit Program(const Nvrtc& nvrtc) : nvrtc_(nvrtc) {}
  ~Program() {
    if (program_ != nullptr) nvrtc_.destroy_program(&program_);
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  driver::NvrtcProgram* address() { return &program_; }
  driver::NvrtcProgram get() const { return program_; }

  std::string Log() const {
    size_t size = 0;
    if (nvrtc_.get_program_log_size(program_, &size) != 0 || size <= 1) return "";
    std::string log(size, '\0');
    if (nvrtc_.get_program_log(program_, log.data()) != 0) return "";
    log.resize(size - 1);
    return log;
  }

 private:
  const Nvrtc& nvrtc_;
  driver::NvrtcProgram program_ = nullptr;
};

// Fills in what a cubin itself says.
Status Finish(CompiledKernel* kernel) {
  JFA_RETURN_IF_ERROR(ReadResources(kernel->cubin, kernel->symbol, &kernel->resources));
  kernel->resources.spill_bytes = SpillBytes(kernel->log);
  return OkStatus();
}

Status Compile(const Job& job, CompiledKernel* kernel) {
  const Nvrtc& nvrtc = *job.nvrtc;
  const auto error = [&](driver::NvrtcResult result, const std::string& detail) {
    return Internal("jax_flashattn: NVRTC " + nvrtc.VersionText() + " (" + nvrtc.path +
                    ") failed on " + job.symbol + " for " + job.arch_name + ": " +
                    nvrtc.get_error_string(result) + (detail.empty() ? "" : "\n" + detail));
  };
  std::vector<const char*> headers, names, options;
  for (const auto& file : job.headers) {
    headers.push_back(file->contents.c_str());
    names.push_back(file->name.c_str());
  }
  for (const std::string& option : job.options) options.push_back(option.c_str());

  Program program(nvrtc);
  driver::NvrtcResult result =
      nvrtc.create_program(program.address(), job.source.c_str(), (job.symbol + ".cu").c_str(),
                           static_cast<int>(headers.size()), headers.data(), names.data());
  if (result != 0) return error(result, "");
  result = nvrtc.compile_program(program.get(), static_cast<int>(options.size()), options.data());
  kernel->log = program.Log();
  if (result != 0) return error(result, kernel->log);
  size_t size = 0;
  if ((result = nvrtc.get_cubin_size(program.get(), &size)) != 0) return error(result, "");
  kernel->cubin.resize(size);
  result = nvrtc.get_cubin(program.get(), kernel->cubin.data());
  if (result != 0) return error(result, "");
  return Finish(kernel);
}

bool LoadFromDisk(const Job& job, CompiledKernel* kernel) {
  const Timer timer;
  CacheRecord record;
  bool found = ReadCacheEntry(CacheDirectory(), job.key, &record) && record.symbol == job.symbol;
  if (found) {
    kernel->cubin = std::move(record.cubin);
    kernel->log = std::move(record.log);
    found = Finish(kernel).ok();
  }
  Count([&](JitStats& stats) {
    stats.disk_ms += timer.Milliseconds();
    stats.disk_hits += found;
  });
  return found;
}

bool JitDisabled() {
  const char* value = std::getenv("JFA_DISABLE_JIT");
  return value != nullptr && *value != '\0' && std::string_view(value) != "0";
}

// Disk, else compiler. What was just compiled is used as it is; the entry isn't read back.
Status Produce(const Job& job, Result* result) {
  auto kernel = std::make_shared<CompiledKernel>();
  kernel->key = job.key;
  kernel->symbol = job.symbol;
  kernel->arch_name = job.arch_name;
  result->origin = Origin::kDisk;
  if (!LoadFromDisk(job, kernel.get())) {
    if (JitDisabled()) {
      const std::string directory = CacheDirectory();
      return FailedPrecondition(
          "KernelNotCachedError: " + job.symbol + " for " + job.arch_name + " (NVRTC " +
          job.nvrtc->VersionText() + ") isn't in the cache " +
          (directory.empty() ? "(there is no cache directory)" : directory) +
          " and JFA_DISABLE_JIT is set. Fill the cache with `python -m jax_flashattn warmup`, or "
          "unset JFA_DISABLE_JIT to compile it now");
    }
    result->origin = Origin::kCompiled;
    const Timer timer;
    const Status status = Compile(job, kernel.get());
    Count([&](JitStats& stats) {
      stats.compile_ms += timer.Milliseconds();
      ++(status.ok() ? stats.compiles : stats.compile_failures);
    });
    JFA_RETURN_IF_ERROR(status);
    const std::string failure =
        WriteCacheEntry(CacheDirectory(), job.key, {kernel->symbol, kernel->cubin, kernel->log});
    if (!failure.empty()) {
      Count([&](JitStats& stats) {
        ++stats.store_failures;
        stats.last_store_error = failure;
      });
    }
  }
  result->kernel = std::move(kernel);
  return OkStatus();
}

// One key's place in the memory cache. Waiters hold the slot, so it may leave the map meanwhile.
struct Slot {
  bool done = false;
  Status status;
  std::shared_ptr<const CompiledKernel> kernel;
};

struct MemoryCache {
  std::mutex mutex;  // guards the map and what is in the slots
  std::condition_variable slot_done;
  std::map<std::string, std::shared_ptr<Slot>> slots;
};

MemoryCache& Memory() {
  static auto* cache = new MemoryCache;
  return *cache;
}

// Runs `function`, which may run out of memory, so that no exception leaves this file.
template <typename Function>
Status NoThrow(Function function) {
  try {
    return function();
  } catch (const std::exception& e) {
    return Internal(std::string("jax_flashattn: ") + e.what());
  } catch (...) {
    return Internal("jax_flashattn: unknown exception");
  }
}

Status GetOrProduce(const Job& job, Result* result) {
  MemoryCache& cache = Memory();
  std::shared_ptr<Slot> slot;
  {
    std::unique_lock<std::mutex> lock(cache.mutex);
    const auto it = cache.slots.find(job.key);
    if (it != cache.slots.end()) {
      slot = it->second;
      cache.slot_done.wait(lock, [&] { return slot->done; });
      if (!slot->status.ok()) return slot->status;
      *result = {slot->kernel, Origin::kMemory};
      lock.unlock();
      Count([](JitStats& stats) { ++stats.memory_hits; });
      return OkStatus();
    }
    slot = std::make_shared<Slot>();
    cache.slots.emplace(job.key, slot);
  }
  Status status = NoThrow([&] { return Produce(job, result); });
  {
    std::lock_guard<std::mutex> lock(cache.mutex);
    slot->done = true;
    slot->status = status;
    slot->kernel = result->kernel;
    if (!status.ok()) {
      const auto it = cache.slots.find(job.key);
      if (it != cache.slots.end() && it->second == slot) cache.slots.erase(it);
    }
  }
  cache.slot_done.notify_all();
  return status;
}

}  // namespace

const char* OriginName(Origin origin) {
  switch (origin) {
    case Origin::kCompiled:
      return "compiled";
    case Origin::kDisk:
      return "disk";
    case Origin::kMemory:
      return "memory";
  }
  return "unknown";
}

Status GetOrCompileSource(const std::string& symbol, const std::string& source,
                          const std::string& arch_name, Result* result) {
  return NoThrow([&]() -> Status {
    Job job;
    JFA_RETURN_IF_ERROR(MakeJob(symbol, source, arch_name, &job));
    return GetOrProduce(job, result);
  });
}

Status GetOrCompile(const KernelSpec& kernel, int arch, Result* result) {
  return NoThrow([&] {
    return GetOrCompileSource(kernel.symbol, SourceStub(kernel), ArchName(arch), result);
  });
}

Status CompilePlan(const Plan& plan, int arch, std::vector<Result>* results) {
  return NoThrow([&]() -> Status {
    if (!plan.error.empty()) return Unimplemented("jax_flashattn: " + plan.error);
    const size_t count = plan.kernels.size();
    results->assign(count, Result{});
    std::vector<Status> statuses(count);
    const auto compile = [&](size_t i) {
      statuses[i] = GetOrCompile(plan.kernels[i], arch, &(*results)[i]);
    };
    std::vector<std::thread> threads;
    threads.reserve(count);
    for (size_t i = 1; i < count; ++i) {
      try {
        threads.emplace_back(compile, i);
      } catch (const std::system_error&) {
        compile(i);  // no more threads to be had: one after the other
      }
    }
    if (count > 0) compile(0);
    for (std::thread& thread : threads) thread.join();
    for (const Status& status : statuses) JFA_RETURN_IF_ERROR(status);
    return OkStatus();
  });
}

Status Warm(const Variant& variant, int arch, std::vector<Result>* results) {
  return NoThrow([&] { return CompilePlan(MakePlan(variant, arch), arch, results); });
}

Status CacheKey(const std::string& symbol, const std::string& source, const std::string& arch_name,
                std::string* key) {
  return NoThrow([&]() -> Status {
    Job job;
    JFA_RETURN_IF_ERROR(MakeJob(symbol, source, arch_name, &job));
    *key = job.key;
    return OkStatus();
  });
}

JitStats Stats() {
  std::lock_guard<std::mutex> lock(Shared().mutex);
  return Shared().stats;
}

void ClearMemory() {
  MemoryCache& cache = Memory();
  std::lock_guard<std::mutex> lock(cache.mutex);
  for (auto it = cache.slots.begin(); it != cache.slots.end();) {
    it = it->second->done ? cache.slots.erase(it) : std::next(it);
  }
}

std::string CacheDir() { return CacheDirectory(); }

std::string KernelSourcesSha256() {
  Sha256 hash;
  const auto add = [&](const std::string& sha256, const std::string& name) {
    hash.Update(sha256).Update("  ").Update(name).Update("\n");
  };
  for (const auto& file : AllKernelFiles()) add(file->sha256, "kernels/" + file->name);
  for (size_t i = 0; i < kNumPlanSources; ++i) {
    add(kPlanSources[i].sha256, kPlanSources[i].name);
  }
  return hash.FinishHex();
}

}  // namespace jfa::jit
