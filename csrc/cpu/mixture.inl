// Sums over the experts of a mixture and their gradients, for one instruction set; included by
// isa.h before the product, which packs and finishes its tiles with them.

// to[i] (=, or += where Add) f a[i] + g b[i]; without b, f a[i].
template <int N, bool Add, class T>
inline void combine(Sum<T> f, const T* a, Sum<T> g, const T* b, int64_t n, Sum<T>* to) {
  if constexpr (N > 0) n = N;
  if (b == nullptr) {
    for (int64_t i = 0; i < n; ++i) to[i] = f * widen(a[i]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const Sum<T> v = f * widen(a[i]) + g * widen(b[i]);
    to[i] = Add ? to[i] + v : v;
  }
}

// n elements of row r of the mixed weight from column c on. N > 0 fixes n. Experts go in pairs, so
// that two of them, the usual number, take one pass.
template <int N = 0, class T>
inline void read_mixture(const Matrix<const T>& from, const Mixture<Sum<T>>& mixture, int64_t r,
                         int64_t c, int64_t n, Sum<T>* to) {
  const T* row = from.row(r);
  if (from.cols == nullptr && from.col_stride == 1) {
    row += c;
    const int64_t step = mixture.step;
    int64_t e = mixture.count % 2;
    if (e == 1) {
      combine<N, false, T>(mixture.factor(0, r), row, 0, nullptr, n, to);
    } else {
      combine<N, false>(mixture.factor(0, r), row, mixture.factor(1, r), row + step, n, to);
      e = 2;
    }
    for (; e < mixture.count; e += 2) {
      const T* a = row + e * step;
      combine<N, true>(mixture.factor(e, r), a, mixture.factor(e + 1, r), a + step, n, to);
    }
    return;
  }
  for (int64_t e = 0; e < mixture.count; ++e, row += mixture.step) {
    const Sum<T> f = mixture.factor(e, r);
    for (int64_t i = 0; i < n; ++i) {
      const Sum<T> v = f * widen(row[from.col(c + i)]);
      to[i] = e == 0 ? v : to[i] + v;
    }
  }
}

// Rows [r0, r1) of the mixed weight, as they are.
template <class T>
void mix_rows(const Matrix<const T>& from, const Mixture<Sum<T>>& mixture, int64_t r0, int64_t r1,
              int64_t cols, T* to) {
  constexpr int64_t kRun = 512;
  for (int64_t r = r0; r < r1; ++r) {
    for (int64_t c = 0; c < cols; c += kRun) {
      const int64_t n = std::min(kRun, cols - c);
      if constexpr (std::is_same_v<T, Sum<T>>) {
        read_mixture(from, mixture, r, c, n, to + r * cols + c);
      } else {
        Sum<T> run[kRun];
        read_mixture(from, mixture, r, c, n, run);
        for (int64_t i = 0; i < n; ++i) to[r * cols + c + i] = narrow<T>(run[i]);
      }
    }
  }
}

// Sum of a[i] b[i]: one partial sum per lane, two vectors of them, always in the same order.
template <class S>
S dot(const S* a, const S* b, int64_t n) {
  constexpr int L = WS_BYTES / sizeof(S);
  typedef S V __attribute__((vector_size(WS_BYTES), aligned(sizeof(S)), may_alias));
  V x{}, y{};
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    x += *reinterpret_cast<const V*>(a + i) * *reinterpret_cast<const V*>(b + i);
    y += *reinterpret_cast<const V*>(a + i + L) * *reinterpret_cast<const V*>(b + i + L);
  }
  x += y;
  S total{};
  for (int j = 0; j < L; ++j) total += x[j];
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// A run of a row as sums are kept: where it lies, or widened into `room`.
template <class S, class T>
const S* widened(const T* row, const Matrix<const T>& from, int64_t c, int64_t n, S* room) {
  if (from.cols == nullptr && from.col_stride == 1) {
    if constexpr (std::is_same_v<T, S>) return row + c;
    for (int64_t i = 0; i < n; ++i) room[i] = widen(row[c + i]);
  } else {
    for (int64_t i = 0; i < n; ++i) room[i] = widen(row[from.col(c + i)]);
  }
  return room;
}

// Hands out a tile of the mixed weight's gradient: rows [m0, m0 + m), columns [n0, n0 + n).
template <class T, class R, class L>
void finish_mixture(const Result<T, R>& result, const L* tile, int64_t pitch, int64_t m0, int64_t m,
                    int64_t n0, int64_t n) {
  using S = Sum<T>;
  constexpr int64_t kRun = 512;
  const Mixture<S>& mixture = result.mixture;
  const Matrix<R>& out = result.out;
  const bool plain = out.cols == nullptr && out.col_stride == 1;
  S room[2][kRun];
  for (int64_t r = m0; r < m0 + m; ++r, tile += pitch) {
    for (int64_t j = 0; j < n; j += kRun) {
      const int64_t count = std::min(kRun, n - j), c = n0 + j;
      const S* g = widened<S, L>(tile, {tile, pitch, 1}, j, count, room[0]);
      const T* weight = result.weight.row(r);
      R* to = out.row(r);
      for (int64_t e = 0; e < mixture.count; ++e, weight += mixture.step, to += result.out_step) {
        const S* w = widened<S, T>(weight, result.weight, c, count, room[1]);
        result.sums[e * mixture.pitch + r] += dot(g, w, count);
        const S f = mixture.factor(e, r);
        if (plain && result.accumulate) {
          for (int64_t i = 0; i < count; ++i) {
            to[c + i] = narrow<R>(widen(to[c + i]) + f * g[i]);
          }
        } else if (plain) {
          for (int64_t i = 0; i < count; ++i) to[c + i] = narrow<R>(f * g[i]);
        } else {
          for (int64_t i = 0; i < count; ++i) {
            R& cell = to[out.col(c + i)];
            cell = narrow<R>((result.accumulate ? widen(cell) : 0) + f * g[i]);
          }
        }
      }
    }
  }
}
