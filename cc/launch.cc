// The driver side of running a kernel: library loading, per-device attributes, launches and fills.
#include "cc/launch.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

namespace jfa::launch {
namespace {

using driver::Cuda;

// Dynamic shared memory that a kernel may use without asking: 48 KB, less what it has statically.
constexpr int kDefaultSharedBytes = 47 * 1024;

struct LoadedKernels {
  std::mutex mutex;
  std::map<std::string, std::unique_ptr<LoadedKernel>> by_key;
};

LoadedKernels& All() {
  static auto* all = new LoadedKernels;
  return *all;
}

Status LoadError(const Cuda& cuda, driver::CuResult result, const KernelImage& image) {
  const Status status = driver::Check(cuda, result, "cuLibraryLoadData");
  int version = 0;
  cuda.driver_get_version(&version);
  return Internal(status.message() + " on " + std::string(image.symbol) + ", compiled for " +
                  std::string(image.arch_name) + "; the driver supports CUDA " +
                  std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10) +
                  ". If NVRTC is of a newer major version, upgrade the driver or install the NVRTC "
                  "of the driver's version");
}

}  // namespace

Status Load(const KernelImage& image, LoadedKernel** kernel) {
  const Cuda* cuda;
  JFA_RETURN_IF_ERROR(driver::GetCuda(&cuda));
  const std::string key = std::string(image.key) + "/" + std::to_string(image.smem_bytes);
  LoadedKernels& all = All();
  std::lock_guard<std::mutex> lock(all.mutex);
  std::unique_ptr<LoadedKernel>& slot = all.by_key[key];
  if (slot == nullptr) {
    auto loaded = std::make_unique<LoadedKernel>();
    loaded->symbol = image.symbol;
    loaded->param_bytes = image.param_bytes;
    loaded->smem_bytes = image.smem_bytes;
    driver::CuLibrary library;
    const driver::CuResult result = cuda->library_load_data(&library, image.cubin.data(), nullptr,
                                                            nullptr, 0, nullptr, nullptr, 0);
    if (result != driver::kCuSuccess) return LoadError(*cuda, result, image);
    JFA_RETURN_IF_ERROR(driver::Check(
        *cuda, cuda->library_get_kernel(&loaded->handle, library, loaded->symbol.c_str()),
        "cuLibraryGetKernel"));
    slot = std::move(loaded);
  }
  *kernel = slot.get();
  return OkStatus();
}

Status PrepareDevice(LoadedKernel* kernel, int ordinal) {
  const uint64_t bit = ordinal >= 0 && ordinal < 64 ? uint64_t{1} << ordinal : 0;
  if (kernel->ready_devices.load(std::memory_order_acquire) & bit) return OkStatus();
  const Cuda* cuda;
  JFA_RETURN_IF_ERROR(driver::GetCuda(&cuda));
  if (kernel->smem_bytes > kDefaultSharedBytes) {
    // Two threads may set it at once: to the same value, which the driver allows.
    const driver::CuResult result =
        cuda->kernel_set_attribute(driver::kFunctionAttributeMaxDynamicSharedSizeBytes,
                                   kernel->smem_bytes, kernel->handle, ordinal);
    if (result != driver::kCuSuccess) {
      const Status status = driver::Check(*cuda, result, "cuKernelSetAttribute");
      return Internal(status.message() + " on " + kernel->symbol + ": " +
                      std::to_string(kernel->smem_bytes) +
                      " bytes of dynamic shared memory on device " + std::to_string(ordinal));
    }
  }
  kernel->ready_devices.fetch_or(bit, std::memory_order_release);
  return OkStatus();
}

Status Launch(const LoadedKernel& kernel, const LaunchShape& shape, driver::CuStream stream,
              const void* params, size_t param_bytes) {
  // The driver copies as many bytes as the kernel declares, wherever they come from.
  if (kernel.param_bytes >= 0 && static_cast<size_t>(kernel.param_bytes) != param_bytes) {
    return Internal("jax_flashattn: " + kernel.symbol + " takes " +
                    std::to_string(kernel.param_bytes) + " bytes of parameters, got " +
                    std::to_string(param_bytes));
  }
  const Cuda* cuda;
  JFA_RETURN_IF_ERROR(driver::GetCuda(&cuda));
  const Dim3& grid = shape.grid;
  driver::CuLaunchConfig config{};
  config.grid_x = grid.x;
  config.grid_y = grid.y;
  config.grid_z = grid.z;
  config.block_x = static_cast<unsigned int>(shape.threads);
  config.block_y = 1;
  config.block_z = 1;
  config.shared_bytes = static_cast<unsigned int>(kernel.smem_bytes);
  config.stream = stream;
  driver::CuLaunchAttribute attributes[2] = {};
  config.attributes = attributes;
  if (shape.starts_early) {
    driver::CuLaunchAttribute& early = attributes[config.num_attributes++];
    early.id = driver::kLaunchAttributeProgrammaticStreamSerialization;
    early.value.number = 1;
  }
  if (shape.cluster > 1) {
    driver::CuLaunchAttribute& cluster = attributes[config.num_attributes++];
    cluster.id = driver::kLaunchAttributeClusterDimension;
    cluster.value.extents[0] = shape.cluster;
    cluster.value.extents[1] = cluster.value.extents[2] = 1;
  }
  void* arguments[] = {const_cast<void*>(params)};
  const driver::CuResult result =
      cuda->launch_kernel_ex(&config, kernel.handle, arguments, nullptr);
  if (result == driver::kCuSuccess) return OkStatus();
  const Status status = driver::Check(*cuda, result, "cuLaunchKernelEx");
  return Internal(status.message() + " on " + kernel.symbol + ": grid " + std::to_string(grid.x) +
                  "x" + std::to_string(grid.y) + "x" + std::to_string(grid.z) + ", " +
                  std::to_string(shape.threads) + " threads, clusters of " +
                  std::to_string(shape.cluster) + ", " + std::to_string(kernel.smem_bytes) +
                  " bytes of shared memory");
}

namespace {

static_assert(std::has_unique_object_representations_v<TensorMapSource>, "compared as bytes");

TensorMapSource SourceOf(const TensorArg& tensor, const TensorMapSpec& spec, void* stand_in) {
  // Any type of the width: nothing is computed on the way.
  constexpr int kUint8 = 0, kUint16 = 1;
  // How much the L2 fetches at a time: no more than a row, what follows is of another head.
  constexpr int kPromotion64 = 1, kPromotion128 = 2, kPromotion256 = 3;
  const int width = spec.element_bytes;
  const int64_t row_bytes =
      (spec.fetched_columns > 0 ? spec.fetched_columns : spec.columns) * width;
  const int promotion = row_bytes >= 256   ? kPromotion256
                        : row_bytes >= 128 ? kPromotion128
                                           : kPromotion64;
  constexpr unsigned int kBoxBytes = 128;
  const auto extent = [](int64_t x) { return static_cast<uint64_t>(std::max<int64_t>(x, 1)); };
  const auto bytes = [&](long long x) { return static_cast<uint64_t>(x) * width; };
  return {tensor.data != nullptr ? tensor.data : stand_in,
          {extent(spec.columns), extent(spec.rows), extent(spec.heads), extent(spec.batch)},
          {bytes(tensor.row_stride), bytes(tensor.head_stride),
           std::max<uint64_t>(bytes(tensor.batch_stride), 16)},
          {kBoxBytes / width, static_cast<unsigned int>(spec.box_rows), 1, 1},
          width == 1 ? kUint8 : kUint16,
          promotion};
}

Status EncodeMap(const TensorMapSource& source, TensorMap* map) {
  const Cuda* cuda;
  JFA_RETURN_IF_ERROR(driver::GetCuda(&cuda));
  constexpr int kNoInterleave = 0, kSwizzle128 = 3, kZeroFill = 0;
  const unsigned int steps[] = {1, 1, 1, 1};
  return driver::Check(
      *cuda,
      cuda->tensor_map_encode_tiled(map, source.dtype, 4, source.data, source.dims, source.strides,
                                    source.box, steps, kNoInterleave, kSwizzle128, source.promotion,
                                    kZeroFill),
      "cuTensorMapEncodeTiled");
}

}  // namespace

Status TensorMaps::Encode(int place, const TensorArg& tensor, const TensorMapSpec& spec,
                          void* stand_in, TensorMap* map) {
  const TensorMapSource source = SourceOf(tensor, spec, stand_in);
  Entry& entry = entries_[place];
  // Another thread is at the same call site: rather encode twice than wait.
  std::unique_lock<std::mutex> lock(entry.mutex, std::try_to_lock);
  if (!lock.owns_lock()) return EncodeMap(source, map);
  if (std::memcmp(&source, &entry.source, sizeof(source)) != 0) {
    entry.source = {};  // stays so if encoding fails
    JFA_RETURN_IF_ERROR(EncodeMap(source, &entry.map));
    entry.source = source;
  }
  *map = entry.map;
  return OkStatus();
}

Status FillBytes(void* data, uint8_t value, size_t count, driver::CuStream stream) {
  if (count == 0) return OkStatus();
  const Cuda* cuda;
  JFA_RETURN_IF_ERROR(driver::GetCuda(&cuda));
  return driver::Check(
      *cuda,
      cuda->memset_d8_async(reinterpret_cast<driver::CuDevicePtr>(data), value, count, stream),
      "cuMemsetD8Async");
}

}  // namespace jfa::launch
