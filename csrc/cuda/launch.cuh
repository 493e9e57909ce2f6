// What every kernel needs: element types, wide loads, shared memory, warp sums, a launch.
//
// Kernels and launchers here compile under nvcc, and under g++ with the headers of
// tests/cuda_host/include, which run them on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cooperative_groups.h>
#endif

namespace weightshare::cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVectorBytes = 16;         // widest access of one lane
constexpr int kSharedBytes = 48 * 1024;  // dynamic shared memory a block has without asking

// ---- element types: sums are kept in Sum<T>, double for double, else float ----------------------

template <typename T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <typename T>
using Sum = typename SumOf<T>::type;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T narrow(Sum<T> v) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(v);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(v);
  else
    return v;
}

// ---- wide access --------------------------------------------------------------------------------

template <typename T, int V>
struct alignas(sizeof(T) * V) Vec {
  T at[V];
};

// Load a vector, or zeros without touching memory; p is aligned to a whole Vec.
template <typename T, int V>
__device__ __forceinline__ Vec<T, V> load_if(bool wanted, const T* __restrict__ p) {
  return wanted ? *reinterpret_cast<const Vec<T, V>*>(p) : Vec<T, V>{};
}

template <typename T, int V>
__device__ __forceinline__ void store_if(bool wanted, T* __restrict__ p, const Vec<T, V>& v) {
  if (wanted) *reinterpret_cast<Vec<T, V>*>(p) = v;
}

template <typename... P>
bool aligned_to_vectors(const P*... pointers) {
  return (((reinterpret_cast<uintptr_t>(pointers) % kVectorBytes) == 0) && ...);
}

// ---- blocks and warps ---------------------------------------------------------------------------

extern __shared__ unsigned char dynamic_shared_bytes alignas(16)[];

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

// Sum over the warp, the same in every lane, in an order that does not vary.
template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

// Sums over the warp of Count values at once, each left to a share of the lanes: halves change
// hands, until a lane holds Kept values of 32 * Kept / Count lanes, which still have to be summed
// where there are others that hold the same. The values that lane i holds first are those from
// i * Count / 32 / Kept * Kept on. The order of additions does not vary.
template <int Count, int Kept, int Step = kWarp / 2, typename T, int N>
__device__ __forceinline__ void warp_scatter(T (&v)[N]) {
  if constexpr (Count > Kept) {
    constexpr int kHalf = Count / 2;
    const bool upper = threadIdx.x & Step;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const T given = upper ? v[i] : v[i + kHalf];
      v[i] = (upper ? v[i + kHalf] : v[i]) + __shfl_xor_sync(kAllLanes, given, Step);
    }
    warp_scatter<kHalf, Kept, Step / 2>(v);
  }
}

// Ask for the line of an address, which may be used later, to be brought into L2.
__device__ __forceinline__ void prefetch(const void* p) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  (void)p;
#endif
}

// ---- arithmetic ---------------------------------------------------------------------------------

struct Quotient {
  int64_t quotient, remainder;
};

// Divides numbers in 0..2^52 by a number the host knows: a product with its rounded inverse, which
// in that range is never too large and at most one too small. 64-bit division is a subroutine of
// a hundred instructions, and registers spill around it.
struct Divisor {
  int64_t value;
  double inverse;

  Divisor(int64_t v = 1) : value(v), inverse(1.0 / double(v)) {}
  __device__ __forceinline__ Quotient operator()(int64_t a) const {
    int64_t q = static_cast<int64_t>(static_cast<double>(a) * inverse);
    int64_t r = a - q * value;
    if (r >= value) {
      ++q;
      r -= value;
    }
    return {q, r};
  }
};

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
__host__ __device__ constexpr T least(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
__host__ __device__ constexpr T clamp(T v, T low, T high) {
  return v < low ? low : (v > high ? high : v);
}

// ---- launch -------------------------------------------------------------------------------------

// Start a kernel; cudaLaunchKernelEx is a plain template, so the host can stand in for it.
template <typename... Wanted, typename... Given>
cudaError_t launch(void (*kernel)(Wanted...), int64_t blocks, int threads, size_t shared,
                   cudaStream_t stream, Given... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// ---- launches of two phases, every block of the second after every block of the first ----------

constexpr int kFirstPhase = 1, kSecondPhase = 2;

// The kernel's last argument says which phases to run, and it calls this between them.
__device__ __forceinline__ void phase_barrier([[maybe_unused]] int phases) {
#ifdef __CUDACC__
  if (phases == (kFirstPhase | kSecondPhase)) cooperative_groups::this_grid().sync();
#endif
}

// One launch, all blocks resident; the host, which runs blocks one after another, launches each
// phase by itself.
template <typename... Wanted, typename... Given>
cudaError_t launch_phases(void (*kernel)(Wanted...), int64_t blocks, int threads, size_t shared,
                          cudaStream_t stream, Given... arguments) {
#ifdef __CUDACC__
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments..., kFirstPhase | kSecondPhase);
#else
  for (int phase : {kFirstPhase, kSecondPhase}) {
    const cudaError_t status = launch(kernel, blocks, threads, shared, stream, arguments..., phase);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
#endif
}

}  // namespace weightshare::cuda
