#include "cuda/entangle.cuh"
using namespace weightshare::cuda;
#define I(T)                                                                                       \
  template cudaError_t weightshare::cuda::entangle_forward<T>(const T*, const Sum<T>*, T*,         \
                                                              const EntangleShape&, cudaStream_t); \
  template cudaError_t weightshare::cuda::entangle_backward<T>(                                    \
      const T*, const T*, const Sum<T>*, T*, Sum<T>*, Sum<T>*, const EntangleShape&,               \
      const EntangleBackward&, cudaStream_t);
I(float) I(double) I(__half) I(__nv_bfloat16)
