// Small kernels, right and wrong ones, that the tests of the shim run.
#include "cuda/launch.cuh"

#include "host.h"

namespace {

using namespace weightshare::cuda;

constexpr int kThreads = 96;  // three warps

template <typename... Wanted, typename... Given>
const char* run(void (*kernel)(Wanted...), int blocks, size_t shared, Given... arguments) {
  return guarded([&] { return launch(kernel, blocks, kThreads, shared, nullptr, arguments...); });
}

// One sum per block: shuffles within a warp, shared memory between warps.
__global__ void block_sum(const float* in, float* out, int n) {
  __shared__ float sums[kThreads / 32];
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    v += in[i];
  for (int step = 16; step > 0; step /= 2) v += __shfl_down_sync(kAllLanes, v, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0] + sums[1] + sums[2];
}

// The same without the barrier: reads what other warps have not written yet.
__global__ void block_sum_without_barrier(float* out) {
  __shared__ float sums[kThreads / 32];
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = 1;
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0] + sums[1] + sums[2];
}

__global__ void visit(int* times, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) atomicAdd(times + i, 1);
}

__global__ void atomics(int* out) {
  const int t = threadIdx.x;
  atomicAdd(out, 2);
  atomicMax(out + 1, t);
  atomicMin(out + 2, t);
  atomicOr(out + 3, 1 << t % 8);
  atomicAnd(out + 4, ~(1 << t % 8));
  atomicExch(out + 5, 7);
  atomicCAS(out + 6, t, t + 1);
}

// Every shuffle and vote, in groups of `width` lanes; seven results per thread.
__global__ void warp_results(int* out, int width) {
  const int lane = threadIdx.x % 32;
  int* mine = out + 7 * threadIdx.x;
  mine[0] = __shfl_sync(kAllLanes, lane, 1, width);
  mine[1] = __shfl_up_sync(kAllLanes, lane, 3u, width);
  mine[2] = __shfl_down_sync(kAllLanes, lane, 3u, width);
  mine[3] = __shfl_xor_sync(kAllLanes, lane, 5, width);
  mine[4] = static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0));
  mine[5] = __any_sync(kAllLanes, lane == 9) + 2 * __any_sync(kAllLanes, lane == 99);
  mine[6] = __all_sync(kAllLanes, lane < 32) + 2 * __all_sync(kAllLanes, lane < 31);
}

__global__ void half_warps(int* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  if (threadIdx.x % 32 < 16)
    out[threadIdx.x] = __popc(__ballot_sync(mask, 1));
  else
    out[threadIdx.x] = 100 + __popc(__ballot_sync(mask, 1));
}

__global__ void block_votes(int* out) {
  out[0] = __syncthreads_count(threadIdx.x < 40);
  out[1] = __syncthreads_or(threadIdx.x == 95) + 2 * __syncthreads_or(threadIdx.x == 96);
  out[2] = __syncthreads_and(threadIdx.x < 96) + 2 * __syncthreads_and(threadIdx.x < 95);
}

__global__ void poison(unsigned* out, int bytes) {
  __shared__ unsigned fixed[4];
  unsigned* dynamic = dynamic_shared<unsigned>();
  if (threadIdx.x == 0) {
    out[2 * blockIdx.x] = fixed[2];
    out[2 * blockIdx.x + 1] = dynamic[bytes / 4 - 1];
    fixed[2] = dynamic[bytes / 4 - 1] = 5;  // must not be seen by the next block
  }
}

// ---- wrong kernels ------------------------------------------------------------------------------

__global__ void diverge_at_barrier() {
  if (threadIdx.x < 64)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void exit_before_barrier() {
  if (threadIdx.x == 70 && blockIdx.x == 1) return;
  __syncthreads();
}
__global__ void diverge_at_shuffle(int* out) {
  if (threadIdx.x % 32 < 8)
    *out = __shfl_sync(kAllLanes, 1, 0);
  else
    *out = __shfl_xor_sync(kAllLanes, 1, 1);
}
__global__ void exit_before_shuffle(int* out) {
  if (threadIdx.x == 37) return;
  *out = __shfl_down_sync(kAllLanes, 1, 1u);
}
__global__ void shuffle_against_barrier(int* out) {
  if (threadIdx.x == 5) __syncthreads();
  *out = __shfl_up_sync(kAllLanes, 1, 1u);
  if (threadIdx.x != 5) __syncthreads();
}
__global__ void caller_not_in_mask() { __syncwarp(0x7fffffffu); }
__global__ void masks_differ() { __syncwarp(threadIdx.x % 32 == 3 ? 0x0000000fu : kAllLanes); }
__global__ void lane_outside_width(int* out) { *out = __shfl_sync(kAllLanes, 1, 8, 8); }
__global__ void bad_width(int* out) { *out = __shfl_up_sync(kAllLanes, 1, 1u, 12); }
__global__ void reads_absent_lane(int* out) {
  if (threadIdx.x % 32 < 4) *out = __shfl_sync(0xfu, 1, 4);
}
__global__ void past_shared(int bytes) { dynamic_shared<unsigned char>()[bytes] = 1; }

}  // namespace

extern "C" {
const char* run_block_sum(const float* in, float* out, int n, int blocks) {
  return run(block_sum, blocks, 0, in, out, n);
}
const char* run_block_sum_without_barrier(float* out) {
  return run(block_sum_without_barrier, 1, 0, out);
}
const char* run_visit(int* times, int n, int blocks) { return run(visit, blocks, 0, times, n); }
const char* run_atomics(int* out) { return run(atomics, 2, 0, out); }
const char* run_warp_results(int* out, int width) { return run(warp_results, 1, 0, out, width); }
const char* run_half_warps(int* out) { return run(half_warps, 1, 0, out); }
const char* run_block_votes(int* out) { return run(block_votes, 1, 0, out); }
const char* run_poison(unsigned* out, int blocks, int bytes) {
  return run(poison, blocks, bytes, out, bytes);
}
const char* run_past_shared(int bytes) { return run(past_shared, 1, bytes, bytes); }
const char* run_launch(int64_t blocks, int threads, int bytes) {
  return guarded([&] { return launch(past_shared, blocks, threads, bytes, nullptr, 0); });
}

// Wrong kernels by number; each must be reported.
const char* run_wrong(int number) {
  static int out;
  switch (number) {
    case 0:
      return run(diverge_at_barrier, 1, 0);
    case 1:
      return run(exit_before_barrier, 2, 0);
    case 2:
      return run(diverge_at_shuffle, 1, 0, &out);
    case 3:
      return run(exit_before_shuffle, 1, 0, &out);
    case 4:
      return run(shuffle_against_barrier, 1, 0, &out);
    case 5:
      return run(caller_not_in_mask, 1, 0);
    case 6:
      return run(masks_differ, 1, 0);
    case 7:
      return run(lane_outside_width, 1, 0, &out);
    case 8:
      return run(bad_width, 1, 0, &out);
    case 9:
      return run(reads_absent_lane, 1, 0, &out);
    default:
      return nullptr;
  }
}

// A copy that ends, or starts, at a page no one may touch: straying there is a fault.
void* fenced_copy(const void* from, size_t bytes, int at_end);
int half_roundtrip(int bits);
int half_from_float(float v);
int bfloat16_from_float(float v);
void divide(int64_t a, int64_t b, int64_t* result);
}

#include <sys/mman.h>
#include <unistd.h>

void* fenced_copy(const void* from, size_t bytes, int at_end) {
  const size_t page = sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page;
  auto* start = static_cast<char*>(mmap(nullptr, (pages + 2) * page, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(start, page, PROT_NONE);
  mprotect(start + (pages + 1) * page, page, PROT_NONE);
  char* copy = at_end ? start + (pages + 1) * page - bytes : start + page;
  if (bytes) std::memcpy(copy, from, bytes);
  return copy;
}
int half_roundtrip(int bits) {
  return __float2half_rn(__half2float({static_cast<uint16_t>(bits)})).bits;
}
int half_from_float(float v) { return __float2half_rn(v).bits; }
int bfloat16_from_float(float v) { return __float2bfloat16_rn(v).bits; }
void divide(int64_t a, int64_t b, int64_t* result) {
  const Quotient q = Divisor(b)(a);
  result[0] = q.quotient;
  result[1] = q.remainder;
}
