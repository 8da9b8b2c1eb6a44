// libcuda and libnvrtc, opened at run time: the module links neither, so it imports on any machine.
//
// The few types and constants of the CUDA driver API that are used are declared here; their values
// are part of its stable ABI, and no CUDA header is needed to build.
#ifndef JAX_FLASHATTN_CC_DRIVER_H_
#define JAX_FLASHATTN_CC_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cc/status.h"

namespace jfa::driver {

using CuResult = int;
using CuDevice = int;
using CuContext = struct CuContextOpaque*;
using CuStream = struct CuStreamOpaque*;
using CuLibrary = struct CuLibraryOpaque*;
using CuKernel = struct CuKernelOpaque*;
using CuDevicePtr = unsigned long long;

inline constexpr CuResult kCuSuccess = 0;
inline constexpr int kDeviceAttributeMultiprocessorCount = 16;
inline constexpr int kDeviceAttributeComputeCapabilityMajor = 75;
inline constexpr int kDeviceAttributeComputeCapabilityMinor = 76;
inline constexpr int kFunctionAttributeMaxDynamicSharedSizeBytes = 8;
inline constexpr int kLaunchAttributeClusterDimension = 4;
inline constexpr int kLaunchAttributeProgrammaticStreamSerialization = 6;

struct CuLaunchAttribute {
  int id;
  char pad[4];
  union {
    char bytes[64];
    int number;
    unsigned int extents[3];
  } value;
};
static_assert(sizeof(CuLaunchAttribute) == 72, "the driver steps through an array of these");

struct CuLaunchConfig {
  unsigned int grid_x, grid_y, grid_z;
  unsigned int block_x, block_y, block_z;
  unsigned int shared_bytes;
  CuStream stream;
  CuLaunchAttribute* attributes;
  unsigned int num_attributes;
};
static_assert(sizeof(CuLaunchConfig) == 56, "must match CUlaunchConfig of the driver API");

// The driver's entry points; all non-null once obtained. libcuda.so.1 of CUDA 12.0 has them all.
struct Cuda {
  CuResult (*init)(unsigned int flags);
  CuResult (*driver_get_version)(int* version);
  CuResult (*device_get_count)(int* count);
  CuResult (*device_get)(CuDevice* device, int ordinal);
  CuResult (*device_get_name)(char* name, int size, CuDevice device);
  CuResult (*device_get_attribute)(int* value, int attribute, CuDevice device);
  CuResult (*ctx_get_device)(CuDevice* device);
  CuResult (*library_load_data)(CuLibrary* library, const void* code, int* jit_options,
                                void** jit_values, unsigned int num_jit, int* library_options,
                                void** library_values, unsigned int num_library);
  CuResult (*library_get_kernel)(CuKernel* kernel, CuLibrary library, const char* name);
  CuResult (*kernel_set_attribute)(int attribute, int value, CuKernel kernel, CuDevice device);
  CuResult (*launch_kernel_ex)(const CuLaunchConfig* config, CuKernel kernel, void** params,
                               void** extra);
  CuResult (*memset_d8_async)(CuDevicePtr data, unsigned char value, size_t count, CuStream stream);
  CuResult (*tensor_map_encode_tiled)(void* map, int dtype, unsigned int rank, void* data,
                                      const uint64_t* dims, const uint64_t* byte_strides,
                                      const unsigned int* box_dims,
                                      const unsigned int* element_strides, int interleave,
                                      int swizzle, int l2_promotion, int oob_fill);
  CuResult (*get_error_name)(CuResult result, const char** name);
  CuResult (*get_error_string)(CuResult result, const char** text);
};

using NvrtcProgram = struct NvrtcProgramOpaque*;
using NvrtcResult = int;

struct Nvrtc {
  NvrtcResult (*version)(int* major, int* minor);
  NvrtcResult (*create_program)(NvrtcProgram* program, const char* source, const char* name,
                                int num_headers, const char* const* headers,
                                const char* const* include_names);
  NvrtcResult (*destroy_program)(NvrtcProgram* program);
  NvrtcResult (*compile_program)(NvrtcProgram program, int num_options, const char* const* options);
  NvrtcResult (*get_cubin_size)(NvrtcProgram program, size_t* size);
  NvrtcResult (*get_cubin)(NvrtcProgram program, char* cubin);
  NvrtcResult (*get_program_log_size)(NvrtcProgram program, size_t* size);
  NvrtcResult (*get_program_log)(NvrtcProgram program, char* log);
  const char* (*get_error_string)(NvrtcResult result);

  int major;
  int minor;
  std::string path;  // for people: where it came from

  std::string VersionText() const { return std::to_string(major) + "." + std::to_string(minor); }
};

// The opened and initialised driver. A failure isn't remembered, the next call tries again.
Status GetCuda(const Cuda** cuda);

// NVRTC, from the first of: $JFA_NVRTC_PATH (a file or a directory; no other is tried then), what
// the process has loaded or its loader finds, `SetNvrtcSearchPaths`, /usr/local/cuda*/lib64.
Status GetNvrtc(const Nvrtc** nvrtc);

// Directories that may hold libnvrtc, such as site-packages/nvidia/cu13/lib. For Python, which
// knows them, before the first compile.
void SetNvrtcSearchPaths(std::vector<std::string> directories);

// Turns a driver call's result into a Status that names the call.
Status Check(const Cuda& cuda, CuResult result, const char* call);

// Architecture of a device, major * 10 + minor; remembered per ordinal.
Status DeviceArch(int ordinal, int* arch);

// How many multiprocessors a device has; remembered per ordinal.
Status DeviceMultiprocessors(int ordinal, int* count);

// Architecture of the current context's device, or of device 0 where no context is current.
Status CurrentArch(int* arch);

struct DeviceInfo {
  int ordinal;
  std::string name;
  int arch;
};
// For people: the GPUs and the driver's CUDA version (12080 is 12.8).
Status ListDevices(std::vector<DeviceInfo>* devices, int* driver_version);

}  // namespace jfa::driver

#endif  // JAX_FLASHATTN_CC_DRIVER_H_
