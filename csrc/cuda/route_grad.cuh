// Gradient of the logits from that of the gates: a warp per token.
#pragma once

#include "cuda/route_token.cuh"

namespace weightshare::cuda {

constexpr int kRouteGradThreads = 256;

template <typename S>
struct RouteGrads {
  const S* grad;        // [rows, k], of the gates
  const void* logits;   // [rows, experts], of the shape's type
  const bool* padding;  // [rows] or null
  const int64_t* ids;   // [rows, k]
  void* to;             // [rows, experts], of the same type
};

// With s the chosen scores and t their sum: d s_j = (d_j - sum_i d_i s_i / t) / t.
template <typename S>
__device__ __forceinline__ void route_token_grad(const RouteShape& shape,
                                                 const RouteGrads<S>& grads, int64_t token) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = token * shape.experts, first = token * shape.k;
  const bool padded = grads.padding != nullptr && grads.padding[token];
  if (padded) {
    for (int e = lane; e < shape.experts; e += kWarp)
      route_store(grads.to, shape.type, row + e, S(0));
    return;
  }
  const RouteScorer<S> score(shape, grads.logits, token);
  const auto expert = [&](int j) -> int64_t {  // in range, whatever the ids hold
    const int64_t id = grads.ids[first + j];
    return static_cast<uint64_t>(id) < static_cast<uint64_t>(shape.experts) ? id : 0;
  };
  S total = 1, along = 0, product = 0;
  if (shape.normalize || shape.score == kSoftmax) {
    S sum = 0, weighted = 0;
    for (int j = lane; j < shape.k; j += kWarp) {
      const S s = score(expert(j));
      sum += s;
      weighted += grads.grad[first + j] * S(shape.scale) * s;
    }
    sum = warp_sum(sum);
    weighted = warp_sum(weighted);
    if (shape.normalize) {
      total = sum + S(1e-20);
      along = weighted / total;
    }
    product = (weighted - along * sum) / total;  // of d s with s, which a softmax subtracts
  }
  const bool softmax = shape.score == kSoftmax;
  for (int e = lane; e < shape.experts; e += kWarp)
    route_store(grads.to, shape.type, row + e, softmax ? score(e) * -product : S(0));
  __syncwarp();  // the chosen are written again
  for (int j = lane; j < shape.k; j += kWarp) {
    const int64_t id = expert(j);
    const S x = score.logit(id), s = score.of(x);
    const S d = (grads.grad[first + j] * S(shape.scale) - along) / total;
    S result;
    if (softmax)
      result = s * (d - product);
    else if (shape.score == kSigmoid)
      result = d * s * (S(1) - s);
    else  // where sqrt(softplus) vanishes, so does its slope
      result = d * (s > S(0) ? route_sigmoid(x) / (S(2) * s) : s);
    route_store(grads.to, shape.type, row + id, result);
  }
}

template <typename S>
__global__ void __launch_bounds__(kRouteGradThreads)
    route_grad_kernel(RouteShape shape, RouteGrads<S> grads) {
  const int64_t warps = int64_t(gridDim.x) * (kRouteGradThreads / kWarp);
  int64_t token = int64_t(blockIdx.x) * (kRouteGradThreads / kWarp) + threadIdx.x / kWarp;
  for (; token < shape.rows; token += warps) route_token_grad(shape, grads, token);
}

template <typename S>
cudaError_t route_grad(const RouteShape& shape, const RouteGrads<S>& grads, cudaStream_t stream) {
  if (shape.rows == 0) return cudaSuccess;
  const int64_t blocks = divide_up(shape.rows, kRouteGradThreads / kWarp);
  return launch(route_grad_kernel<S>, least(blocks, int64_t(0x7fffffff)), kRouteGradThreads, 0,
                stream, shape, grads);
}

}  // namespace weightshare::cuda
