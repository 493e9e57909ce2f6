// Routing of tokens to experts: what is asked for, and the tables made from the choice. The choice
// itself, which is arithmetic on vectors, is in route.inl.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

namespace weightshare {

enum class ScoreFn { sigmoid, softmax, sqrt_softplus };

constexpr double kRouteEpsilon = 1e-20;  // added to the sum of a token's gates

struct RouteOptions {
  int64_t rows, experts, k;
  ScoreFn fn;
  int64_t groups, topk_groups, group_top;  // groups, those a token may use, experts in their score
  bool normalize;
  double scale;
};

// Rows of the choice: T is the type of the logits.
template <class T>
struct RouteRows {
  RouteOptions o;
  const T* logits;      // [rows, experts]
  const Sum<T>* bias;   // [experts] or null
  const bool* padding;  // [rows] or null
  int64_t* ids;         // [rows, k]
  Sum<T>* gates;        // [rows, k]
};

template <class T>
struct RouteGradRows {
  RouteOptions o;
  const Sum<T>* grad;   // [rows, k], of the gates
  const T* logits;      // [rows, experts]
  const bool* padding;  // [rows] or null
  const int64_t* ids;   // [rows, k]
  T* to;                // [rows, experts]
};

// ---- tables: a stable counting sort of the pairs by expert --------------------------------------

struct RouteTables {
  int64_t rows, experts, k;
  const int64_t* ids;
  const bool* padding;
  int64_t *counts, *offsets, *permutation, *inverse;

  // Bin of a pair: its expert, or the one behind all experts.
  int64_t bin(bool padded, int64_t id) const {
    return padded || static_cast<uint64_t>(id) >= static_cast<uint64_t>(experts) ? experts : id;
  }
  bool padded(int64_t row) const { return padding != nullptr && padding[row]; }

  void count(int64_t r0, int64_t r1, int64_t* bins) const {
    for (int64_t r = r0; r < r1; ++r) {
      const bool out = padded(r);
      for (int64_t j = 0; j < k; ++j) ++bins[bin(out, ids[r * k + j])];
    }
  }

  // From the bins of each part, which follow one another in order of their rows, to the place of
  // the first pair of each bin of each part.
  void prefix(int64_t* bins, int64_t parts) const {
    int64_t place = 0;
    for (int64_t e = 0; e <= experts; ++e) {
      offsets[e] = place;
      for (int64_t p = 0; p < parts; ++p) {
        int64_t& bin = bins[p * (experts + 1) + e];
        place += std::exchange(bin, place);
      }
      if (e < experts) counts[e] = place - offsets[e];
    }
  }

  void place(int64_t r0, int64_t r1, int64_t* next) const {
    for (int64_t r = r0; r < r1; ++r) {
      const bool out = padded(r);
      for (int64_t p = r * k; p < (r + 1) * k; ++p) {
        const int64_t at = next[bin(out, ids[p])]++;
        permutation[at] = p;
        inverse[p] = at;
      }
    }
  }
};

}  // namespace weightshare
