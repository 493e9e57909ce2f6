// Entry points for Python (ctypes): exceptions become messages.
#pragma once

#include <limits>
#include <string>

#include "cuda_runtime.h"

// Run `body`; null if it went well, else what went wrong, valid until the next call.
template <typename Body>
const char* guarded(Body body) {
  static std::string message;
  try {
    const cudaError_t status = body();
    if (status == cudaSuccess) return nullptr;
    message = "the launch was refused: CUDA error " + std::to_string(int(status));
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

// Whether the threads of a block run from the last to the first; results must not depend on it.
extern "C" void run_descending(int on) { host_cuda::descending = on != 0; }
