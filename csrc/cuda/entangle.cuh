// Entangled weights: out[r,c,s] = weight[r,c,s] * grid[rows[r], cols[c], inner[s]], and its
// gradients. A class outside its axis of the grid means factor zero; such elements are not read.
//
// Forward moves 2 elements and does 1 product per element, backward moves 3 and does 2 (dweight =
// grad * factor, dgrid[cell] += grad * weight): memory-bound, 1/8 to 1/2 FLOP per byte where an
// H100 balances at 20 (fp32), so all that counts is wide, coalesced access and few other
// instructions. Both rest on one observation: step over the weight so that a lane stays in its
// columns, and a lane's column cells are looked up once and its factors change only where the
// class of the row does. The inner loop is then load, multiply, store.
#pragma once

#include "cuda/entangle_lane.cuh"

namespace weightshare::cuda {

constexpr int kEntangleResident = 5;  // blocks per processor: up to 96 registers a thread, 20 warps
constexpr int kEntangleReduceThreads = 512;
constexpr int kEntangleBlocks = 0x7fffffff;

// ---- forward ------------------------------------------------------------------------------------

template <typename T, int V>
__global__ void __launch_bounds__(kEntangleThreads, kEntangleResident)
    entangle_forward_kernel(const T* __restrict__ weight, const Sum<T>* __restrict__ grid,
                            T* __restrict__ out, EntangleShape shape, EntanglePlan plan) {
  constexpr int U = kEntangleUnroll;
  const int64_t warps = int64_t(gridDim.x) * kEntangleWarps;
  for (int64_t item = int64_t(blockIdx.x) * kEntangleWarps + threadIdx.x / kWarp; item < plan.items;
       item += warps) {
    const Quotient place = plan.tiles(item);
    const int64_t first = place.quotient * plan.chunk;
    const int bands = static_cast<int>(least(plan.bands - first, int64_t(plan.chunk)));
    EntangleLane<Sum<T>, V> lane;
    lane.place(shape, plan, first, place.remainder * kWarp + threadIdx.x % kWarp);
    for (int band = 0; band < bands; band += U, lane.advance(plan, U)) {
      Vec<T, V> values[U];
      RowCells rows[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {  // all loads first: U of them in flight
        rows[u] = lane.rows(shape, plan, u);
        values[u] =
            load_if<T, V>(lane.reads(rows[u]), weight + lane.start + u * plan.band_elements);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (rows[u] != lane.held) lane.hold(rows[u], grid);
        store_if(lane.present(plan, u), out + lane.start + u * plan.band_elements,
                 lane.scaled(values[u]));
      }
    }
  }
}

// weight, grid -> out. Pointers may have any alignment; aligned ones are read 16 bytes at a time.
template <typename T>
cudaError_t entangle_forward(const T* weight, const Sum<T>* grid, T* out,
                             const EntangleShape& shape, cudaStream_t stream) {
  if (shape.elements() == 0) return cudaSuccess;
  auto run = [&]<int V>(std::integral_constant<int, V>) {
    const EntanglePlan plan = entangle_plan(shape, V, 8192, 16);
    const int64_t blocks = least(divide_up(plan.items, kEntangleWarps), int64_t(kEntangleBlocks));
    return launch(entangle_forward_kernel<T, V>, blocks, kEntangleThreads, 0, stream, weight, grid,
                  out, shape, plan);
  };
  constexpr int V = kVectorBytes / sizeof(T);
  if (entangle_wide(shape, V, aligned_to_vectors(weight, out)))
    return run(std::integral_constant<int, V>{});
  return run(std::integral_constant<int, 1>{});
}

// ---- backward -----------------------------------------------------------------------------------

// Add the warp's sums to its table, cell by cell: one warp sum for each cell that occurs. Only
// lane 0 writes, in an order fixed by the data's shape: two runs agree bit for bit.
template <typename A, int V>
__device__ __forceinline__ void entangle_flush(const EntangleLane<A, V>& lane, const A (&sums)[V],
                                               A* table) {
  unsigned pending = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) pending |= (lane.cell(i) >= 0 ? 1u : 0u) << i;
  while (const unsigned lanes = __ballot_sync(kAllLanes, pending != 0)) {
    int mine = kOutside;  // the first cell this lane has left
#pragma unroll
    for (int i = V - 1; i >= 0; --i)
      if (pending >> i & 1) mine = lane.cell(i);
    const int cell = __shfl_sync(kAllLanes, mine, __ffs(lanes) - 1);
    A sum = 0;
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (lane.cell(i) == cell) {
        sum += sums[i];
        pending &= ~(1u << i);
      }
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) table[cell] += sum;
  }
}

// A table of cell sums per warp: in shared memory, reduced to one per block at the end; or, when
// there are more cells than fit (then a block is one warp), the block's row of `parts` itself.
template <typename T, int V>
__global__ void __launch_bounds__(kEntangleThreads, kEntangleResident)
    entangle_backward_kernel(const T* __restrict__ grad, const T* __restrict__ weight,
                             const Sum<T>* __restrict__ grid, T* __restrict__ dweight,
                             Sum<T>* __restrict__ parts,  // [blocks, cells]
                             EntangleShape shape, EntanglePlan plan, int cells, bool in_shared) {
  using A = Sum<T>;
  constexpr int U = kEntangleUnroll;
  const int warp = threadIdx.x / kWarp, lane_id = threadIdx.x % kWarp;
  const int block_warps = blockDim.x / kWarp;
  A* part = parts + int64_t(blockIdx.x) * cells;
  A* table = in_shared ? dynamic_shared<A>() + int64_t(warp) * cells : part;
  for (int c = lane_id; c < cells; c += kWarp) table[c] = 0;
  __syncwarp();

  for (int64_t item = int64_t(blockIdx.x) * block_warps + warp; item < plan.items;
       item += int64_t(gridDim.x) * block_warps) {
    const Quotient place = plan.tiles(item);
    const int64_t first = place.quotient * plan.chunk;
    const int bands = static_cast<int>(least(plan.bands - first, int64_t(plan.chunk)));
    EntangleLane<A, V> lane;
    lane.place(shape, plan, first, place.remainder * kWarp + lane_id);
    A sums[V] = {};
    for (int band = 0; band < bands; band += U, lane.advance(plan, U)) {
      Vec<T, V> grads[U], weights[U];
      RowCells rows[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t start = lane.start + u * plan.band_elements;
        rows[u] = lane.rows(shape, plan, u);
        const bool reads = lane.reads(rows[u]);
        grads[u] = load_if<T, V>(reads, grad + start);
        weights[u] = load_if<T, V>(reads, weight + start);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (__any_sync(kAllLanes, rows[u] != lane.held)) {  // another row class: start new sums
          entangle_flush(lane, sums, table);
#pragma unroll
          for (int i = 0; i < V; ++i) sums[i] = 0;
          lane.hold(rows[u], grid);
        }
#pragma unroll
        for (int i = 0; i < V; ++i) sums[i] += widen(grads[u].at[i]) * widen(weights[u].at[i]);
        store_if(lane.present(plan, u), dweight + lane.start + u * plan.band_elements,
                 lane.scaled(grads[u]));
      }
    }
    entangle_flush(lane, sums, table);
  }

  if (!in_shared) return;
  __syncthreads();
  for (int c = threadIdx.x; c < cells; c += blockDim.x) {
    A sum = 0;
    for (int w = 0; w < block_warps; ++w) sum += dynamic_shared<A>()[int64_t(w) * cells + c];
    part[c] = sum;
  }
}

// dgrid[cell] = sum over the blocks' parts: 32 cells a block, so that reads stay coalesced.
template <typename A>
__global__ void __launch_bounds__(kEntangleReduceThreads)
    entangle_reduce_kernel(const A* __restrict__ parts, A* __restrict__ dgrid, int blocks,
                           int cells) {
  constexpr int kGroups = kEntangleReduceThreads / kWarp;
  __shared__ A sums[kGroups][kWarp];
  const int group = threadIdx.x / kWarp, column = threadIdx.x % kWarp;
  const int64_t cell = int64_t(blockIdx.x) * kWarp + column;
  A sum = 0;
  if (cell < cells) {
#pragma unroll 8
    for (int b = group; b < blocks; b += kGroups) sum += parts[int64_t(b) * cells + cell];
  }
  sums[group][column] = sum;
  __syncthreads();
  if (group != 0 || cell >= cells) return;
  for (int g = 1; g < kGroups; ++g) sum += sums[g][column];
  dgrid[cell] = sum;
}

// How a backward pass will run; the caller allocates `blocks * cells` sums for it.
struct EntangleBackward {
  EntanglePlan plan;
  int vector, warps;  // elements per access; warps per block
  int64_t blocks, cells;
  bool in_shared;
};

template <typename T>
EntangleBackward entangle_backward_plan(const EntangleShape& shape, bool aligned, int processors) {
  constexpr int V = kVectorBytes / sizeof(T);
  EntangleBackward b = {};
  b.cells = shape.cells();
  b.vector = entangle_wide(shape, V, aligned) ? V : 1;
  const int64_t resident = int64_t(processors) * kEntangleResident * kEntangleWarps;
  b.plan = entangle_plan(shape, b.vector, 2 * resident, 64);
  const int64_t table = b.cells * int64_t(sizeof(Sum<T>));
  b.in_shared = table <= kSharedBytes;
  for (b.warps = kEntangleWarps; b.warps > 1 && b.warps * table > kSharedBytes;) b.warps /= 2;
  // The parts stay small beside the weight, however many cells there are.
  const int64_t most_parts = (int64_t(1) << 20) + b.plan.elements / 8;
  b.blocks = least(divide_up(b.plan.items, b.warps), divide_up(resident, b.warps));
  b.blocks = clamp(b.blocks, int64_t(1), 1 + most_parts / (b.cells + 1));
  return b;
}

// grad, weight, grid -> dweight, dgrid; `b` from entangle_backward_plan, parts[b.blocks, b.cells].
template <typename T>
cudaError_t entangle_backward(const T* grad, const T* weight, const Sum<T>* grid, T* dweight,
                              Sum<T>* dgrid, Sum<T>* parts, const EntangleShape& shape,
                              const EntangleBackward& b, cudaStream_t stream) {
  if (b.cells == 0 && b.plan.elements == 0) return cudaSuccess;
  constexpr int V = kVectorBytes / sizeof(T);
  const auto kernel =
      b.vector == V ? entangle_backward_kernel<T, V> : entangle_backward_kernel<T, 1>;
  const size_t shared = b.in_shared ? b.warps * b.cells * sizeof(Sum<T>) : 0;
  const cudaError_t status =
      launch(kernel, b.blocks, b.warps * int(kWarp), shared, stream, grad, weight, grid, dweight,
             parts, shape, b.plan, int(b.cells), b.in_shared);
  if (status != cudaSuccess || b.cells == 0) return status;
  return launch(entangle_reduce_kernel<Sum<T>>, divide_up(b.cells, kWarp), kEntangleReduceThreads,
                0, stream, static_cast<const Sum<T>*>(parts), dgrid, int(b.blocks), int(b.cells));
}

}  // namespace weightshare::cuda
