// dlopen of libcuda and libnvrtc; the tables are filled once and never closed.
#include "cc/driver.h"

#include <dlfcn.h>
#include <glob.h>
#include <link.h>
#include <sys/stat.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <utility>

namespace jfa::driver {
namespace {

constexpr char kInstallNvrtc[] =
    "install it with pip (nvidia-cuda-nvrtc for CUDA 13, nvidia-cuda-nvrtc-cu12 for CUDA 12; "
    "jax[cuda13] and jax[cuda12] bring it), or set JFA_NVRTC_PATH to libnvrtc.so or its directory";

// Fills a table of function pointers; remembers the first symbol that is missing.
class SymbolLoader {
 public:
  explicit SymbolLoader(void* library) : library_(library) {}

  template <typename Function>
  void Load(const char* name, Function** function) {
    *function = reinterpret_cast<Function*>(dlsym(library_, name));
    if (*function == nullptr && missing_.empty()) missing_ = name;
  }

  const std::string& missing() const { return missing_; }

 private:
  void* library_;
  std::string missing_;
};

std::string LastDlError() {
  const char* text = dlerror();
  return text != nullptr ? text : "unknown error";
}

// Opens libcuda without initialising it.
Status OpenCuda(const Cuda** out) {
  static std::mutex mutex;
  static std::atomic<const Cuda*> opened{nullptr};
  if ((*out = opened.load(std::memory_order_acquire)) != nullptr) return OkStatus();
  std::lock_guard<std::mutex> lock(mutex);
  if ((*out = opened.load(std::memory_order_acquire)) != nullptr) return OkStatus();

  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return FailedPrecondition(
        "jax_flashattn: no NVIDIA driver: libcuda.so.1 can't be opened (" + LastDlError() +
        "); install the driver, or pass the GPU's architecture to compile ahead of time");
  }
  static Cuda cuda;
  SymbolLoader symbols(library);
  symbols.Load("cuInit", &cuda.init);
  symbols.Load("cuDriverGetVersion", &cuda.driver_get_version);
  symbols.Load("cuDeviceGetCount", &cuda.device_get_count);
  symbols.Load("cuDeviceGet", &cuda.device_get);
  symbols.Load("cuDeviceGetName", &cuda.device_get_name);
  symbols.Load("cuDeviceGetAttribute", &cuda.device_get_attribute);
  symbols.Load("cuCtxGetDevice", &cuda.ctx_get_device);
  symbols.Load("cuLibraryLoadData", &cuda.library_load_data);
  symbols.Load("cuLibraryGetKernel", &cuda.library_get_kernel);
  symbols.Load("cuKernelSetAttribute", &cuda.kernel_set_attribute);
  symbols.Load("cuLaunchKernelEx", &cuda.launch_kernel_ex);
  symbols.Load("cuMemsetD8Async", &cuda.memset_d8_async);
  symbols.Load("cuTensorMapEncodeTiled", &cuda.tensor_map_encode_tiled);
  symbols.Load("cuGetErrorName", &cuda.get_error_name);
  symbols.Load("cuGetErrorString", &cuda.get_error_string);
  if (!symbols.missing().empty()) {
    return FailedPrecondition("jax_flashattn: the NVIDIA driver is too old: libcuda.so.1 lacks " +
                              symbols.missing() + "; version 525 (CUDA 12.0) or newer is needed");
  }
  opened.store(&cuda, std::memory_order_release);
  *out = &cuda;
  return OkStatus();
}

// Major versions of NVRTC to look for, best first. A driver can't load the cubins of a newer major
// version, and NVRTC 13 knows more GPUs.
std::array<int, 2> PreferredMajors() {
  const Cuda* cuda = nullptr;
  int version = 0;
  if (OpenCuda(&cuda).ok() && cuda->driver_get_version(&version) == kCuSuccess &&
      version / 1000 == 12) {
    return {12, 13};
  }
  return {13, 12};
}

std::vector<std::string> Glob(const std::string& pattern) {
  std::vector<std::string> paths;
  glob_t found;
  if (glob(pattern.c_str(), 0, nullptr, &found) == 0) {
    for (size_t i = 0; i < found.gl_pathc; ++i) paths.emplace_back(found.gl_pathv[i]);
    globfree(&found);
  }
  return paths;
}

bool IsDirectory(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

std::string Directory(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

// NVRTC opens its builtins by soname and has no RUNPATH, so in a pip install it doesn't find the
// file that lies beside it, unless that is already in the process.
void OpenBuiltins(const std::string& directory, const std::string& major) {
  for (const std::string& path : Glob(directory + "/libnvrtc-builtins.so." + major + ".*")) {
    dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
  }
}

void* OpenNvrtcFile(const std::string& path, int major) {
  const std::string suffix = major > 0 ? std::to_string(major) : "*";
  if (path.find('/') != std::string::npos) OpenBuiltins(Directory(path), suffix);
  return dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
}

void* OpenNvrtcIn(const std::string& directory, int major) {
  const std::string path = directory + "/libnvrtc.so." + std::to_string(major);
  struct stat info;
  return stat(path.c_str(), &info) == 0 ? OpenNvrtcFile(path, major) : nullptr;
}

std::mutex nvrtc_mutex;  // guards nvrtc_search_paths and the first opening

std::vector<std::string>& NvrtcSearchPaths() {
  static auto* paths = new std::vector<std::string>;
  return *paths;
}

// The library handle, or null with what went wrong for a path that the user named.
void* FindNvrtc(std::string* error) {
  const char* named = std::getenv("JFA_NVRTC_PATH");
  if (named != nullptr && *named != '\0') {
    void* library = nullptr;
    if (IsDirectory(named)) {
      for (int major : PreferredMajors()) {
        if (library == nullptr) library = OpenNvrtcIn(named, major);
      }
    } else {
      library = OpenNvrtcFile(named, 0);
    }
    if (library == nullptr) {
      *error = "jax_flashattn: JFA_NVRTC_PATH is " + std::string(named) +
               ", which is neither libnvrtc nor a directory that holds it (" + LastDlError() + ")";
    }
    return library;
  }
  for (int major : PreferredMajors()) {
    const std::string soname = "libnvrtc.so." + std::to_string(major);
    if (void* library = dlopen(soname.c_str(), RTLD_LAZY | RTLD_LOCAL)) return library;
    for (const std::string& directory : NvrtcSearchPaths()) {
      if (void* library = OpenNvrtcIn(directory, major)) return library;
    }
    for (const std::string& directory : Glob("/usr/local/cuda*/lib64")) {
      if (void* library = OpenNvrtcIn(directory, major)) return library;
    }
  }
  *error = std::string(
               "jax_flashattn: NVRTC, which compiles the GPU kernels, wasn't found "
               "(libnvrtc.so.13 or libnvrtc.so.12): ") +
           kInstallNvrtc;
  return nullptr;
}

Status OpenNvrtc(Nvrtc* nvrtc) {
  std::string error;
  void* library = FindNvrtc(&error);
  if (library == nullptr) return FailedPrecondition(error);
  SymbolLoader symbols(library);
  symbols.Load("nvrtcVersion", &nvrtc->version);
  symbols.Load("nvrtcCreateProgram", &nvrtc->create_program);
  symbols.Load("nvrtcDestroyProgram", &nvrtc->destroy_program);
  symbols.Load("nvrtcCompileProgram", &nvrtc->compile_program);
  symbols.Load("nvrtcGetCUBINSize", &nvrtc->get_cubin_size);
  symbols.Load("nvrtcGetCUBIN", &nvrtc->get_cubin);
  symbols.Load("nvrtcGetProgramLogSize", &nvrtc->get_program_log_size);
  symbols.Load("nvrtcGetProgramLog", &nvrtc->get_program_log);
  symbols.Load("nvrtcGetErrorString", &nvrtc->get_error_string);
  link_map* map = nullptr;
  if (dlinfo(library, RTLD_DI_LINKMAP, &map) == 0 && map != nullptr) nvrtc->path = map->l_name;
  if (!symbols.missing().empty() || nvrtc->version(&nvrtc->major, &nvrtc->minor) != 0 ||
      nvrtc->major < 12) {
    return FailedPrecondition("jax_flashattn: " + nvrtc->path +
                              " isn't a usable NVRTC (12.0 or newer is needed): " + kInstallNvrtc);
  }
  if (nvrtc->path.find('/') != std::string::npos) {
    OpenBuiltins(Directory(nvrtc->path), std::to_string(nvrtc->major));
  }
  return OkStatus();
}

}  // namespace

Status GetCuda(const Cuda** cuda) {
  // 0 is not yet, 1 is done. cuInit may run twice at once, which the driver allows.
  static std::atomic<int> initialised{0};
  JFA_RETURN_IF_ERROR(OpenCuda(cuda));
  if (initialised.load(std::memory_order_acquire) == 0) {
    JFA_RETURN_IF_ERROR(Check(**cuda, (*cuda)->init(0), "cuInit"));
    initialised.store(1, std::memory_order_release);
  }
  return OkStatus();
}

Status GetNvrtc(const Nvrtc** nvrtc) {
  static std::atomic<const Nvrtc*> opened{nullptr};
  if ((*nvrtc = opened.load(std::memory_order_acquire)) != nullptr) return OkStatus();
  std::lock_guard<std::mutex> lock(nvrtc_mutex);
  if ((*nvrtc = opened.load(std::memory_order_acquire)) != nullptr) return OkStatus();
  static auto* table = new Nvrtc{};
  JFA_RETURN_IF_ERROR(OpenNvrtc(table));
  opened.store(table, std::memory_order_release);
  *nvrtc = table;
  return OkStatus();
}

void SetNvrtcSearchPaths(std::vector<std::string> directories) {
  std::lock_guard<std::mutex> lock(nvrtc_mutex);
  NvrtcSearchPaths() = std::move(directories);
}

Status Check(const Cuda& cuda, CuResult result, const char* call) {
  if (result == kCuSuccess) return OkStatus();
  const char* name = nullptr;
  const char* text = nullptr;
  cuda.get_error_name(result, &name);
  cuda.get_error_string(result, &text);
  std::string message = "jax_flashattn: " + std::string(call) +
                        " failed: " + (name != nullptr ? name : "error " + std::to_string(result));
  if (text != nullptr) message += std::string(" (") + text + ")";
  return Internal(std::move(message));
}

namespace {

// Calls `read(cuda, device)` the first time it is asked about a device.
template <typename Read>
Status Remember(std::array<std::atomic<int>, 64>& known, int ordinal, int* value, Read read) {
  const bool cached = ordinal >= 0 && ordinal < static_cast<int>(known.size());
  if (cached && (*value = known[ordinal].load(std::memory_order_relaxed)) != 0) return OkStatus();
  const Cuda* cuda;
  JFA_RETURN_IF_ERROR(GetCuda(&cuda));
  CuDevice device;
  JFA_RETURN_IF_ERROR(Check(*cuda, cuda->device_get(&device, ordinal), "cuDeviceGet"));
  JFA_RETURN_IF_ERROR(read(*cuda, device));
  if (cached) known[ordinal].store(*value, std::memory_order_relaxed);
  return OkStatus();
}

Status ReadAttribute(const Cuda& cuda, int attribute, CuDevice device, int* value) {
  return Check(cuda, cuda.device_get_attribute(value, attribute, device), "cuDeviceGetAttribute");
}

}  // namespace

Status DeviceArch(int ordinal, int* arch) {
  static std::array<std::atomic<int>, 64> known{};
  return Remember(known, ordinal, arch, [arch](const Cuda& cuda, CuDevice device) {
    int major = 0, minor = 0;
    JFA_RETURN_IF_ERROR(
        ReadAttribute(cuda, kDeviceAttributeComputeCapabilityMajor, device, &major));
    JFA_RETURN_IF_ERROR(
        ReadAttribute(cuda, kDeviceAttributeComputeCapabilityMinor, device, &minor));
    *arch = major * 10 + minor;
    return OkStatus();
  });
}

Status DeviceMultiprocessors(int ordinal, int* count) {
  static std::array<std::atomic<int>, 64> known{};
  return Remember(known, ordinal, count, [count](const Cuda& cuda, CuDevice device) {
    return ReadAttribute(cuda, kDeviceAttributeMultiprocessorCount, device, count);
  });
}

Status CurrentArch(int* arch) {
  const Cuda* cuda;
  JFA_RETURN_IF_ERROR(GetCuda(&cuda));
  // A CUdevice is the device's ordinal.
  CuDevice device = 0;
  if (cuda->ctx_get_device(&device) != kCuSuccess) device = 0;
  return DeviceArch(device, arch);
}

Status ListDevices(std::vector<DeviceInfo>* devices, int* driver_version) {
  const Cuda* cuda;
  JFA_RETURN_IF_ERROR(GetCuda(&cuda));
  JFA_RETURN_IF_ERROR(Check(*cuda, cuda->driver_get_version(driver_version), "cuDriverGetVersion"));
  int count = 0;
  JFA_RETURN_IF_ERROR(Check(*cuda, cuda->device_get_count(&count), "cuDeviceGetCount"));
  devices->clear();
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    DeviceInfo info{ordinal, "", 0};
    char name[256] = {};
    CuDevice device;
    JFA_RETURN_IF_ERROR(Check(*cuda, cuda->device_get(&device, ordinal), "cuDeviceGet"));
    JFA_RETURN_IF_ERROR(
        Check(*cuda, cuda->device_get_name(name, sizeof(name) - 1, device), "cuDeviceGetName"));
    JFA_RETURN_IF_ERROR(DeviceArch(ordinal, &info.arch));
    info.name = name;
    devices->push_back(std::move(info));
  }
  return OkStatus();
}

}  // namespace jfa::driver
