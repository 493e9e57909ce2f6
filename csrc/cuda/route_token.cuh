// What one warp does with one token: scores, the choice of experts, gates, and their gradient.
#pragma once

#include <math.h>
#include <string.h>

#include "cuda/launch.cuh"

namespace weightshare::cuda {

enum RouteScore : int { kSigmoid, kSoftmax, kSqrtSoftplus };
enum RouteType : int { kRouteDouble, kRouteFloat, kRouteBfloat16, kRouteHalf };

struct RouteShape {
  int64_t rows;
  Divisor k_of_pair;  // by k
  int experts, k;
  int groups, topk_groups, group_top;  // groups, those a token may use, experts in their score
  RouteScore score;
  RouteType type;  // of the logits
  bool normalize;
  double scale;

  __host__ __device__ int limited_groups() const { return topk_groups < groups ? groups : 0; }
};

template <typename S>
struct RouteTokens {
  const void* logits;   // [rows, experts], of the shape's type; null: ids are given
  const S* bias;        // [experts] or null
  const bool* padding;  // [rows] or null
  int64_t* ids;         // [rows, k]
  S* gates;             // [rows, k]
};

// The type of the logits is looked up at each load, uniformly: one kernel serves three types.
template <typename S>
__device__ __forceinline__ S route_load(const void* from, RouteType type, int64_t i) {
  if constexpr (std::is_same_v<S, double>) {
    return static_cast<const double*>(from)[i];
  } else {
    if (type == kRouteFloat) return static_cast<const float*>(from)[i];
    if (type == kRouteHalf) return widen(static_cast<const __half*>(from)[i]);
    return widen(static_cast<const __nv_bfloat16*>(from)[i]);
  }
}

template <typename S>
__device__ __forceinline__ void route_store(void* to, RouteType type, int64_t i, S v) {
  if constexpr (std::is_same_v<S, double>) {
    static_cast<double*>(to)[i] = v;
  } else {
    if (type == kRouteFloat)
      static_cast<float*>(to)[i] = v;
    else if (type == kRouteHalf)
      static_cast<__half*>(to)[i] = narrow<__half>(v);
    else
      static_cast<__nv_bfloat16*>(to)[i] = narrow<__nv_bfloat16>(v);
  }
}

// ---- scores as ordered integers -----------------------------------------------------------------

// Order of keys is order of values; NaN is as minus infinity; zero is below every value.
template <typename S>
using RouteKey = std::conditional_t<std::is_same_v<S, double>, uint64_t, uint32_t>;

template <typename S>
__device__ __forceinline__ RouteKey<S> route_key(S v) {
  using K = RouteKey<S>;
  constexpr K kSign = K(1) << (8 * sizeof(K) - 1);
  v = v == v ? v + S(0) : S(-INFINITY);  // the sum makes one zero of two
  K bits;
  memcpy(&bits, &v, sizeof bits);
  return bits & kSign ? ~bits : bits | kSign;
}

template <typename S>
__device__ __forceinline__ S route_value(RouteKey<S> key) {
  using K = RouteKey<S>;
  constexpr K kSign = K(1) << (8 * sizeof(K) - 1);
  key = key & kSign ? key ^ kSign : ~key;
  S v;
  memcpy(&v, &key, sizeof v);
  return v;
}

__device__ __forceinline__ uint32_t warp_largest(uint32_t v) {
  return __reduce_max_sync(kAllLanes, v);
}
__device__ __forceinline__ uint64_t warp_largest(uint64_t v) {
  const uint32_t high = warp_largest(static_cast<uint32_t>(v >> 32));
  const uint32_t low = static_cast<uint32_t>(v);
  return uint64_t(high) << 32 | warp_largest(v >> 32 == high ? low : 0u);
}

// The best of what a lane has seen: the largest key, of equals the lowest id.
template <typename K>
struct RouteBest {
  K key = 0;
  uint32_t id = 0xffffffffu;

  __device__ __forceinline__ void see(K other, uint32_t at) {
    if (other > key || (other == key && at < id)) {
      key = other;
      id = at;
    }
  }
  // Over a lane's share of keys[0..n): every 32nd.
  __device__ __forceinline__ void look(const K* keys, int n) {
    *this = {};
    for (uint32_t e = threadIdx.x % kWarp; e < static_cast<uint32_t>(n); e += kWarp)
      if (keys[e] > key) {
        key = keys[e];
        id = e;
      }
  }
  // Id of the warp's best, the same in every lane; takes it out.
  __device__ __forceinline__ uint32_t take(K* keys, int n) {
    const K top = warp_largest(key);
    const uint32_t winner = __reduce_min_sync(kAllLanes, key == top ? id : 0xffffffffu);
    if (winner == id) {
      keys[winner] = 0;
      look(keys, n);
    }
    return winner;
  }
};

// ---- scores -------------------------------------------------------------------------------------

template <typename S>
__device__ __forceinline__ S route_sigmoid(S x) {
  return S(1) / (S(1) + exp(-x));
}

// Scores of a token's logits; a softmax needs two passes over them first.
template <typename S>
struct RouteScorer {
  const void* logits;
  RouteType type;
  RouteScore score;
  int64_t row;  // first element of the token
  S top = 0, total = 1;

  __device__ __forceinline__ RouteScorer(const RouteShape& shape, const void* from, int64_t token)
      : logits(from), type(shape.type), score(shape.score), row(token * shape.experts) {
    if (score != kSoftmax) return;
    const int lane = threadIdx.x % kWarp;
    top = S(-INFINITY);
    for (int e = lane; e < shape.experts; e += kWarp) {
      const S x = logit(e);
      top = x > top ? x : top;
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const S other = __shfl_xor_sync(kAllLanes, top, step);
      top = other > top ? other : top;
    }
    S sum = 0;
    for (int e = lane; e < shape.experts; e += kWarp) sum += exp(logit(e) - top);
    total = warp_sum(sum);
  }

  __device__ __forceinline__ S logit(int64_t e) const {
    return route_load<S>(logits, type, row + e);
  }
  __device__ __forceinline__ S of(S x) const {
    if (score == kSoftmax) return exp(x - top) / total;
    if (score == kSigmoid) return route_sigmoid(x);
    return sqrt((x > S(0) ? x : S(0)) + log1p(exp(x < S(0) ? x : -x)));
  }
  __device__ __forceinline__ S operator()(int64_t e) const { return of(logit(e)); }
};

// ---- the choice ---------------------------------------------------------------------------------

// Sum of a group's best: each pass finds the one that follows the last in order. Lanes look at
// different groups, each from another place on, so that they meet in few banks.
template <typename S>
__device__ __forceinline__ RouteKey<S> route_group(const RouteShape& shape, const RouteKey<S>* keys,
                                                   int group) {
  using K = RouteKey<S>;
  const int size = shape.experts / shape.groups;
  const K* from = keys + group * size;
  RouteBest<K> last;
  S total = 0;
  for (int pass = 0; pass < shape.group_top; ++pass) {
    RouteBest<K> next;
    int i = group % size;
    for (int step = 0; step < size; ++step) {
      const K key = from[i];
      const bool follows = key < last.key || (key == last.key && uint32_t(i) > last.id);
      if (pass == 0 || follows) next.see(key, i);
      i = i + 1 == size ? 0 : i + 1;
    }
    last = next;
    total += route_value<S>(next.key);
  }
  return route_key(total);
}

// Zeroes the keys of all experts but those of the best groups.
template <typename S>
__device__ __forceinline__ void route_limit(const RouteShape& shape, RouteKey<S>* keys) {
  const int lane = threadIdx.x % kWarp, size = shape.experts / shape.groups;
  RouteKey<S>* groups = keys + shape.experts;
  for (int g = lane; g < shape.groups; g += kWarp) groups[g] = route_group<S>(shape, keys, g);
  __syncwarp();
  RouteBest<RouteKey<S>> best;
  best.look(groups, shape.groups);
  for (int i = 0; i < shape.topk_groups; ++i) best.take(groups, shape.groups);
  __syncwarp();
  for (int e = lane; e < shape.experts; e += kWarp)
    if (groups[e / size] != 0) keys[e] = 0;  // a group that was not taken
}

// Experts and gates of a token, and its pairs counted in the block's bins.
template <typename S>
__device__ void route_token(const RouteShape& shape, const RouteTokens<S>& tokens, int64_t token,
                            RouteKey<S>* keys, int32_t* bins) {
  const int lane = threadIdx.x % kWarp;
  int64_t* ids = tokens.ids + token * shape.k;
  S* gates = tokens.gates + token * shape.k;
  if (tokens.padding != nullptr && tokens.padding[token]) {
    for (int j = lane; j < shape.k; j += kWarp) {
      ids[j] = j;
      gates[j] = 0;
    }
    if (lane == 0) atomicAdd(bins + shape.experts, shape.k);
    return;
  }
  const RouteScorer<S> score(shape, tokens.logits, token);
  __syncwarp();  // the last token's keys have been read
  for (int e = lane; e < shape.experts; e += kWarp) {
    const S s = score(e);
    keys[e] = route_key(tokens.bias == nullptr ? s : s + tokens.bias[e]);
  }
  __syncwarp();
  if (shape.limited_groups()) route_limit<S>(shape, keys);
  RouteBest<RouteKey<S>> best;
  best.look(keys, shape.experts);
  S total = 0;
  for (int first = 0; first < shape.k; first += kWarp) {
    const int count = least(shape.k - first, int(kWarp));
    uint32_t mine = 0;
    for (int j = 0; j < count; ++j) {
      const uint32_t id = best.take(keys, shape.experts);
      if (j == lane) mine = id;
    }
    if (lane < count) {
      const S s = score(mine);
      total += s;
      ids[first + lane] = mine;
      gates[first + lane] = s;
      atomicAdd(bins + mine, 1);
    }
  }
  const S divisor = shape.normalize ? warp_sum(total) + S(1e-20) : S(1);
  for (int j = lane; j < shape.k; j += kWarp) gates[j] = gates[j] / divisor * S(shape.scale);
}

}  // namespace weightshare::cuda
