// How entangle.cuh deals a weight [R, C, S] out to warps, and what one lane knows of it.
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
  int64_t elements;
  Divisor row, inner, tiles;  // elements of a row, of its last axis; tiles of a band
  int64_t band_rows, band_elements, band_vectors, bands;
  int64_t items;  // one tile through one chunk of bands
  int32_t chunk;  // bands, a multiple of the kernel's unroll
};

constexpr int kEntangleThreads = 128;
constexpr int kEntangleWarps = kEntangleThreads / kWarp;
constexpr int kEntangleUnroll = 2;  // bands in flight per lane
constexpr int kOutside = -1;
constexpr int64_t kNowhere = int64_t(1) << 62;

inline EntangleShape entangle_shape(const int64_t (&size)[3], const int64_t (&blocks)[3],
                                    const int32_t* rows, const int32_t* cols,
                                    const int32_t* inner) {
  const int32_t b[3] = {int32_t(blocks[0]), int32_t(blocks[1]), int32_t(blocks[2])};
  EntangleShape shape = {
      {rows, size[0], b[0], b[1] * b[2]}, {cols, size[1], b[1], b[2]}, {inner, size[2], b[2], 1}};
  // [R,1,S] (depthwise, vectors) reads the same as [1,R,S]: one long row of whole vectors.
  if (size[1] == 1) {
    const EntangleAxis long_axis = shape.rows;
    shape.rows = shape.cols;
    shape.cols = long_axis;
  }
  return shape;
}

// Whether whole vectors cover the weight and none touches three rows. Else elements are read one
// by one, still coalesced: odd x odd weights, and linears of fewer than V inputs.
inline bool entangle_wide(const EntangleShape& shape, int vector, bool aligned) {
  return aligned && shape.elements() % vector == 0 && shape.cols.size * shape.inner.size >= vector;
}

// `wanted` warps should get work; `most` bands a chunk may have; both only steer speed.
inline EntanglePlan entangle_plan(const EntangleShape& shape, int vector, int64_t wanted,
                                  int64_t most) {
  EntanglePlan p = {};
  p.elements = shape.elements();
  if (p.elements == 0) return p;
  const int64_t row = shape.cols.size * shape.inner.size;
  p.row = Divisor(row);
  p.inner = Divisor(shape.inner.size);
  p.band_rows = vector / std::gcd(row, int64_t(vector));
  p.band_vectors = p.band_rows * row / vector;
  if (p.band_vectors < 4 * kWarp) {  // short rows: enough of them to fill whole warps
    const int64_t times = kWarp / std::gcd(p.band_vectors, int64_t(kWarp));
    p.band_rows *= times;
    p.band_vectors *= times;
  }
  p.bands = divide_up(shape.rows.size, p.band_rows);
  p.band_elements = p.band_rows * row;
  p.band_vectors = least(p.band_vectors, divide_up(p.elements, vector));
  const int64_t tiles = divide_up(p.band_vectors, kWarp);
  p.tiles = Divisor(tiles);
  const int64_t chunk = clamp(tiles * p.bands / wanted, int64_t(1), most);
  p.chunk = int32_t(divide_up(chunk, kEntangleUnroll)) * kEntangleUnroll;
  p.items = tiles * divide_up(p.bands, p.chunk);
  return p;
}

// ---- what one lane knows ------------------------------------------------------------------------

__device__ __forceinline__ int entangle_cell(const EntangleAxis& axis, int64_t index) {
  const int32_t block = __ldg(axis.classes + index);
  return static_cast<uint32_t>(block) < static_cast<uint32_t>(axis.blocks) ? block * axis.stride
                                                                           : kOutside;
}

__device__ __forceinline__ int entangle_join(int a, int b) {
  return (a | b) < 0 ? kOutside : a + b;
}

// The two rows a vector may touch (the same one, unless it spans a row's end).
struct RowCells {
  int first, second;
  __device__ bool operator!=(const RowCells& o) const {
    return first != o.first || second != o.second;
  }
};

template <typename A, int V>
struct EntangleLane {
  int64_t start;  // its first element in the current band; kNowhere: it has no vector
  int64_t row;    // row of that element
  int split;      // elements in that row; the others are in the next
  int column[V];  // cell offset of each element's column
  RowCells held;  // rows the next two are for
  A factor[V];
  unsigned outside;  // bit i: element i is outside

  __device__ __forceinline__ void place(const EntangleShape& shape, const EntanglePlan& plan,
                                        int64_t band, int64_t vector) {
    held = {kOutside, kOutside};
    outside = ~0u;
    start = kNowhere;
    row = 0;
    split = V;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      column[i] = kOutside;
      factor[i] = 0;
    }
    if (vector >= plan.band_vectors) return;
    start = band * plan.band_elements + vector * V;
    const Quotient in_row = plan.row(vector * V);
    row = band * plan.band_rows + in_row.quotient;
    split = static_cast<int>(least(plan.row.value - in_row.remainder, int64_t(V)));
    const Quotient col = plan.inner(in_row.remainder);
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

  __device__ __forceinline__ void advance(const EntanglePlan& plan, int bands) {
    start += bands * plan.band_elements;
    row += bands * plan.band_rows;
  }

  // Whether the lane has a vector `ahead` bands on. Vectors are whole: V divides the elements.
  __device__ __forceinline__ bool present(const EntanglePlan& plan, int ahead) const {
    return start + ahead * plan.band_elements < plan.elements;
  }

  __device__ __forceinline__ RowCells rows(const EntangleShape& shape, const EntanglePlan& plan,
                                           int ahead) const {
    if (!present(plan, ahead)) return {kOutside, kOutside};
    const int64_t r = row + ahead * plan.band_rows;
    const int first = entangle_cell(shape.rows, r);
    return {first, split < V ? entangle_cell(shape.rows, r + 1) : first};
  }

  __device__ __forceinline__ int cell(int i) const {
    return entangle_join(i < split ? held.first : held.second, column[i]);
  }

  __device__ __forceinline__ void hold(const RowCells& rows, const A* __restrict__ grid) {
    held = rows;
    outside = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int c = cell(i);
      factor[i] = c < 0 ? A(0) : __ldg(grid + c);
      outside |= static_cast<unsigned>(c < 0) << i;
    }
  }

  // Whether any element can be inside; where none is, nothing is read.
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
      out.at[i] = narrow<T>(outside >> i & 1 ? A(0) : widen(values.at[i]) * factor[i]);
    return out;
  }
};

}  // namespace weightshare::cuda
