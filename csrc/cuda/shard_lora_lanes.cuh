// Both phases of shard_lora in plain multiplications, for every type and size.
//
// Phase one: a team of warps takes a few rows of A and the rows of x of a tile, its lanes along x.
// Phase two: a warp takes 8 vectors of columns, four lanes to each, which take turns at the rows of
// B; then each of the four lanes has one of the tile's four rows.
#pragma once

#include "cuda/shard_lora_call.cuh"

namespace weightshare::cuda {

template <typename T, typename P, int V>
struct ShardLanes {
  using Call = ShardCall<T, P>;
  using A = Sum<T>;

  static constexpr int kTile = 4;          // rows
  static constexpr int kRanks = 4;         // rows of A that a team takes at once, at most
  static constexpr int kShrinkUnroll = 2;  // vectors of a lane and row in flight
  static constexpr int kExpandUnroll = 4;  // rows of B of a lane in flight
  static constexpr int kLanes = 8;         // of a warp along the columns
  static constexpr int kColumns = kLanes * V;
  static constexpr int kGroups = kWarp / kLanes;
  static_assert(kGroups == kTile);

  // h is [tiles, ranks, kTile].
  __device__ __forceinline__ static A* h_of(const Call& call, int tile, int rank) {
    return call.h + (int64_t(tile) * call.ranks + rank) * kTile;
  }

  // ---- phase one --------------------------------------------------------------------------------

  // sums[i][n] += this warp's share of the products of rows of A and of x.
  __device__ __forceinline__ static void products(const Call& call, const ShardTiles& tiles,
                                                  int tile, const ShardChunk& chunk,
                                                  const ShardTeam& team,
                                                  A (&sums)[kRanks * kTile]) {
    constexpr int U = kShrinkUnroll, stripe = kWarp * V;
    const ShardMatrix<P>& a = call.targets[chunk.target].a;
    const int first = tiles.first[tile], rows = tiles.first[tile + 1] - first;
    const int32_t* index = a.row(tiles.adapters[first], chunk.rank);
    const T* x[kTile];
#pragma unroll
    for (int n = 0; n < kTile; ++n)
      x[n] = call.x + tiles.rows[n < rows ? first + n : first] * call.x_stride;
    const int lane = threadIdx.x % kWarp;
    for (int at = team.part * U * stripe + lane * V; at < call.d_in; at += team.size * U * stripe) {
      Vec<P, V> shards[U][kRanks];
      Vec<T, V> values[U][kTile];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int k = at + u * stripe;
        const bool inside = k < call.d_in;
        const int part = inside ? int(unsigned(k) / unsigned(a.width)) : 0;
        int32_t numbers[kRanks];
#pragma unroll
        for (int i = 0; i < kRanks; ++i)
          numbers[i] = inside && i < chunk.ranks ? index[i * a.parts + part] : -1;
#pragma unroll
        for (int n = 0; n < kTile; ++n) values[u][n] = load_if<T, V>(inside && n < rows, x[n] + k);
#pragma unroll
        for (int i = 0; i < kRanks; ++i)
          shards[u][i] = load_if<P, V>(a.has(numbers[i]), a.at(numbers[i], k - part * a.width));
      }
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
          for (int i = 0; i < kRanks; ++i) {
            const A by = widen(shards[u][i].at[v]);
#pragma unroll
            for (int n = 0; n < kTile; ++n)
              sums[i * kTile + n] += by * A(widen(values[u][n].at[v]));
          }
    }
  }

  // Of a split into so many rows of A, and teams of so many warps.
  __host__ __device__ __forceinline__ static float shrink_cost(const Call& call, int tiles,
                                                               int blocks, int ranks, int team) {
    if (ranks > kRanks) return kShardNever;
    const int steps = shard_parts(call.d_in, kShrinkUnroll * int(kWarp) * V);
    return shard_rounds(tiles * call.chunks(ranks), team, blocks) *
           (3 + shard_steps(steps, team) * float(4 + ranks));
  }

  __device__ __forceinline__ static void shrink(const Call& call, const ShardTiles& tiles,
                                                ShardSplit split) {
    constexpr int kSums = kRanks * kTile;
    __shared__ A parts[kShardWarps][kSums];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const ShardTeam team(split.team);
    const int chunks = call.chunks(split.each), items = tiles.active * chunks;
    for (int begin = 0; begin < items; begin += team.all) {  // the same in all threads
      const int item = team.item(begin, items), tile = int(unsigned(item) / unsigned(chunks));
      A sums[kSums] = {};
      A* h = nullptr;
      int count = 0;
      if (item < items) {
        const ShardChunk chunk = ShardChunk::of(call, item - tile * chunks, split.each);
        h = h_of(call, tile, call.targets[chunk.target].first + chunk.rank);
        count = chunk.ranks * kTile;
        products(call, tiles, tile, chunk, team, sums);
      }
      warp_scatter<kSums, 1>(sums);
      A sum = sums[0] + __shfl_xor_sync(kAllLanes, sums[0], 1);  // of value lane / 2
      if (team.size == 1) {
        if (lane % 2 == 0 && lane / 2 < count) h[lane / 2] = sum;
        continue;
      }
      if (lane % 2 == 0) parts[warp][lane / 2] = sum;
      __syncthreads();
      if (team.part == 0 && lane < count) {
        sum = 0;
        for (int w = 0; w < team.size; ++w) sum += parts[warp + w][lane];
        h[lane] = sum;
      }
      __syncthreads();
    }
  }

  // ---- phase two --------------------------------------------------------------------------------

  // Row of B that a lane takes at a step.
  __device__ __forceinline__ static int turn(const ShardTeam& team, int step) {
    const int group = threadIdx.x % kWarp / kLanes;
    return (step * team.size + team.part) * kGroups + group;
  }

  __host__ __device__ __forceinline__ static float expand_cost(const Call& call, int tiles,
                                                               int blocks, int each, int team) {
    if (each > 1) return kShardNever;
    const int steps = shard_parts(call.most_ranks(), kGroups * kExpandUnroll);
    return shard_rounds(tiles * call.slabs(kColumns), team, blocks) *
           (3 + shard_steps(steps, team) * 5);
  }

  // What this lane will read first in phase two.
  __device__ __forceinline__ static ShardAsked<P, kExpandUnroll> ask(const Call& call,
                                                                     const ShardTiles& tiles,
                                                                     ShardSplit split) {
    ShardAsked<P, kExpandUnroll> asked;
    const int slabs = call.slabs(kColumns);
    const ShardTeam team(split.team);
    const int item = team.item(0, tiles.count * slabs);
    if (item >= tiles.active * slabs) return asked;
    const ShardSlab slab = ShardSlab::of(call, item, kColumns);
    const ShardTarget<T, P>& target = call.targets[slab.target];
    const int column = slab.column + int(threadIdx.x) % kLanes * V;
    if (column >= target.d_out) return asked;
    const ShardColumn<P> from(target.b, tiles.adapters[tiles.first[slab.tile]], column);
    asked.matrix = &target.b;
    asked.place = from.place;
#pragma unroll
    for (int i = 0; i < kExpandUnroll; ++i) {
      const int rank = turn(team, i);
      asked.numbers[i] = from.number(rank < target.rank, rank);
    }
    return asked;
  }

  // sums[n][v] += this lane's share of the products of h and of rows of B.
  __device__ __forceinline__ static void outputs(const ShardTarget<T, P>& target,
                                                 const ShardColumn<P>& from, const A* h,
                                                 const ShardTeam& team, A (&sums)[kTile * V]) {
    constexpr int U = kExpandUnroll;
    for (int step = 0; turn(team, step) < target.rank; step += U) {
      int32_t numbers[U];
      Vec<P, V> shards[U];
      Vec<A, kTile> by[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int rank = turn(team, step + u);
        numbers[u] = from.number(rank < target.rank, rank);
        by[u] = load_if<A, kTile>(rank < target.rank, h + int64_t(rank) * kTile);
      }
#pragma unroll
      for (int u = 0; u < U; ++u)
        shards[u] = load_if<P, V>(target.b.has(numbers[u]), from.at(numbers[u]));
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A value = widen(shards[u].at[v]);
#pragma unroll
          for (int n = 0; n < kTile; ++n) sums[n * V + v] += by[u].at[n] * value;
        }
    }
  }

  __device__ __forceinline__ static void expand(const Call& call, const ShardTiles& tiles,
                                                const ShardPlan& plan) {
    __shared__ Vec<A, V> parts[kShardWarps][kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int items = tiles.count * call.slabs(kColumns);
    const ShardTeam team(plan.expand.team);
    for (int begin = 0; begin < items; begin += team.all) {  // the same in all threads
      const int item = team.item(begin, items);
      A sums[kTile * V] = {};
      Vec<T, V> base = {};
      A factor = call.scale;
      T* y = nullptr;  // null: this lane has nothing to write
      if (item < items) {
        const ShardSlab slab = ShardSlab::of(call, item, kColumns);
        const ShardTarget<T, P>& target = call.targets[slab.target];
        const int first = tiles.first[slab.tile], rows = tiles.first[slab.tile + 1] - first;
        const int adapter = tiles.adapters[first], own = lane / kLanes;
        const int column = slab.column + lane % kLanes * V;
        const bool inside = column < target.d_out, served = adapter < call.adapters;
        if (inside && own < rows) {
          const int64_t row = tiles.rows[first + own];
          base = load_if<T, V>(true, target.base + row * target.base_stride + column);
          y = target.y + row * target.y_stride + column;
        }
        if (served && call.scales != nullptr) factor *= call.scales[adapter];
        if (inside && served)
          outputs(target, ShardColumn<P>(target.b, adapter, column),
                  h_of(call, slab.tile, target.first), team, sums);
      }
      warp_scatter<kTile * V, V>(sums);  // of row lane / kLanes
      if (team.size > 1) {
#pragma unroll
        for (int v = 0; v < V; ++v) parts[warp][lane].at[v] = sums[v];
        __syncthreads();
        if (team.part != 0) y = nullptr;
        for (int w = 1; y != nullptr && w < team.size; ++w) {
          const Vec<A, V> part = parts[warp + w][lane];
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
};

}  // namespace weightshare::cuda
