// Gradients of pools: shard.h, one instruction set.

// Asks for n elements, to the L2 cache.
template <class P>
inline void fetch_run(const P* at, int64_t n) {
  for (size_t i = 0; i < n * sizeof(P); i += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(at) + i, 0, 2);
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
    const int64_t count = segment.rows, ranks = side.used(segment.adapter);
    const ShardHeights heights{ranks};
    const int64_t depth = std::min(kDepth, count);
    S *numbers, *panel, *sums;
    R* trash;
    MoeScratch scratch(room(numbers, count * ranks), room(panel, depth * kColumns),
                       room(sums, count > kDepth ? ranks * kColumns : 0), room(trash, kColumns));
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
          const bool fresh = n < 0 || (first != nullptr && first[piece * side.ranks + rank]);
          from = fresh ? nullptr : to;
        };
        // What the next columns need is on its way while these are summed.
        const bool inside = c + kColumns < c1;
        const int64_t next_piece = std::min(piece + !inside, side.pieces - 1);
        const int64_t next_c = inside ? c + kColumns : c0;
        for (int64_t rank = 0; rank < ranks; ++rank) {
          const int64_t n = side.shard(segment.adapter, rank, next_piece);
          if (n >= 0) fetch_run(o.to + n * side.stride + next_c, kColumns);
        }
        for (int64_t k0 = 0; k0 < count; k0 += kDepth) {
          const int64_t run = std::min(kDepth, count - k0);
          for (int64_t k = 0; k < run; ++k) {
            const T* row = o.right.row(rows.at(segment.first + k0 + k));
            fetch_run(row + next_piece * side.width + next_c, kColumns);
            load_run(row + piece * side.width + c, columns, panel + k * kColumns);
          }
          for (int64_t t = 0; t < heights.tiles; ++t) {
            const int64_t r0 = heights.first(t), high = heights.first(t + 1) - r0;
            const S* coef = numbers + k0 * ranks + r0 * run;
            if (count <= kDepth) {
              ShardEnds<R> ends;
              for (int64_t i = 0; i < high; ++i) place(r0 + i, ends.from[i], ends.to[i]);
              any_shard_tile<S, R>(high, coef, panel, run, ends, 0, columns);
            } else {
              ShardEnds<S> ends;
              for (int64_t i = 0; i < high; ++i) {
                ends.to[i] = sums + (r0 + i) * kColumns;
                ends.from[i] = k0 == 0 ? nullptr : ends.to[i];
              }
              any_shard_tile<S, S>(high, coef, panel, run, ends, 0, columns);
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
    if (first != nullptr) first += side.pieces * side.ranks;
  }
}
