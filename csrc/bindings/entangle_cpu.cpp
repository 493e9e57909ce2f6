// entangle on the CPU: one pass forward, one pass for dW and every block's sum.
#include "bindings/grid_cpu.h"

namespace weightshare {
namespace {

// A contiguous weight [rows, 1, 1] is one line just as well, and passes run along lines.
template <class S>
Blocks<S> laid_down(Blocks<S> b) {
  if (b.width() == 1 && b.cells() == 1 && b.cells_of_line()[0] == 0) {
    static const int32_t kFirst = 0;
    b.cols = std::exchange(b.rows, 1);
    b.col_blocks = std::exchange(b.row_blocks, 1);
    b.col_class = std::exchange(b.row_class, &kFirst);
  }
  return b;
}

Tensor forward(const Tensor& weight, const Tensor& grid, const Tensor& rows, const Tensor& cols,
               const Tensor& inner) {
  const Tensor from = torch::stable::contiguous(weight);
  Tensor to = torch::stable::empty_like(from);
  dispatch(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto b = laid_down(blocks_of<T>(from, grid, rows, cols, inner));
    scale<T>(b, Lines(b), pointer<T>(from), mutable_pointer<T>(to));
  });
  return to;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& weight, const Tensor& grid,
                                    const Tensor& rows, const Tensor& cols, const Tensor& inner) {
  const Tensor g = torch::stable::contiguous(grad), w = torch::stable::contiguous(weight);
  Tensor dw = torch::stable::empty_like(w), dgrid = torch::stable::empty_like(grid);
  dispatch(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto b = laid_down(blocks_of<T>(w, grid, rows, cols, inner));
    scale_backward<T, T>(b, Lines(b), pointer<T>(g), pointer<T>(w), false, mutable_pointer<T>(dw),
                         b.width(), mutable_pointer<Sum<T>>(dgrid));
  });
  return {dw, dgrid};
}

}  // namespace
}  // namespace weightshare

STABLE_TORCH_LIBRARY_IMPL(weightshare, CPU, m) {
  m.impl("entangle", TORCH_BOX(&weightshare::forward));
  m.impl("entangle_backward", TORCH_BOX(&weightshare::backward));
}
