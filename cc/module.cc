// The Python module `_native`: FFI handlers as capsules, and plain functions. No logic of its own.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cc/call.h"
#include "cc/cpu/attention.h"
#include "cc/cpu/handlers.h"
#include "cc/driver.h"
#include "cc/handlers.h"
#include "cc/jit.h"
#include "cc/plan.h"
#include "cc/status.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace {

nb::capsule Capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict CpuHandlers() {
  nb::dict handlers;
  handlers["jfa_fwd_v4"] = Capsule(jfa::cpu::FwdExecute);
  handlers["jfa_bwd_v3"] = Capsule(jfa::cpu::BwdExecute);
  handlers["jfa_paged_v1"] = Capsule(jfa::cpu::PagedExecute);
  return handlers;
}

nb::dict Stages(XLA_FFI_Handler* instantiate, XLA_FFI_Handler* initialize,
                XLA_FFI_Handler* execute) {
  nb::dict stages;
  stages["instantiate"] = Capsule(instantiate);
  stages["initialize"] = Capsule(initialize);
  stages["execute"] = Capsule(execute);
  return stages;
}

nb::dict CudaHandlers() {
  nb::dict handlers;
  handlers["jfa_fwd_v4"] =
      Stages(jfa::CudaFwdInstantiate, jfa::CudaFwdInitialize, jfa::CudaFwdExecute);
  handlers["jfa_bwd_v3"] =
      Stages(jfa::CudaBwdInstantiate, jfa::CudaBwdInitialize, jfa::CudaBwdExecute);
  handlers["jfa_serve_v2"] =
      Stages(jfa::CudaServeInstantiate, jfa::CudaServeInitialize, jfa::CudaServeExecute);
  return handlers;
}

nb::dict CudaStateType() {
  nb::dict type;
  type["type_id"] = nb::capsule(jfa::CudaStateTypeId());
  type["type_info"] = nb::capsule(jfa::CudaStateTypeInfo());
  return type;
}

// A Python RuntimeError with the status' message; it is the only way errors leave this file.
void Raise(const jfa::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

// What changes code, as Python spells it: op "fwd", "bwd" or "decode", dtype "float16" or
// "bfloat16", mask "full", "causal" or "local", features by the names of Variant's flags.
jfa::Variant ToVariant(const std::string& op, const std::string& dtype, int head_dim,
                       int head_dim_v, const std::string& mask,
                       const std::vector<std::string>& features, int64_t rows, int64_t kv_len) {
  jfa::Variant variant{};
  variant.rows = rows;
  variant.keys = jfa::LengthOf(kv_len);
  variant.op = op == "bwd" ? jfa::Op::kBwd : op == "decode" ? jfa::Op::kDecode : jfa::Op::kFwd;
  variant.dtype = dtype == "float16" ? jfa::DType::kF16 : jfa::DType::kBF16;
  variant.head_dim = head_dim;
  variant.head_dim_v = head_dim_v;
  variant.mask = mask == "local"    ? jfa::Mask::kLocal
                 : mask == "causal" ? jfa::Mask::kCausal
                                    : jfa::Mask::kFull;
  const std::pair<const char*, bool*> flags[] = {
      {"softcap", &variant.softcap},   {"alibi", &variant.alibi},
      {"segments", &variant.segments}, {"packed", &variant.packed},
      {"dslopes", &variant.dslopes},   {"deterministic", &variant.deterministic},
      {"paged", &variant.paged},       {"fp8", &variant.fp8},
      {"fp8_kv", &variant.fp8_kv},     {"two_level", &variant.two_level},
      {"e5m2_q", &variant.e5m2_q},     {"e5m2_k", &variant.e5m2_k},
      {"e5m2_v", &variant.e5m2_v},     {"heads_first", &variant.heads_first}};
  for (const std::string& feature : features) {
    if (feature == "grid" || feature == "persistent") {
      variant.schedule = feature == "grid" ? jfa::Schedule::kGrid : jfa::Schedule::kPersistent;
      continue;
    }
    const auto flag = std::find_if(std::begin(flags), std::end(flags),
                                   [&](const auto& known) { return feature == known.first; });
    if (flag == std::end(flags)) throw std::invalid_argument("unknown feature " + feature);
    *flag->second = true;
  }
  Raise(jfa::ForcedFamily(&variant.family));
  return variant;
}

nb::dict ToDict(const jfa::jit::Result& result) {
  const jfa::jit::CompiledKernel& kernel = *result.kernel;
  nb::dict dict;
  dict["symbol"] = kernel.symbol;
  dict["key"] = kernel.key;
  dict["arch"] = kernel.arch_name;
  dict["origin"] = jfa::jit::OriginName(result.origin);
  dict["registers"] = kernel.resources.registers;
  dict["local_bytes"] = kernel.resources.local_bytes;
  dict["spill_bytes"] = kernel.resources.spill_bytes;
  dict["log"] = kernel.log;
  dict["cubin"] = nb::bytes(kernel.cubin.data(), kernel.cubin.size());
  return dict;
}

nb::dict Explain(const std::string& op, const std::string& dtype, int head_dim, int head_dim_v,
                 const std::string& mask, const std::vector<std::string>& features, int arch,
                 int64_t rows, int64_t kv_len) {
  const jfa::Variant variant =
      ToVariant(op, dtype, head_dim, head_dim_v, mask, features, rows, kv_len);
  const jfa::Plan plan = jfa::MakePlan(variant, arch);
  nb::dict dict;
  nb::list kernels;
  for (size_t i = 0; i < plan.kernels.size(); ++i) {
    const jfa::KernelSpec& kernel = plan.kernels[i];
    nb::dict config;
    for (const auto& [name, value] : kernel.config) config[name.c_str()] = value;
    nb::dict row;
    row["symbol"] = kernel.symbol;
    row["file"] = kernel.file;
    row["config"] = config;
    row["threads"] = kernel.threads;
    row["smem_bytes"] = kernel.smem_bytes;
    row["schedule"] =
        jfa::StaysOnMultiprocessors(plan, static_cast<int>(i), variant) ? "persistent" : "grid";
    // Without NVRTC, whose version is part of it, there is no key.
    std::string key;
    row["key"] = nb::none();
    if (jfa::jit::CacheKey(kernel.symbol, jfa::SourceStub(kernel), jfa::ArchName(arch), &key)
            .ok()) {
      row["key"] = key;
    }
    kernels.append(row);
  }
  dict["arch"] = jfa::ArchName(arch);
  dict["kernels"] = kernels;
  dict["error"] = plan.error;
  return dict;
}

// How a dense forward call is shared out: CTAs, whether they count tiles, whether these are paired.
nb::tuple ForwardShare(int head_dim, const std::string& mask,
                       const std::vector<std::string>& features, int arch, int64_t num_heads,
                       int64_t q_len, int64_t kv_len, int multiprocessors) {
  const jfa::Variant variant =
      ToVariant("fwd", "bfloat16", head_dim, head_dim, mask, features, 0, kv_len);
  const jfa::Plan plan = jfa::MakePlan(variant, arch);
  if (!plan.error.empty()) throw std::invalid_argument(plan.error);
  jfa::Problem problem = {1, num_heads, 1, q_len, kv_len, 0};
  problem.has_counter = true;
  const jfa::Share share = jfa::ShareWork(plan, variant, problem, multiprocessors);
  const jfa::Grid grid = jfa::MakeGrid(plan, 0, variant, problem, share);
  return nb::make_tuple(grid.x, share.forward.counted, share.forward.paired);
}

nb::list Warm(const std::string& op, const std::string& dtype, int head_dim, int head_dim_v,
              const std::string& mask, const std::vector<std::string>& features, int arch,
              int64_t rows, int64_t kv_len) {
  std::vector<jfa::jit::Result> results;
  {
    nb::gil_scoped_release release;
    Raise(jfa::jit::Warm(ToVariant(op, dtype, head_dim, head_dim_v, mask, features, rows, kv_len),
                         arch, &results));
  }
  nb::list list;
  for (const auto& result : results) list.append(ToDict(result));
  return list;
}

nb::dict CompileSource(const std::string& symbol, const std::string& source,
                       const std::string& arch_name) {
  jfa::jit::Result result;
  {
    nb::gil_scoped_release release;
    Raise(jfa::jit::GetOrCompileSource(symbol, source, arch_name, &result));
  }
  return ToDict(result);
}

nb::dict JitStats() {
  const jfa::jit::JitStats stats = jfa::jit::Stats();
  nb::dict dict;
  dict["compiles"] = stats.compiles;
  dict["compile_failures"] = stats.compile_failures;
  dict["disk_hits"] = stats.disk_hits;
  dict["memory_hits"] = stats.memory_hits;
  dict["store_failures"] = stats.store_failures;
  dict["compile_ms"] = stats.compile_ms;
  dict["disk_ms"] = stats.disk_ms;
  dict["key_ms"] = stats.key_ms;
  return dict;
}

nb::dict CudaDevices() {
  std::vector<jfa::driver::DeviceInfo> devices;
  int driver_version = 0;
  Raise(jfa::driver::ListDevices(&devices, &driver_version));
  nb::list list;
  for (const auto& device : devices) {
    nb::dict row;
    row["ordinal"] = device.ordinal;
    row["name"] = device.name;
    row["arch"] = jfa::ArchName(device.arch);
    list.append(row);
  }
  nb::dict dict;
  dict["devices"] = list;
  dict["driver_version"] = driver_version;
  return dict;
}

std::string NvrtcVersion() {
  const jfa::driver::Nvrtc* nvrtc = nullptr;
  Raise(jfa::driver::GetNvrtc(&nvrtc));
  return nvrtc->VersionText();
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("ffi_api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });

  m.def("cpu_handlers", &CpuHandlers);
  m.def("cpu_isa", &jfa::cpu::Isa);
  m.def(
      "cpu_bwd_scratch_floats",
      [](int64_t q_len, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
         int64_t num_sequences) {
        return jfa::cpu::BwdScratchFloats(1, q_len, num_heads, num_kv_heads, head_dim,
                                          num_sequences);
      },
      nb::arg("q_len"), nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"),
      nb::arg("num_sequences"));

  m.def("cuda_handlers", &CudaHandlers);
  m.def("cuda_state_type", &CudaStateType);
  m.def("cuda_devices", &CudaDevices);
  m.def(
      "cuda_bwd_scratch_floats",
      [](int head_dim, int head_dim_v, bool deterministic, int64_t group, int64_t q_len,
         int64_t num_sequences) {
        jfa::Variant variant{};
        variant.op = jfa::Op::kBwd;
        variant.head_dim = head_dim;
        variant.head_dim_v = head_dim_v;
        variant.deterministic = deterministic;
        return jfa::ScratchFloats(variant, group, q_len, num_sequences);
      },
      nb::arg("head_dim"), nb::arg("head_dim_v"), nb::arg("deterministic"), nb::arg("group"),
      nb::arg("q_len"), nb::arg("num_sequences"));
  m.def(
      "cuda_decode_scratch_floats",
      [](int64_t batch, int64_t num_kv_heads, int64_t group, int64_t q_len, int64_t kv_len,
         int head_dim_v) {
        jfa::Variant variant{};
        variant.head_dim_v = head_dim_v;
        return jfa::DecodeScratchFloats(variant, {batch, num_kv_heads, group, q_len, kv_len, 0});
      },
      nb::arg("batch"), nb::arg("num_kv_heads"), nb::arg("group"), nb::arg("q_len"),
      nb::arg("kv_len"), nb::arg("head_dim_v"));
  m.def(
      "cuda_decode_share",
      [](int head_dim, int64_t batch, int64_t num_kv_heads, int64_t group, int64_t q_len,
         int64_t kv_len, int64_t page_size, bool alike, int arch, int multiprocessors) {
        jfa::Variant variant{};
        variant.op = jfa::Op::kDecode;
        variant.head_dim = variant.head_dim_v = head_dim;
        variant.rows = group * q_len;
        jfa::Problem problem = {batch, num_kv_heads, group, q_len, kv_len, 0};
        problem.scratch_floats = jfa::DecodeScratchFloats(variant, problem);
        problem.head_dim_v = head_dim;
        problem.page_size = page_size;
        problem.alike = alike;
        Raise(jfa::ForcedCluster(&problem.forced_cluster));
        const jfa::Plan plan = jfa::MakePlan(variant, arch);
        if (!plan.error.empty()) throw std::invalid_argument(plan.error);
        const jfa::DecodeShare share =
            jfa::ShareWork(plan, variant, problem, multiprocessors).decode;
        const bool parts = share.kernel == jfa::kDecodeParts;
        return nb::make_tuple(share.ctas, parts ? 1 << share.parts_log2 : 0);
      },
      nb::arg("head_dim"), nb::arg("batch"), nb::arg("num_kv_heads"), nb::arg("group"),
      nb::arg("q_len"), nb::arg("kv_len"), nb::arg("page_size"), nb::arg("alike"), nb::arg("arch"),
      nb::arg("multiprocessors"));
  m.def("cuda_slope_partials", &jfa::SlopePartials, nb::arg("kv_len"), nb::arg("num_sequences"));
  m.def("cuda_explain", &Explain, nb::arg("op"), nb::arg("dtype"), nb::arg("head_dim"),
        nb::arg("head_dim_v"), nb::arg("mask"), nb::arg("features"), nb::arg("arch"),
        nb::arg("rows") = 0, nb::arg("kv_len") = 0);
  m.def("cuda_forward_share", &ForwardShare, nb::arg("head_dim"), nb::arg("mask"),
        nb::arg("features"), nb::arg("arch"), nb::arg("num_heads"), nb::arg("q_len"),
        nb::arg("kv_len"), nb::arg("multiprocessors"));
  m.def("cuda_warm", &Warm, nb::arg("op"), nb::arg("dtype"), nb::arg("head_dim"),
        nb::arg("head_dim_v"), nb::arg("mask"), nb::arg("features"), nb::arg("arch"),
        nb::arg("rows") = 0, nb::arg("kv_len") = 0);

  m.def("jit_compile_source", &CompileSource, nb::arg("symbol"), nb::arg("source"),
        nb::arg("arch_name"));
  m.def("jit_stats", &JitStats);
  m.def("jit_clear_memory", &jfa::jit::ClearMemory);
  m.def("jit_cache_dir", &jfa::jit::CacheDir);
  m.def("nvrtc_version", &NvrtcVersion);
  m.def("set_nvrtc_search_paths", &jfa::driver::SetNvrtcSearchPaths, nb::arg("directories"));
  m.def("kernel_sources_sha256", &jfa::jit::KernelSourcesSha256);
}
