// What a launch of shard_lora works on.
#pragma once

#include "cuda/shard_lora_rows.cuh"

namespace weightshare::cuda {

constexpr int kShardTargets = 4;  // of a launch
constexpr int kShardEarly = 4;    // plans for up to so many tiles are made on the host
constexpr int kShardPad = 16;     // h of each target begins at a multiple of so many ranks

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
  int d_out, rank, first;         // `first`: of all ranks of the call
};

template <typename T, typename P>
struct ShardCall {
  ShardTarget<T, P> targets[kShardTargets];
  const T* x;            // [rows, d_in]
  const int64_t* ids;    // [rows] or null: all of adapter 0
  const Sum<T>* scales;  // [adapters] or null
  Sum<T>* h;             // see shard_scratch
  int64_t x_stride;
  Sum<T> scale;
  ShardPlan plans[kShardEarly];
  int count, rows, d_in, ranks, adapters;  // ranks: of all targets, each padded

  __host__ __device__ __forceinline__ int chunks(int each) const {
    int sum = 0;
    for (int g = 0; g < count; ++g) sum += shard_parts(targets[g].rank, each);
    return sum;
  }
  // Slabs of so many columns in all targets.
  __host__ __device__ __forceinline__ int slabs(int columns) const {
    int sum = 0;
    for (int g = 0; g < count; ++g) sum += shard_parts(targets[g].d_out, columns);
    return sum;
  }
  __host__ __device__ __forceinline__ int most_ranks() const {
    int most = 0;
    for (int g = 0; g < count; ++g) most = targets[g].rank > most ? targets[g].rank : most;
    return most;
  }
};

// A part of the rows of A of a target.
struct ShardChunk {
  int target, rank, ranks;

  template <typename T, typename P>
  __device__ __forceinline__ static ShardChunk of(const ShardCall<T, P>& call, int number,
                                                  int each) {
    int g = 0;
    for (;; ++g) {
      const int own = shard_parts(call.targets[g].rank, each);
      if (number < own) break;
      number -= own;
    }
    return {g, number * each, least(each, call.targets[g].rank - number * each)};
  }
};

// A tile and a part of the columns of a target.
struct ShardSlab {
  int tile, target, column;

  template <typename T, typename P>
  __device__ __forceinline__ static ShardSlab of(const ShardCall<T, P>& call, int item,
                                                 int columns) {
    const int slabs = call.slabs(columns), tile = int(unsigned(item) / unsigned(slabs));
    int number = item - tile * slabs, g = 0;
    for (;; ++g) {
      const int own = shard_parts(call.targets[g].d_out, columns);
      if (number < own) break;
      number -= own;
    }
    return {tile, g, number * columns};
  }
};

// Shards [rank, part] of one matrix that a lane reads at a place of theirs.
template <typename P>
struct ShardColumn {
  const ShardMatrix<P>& matrix;
  const int32_t* index;
  int place;

  __device__ __forceinline__ ShardColumn(const ShardMatrix<P>& of, int64_t adapter, int column)
      : matrix(of) {
    const int part = int(unsigned(column) / unsigned(of.width));
    index = of.row(adapter, 0) + part;
    place = column - part * of.width;
  }
  __device__ __forceinline__ int32_t number(bool wanted, int rank) const {
    return wanted ? index[int64_t(rank) * matrix.parts] : -1;
  }
  __device__ __forceinline__ const P* at(int32_t number) const { return matrix.at(number, place); }
};

// Shards that a lane will read first in phase two: their numbers are asked for early, and they
// themselves, into L2, when phase one has been done.
template <typename P, int N>
struct ShardAsked {
  const ShardMatrix<P>* matrix = nullptr;
  int place = 0;
  int32_t numbers[N];

  __device__ __forceinline__ void fetch() const {
    if (matrix == nullptr) return;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (matrix->has(numbers[i])) prefetch(matrix->at(numbers[i], place));
  }
};

}  // namespace weightshare::cuda
