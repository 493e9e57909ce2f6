// Rows of y and of dx from numbers of h and shards: shard.h, one instruction set.

// A piece of work of shard_expand: rows of a segment in tiles, and the numbers they are sums with.
template <class T>
struct ShardPart {
  using S = Sum<T>;
  const ShardExpand<T>& e;
  int64_t adapter, total;  // ranks of all sides together, those that are used
  const int64_t* used;
  ShardHeights heights;
  const S* numbers;
  const ShardEnds<T>* ends;
};

// The shards that columns from n on lie in, of all sides, and how far they reach.
struct ShardRun {
  int64_t n, columns;
  const void** line;
};

template <class T>
void find_run(const ShardPart<T>& part, int64_t n, int64_t n1, ShardRun& run) {
  run.n = n, run.columns = n1 - n;
  const void** line = run.line;
  for (size_t i = 0; i < part.e.sides.size(); ++i) {
    const ShardSide& side = part.e.sides[i];
    const int64_t piece = n / side.width, at = n % side.width;
    run.columns = std::min(run.columns, side.width - at);
    for (int64_t rank = 0; rank < part.used[i]; ++rank) {
      if (side.wide) {
        *line++ = side.line<Sum<T>>(part.adapter, rank, piece) + at;
      } else {
        *line++ = side.line<T>(part.adapter, rank, piece) + at;
      }
    }
  }
}

// Few rows, one tile: shards are read once, from their first column to their last.
template <class T, class P>
void expand_few(const ShardPart<T>& part, int64_t n0, int64_t n1) {
  using S = Sum<T>;
  constexpr int64_t kMost = 512, L = MoeShape<S>::kLanes, kPitch = kMost + 2 * L;
  const int64_t rows = part.heights.count;
  S* sums;
  const void **here, **there;
  MoeScratch scratch(room(sums, rows * kPitch), room(here, part.total), room(there, part.total));
  ShardRun run{0, 0, here}, next{0, 0, there};
  find_run(part, n0, std::min(n1, n0 + kMost), run);
  for (int64_t n = n0; n < n1; n = run.n + run.columns, std::swap(run, next)) {
    const int64_t after = run.n + run.columns;
    if (after < n1) find_run(part, after, std::min(n1, after + kMost), next);
    for (int64_t m = 0; m < rows; ++m) std::fill_n(sums + m * kPitch, run.columns + L, S{});
    any_shard_stream<S, P>(rows, part.total, part.numbers,
                           reinterpret_cast<const P* const*>(run.line),
                           reinterpret_cast<const P* const*>(after < n1 ? next.line : run.line),
                           run.columns, sums, kPitch);
    for (int64_t m = 0; m < rows; ++m) {
      const T* from = part.ends->from[m] == nullptr ? nullptr : part.ends->from[m] + n;
      T* to = part.ends->to[m] + n;
      const S* sum = sums + m * kPitch;
      int64_t c = 0;
      for (; c + L <= run.columns; c += L) {
        Vector<S> v = load_lanes<S>(sum + c);
        if (from != nullptr) v += load_lanes<S>(from + c);
        store_lanes<T, S>(v, to + c);
      }
      if (c < run.columns) {
        Vector<S> v = load_lanes<S>(sum + c);
        if (from != nullptr) v += load_some<S>(from + c, run.columns - c);
        store_some<T, S>(v, run.columns - c, to + c);
      }
    }
  }
}

// Many rows: the shards of a block of columns are put side by side, panel after panel, and rows
// pass over all of them: in runs of some kilobytes, which is how a memory likes to be read.
template <class T>
void expand_many(const ShardPart<T>& part, int64_t n0, int64_t n1) {
  using S = Sum<T>;
  constexpr int64_t kColumns = ShardTile::kVectors * MoeShape<S>::kLanes;
  constexpr int64_t kBlock = (int64_t{256} << 10) / sizeof(S);  // elements, half of an L2 cache
  struct Chunk {
    int64_t n, columns;
  };
  const int64_t size = part.total * kColumns, all = (n1 - n0 + kColumns - 1) / kColumns;
  const int64_t most = std::max<int64_t>(1, std::min(all, kBlock / std::max<int64_t>(1, size)));
  S* panel;
  const void** lines;
  Chunk* chunks;
  MoeScratch scratch(room(panel, most * size), room(lines, part.total), room(chunks, most));
  ShardRun run{0, 0, lines};
  for (int64_t n = n0; n < n1;) {
    int64_t count = 0;
    while (n < n1 && count < most) {
      find_run(part, n, std::min(n1, n + (most - count) * kColumns), run);
      S* to = panel + count * size;
      int64_t k = 0;
      auto copy = [&]<class P>(int64_t end, const P*) WS_INLINE {
        for (; k < end; ++k, to += kColumns) {
          const P *line = static_cast<const P*>(run.line[k]),
                  *ahead = static_cast<const P*>(run.line[std::min(k + 2, end - 1)]);
          for (int64_t c = 0; c < run.columns; c += kColumns) {
            for (size_t i = 0; i < kColumns * sizeof(P); i += 64)
              __builtin_prefetch(reinterpret_cast<const char*>(ahead + c) + i);
            load_run(line + c, std::min(kColumns, run.columns - c), to + c / kColumns * size);
          }
        }
      };
      for (size_t side = 0; side < part.e.sides.size(); ++side) {
        if (part.e.sides[side].wide) {
          copy(k + part.used[side], static_cast<const S*>(nullptr));
        } else {
          copy(k + part.used[side], static_cast<const T*>(nullptr));
        }
      }
      for (int64_t c = 0; c < run.columns; c += kColumns)
        chunks[count++] = {n + c, std::min(kColumns, run.columns - c)};
      n += run.columns;
    }
    for (int64_t t = 0; t < part.heights.tiles; ++t) {
      const int64_t first = part.heights.first(t), high = part.heights.first(t + 1) - first;
      for (int64_t i = 0; i < count; ++i)
        any_shard_tile<S, T>(high, part.numbers + first * part.total, panel + i * size, part.total,
                             part.ends[t], chunks[i].n, chunks[i].columns);
    }
  }
}

// Columns [n0, n1) of the rows of a segment.
template <class T>
void expand_segment(const ShardExpand<T>& e, const ShardRows<Sum<T>>& rows,
                    const ShardSegment& segment, int64_t n0, int64_t n1) {
  using S = Sum<T>;
  constexpr int64_t kMost = 40 * ShardTile::kRows;  // rows at a time, whose numbers stay in a cache
  const int64_t sides = e.sides.size(), most = std::min(kMost, segment.rows);
  int64_t total = 0, *used;
  for (const ShardSide& side : e.sides) total += side.ranks;
  ShardEnds<T>* ends;
  S* numbers;
  MoeScratch scratch(room(used, sides), room(numbers, most * total),
                     room(ends, kMost / ShardTile::kRows));
  bool wide = false, low = false;
  total = 0;
  for (int64_t i = 0; i < sides; ++i) {
    total += used[i] = e.sides[i].used(segment.adapter);
    (e.sides[i].wide ? wide : low) = true;
  }
  const S factor = e.scaled ? rows.factor(segment.adapter) : S(1);
  for (int64_t r0 = 0; n0 < n1 && r0 < segment.rows; r0 += kMost) {
    const ShardHeights heights{std::min(kMost, segment.rows - r0)};
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
        pack_numbers(high, used[side], factor, to,
                     [&](int64_t i, int64_t k) WS_INLINE { return h[i][rank + k]; });
        to += high * used[side];
      }
    }
    const ShardPart<T> part{e, segment.adapter, total, used, heights, numbers, ends};
    if (heights.tiles > 1 || (wide && low)) {
      expand_many(part, n0, n1);
    } else if (wide) {
      expand_few<T, S>(part, n0, n1);
    } else {
      expand_few<T, T>(part, n0, n1);
    }
  }
}

template <class T>
void shard_expand(const ShardExpand<T>& e, const ShardRows<Sum<T>>& rows, int64_t n0, int64_t n1) {
  for (const ShardSegment& segment : rows.segments) expand_segment(e, rows, segment, n0, n1);
}
