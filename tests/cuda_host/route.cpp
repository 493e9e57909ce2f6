// The CUDA kernels of routing, compiled for the host.
#include "cuda/route.cuh"
#include "cuda/route_grad.cuh"

#include "host.h"

namespace {

using namespace weightshare::cuda;

// As __init__.py lays it out.
struct Options {
  int64_t rows, experts, k, groups, topk_groups, group_top, score, type, normalize;
  double scale;

  RouteShape shape() const {
    return {rows,
            Divisor(k),
            int(experts),
            int(k),
            int(groups),
            int(topk_groups),
            int(group_top),
            RouteScore(score),
            RouteType(type),
            normalize != 0,
            scale};
  }
};

template <typename S>
cudaError_t run(const Options& o, const void* logits, const void* bias, const bool* padding,
                int64_t* ids, void* gates, int64_t* counts, int64_t* offsets, int64_t* permutation,
                int64_t* inverse, int processors) {
  const RouteShape shape = o.shape();
  const RoutePlan plan = route_plan<S>(shape, processors);
  std::vector<int32_t> bins(plan.blocks * (o.experts + 1), -1);
  return route<S>(shape,
                  {logits, static_cast<const S*>(bias), padding, ids, static_cast<S*>(gates)},
                  {counts, offsets, permutation, inverse, bins.data()}, plan, nullptr);
}

}  // namespace

// With logits, chooses; without, sorts the given ids.
extern "C" const char* route_forward(const Options* o, const void* logits, const void* bias,
                                     const bool* padding, int64_t* ids, void* gates,
                                     int64_t* counts, int64_t* offsets, int64_t* permutation,
                                     int64_t* inverse, int processors) {
  return guarded([&] {
    const auto function = o->type == kRouteDouble ? run<double> : run<float>;
    return function(*o, logits, bias, padding, ids, gates, counts, offsets, permutation, inverse,
                    processors);
  });
}

extern "C" const char* route_backward(const Options* o, const void* grad, const void* logits,
                                      const bool* padding, const int64_t* ids, void* to) {
  return guarded([&] {
    if (o->type == kRouteDouble)
      return route_grad<double>(
          o->shape(), {static_cast<const double*>(grad), logits, padding, ids, to}, nullptr);
    return route_grad<float>(o->shape(),
                             {static_cast<const float*>(grad), logits, padding, ids, to}, nullptr);
  });
}

// ---- what routing added to the shim -------------------------------------------------------------

namespace {

__global__ void warp_integers(int* out) {
  const int lane = threadIdx.x % 32;
  int* mine = out + 3 * threadIdx.x;
  mine[0] = static_cast<int>(__match_any_sync(kAllLanes, lane % 5 - 2));
  mine[1] = static_cast<int>(__reduce_max_sync(kAllLanes, threadIdx.x * 0x01000000u));
  mine[2] = static_cast<int>(__reduce_min_sync(kAllLanes, threadIdx.x + 7));
}

}  // namespace

extern "C" const char* run_warp_integers(int* out) {
  return guarded([&] { return launch(warp_integers, 1, 64, 0, nullptr, out); });
}
