// Both phases of shard_lora on tensor cores, for 16-bit elements in rows and shards of 16 bytes.
//
// A warp's products are of 16 x 16 by 16 x 8 elements, so a tile has 8 rows. Lanes load vectors of
// 8 elements straight into their places as factors: along the dimension that is summed, and among
// columns of the output, the order of elements is free. With g = lane / 4 and q = lane % 4:
// phase one multiplies 16 rows of A, of which a lane has g and g + 8, by row g of the tile; four
// lanes together hold 32 elements of each. Phase two multiplies 64 columns of B, of which a lane
// has eight from 8 g on, in four rows from 4 q on, by h, which is split in two so that it is not
// rounded.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/shard_lora_call.cuh"

namespace weightshare::cuda {

template <typename T>
struct ShardMma {
  using Call = ShardCall<T, T>;

  static constexpr int kTile = 8;          // rows
  static constexpr int kRanks = 16;        // of a step of either phase
  static constexpr int kColumns = 64;      // of a warp in phase two
  static constexpr int kSlice = 32;        // elements of a row in a step of phase one
  static constexpr int kVector = 8;        // elements of a load
  static constexpr int kShrinkUnroll = 4;  // steps in flight
  static constexpr int kExpandUnroll = 2;
  static constexpr int kMostSlices = 4;  // parts of x that different teams multiply
  static_assert(kRanks == kShardPad);

  using Words = Vec<uint32_t, 4>;

  __device__ __forceinline__ static Words load(bool wanted, const T* p) {
    return load_if<uint32_t, 4>(wanted, reinterpret_cast<const uint32_t*>(p));
  }

  // h is [slices, tiles, kTile, ranks], a sum over the first.
  __device__ __forceinline__ static float* h_of(const Call& call, int64_t tile, int row) {
    return call.h + (tile * kTile + row) * call.ranks;
  }

  // ---- phase one --------------------------------------------------------------------------------

  // sum += this warp's share of the products of rows of A and of x: `part` of `parts` in turns.
  __device__ __forceinline__ static void products(const Call& call, const ShardTiles& tiles,
                                                  int tile, const ShardChunk& chunk, int part,
                                                  int parts, float (&sum)[4]) {
    constexpr int U = kShrinkUnroll;
    const int g = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
    const ShardMatrix<T>& a = call.targets[chunk.target].a;
    const int first = tiles.first[tile];
    const bool has_row = g < tiles.first[tile + 1] - first;
    const T* x = call.x + tiles.rows[has_row ? first + g : first] * call.x_stride;
    const int32_t* index = a.row(tiles.adapters[first], chunk.rank + g);
    const int64_t below = int64_t(8) * a.parts;
    const bool has_rank[2] = {g < chunk.ranks, g + 8 < chunk.ranks};
    for (int at = part; at * kSlice < call.d_in; at += U * parts) {  // the same in all lanes
      Words shards[U][2], values[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int k = (at + u * parts) * kSlice + q * kVector;
        const bool inside = k < call.d_in;
        const int column = inside ? int(unsigned(k) / unsigned(a.width)) : 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int number = inside && has_rank[i] ? index[i * below + column] : -1;
          shards[u][i] = load(a.has(number), a.at(number, k - column * a.width));
        }
        values[u] = load(inside && has_row, x + k);
      }
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int i = 0; i < 4; i += 2)
          mma<T>(sum,
                 {shards[u][0].at[i], shards[u][1].at[i], shards[u][0].at[i + 1],
                  shards[u][1].at[i + 1]},
                 {values[u].at[i], values[u].at[i + 1]});
    }
  }

  // Of a split of x into so many slices, and teams of so many warps.
  __host__ __device__ __forceinline__ static float shrink_cost(const Call& call, int tiles,
                                                               int blocks, int slices, int team) {
    if (slices > kMostSlices ||
        slices * tiles > (call.rows > kMostSlices ? call.rows : kMostSlices))
      return kShardNever;  // h would not hold them, see shard_scratch
    const float own = shard_steps(shard_parts(call.d_in, kSlice), team * slices);
    return shard_rounds(tiles * call.chunks(kRanks) * slices, team, blocks) *
           (3 + 8 * ceilf(own / kShrinkUnroll) + 2 * own + float(slices) / 4);
  }

  __device__ __forceinline__ static void shrink(const Call& call, const ShardTiles& tiles,
                                                ShardSplit split) {
    __shared__ Vec<float, 4> sums[kShardWarps][kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const ShardTeam team(split.team);
    const int chunks = call.chunks(kRanks), items = split.each * tiles.active * chunks;
    for (int begin = 0; begin < items; begin += team.all) {  // the same in all threads
      const int item = team.item(begin, items), place = int(unsigned(item) / unsigned(chunks));
      Vec<float, 4> sum = {};
      float* h = nullptr;  // null: this lane has nothing to write
      bool next = false;
      if (item < items) {
        const int slice = int(unsigned(place) / unsigned(tiles.active)),
                  tile = place - slice * tiles.active;
        const ShardChunk chunk = ShardChunk::of(call, item - place * chunks, kRanks);
        const int rows = tiles.first[tile + 1] - tiles.first[tile], own = lane % 4 * 2;
        products(call, tiles, tile, chunk, slice * team.size + team.part, split.each * team.size,
                 sum.at);
        if (own < rows && team.part == 0)
          h = h_of(call, place, own) + call.targets[chunk.target].first + chunk.rank + lane / 4;
        next = own + 1 < rows;
      }
      if (team.size > 1) {
        sums[warp][lane] = sum;
        __syncthreads();
        for (int w = 1; h != nullptr && w < team.size; ++w) {
          const Vec<float, 4> part = sums[warp + w][lane];
#pragma unroll
          for (int i = 0; i < 4; ++i) sum.at[i] += part.at[i];
        }
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (h != nullptr && (i % 2 == 0 || next)) h[i % 2 * call.ranks + i / 2 * 8] = sum.at[i];
    }
  }

  // ---- phase two --------------------------------------------------------------------------------

  // First of the four rows of B that a lane takes at a step.
  __device__ __forceinline__ static int turn(const ShardTeam& team, int step) {
    return (step * team.size + team.part) * kRanks + int(threadIdx.x) % 4 * 4;
  }

  __host__ __device__ __forceinline__ static float expand_cost(const Call& call, int tiles,
                                                               int blocks, int each, int team) {
    if (each > 1) return kShardNever;
    const float own = shard_steps(shard_parts(call.most_ranks(), kRanks), team);
    return shard_rounds(tiles * call.slabs(kColumns), team, blocks) *
           (3 + 6 * ceilf(own / kExpandUnroll) + 2 * own);
  }

  // What this lane will read first in phase two.
  __device__ __forceinline__ static ShardAsked<T, 4> ask(const Call& call, const ShardTiles& tiles,
                                                         ShardSplit split) {
    ShardAsked<T, 4> asked;
    const int slabs = call.slabs(kColumns);
    const ShardTeam team(split.team);
    const int item = team.item(0, tiles.count * slabs);
    if (item >= tiles.active * slabs) return asked;
    const ShardSlab slab = ShardSlab::of(call, item, kColumns);
    const ShardTarget<T, T>& target = call.targets[slab.target];
    const int column = slab.column + int(threadIdx.x) % int(kWarp) / 4 * kVector;
    if (column >= target.d_out) return asked;
    const ShardColumn<T> from(target.b, tiles.adapters[tiles.first[slab.tile]], column);
    asked.matrix = &target.b;
    asked.place = from.place;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int rank = turn(team, 0) + i;
      asked.numbers[i] = from.number(rank < target.rank, rank);
    }
    return asked;
  }

  // sums[j].at[e + 2 * c] += the share of this team's part in row 2 q + e and column 2 j + c of
  // eight.
  __device__ __forceinline__ static void outputs(const Call& call, const ShardTarget<T, T>& target,
                                                 const ShardColumn<T>& from, bool inside,
                                                 const float* h, bool has_row, int64_t slice,
                                                 int slices, const ShardTeam& team,
                                                 Vec<float, 4> (&sums)[4]) {
    constexpr int U = kExpandUnroll;
    for (int step = 0; (step * team.size + team.part) * kRanks < target.rank; step += U) {
      int32_t numbers[U][4];
      Vec<float, 4> by[U] = {};
      Words shards[U][4];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int rank = turn(team, step + u);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          numbers[u][i] = from.number(inside && rank + i < target.rank, rank + i);
#pragma unroll
        for (int s = 0; s < kMostSlices; ++s) {
          const auto part =
              load_if<float, 4>(has_row && s < slices && rank < target.rank, h + s * slice + rank);
#pragma unroll
          for (int i = 0; i < 4; ++i) by[u].at[i] += part.at[i];
        }
      }
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          shards[u][i] = load(target.b.has(numbers[u][i]), from.at(numbers[u][i]));
#pragma unroll
      for (int u = 0; u < U; ++u) {
        uint32_t high[2], low[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int rank = turn(team, step + u) + 2 * i;
          const float a = rank < target.rank ? by[u].at[2 * i] : 0;  // else of no rank
          const float b = rank + 1 < target.rank ? by[u].at[2 * i + 1] : 0;
          high[i] = pack<T>(a, b);
          const Vec<float, 2> kept = unpack<T>(high[i]);
          low[i] = pack<T>(a - kept.at[0], b - kept.at[1]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t columns[4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t one = shards[u][2 * i].at[j], other = shards[u][2 * i + 1].at[j];
            columns[2 * i] = (one & 0xffff) | (other << 16);
            columns[2 * i + 1] = (one >> 16) | (other & 0xffff0000);
          }
          mma<T>(sums[j].at, columns, high);
          mma<T>(sums[j].at, columns, low);
        }
      }
    }
  }

  __device__ __forceinline__ static void expand(const Call& call, const ShardTiles& tiles,
                                                const ShardPlan& plan) {
    __shared__ Vec<float, 4> parts[kShardWarps][4][kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, q = lane % 4;
    const int items = tiles.count * call.slabs(kColumns);
    const int slices = plan.shrink.each;
    const int64_t slice = int64_t(tiles.active) * kTile * call.ranks;
    const ShardTeam team(plan.expand.team);
    for (int begin = 0; begin < items; begin += team.all) {  // the same in all threads
      const int item = team.item(begin, items);
      const bool busy = item < items;
      const ShardSlab slab = busy ? ShardSlab::of(call, item, kColumns) : ShardSlab{};
      const ShardTarget<T, T>& target = call.targets[slab.target];
      const int first = tiles.first[slab.tile], rows = tiles.first[slab.tile + 1] - first;
      const int adapter = tiles.adapters[first], column = slab.column + g * kVector;
      const bool inside = busy && column < target.d_out;
      const T* base = target.base + column;
      Vec<float, 4> sums[4] = {};
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (inside && 2 * q + e < rows)
          prefetch(base + tiles.rows[first + 2 * q + e] * target.base_stride);
      if (busy && adapter < call.adapters)
        outputs(call, target, ShardColumn<T>(target.b, adapter, inside ? column : 0), inside,
                h_of(call, slab.tile, g) + target.first, g < rows, slice, slices, team, sums);
      if (team.size > 1) {
#pragma unroll
        for (int j = 0; j < 4; ++j) parts[warp][j][lane] = sums[j];
        __syncthreads();
        for (int w = 1; team.part == 0 && w < team.size; ++w) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const Vec<float, 4> part = parts[warp + w][j][lane];
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[j].at[i] += part.at[i];
          }
        }
        __syncthreads();
      }
      float factor = call.scale;
      if (call.scales != nullptr && adapter < call.adapters) factor *= call.scales[adapter];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!inside || 2 * q + e >= rows || team.part != 0) continue;
        const int64_t row = tiles.rows[first + 2 * q + e];
        auto y = load_if<T, kVector>(true, base + row * target.base_stride);
#pragma unroll
        for (int v = 0; v < kVector; ++v)
          y.at[v] = narrow<T>(widen(y.at[v]) + factor * sums[v / 2].at[e + v % 2 * 2]);
        store_if<T, kVector>(true, target.y + row * target.y_stride + column, y);
      }
    }
  }
};

}  // namespace weightshare::cuda
