// What the CUDA bindings share: the current stream, and errors of launches.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "bindings/tensor.h"
#include "cuda/launch.cuh"

namespace weightshare::cuda {

inline void check_launch(const char* op, cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, op, ": ", cudaGetErrorString(status));
}

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace weightshare::cuda
