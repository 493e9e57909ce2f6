// Factors of an entangled weight (see weightshare_kernels/_grid.py): expanding the grid to one line
// per block of rows, multiplying by it, and summing back. A line is small (it stays in the L2
// cache), so both passes run at the speed of reading and writing the weight.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace weightshare {

// A weight [rows, cols, inner] and the block of each row, column and inner position. A class that
// is not in [0, blocks) lies outside every choice: its factor is zero.
template <class S>
struct Blocks {
  int64_t rows, cols, inner;
  const S* grid;  // [row_blocks, col_blocks, inner_blocks]
  int64_t row_blocks, col_blocks, inner_blocks;
  const int32_t *row_class, *col_class, *inner_class;

  int64_t width() const { return cols * inner; }
  int64_t cells() const { return col_blocks * inner_blocks; }
  // Cell within a row block of each element of a line, or -1 outside.
  std::vector<int32_t> cells_of_line() const {
    std::vector<int32_t> found(static_cast<size_t>(width()));
    auto* to = found.data();
    for (int64_t c = 0; c < cols; ++c) {
      const bool in_cols = col_class[c] >= 0 && col_class[c] < col_blocks;
      for (int64_t i = 0; i < inner; ++i) {
        const bool inside = in_cols && inner_class[i] >= 0 && inner_class[i] < inner_blocks;
        *to++ = inside ? static_cast<int32_t>(col_class[c] * inner_blocks + inner_class[i]) : -1;
      }
    }
    return found;
  }
};

// The grid with one factor per element of a line: [row_blocks + 1, width]; the last line, of the
// rows outside, is zero. And the line of each row.
template <class S>
struct Lines {
  std::vector<S> table;
  std::vector<int32_t> line;  // [rows], in 0..row_blocks

  explicit Lines(const Blocks<S>& b)
      : table((b.row_blocks + 1) * b.width()), line(static_cast<size_t>(b.rows)) {
    const int64_t width = b.width();
    const auto cells = b.cells_of_line();
    for (int64_t r = 0; r < b.row_blocks; ++r) {
      const S* factors = b.grid + r * b.cells();
      S* to = table.data() + r * width;
      for (int64_t j = 0; j < width; ++j) to[j] = cells[j] < 0 ? S{} : factors[cells[j]];
    }
    for (int64_t r = 0; r < b.rows; ++r) {
      const int32_t c = b.row_class[r];
      line[r] = c >= 0 && c < b.row_blocks ? c : static_cast<int32_t>(b.row_blocks);
    }
  }
};

// Sums `parts` tables [row_blocks + 1, width] into the grid's cells, in double and in fixed order.
template <class S, class V>
void sum_blocks(const Blocks<S>& b, const V* tables, int64_t parts, S* grid) {
  const int64_t width = b.width();
  const auto cells = b.cells_of_line();
  std::vector<double> total(b.row_blocks * b.cells());
  for (int64_t p = 0; p < parts; ++p) {
    for (int64_t r = 0; r < b.row_blocks; ++r) {
      const V* line = tables + (p * (b.row_blocks + 1) + r) * width;
      double* to = total.data() + r * b.cells();
      for (int64_t j = 0; j < width; ++j) {
        if (cells[j] >= 0) to[cells[j]] += line[j];
      }
    }
  }
  for (size_t i = 0; i < total.size(); ++i) grid[i] = static_cast<S>(total[i]);
}

}  // namespace weightshare
