// entangle on CUDA: stable-ABI tensors to the raw pointers of csrc/cuda, on the current stream.
#include "bindings/tensor_cuda.h"
#include "cuda/entangle.cuh"

namespace weightshare::cuda {
namespace {

// Call f with a value of the C++ type of a floating dtype.
template <class F>
void dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    case ScalarType::Half:
      return f(__half{});
    default:
      STD_TORCH_CHECK(false, "weight: expected float32, float64, bfloat16 or float16");
  }
}

const int32_t* classes(const Tensor& t, const char* name, int64_t size, const Tensor& weight) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.dim() == 1 &&
                      t.numel() == size && t.get_device_index() == weight.get_device_index(),
                  name, ": expected a contiguous int32 vector of ", size,
                  " on the device of weight");
  return pointer<int32_t>(t);
}

// All of these are contiguous; a kernel may rely on what is checked here.
EntangleShape shape_of(const Tensor& weight, const Tensor& grid, const Tensor& rows,
                       const Tensor& cols, const Tensor& inner) {
  STD_TORCH_CHECK(weight.dim() == 3 && grid.dim() == 3,
                  "weight and grid: expected 3 dimensions, got ", weight.dim(), " and ",
                  grid.dim());
  const bool wide = weight.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(grid.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  "grid: expected float32, or float64 where weight is");
  STD_TORCH_CHECK(grid.get_device_index() == weight.get_device_index(),
                  "grid: expected the device of weight");
  STD_TORCH_CHECK(grid.numel() <= 0x7fffffff, "grid: has more than 2^31 blocks");
  const int64_t size[3] = {weight.size(0), weight.size(1), weight.size(2)};
  const int64_t blocks[3] = {grid.size(0), grid.size(1), grid.size(2)};
  return entangle_shape(size, blocks, classes(rows, "rows", size[0], weight),
                        classes(cols, "cols", size[1], weight),
                        classes(inner, "inner", size[2], weight));
}

Tensor forward(const Tensor& weight, const Tensor& grid, const Tensor& rows, const Tensor& cols,
               const Tensor& inner) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const Tensor w = torch::stable::contiguous(weight), factors = torch::stable::contiguous(grid);
  const Tensor out = torch::stable::empty_like(w);
  const EntangleShape shape = shape_of(w, factors, rows, cols, inner);
  dispatch(w.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_launch("entangle", entangle_forward(pointer<T>(w), pointer<Sum<T>>(factors),
                                              mutable_pointer<T>(out), shape, current_stream(w)));
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& weight, const Tensor& grid,
                                    const Tensor& rows, const Tensor& cols, const Tensor& inner) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const Tensor g = torch::stable::contiguous(grad), w = torch::stable::contiguous(weight);
  const Tensor factors = torch::stable::contiguous(grid);
  STD_TORCH_CHECK(g.scalar_type() == w.scalar_type() && g.numel() == w.numel() &&
                      g.get_device_index() == w.get_device_index(),
                  "grad: expected the shape, dtype and device of weight");
  const Tensor dweight = torch::stable::empty_like(w), dgrid = torch::stable::empty_like(factors);
  const EntangleShape shape = shape_of(w, factors, rows, cols, inner);
  int processors = 0;
  check_launch("entangle", cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount,
                                                  weight.get_device_index()));
  dispatch(w.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *from = pointer<T>(g), *by = pointer<T>(w);
    T* to = mutable_pointer<T>(dweight);
    const auto plan =
        entangle_backward_plan<T>(shape, aligned_to_vectors(from, by, to), processors);
    const int64_t sizes[2] = {plan.blocks, plan.cells};
    const Tensor parts = torch::stable::new_empty(factors, sizes);
    check_launch(
        "entangle",
        entangle_backward(from, by, pointer<Sum<T>>(factors), to, mutable_pointer<Sum<T>>(dgrid),
                          mutable_pointer<Sum<T>>(parts), shape, plan, current_stream(w)));
  });
  return {dweight, dgrid};
}

}  // namespace
}  // namespace weightshare::cuda

STABLE_TORCH_LIBRARY_IMPL(weightshare, CUDA, m) {
  m.impl("entangle", TORCH_BOX(&weightshare::cuda::forward));
  m.impl("entangle_backward", TORCH_BOX(&weightshare::cuda::backward));
}
