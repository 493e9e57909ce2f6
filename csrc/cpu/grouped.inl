// The dot products of grouped.h for one instruction set; included once per set by isa.h.

// L elements from p on, widened.
template <class T>
inline typename Tile<Sum<T>>::Vector wide_load(const T* p) {
  using V = typename Tile<Sum<T>>::Vector;
  if constexpr (std::is_same_v<T, Sum<T>>) {
    return *reinterpret_cast<const V*>(p);
  } else {
    Sum<T> lanes[Tile<Sum<T>>::kLanes];
    for (int i = 0; i < Tile<Sum<T>>::kLanes; ++i) lanes[i] = widen(p[i]);
    return *reinterpret_cast<const V*>(lanes);
  }
}

// A register tile: kDotRows rows of x against kDotLines rows of the weight. Each is loaded once
// per step, so that the arithmetic of 16 rows still hides behind the memory.
template <class S>
struct DotTile {
  static constexpr int kLines = 4;
  static constexpr int kRows = WS_BYTES == 64 ? 6 : 2;
  static constexpr int64_t kDepth = 512;  // of one visit: the lines stay in the L1 cache for it
};

// sums[r][j] += x[r] . w[j] over [k0, k1), lane by lane. The weight `ahead` elements further is
// fetched to the L2 cache: one thread then reads at 22 GB/s as a plain sum does, without it or with
// a fetch to the L1 cache, whose sets the lines of W share, at 13 to 18.
template <class T, int R>
void dot_tile(const T* const* w, const Sum<T>* const* x, int64_t k0, int64_t k1, int64_t ahead,
              Sum<T>* const* sums) {
  using S = Sum<T>;
  using V = typename Tile<S>::Vector;
  constexpr int L = Tile<S>::kLanes, J = DotTile<S>::kLines;
  V acc[R][J];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) acc[r][j] = reinterpret_cast<const V*>(sums[r])[j];
  }
  auto step = [&](const T* const* lines, const S* const* rows, int64_t k) {
    V b[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) b[j] = wide_load(lines[j] + k);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V a = *reinterpret_cast<const V*>(rows[r] + k);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) acc[r][j] += a * b[j];
    }
  };
  int64_t k = k0;
  for (; k + L <= k1; k += L) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) __builtin_prefetch(w[j] + k + ahead, 0, 2);
    step(w, x, k);
  }
  if (k < k1) {  // the rest, filled up with zeros
    T lines[J][L] = {};
    S rows[R][L] = {};
    const T* line_of[J];
    const S* row_of[R];
    for (int j = 0; j < J; ++j) {
      for (int64_t i = k; i < k1; ++i) lines[j][i - k] = w[j][i];
      line_of[j] = lines[j];
    }
    for (int r = 0; r < R; ++r) {
      for (int64_t i = k; i < k1; ++i) rows[r][i - k] = x[r][i];
      row_of[r] = rows[r];
    }
    step(line_of, row_of, 0);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) reinterpret_cast<V*>(sums[r])[j] = acc[r][j];
  }
}

template <class T, int R = DotTile<Sum<T>>::kRows>
void any_dot_tile(int64_t count, const T* const* w, const Sum<T>* const* x, int64_t k0, int64_t k1,
                  int64_t ahead, Sum<T>* const* sums) {
  if (count >= R) {
    dot_tile<T, R>(w, x, k0, k1, ahead, sums);
  } else if constexpr (R > 1) {
    any_dot_tile<T, R - 1>(count, w, x, k0, k1, ahead, sums);
  }
}

// Halves added to halves; overwrites the lanes.
template <class S>
inline S sum_of_lanes(S* lanes) {
#pragma GCC unroll 4
  for (int half = Tile<S>::kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The rows [n0, n1) of a band of the weight, for all rows of the batch that use it.
template <class T>
void dots(const Dots<T>& d, const Band& band, int64_t n0, int64_t n1) {
  using S = Sum<T>;
  using G = DotTile<S>;
  constexpr int L = Tile<S>::kLanes, J = G::kLines, R = G::kRows;
  const int64_t last = band.rows.empty() ? 0 : band.rows.back() + 1;
  std::vector<S> sums(last * J * L);
  for (int64_t n = n0; n < n1; n += J) {
    const int64_t lines = std::min<int64_t>(J, n1 - n);
    const T* w[J];
    for (int64_t j = 0; j < J; ++j) w[j] = d.weight.row(n + std::min(j, lines - 1));
    std::fill(sums.begin(), sums.end(), S{});
    for (const Segment& segment : band.segments) {
      const int64_t count = segment.rows.size(), tiles = (count + R - 1) / R;
      for (int64_t k0 = segment.k0; k0 < segment.k1; k0 += G::kDepth) {
        const int64_t k1 = std::min(segment.k1, k0 + G::kDepth);
        for (int64_t tile = 0; tile < tiles; ++tile) {  // of equal height, give or take one
          const S* x[R];
          S* to[R];
          const int64_t first = tile * count / tiles, rows = (tile + 1) * count / tiles - first;
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t at = segment.rows[first + r];
            x[r] = d.x + at * d.pitch;
            to[r] = sums.data() + at * J * L;
          }
          any_dot_tile<T>(rows, w, x, k0, k1, J * d.weight.row_stride, to);
        }
      }
    }
    for (const int64_t r : band.rows) {
      S* lanes = sums.data() + r * J * L;
      T* to = d.out.row(r) + n;
      for (int64_t j = 0; j < lines; ++j) {
        const S total = sum_of_lanes(lanes + j * L);
        to[j] = narrow<T>(d.bias == nullptr ? total : total + widen(d.bias[n + j]));
      }
    }
  }
}
