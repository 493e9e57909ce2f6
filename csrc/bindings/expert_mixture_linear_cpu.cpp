// expert_mixture_linear on the CPU. The product sums the experts while it packs them and hands
// each expert's gradient out of the finished tiles. With many rows one mixed copy, alive for the
// call alone, costs nothing against the product, and the library's is the quicker one.
#include "bindings/tensor_cpu.h"

namespace weightshare {
namespace {

// Most rows that our product serves, by pass.
// Up to here our product serves. It reads the experts once per block of some 200 rows, which grows
// dear with their number: forward and dx are limited by rows x experts. Measured on Zen 4, two
// threads, 768 -> 3072, time by way of a mixed copy / ours, median of several runs on a busy
// machine: forward 2.6, 1.8, 1.1 at 64, 224, 512 rows of 2 experts and 1.6, 1.5, 1.1 of 6; dx 1.6,
// 1.4, 1.0 of 2 experts and 1.3, 1.2, 0.8 of 6; the gradient 1.6, 1.3, 1.0 of either.
constexpr int64_t kForwardRows = 4096, kGradXRows = 2048, kWeightRows = 1024;

// The experts in use, [M, out, in] after tables, and what each of their rows counts.
struct Experts {
  const Tensor &weights, &mix;
  const int64_t *rows, *cols;
  int64_t out, in;

  Experts(const Tensor& weights, const Tensor& mix, const MaybeTensor& row_table,
          const MaybeTensor& col_table)
      : weights(weights),
        mix(mix),
        rows(table(row_table, weights.size(1), "out")),
        cols(table(col_table, weights.size(2), "in_")),
        out(row_table ? row_table->numel() : weights.size(1)),
        in(col_table ? col_table->numel() : weights.size(2)) {
    const bool wide = weights.scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(mix.is_contiguous() && mix.dim() == 2 && mix.size(0) == weights.size(0) &&
                        mix.size(0) > 0 && mix.size(1) == out &&
                        mix.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                    "mix: expected contiguous [experts, out] in float32 (float64 for float64)");
  }

  template <class T>
  Matrix<const T> first() const {
    return {pointer<T>(weights), weights.stride(1), weights.stride(2), rows, cols};
  }
  template <class T>
  Mixture<Sum<T>> mixture() const {
    return {mix.size(0), weights.stride(0), pointer<Sum<T>>(mix), mix.size(1)};
  }
  // Picked or strided columns touch every cache line of a row: that is done once.
  bool use_library(int64_t m, int64_t limit) const {
    return cols != nullptr || weights.stride(2) != 1 ||
           m > (is_low_precision(weights) ? kFewRows : limit);
  }
};

template <class F>
void parallel_rows(int64_t rows, int64_t cols, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cols));
  torch::stable::parallel_for(0, rows, grain, f);
}

// The mixed weight [out, in].
template <class T>
Tensor mixed(const Experts& experts) {
  Tensor to = torch::stable::new_empty(experts.weights, {experts.out, experts.in});
  const auto from = experts.first<T>();
  const auto mixture = experts.mixture<T>();
  T* data = mutable_pointer<T>(to);
  parallel_rows(experts.out, experts.in, [&](int64_t begin, int64_t end) {
    WS_CHOSEN(mix_rows<T>)(from, mixture, begin, end, experts.in, data);
  });
  return to;
}

Tensor forward(const Tensor& x, const Tensor& weights, const MaybeTensor& bias, const Tensor& mix,
               const MaybeTensor& rows, const MaybeTensor& cols) {
  const Experts experts(weights, mix, rows, cols);
  const int64_t n = experts.out, k = experts.in, m = k == 0 ? 0 : x.numel() / k;
  return dispatch(x.scalar_type(), [&](auto zero) -> Tensor {
    using T = decltype(zero);
    if (k == 0 || experts.use_library(m, kForwardRows / mix.size(0))) {
      return library_linear(x, mixed<T>(experts), bias);
    }
    Tensor y = with_last(x, n);
    if (y.numel() == 0) return y;
    const Tensor flat = rows_of(x);
    const MaybeTensor shift = bias ? MaybeTensor(torch::stable::contiguous(*bias)) : bias;
    Product<T> p{m, n, k, matrix<T>(flat), false, experts.first<T>(), false};
    p.b_mixture = experts.mixture<T>();
    p.result.out = {mutable_pointer<T>(y), n, 1};
    p.result.bias = shift ? pointer<T>(*shift) : nullptr;
    run(p);
    return y;
  });
}

Tensor grad_x(const Tensor& grad, const Tensor& weights, const Tensor& mix, const MaybeTensor& rows,
              const MaybeTensor& cols) {
  const Experts experts(weights, mix, rows, cols);
  const int64_t k = experts.out, n = experts.in, m = k == 0 ? 0 : grad.numel() / k;
  return dispatch(grad.scalar_type(), [&](auto zero) -> Tensor {
    using T = decltype(zero);
    if (k == 0 || experts.use_library(m, kGradXRows / mix.size(0))) {
      return library_matmul(grad, mixed<T>(experts));
    }
    Tensor dx = with_last(grad, n);
    if (dx.numel() == 0) return dx;
    const Tensor flat = rows_of(grad);
    Product<T> p{m, n, k, matrix<T>(flat), false, experts.first<T>(), true};
    p.b_mixture = experts.mixture<T>();
    p.result.out = {mutable_pointer<T>(dx), n, 1};
    run(p);
    return dx;
  });
}

// Zeroes what the slice of every expert does not cover; all of it where a table scatters.
void zero_outside(const Tensor& buffer, const Experts& experts, int64_t row, int64_t col) {
  auto zero = [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
    if (r0 == r1 || c0 == c1) return;
    Tensor part = buffer;
    part = torch::stable::narrow(part, 1, r0, r1 - r0);
    part = torch::stable::narrow(part, 2, c0, c1 - c0);
    torch::stable::zero_(part);
  };
  const int64_t height = buffer.size(1), width = buffer.size(2);
  if (experts.rows != nullptr || experts.cols != nullptr) return zero(0, height, 0, width);
  const int64_t below = row + experts.out, right = col + experts.in;
  zero(0, row, 0, width);
  zero(below, height, 0, width);
  zero(row, below, 0, col);
  zero(row, below, right, width);
}

template <class T, class R>
void gradient(const Tensor& buffer, const Tensor& g, const Tensor& x, const Experts& experts,
              int64_t row, int64_t col, bool accumulate, Sum<T>* sums) {
  Product<T, R> p{experts.out, experts.in, g.size(0), matrix<T>(g), true, matrix<T>(x), true};
  Result<T, R>& result = p.result;
  result.out = {mutable_pointer<R>(buffer) + row * buffer.stride(1) + col * buffer.stride(2),
                buffer.stride(1), buffer.stride(2), experts.rows, experts.cols};
  result.out_step = buffer.stride(0);
  result.accumulate = accumulate;
  result.weight = experts.first<T>();
  result.mixture = experts.mixture<T>();
  result.sums = sums;
  if (!experts.use_library(g.size(0), kWeightRows)) {
    // Every row's sum belongs to one thread: the product is cut by rows alone.
    const Cut cut = cut_for(p.m, p.n, p.k);
    run(p, Cut{cut.parts_m * cut.parts_n, 1},
        [](const Product<T, R>& whole, int64_t) { return whole; });
    return;
  }
  const Tensor whole = library_matmul(torch::stable::transpose(g, 0, 1), x);
  const T* from = pointer<T>(whole);
  parallel_rows(p.m, p.n, [&](int64_t begin, int64_t end) {
    auto finish = WS_CHOSEN(finish_mixture<T, R, T>);
    finish(result, from + begin * p.n, p.n, begin, end - begin, 0, p.n);
  });
}

Tensor grad_weight_(const Tensor& buffer, const Tensor& grad, const Tensor& x,
                    const Tensor& weights, const Tensor& mix, const MaybeTensor& rows,
                    const MaybeTensor& cols, int64_t row, int64_t col, bool accumulate) {
  const Experts experts(weights, mix, rows, cols);
  auto fits = [&](int64_t dim, const int64_t* index, int64_t start, int64_t length) {
    return start >= 0 && (index ? start == 0 && buffer.size(dim) == weights.size(dim)
                                : start + length <= buffer.size(dim));
  };
  STD_TORCH_CHECK(buffer.dim() == 3 && buffer.size(0) == weights.size(0) &&
                      fits(1, experts.rows, row, experts.out) &&
                      fits(2, experts.cols, col, experts.in),
                  "expert_mixture_linear_grad_weight_: the selection does not fit the buffer");
  const Tensor g = rows_of(grad), in = rows_of(x);
  Tensor dmix = torch::stable::new_zeros(mix, {mix.size(0), mix.size(1)});
  if (!accumulate) zero_outside(buffer, experts, row, col);
  if (experts.out == 0 || experts.in == 0) return dmix;
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Sum<T>* sums = mutable_pointer<Sum<T>>(dmix);
    if (buffer.scalar_type() == x.scalar_type()) {
      gradient<T, T>(buffer, g, in, experts, row, col, accumulate, sums);
    } else {
      STD_TORCH_CHECK(buffer.scalar_type() == ScalarType::Float && is_low_precision(x),
                      "expert_mixture_linear_grad_weight_: buffer must have x's dtype, or float32");
      gradient<T, float>(buffer, g, in, experts, row, col, accumulate, sums);
    }
  });
  return dmix;
}

}  // namespace
}  // namespace weightshare

STABLE_TORCH_LIBRARY_IMPL(weightshare, CPU, m) {
  m.impl("expert_mixture_linear", TORCH_BOX(&weightshare::forward));
  m.impl("expert_mixture_linear_grad_x", TORCH_BOX(&weightshare::grad_x));
  m.impl("expert_mixture_linear_grad_weight_", TORCH_BOX(&weightshare::grad_weight_));
}
