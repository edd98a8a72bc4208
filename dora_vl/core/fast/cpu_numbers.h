// Half-precision numbers as float and back, in forms that compilers turn into vector instructions.

#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

using c10::BFloat16;

constexpr int64_t GRAIN = 32768;  // numbers below which a pass is not worth a second thread

inline int64_t grain(int64_t numbers_each) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(numbers_each, 1)); }

inline float wide(float value) { return value; }
inline float wide(BFloat16 value) {
  uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
template <typename T> inline T narrow(float value);
template <> inline float narrow<float>(float value) { return value; }
template <> inline BFloat16 narrow<BFloat16>(float value) {  // to nearest even; branchless, so that it vectorises
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uint32_t result = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
  return BFloat16(static_cast<uint16_t>(result), BFloat16::from_bits());
}
