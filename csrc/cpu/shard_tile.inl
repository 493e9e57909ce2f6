// The register tiles that sum lines times numbers: shard.h, one instruction set.

struct ShardTile {
  static constexpr int kRows = 6;  // with kVectors of sums each: 24 of AVX-512's 32 registers
  static constexpr int kVectors = WS_BYTES == 64 ? 4 : 2;
};

// Where the rows of a tile come from (null: zero) and go to.
template <class R>
struct ShardEnds {
  const R* from[ShardTile::kRows];
  R* to[ShardTile::kRows];
};

// to[m] = from[m] + sum over k of coef[k * M + m] * line[k], V vectors of columns or, where `some`
// is not 0, as many columns of one.
template <class S, class R, int M, int V>
void shard_tile(const S* coef, const S* panel, int64_t count, const ShardEnds<R>& ends,
                int64_t shift, int64_t some = 0) {
  constexpr int L = MoeShape<S>::kLanes;
  Vector<S> acc[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[m][v] = Vector<S>{};
  }
  for (int64_t k = 0; k < count; ++k, panel += ShardTile::kVectors * L) {
    Vector<S> b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load_lanes<S>(panel + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const S c = coef[k * M + m];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] += c * b[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {  // row after row: two may be the same
    const R* from = ends.from[m];
    R* to = ends.to[m] + shift;
    if (V == 1 && some != 0) {
      if (from != nullptr) acc[m][0] += load_some<S>(from + shift, some);
      store_some<R, S>(acc[m][0], some, to);
      continue;
    }
    if (from != nullptr) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] += load_lanes<S>(from + shift + v * L);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_lanes<R, S>(acc[m][v], to + v * L);
  }
}

template <class S, class R, int M = ShardTile::kRows>
void any_shard_tile(int64_t rows, const S* coef, const S* panel, int64_t count,
                    const ShardEnds<R>& ends, int64_t shift, int64_t columns) {
  if constexpr (M > 1) {
    if (rows < M)
      return any_shard_tile<S, R, M - 1>(rows, coef, panel, count, ends, shift, columns);
  }
  constexpr int64_t L = MoeShape<S>::kLanes, V = ShardTile::kVectors;
  if (columns == V * L) return shard_tile<S, R, M, V>(coef, panel, count, ends, shift);
  int64_t c = 0;
  for (; c + L <= columns; c += L) shard_tile<S, R, M, 1>(coef, panel + c, count, ends, shift + c);
  if (c < columns) shard_tile<S, R, M, 1>(coef, panel + c, count, ends, shift + c, columns - c);
}

// sums[m * pitch + c] += sum over J lines of coef[j * M + m] * line[j][c], in the order of a tile;
// meanwhile those of `next` are fetched.
template <class S, class P, int M, int J>
void shard_stream(const S* coef, const P* const* line, const P* const* next, int64_t n, S* sums,
                  int64_t pitch) {
  constexpr int L = MoeShape<S>::kLanes;
  auto step = [&](int64_t c, int64_t some) WS_INLINE {
    Vector<S> b[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j)
      b[j] = some == 0 ? load_lanes<S>(line[j] + c) : load_some<S>(line[j] + c, some);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Vector<S>& sum = *reinterpret_cast<Vector<S>*>(sums + m * pitch + c);
      Vector<S> acc = sum;
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) acc += coef[j * M + m] * b[j];
      sum = acc;
    }
  };
  int64_t c = 0;
  for (; c + L <= n; c += L) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) __builtin_prefetch(next[j] + c);
    step(c, 0);
  }
  if (c < n) step(c, n - c);
}

template <class S, class P, int M = ShardTile::kRows>
void any_shard_stream(int64_t rows, int64_t lines, const S* coef, const P* const* line,
                      const P* const* next, int64_t n, S* sums, int64_t pitch) {
  if constexpr (M > 1) {
    if (rows < M)
      return any_shard_stream<S, P, M - 1>(rows, lines, coef, line, next, n, sums, pitch);
  }
  constexpr int64_t J = kShardRanks;
  const int64_t bytes = std::max<int64_t>(1, J * n * sizeof(P));
  const int64_t distance = std::max<int64_t>(1, kShardAhead / bytes) * J;
  int64_t k = 0;
  for (; k + J <= lines; k += J) {
    const int64_t then = k + distance, over = std::clamp<int64_t>(then - lines, 0, lines - J);
    shard_stream<S, P, M, J>(coef + k * M, line + k, then + J <= lines ? line + then : next + over,
                             n, sums, pitch);
  }
  for (; k < lines; ++k) shard_stream<S, P, M, 1>(coef + k * M, line + k, line + k, n, sums, pitch);
}

// to[k * rows + i] = factor * number(i, k): the numbers of a tile, one after another.
template <class S, class F>
void pack_numbers(int64_t rows, int64_t count, S factor, S* to, const F& number) {
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t i = 0; i < rows; ++i) *to++ = factor * number(i, k);
  }
}

// Tiles of equal height, give or take one: rows [first, first + rows) of `count`.
struct ShardHeights {
  int64_t count, tiles = (count + ShardTile::kRows - 1) / ShardTile::kRows;

  int64_t first(int64_t t) const { return count * t / tiles; }
};
