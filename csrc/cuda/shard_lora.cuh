// LoRA of few rows, each with an adapter of its own, whose matrices are shards of pools: a gather
// and two products in one launch for all targets that share x.
//
// Phase one shrinks, h = x A^T; phase two expands, y = base + factor * h B. Both read every shard
// where it lies, once for a tile of rows of its adapter. Sums run in a fixed order.
#pragma once

#include "cuda/shard_lora_lanes.cuh"
#include "cuda/shard_lora_mma.cuh"

namespace weightshare::cuda {

// How both phases of `tiles` are split; by a warp, or early by the host.
template <typename Way>
__device__ __forceinline__ ShardPlan shard_plan(const typename Way::Call& call, int tiles) {
  const int blocks = gridDim.x;
  return {shard_split([&](int each, int team) {
            return Way::shrink_cost(call, tiles, blocks, each, team);
          }),
          shard_split([&](int each, int team) {
            return Way::expand_cost(call, tiles, blocks, each, team);
          })};
}

template <typename Way>
ShardPlan shard_plan_early(const typename Way::Call& call, int tiles, int blocks) {
  return {shard_split_early([&](int each, int team) {
            return Way::shrink_cost(call, tiles, blocks, each, team);
          }),
          shard_split_early([&](int each, int team) {
            return Way::expand_cost(call, tiles, blocks, each, team);
          })};
}

template <typename Way>
__global__ void __launch_bounds__(kShardThreads, 1)
    shard_lora_kernel(const __grid_constant__ typename Way::Call call, int phases) {
  __shared__ ShardTiles tiles;
  __shared__ ShardPlan plan;
  shard_group(tiles, call.ids, call.rows, call.adapters, Way::kTile);
  if (threadIdx.x < kWarp) {
    const ShardPlan made = tiles.count <= kShardEarly ? call.plans[tiles.count - 1]
                                                      : shard_plan<Way>(call, tiles.count);
    if (threadIdx.x == 0) plan = made;
  }
  __syncthreads();
  if (phases & kFirstPhase) {
    const auto asked = Way::ask(call, tiles, plan.expand);
    Way::shrink(call, tiles, plan.shrink);
    asked.fetch();
  }
  phase_barrier(phases);
  if (phases & kSecondPhase) Way::expand(call, tiles, plan);
}

// Whether all rows and shards are made of accesses of 16 bytes of a pool.
template <typename T, typename P>
bool shard_wide(const ShardCall<T, P>& call) {
  int64_t sizes = call.x_stride | call.d_in;
  bool aligned = aligned_to_vectors(call.x);
  for (int g = 0; g < call.count; ++g) {
    const ShardTarget<T, P>& target = call.targets[g];
    sizes |= target.a.width | target.b.width | target.base_stride | target.y_stride | target.d_out;
    aligned &= aligned_to_vectors(target.a.pool, target.b.pool, target.base, target.y);
  }
  return aligned && sizes % int64_t(kVectorBytes / sizeof(P)) == 0;
}

// Elements of h that a call of so many rows needs, `ranks` counted as ShardCall has them: as many
// as there can be tiles of 8 rows, or slices of one.
inline int64_t shard_scratch(int64_t rows, int64_t ranks) {
  return clamp(rows, int64_t(4), int64_t(kShardRows)) * ranks * 8;
}

template <typename Way>
cudaError_t shard_launch(typename Way::Call call, int64_t rows, int processors,
                         cudaStream_t stream) {
  const int64_t slabs = call.slabs(Way::kColumns);
  // Items, of up to 4 slices, are counted in 32 bits.
  const int64_t most =
      clamp((int64_t(1) << 27) / (slabs + call.ranks + 1), int64_t(1), int64_t(kShardRows));
  for (int64_t done = 0; done < rows; done += call.rows) {
    call.rows = static_cast<int>(least(rows - done, most));
    const int64_t blocks = clamp(call.rows * (slabs > call.ranks ? slabs : call.ranks), int64_t(1),
                                 int64_t(processors));
    for (int tiles = 1; tiles <= least(kShardEarly, call.rows); ++tiles)
      call.plans[tiles - 1] = shard_plan_early<Way>(call, tiles, static_cast<int>(blocks));
    const cudaError_t status =
        launch_phases(shard_lora_kernel<Way>, blocks, kShardThreads, 0, stream, call);
    if (status != cudaSuccess) return status;
    call.x += call.rows * call.x_stride;
    if (call.ids != nullptr) call.ids += call.rows;
    for (auto& target : call.targets) {
      target.base += call.rows * target.base_stride;
      target.y += call.rows * target.y_stride;
    }
  }
  return cudaSuccess;
}

// All rows of `call`, whose own `rows` does not matter: a launch for every kShardRows of them.
template <typename T, typename P>
cudaError_t shard_lora(const ShardCall<T, P>& call, int64_t rows, int processors,
                       cudaStream_t stream) {
  constexpr int V = kVectorBytes / sizeof(P);
  auto run = shard_launch<ShardLanes<T, P, 1>>;
  if (shard_wide(call)) {
    if constexpr (sizeof(P) == 2)
      run = shard_launch<ShardMma<T>>;
    else
      run = shard_launch<ShardLanes<T, P, V>>;
  }
  return run(call, rows, processors, stream);
}

}  // namespace weightshare::cuda
