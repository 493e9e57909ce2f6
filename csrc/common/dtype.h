// Element types on the host. Sums are kept in Sum<T>: double for double, else float.
#pragma once

#include <cstdint>
#include <cstring>

namespace weightshare {

struct bfloat16 {
  uint16_t bits;
};
using float16 = _Float16;

template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(float16 v) { return static_cast<float>(v); }
inline float widen(bfloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

template <class T>
inline T narrow(Sum<T> v) {
  return static_cast<T>(v);
}
template <>
inline bfloat16 narrow<bfloat16>(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  bits += 0x7fffu + ((bits >> 16) & 1u);  // round to nearest, ties to even
  return {static_cast<uint16_t>(bits >> 16)};
}

}  // namespace weightshare
