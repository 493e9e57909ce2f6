// sliced_linear on the CPU. Plain spans with many rows go to PyTorch's GEMM library by strides;
// index tables and few rows to the product that packs them in place.
#include "bindings/tensor_cpu.h"

namespace weightshare {
namespace {

using torch::stable::detail::from;

// Up to here W is read as often as its products are computed, and a product that reads it once,
// in long runs, beats the library: measured 1.2-2.1 x at 8 rows, 1.0 x at 48.
constexpr int64_t kFewRows = 48;

Tensor gather(const Tensor& weight, const MaybeTensor& rows, const MaybeTensor& cols) {
  Tensor part = weight;
  if (rows) part = call<3>("aten::index_select", "", {from(part), from(int64_t{0}), from(*rows)});
  if (cols) part = call<3>("aten::index_select", "", {from(part), from(int64_t{1}), from(*cols)});
  return part;
}

// Whether the library's product serves. Spans cost it no copy; its low-precision kernels use
// instructions that ours do not, and are worth the copy of a gathered slice; and picked columns
// touch nearly every cache line of W, so that one gather beats gathering block by block.
bool use_library(const Tensor& weight, int64_t m, const MaybeTensor& rows, const MaybeTensor& cols) {
  const bool span = !rows && !cols;
  if (cols || (span && weight.stride(1) != 1)) return true;
  return m > kFewRows && (span || is_low_precision(weight));
}

Tensor forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
               const MaybeTensor& rows, const MaybeTensor& cols) {
  const int64_t* r = table(rows, weight.size(0), "out");
  table(cols, weight.size(1), "in_");
  const int64_t n = rows ? rows->numel() : weight.size(0), k = x.size(x.dim() - 1);
  const int64_t m = k == 0 ? 0 : x.numel() / k;
  if (k == 0 || use_library(weight, m, rows, cols)) {
    return library_linear(x, gather(weight, rows, cols), bias);
  }
  Tensor y = with_last(x, n);
  if (y.numel() == 0) return y;
  const Tensor flat = rows_of(x), out = torch::stable::view(y, {m, n});
  const Tensor shift = bias && !bias->is_contiguous() ? torch::stable::contiguous(*bias)
                       : bias                         ? *bias
                                                      : Tensor();
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Product<T> p{m, n, k, matrix<T>(flat), false, matrix<T>(weight, r), false};
    p.result.out = mutable_matrix<T>(out);
    p.result.bias = bias ? pointer<T>(shift) : nullptr;
    run(p);
  });
  return y;
}

Tensor grad_x(const Tensor& grad, const Tensor& weight, const MaybeTensor& rows,
              const MaybeTensor& cols) {
  const int64_t* r = table(rows, weight.size(0), "out");
  table(cols, weight.size(1), "in_");
  const int64_t n = cols ? cols->numel() : weight.size(1), k = grad.size(grad.dim() - 1);
  const int64_t m = k == 0 ? 0 : grad.numel() / k;
  if (k == 0 || use_library(weight, m, rows, cols)) {
    return library_matmul(grad, gather(weight, rows, cols));
  }
  Tensor dx = with_last(grad, n);
  if (dx.numel() == 0) return dx;
  const Tensor flat = rows_of(grad), out = torch::stable::view(dx, {m, n});
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Product<T> p{m, n, k, matrix<T>(flat), false, matrix<T>(weight, r), true};
    p.result.out = mutable_matrix<T>(out);
    run(p);
  });
  return dx;
}

void grad_weight_(const Tensor& target, const Tensor& grad, const Tensor& x,
                  const MaybeTensor& rows, const MaybeTensor& cols, bool accumulate) {
  const int64_t* r = table(rows, target.size(0), "out");
  const int64_t* c = table(cols, target.size(1), "in_");
  const Tensor g = rows_of(grad), in = rows_of(x);
  const int64_t m = g.size(1), n = in.size(1), k = g.size(0);
  if (m == 0 || n == 0) return;
  const bool span = !rows && !cols, same = target.scalar_type() == x.scalar_type();
  if (span && same && k > kFewRows) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(
        target.get(), target.get(), torch::stable::transpose(g, 0, 1).get(), in.get(),
        accumulate ? 1.0 : 0.0, 1.0));
    return;
  }
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto store = [&](auto kind) {
      using R = decltype(kind);
      Product<T, R> p{m, n, k, matrix<T>(g), true, matrix<T>(in), true};
      p.result.out = mutable_matrix<R>(target, r, c);
      p.result.accumulate = accumulate;
      run(p);
    };
    if (same) {
      store(T{});
    } else {
      STD_TORCH_CHECK(target.scalar_type() == ScalarType::Float && is_low_precision(x),
                      "sliced_linear_grad_weight_: target must have x's dtype, or float32");
      store(float{});
    }
  });
}

}  // namespace
}  // namespace weightshare

STABLE_TORCH_LIBRARY_IMPL(weightshare, CPU, m) {
  m.impl("sliced_linear", TORCH_BOX(&weightshare::forward));
  m.impl("sliced_linear_grad_x", TORCH_BOX(&weightshare::grad_x));
  m.impl("sliced_linear_grad_weight_", TORCH_BOX(&weightshare::grad_weight_));
}
