// Stands in for CUDA's header of this name: storage and conversions, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7fffu;
  // Move exponent and mantissa up, then mend the exponent's bias (127 - 15) by a product, which
  // is exact for subnormals, too.
  uint32_t bits = magnitude << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;
  std::memcpy(&bits, &value, sizeof bits);
  if (magnitude >= 0x7c00u) bits |= 0x7f800000u;  // infinity and NaN
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline __half __float2half_rn(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {uint16_t(sign | 0x7fffu)};   // NaN
  if (bits >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to infinity
  if (bits < 0x38800000u) {                                    // subnormal or zero
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;  // aligns the last bit of a half subnormal with float's, and rounds
    std::memcpy(&bits, &magnitude, sizeof bits);
    return {uint16_t(sign | (bits - 0x3f000000u))};
  }
  bits += 0xfffu + (bits >> 13 & 1u);
  return {uint16_t(sign | (bits - 0x38000000u) >> 13)};
}
