// An entangled weight's blocks as tensors, and the passes over it that two ops share.
#pragma once

#include <utility>

#include "bindings/tensor_cpu.h"
#include "cpu/entangle.h"

namespace weightshare {

inline const int32_t* classes(const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.numel() == size,
                  name, ": expected contiguous int32 of ", size, " elements");
  return pointer<int32_t>(t);
}

// Blocks of a weight [rows, cols, inner]; inner is absent for a matrix.
template <class T>
Blocks<Sum<T>> blocks_of(const Tensor& weight, const Tensor& grid, const Tensor& rows,
                         const Tensor& cols, const MaybeTensor& inner) {
  static const int32_t kFirst = 0;
  using S = Sum<T>;
  const auto expected = std::is_same_v<S, double> ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(grid.scalar_type() == expected && grid.is_contiguous(),
                  "grid: expected contiguous float32 (float64 for float64 weights)");
  Blocks<S> b{};
  b.rows = weight.size(0);
  b.cols = weight.size(1);
  b.inner = inner ? weight.size(2) : 1;
  b.grid = pointer<S>(grid);
  b.row_blocks = grid.size(0);
  b.col_blocks = grid.size(1);
  b.inner_blocks = inner ? grid.size(2) : 1;
  b.row_class = classes(rows, b.rows, "rows");
  b.col_class = classes(cols, b.cols, "cols");
  b.inner_class = inner ? classes(*inner, b.inner, "inner") : &kFirst;
  return b;
}

inline int64_t row_parts(int64_t rows, int64_t width) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min({threads, rows, rows * width / 16384}));
}

// weight * factors, one pass.
template <class T>
void scale(const Blocks<Sum<T>>& b, const Lines<Sum<T>>& lines, const T* from, T* to) {
  const int64_t parts = row_parts(b.rows, b.width());
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      WS_CHOSEN(scale_rows<T>)(from, lines.table.data(), lines.line.data(), b.rows * p / parts,
                               b.rows * (p + 1) / parts, b.width(), to);
    }
  });
}

// to (+)= g * factors and grid_sums = block sums of g * weight, one pass over both.
template <class T, class R>
void scale_backward(const Blocks<Sum<T>>& b, const Lines<Sum<T>>& lines, const T* g,
                    const T* weight, bool add, R* to, int64_t pitch, Sum<T>* grid_sums) {
  constexpr int64_t kBlock = 512;  // rows summed in Sum<T> before they go to a double
  const int64_t parts = row_parts(b.rows, b.width()), width = b.width();
  const int64_t table = (b.row_blocks + 1) * width;
  std::vector<double> sums(parts * table);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<Sum<T>> block(table);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t last = b.rows * (p + 1) / parts;
      for (int64_t r = b.rows * p / parts; r < last; r += kBlock) {
        std::fill(block.begin(), block.end(), Sum<T>{});
        WS_CHOSEN(scale_rows_and_sum<T, R>)(g, weight, lines.table.data(), lines.line.data(), r,
                                            std::min(last, r + kBlock), width, add, to, pitch,
                                            block.data());
        for (int64_t i = 0; i < table; ++i) sums[p * table + i] += block[i];
      }
    }
  });
  sum_blocks(b, sums.data(), parts, grid_sums);
}

}  // namespace weightshare
