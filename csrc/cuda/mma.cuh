// The tensor cores' product of 16 x 16 by 16 x 8 elements, a warp together.
//
// With g = lane / 4 and q = lane % 4, a lane holds of the left factor rows g and g + 8 (a[0], a[1]:
// columns 2q and 2q + 1; a[2], a[3]: 2q + 8 and 2q + 9), of the right one column g (b[0]: rows 2q
// and 2q + 1, b[1]: 2q + 8 and 2q + 9), and of the result rows g and g + 8 (sum[0..1], sum[2..3]),
// columns 2q and 2q + 1.
#pragma once

#include "cuda/launch.cuh"

#ifndef __CUDACC__
#include "host_mma.h"
#endif

namespace weightshare::cuda {

template <typename T>
__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
#ifdef __CUDACC__
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
#else
  host_cuda::mma<T>(sum, a, b);
#endif
}

// Two elements in a word, the first in its lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float lower, float upper) {
  const Vec<T, 2> both = {narrow<T>(lower), narrow<T>(upper)};
  uint32_t word;
  memcpy(&word, &both, sizeof word);
  return word;
}

template <typename T>
__device__ __forceinline__ Vec<float, 2> unpack(uint32_t word) {
  Vec<T, 2> both;
  memcpy(&both, &word, sizeof word);
  return {widen(both.at[0]), widen(both.at[1])};
}

}  // namespace weightshare::cuda
