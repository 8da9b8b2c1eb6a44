// Which optional arrays a custom call has: bits of attribute `aux`, the same on every platform.
#ifndef JAX_FLASHATTN_CC_AUX_BITS_H_
#define JAX_FLASHATTN_CC_AUX_BITS_H_

#include <cstdint>

namespace jfa {

// In the order of AUX_NAMES of _spec.py.
enum AuxBit : int64_t {
  kQueryOffset = 1 << 0,
  kQLengths = 1 << 1,
  kKvLengths = 1 << 2,
  kQSegmentIds = 1 << 3,
  kKvSegmentIds = 1 << 4,
  kAlibiSlopes = 1 << 5,
  kSinks = 1 << 6,
  kCuSeqlensQ = 1 << 7,
  kCuSeqlensKv = 1 << 8,
  kPageTable = 1 << 9,
  kQkScale = 1 << 10,
  kVScale = 1 << 11,
  kAllAux = (1 << 12) - 1,
};

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_AUX_BITS_H_
