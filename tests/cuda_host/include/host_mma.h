// The tensor cores' m16n8k16 product as a collective of a warp; fragments as csrc/cuda/mma.cuh
// says.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace host_cuda {

struct Fragments {
  float* sum;
  const uint32_t *a, *b;
};

template <typename T>
float element(const uint32_t* words, int word, int half) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(words + word) + half * sizeof value,
              sizeof value);
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(value);
  else
    return __bfloat162float(value);
}

template <typename T>
void multiply(Thread* const* lane, unsigned) {
  const auto of = [&](int i) { return reinterpret_cast<const Fragments*>(lane[i]->arrival.value); };
  float a[16][16], b[16][8];
  for (int k = 0; k < 16; ++k) {
    const int q = k % 8 / 2;
    for (int m = 0; m < 16; ++m)
      a[m][k] = element<T>(of(m % 8 * 4 + q)->a, k / 8 * 2 + m / 8, k % 2);
    for (int n = 0; n < 8; ++n) b[k][n] = element<T>(of(n * 4 + q)->b, k / 8, k % 2);
  }
  for (int i = 0; i < 32; ++i)
    for (int e = 0; e < 4; ++e) {
      float& sum = of(i)->sum[e];
      for (int k = 0; k < 16; ++k) sum += a[i / 4 + e / 2 * 8][k] * b[k][i % 4 * 2 + e % 2];
    }
}

template <typename T>
void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HOST_CUDA_SITE) {
  const Fragments mine = {sum, a, b};
  Block::active().meet({"mma", file, line, 0xffffffffu, reinterpret_cast<uint64_t>(&mine), 0},
                       multiply<T>);
}

}  // namespace host_cuda
