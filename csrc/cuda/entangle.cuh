// Entangled weights: out[r,c,s] = weight[r,c,s] * grid[rows[r], cols[c], inner[s]], and its
// gradients. A class outside its axis of the grid means factor zero; such elements are not read.
//
// Forward moves 2 elements and does 1 product per element, backward moves 3 and does 2 (dweight =
// grad * factor, dgrid[cell] += grad * weight): memory-bound, 1/8 to 1/2 FLOP per byte where an
// H100 balances at 20 (fp32), so all that counts is wide, coalesced access and few other
// instructions. Both rest on one observation: step over the weight so that a lane stays in its
// columns, and a lane's column cells are looked up once and its factors change only where the
// class of the row does. The inner loop is then load, multiply, store.
//
// Terms. A *vector* is V neighbouring elements, one 16-byte access. A *band* is the least run of
// whole rows that is a whole number of vectors (one row, if its length allows): at the same place
// of every band a lane meets the same columns, so rows of odd length are read as wide as others.
// A *tile* is 32 neighbouring vectors of a band; a warp takes one tile through a *chunk* of bands.
#pragma once

#include <numeric>
#include <type_traits>

#include "cuda/launch.cuh"

namespace weightshare::cuda {

// One axis of the weight: the block of each index, and the distance of blocks in the flat grid.
struct EntangleAxis {
  const int32_t* classes;  // [size]; a value outside 0..blocks-1 is outside
  int64_t size;
  int32_t blocks, stride;
};

struct EntangleShape {
  EntangleAxis rows, cols, inner;

  int64_t elements() const { return rows.size * cols.size * inner.size; }
  int64_t cells() const { return int64_t(rows.blocks) * cols.blocks * inner.blocks; }
};

// How the elements are dealt out to warps.
struct EntanglePlan {
  int64_t elements, row_length;
  int64_t band_rows, band_vectors, bands;
  int64_t tiles, chunk, items;  // item = one tile through one chunk of bands
};

constexpr int kEntangleThreads = 256;
constexpr int kEntangleWarps = kEntangleThreads / kWarp;
constexpr int kForwardUnroll = 4;   // bands in flight per lane
constexpr int kBackwardUnroll = 2;  // of two tensors
constexpr int kBackwardResident = 4;  // blocks of 8 warps per processor: 64 registers a thread
constexpr int kReduceThreads = 512;
constexpr int kMostBlocks = 0x7fffffff;
constexpr int kOutside = -1;

inline EntangleShape entangle_shape(const int64_t (&size)[3], const int64_t (&blocks)[3],
                                    const int32_t* rows, const int32_t* cols,
                                    const int32_t* inner) {
  const int32_t b[3] = {int32_t(blocks[0]), int32_t(blocks[1]), int32_t(blocks[2])};
  EntangleShape shape = {{rows, size[0], b[0], b[1] * b[2]},
                         {cols, size[1], b[1], b[2]},
                         {inner, size[2], b[2], 1}};
  // [R,1,S] (depthwise, vectors) reads the same as [1,R,S]: one long row of whole vectors.
  if (size[1] == 1) {
    const EntangleAxis long_axis = shape.rows;
    shape.rows = shape.cols;
    shape.cols = long_axis;
  }
  return shape;
}

// `wanted` warps should get work; `most` bands a chunk may have; both only steer speed.
inline EntanglePlan entangle_plan(const EntangleShape& shape, int vector, int unroll,
                                  int64_t wanted, int64_t most) {
  EntanglePlan p = {};
  p.elements = shape.elements();
  p.row_length = shape.cols.size * shape.inner.size;
  if (p.elements == 0) return p;
  p.band_rows = vector / std::gcd(p.row_length, int64_t(vector));
  p.band_vectors = p.band_rows * p.row_length / vector;
  if (p.band_vectors < 4 * kWarp) {  // short rows: enough of them to fill whole warps
    const int64_t times = kWarp / std::gcd(p.band_vectors, int64_t(kWarp));
    p.band_rows *= times;
    p.band_vectors *= times;
  }
  p.bands = divide_up(shape.rows.size, p.band_rows);
  p.band_vectors = least(p.band_vectors, divide_up(p.elements, vector));
  p.tiles = divide_up(p.band_vectors, kWarp);
  p.chunk = divide_up(clamp(p.tiles * p.bands / wanted, int64_t(unroll), most), unroll) * unroll;
  p.items = p.tiles * divide_up(p.bands, p.chunk);
  return p;
}

// ---- what one lane knows ------------------------------------------------------------------------

__device__ __forceinline__ int entangle_cell(const EntangleAxis& axis, int64_t index) {
  const int32_t block = __ldg(axis.classes + index);
  return static_cast<uint32_t>(block) < static_cast<uint32_t>(axis.blocks) ? block * axis.stride
                                                                           : kOutside;
}

__device__ __forceinline__ int entangle_join(int a, int b) { return (a | b) < 0 ? kOutside : a + b; }

// The two rows a vector may touch (the same one, unless it spans a row's end).
struct RowCells {
  int first, second;
  __device__ bool operator!=(const RowCells& o) const {
    return first != o.first || second != o.second;
  }
};

template <typename A, int V>
struct EntangleLane {
  int64_t offset;  // of its first element in a band; < 0: this lane has no vector
  int64_t row;     // of its first element in a band
  int split;       // elements in that row; the others are in the next
  int column[V];   // cell offset of each element's column
  RowCells held;   // rows the next two are for
  A factor[V];     // 0 where outside

  __device__ __forceinline__ void place(const EntangleShape& shape, const EntanglePlan& plan,
                                        int64_t vector) {
    held = {kOutside, kOutside};
    offset = vector < plan.band_vectors ? vector * V : -1;
    row = 0;
    split = V;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      column[i] = kOutside;
      factor[i] = 0;
    }
    if (offset < 0) return;
    const Quotient in_row = divide(offset, plan.row_length);
    row = in_row.quotient;
    split = static_cast<int>(least(plan.row_length - in_row.remainder, int64_t(V)));
    const Quotient col = divide(in_row.remainder, shape.inner.size);
    int64_t c = col.quotient, s = col.remainder;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      column[i] = entangle_join(entangle_cell(shape.cols, c), entangle_cell(shape.inner, s));
      if (++s == shape.inner.size) {
        s = 0;
        if (++c == shape.cols.size) c = 0;
      }
    }
  }

  __device__ __forceinline__ int64_t start(const EntanglePlan& plan, int64_t band) const {
    return band * plan.band_rows * plan.row_length + offset;
  }

  // Elements of this lane's vector in a band, from 0 to V.
  __device__ __forceinline__ int count(const EntanglePlan& plan, int64_t start) const {
    return offset < 0 ? 0 : static_cast<int>(clamp(plan.elements - start, int64_t(0), int64_t(V)));
  }

  __device__ __forceinline__ RowCells rows(const EntangleShape& shape, const EntanglePlan& plan,
                                           int64_t band, int count) const {
    if (count == 0) return {kOutside, kOutside};
    const int64_t r = band * plan.band_rows + row;
    const int first = entangle_cell(shape.rows, r);
    return {first, count > split ? entangle_cell(shape.rows, r + 1) : first};
  }

  __device__ __forceinline__ int cell(int i) const {
    return entangle_join(i < split ? held.first : held.second, column[i]);
  }

  __device__ __forceinline__ void hold(const RowCells& rows, const A* __restrict__ grid) {
    held = rows;
#pragma unroll
    for (int i = 0; i < V; ++i) factor[i] = cell(i) < 0 ? A(0) : __ldg(grid + cell(i));
  }

  // Whether any element of the columns can be inside; where none is, nothing is read.
  __device__ __forceinline__ bool reads(const RowCells& rows) const {
    bool inside = false;
#pragma unroll
    for (int i = 0; i < V; ++i) inside |= column[i] >= 0;
    return inside && (rows.first >= 0 || rows.second >= 0);
  }

  // Outside is zero whatever the value is, NaN included.
  template <typename T>
  __device__ __forceinline__ Vec<T, V> scaled(const Vec<T, V>& values) const {
    Vec<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i)
      out.at[i] = narrow<T>(cell(i) < 0 ? A(0) : widen(values.at[i]) * factor[i]);
    return out;
  }
};

// ---- forward ------------------------------------------------------------------------------------

template <typename T, int V>
__global__ void __launch_bounds__(kEntangleThreads)
    entangle_forward_kernel(const T* __restrict__ weight, const Sum<T>* __restrict__ grid,
                            T* __restrict__ out, EntangleShape shape, EntanglePlan plan) {
  constexpr int U = kForwardUnroll;
  const int64_t warps = int64_t(gridDim.x) * kEntangleWarps;
  for (int64_t item = int64_t(blockIdx.x) * kEntangleWarps + threadIdx.x / kWarp;
       item < plan.items; item += warps) {
    const Quotient place = divide(item, plan.tiles);
    EntangleLane<Sum<T>, V> lane;
    lane.place(shape, plan, place.remainder * kWarp + threadIdx.x % kWarp);
    const int64_t first = place.quotient * plan.chunk;
    const int64_t end = least(first + plan.chunk, plan.bands);
    for (int64_t band = first; band < end; band += U) {
      Vec<T, V> values[U];
      RowCells rows[U];
      int count[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {  // all loads first: U of them in flight
        const int64_t start = lane.start(plan, band + u);
        count[u] = lane.count(plan, start);
        rows[u] = lane.rows(shape, plan, band + u, count[u]);
        values[u] = load<T, V>(weight + start, lane.reads(rows[u]) ? count[u] : 0);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (rows[u] != lane.held) lane.hold(rows[u], grid);
        store<T, V>(out + lane.start(plan, band + u), lane.scaled(values[u]), count[u]);
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
    const EntanglePlan plan = entangle_plan(shape, V, kForwardUnroll, 8192, 16);
    const int64_t blocks = least(divide_up(plan.items, kEntangleWarps), int64_t(kMostBlocks));
    return launch(entangle_forward_kernel<T, V>, blocks, kEntangleThreads, 0, stream, weight, grid,
                  out, shape, plan);
  };
  constexpr int V = kVectorBytes / sizeof(T);
  if (shape.cols.size * shape.inner.size >= V && aligned_to_vectors(weight, out))
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
__global__ void __launch_bounds__(kEntangleThreads, kBackwardResident)
    entangle_backward_kernel(const T* __restrict__ grad, const T* __restrict__ weight,
                             const Sum<T>* __restrict__ grid, T* __restrict__ dweight,
                             Sum<T>* __restrict__ parts,  // [blocks, cells]
                             EntangleShape shape, EntanglePlan plan, int cells, bool in_shared) {
  using A = Sum<T>;
  constexpr int U = kBackwardUnroll;
  const int warp = threadIdx.x / kWarp, lane_id = threadIdx.x % kWarp;
  const int block_warps = blockDim.x / kWarp;
  A* part = parts + int64_t(blockIdx.x) * cells;
  A* table = in_shared ? dynamic_shared<A>() + int64_t(warp) * cells : part;
  for (int c = lane_id; c < cells; c += kWarp) table[c] = 0;
  __syncwarp();

  for (int64_t item = int64_t(blockIdx.x) * block_warps + warp; item < plan.items;
       item += int64_t(gridDim.x) * block_warps) {
    const Quotient place = divide(item, plan.tiles);
    EntangleLane<A, V> lane;
    lane.place(shape, plan, place.remainder * kWarp + lane_id);
    A sums[V] = {};
    const int64_t first = place.quotient * plan.chunk;
    const int64_t end = least(first + plan.chunk, plan.bands);
    for (int64_t band = first; band < end; band += U) {
      Vec<T, V> grads[U], weights[U];
      RowCells rows[U];
      int count[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t start = lane.start(plan, band + u);
        count[u] = lane.count(plan, start);
        rows[u] = lane.rows(shape, plan, band + u, count[u]);
        const int reads = lane.reads(rows[u]) ? count[u] : 0;
        grads[u] = load<T, V>(grad + start, reads);
        weights[u] = load<T, V>(weight + start, reads);
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
        store<T, V>(dweight + lane.start(plan, band + u), lane.scaled(grads[u]), count[u]);
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
__global__ void __launch_bounds__(kReduceThreads)
    entangle_reduce_kernel(const A* __restrict__ parts, A* __restrict__ dgrid, int blocks,
                           int cells) {
  constexpr int kGroups = kReduceThreads / kWarp;
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
  b.vector = shape.cols.size * shape.inner.size >= V && aligned ? V : 1;
  const int64_t resident = int64_t(processors) * kBackwardResident * kEntangleWarps;
  b.plan = entangle_plan(shape, b.vector, kBackwardUnroll, 2 * resident, 64);
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
  const auto kernel = b.vector == V ? entangle_backward_kernel<T, V> : entangle_backward_kernel<T, 1>;
  const size_t shared = b.in_shared ? b.warps * b.cells * sizeof(Sum<T>) : 0;
  const cudaError_t status = launch(kernel, b.blocks, b.warps * int(kWarp), shared, stream, grad,
                                    weight, grid, dweight, parts, shape, b.plan, int(b.cells),
                                    b.in_shared);
  if (status != cudaSuccess || b.cells == 0) return status;
  return launch(entangle_reduce_kernel<Sum<T>>, divide_up(b.cells, kWarp), kReduceThreads, 0,
                stream, static_cast<const Sum<T>*>(parts), dgrid, int(b.blocks), int(b.cells));
}

}  // namespace weightshare::cuda
