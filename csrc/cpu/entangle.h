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
  // Cell within a row block of element j of a line, or -1 outside.
  int64_t cell(int64_t j) const {
    const int64_t c = col_class[j / inner], s = inner_class[j % inner];
    const bool inside = c >= 0 && c < col_blocks && s >= 0 && s < inner_blocks;
    return inside ? c * inner_blocks + s : -1;
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
    const int64_t width = b.width(), cells = b.col_blocks * b.inner_blocks;
    for (int64_t j = 0; j < width; ++j) {
      const int64_t cell = b.cell(j);
      for (int64_t r = 0; cell >= 0 && r < b.row_blocks; ++r) {
        table[r * width + j] = b.grid[r * cells + cell];
      }
    }
    for (int64_t r = 0; r < b.rows; ++r) {
      const int32_t c = b.row_class[r];
      line[r] = c >= 0 && c < b.row_blocks ? c : static_cast<int32_t>(b.row_blocks);
    }
  }
};

// Sums `parts` tables [row_blocks + 1, width] into the grid's cells, in double and in fixed order.
template <class S>
void sum_blocks(const Blocks<S>& b, const S* tables, int64_t parts, S* grid) {
  const int64_t width = b.width(), cells = b.col_blocks * b.inner_blocks;
  std::vector<double> total(b.row_blocks * cells);
  for (int64_t p = 0; p < parts; ++p) {
    for (int64_t r = 0; r < b.row_blocks; ++r) {
      const S* line = tables + (p * (b.row_blocks + 1) + r) * width;
      for (int64_t j = 0; j < width; ++j) {
        const int64_t cell = b.cell(j);
        if (cell >= 0) total[r * cells + cell] += line[j];
      }
    }
  }
  for (size_t i = 0; i < total.size(); ++i) grid[i] = static_cast<S>(total[i]);
}

}  // namespace weightshare
