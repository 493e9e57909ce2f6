// Rows of a batch by adapter, in tiles that read an adapter's shards together, and how tiles are
// cut among warps. Every block works these out for itself, in shared memory: the ids are known on
// the device alone, and a launch of its own would take longer.
#pragma once

#include "cuda/launch.cuh"

namespace weightshare::cuda {

constexpr int kShardWarps = 16;
constexpr int kShardThreads = kShardWarps * int(kWarp);
constexpr int kShardRows = 256;  // of a launch
constexpr int kShardTile = 4;    // rows of a tile, all of one adapter
constexpr int kShardRanks = 4;   // most rows of A that a team takes at once

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

// Sort the rows by adapter, keeping their order, and cut each adapter's into tiles.
__device__ __forceinline__ void shard_group(ShardTiles& tiles, const int64_t* ids, int rows,
                                            int adapters) {
  static_assert(kShardRows <= kShardThreads);
  const int n = threadIdx.x, lane = n % int(kWarp), warp = n / int(kWarp);
  if (n < kShardRows) {
    const uint64_t id = n < rows && ids != nullptr ? static_cast<uint64_t>(ids[n]) : 0;
    const bool inside = id < static_cast<uint64_t>(adapters);
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
    tiles.leads[place] = earlier % kShardTile == 0;
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

// How a phase's items are cut: each is given to a team of warps of one block.
struct ShardSplit {
  int ranks;  // rows of A of an item
  int team;   // warps
};

// The cut with the least estimated time, one candidate a lane. `items` gives the number of items
// for a number of ranks, `steps` how often a lane of a single warp would load. A step costs mostly
// its latency, so few items go to large teams; many, each warp its own, which saves the sum over a
// team.
template <typename Items>
__device__ __forceinline__ ShardSplit shard_split(int most_ranks, int steps, const Items& items) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int ranks = 1 << lane % 4, team = 1 << lane / 4;
  unsigned cost = 1u << 26;
  if (ranks <= most_ranks && team <= warps) {
    const float rounds = ceilf(float(items(ranks)) / float(int(gridDim.x) * (warps / team)));
    const float step = ceilf(float(steps) / float(team));
    const float all = rounds * (3.0f + step * float(4 + ranks));
    cost = all < float(cost) ? static_cast<unsigned>(all) : cost - 1;
  }
  const int best = __reduce_min_sync(kAllLanes, cost << 5 | lane) % kWarp;
  return {1 << best % 4, 1 << best / 4};
}

}  // namespace weightshare::cuda
