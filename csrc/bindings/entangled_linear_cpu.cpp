// entangled_linear on the CPU. The product scales W while it packs it, and takes the block sums of
// the gradient from the finished tiles. With many rows one scaled copy, alive for the call alone,
// costs nothing against the product, and the library's is the quicker one.
#include "bindings/grid_cpu.h"

namespace weightshare {
namespace {

// Rows from which the library serves.
bool use_library(const Tensor& x, int64_t rows) {
  return rows > (is_low_precision(x) ? kFewRows : 1024);
}

template <class T>
Factors<Sum<T>> factors(const Lines<Sum<T>>& lines, int64_t width) {
  return {lines.table.data(), lines.line.data(), width};
}

template <class T>
Tensor scaled(const Tensor& weight, const Blocks<Sum<T>>& b) {
  const Tensor from = torch::stable::contiguous(weight);
  Tensor to = torch::stable::empty_like(from);
  scale<T>(b, Lines(b), pointer<T>(from), mutable_pointer<T>(to));
  return to;
}

Tensor forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& grid,
               const Tensor& rows, const Tensor& cols) {
  const int64_t n = weight.size(0), k = weight.size(1), m = k == 0 ? 0 : x.numel() / k;
  if (k == 0) return library_linear(x, weight, bias);
  return dispatch(x.scalar_type(), [&](auto zero) -> Tensor {
    using T = decltype(zero);
    const auto b = blocks_of<T>(weight, grid, rows, cols, std::nullopt);
    if (use_library(x, m)) {
      return library_linear(x, scaled<T>(weight, b), bias);
    }
    Tensor y = with_last(x, n);
    if (y.numel() == 0) return y;
    const Tensor flat = rows_of(x), out = torch::stable::view(y, {m, n});
    const MaybeTensor shift = bias ? MaybeTensor(torch::stable::contiguous(*bias)) : bias;
    const Lines<Sum<T>> lines(b);
    Product<T> p{m, n, k, matrix<T>(flat), false, matrix<T>(weight), false, factors<T>(lines, k)};
    p.result.out = mutable_matrix<T>(out);
    p.result.bias = shift ? pointer<T>(*shift) : nullptr;
    run(p);
    return y;
  });
}

Tensor grad_x(const Tensor& grad, const Tensor& weight, const Tensor& grid, const Tensor& rows,
              const Tensor& cols) {
  const int64_t k = weight.size(0), n = weight.size(1), m = k == 0 ? 0 : grad.numel() / k;
  if (k == 0) return library_matmul(grad, weight);
  return dispatch(grad.scalar_type(), [&](auto zero) -> Tensor {
    using T = decltype(zero);
    const auto b = blocks_of<T>(weight, grid, rows, cols, std::nullopt);
    if (use_library(grad, m)) {
      return library_matmul(grad, scaled<T>(weight, b));
    }
    Tensor dx = with_last(grad, n);
    if (dx.numel() == 0) return dx;
    const Tensor flat = rows_of(grad), out = torch::stable::view(dx, {m, n});
    const Lines<Sum<T>> lines(b);
    Product<T> p{m, n, k, matrix<T>(flat), false, matrix<T>(weight), true, factors<T>(lines, n)};
    p.result.out = mutable_matrix<T>(out);
    run(p);
    return dx;
  });
}

// In the fused product: every part of the rows of W keeps block sums of its own.
template <class T, class R>
void fused_gradient(const Tensor& target, const Tensor& g, const Tensor& x, const Tensor& weight,
                    const Blocks<Sum<T>>& b, bool accumulate, Sum<T>* dgrid) {
  using S = Sum<T>;
  const Lines<S> lines(b);
  Product<T, R> p{b.rows, b.cols, g.size(0), matrix<T>(g), true, matrix<T>(x), true};
  p.result.out = mutable_matrix<R>(target);
  p.result.accumulate = accumulate;
  p.result.factors = factors<T>(lines, b.cols);
  p.result.weight = matrix<T>(weight);
  const Cut cut = cut_for(p.m, p.n, p.k);
  const int64_t table = (b.row_blocks + 1) * b.cols;
  std::vector<S> sums(cut.parts_m * table);
  run(p, cut, [&](Product<T, R> part, int64_t i) {
    part.result.sums = sums.data() + i * table;
    return part;
  });
  sum_blocks(b, sums.data(), cut.parts_m, dgrid);
}

Tensor grad_weight_(const Tensor& target, const Tensor& grad, const Tensor& x, const Tensor& weight,
                    const Tensor& grid, const Tensor& rows, const Tensor& cols, bool accumulate) {
  const Tensor g = rows_of(grad), in = rows_of(x);
  Tensor dgrid = torch::stable::empty_like(grid);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto b = blocks_of<T>(weight, grid, rows, cols, std::nullopt);
    auto store = [&](auto kind) {
      using R = decltype(kind);
      if (use_library(x, g.size(0)) && target.stride(1) == 1) {
        const Tensor whole = library_matmul(torch::stable::transpose(g, 0, 1), in);
        const Tensor w = torch::stable::contiguous(weight);
        scale_backward<T, R>(b, Lines(b), pointer<T>(whole), pointer<T>(w), accumulate,
                             mutable_pointer<R>(target), target.stride(0),
                             mutable_pointer<Sum<T>>(dgrid));
      } else {
        fused_gradient<T, R>(target, g, in, weight, b, accumulate, mutable_pointer<Sum<T>>(dgrid));
      }
    };
    if (target.scalar_type() == x.scalar_type()) {
      store(T{});
    } else {
      STD_TORCH_CHECK(target.scalar_type() == ScalarType::Float && is_low_precision(x),
                      "entangled_linear_grad_weight_: target must have x's dtype, or float32");
      store(float{});
    }
  });
  return dgrid;
}

}  // namespace
}  // namespace weightshare

STABLE_TORCH_LIBRARY_IMPL(weightshare, CPU, m) {
  m.impl("entangled_linear", TORCH_BOX(&weightshare::forward));
  m.impl("entangled_linear_grad_x", TORCH_BOX(&weightshare::grad_x));
  m.impl("entangled_linear_grad_weight_", TORCH_BOX(&weightshare::grad_weight_));
}
