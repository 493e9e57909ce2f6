// Routing of tokens to experts in one launch: scores, group-limited top k, gates, counts, offsets,
// the stable permutation and its inverse.
//
// A warp takes a token, with its scores as ordered integers in shared memory. The work is in two
// phases with a barrier of the whole grid between them: `choose`, which leaves a histogram per
// block in global memory, and `place`, in which every block sums those histograms for itself and
// sorts its own pairs. A block, and in it a warp, owns neighbouring tokens, so the sort is stable.
// Sums whose order varies are sums of integers: repeats are bitwise equal.
#pragma once

#include "cuda/route_token.cuh"

namespace weightshare::cuda {

constexpr int kRouteWarps = 16;
constexpr int kRouteThreads = kRouteWarps * int(kWarp);
constexpr int kRouteTokensPerWarp = 2;       // before more blocks are worth the sum over them
constexpr unsigned kRouteBlocksAtOnce = 32;  // whose histograms a lane asks for before it adds one

struct RouteTables {
  int64_t *counts, *offsets, *permutation, *inverse;
  int32_t* bins;  // [blocks, experts + 1]: pairs of each block by expert, the last of none
};

// Shared memory of a block: an integer per expert, one per 32 experts, and a row per warp for keys
// and, later, counts.
struct RouteLayout {
  int64_t sums, rows, row;  // first bytes of the second and third part; bytes of a row

  template <typename S>
  static RouteLayout of(const RouteShape& shape) {
    const int64_t bins = int64_t(shape.experts) + 1;
    const int64_t keys = (bins - 1 + shape.limited_groups()) * int64_t(sizeof(RouteKey<S>));
    const int64_t counts = bins * int64_t(sizeof(int32_t));
    RouteLayout layout;
    layout.sums = bins * int64_t(sizeof(int64_t));
    layout.rows = layout.sums + divide_up(bins, kWarp) * int64_t(sizeof(int64_t));
    layout.rows = divide_up(layout.rows, 16) * 16;
    layout.row = divide_up(keys > counts ? keys : counts, 16) * 16;
    return layout;
  }

  template <typename T>
  __device__ __forceinline__ T* at(int64_t byte) const {
    return reinterpret_cast<T*>(dynamic_shared<unsigned char>() + byte);
  }
  __device__ __forceinline__ int32_t* bins() const { return at<int32_t>(0); }
  __device__ __forceinline__ int64_t* places() const { return at<int64_t>(0); }
  __device__ __forceinline__ int64_t* chunk_sums() const { return at<int64_t>(sums); }
  template <typename T>
  __device__ __forceinline__ T* row_of(int warp) const {
    return at<T>(rows + warp * row);
  }
};

// Tokens of this block and, in it, of this warp.
struct RouteSpan {
  int64_t first, last;

  __device__ __forceinline__ RouteSpan(int64_t rows) {
    first = rows * blockIdx.x / gridDim.x;
    const int64_t n = rows * (blockIdx.x + 1) / gridDim.x - first;
    const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    last = first + n * (warp + 1) / warps;
    first += n * warp / warps;
  }
};

// Bin of a pair: its expert, or the one behind all experts.
__device__ __forceinline__ int route_bin(const RouteShape& shape, const bool* padding,
                                         const int64_t* ids, int64_t pair) {
  const uint64_t id = static_cast<uint64_t>(ids[pair]);
  if (id >= static_cast<uint64_t>(shape.experts)) return shape.experts;
  if (padding != nullptr && padding[shape.k_of_pair(pair).quotient]) return shape.experts;
  return static_cast<int>(id);
}

// ---- phase one: choose, or only count where the ids are given -----------------------------------

template <typename S>
__device__ __forceinline__ void route_choose(const RouteShape& shape, const RouteTokens<S>& tokens,
                                             const RouteTables& tables, RouteLayout shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const RouteSpan mine(shape.rows);
  int32_t* bins = shared.bins();
  for (int e = threadIdx.x; e <= shape.experts; e += blockDim.x) bins[e] = 0;
  __syncthreads();
  if (tokens.logits == nullptr) {
    for (int64_t p = mine.first * shape.k + lane; p < mine.last * shape.k; p += kWarp)
      atomicAdd(bins + route_bin(shape, tokens.padding, tokens.ids, p), 1);
  } else {
    for (int64_t t = mine.first; t < mine.last; ++t)
      route_token(shape, tokens, t, shared.row_of<RouteKey<S>>(warp), bins);
  }
  __syncthreads();
  int32_t* to = tables.bins + int64_t(blockIdx.x) * (shape.experts + 1);
  for (int e = threadIdx.x; e <= shape.experts; e += blockDim.x) to[e] = bins[e];
}

// ---- phase two: offsets, permutation and inverse ------------------------------------------------

// Place of the block's first pair of each expert, left in shared memory. For block 0 these are the
// offsets. A warp takes 32 experts at a time: a lane sums over the blocks, the warp over experts.
__device__ __forceinline__ void route_offsets(const RouteShape& shape, const RouteTables& tables,
                                              RouteLayout shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int bins = shape.experts + 1, chunks = static_cast<int>(divide_up(bins, kWarp));
  for (int chunk = warp; chunk < chunks; chunk += warps) {
    const int e = chunk * int(kWarp) + lane;
    int64_t before = 0, total = 0;
    if (e < bins) {
      for (unsigned first = 0; first < gridDim.x; first += kRouteBlocksAtOnce) {
        int32_t counts[kRouteBlocksAtOnce];
#pragma unroll
        for (unsigned i = 0; i < kRouteBlocksAtOnce; ++i)
          counts[i] = first + i < gridDim.x ? tables.bins[int64_t(first + i) * bins + e] : 0;
#pragma unroll
        for (unsigned i = 0; i < kRouteBlocksAtOnce; ++i) {
          before += first + i < blockIdx.x ? counts[i] : 0;
          total += counts[i];
        }
      }
    }
    int64_t sum = total;  // over the experts up to this one
#pragma unroll
    for (int step = 1; step < int(kWarp); step *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, sum, unsigned(step));
      if (lane >= step) sum += other;
    }
    if (e < bins) shared.places()[e] = sum - total + before;
    if (lane == int(kWarp) - 1) shared.chunk_sums()[chunk] = sum;
    if (blockIdx.x == 0 && e < shape.experts) tables.counts[e] = total;
  }
  __syncthreads();
  for (int chunk = warp; chunk < chunks; chunk += warps) {
    int64_t earlier = 0;
    for (int c = lane; c < chunk; c += kWarp) earlier += shared.chunk_sums()[c];
    earlier = warp_sum(earlier);
    const int e = chunk * int(kWarp) + lane;
    if (e >= bins) continue;
    const int64_t place = shared.places()[e] += earlier;
    if (blockIdx.x == 0) tables.offsets[e] = place;
  }
}

// Where in the block each warp's first pair of each expert goes, from the warps' own counts.
__device__ __forceinline__ void route_count_warps(const RouteShape& shape, const bool* padding,
                                                  const int64_t* ids, RouteSpan mine,
                                                  RouteLayout shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int32_t* counts = shared.row_of<int32_t>(warp);
  for (int e = lane; e <= shape.experts; e += kWarp) counts[e] = 0;
  __syncwarp();
  for (int64_t p = mine.first * shape.k + lane; p < mine.last * shape.k; p += kWarp)
    atomicAdd(counts + route_bin(shape, padding, ids, p), 1);
  __syncthreads();
  for (int e = threadIdx.x; e <= shape.experts; e += blockDim.x) {
    int32_t before = 0;
    for (int w = 0; w < warps; ++w) {
      int32_t* at = shared.row_of<int32_t>(w) + e;
      const int32_t count = *at;
      *at = before;
      before += count;
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void route_place(const RouteShape& shape, const bool* padding,
                                            const int64_t* ids, const RouteTables& tables,
                                            RouteLayout shared) {
  const int lane = threadIdx.x % kWarp;
  const RouteSpan mine(shape.rows);
  route_offsets(shape, tables, shared);
  route_count_warps(shape, padding, ids, mine, shared);
  int32_t* next = shared.row_of<int32_t>(threadIdx.x / kWarp);
  const int64_t last = mine.last * shape.k;
  for (int64_t start = mine.first * shape.k; start < last; start += kWarp) {
    const int64_t p = start + lane;
    const int bin = p < last ? route_bin(shape, padding, ids, p) : -1;
    const unsigned same = __match_any_sync(kAllLanes, bin);
    const int earlier = __popc(same & ((1u << lane) - 1));
    if (bin >= 0) {
      const int64_t place = shared.places()[bin] + next[bin] + earlier;
      tables.permutation[place] = p;
      tables.inverse[p] = place;
    }
    __syncwarp();
    if (bin >= 0 && earlier == 0) next[bin] += __popc(same);
    __syncwarp();
  }
}

// ---- the kernel and its launch ------------------------------------------------------------------

template <typename S>
__global__ void __launch_bounds__(kRouteThreads, 1)
    route_kernel(RouteShape shape, RouteTokens<S> tokens, RouteTables tables, RouteLayout shared,
                 int phases) {
  if (phases & kFirstPhase) route_choose(shape, tokens, tables, shared);
  phase_barrier(phases);
  if (phases & kSecondPhase) route_place(shape, tokens.padding, tokens.ids, tables, shared);
}

// How a launch is cut; the caller allocates blocks * (experts + 1) bins for it.
struct RoutePlan {
  int64_t blocks;
  int warps;  // of a block; 0: there are more experts than shared memory holds
  RouteLayout layout;
};

template <typename S>
RoutePlan route_plan(const RouteShape& shape, int processors) {
  RoutePlan plan = {1, kRouteWarps, RouteLayout::of<S>(shape)};
  while (plan.warps > 0 && plan.layout.rows + plan.warps * plan.layout.row > kSharedBytes)
    plan.warps /= 2;
  if (plan.warps == 0) return plan;
  plan.blocks = divide_up(shape.rows, int64_t(plan.warps) * kRouteTokensPerWarp);
  plan.blocks = clamp(plan.blocks, int64_t(1), int64_t(processors));  // all resident at once
  return plan;
}

template <typename S>
cudaError_t route(const RouteShape& shape, const RouteTokens<S>& tokens, const RouteTables& tables,
                  const RoutePlan& plan, cudaStream_t stream) {
  if (plan.warps == 0) return cudaErrorInvalidConfiguration;
  const size_t shared = plan.layout.rows + plan.warps * plan.layout.row;
  return launch_phases(route_kernel<S>, plan.blocks, plan.warps * int(kWarp), shared, stream, shape,
                       tokens, tables, plan.layout);
}

}  // namespace weightshare::cuda
