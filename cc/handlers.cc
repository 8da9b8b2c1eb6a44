// XLA FFI handlers of the CUDA kernels: buffers -> params, and when to compile, load and launch.
//
//   Instantiate  once per call site, while XLA compiles, from several threads: attributes, plan,
//                compile.
//   Initialize   before every run, per device: load the kernels there, the first time.
//   Execute      fill the parameters, launch. Captured into CUDA graphs by default: no allocation,
//                no waiting, nothing that depends on anything but its arguments.
//
// Everything is checked: a custom call can come from a file, and a wrong one must be an error and
// not a crash.
#include "cc/handlers.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cc/call.h"
#include "cc/driver.h"
#include "cc/jit.h"
#include "cc/launch.h"
#include "cc/plan.h"
#include "cc/status.h"
#include "xla/ffi/api/ffi.h"

namespace jfa {
namespace {

namespace ffi = xla::ffi;

constexpr int kMaxDevices = 64;

ElementType ToElementType(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::F16:
      return ElementType::kF16;
    case ffi::BF16:
      return ElementType::kBF16;
    case ffi::F32:
      return ElementType::kF32;
    case ffi::S32:
      return ElementType::kS32;
    case ffi::F8E4M3FN:
      return ElementType::kE4m3;
    case ffi::F8E5M2:
      return ElementType::kE5m2;
    default:
      return ElementType::kOther;
  }
}

Tensor ToTensor(const ffi::AnyBuffer& buffer) {
  return {ToElementType(buffer.element_type()), buffer.dimensions().begin(),
          buffer.dimensions().size(), buffer.untyped_data()};
}

// What isn't a buffer (XLA has no such operand today) has no axes and fails the checks.
TensorList ToTensors(ffi::RemainingArgs args) {
  TensorList list;
  list.size = args.size();
  for (size_t i = 0; i < std::min(list.size, list.items.size()); ++i) {
    auto buffer = args.get<ffi::AnyBuffer>(i);
    list.items[i] = buffer.has_value() ? ToTensor(*buffer) : Tensor{};
  }
  return list;
}

TensorList ToTensors(ffi::RemainingRets rets) {
  TensorList list;
  list.size = rets.size();
  for (size_t i = 0; i < std::min(list.size, list.items.size()); ++i) {
    auto buffer = rets.get<ffi::AnyBuffer>(i);
    list.items[i] = buffer.has_value() ? ToTensor(**buffer) : Tensor{};
  }
  return list;
}

// ---------------------------------------------------------------------------------------------
// State: the kernels of one call site, per architecture and device
// ---------------------------------------------------------------------------------------------

struct ArchKernels {
  int arch = 0;
  Plan plan;
  std::vector<jit::Result> compiled;
  std::vector<launch::LoadedKernel*> loaded;  // filled before a device points here
};

struct DeviceKernels {
  const ArchKernels* arch;
  int multiprocessors;
  launch::TensorMaps maps;
};

}  // namespace

// Shared by all devices and threads that run one call site.
struct CudaState {
  static ffi::TypeId id;

  // The same in every run, so Instantiate alone reads them.
  Attributes attrs;
  Variant variant{};

  std::mutex mutex;  // guards `built` and `devices`
  std::vector<std::unique_ptr<ArchKernels>> built;
  std::vector<std::unique_ptr<DeviceKernels>> devices;
  std::array<std::atomic<DeviceKernels*>, kMaxDevices> by_device{};
};

// Not 0: XLA would assign one then, and must have done so before it sees a handler with this state.
ffi::TypeId CudaState::id = {7700001};

namespace {

// Plans and compiles for one architecture; what is there already is found. `mutex` is held.
Status Build(CudaState& state, int arch, ArchKernels** kernels) {
  for (const auto& built : state.built) {
    if (built->arch == arch) {
      *kernels = built.get();
      return OkStatus();
    }
  }
  auto built = std::make_unique<ArchKernels>();
  built->arch = arch;
  built->plan = MakePlan(state.variant, arch);
  JFA_RETURN_IF_ERROR(jit::CompilePlan(built->plan, arch, &built->compiled));
  *kernels = built.get();
  state.built.push_back(std::move(built));
  return OkStatus();
}

// The kernels of a call on a device: loaded, and ready to be launched. One atomic load once done.
Status KernelsFor(CudaState& state, int ordinal, DeviceKernels** ready) {
  if (ordinal < 0 || ordinal >= kMaxDevices) {
    return Internal("jax_flashattn: device ordinal " + std::to_string(ordinal) + " isn't below " +
                    std::to_string(kMaxDevices));
  }
  *ready = state.by_device[ordinal].load(std::memory_order_acquire);
  if (*ready != nullptr) return OkStatus();
  int arch, multiprocessors;
  JFA_RETURN_IF_ERROR(driver::DeviceArch(ordinal, &arch));
  JFA_RETURN_IF_ERROR(driver::DeviceMultiprocessors(ordinal, &multiprocessors));
  std::lock_guard<std::mutex> lock(state.mutex);
  if ((*ready = state.by_device[ordinal].load(std::memory_order_relaxed)) != nullptr) {
    return OkStatus();
  }
  ArchKernels* kernels;
  JFA_RETURN_IF_ERROR(Build(state, arch, &kernels));
  if (kernels->loaded.empty()) {
    std::vector<launch::LoadedKernel*> loaded;
    for (size_t i = 0; i < kernels->compiled.size(); ++i) {
      const jit::CompiledKernel& kernel = *kernels->compiled[i].kernel;
      loaded.emplace_back();
      JFA_RETURN_IF_ERROR(
          launch::Load({kernel.key, kernel.symbol, kernel.cubin, kernel.arch_name,
                        kernel.resources.param_bytes, kernels->plan.kernels[i].smem_bytes},
                       &loaded.back()));
    }
    kernels->loaded = std::move(loaded);
  }
  for (launch::LoadedKernel* kernel : kernels->loaded) {
    JFA_RETURN_IF_ERROR(launch::PrepareDevice(kernel, ordinal));
  }
  auto device = std::make_unique<DeviceKernels>();
  device->arch = kernels;
  device->multiprocessors =
      static_cast<int>(std::max<int64_t>(multiprocessors - state.attrs.sm_margin, 1));
  *ready = device.get();
  state.devices.push_back(std::move(device));
  state.by_device[ordinal].store(*ready, std::memory_order_release);
  return OkStatus();
}

// One call on its way: what it is, where it runs, and how its work is shared out there.
struct Launcher {
  const Call& call;
  const Plan& plan;
  DeviceKernels& device;
  Share share;
  driver::CuStream stream;
};

template <typename Params>
Status LaunchAll(const Launcher& launcher, const Params& params) {
  const Call& call = launcher.call;
  const std::vector<KernelSpec>& kernels = launcher.plan.kernels;
  for (size_t i = 0; i < kernels.size(); ++i) {
    const Grid grid =
        MakeGrid(launcher.plan, static_cast<int>(i), call.variant, call.sizes, launcher.share);
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) continue;
    JFA_RETURN_IF_ERROR(launch::Launch(
        *launcher.device.arch->loaded[i],
        {{grid.x, grid.y, grid.z}, kernels[i].threads, grid.cluster, kernels[i].starts_early},
        launcher.stream, &params, sizeof(params)));
  }
  return OkStatus();
}

// Places of TensorMaps.
enum MapPlace { kMapQ, kMapK, kMapV, kMapOut };

// The maps of keys and values, whose boxes are the kernel's blocks of keys, or as much of one as is
// surely in one page. `once`: each key is read by one CTA.
Status EncodeKeyMaps(const Launcher& launcher, const FwdParams& fwd, const KernelSpec& kernel,
                     bool once, int* box_rows, TensorMap* k, TensorMap* v) {
  const Call& call = launcher.call;
  const ProblemParams& p = fwd.problem;
  const bool paged = fwd.pages.table != nullptr;
  const int64_t rows = paged ? call.page_size : p.kv_len, batch = paged ? call.num_pages : p.batch;
  const int block_rows = kernel.box_rows_kv, bytes = kernel.kv_bytes;
  *box_rows = paged ? std::gcd(block_rows, static_cast<int>(call.page_size)) : block_rows;
  // Where a box has several heads, all of them are one row of the map.
  const int64_t heads_in_row = kernel.box_heads > 1 ? p.num_kv_heads : 1;
  const int64_t heads = p.num_kv_heads / heads_in_row;
  const auto encode = [&](MapPlace place, const TensorArg& tensor, int64_t dim, TensorMap* map) {
    // Of each key a box has 128 bytes. Were the L2 to fetch more, the box of the next 128 would
    // come while it does, and memory be read twice.
    const int64_t row = kernel.box_heads * dim;
    const int64_t fetched = once ? std::min<int64_t>(row, 128 / bytes) : row;
    return launcher.device.maps.Encode(
        place, tensor, {heads_in_row * dim, rows, heads, batch, *box_rows, bytes, fetched}, call.q,
        map);
  };
  JFA_RETURN_IF_ERROR(encode(kMapK, fwd.k, p.head_dim, k));
  return encode(kMapV, fwd.v, p.head_dim_v, v);
}

// The Hopper forward wants tensor maps in front.
Status LaunchFwd(const Launcher& launcher, const FwdParams& fwd) {
  const Call& call = launcher.call;
  const KernelSpec& kernel = launcher.plan.kernels.front();
  if (kernel.box_rows_q == 0) return LaunchAll(launcher, fwd);
  if (call.q == nullptr) return OkStatus();  // nothing to map, and nothing to launch
  const ProblemParams& p = fwd.problem;
  FwdSm90Params params{};
  params.fwd = fwd;
  params.paired = launcher.share.forward.paired;
  if (launcher.share.forward.counted) {
    params.counter = static_cast<unsigned*>(call.tile_counter);
    JFA_RETURN_IF_ERROR(launch::FillBytes(params.counter, 0, sizeof(unsigned), launcher.stream));
  }
  launch::TensorMaps& maps = launcher.device.maps;
  JFA_RETURN_IF_ERROR(maps.Encode(
      kMapQ, fwd.q, {p.head_dim, p.q_len, p.num_heads, p.batch, kernel.box_rows_q, kernel.q_bytes},
      call.q, &params.q));
  JFA_RETURN_IF_ERROR(
      EncodeKeyMaps(launcher, fwd, kernel, false, &params.box_rows, &params.k, &params.v));
  constexpr int kGroupRows = 64;  // FwdSm90::kGroupRows
  JFA_RETURN_IF_ERROR(maps.Encode(kMapOut, fwd.out,
                                  {p.head_dim_v, p.q_len, p.num_heads, p.batch, kGroupRows}, call.q,
                                  &params.out));
  return LaunchAll(launcher, params);
}

// The main kernel of the Hopper family wants tensor maps.
Status LaunchBwd(const Launcher& launcher, const BwdParams& bwd) {
  BwdParams params = bwd;
  const Call& call = launcher.call;
  const ProblemParams& p = params.problem;
  const KernelSpec& kernel = launcher.plan.kernels[1];
  // Without queries keys still get their zeros.
  void* const stand_in = call.q != nullptr ? call.q : call.k;
  if (kernel.box_rows_q != 0 && stand_in != nullptr) {
    const auto encode = [&](MapPlace place, const TensorArg& tensor, int dim, int rows, int heads,
                            int box_rows, TensorMap* map) {
      return launcher.device.maps.Encode(place, tensor, {dim, rows, heads, p.batch, box_rows},
                                         stand_in, map);
    };
    const int rows_q = kernel.box_rows_q, rows_kv = kernel.box_rows_kv;
    JFA_RETURN_IF_ERROR(
        encode(kMapQ, params.q, p.head_dim, p.q_len, p.num_heads, rows_q, &params.maps.q));
    JFA_RETURN_IF_ERROR(encode(kMapOut, params.dout, p.head_dim_v, p.q_len, p.num_heads, rows_q,
                               &params.maps.dout));
    JFA_RETURN_IF_ERROR(
        encode(kMapK, params.k, p.head_dim, p.kv_len, p.num_kv_heads, rows_kv, &params.maps.k));
    JFA_RETURN_IF_ERROR(
        encode(kMapV, params.v, p.head_dim_v, p.kv_len, p.num_kv_heads, rows_kv, &params.maps.v));
  }
  return LaunchAll(launcher, params);
}

Status LaunchDecode(const Launcher& launcher, const DecodeParams& decode) {
  DecodeParams params = decode;
  const Call& call = launcher.call;
  const DecodeShare& share = launcher.share.decode;
  const KernelSpec& kernel = launcher.plan.kernels[share.kernel];
  params.num_ctas = static_cast<int>(share.ctas);
  params.parts_log2 = share.parts_log2;
  params.parts = share.parts;
  params.merge_log2 = share.merge_log2;
  // A mask may leave fewer blocks than there would be parts.
  const bool sees_all = call.sizes.alike && call.variant.mask == Mask::kFull;
  params.all_parts = sees_all ? share.parts : 0;
  if (params.num_ctas <= 0) {
    if (call.q == nullptr) return OkStatus();
    return InvalidArgument(
        "jax_flashattn: a decode call must have less than 2^31 key blocks and room in its scratch, "
        "got " +
        std::to_string(call.sizes.kv_len) + " keys, batch " + std::to_string(call.sizes.batch) +
        " and " + std::to_string(call.scratch_floats) + " floats of scratch");
  }
  params.row_tiles = DecodeRowTiles(kernel, call.sizes);
  params.rows *= DecodeTileHeads(kernel);
  if (kernel.box_rows_kv != 0) {
    JFA_RETURN_IF_ERROR(
        EncodeKeyMaps(launcher, params.fwd, kernel, true, &params.box_rows, &params.k, &params.v));
  }
  return LaunchAll(launcher, params);
}

// ---------------------------------------------------------------------------------------------
// Stages
// ---------------------------------------------------------------------------------------------

Status Instantiate(Target target, const Attributes& attrs, CudaState& state) {
  JFA_RETURN_IF_ERROR(ReadVariant(target, attrs, &state.variant));
  state.attrs = attrs;
  int arch = static_cast<int>(attrs.arch);
  if (arch == 0) JFA_RETURN_IF_ERROR(driver::CurrentArch(&arch));
  std::lock_guard<std::mutex> lock(state.mutex);
  ArchKernels* kernels;
  return Build(state, arch, &kernels);
}

Status Initialize(int ordinal, CudaState* state) {
  DeviceKernels* device;  // every run comes through here, so the common case is one atomic load
  return KernelsFor(*state, ordinal, &device);
}

Status Execute(Target target, driver::CuStream stream, int ordinal, CudaState* state,
               ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const Attributes& attrs = state->attrs;
  Call call;
  JFA_RETURN_IF_ERROR(
      ReadCall(target, attrs, state->variant, ToTensors(args), ToTensors(rets), &call));
  if (call.dslopes != nullptr && call.sizes.q_len == 0) {
    // No tile of queries is there to clear them. Everything else the kernels fill themselves, for
    // no keys too.
    const size_t heads = call.sizes.batch * call.sizes.num_kv_heads * call.sizes.group;
    JFA_RETURN_IF_ERROR(
        launch::FillBytes(call.dslopes, 0, heads * call.slope_partials * sizeof(float), stream));
  }
  DeviceKernels* device;  // loaded by Initialize: one atomic load here
  JFA_RETURN_IF_ERROR(KernelsFor(*state, ordinal, &device));
  const Plan& plan = device->arch->plan;
  const Launcher launcher = {call, plan, *device,
                             ShareWork(plan, call.variant, call.sizes, device->multiprocessors),
                             stream};
  switch (call.variant.op) {
    case Op::kFwd:
      return LaunchFwd(launcher, ToFwdParams(attrs, call));
    case Op::kBwd:
      return LaunchBwd(launcher, ToBwdParams(attrs, call));
    case Op::kDecode:
      break;
  }
  return LaunchDecode(launcher, ToDecodeParams(attrs, call));
}

ffi::Error ToError(const Status& status) {
  switch (status.code()) {
    case StatusCode::kOk:
      return ffi::Error::Success();
    case StatusCode::kInvalidArgument:
      return ffi::Error(ffi::ErrorCode::kInvalidArgument, status.message());
    case StatusCode::kUnimplemented:
      return ffi::Error(ffi::ErrorCode::kUnimplemented, status.message());
    case StatusCode::kFailedPrecondition:
      return ffi::Error(ffi::ErrorCode::kFailedPrecondition, status.message());
    case StatusCode::kInternal:
      break;
  }
  return ffi::Error(ffi::ErrorCode::kInternal, status.message());
}

// Runs a stage; memory may run out in any, and no exception may reach XLA.
template <typename Stage>
ffi::Error Guard(Stage stage) {
  try {
    return ToError(stage());
  } catch (const std::exception& e) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("jax_flashattn: ") + e.what());
  }
}

Attributes CommonAttributes(float scale, float soft_cap, bool is_causal, int64_t query_offset,
                            int64_t window_left, int64_t window_right, int64_t sink_tokens,
                            int64_t aux, bool is_bf16, int64_t head_dim, int64_t head_dim_v,
                            int64_t arch, int64_t fp8) {
  Attributes attrs = {scale,       soft_cap, is_causal, query_offset, window_left, window_right,
                      sink_tokens, aux,      is_bf16,   head_dim,     head_dim_v,  arch};
  attrs.fp8 = fp8;
  return attrs;
}

Attributes FwdAttributes(float scale, float soft_cap, bool is_causal, int64_t query_offset,
                         int64_t window_left, int64_t window_right, int64_t sink_tokens,
                         int64_t aux, bool is_bf16, int64_t head_dim, int64_t head_dim_v,
                         int64_t arch, int64_t fp8, int64_t schedule, int64_t sm_margin,
                         int64_t kv_len) {
  Attributes attrs =
      CommonAttributes(scale, soft_cap, is_causal, query_offset, window_left, window_right,
                       sink_tokens, aux, is_bf16, head_dim, head_dim_v, arch, fp8);
  attrs.schedule = schedule;
  attrs.sm_margin = sm_margin;
  attrs.kv_len = kv_len;
  return attrs;
}

Attributes BwdAttributes(float scale, float soft_cap, bool is_causal, int64_t query_offset,
                         int64_t window_left, int64_t window_right, int64_t sink_tokens,
                         int64_t aux, bool is_bf16, int64_t head_dim, int64_t head_dim_v,
                         int64_t arch, int64_t fp8, bool deterministic, bool has_dlse,
                         bool has_dslopes) {
  Attributes attrs =
      CommonAttributes(scale, soft_cap, is_causal, query_offset, window_left, window_right,
                       sink_tokens, aux, is_bf16, head_dim, head_dim_v, arch, fp8);
  attrs.deterministic = deterministic;
  attrs.has_dlse = has_dlse;
  attrs.has_dslopes = has_dslopes;
  return attrs;
}

Attributes ServeAttributes(float scale, float soft_cap, bool is_causal, int64_t query_offset,
                           int64_t window_left, int64_t window_right, int64_t sink_tokens,
                           int64_t aux, bool is_bf16, int64_t head_dim, int64_t head_dim_v,
                           int64_t arch, int64_t fp8, int64_t rows, bool heads_first,
                           int64_t sm_margin) {
  Attributes attrs =
      CommonAttributes(scale, soft_cap, is_causal, query_offset, window_left, window_right,
                       sink_tokens, aux, is_bf16, head_dim, head_dim_v, arch, fp8);
  attrs.rows = rows;
  attrs.heads_first = heads_first;
  attrs.sm_margin = sm_margin;
  return attrs;
}

// The handlers proper: one set per target, since FFI derives the decoding from a function's
// signature. `make` takes the attributes in the order in which they are bound.
template <Target target, auto make>
struct Handlers;

template <Target target, typename... A, Attributes (*make)(A...)>
struct Handlers<target, make> {
  static ffi::ErrorOr<std::unique_ptr<CudaState>> OnInstantiate(A... attrs) {
    std::unique_ptr<CudaState> state;
    ffi::Error error = Guard([&] {
      state = std::make_unique<CudaState>();
      return Instantiate(target, make(attrs...), *state);
    });
    if (error.failure()) return ffi::Unexpected<ffi::Error>(std::move(error));
    return state;
  }

  // Without attributes, which FFI would decode in every run.
  static ffi::Error OnInitialize(int32_t ordinal, CudaState* state) {
    return Guard([&] { return Initialize(ordinal, state); });
  }

  static ffi::Error OnExecute(driver::CuStream stream, int32_t ordinal, CudaState* state,
                              ffi::RemainingArgs args, ffi::RemainingRets rets) {
    return Guard([&] { return Execute(target, stream, ordinal, state, args, rets); });
  }
};

using Fwd = Handlers<Target::kFwd, FwdAttributes>;
using Bwd = Handlers<Target::kBwd, BwdAttributes>;
using Serve = Handlers<Target::kServe, ServeAttributes>;

// A binding is moved from by each call that extends it, and can't be moved otherwise.
template <typename Binding>
auto BindCommonAttributes(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Attr<float>("scale")
      .template Attr<float>("soft_cap")
      .template Attr<bool>("is_causal")
      .template Attr<int64_t>("query_offset")
      .template Attr<int64_t>("window_left")
      .template Attr<int64_t>("window_right")
      .template Attr<int64_t>("sink_tokens")
      .template Attr<int64_t>("aux")
      .template Attr<bool>("is_bf16")
      .template Attr<int64_t>("head_dim")
      .template Attr<int64_t>("head_dim_v")
      .template Attr<int64_t>("arch")
      .template Attr<int64_t>("fp8");
}

template <typename Binding>
auto BindFwdAttributes(Binding&& binding) {
  return BindCommonAttributes(std::forward<Binding>(binding))
      .template Attr<int64_t>("schedule")
      .template Attr<int64_t>("sm_margin")
      .template Attr<int64_t>("kv_len");
}

template <typename Binding>
auto BindBwdAttributes(Binding&& binding) {
  return BindCommonAttributes(std::forward<Binding>(binding))
      .template Attr<bool>("deterministic")
      .template Attr<bool>("has_dlse")
      .template Attr<bool>("has_dslopes");
}

template <typename Binding>
auto BindServeAttributes(Binding&& binding) {
  return BindCommonAttributes(std::forward<Binding>(binding))
      .template Attr<int64_t>("rows")
      .template Attr<bool>("heads_first")
      .template Attr<int64_t>("sm_margin");
}

auto BindInstantiate() { return ffi::Ffi::BindInstantiate(); }

auto BindInitialize() {
  return ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::State<CudaState>>();
}

auto BindExecute() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<driver::CuStream>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::State<CudaState>>()
      .RemainingArgs()
      .RemainingRets();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(CudaFwdInstantiate, Fwd::OnInstantiate,
                              BindFwdAttributes(BindInstantiate()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(CudaFwdInitialize, Fwd::OnInitialize, BindInitialize());
XLA_FFI_DEFINE_HANDLER_SYMBOL(CudaFwdExecute, Fwd::OnExecute, BindExecute(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(CudaBwdInstantiate, Bwd::OnInstantiate,
                              BindBwdAttributes(BindInstantiate()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(CudaBwdInitialize, Bwd::OnInitialize, BindInitialize());
XLA_FFI_DEFINE_HANDLER_SYMBOL(CudaBwdExecute, Bwd::OnExecute, BindExecute(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(CudaServeInstantiate, Serve::OnInstantiate,
                              BindServeAttributes(BindInstantiate()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(CudaServeInitialize, Serve::OnInitialize, BindInitialize());
XLA_FFI_DEFINE_HANDLER_SYMBOL(CudaServeExecute, Serve::OnExecute, BindExecute(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_TypeId* CudaStateTypeId() { return &CudaState::id; }

XLA_FFI_TypeInfo* CudaStateTypeInfo() {
  static XLA_FFI_TypeInfo info = ffi::MakeTypeInfo<CudaState>();
  return &info;
}

}  // namespace jfa
