// sliced_linear on the CPU. Spans with many rows go to PyTorch's GEMM library by strides, picked
// columns after one gather; tables of rows and fewer rows to the product that packs them in place.
// A call is one dispatch: narrowing, zeroing around the slice and the bias gradient are done here,
// not in Python.
#include "bindings/tensor_cpu.h"

namespace weightshare {
namespace {

using torch::stable::detail::from;

// Up to here our product, which reads W in place and once, serves spans too: measured on Zen 4,
// two threads, 1.1-1.7 x the library forward and 0.9-1.8 x for dx at 4 to 2048 rows.
// The gradient of a span always goes to the library, whose outer product is the quicker one.
constexpr int64_t kOurRows = 2048;
// Which part of a weight [O, I] is used: spans, unless a table names the rows or columns.
struct Slice {
  const MaybeTensor &rows, &cols;
  int64_t row, out, col, in;

  Slice(const Tensor& weight, const MaybeTensor& rows, const MaybeTensor& cols, int64_t row,
        int64_t out, int64_t col, int64_t in)
      : rows(rows), cols(cols), row(row), out(out), col(col), in(in) {
    check(rows, row, out, weight.size(0), "out");
    check(cols, col, in, weight.size(1), "in_");
  }

  bool span() const { return !rows && !cols; }

  // The slice as kernels read it, without a copy.
  template <class T>
  Matrix<const T> read(const Tensor& weight) const {
    return {pointer<T>(weight) + row * weight.stride(0) + col * weight.stride(1), weight.stride(0),
            weight.stride(1), index(rows), index(cols)};
  }
  template <class R>
  Matrix<R> write(const Tensor& target) const {
    return {mutable_pointer<R>(target) + row * target.stride(0) + col * target.stride(1),
            target.stride(0), target.stride(1), index(rows), index(cols)};
  }

  // The slice as a tensor: a view of spans, a copy of what a table picks.
  Tensor tensor(const Tensor& weight) const { return along(along(weight, 0), 1); }
  Tensor along(Tensor t, int64_t dim) const {
    const MaybeTensor& table = dim == 0 ? rows : cols;
    if (table) return call<3>("aten::index_select", "", {from(t), from(dim), from(*table)});
    return torch::stable::narrow(t, dim, dim == 0 ? row : col, dim == 0 ? out : in);
  }

 private:
  static const int64_t* index(const MaybeTensor& table) {
    return table ? pointer<int64_t>(*table) : nullptr;
  }
  static void check(const MaybeTensor& index, int64_t start, int64_t length, int64_t size,
                    const char* name) {
    table(index, size, name);
    STD_TORCH_CHECK(index ? index->numel() == length && start == 0
                          : start >= 0 && length >= 0 && start + length <= size,
                    name, ": the selection does not fit the weight");
  }
};

// Most rows that our product serves: for tables, whose gathering it does on the way, four times
// those of spans.
int64_t our_rows(const Tensor& t, const Slice& slice) {
  if (is_low_precision(t)) return kFewRows;
  return slice.span() ? kOurRows : 4 * kOurRows;
}

// Whether the library's product serves. Spans cost it no copy, and with many rows the copy of a
// gathered slice is nothing against the product; picked columns touch nearly every cache line of
// W, so that one gather beats gathering block by block.
bool use_library(const Tensor& weight, int64_t m, const Slice& slice) {
  if (slice.cols || (slice.span() && weight.stride(1) != 1)) return true;
  return m > our_rows(weight, slice);
}

Tensor forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
               const MaybeTensor& rows, const MaybeTensor& cols, int64_t row, int64_t out,
               int64_t col, int64_t in) {
  const Slice slice(weight, rows, cols, row, out, col, in);
  const int64_t m = in == 0 ? 0 : x.numel() / in;
  if (in == 0 || use_library(weight, m, slice)) {
    const MaybeTensor shift = bias ? MaybeTensor(slice.along(*bias, 0)) : bias;
    return library_linear(x, slice.tensor(weight), shift);
  }
  Tensor y = with_last(x, out);
  if (y.numel() == 0) return y;
  const Tensor flat = rows_of(x);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> shift;
    Product<T> p{m, out, in, matrix<T>(flat), false, slice.read<T>(weight), false};
    p.result.out = {mutable_pointer<T>(y), out, 1};
    if (bias && (rows || bias->stride(0) != 1)) {
      const Matrix<const T> values{pointer<T>(*bias) + row * bias->stride(0), bias->stride(0), 0,
                                   p.b.rows};
      for (int64_t j = 0; j < out; ++j) shift.push_back(*values.row(j));
      p.result.bias = shift.data();
    } else if (bias) {
      p.result.bias = pointer<T>(*bias) + row;
    }
    run(p);
  });
  return y;
}

Tensor grad_x(const Tensor& grad, const Tensor& weight, const MaybeTensor& rows,
              const MaybeTensor& cols, int64_t row, int64_t out, int64_t col, int64_t in) {
  const Slice slice(weight, rows, cols, row, out, col, in);
  const int64_t m = out == 0 ? 0 : grad.numel() / out;
  if (out == 0 || use_library(weight, m, slice)) {
    return library_matmul(grad, slice.tensor(weight));
  }
  Tensor dx = with_last(grad, in);
  if (dx.numel() == 0) return dx;
  const Tensor flat = rows_of(grad);
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Product<T> p{m, in, out, matrix<T>(flat), false, slice.read<T>(weight), true};
    p.result.out = {mutable_pointer<T>(dx), in, 1};
    run(p);
  });
  return dx;
}

// Zeroes what the slice does not cover; all of it where a table scatters.
void zero_outside(const Tensor& buffer, const Slice& s) {
  Tensor whole = buffer;
  if (!s.span() || buffer.stride(1) != 1) {
    torch::stable::zero_(whole);
    return;
  }
  const size_t item = buffer.element_size();
  char* data = static_cast<char*>(buffer.mutable_data_ptr());
  const int64_t width = buffer.size(1), step = buffer.stride(0);
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, buffer.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      char* line = data + r * step * item;
      const bool inside = r >= s.row && r < s.row + s.out;
      const int64_t left = inside ? s.col : width, right = inside ? s.col + s.in : width;
      std::memset(line, 0, left * item);
      std::memset(line + right * item, 0, (width - right) * item);
    }
  });
}

void weight_gradient(const Tensor& buffer, const Tensor& g, const Tensor& x, const Slice& slice,
                     bool accumulate) {
  const bool same = buffer.scalar_type() == x.scalar_type();
  if (slice.span() && same) {
    const Tensor target = slice.tensor(buffer);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(target.get(), target.get(),
                                                           torch::stable::transpose(g, 0, 1).get(),
                                                           x.get(), accumulate ? 1.0 : 0.0, 1.0));
    return;
  }
  const bool apart = g.size(0) > our_rows(x, slice);
  const Tensor whole = apart ? library_matmul(torch::stable::transpose(g, 0, 1), x) : x;
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto store = [&](auto kind) {
      using R = decltype(kind);
      if (apart) {
        WS_CHOSEN(deposit<T, R>)(matrix<T>(whole), slice.out, slice.in, accumulate,
                                 slice.write<R>(buffer));
        return;
      }
      Product<T, R> p{slice.out, slice.in, g.size(0), matrix<T>(g), true, matrix<T>(x), true};
      p.result.out = slice.write<R>(buffer);
      p.result.accumulate = accumulate;
      run(p);
    };
    if (same) {
      store(T{});
    } else {
      STD_TORCH_CHECK(buffer.scalar_type() == ScalarType::Float && is_low_precision(x),
                      "sliced_linear_grad_weight_: buffer must have x's dtype, or float32");
      store(float{});
    }
  });
}

// Column sums of g [rows, out], put where the bias was taken from; zero elsewhere.
Tensor bias_gradient(const Tensor& g, const Slice& slice, int64_t size) {
  Tensor db = torch::stable::new_zeros(g, {size});
  if (size == 0 || slice.out == 0) return db;
  dispatch(g.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> from = matrix<T>(g);
    const int64_t* index = slice.rows ? pointer<int64_t>(*slice.rows) : nullptr;
    T* to = mutable_pointer<T>(db) + slice.row;
    const int64_t grain = std::max<int64_t>(64, 32768 / std::max<int64_t>(1, g.size(0)));
    torch::stable::parallel_for(0, slice.out, grain, [&](int64_t begin, int64_t end) {
      std::vector<Sum<T>> sums(end - begin);
      WS_CHOSEN(sum_columns<T>)(from, begin, end, g.size(0), sums.data());
      for (int64_t j = begin; j < end; ++j) to[index ? index[j] : j] = narrow<T>(sums[j - begin]);
    });
  });
  return db;
}

Tensor grad_weight_(const Tensor& buffer, const Tensor& grad, const Tensor& x,
                    const MaybeTensor& rows, const MaybeTensor& cols, int64_t row, int64_t out,
                    int64_t col, int64_t in, bool accumulate, int64_t bias_size) {
  const Slice slice(buffer, rows, cols, row, out, col, in);
  const Tensor g = rows_of(grad), input = rows_of(x);
  if (!accumulate) zero_outside(buffer, slice);
  if (out > 0 && in > 0) weight_gradient(buffer, g, input, slice, accumulate);
  return bias_gradient(g, slice, bias_size);
}

}  // namespace
}  // namespace weightshare

STABLE_TORCH_LIBRARY_IMPL(weightshare, CPU, m) {
  m.impl("sliced_linear", TORCH_BOX(&weightshare::forward));
  m.impl("sliced_linear_grad_x", TORCH_BOX(&weightshare::grad_x));
  m.impl("sliced_linear_grad_weight_", TORCH_BOX(&weightshare::grad_weight_));
}
