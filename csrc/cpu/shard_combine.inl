// Sums of lines times numbers: y, dx and the gradients of pools. shard.h, one instruction set.

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

// Lines of P, at a common offset, and those to fetch meanwhile.
template <class P>
struct ShardLines {
  const P* const* line;
  int64_t at;
  const P* const* next = nullptr;
  int64_t next_at = 0;
};

// to[m] = from[m] + sum over k of coef[k * M + m] * line[k], V vectors of columns or, where `some`
// is not 0, as many columns of one.
template <class S, class P, class R, int M, int V>
void shard_tile(const S* coef, const ShardLines<P>& lines, int64_t count, const ShardEnds<R>& ends,
                int64_t shift, int64_t some = 0) {
  constexpr int L = MoeShape<S>::kLanes;
  Vector<S> acc[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[m][v] = Vector<S>{};
  }
  auto step = [&](int64_t k, bool whole) WS_INLINE {
    const P* line = lines.line[k] + lines.at;
    Vector<S> b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      b[v] = whole ? load_lanes<S>(line + v * L) : load_some<S>(line, some);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const S c = coef[k * M + m];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] += c * b[v];
    }
  };
  if (V == 1 && some != 0) {
    for (int64_t k = 0; k < count; ++k) step(k, false);
  } else if (lines.next != nullptr) {
    constexpr int kLines = (V * L * sizeof(P) + 63) / 64;
    for (int64_t k = 0; k < count; ++k) {
      const char* ahead = reinterpret_cast<const char*>(lines.next[k] + lines.next_at);
#pragma GCC unroll 4
      for (int i = 0; i < kLines; ++i) __builtin_prefetch(ahead + 64 * i);
      step(k, true);
    }
  } else {
    for (int64_t k = 0; k < count; ++k) step(k, true);
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

template <class S, class P, class R, int M = ShardTile::kRows>
void any_shard_tile(int64_t rows, const S* coef, ShardLines<P> lines, int64_t count,
                    const ShardEnds<R>& ends, int64_t shift, int64_t columns) {
  if constexpr (M > 1) {
    if (rows < M)
      return any_shard_tile<S, P, R, M - 1>(rows, coef, lines, count, ends, shift, columns);
  }
  constexpr int64_t L = MoeShape<S>::kLanes, V = ShardTile::kVectors;
  if (columns == V * L) return shard_tile<S, P, R, M, V>(coef, lines, count, ends, shift);
  int64_t c = 0;
  for (; c + L <= columns; c += L, lines.at += L, lines.next_at += L)
    shard_tile<S, P, R, M, 1>(coef, lines, count, ends, shift + c);
  if (c < columns) shard_tile<S, P, R, M, 1>(coef, lines, count, ends, shift + c, columns - c);
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

// The shards that columns from n on lie in, of all sides, and how far they reach.
struct ShardRun {
  int64_t n, columns;
  const void** line;
};

template <class T>
void find_run(const ShardExpand<T>& e, int64_t adapter, const int64_t* used, int64_t n, int64_t n1,
              ShardRun& run) {
  run.n = n, run.columns = n1 - n;
  const void** line = run.line;
  for (size_t i = 0; i < e.sides.size(); ++i) {
    const ShardSide& side = e.sides[i];
    const int64_t piece = n / side.width, at = n % side.width;
    run.columns = std::min(run.columns, side.width - at);
    for (int64_t rank = 0; rank < used[i]; ++rank) {
      if (side.wide) {
        *line++ = side.line<Sum<T>>(adapter, rank, piece) + at;
      } else {
        *line++ = side.line<T>(adapter, rank, piece) + at;
      }
    }
  }
}

// Columns [n0, n1) of the rows of a segment.
template <class T>
void expand_segment(const ShardExpand<T>& e, const ShardRows<Sum<T>>& rows,
                    const ShardSegment& segment, int64_t n0, int64_t n1) {
  using S = Sum<T>;
  constexpr int64_t kMost = 40 * ShardTile::kRows;  // rows at a time, whose numbers stay in a cache
  constexpr int64_t kColumns = ShardTile::kVectors * MoeShape<S>::kLanes;
  int64_t total = 0;
  const int64_t sides = e.sides.size();
  for (const ShardSide& side : e.sides) total += side.ranks;
  int64_t* live;
  ShardEnds<T>* ends;
  S *numbers, *panel;
  const void **here, **there;
  const S** panel_lines;
  MoeScratch scratch(room(numbers, kMost * total), room(panel, total * kColumns), room(here, total),
                     room(there, total), room(panel_lines, total), room(live, sides),
                     room(ends, kMost / ShardTile::kRows));
  bool wide = false, low = false;
  total = 0;
  for (int64_t i = 0; i < sides; ++i) {
    total += live[i] = e.sides[i].used(segment.adapter);
    (e.sides[i].wide ? wide : low) = true;
  }
  for (int64_t k = 0; k < total; ++k) panel_lines[k] = panel + k * kColumns;
  const S factor = e.scaled ? rows.factor(segment.adapter) : S(1);
  for (int64_t r0 = 0; r0 < segment.rows; r0 += kMost) {
    const int64_t count = std::min(kMost, segment.rows - r0);
    const ShardHeights heights{count};
    for (int64_t t = 0; t < heights.tiles; ++t) {
      const int64_t first = heights.first(t), high = heights.first(t + 1) - first;
      const S* h[ShardTile::kRows];
      for (int64_t i = 0; i < high; ++i) {
        const int64_t at = rows.at(segment.first + r0 + first + i);
        h[i] = e.h.row(at);
        ends[t].from[i] = e.base.data == nullptr ? nullptr : e.base.row(at);
        ends[t].to[i] = e.to.row(at);
      }
      S* to = numbers + first * total;
      for (int64_t side = 0, rank = 0; side < sides; rank += e.sides[side++].ranks) {
        pack_numbers(high, live[side], factor, to,
                     [&](int64_t i, int64_t k) WS_INLINE { return h[i][rank + k]; });
        to += high * live[side];
      }
    }
    const bool pack = (wide && low) || heights.tiles > 1;
    auto tiles = [&]<class P>(const ShardLines<P>& lines, int64_t n, int64_t columns) WS_INLINE {
      for (int64_t t = 0; t < heights.tiles; ++t) {
        const int64_t first = heights.first(t), high = heights.first(t + 1) - first;
        any_shard_tile<S, P, T>(high, numbers + first * total, lines, total, ends[t], n, columns);
      }
    };
    ShardRun run{0, 0, here}, next{0, 0, there};
    if (n0 < n1) find_run(e, segment.adapter, live, n0, n1, run);
    for (int64_t n = n0; n < n1; n = run.n + run.columns, std::swap(run, next)) {
      const int64_t after = run.n + run.columns;
      if (after < n1) find_run(e, segment.adapter, live, after, n1, next);
      for (int64_t c = 0; c < run.columns; c += kColumns) {
        const int64_t columns = std::min(kColumns, run.columns - c);
        const bool inside = c + kColumns < run.columns;
        const void* const* ahead = inside || after == n1 ? run.line : next.line;
        const int64_t ahead_at = inside ? c + kColumns : after == n1 ? c : 0;
        if (pack) {
          int64_t k = 0;
          for (int64_t side = 0; side < sides; ++side) {
            for (int64_t end = k + live[side]; k < end; ++k) {
              if (e.sides[side].wide) {
                __builtin_prefetch(static_cast<const S*>(ahead[k]) + ahead_at);
                load_run(static_cast<const S*>(run.line[k]) + c, columns, panel + k * kColumns);
              } else {
                __builtin_prefetch(static_cast<const T*>(ahead[k]) + ahead_at);
                load_run(static_cast<const T*>(run.line[k]) + c, columns, panel + k * kColumns);
              }
            }
          }
          tiles(ShardLines<S>{panel_lines, 0}, run.n + c, columns);
        } else if (wide) {
          tiles(ShardLines<S>{reinterpret_cast<const S* const*>(run.line), c,
                              reinterpret_cast<const S* const*>(ahead), ahead_at},
                run.n + c, columns);
        } else {
          tiles(ShardLines<T>{reinterpret_cast<const T* const*>(run.line), c,
                              reinterpret_cast<const T* const*>(ahead), ahead_at},
                run.n + c, columns);
        }
      }
    }
  }
}

template <class T>
void shard_expand(const ShardExpand<T>& e, const ShardRows<Sum<T>>& rows, int64_t n0, int64_t n1) {
  for (const ShardSegment& segment : rows.segments) expand_segment(e, rows, segment, n0, n1);
}

// Columns [c0, c1) within every shard.
template <class T, class R>
void shard_outer(const ShardOuter<T, R>& o, const ShardRows<Sum<T>>& rows, int64_t c0, int64_t c1) {
  using S = Sum<T>;
  constexpr int64_t kColumns = ShardTile::kVectors * MoeShape<S>::kLanes;
  constexpr int64_t kDepth = 256;  // rows of a sum in registers
  const ShardSide& side = o.side;
  const uint8_t* first = o.first;
  for (const ShardSegment& segment : rows.segments) {
    const int64_t count = segment.rows, ranks = side.ranks;
    const ShardHeights heights{ranks};
    const int64_t depth = std::min(kDepth, count);
    S *numbers, *panel, *sums;
    R* trash;
    const S** panel_lines;
    MoeScratch scratch(room(numbers, count * ranks), room(panel, depth * kColumns),
                       room(sums, count > kDepth ? ranks * kColumns : 0), room(trash, kColumns),
                       room(panel_lines, depth));
    for (int64_t k = 0; k < depth; ++k) panel_lines[k] = panel + k * kColumns;
    const S factor = rows.factor(segment.adapter);
    for (int64_t k0 = 0; k0 < count; k0 += kDepth) {  // a tile's numbers of one pass together
      const int64_t run = std::min(kDepth, count - k0);
      for (int64_t t = 0; t < heights.tiles; ++t) {
        const int64_t r0 = heights.first(t), high = heights.first(t + 1) - r0;
        pack_numbers(high, run, factor, numbers + k0 * ranks + r0 * run,
                     [&](int64_t i, int64_t k) WS_INLINE {
                       return o.left.row(rows.at(segment.first + k0 + k))[(r0 + i) * o.left_step];
                     });
      }
    }
    for (int64_t piece = 0; piece < side.pieces; ++piece) {
      for (int64_t c = c0; c < c1; c += kColumns) {
        const int64_t columns = std::min(kColumns, c1 - c);
        auto place = [&](int64_t rank, const R*& from, R*& to) {
          const int64_t n = side.shard(segment.adapter, rank, piece);
          to = n < 0 ? trash : o.to + n * side.stride + c;
          const bool fresh = n < 0 || (first != nullptr && first[piece * ranks + rank]);
          from = fresh ? nullptr : to;
        };
        for (int64_t k0 = 0; k0 < count; k0 += kDepth) {
          const int64_t run = std::min(kDepth, count - k0);
          for (int64_t k = 0; k < run; ++k)
            load_run(o.right.row(rows.at(segment.first + k0 + k)) + piece * side.width + c, columns,
                     panel + k * kColumns);
          for (int64_t t = 0; t < heights.tiles; ++t) {
            const int64_t r0 = heights.first(t), high = heights.first(t + 1) - r0;
            const S* coef = numbers + k0 * ranks + r0 * run;
            const ShardLines<S> lines{panel_lines, 0};
            if (count <= kDepth) {
              ShardEnds<R> ends;
              for (int64_t i = 0; i < high; ++i) place(r0 + i, ends.from[i], ends.to[i]);
              any_shard_tile<S, S, R>(high, coef, lines, run, ends, 0, columns);
            } else {
              ShardEnds<S> ends;
              for (int64_t i = 0; i < high; ++i) {
                ends.to[i] = sums + (r0 + i) * kColumns;
                ends.from[i] = k0 == 0 ? nullptr : ends.to[i];
              }
              any_shard_tile<S, S, S>(high, coef, lines, run, ends, 0, columns);
            }
          }
        }
        for (int64_t rank = 0; count > kDepth && rank < ranks; ++rank) {
          const R* from;
          R* to;
          place(rank, from, to);
          S* sum = sums + rank * kColumns;
          for (int64_t i = 0; from != nullptr && i < columns; ++i) sum[i] += widen(from[i]);
          narrow_run(sum, columns, to);
        }
      }
    }
    if (first != nullptr) first += side.pieces * ranks;
  }
}
