// Rows of a batch by adapter, in tiles that read an adapter's shards together, and how tiles are
// cut among warps. Every block works these out for itself, in shared memory: the ids are known on
// the device alone, and a launch of its own would take longer.
#pragma once

#include "cuda/launch.cuh"

namespace weightshare::cuda {

constexpr int kShardWarps = 16;
constexpr int kShardThreads = kShardWarps * int(kWarp);
constexpr int kShardRows = 256;  // of a launch

struct ShardTiles {
  int32_t keys[kShardRows] alignas(16);  // adapter of each row, or the number of adapters
  int32_t adapters[kShardRows];          // the same in the order of tiles
  int32_t rows[kShardRows];              // which row comes at a place in that order
  int32_t first[kShardRows + 1];         // place of each tile's first row
  bool leads[kShardRows];                // at a place: begins a tile
  unsigned leaders[kShardRows / kWarp];
  int served;         // rows that have an adapter; the others come last
  int count, active;  // tiles, and those of them that have an adapter
};

// Sort the rows by adapter, keeping their order, and cut each adapter's into tiles of `most` rows.
__device__ __forceinline__ void shard_group(ShardTiles& tiles, const int64_t* ids, int rows,
                                            int adapters, int most) {
  static_assert(kShardRows <= kShardThreads);
  const int n = threadIdx.x, lane = n % int(kWarp), warp = n / int(kWarp);
  const uint64_t id = n < rows && ids != nullptr ? static_cast<uint64_t>(ids[n]) : 0;
  const bool inside = id < static_cast<uint64_t>(adapters);
  if (rows == 1) {  // in a hurry
    if (n == 0) {
      tiles.adapters[0] = inside ? static_cast<int>(id) : adapters;
      tiles.rows[0] = tiles.first[0] = 0;
      tiles.first[1] = tiles.count = 1;
      tiles.active = inside;
    }
    __syncthreads();
    return;
  }
  if (n < kShardRows) {
    tiles.keys[n] = n >= rows ? 0x7fffffff : (inside ? static_cast<int>(id) : adapters);
    tiles.leads[n] = false;
  }
  if (n == 0) tiles.served = rows;
  __syncthreads();
  if (n < rows) {
    const int key = tiles.keys[n];
    int lower = 0, earlier = 0;
    for (int m = 0; m < rows; m += 4) {
      const auto others = *reinterpret_cast<const Vec<int32_t, 4>*>(tiles.keys + m);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        lower += others.at[i] < key;
        earlier += others.at[i] == key && m + i < n;
      }
    }
    const int place = lower + earlier;
    tiles.adapters[place] = key;
    tiles.rows[place] = n;
    tiles.leads[place] = earlier % most == 0;
    if (key == adapters && earlier == 0) tiles.served = place;
  }
  __syncthreads();
  const bool leads = n < kShardRows && tiles.leads[n];
  const unsigned leaders = __ballot_sync(kAllLanes, leads);
  if (n < kShardRows && lane == 0) tiles.leaders[warp] = leaders;
  __syncthreads();
  int before = 0, count = 0;
#pragma unroll
  for (int w = 0; w < kShardRows / int(kWarp); ++w) {
    const int more = __popc(tiles.leaders[w]);
    before += w < warp ? more : 0;
    count += more;
  }
  before += __popc(leaders & ((1u << lane) - 1));
  if (leads) tiles.first[before] = n;
  if (leads && n == tiles.served) tiles.active = before;
  if (n == 0) {
    tiles.first[count] = rows;
    tiles.count = count;
    if (tiles.served == rows) tiles.active = count;
  }
  __syncthreads();
}

// How a phase's items are cut: into parts of `each`, every one given to a team of warps of a block.
struct ShardSplit {
  int each, team;
};
struct ShardPlan {
  ShardSplit shrink, expand;
};

// n / each, rounded up, in 32 bits, where a division is short.
__host__ __device__ __forceinline__ int shard_parts(int n, int each) {
  return static_cast<int>((unsigned(n) + unsigned(each) - 1) / unsigned(each));
}

// Estimated times are in units of a hundred nanoseconds or so. A step costs mostly its latency, so
// few items go to large teams; many go to a warp each, which saves sums over teams.
constexpr float kShardNever = 1e30f;  // of what cannot be
constexpr float kShardMost = 1 << 22;

// How often every team of the grid has to take an item.
__host__ __device__ __forceinline__ float shard_rounds(int items, int team, int blocks) {
  return ceilf(float(items) / float(blocks * (kShardWarps / team)));
}

// Times that something of `steps` takes `by` at once.
__host__ __device__ __forceinline__ float shard_steps(int steps, int by) {
  return ceilf(float(steps) / float(by));
}

// The split with the least `cost(each, team)`, powers of two, `each` up to 8; 1 and 1 is always
// possible, and taken where all costs are beyond the most. A candidate a lane.
template <typename Cost>
__device__ __forceinline__ ShardSplit shard_split(const Cost& cost) {
  const int lane = threadIdx.x % kWarp, each = 1 << lane % 4, team = 1 << lane / 4;
  float time = kShardMost + float(lane > 0);
  if (team <= kShardWarps) time = fminf(cost(each, team), time);
  const unsigned rank = static_cast<unsigned>(time * 4) << 5 | lane;
  const int best = __reduce_min_sync(kAllLanes, rank) % kWarp;
  return {1 << best % 4, 1 << best / 4};
}

// The same on the host.
template <typename Cost>
ShardSplit shard_split_early(const Cost& cost) {
  ShardSplit best = {1, 1};
  unsigned least = static_cast<unsigned>(kShardMost * 4);
  for (int team = 1; team <= kShardWarps; team *= 2)
    for (int each = 1; each <= 8; each *= 2) {
      const float time = cost(each, team);
      if (time >= kShardMost || static_cast<unsigned>(time * 4) >= least) continue;
      best = {each, team};
      least = static_cast<unsigned>(time * 4);
    }
  return best;
}

// Which team of the grid a warp belongs to, and its part in it.
struct ShardTeam {
  int size, part, teams, number, all;  // teams: of a block

  __device__ __forceinline__ explicit ShardTeam(int team) {
    const int warp = threadIdx.x / kWarp;
    size = team;
    part = warp % team;
    teams = blockDim.x / kWarp / team;
    number = warp / team;
    all = int(gridDim.x) * teams;
  }
  // The team's item of those from `begin` on. Neighbours, which share rows of x, go to one block,
  // unless there are too few for all: those are spread over the blocks.
  __device__ __forceinline__ int item(int begin, int items) const {
    const bool full = items - begin >= all;
    return begin +
           (full ? int(blockIdx.x) * teams + number : number * int(gridDim.x) + int(blockIdx.x));
  }
};

}  // namespace weightshare::cuda
