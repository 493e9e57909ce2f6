// Dot products of rows with chains of shards: shard.h, one instruction set.

// Elements that a row is read as: as they are, where bfloat16 is multiplied in pairs, else sums.
template <class T, class P>
constexpr bool kShardPairs = kInPairs<T> && std::is_same_v<P, T>;

template <class T, class P>
struct ShardDots {
  using S = Sum<T>;
  using X = std::conditional_t<kShardPairs<T, P>, T, S>;
  static constexpr int kLanes = MoeShape<S>::kLanes;
  static constexpr int kStep = kShardPairs<T, P> ? 2 * kLanes : kLanes;  // elements of a vector
  static constexpr int kRows = WS_BYTES == 64 ? 6 : 2;                   // of a register tile
  // Columns of a pass, over which the rows stay in the L1 cache: the same for any number of rows,
  // so that sums do not depend on it.
  static constexpr int64_t kPass = 2048 / sizeof(X);
};

// sums[row * pitch + rank] += x_row . w_rank for M rows and four ranks, whose shards are w[piece *
// 4 + rank] of n elements each; meanwhile those of `next` are fetched.
template <class T, class P, int M>
void shard_dots(const typename ShardDots<T, P>::X* const* x, const P* const* w,
                const P* const* next, int64_t pieces, int64_t n, Sum<T>* sums, int64_t pitch) {
  using D = ShardDots<T, P>;
  using S = Sum<T>;
  using V = Vector<S>;
  constexpr int J = kShardRanks, kStep = D::kStep;
  V acc[M * J];
#pragma GCC unroll 32
  for (int i = 0; i < M * J; ++i) acc[i] = V{};
  auto step = [&](int64_t at, int64_t k, const P* const* line, int64_t some) WS_INLINE {
    V b[J];
#if WS_PAIRS
    if constexpr (kShardPairs<T, P>) {
      const __mmask32 mask = some == 0 ? ~__mmask32{0} : (__mmask32{1} << some) - 1;
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j)
        b[j] = some == 0 ? *reinterpret_cast<const typename MoeShape<S>::Loose*>(line[j] + k)
                         : (V)_mm512_maskz_loadu_epi16(mask, line[j] + k);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const V a = some == 0 ? *reinterpret_cast<const typename MoeShape<S>::Loose*>(x[m] + at + k)
                              : (V)_mm512_maskz_loadu_epi16(mask, x[m] + at + k);
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j)
          acc[m * J + j] = (V)_mm512_dpbf16_ps((__m512)acc[m * J + j], (__m512bh)a, (__m512bh)b[j]);
      }
      return;
    }
#endif
    if constexpr (!kShardPairs<T, P>) {
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j)
        b[j] = some == 0 ? load_lanes<S>(line[j] + k) : load_some<S>(line[j] + k, some);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const V a = some == 0 ? load_lanes<S>(x[m] + at + k) : load_some<S>(x[m] + at + k, some);
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) acc[m * J + j] += a * b[j];
      }
    }
  };
  for (int64_t p = 0, at = 0; p < pieces; ++p, at += n) {
    const P* const* line = w + p * J;
    const P* const* ahead = next + p * J;
    int64_t k = 0;
    for (; k + kStep <= n; k += kStep) {
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) __builtin_prefetch(ahead[j] + k);
      step(at, k, line, 0);
    }
    if (k < n) step(at, k, line, n - k);
  }
  fold_lanes<S, M * J>(acc);
  constexpr int L = D::kLanes, kLeft = (M * J + L - 1) / L;
  S folded[kLeft * L];
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i) *reinterpret_cast<V*>(folded + i * L) = acc[i];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) sums[m * pitch + j] += folded[folded_at<S>(m * J + j)];
  }
}

template <class T, class P, int M = ShardDots<T, P>::kRows>
void any_shard_dots(int64_t rows, const typename ShardDots<T, P>::X* const* x, const P* const* w,
                    const P* const* next, int64_t pieces, int64_t n, Sum<T>* sums, int64_t pitch) {
  if (rows == M) {
    shard_dots<T, P, M>(x, w, next, pieces, n, sums, pitch);
  } else if constexpr (M > 1) {
    any_shard_dots<T, P, M - 1>(rows, x, w, next, pieces, n, sums, pitch);
  }
}

// Rows [first, first + count) of a segment against the ranks [j0, j1) of its adapter.
template <class T, class P>
void shrink_by(const ShardShrink<T>& s, const ShardRows<Sum<T>>& rows, const ShardSegment& segment,
               int64_t first, int64_t count, int64_t j0, int64_t j1, Sum<T> factor) {
  using D = ShardDots<T, P>;
  using S = Sum<T>;
  using X = typename D::X;
  constexpr bool direct = std::is_same_v<X, T>;
  constexpr int64_t kPitch = D::kPass + 64 / sizeof(X), J = kShardRanks;
  const ShardSide& side = s.side;
  const int64_t width = side.width;
  j1 = std::min(j1, side.ranks);
  const int64_t end = std::clamp(side.used(segment.adapter), j0, j1);
  const int64_t blocks = (end - j0 + J - 1) / J, pitch = blocks * J;
  const int64_t most =
      std::max<int64_t>(1, std::min(side.pieces, D::kPass / std::max<int64_t>(1, width)));
  const int64_t cuts = (width + D::kPass - 1) / D::kPass;
  const int64_t passes = blocks > 0 ? (side.pieces + most - 1) / most * cuts : 0;
  X* packed;
  S* sums;
  const P** lines;
  MoeScratch scratch(room(packed, kShardRows * kPitch), room(sums, kShardRows * pitch),
                     room(lines, passes * blocks * most * J));
  // The shards of all passes, in the order in which they are met: what lies ahead is fetched.
  const P** line = lines;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t p0 = pass / cuts * most, c0 = pass % cuts * D::kPass;
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t p = p0; p < p0 + most; ++p) {
        for (int64_t j = b * J; j < b * J + J; ++j)
          *line++ = side.line<P>(segment.adapter, std::min(j0 + j, end - 1),
                                 std::min(p, side.pieces - 1)) +
                    c0;
      }
    }
  }
  const int64_t bytes = most * J * std::min(width, D::kPass) * sizeof(P);
  const int64_t distance = std::max<int64_t>(1, kShardAhead / std::max<int64_t>(1, bytes));
  const P *const *w = lines, *const *last = std::max(line - most * J, lines);
  std::fill_n(sums, count * pitch, S{});
  const T* row[kShardRows];
  const X* x[kShardRows];
  for (int64_t i = 0; i < count; ++i) row[i] = s.from.row(rows.at(first + i));
  // Rows far apart share sets of the L1 cache: more than it has ways are put side by side.
  const bool pack = !direct || count > 8;
  for (int64_t p0 = 0; blocks > 0 && p0 < side.pieces; p0 += most) {
    const int64_t pieces = std::min(most, side.pieces - p0);
    for (int64_t c0 = 0; c0 < width; c0 += D::kPass) {
      const int64_t n = std::min(D::kPass, width - c0), at = p0 * width + c0;
      for (int64_t i = 0; i < count; ++i) {
        if constexpr (direct) x[i] = row[i] + at;
        if (!pack) continue;
        X* to = packed + i * kPitch;
        if constexpr (direct) {
          std::memcpy(to, row[i] + at, pieces * n * sizeof(X));
        } else {
          load_run(row[i] + at, pieces * n, to);
        }
        x[i] = to;
      }
      const int64_t tiles = (count + D::kRows - 1) / D::kRows;
      for (int64_t b = 0; b < blocks; ++b, w += most * J) {
        const P* const* ahead = std::min(w + distance * most * J, last);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t r0 = count * t / tiles, r1 = count * (t + 1) / tiles;
          any_shard_dots<T, P>(r1 - r0, x + r0, w, t == 0 ? ahead : w, pieces, n,
                               sums + r0 * pitch + b * J, pitch);
        }
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    S* to = s.to.row(rows.at(first + i));
    for (int64_t j = j0; j < end; ++j) to[j] = factor * sums[i * pitch + j - j0];
    std::fill(to + end, to + j1, S{});
  }
}

// A thread's share of the products; `scaled` multiplies them by the factors of their adapters.
template <class T>
void shard_shrink(const std::vector<ShardShrink<T>>& shrinks, const ShardRows<Sum<T>>& rows,
                  const std::vector<ShardBlock>& blocks, bool scaled, int64_t part, int64_t parts) {
  each_shrink(blocks, part, parts, [&](const ShardBlock& b, int64_t j0, int64_t j1) {
    const ShardShrink<T>& s = shrinks[b.target];
    const ShardSegment& segment = rows.segments[b.segment];
    const Sum<T> factor = scaled ? rows.factor(segment.adapter) : Sum<T>(1);
    if (sizeof(T) < sizeof(Sum<T>) && s.side.wide) {
      shrink_by<T, Sum<T>>(s, rows, segment, b.first, b.rows, j0, j1, factor);
    } else {
      shrink_by<T, T>(s, rows, segment, b.first, b.rows, j0, j1, factor);
    }
  });
}
