// LoRA of few rows, each with an adapter of its own, whose matrices are shards of pools: a gather
// and two products in one launch for all targets that share x.
//
// Phase one shrinks, h = x A^T: a team of warps takes a few rows of A and the rows of x of a tile,
// its lanes along x. Phase two expands, y = base + factor * h B: a warp takes 8 vectors of columns,
// four lanes to each, which take turns at the rows of B; then each of the four lanes has one of the
// tile's four rows. Both read every shard where it lies, once for a tile. Sums run in a fixed
// order.
#pragma once

#include "cuda/shard_lora_rows.cuh"

namespace weightshare::cuda {

constexpr int kShardTargets = 4;  // of a launch
// Vectors of a lane and row in flight; of 8 elements each, two would spill.
template <typename P>
constexpr int kShrinkUnroll = sizeof(P) == 2 ? 1 : 2;
constexpr int kExpandUnroll = 4;   // rows of B of a lane in flight
constexpr int kExpandColumns = 8;  // vectors of columns of a warp
constexpr int kExpandGroups = kWarp / kExpandColumns;
static_assert(kExpandGroups == kShardTile);

// A pool [shards, width] and the table of one matrix per adapter, [adapters, rank, parts].
template <typename P>
struct ShardMatrix {
  const P* pool;
  const int32_t* index;
  int64_t stride;   // of the table, from adapter to adapter
  uint32_t shards;  // numbers from here on are of shards of zeros
  int width, parts;

  __device__ __forceinline__ const int32_t* row(int64_t adapter, int rank) const {
    return index + adapter * stride + int64_t(rank) * parts;
  }
  __device__ __forceinline__ bool has(int32_t number) const {
    return static_cast<uint32_t>(number) < shards;
  }
  __device__ __forceinline__ const P* at(int32_t number, int place) const {
    return pool + int64_t(number) * width + place;
  }
};

template <typename T, typename P>
struct ShardTarget {
  ShardMatrix<P> a, b;
  const T* base;
  T* y;                           // [rows, d_out]
  int64_t base_stride, y_stride;  // from row to row
  int d_out, rank, first;         // h of this target begins at `first`
};

template <typename T, typename P>
struct ShardCall {
  ShardTarget<T, P> targets[kShardTargets];
  const T* x;            // [rows, d_in]
  const int64_t* ids;    // [rows] or null: all of adapter 0
  const Sum<T>* scales;  // [adapters] or null
  Sum<T>* h;             // [tiles, ranks, kShardTile]; tiles: at most rows
  int64_t x_stride;
  Sum<T> scale;
  int count, rows, d_in, ranks, adapters;

  __device__ __forceinline__ int chunks(int each) const {
    int sum = 0;
    for (int g = 0; g < count; ++g) sum += static_cast<int>(divide_up(targets[g].rank, each));
    return sum;
  }
  template <int V>
  __host__ __device__ __forceinline__ int slabs() const {
    int sum = 0;
    for (int g = 0; g < count; ++g) sum += int(divide_up(targets[g].d_out, kExpandColumns * V));
    return sum;
  }
  __device__ __forceinline__ Sum<T>* h_of(int tile, int rank) const {
    return h + (int64_t(tile) * ranks + rank) * kShardTile;
  }
};

// Which team of the grid a warp belongs to, and its part in it.
struct ShardTeam {
  int size, part, number, all;

  __device__ __forceinline__ ShardTeam(int team) {
    const int warp = threadIdx.x / kWarp, teams = blockDim.x / kWarp / team;
    size = team;
    part = warp % team;
    number = int(blockIdx.x) * teams + warp / team;
    all = int(gridDim.x) * teams;
  }
};

// ---- phase one ----------------------------------------------------------------------------------

// sums[i][n] += this warp's share of the products of rows of A and of x.
template <int V, typename T, typename P>
__device__ __forceinline__ void shard_products(const ShardCall<T, P>& call, const ShardTiles& tiles,
                                               const ShardMatrix<P>& a, int tile, int rank,
                                               int ranks, const ShardTeam& team,
                                               Sum<T> (&sums)[kShardRanks * kShardTile]) {
  constexpr int U = kShrinkUnroll<P>, stripe = kWarp * V;
  const int first = tiles.first[tile], rows = tiles.first[tile + 1] - first;
  const int32_t* index = a.row(tiles.adapters[first], rank);
  const T* x[kShardTile];
#pragma unroll
  for (int n = 0; n < kShardTile; ++n)
    x[n] = call.x + tiles.rows[n < rows ? first + n : first] * call.x_stride;
  const int lane = threadIdx.x % kWarp;
  for (int at = team.part * U * stripe + lane * V; at < call.d_in; at += team.size * U * stripe) {
    Vec<P, V> shards[U][kShardRanks];
    Vec<T, V> values[U][kShardTile];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int k = at + u * stripe;
      const bool inside = k < call.d_in;
      const int part = inside ? int(unsigned(k) / unsigned(a.width)) : 0;
      int32_t numbers[kShardRanks];
#pragma unroll
      for (int i = 0; i < kShardRanks; ++i)
        numbers[i] = inside && i < ranks ? index[i * a.parts + part] : -1;
#pragma unroll
      for (int n = 0; n < kShardTile; ++n)
        values[u][n] = load_if<T, V>(inside && n < rows, x[n] + k);
#pragma unroll
      for (int i = 0; i < kShardRanks; ++i)
        shards[u][i] = load_if<P, V>(a.has(numbers[i]), a.at(numbers[i], k - part * a.width));
    }
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int i = 0; i < kShardRanks; ++i) {
          const Sum<T> by = widen(shards[u][i].at[v]);
#pragma unroll
          for (int n = 0; n < kShardTile; ++n)
            sums[i * kShardTile + n] += by * Sum<T>(widen(values[u][n].at[v]));
        }
  }
}

template <int V, typename T, typename P>
__device__ __forceinline__ void shard_shrink(const ShardCall<T, P>& call, const ShardTiles& tiles) {
  constexpr int kSums = kShardRanks * kShardTile;
  __shared__ Sum<T> parts[kShardWarps][kSums];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int steps = static_cast<int>(divide_up(call.d_in, kShrinkUnroll<P> * int(kWarp) * V));
  const ShardSplit split =
      shard_split(kShardRanks, steps, [&](int ranks) { return tiles.active * call.chunks(ranks); });
  const ShardTeam team(split.team);
  const int chunks = call.chunks(split.ranks), items = tiles.active * chunks;
  for (int begin = 0; begin < items; begin += team.all) {  // the same in all threads
    const int item = begin + team.number, tile = item / chunks;
    const bool busy = item < items;
    Sum<T> sums[kSums] = {};
    Sum<T>* h = nullptr;
    int ranks = 0;
    if (busy) {
      int chunk = item - tile * chunks, g = 0;
      for (;; ++g) {
        const int own = static_cast<int>(divide_up(call.targets[g].rank, split.ranks));
        if (chunk < own) break;
        chunk -= own;
      }
      const int rank = chunk * split.ranks;
      ranks = least(split.ranks, call.targets[g].rank - rank);
      h = call.h_of(tile, call.targets[g].first + rank);
      shard_products<V>(call, tiles, call.targets[g].a, tile, rank, ranks, team, sums);
    }
    warp_scatter<kSums, 1>(sums);
    Sum<T> sum = sums[0] + __shfl_xor_sync(kAllLanes, sums[0], 1);  // of value lane / 2
    if (team.size == 1) {
      if (lane % 2 == 0 && lane / 2 < ranks * kShardTile) h[lane / 2] = sum;
      continue;
    }
    if (lane % 2 == 0) parts[warp][lane / 2] = sum;
    __syncthreads();
    if (team.part == 0 && lane < ranks * kShardTile) {
      sum = 0;
      for (int w = 0; w < team.size; ++w) sum += parts[warp + w][lane];
      h[lane] = sum;
    }
    __syncthreads();
  }
}

// ---- phase two ----------------------------------------------------------------------------------

// A tile and the columns of a target that a lane has.
struct ShardSlab {
  int tile, target, column;

  template <int V, typename T, typename P>
  __device__ __forceinline__ static ShardSlab of(const ShardCall<T, P>& call, int item, int slabs) {
    ShardSlab slab;
    slab.tile = item / slabs;
    slab.target = 0;
    int number = item - slab.tile * slabs;
    for (;; ++slab.target) {
      const int own = int(divide_up(call.targets[slab.target].d_out, kExpandColumns * V));
      if (number < own) break;
      number -= own;
    }
    slab.column = (number * kExpandColumns + int(threadIdx.x) % kExpandColumns) * V;
    return slab;
  }
};

// Row of B that a lane takes at a step.
__device__ __forceinline__ int shard_turn(const ShardTeam& team, int step) {
  const int group = threadIdx.x % kWarp / kExpandColumns;
  return (step * team.size + team.part) * kExpandGroups + group;
}

template <int V, typename T, typename P>
__device__ __forceinline__ ShardTeam shard_expand_team(const ShardCall<T, P>& call, int items) {
  int most = 0;
  for (int g = 0; g < call.count; ++g)
    most = call.targets[g].rank > most ? call.targets[g].rank : most;
  const int steps = static_cast<int>(divide_up(most, kExpandGroups * kExpandUnroll));
  return ShardTeam(shard_split(1, steps, [&](int) { return items; }).team);
}

// Ask for what this lane will read first in phase two.
template <int V, typename T, typename P>
__device__ __forceinline__ void shard_ask(const ShardCall<T, P>& call, const ShardTiles& tiles) {
  const int slabs = call.template slabs<V>(), items = tiles.active * slabs;
  const ShardTeam team = shard_expand_team<V>(call, tiles.count * slabs);
  if (team.number >= items) return;
  const ShardSlab slab = ShardSlab::of<V>(call, team.number, slabs);
  const ShardTarget<T, P>& target = call.targets[slab.target];
  if (slab.column >= target.d_out) return;
  const int part = int(unsigned(slab.column) / unsigned(target.b.width));
  const int32_t* index = target.b.row(tiles.adapters[tiles.first[slab.tile]], 0) + part;
#pragma unroll
  for (int u = 0; u < kExpandUnroll; ++u) {
    const int rank = shard_turn(team, u);
    const int32_t number = rank < target.rank ? index[int64_t(rank) * target.b.parts] : -1;
    if (target.b.has(number)) prefetch(target.b.at(number, slab.column - part * target.b.width));
  }
}

// sums[n][v] += this lane's share of the products of h and of rows of B.
template <int V, typename T, typename P>
__device__ __forceinline__ void shard_outputs(const ShardCall<T, P>& call,
                                              const ShardTarget<T, P>& target, ShardSlab slab,
                                              int64_t adapter, const ShardTeam& team,
                                              Sum<T> (&sums)[kShardTile * V]) {
  constexpr int U = kExpandUnroll;
  const ShardMatrix<P>& b = target.b;
  const int part = int(unsigned(slab.column) / unsigned(b.width));
  const int place = slab.column - part * b.width;
  const int32_t* index = b.row(adapter, 0) + part;
  const Sum<T>* h = call.h_of(slab.tile, target.first);
  for (int step = 0; shard_turn(team, step) < target.rank; step += U) {
    int32_t numbers[U];
    Vec<P, V> shards[U];
    Vec<Sum<T>, kShardTile> by[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int rank = shard_turn(team, step + u);
      numbers[u] = rank < target.rank ? index[int64_t(rank) * b.parts] : -1;
      by[u] = load_if<Sum<T>, kShardTile>(rank < target.rank, h + int64_t(rank) * kShardTile);
    }
#pragma unroll
    for (int u = 0; u < U; ++u)
      shards[u] = load_if<P, V>(b.has(numbers[u]), b.at(numbers[u], place));
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const Sum<T> value = widen(shards[u].at[v]);
#pragma unroll
        for (int n = 0; n < kShardTile; ++n) sums[n * V + v] += by[u].at[n] * value;
      }
  }
}

template <int V, typename T, typename P>
__device__ __forceinline__ void shard_expand(const ShardCall<T, P>& call, const ShardTiles& tiles) {
  __shared__ Vec<Sum<T>, V> parts[kShardWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int slabs = call.template slabs<V>(), items = tiles.count * slabs;
  const ShardTeam team = shard_expand_team<V>(call, items);
  for (int begin = 0; begin < items; begin += team.all) {  // the same in all threads
    const int item = begin + team.number;
    Sum<T> sums[kShardTile * V] = {};
    Vec<T, V> base = {};
    Sum<T> factor = call.scale;
    T* y = nullptr;  // null: this lane has nothing to write
    if (item < items) {
      const ShardSlab slab = ShardSlab::of<V>(call, item, slabs);
      const ShardTarget<T, P>& target = call.targets[slab.target];
      const int first = tiles.first[slab.tile], rows = tiles.first[slab.tile + 1] - first;
      const int adapter = tiles.adapters[first], own = lane / kExpandColumns;
      const bool inside = slab.column < target.d_out, served = adapter < call.adapters;
      if (inside && own < rows) {
        const int64_t row = tiles.rows[first + own];
        base = load_if<T, V>(true, target.base + row * target.base_stride + slab.column);
        y = target.y + row * target.y_stride + slab.column;
      }
      if (served && call.scales != nullptr) factor *= call.scales[adapter];
      if (inside && served) shard_outputs<V>(call, target, slab, adapter, team, sums);
    }
    warp_scatter<kShardTile * V, V>(sums);  // of row lane / kExpandColumns
    if (team.size > 1) {
#pragma unroll
      for (int v = 0; v < V; ++v) parts[warp][lane].at[v] = sums[v];
      __syncthreads();
      if (team.part != 0) y = nullptr;
      for (int w = 1; y != nullptr && w < team.size; ++w) {
        const Vec<Sum<T>, V> part = parts[warp + w][lane];
#pragma unroll
        for (int v = 0; v < V; ++v) sums[v] += part.at[v];
      }
      __syncthreads();
    }
#pragma unroll
    for (int v = 0; v < V; ++v) base.at[v] = narrow<T>(widen(base.at[v]) + factor * sums[v]);
    store_if<T, V>(y != nullptr, y, base);
  }
}

// ---- the kernel and its launch ------------------------------------------------------------------

template <typename T, typename P, int V>
__global__ void __launch_bounds__(kShardThreads, 1)
    shard_lora_kernel(const __grid_constant__ ShardCall<T, P> call, int phases) {
  __shared__ ShardTiles tiles;
  shard_group(tiles, call.ids, call.rows, call.adapters);
  if (phases & kFirstPhase) {
    shard_shrink<V>(call, tiles);
    shard_ask<V>(call, tiles);
  }
  phase_barrier(phases);
  if (phases & kSecondPhase) shard_expand<V>(call, tiles);
}

// Elements of an access: 16 bytes of a pool, if all rows and shards are made of those.
template <typename T, typename P>
int shard_vector(const ShardCall<T, P>& call) {
  constexpr int V = kVectorBytes / sizeof(P);
  int64_t sizes = call.x_stride | call.d_in;
  bool aligned = aligned_to_vectors(call.x);
  for (int g = 0; g < call.count; ++g) {
    const ShardTarget<T, P>& target = call.targets[g];
    sizes |= target.a.width | target.b.width | target.base_stride | target.y_stride | target.d_out;
    aligned &= aligned_to_vectors(target.a.pool, target.b.pool, target.base, target.y);
  }
  return aligned && sizes % V == 0 ? V : 1;
}

// Elements of h that a call of so many rows needs.
inline int64_t shard_scratch(int64_t rows, int64_t ranks) {
  return least(rows, int64_t(kShardRows)) * ranks * kShardTile;
}

// All rows of `call`, whose `rows` may be any number: a launch for every kShardRows of them.
template <typename T, typename P>
cudaError_t shard_lora(ShardCall<T, P> call, int64_t rows, int processors, cudaStream_t stream) {
  constexpr int V = kVectorBytes / sizeof(P);
  const bool wide = shard_vector(call) == V;
  const int64_t slabs = wide ? call.template slabs<V>() : call.template slabs<1>();
  const auto kernel = wide ? shard_lora_kernel<T, P, V> : shard_lora_kernel<T, P, 1>;
  // Items are counted in 32 bits.
  const int64_t most =
      clamp((int64_t(1) << 30) / (slabs + call.ranks + 1), int64_t(1), int64_t(kShardRows));
  for (int64_t done = 0; done < rows; done += call.rows) {
    call.rows = static_cast<int>(least(rows - done, most));
    const int64_t blocks = clamp(call.rows * (slabs > call.ranks ? slabs : call.ranks), int64_t(1),
                                 int64_t(processors));
    const cudaError_t status = launch_phases(kernel, blocks, kShardThreads, 0, stream, call);
    if (status != cudaSuccess) return status;
    call.x += call.rows * call.x_stride;
    if (call.ids != nullptr) call.ids += call.rows;
    for (ShardTarget<T, P>& target : call.targets) {
      target.base += call.rows * target.base_stride;
      target.y += call.rows * target.y_stride;
    }
  }
  return cudaSuccess;
}

}  // namespace weightshare::cuda
