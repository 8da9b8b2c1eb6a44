// A bounds-checked reader of the few ELF parts that describe a kernel.
//
// A kernel `f` is section `.text.f`, its static shared memory `.nv.shared.f`. Sections `.nv.info`
// (whole file, entries begin with a symbol index) and `.nv.info.f` hold records of
// {format byte, attribute byte, 16-bit value or size, then `size` bytes where the format says so}.
#include "cc/cubin.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace jfa {
namespace {

constexpr uint8_t kFormatSizedValue = 4;  // the 16 bits are the size of what follows
constexpr uint8_t kFormatHalfValue = 3;   // the 16 bits are the value
constexpr uint8_t kAttributeFrameSize = 0x11;
constexpr uint8_t kAttributeRegisterCount = 0x2f;
constexpr uint8_t kAttributeParamInfo = 0x17;
constexpr uint8_t kAttributeParamBytes = 0x19;

constexpr uint32_t kSectionSymbols = 2;

class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}

  // Zero where the offset is outside; `ok` remembers it.
  template <typename T>
  T Get(uint64_t offset) {
    T value{};
    if (offset > bytes_.size() || bytes_.size() - offset < sizeof(T)) {
      ok_ = false;
      return value;
    }
    std::memcpy(&value, bytes_.data() + offset, sizeof(T));
    return value;
  }

  std::string_view Slice(uint64_t offset, uint64_t size) {
    if (offset > bytes_.size() || bytes_.size() - offset < size) {
      ok_ = false;
      return {};
    }
    return bytes_.substr(offset, size);
  }

  std::string_view CString(uint64_t offset) {
    if (offset >= bytes_.size()) return {};
    const std::string_view rest = bytes_.substr(offset);
    return rest.substr(0, std::min(rest.find('\0'), rest.size()));
  }

  bool ok() const { return ok_; }

 private:
  std::string_view bytes_;
  bool ok_ = true;
};

struct Section {
  std::string_view name;
  uint32_t type;
  uint64_t offset;
  uint64_t size;
  uint32_t link;
};

constexpr int kMaxSections = 4096;

Section ReadSection(Reader& elf, uint64_t headers, uint64_t names, uint32_t index) {
  const uint64_t at = headers + uint64_t{index} * 64;
  return {elf.CString(names + elf.Get<uint32_t>(at)), elf.Get<uint32_t>(at + 4),
          elf.Get<uint64_t>(at + 24), elf.Get<uint64_t>(at + 32), elf.Get<uint32_t>(at + 40)};
}

// Records of one .nv.info section. `symbol_index` filters records that name a function; -1 in the
// section of the kernel itself, whose records don't.
void ReadInfo(std::string_view info, int64_t symbol_index, KernelResources* resources) {
  Reader reader(info);
  int param_end = -1, param_begin = 0;
  for (uint64_t at = 0; at + 4 <= info.size();) {
    const auto format = reader.Get<uint8_t>(at);
    const auto attribute = reader.Get<uint8_t>(at + 1);
    const auto half = reader.Get<uint16_t>(at + 2);
    at += 4;
    if (format == kFormatHalfValue && attribute == kAttributeParamBytes && symbol_index < 0) {
      param_end = half;
    }
    if (format != kFormatSizedValue) continue;
    // Kernels have one parameter; one that is aligned to more than 16 bytes doesn't begin at 0.
    if (attribute == kAttributeParamInfo && symbol_index < 0 && half >= 8) {
      param_begin = reader.Get<uint16_t>(at + 6);
    }
    if (symbol_index >= 0 && half >= 8 && at + 8 <= info.size() &&
        reader.Get<uint32_t>(at) == symbol_index) {
      const int value = static_cast<int>(reader.Get<uint32_t>(at + 4));
      if (attribute == kAttributeFrameSize) resources->local_bytes = value;
      if (attribute == kAttributeRegisterCount) resources->registers = value;
    }
    at += half;
  }
  if (param_end >= 0) resources->param_bytes = param_end - param_begin;
}

// "12" of "..., 12 bytes spill stores, ...", added up over the log.
bool AddBytesBefore(std::string_view log, std::string_view phrase, int* sum) {
  bool found = false;
  for (size_t at = log.find(phrase); at != std::string_view::npos;
       at = log.find(phrase, at + phrase.size())) {
    size_t begin = at;
    while (begin > 0 && log[begin - 1] >= '0' && log[begin - 1] <= '9') --begin;
    if (begin == at) continue;
    *sum += std::atoi(std::string(log.substr(begin, at - begin)).c_str());
    found = true;
  }
  return found;
}

}  // namespace

Status ReadResources(std::string_view cubin, std::string_view symbol, KernelResources* resources) {
  Reader elf(cubin);
  if (cubin.substr(0, 5) != std::string_view("\177ELF\2", 5)) {
    return Internal("jax_flashattn: the compiler's result is no 64-bit ELF file");
  }
  const auto headers = elf.Get<uint64_t>(40);
  const auto count = std::min<int>(elf.Get<uint16_t>(60), kMaxSections);
  const auto names_index = elf.Get<uint16_t>(62);
  const auto names = elf.Get<uint64_t>(headers + uint64_t{names_index} * 64 + 24);

  const std::string text_name = ".text." + std::string(symbol);
  const std::string shared_name = ".nv.shared." + std::string(symbol);
  const std::string info_name = ".nv.info." + std::string(symbol);
  Section symbols{}, info{}, kernel_info{};
  bool has_text = false;
  resources->shared_bytes = 0;
  for (int i = 0; i < count && elf.ok(); ++i) {
    const Section section = ReadSection(elf, headers, names, i);
    if (section.name == text_name) has_text = true;
    if (section.name == shared_name) resources->shared_bytes = static_cast<int>(section.size);
    if (section.name == ".nv.info") info = section;
    if (section.name == info_name) kernel_info = section;
    if (section.type == kSectionSymbols) symbols = section;
  }
  if (!elf.ok()) return Internal("jax_flashattn: the cubin is cut off or damaged");
  if (!has_text) {
    return Internal("jax_flashattn: the cubin has no kernel " + std::string(symbol));
  }

  const Section strings = ReadSection(elf, headers, names, symbols.link);
  for (uint64_t i = 0; i < symbols.size / 24 && elf.ok(); ++i) {
    const uint64_t at = symbols.offset + i * 24;
    if (elf.CString(strings.offset + elf.Get<uint32_t>(at)) == symbol) {
      ReadInfo(elf.Slice(info.offset, info.size), static_cast<int64_t>(i), resources);
      break;
    }
  }
  ReadInfo(elf.Slice(kernel_info.offset, kernel_info.size), -1, resources);
  return elf.ok() ? OkStatus() : Internal("jax_flashattn: the cubin is cut off or damaged");
}

int SpillBytes(std::string_view log) {
  int sum = 0;
  const bool stores = AddBytesBefore(log, " bytes spill stores", &sum);
  const bool loads = AddBytesBefore(log, " bytes spill loads", &sum);
  return stores || loads ? sum : -1;
}

}  // namespace jfa
