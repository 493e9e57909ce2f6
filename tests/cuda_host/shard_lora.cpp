// The CUDA kernel of shard_lora_decode, compiled for the host.
#include <vector>

#include "cuda/shard_lora.cuh"

#include "host.h"

namespace {

using namespace weightshare::cuda;

// As sharding.py lays them out; pointers are null where there is nothing.
struct Target {
  const void *a_pool, *b_pool;
  const int32_t *a_index, *b_index;
  const void* base;
  void* y;
  int64_t a_shards, b_shards, a_width, b_width, a_parts, b_parts, a_stride, b_stride, d_out, rank;
};
struct Call {
  const void* x;
  const int64_t* ids;
  const void* scales;
  void* h;
  int64_t rows, d_in, adapters, dtype, wide_pools, count, processors;
  double scale;
};

template <typename T, typename P>
cudaError_t run(const Call& c, const Target* targets) {
  ShardCall<T, P> call = {};
  for (int g = 0; g < c.count; ++g) {
    const Target& t = targets[g];
    ShardTarget<T, P>& to = call.targets[g];
    to.a = {static_cast<const P*>(t.a_pool),
            t.a_index,
            t.a_stride,
            uint32_t(t.a_shards),
            int(t.a_width),
            int(t.a_parts)};
    to.b = {static_cast<const P*>(t.b_pool),
            t.b_index,
            t.b_stride,
            uint32_t(t.b_shards),
            int(t.b_width),
            int(t.b_parts)};
    to.base = static_cast<const T*>(t.base);
    to.y = static_cast<T*>(t.y);
    to.base_stride = to.y_stride = t.d_out;
    to.d_out = int(t.d_out);
    to.rank = int(t.rank);
    to.first = call.ranks;
    call.ranks += int(divide_up(to.rank, kShardPad)) * kShardPad;
  }
  call.x = static_cast<const T*>(c.x);
  call.ids = c.ids;
  call.scales = static_cast<const Sum<T>*>(c.scales);
  call.h = static_cast<Sum<T>*>(c.h);
  call.x_stride = c.d_in;
  call.scale = static_cast<Sum<T>>(c.scale);
  call.count = int(c.count);
  call.d_in = int(c.d_in);
  call.adapters = int(c.adapters);
  return shard_lora(call, c.rows, int(c.processors), nullptr);
}

// Tiles of a batch: out[0] tiles, out[1] with an adapter, then of each row its tile and place in
// it.
__global__ void tiles_of(const int64_t* ids, int rows, int adapters, int most, int32_t* out) {
  __shared__ ShardTiles tiles;
  shard_group(tiles, ids, rows, adapters, most);
  if (threadIdx.x != 0) return;
  *out++ = tiles.count;
  *out++ = tiles.active;
  for (int t = 0; t < tiles.count; ++t)
    for (int p = tiles.first[t]; p < tiles.first[t + 1]; ++p) {
      out[2 * tiles.rows[p]] = t;
      out[2 * tiles.rows[p] + 1] = p - tiles.first[t];
    }
}

// How phase one is split for a target of such a size, by all threads and by the host.
template <typename Way>
__global__ void split_of(typename Way::Call call, int tiles, int* out) {
  const ShardSplit split = shard_plan<Way>(call, tiles).shrink;
  out[2 * threadIdx.x] = split.each;
  out[2 * threadIdx.x + 1] = split.team;
}

template <typename Way>
cudaError_t split(int tiles, int rows, int rank, int d_in, int64_t blocks, int* out) {
  typename Way::Call call = {};
  call.count = 1;
  call.targets[0].rank = rank;
  call.rows = rows;
  call.d_in = d_in;
  const ShardSplit early = shard_plan_early<Way>(call, tiles, int(blocks)).shrink;
  out[2 * kShardThreads] = early.each;
  out[2 * kShardThreads + 1] = early.team;
  return launch(split_of<Way>, blocks, kShardThreads, 0, nullptr, call, tiles, out);
}

}  // namespace

extern "C" const char* shard_lora_decode(const Call* c, const Target* targets) {
  return guarded([&] {
    switch (c->dtype * 2 + c->wide_pools) {
      case 0:
        return run<double, double>(*c, targets);
      case 3:
        return run<float, float>(*c, targets);
      case 4:
        return run<__nv_bfloat16, __nv_bfloat16>(*c, targets);
      case 5:
        return run<__nv_bfloat16, float>(*c, targets);
      case 6:
        return run<__half, __half>(*c, targets);
      case 7:
        return run<__half, float>(*c, targets);
      default:
        return cudaErrorInvalidConfiguration;
    }
  });
}

extern "C" int64_t shard_lora_scratch(int64_t rows, int64_t ranks) {
  return shard_scratch(rows, ranks);
}

extern "C" const char* shard_lora_tiles(const int64_t* ids, int rows, int adapters, int most,
                                        int32_t* out) {
  return guarded([&] {
    return launch(tiles_of, 1, kShardThreads, 0, nullptr, ids, rows, adapters, most, out);
  });
}

extern "C" const char* shard_lora_split(int matrix, int tiles, int rows, int rank, int d_in,
                                        int64_t blocks, int* out) {
  return guarded([&] {
    const auto function = matrix ? split<ShardMma<__half>> : split<ShardLanes<float, float, 4>>;
    return function(tiles, rows, rank, d_in, blocks, out);
  });
}
