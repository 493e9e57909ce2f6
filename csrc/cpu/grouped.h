// Row groups of one batch that use different prefixes of the same weight [n, k].
//
// The distinct widths cut the weight into bands of rows and, within a band, segments of columns;
// on each the rows of the batch that take part are a fixed set. Walking the bands reads or writes
// every element of the weight once, however many groups share it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/product.h"

namespace weightshare {

// The rows [start, start + size) of the batch use weight[:out, :in].
struct Group {
  int64_t start, size, out, in;
};

// Columns [k0, k1) of a band, and the rows of the batch that use them, ascending.
struct Segment {
  int64_t k0, k1;
  std::vector<int64_t> rows;
};

// Rows [n0, n1) of the weight and the rows of the batch that use any of them; those of no columns
// are in no segment. All rows of a band's segments are in the first.
struct Band {
  int64_t n0, n1;
  std::vector<int64_t> rows;
  std::vector<Segment> segments;
};

inline std::vector<int64_t> edges_of(const std::vector<Group>& groups, int64_t Group::* width) {
  std::vector<int64_t> edges;
  for (const Group& g : groups) {
    if (g.*width > 0) edges.push_back(g.*width);
  }
  std::sort(edges.begin(), edges.end());
  edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
  return edges;
}

inline std::vector<int64_t> rows_of_groups(const std::vector<Group>& groups) {
  std::vector<int64_t> rows;
  for (const Group& g : groups) {
    for (int64_t r = 0; r < g.size; ++r) rows.push_back(g.start + r);
  }
  return rows;
}

inline std::vector<Group> at_least(const std::vector<Group>& groups, int64_t Group::* width,
                                   int64_t edge) {
  std::vector<Group> wide;
  for (const Group& g : groups) {
    if (g.*width >= edge) wide.push_back(g);
  }
  return wide;
}

// The bands of all groups, which are in the order of the batch and not empty.
inline std::vector<Band> bands_of(const std::vector<Group>& groups) {
  std::vector<Band> bands;
  int64_t n0 = 0;
  for (const int64_t n1 : edges_of(groups, &Group::out)) {
    const std::vector<Group> active = at_least(groups, &Group::out, n1);
    Band band{n0, n1, rows_of_groups(active), {}};
    int64_t k0 = 0;
    for (const int64_t k1 : edges_of(active, &Group::in)) {
      band.segments.push_back({k0, k1, rows_of_groups(at_least(active, &Group::in, k1))});
      k0 = k1;
    }
    bands.push_back(std::move(band));
    n0 = n1;
  }
  return bands;
}

// out[r, n] = sum_k x[r, k] * weight[n, k] + bias[n], for few rows and a weight whose columns are
// adjacent: what it costs is reading the weight, so every row meets it as it streams past.
template <class T>
struct Dots {
  Matrix<const T> weight;
  const Sum<T>* x;  // [rows of the batch, pitch]
  int64_t pitch;
  const T* bias;  // [n] or null
  Matrix<T> out;
};

}  // namespace weightshare
