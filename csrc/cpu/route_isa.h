// Compiles the routing kernels once per instruction set, as isa.h does with the kernels of the
// linear ops.
#pragma once

#include "cpu/isa.h"
#include "cpu/route.h"

namespace weightshare::baseline {
#define WS_BYTES 16
#include "cpu/route_score.inl"
#include "cpu/route.inl"
#undef WS_BYTES
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
#include "cpu/route_score.inl"
#include "cpu/route.inl"
#undef WS_BYTES
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
#include "cpu/route_score.inl"
#include "cpu/route.inl"
#undef WS_BYTES
}  // namespace weightshare::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
