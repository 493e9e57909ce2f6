// Stands in for CUDA's header of this name when g++ compiles csrc/cuda/*.cuh for the host.
//
// The subset kernels may use: thread and block indices, __shared__ (static, and dynamic through
// weightshare::cuda::dynamic_shared), __syncthreads and its voting forms, warp shuffles, votes,
// matches, integer reductions and __syncwarp, atomics, __ldg, bit intrinsics, and
// cudaLaunchKernelEx. All of it runs on one OS thread, block after block.
#pragma once

#include <link.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "fibres.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// Thread-local storage has what __shared__ needs: static at block scope, legal after `extern`,
// and one contiguous range per library, which can be poisoned before each block.
#define __shared__ thread_local

namespace host_cuda {
constexpr size_t kSharedLimit = 48 * 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in every float format, -1 in every integer
inline thread_local char anchor;         // tells which range of thread-local storage is ours
}  // namespace host_cuda

namespace weightshare::cuda {
inline thread_local unsigned char dynamic_shared_bytes alignas(16)[host_cuda::kSharedLimit + 64];
}

// ---- runtime API ------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;  // of which launchers plan for all
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "invalid configuration argument";
}

namespace host_cuda {

// Fill all shared memory with poison: reading what no thread of this block wrote shows.
inline void poison_shared() {
  anchor = 0;  // touched, so that the storage exists
  auto visit = [](dl_phdr_info* info, size_t, void*) {
    auto* start = static_cast<char*>(info->dlpi_tls_data);
    for (int i = 0; start && i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      if (header.p_type != PT_TLS || &anchor < start || &anchor >= start + header.p_memsz) continue;
      std::memset(start, kPoison, header.p_memsz);
      return 1;
    }
    return 0;
  };
  if (!dl_iterate_phdr(visit, nullptr)) throw std::runtime_error("no shared memory to poison");
}

inline void check_shared_end(size_t bytes) {
  const unsigned char* memory = weightshare::cuda::dynamic_shared_bytes;
  for (size_t i = bytes; i < sizeof weightshare::cuda::dynamic_shared_bytes; ++i)
    if (memory[i] != kPoison)
      throw std::runtime_error("block " + at(blockIdx) + ": wrote dynamic shared memory at byte " +
                               std::to_string(i) + " of " + std::to_string(bytes));
}

}  // namespace host_cuda

template <typename... Wanted, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Wanted...),
                               Given&&... given) {
  const dim3 &g = c->gridDim, &b = c->blockDim;
  const uint64_t threads = uint64_t(b.x) * b.y * b.z;
  if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535 || !threads ||
      threads > host_cuda::kMaxThreads || c->dynamicSmemBytes > host_cuda::kSharedLimit)
    return cudaErrorInvalidConfiguration;
  static host_cuda::Block block;
  gridDim = g;
  blockDim = b;
  const std::function<void()> body = [&] { kernel(static_cast<Wanted>(given)...); };
  for (unsigned z = 0; z < g.z; ++z)
    for (unsigned y = 0; y < g.y; ++y)
      for (unsigned x = 0; x < g.x; ++x) {
        blockIdx = {x, y, z};
        host_cuda::poison_shared();
        block.run(body);
        host_cuda::check_shared_end(c->dynamicSmemBytes);
      }
  return cudaSuccess;
}

// ---- block and warp collectives ----------------------------------------------------------------

#define HOST_CUDA_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace host_cuda {

inline void nothing(Thread* const*, unsigned) {}

inline void ballot(Thread* const* lane, unsigned count) {
  uint64_t bits = 0;
  for (unsigned i = 0; i < count; ++i)
    if (lane[i] && lane[i]->arrival.value) bits |= uint64_t(1) << i;
  for (unsigned i = 0; i < count; ++i)
    if (lane[i]) lane[i]->result = bits;
}

inline void tally(Thread* const* lane, unsigned count) {
  uint64_t n = 0;
  for (unsigned i = 0; i < count; ++i) n += lane[i]->arrival.value != 0;
  for (unsigned i = 0; i < count; ++i) lane[i]->result = n;
}

inline void gather(Thread* const* lane, unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    if (!lane[i]) continue;
    const unsigned source = lane[i]->arrival.source;
    if (!lane[source])
      Block::fail(*lane[i], std::string(lane[i]->arrival.kind) + " reads lane " +
                                std::to_string(source) + ", which is not in the mask");
    lane[i]->result = lane[source]->arrival.value;
  }
}

// Bit i of a lane's result: lane i brings the same value.
inline void match(Thread* const* lane, unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    if (!lane[i]) continue;
    uint64_t bits = 0;
    for (unsigned j = 0; j < count; ++j)
      if (lane[j] && lane[j]->arrival.value == lane[i]->arrival.value) bits |= uint64_t(1) << j;
    lane[i]->result = bits;
  }
}

inline void largest(Thread* const* lane, unsigned count) {
  uint64_t most = 0;
  for (unsigned i = 0; i < count; ++i)
    if (lane[i]) most = std::max(most, lane[i]->arrival.value);
  for (unsigned i = 0; i < count; ++i)
    if (lane[i]) lane[i]->result = most;
}

inline unsigned vote(const char* kind, unsigned mask, bool predicate, const char* file, int line) {
  return unsigned(Block::active().meet({kind, file, line, mask, predicate, 0}, ballot));
}

inline unsigned lane_id() { return Block::active().current().rank % kWarp; }

template <typename T>
T shuffle(const char* kind, unsigned mask, T value, unsigned source, int width, const char* file,
          int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  if (width < 1 || width > 32 || (width & (width - 1)))
    Block::fail(Block::active().current(), std::string(kind) + ": width " + std::to_string(width) +
                                               " is not a power of two up to 32");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = Block::active().meet({kind, file, line, mask, bits, source}, gather);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace host_cuda

inline void __syncthreads(HOST_CUDA_SITE) {
  host_cuda::Block::active().meet({"__syncthreads", file, line, host_cuda::kBlock, 0, 0},
                                  host_cuda::nothing);
}
inline int __syncthreads_count(int p, HOST_CUDA_SITE) {
  return int(host_cuda::Block::active().meet(
      {"__syncthreads_count", file, line, host_cuda::kBlock, p != 0, 0}, host_cuda::tally));
}
inline int __syncthreads_or(int p, HOST_CUDA_SITE) {
  return __syncthreads_count(p, file, line) != 0;
}
inline int __syncthreads_and(int p, HOST_CUDA_SITE) {
  return __syncthreads_count(!p, file, line) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  host_cuda::Block::active().meet({"__syncwarp", "", 0, mask, 0, 0}, host_cuda::nothing);
}
inline unsigned __ballot_sync(unsigned mask, int p, HOST_CUDA_SITE) {
  return host_cuda::vote("__ballot_sync", mask, p != 0, file, line);
}
inline int __any_sync(unsigned mask, int p, HOST_CUDA_SITE) {
  return host_cuda::vote("__any_sync", mask, p != 0, file, line) != 0;
}
inline int __all_sync(unsigned mask, int p, HOST_CUDA_SITE) {
  return host_cuda::vote("__all_sync", mask, p != 0, file, line) == mask;
}

// Of 32-bit values; CUDA takes 64-bit ones, too.
inline unsigned __match_any_sync(unsigned mask, int v, HOST_CUDA_SITE) {
  return unsigned(host_cuda::Block::active().meet(
      {"__match_any_sync", file, line, mask, unsigned(v), 0}, host_cuda::match));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v, HOST_CUDA_SITE) {
  return unsigned(host_cuda::Block::active().meet({"__reduce_max_sync", file, line, mask, v, 0},
                                                  host_cuda::largest));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned v, HOST_CUDA_SITE) {
  return ~unsigned(host_cuda::Block::active().meet(
      {"__reduce_min_sync", file, line, mask, unsigned(~v), 0}, host_cuda::largest));
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, HOST_CUDA_SITE) {
  // CUDA wraps the lane modulo width; a lane outside is nearly always a mistake, so report it.
  if (source < 0 || source >= width)
    host_cuda::Block::fail(host_cuda::Block::active().current(),
                           "__shfl_sync: lane " + std::to_string(source) + " is outside width " +
                               std::to_string(width));
  const unsigned base = host_cuda::lane_id() & ~unsigned(width - 1);
  return host_cuda::shuffle("__shfl_sync", mask, value, base + source, width, file, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, HOST_CUDA_SITE) {
  const unsigned lane = host_cuda::lane_id(), other = lane ^ unsigned(bits);
  const bool inside = other < (lane & ~unsigned(width - 1)) + width;
  return host_cuda::shuffle("__shfl_xor_sync", mask, value, inside ? other : lane, width, file,
                            line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, HOST_CUDA_SITE) {
  const unsigned lane = host_cuda::lane_id();
  const bool inside = (lane & (width - 1)) + delta < unsigned(width);
  return host_cuda::shuffle("__shfl_down_sync", mask, value, inside ? lane + delta : lane, width,
                            file, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, HOST_CUDA_SITE) {
  const unsigned lane = host_cuda::lane_id();
  const bool inside = (lane & (width - 1)) >= delta;
  return host_cuda::shuffle("__shfl_up_sync", mask, value, inside ? lane - delta : lane, width,
                            file, line);
}

// ---- memory and bits ----------------------------------------------------------------------------

template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }

namespace host_cuda {
// One OS thread runs every fibre and no fibre yields inside: a plain update is atomic.
template <typename T, typename Update>
T update(T* address, Update change) {
  const T old = *address;
  *address = change(old);
  return old;
}
}  // namespace host_cuda

template <typename T>
T atomicAdd(T* a, std::type_identity_t<T> v) {
  return host_cuda::update(a, [=](T old) { return T(old + v); });
}
template <typename T>
T atomicMax(T* a, std::type_identity_t<T> v) {
  return host_cuda::update(a, [=](T old) { return std::max(old, v); });
}
template <typename T>
T atomicMin(T* a, std::type_identity_t<T> v) {
  return host_cuda::update(a, [=](T old) { return std::min(old, v); });
}
template <typename T>
T atomicOr(T* a, std::type_identity_t<T> v) {
  return host_cuda::update(a, [=](T old) { return T(old | v); });
}
template <typename T>
T atomicAnd(T* a, std::type_identity_t<T> v) {
  return host_cuda::update(a, [=](T old) { return T(old & v); });
}
template <typename T>
T atomicExch(T* a, std::type_identity_t<T> v) {
  return host_cuda::update(a, [=](T) { return v; });
}
template <typename T>
T atomicCAS(T* a, std::type_identity_t<T> wanted, std::type_identity_t<T> v) {
  return host_cuda::update(a, [=](T old) { return old == wanted ? v : old; });
}
