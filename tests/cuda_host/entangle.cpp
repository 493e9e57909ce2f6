// The CUDA kernels of entangle, compiled for the host.
#include "cuda/entangle.cuh"

#include "host.h"

namespace {

using namespace weightshare::cuda;

struct Arguments {
  const int64_t (*size)[3], (*blocks)[3];
  const int32_t *rows, *cols, *inner;

  EntangleShape shape() const { return entangle_shape(*size, *blocks, rows, cols, inner); }
};

// Call body with a null pointer of the element type; the numbers are those of __init__.py.
template <typename Body>
cudaError_t dispatch(int dtype, Body body) {
  switch (dtype) {
    case 0:
      return body(static_cast<double*>(nullptr));
    case 1:
      return body(static_cast<float*>(nullptr));
    case 2:
      return body(static_cast<__nv_bfloat16*>(nullptr));
    default:
      return body(static_cast<__half*>(nullptr));
  }
}

}  // namespace

extern "C" const char* entangle(int dtype, const void* weight, const void* grid, void* out,
                                Arguments a) {
  return guarded([&] {
    return dispatch(dtype, [&]<typename T>(T*) {
      return entangle_forward(static_cast<const T*>(weight), static_cast<const Sum<T>*>(grid),
                              static_cast<T*>(out), a.shape(), nullptr);
    });
  });
}

extern "C" const char* entangle_backward(int dtype, const void* grad, const void* weight,
                                         const void* grid, void* dweight, void* dgrid, Arguments a,
                                         int processors) {
  return guarded([&] {
    return dispatch(dtype, [&]<typename T>(T*) {
      const EntangleShape shape = a.shape();
      const auto plan =
          entangle_backward_plan<T>(shape, aligned_to_vectors(grad, weight, dweight), processors);
      std::vector<Sum<T>> parts(plan.blocks * plan.cells, std::numeric_limits<Sum<T>>::quiet_NaN());
      return weightshare::cuda::entangle_backward(
          static_cast<const T*>(grad), static_cast<const T*>(weight),
          static_cast<const Sum<T>*>(grid), static_cast<T*>(dweight), static_cast<Sum<T>*>(dgrid),
          parts.data(), shape, plan, nullptr);
    });
  });
}

// Where the last warp of a forward pass on float32 ends: the end of its last vector, and the row
// of that vector's first element. Runs no kernel: the weight may be larger than memory.
extern "C" void entangle_last(Arguments a, int64_t* end, int64_t* row) {
  const EntangleShape shape = a.shape();
  const EntanglePlan plan = entangle_plan(shape, 4, 8192, 16);
  const Quotient place = plan.tiles(plan.items - 1);
  *end = *row = -1;
  for (unsigned lane_id = 0; lane_id < kWarp; ++lane_id) {
    EntangleLane<float, 4> lane;
    lane.place(shape, plan, place.quotient * plan.chunk, place.remainder * kWarp + lane_id);
    for (; lane.present(plan, 0); lane.advance(plan, 1))
      if (lane.start + 4 > *end) *end = lane.start + 4, *row = lane.row;
  }
}
