// Matrix products that read a shared weight in place: rows and columns picked by tables, tiles
// scaled by a grid of factors or summed over experts, results scattered back. Frameworks gather,
// scale and scatter in passes of their own; here that happens while the panels of the product are
// packed, which a product has to do anyway.
//
// Compiled once per instruction set (see isa.h) and chosen at run time.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace weightshare {

// A [rows, cols] matrix behind strides. A table, where there is one, maps a logical row or column
// to the one that is read or written.
template <class T>
struct Matrix {
  T* data;
  int64_t row_stride;
  int64_t col_stride;
  const int64_t* rows = nullptr;
  const int64_t* cols = nullptr;

  T* row(int64_t r) const { return data + (rows ? rows[r] : r) * row_stride; }
  int64_t col(int64_t c) const { return (cols ? cols[c] : c) * col_stride; }
};

// Factor of element (r, c): table[classes[r] * stride + c].
template <class S>
struct Factors {
  const S* table = nullptr;
  const int32_t* classes = nullptr;
  int64_t stride = 0;

  const S* row(int64_t r) const { return table ? table + classes[r] * stride : nullptr; }
};

// Experts: matrices `step` elements apart, of which row r of expert e counts factors[e * pitch +
// r].
template <class S>
struct Mixture {
  int64_t count = 0;
  int64_t step = 0;
  const S* factors = nullptr;
  int64_t pitch = 0;

  S factor(int64_t e, int64_t r) const { return factors[e * pitch + r]; }
};

// How a result tile leaves the product; R is the type it is stored in, T that of the operands.
template <class T, class R = T>
struct Result {
  Matrix<R> out;
  const T* bias = nullptr;    // [cols], added
  bool accumulate = false;    // add to what is there
  Factors<Sum<T>> factors{};  // multiplied in
  // Where given: sums[classes[r] * stride + c] += product(r, c) * weight(r, c), before factors.
  Sum<T>* sums = nullptr;
  Matrix<const T> weight{};
  // Where given, the result is the gradient of a mixed weight: expert e of `out` gets it times its
  // factors, and sums[e * pitch + r] += product(r, c) * weight_e(r, c).
  Mixture<Sum<T>> mixture{};
  int64_t out_step = 0;  // elements from one expert of `out` to the next
};

// result[m, n] = sum_k a(m, k) * b(k, n). `a_by_k` and `b_by_k` tell which way an operand lies:
// true means its rows run over k (element (k, j)), false that its columns do (element (j, k)).
template <class T, class R = T>
struct Product {
  int64_t m, n, k;
  Matrix<const T> a;
  bool a_by_k;
  Matrix<const T> b;
  bool b_by_k;
  Factors<Sum<T>> b_factors{};
  Mixture<Sum<T>> b_mixture{};  // b is the first of experts, of which the sum is multiplied
  Result<T, R> result;
};

}  // namespace weightshare
