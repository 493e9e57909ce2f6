// Compiles the kernels once per instruction set and picks one at run time. Never -march=native: a
// wheel serves every machine of its platform.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/grouped.h"
#include "cpu/moe.h"
#include "cpu/product.h"
#include "cpu/route.h"
#include "cpu/shard.h"

#define WS_PAIRS 0
namespace weightshare::baseline {
#define WS_BYTES 16
#define WS_ROWS 6
#include "cpu/mixture.inl"
#include "cpu/product.inl"
#include "cpu/entangle.inl"
#include "cpu/grouped.inl"
#include "cpu/moe.inl"
#include "cpu/shard.inl"
#include "cpu/route_score.inl"
#include "cpu/route.inl"
#undef WS_BYTES
#undef WS_ROWS
}  // namespace weightshare::baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace weightshare::avx2 {
#define WS_BYTES 32
#define WS_ROWS 6
#include "cpu/mixture.inl"
#include "cpu/product.inl"
#include "cpu/entangle.inl"
#include "cpu/grouped.inl"
#include "cpu/moe.inl"
#include "cpu/shard.inl"
#include "cpu/route_score.inl"
#include "cpu/route.inl"
#undef WS_BYTES
#undef WS_ROWS
}  // namespace weightshare::avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace weightshare::avx512 {
#define WS_BYTES 64
#define WS_ROWS 14
#include "cpu/mixture.inl"
#include "cpu/product.inl"
#include "cpu/entangle.inl"
#include "cpu/grouped.inl"
#include "cpu/moe.inl"
#include "cpu/shard.inl"
#include "cpu/route_score.inl"
#include "cpu/route.inl"
#undef WS_BYTES
#undef WS_ROWS
}  // namespace weightshare::avx512
#undef WS_PAIRS
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace weightshare::avx512bf16 {  // only what multiplies bfloat16 in pairs is chosen from here
#define WS_PAIRS 1
#define WS_BYTES 64
#define WS_ROWS 14
#include "cpu/mixture.inl"
#include "cpu/product.inl"
#include "cpu/grouped.inl"
#include "cpu/moe.inl"
#include "cpu/shard.inl"
#undef WS_BYTES
#undef WS_ROWS
}  // namespace weightshare::avx512bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace weightshare {

enum class Isa { baseline, avx2, avx512 };

// Best instruction set of this machine, or a lower one that WEIGHTSHARE_ISA asks for.
inline Isa isa() {
  static const Isa chosen = [] {
#if defined(__x86_64__)
    const char* asked = std::getenv("WEIGHTSHARE_ISA");
    auto is = [&](const char* name) { return asked != nullptr && std::strcmp(asked, name) == 0; };
    __builtin_cpu_init();
    if (is("baseline")) return Isa::baseline;
    if (!is("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return Isa::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      return Isa::avx2;
    }
#endif
    return Isa::baseline;
  }();
  return chosen;
}

// The chosen build of a kernel, as a function pointer: WS_CHOSEN(product<T, R>).
#if defined(__x86_64__)
#define WS_CHOSEN(...)                                                                      \
  (::weightshare::isa() == ::weightshare::Isa::avx512 ? &::weightshare::avx512::__VA_ARGS__ \
   : ::weightshare::isa() == ::weightshare::Isa::avx2 ? &::weightshare::avx2::__VA_ARGS__   \
                                                      : &::weightshare::baseline::__VA_ARGS__)
#else
#define WS_CHOSEN(...) (&::weightshare::baseline::__VA_ARGS__)
#endif

// Whether the processor multiplies pairs of bfloat16, which avx512bf16 is for.
inline bool multiplies_pairs() {
#if defined(__x86_64__)
  static const bool found = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return found;
#else
  return false;
#endif
}

// The same for kernels on T that multiply bfloat16 in pairs where they can.
#if defined(__x86_64__)
#define WS_CHOSEN_PAIRS(T, ...)                                                              \
  ([] {                                                                                      \
    if constexpr (std::is_same_v<T, ::weightshare::bfloat16>) {                              \
      if (::weightshare::multiplies_pairs()) return &::weightshare::avx512bf16::__VA_ARGS__; \
    }                                                                                        \
    return WS_CHOSEN(__VA_ARGS__);                                                           \
  }())
#else
#define WS_CHOSEN_PAIRS(T, ...) WS_CHOSEN(__VA_ARGS__)
#endif

}  // namespace weightshare
