// Cubins into the driver, and kernels onto streams. Nothing that is loaded is ever unloaded.
//
// Unloading waits for the GPU, and a process needs few different kernels, so they are kept.
#ifndef JAX_FLASHATTN_CC_LAUNCH_H_
#define JAX_FLASHATTN_CC_LAUNCH_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>

#include "cc/driver.h"
#include "cc/kernels/params.h"
#include "cc/status.h"

namespace jfa::launch {

struct KernelImage {
  std::string_view key;  // names the contents: images with the same key are loaded once
  std::string_view symbol;
  std::string_view cubin;
  std::string_view arch_name;
  int param_bytes;  // size of the kernel's parameters, -1 if not known
  int smem_bytes;   // dynamic shared memory that launches ask for
};

// One kernel for all devices of its architecture.
struct LoadedKernel {
  std::string symbol;
  driver::CuKernel handle = nullptr;
  int param_bytes = -1;
  int smem_bytes = 0;
  std::atomic<uint64_t> ready_devices{0};  // bit per ordinal: PrepareDevice was done
};

// The loaded kernel; valid for the life of the process.
Status Load(const KernelImage& image, LoadedKernel** kernel);

// Once per kernel and device before its first launch there; a bit test afterwards.
Status PrepareDevice(LoadedKernel* kernel, int ordinal);

struct Dim3 {
  uint32_t x, y, z;
};

struct LaunchShape {
  Dim3 grid;
  int threads;
  uint32_t cluster;   // CTAs that follow each other along x and run at the same time; 1: none
  bool starts_early;  // it needn't wait for the end of the kernel before it (sm_90)
};

// Enqueues the kernel with `params` as its one argument, copied before this returns. Allocates and
// waits for nothing, so it may run while a CUDA graph is captured.
Status Launch(const LoadedKernel& kernel, const LaunchShape& shape, driver::CuStream stream,
              const void* params, size_t param_bytes);

// What a kernel with tensor maps needs to know of a tensor. Boxes are 128 bytes of `box_rows` rows
// of one (batch, head), and lie in shared memory under the 128-byte swizzle.
struct TensorMapSpec {
  int64_t columns, rows, heads, batch;
  int box_rows;
  int element_bytes = 2;        // or 1
  int64_t fetched_columns = 0;  // what the L2 may fetch at a time; 0: all of them
};

// What the driver makes a tensor map from: compared and copied as bytes.
struct TensorMapSource {
  void* data;
  uint64_t dims[4], strides[3];  // of the last axes; strides of all but the last one, in bytes
  unsigned int box[4];
  int dtype, promotion;
};

// The last tensor maps of a call site on a device. The driver takes longer to encode one than a
// call takes to be checked, and most runs have the addresses of the run before. Threads may use it
// at the same time.
class TensorMaps {
 public:
  // The map in that place of the call's parameters, encoded if it isn't the last one there. On the
  // CPU alone, and no call of the driver that waits or allocates. `stand_in`: an address that is
  // used where the tensor has no elements, and never read.
  Status Encode(int place, const TensorArg& tensor, const TensorMapSpec& spec, void* stand_in,
                TensorMap* map);

 private:
  struct Entry {
    std::mutex mutex;
    TensorMapSource source{};  // of no map before the first one: its box is empty
    TensorMap map;
  };
  std::array<Entry, 4> entries_;
};

// Fills device memory on a stream; may be captured too.
Status FillBytes(void* data, uint8_t value, size_t count, driver::CuStream stream);

}  // namespace jfa::launch

#endif  // JAX_FLASHATTN_CC_LAUNCH_H_
