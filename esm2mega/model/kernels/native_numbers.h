// Numbers as the compiled sources read and write them: wide in registers, bf16 in memory only.
#pragma once

#include <cstdint>
#include <cstring>

struct bf16 {
  uint16_t bits;
};

inline double wide(double x) { return x; }
inline float wide(float x) { return x; }
inline float wide(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void rounded(double x, double& out) { out = x; }
inline void rounded(float x, float& out) { out = x; }
inline void rounded(float x, bf16& out) {  // to the nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
