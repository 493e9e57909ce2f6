// Read before a CUDA binding, so that it compiles for the host and serves CPU tensors: the same
// conversions, checks and launches, on what the shim offers instead of a device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda_runtime.h"

namespace torch::stable::accelerator {
struct HostGuard {
  explicit HostGuard(int) {}
  ~HostGuard() {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard HostGuard

inline AOTITorchError host_current_stream(int, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
#define aoti_torch_get_current_cuda_stream host_current_stream

// STABLE_TORCH_LIBRARY_IMPL(weightshare, CUDA, m) then names the key of CPU tensors.
#define CUDA CPU
