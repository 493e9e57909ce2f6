// The blocked product of product.h for one instruction set; included once per set by isa.h, which
// defines WS_BYTES (bytes of a vector), WS_ROWS (rows of a register tile) and the namespace.
//
// Register tile: WS_ROWS x 2 vectors. AVX-512 keeps 14 x 2 of its 32 registers as accumulators,
// so that one broadcast feeds two multiply-adds and the loads stay off the critical path.

template <class S>
struct Tile {
  static constexpr int kLanes = WS_BYTES / sizeof(S);
  static constexpr int kRows = WS_ROWS;
  static constexpr int kCols = 2 * kLanes;
  static constexpr int kStep = (kRows + kLanes - 1) / kLanes * kLanes;  // row pitch of an A panel
  // Panels of A (kM x kK), of B (kK x kN) and the tile of sums (kM x kN) share the L2 cache.
  // Where few rows leave little work per element of B, blocks are kWide times wider and flatter:
  // runs of 4 KB instead of 1 KB keep the memory busy.
  static constexpr int kK = 256;
  static constexpr int kM = 16 * kRows;
  static constexpr int kN = 1024 / static_cast<int>(sizeof(S));
  static constexpr int kWide = 4;
  typedef S Vector __attribute__((vector_size(WS_BYTES), aligned(sizeof(S)), may_alias));
};

template <class S>
struct Scratch {
  using T = Tile<S>;
  S* a;
  S* b;
  S* sums;
  S* line;
  Scratch() {
    constexpr int64_t na = (T::kM / T::kRows + 1) * T::kStep * T::kK,
                      nb = T::kN * T::kK + T::kWide * T::kN * 2, nc = T::kM * T::kN * T::kWide,
                      nl = T::kLanes * T::kK;
    a = static_cast<S*>(std::aligned_alloc(64, (na + nb + nc + nl) * sizeof(S)));
    if (a == nullptr) throw std::bad_alloc();
    b = a + na;
    sums = b + nb;
    line = sums + nc;
  }
  ~Scratch() { std::free(a); }
  Scratch(const Scratch&) = delete;
};

// rows[r][at ..][2 vectors] (+)= a panel . b panel over k, then + bias where given.
template <class S, int R>
void register_tile(const S* a, const S* b, int64_t k, S* const* rows, int64_t at, bool add,
                   const S* bias) {
  using V = typename Tile<S>::Vector;
  constexpr int L = Tile<S>::kLanes;
  V acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = V{};
  for (int64_t i = 0; i < k; ++i) {
    const V b0 = *reinterpret_cast<const V*>(b), b1 = *reinterpret_cast<const V*>(b + L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      acc[r][0] += a[r] * b0;
      acc[r][1] += a[r] * b1;
    }
    a += Tile<S>::kStep;
    b += 2 * L;
  }
  V bias0{}, bias1{};
  if (bias != nullptr) {
    bias0 = *reinterpret_cast<const V*>(bias + at);
    bias1 = *reinterpret_cast<const V*>(bias + at + L);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    V* to = reinterpret_cast<V*>(rows[r] + at);
    to[0] = (add ? to[0] + acc[r][0] : acc[r][0]) + bias0;
    to[1] = (add ? to[1] + acc[r][1] : acc[r][1]) + bias1;
  }
}

template <class S, int R = WS_ROWS>
void any_register_tile(int count, const S* a, const S* b, int64_t k, S* const* rows, int64_t at,
                       bool add, const S* bias) {
  if (count == R) {
    register_tile<S, R>(a, b, k, rows, at, add, bias);
  } else if constexpr (R > 1) {
    any_register_tile<S, R - 1>(count, a, b, k, rows, at, add, bias);
  }
}

// Lanes of a and b interleaved: the low halves (High = 0) or the high ones.
template <int High, class V, int... I>
V interleave(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
  return __builtin_shufflevector(a, b, (I % 2 ? L : 0) + High * L / 2 + I / 2 ...);
}

// Transposes a square of L lines: log2(L) rounds of interleaving line i with line i + L/2. `In` is
// the type lines are loaded as.
template <class S, class In = typename Tile<S>::Vector>
void transpose(const S* const* lines, int64_t at, S* out, int64_t pitch) {
  using V = typename Tile<S>::Vector;
  constexpr int L = Tile<S>::kLanes;
  using Lanes = std::make_integer_sequence<int, L>;
  V x[L], y[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) x[i] = V(*reinterpret_cast<const In*>(lines[i] + at));
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      y[2 * i] = interleave<0>(x[i], x[i + L / 2], Lanes());
      y[2 * i + 1] = interleave<1>(x[i], x[i + L / 2], Lanes());
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) *reinterpret_cast<V*>(out + i * pitch) = x[i];
}

// n elements of one row from column c on: widened, picked and scaled. N > 0 fixes n, so that a
// panel's row is a pair of vector moves.
template <int N = 0, class T>
inline void read_run(const Matrix<const T>& from, const Sum<T>* scale, const T* row, int64_t c,
                     int64_t n, Sum<T>* to) {
  if constexpr (N > 0) n = N;
  if (from.cols == nullptr && from.col_stride == 1) {
    row += c;
    if (scale == nullptr) {
      for (int64_t i = 0; i < n; ++i) to[i] = widen(row[i]);
    } else {
      scale += c;
      for (int64_t i = 0; i < n; ++i) to[i] = widen(row[i]) * scale[i];
    }
    return;
  }
  if (from.cols != nullptr && from.col_stride == 1 && scale == nullptr) {
    const int64_t* cols = from.cols + c;
    for (int64_t i = 0; i < n; ++i) to[i] = widen(row[cols[i]]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const Sum<T> value = widen(row[from.col(c + i)]);
    to[i] = scale == nullptr ? value : value * scale[c + i];
  }
}

// Packs a panel: lanes j in [j0, j0 + count), depth k in [k0, k0 + depth), as to[k * pitch + j].
// Lanes up to `pitch` hold anything readable: their products are never stored.
template <class T>
void pack_across(const Matrix<const T>& from, const Factors<Sum<T>>& factors,
                 const Mixture<Sum<T>>& mixture, int64_t j0, int64_t count, int64_t k0,
                 int64_t depth, int64_t pitch, Sum<T>* to, Sum<T>* line) {
  using S = Sum<T>;
  constexpr int L = Tile<S>::kLanes;
  const bool direct = std::is_same_v<T, S> && from.cols == nullptr && from.col_stride == 1 &&
                      factors.table == nullptr && mixture.count == 0;
  for (int64_t group = 0; group < count; group += L) {
    const S* lines[L];
    for (int64_t j = 0; j < L; ++j) {
      if (group + j >= count) {
        lines[j] = lines[0];
      } else if (direct) {
        lines[j] = reinterpret_cast<const S*>(from.row(j0 + group + j)) + k0;
      } else {
        const int64_t r = j0 + group + j;
        S* here = line + j * Tile<S>::kK;
        if (mixture.count > 0) {
          read_mixture(from, mixture, r, k0, depth, here);
        } else {
          read_run(from, factors.row(r), from.row(r), k0, depth, here);
        }
        lines[j] = here;
      }
    }
    int64_t k = 0;
    for (; k + L <= depth; k += L) transpose<S>(lines, k, to + k * pitch + group, pitch);
    for (; k < depth; ++k) {
      for (int64_t j = 0; j < L; ++j) to[k * pitch + group + j] = lines[j][k];
    }
  }
}

// Packs panels of W lanes, `apart` elements from one another, from rows that run over k: each row
// is read in one go, so that a run is as long as the block is wide.
template <int W, class T>
void pack_along(const Matrix<const T>& from, const Factors<Sum<T>>& factors,
                const Mixture<Sum<T>>& mixture, int64_t j0, int64_t count, int64_t k0,
                int64_t depth, int64_t pitch, Sum<T>* to, int64_t apart) {
  if (mixture.count > 0) {
    for (int64_t k = 0; k < depth; ++k) {
      Sum<T>* panel = to + k * pitch;
      if (k + 2 < depth && from.cols == nullptr) {
        const T* ahead = from.row(k0 + k + 2) + j0 * from.col_stride;
        for (int64_t e = 0; e < mixture.count; ++e, ahead += mixture.step) {
          for (int64_t j = 0; j < count; j += 64 / sizeof(T)) __builtin_prefetch(ahead + j);
        }
      }
      int64_t j = 0;
      for (; j + W <= count; j += W, panel += apart) {
        read_mixture<W>(from, mixture, k0 + k, j0 + j, W, panel);
      }
      if (j < count) read_mixture(from, mixture, k0 + k, j0 + j, count - j, panel);
    }
    return;
  }
  for (int64_t k = 0; k < depth; ++k, to += pitch) {
    const T* row = from.row(k0 + k);
    const Sum<T>* scale = factors.row(k0 + k);
    if (k + 2 < depth && from.cols == nullptr) {
      const T* ahead = from.row(k0 + k + 2) + j0 * from.col_stride;
      for (int64_t j = 0; j < count; j += 64 / sizeof(T)) __builtin_prefetch(ahead + j);
    }
    Sum<T>* panel = to;
    int64_t j = 0;
    for (; j + W <= count; j += W, panel += apart) {
      read_run<W>(from, scale, row, j0 + j, W, panel);
    }
    if (j < count) read_run(from, scale, row, j0 + j, count - j, panel);
  }
}

// Moves the columns [from, n) of a finished tile of sums to the result.
template <class T, class R>
void finish(const Result<T, R>& result, const Sum<T>* sums, int64_t pitch, int64_t m0, int64_t m,
            int64_t n0, int64_t from, int64_t n) {
  using S = Sum<T>;
  const Matrix<R>& out = result.out;
  const bool plain = out.cols == nullptr && out.col_stride == 1;
  for (int64_t r = 0; r < m; ++r) {
    const S* line = sums + r * pitch;
    const S* scale = result.factors.row(m0 + r);
    R* to = out.row(m0 + r);
    if (result.sums != nullptr) {
      const T* w = result.weight.row(m0 + r);
      S* total = result.sums + result.factors.classes[m0 + r] * result.factors.stride + n0;
      if (result.weight.col_stride == 1) {
        for (int64_t j = from; j < n; ++j) total[j] += line[j] * widen(w[n0 + j]);
      } else {
        for (int64_t j = from; j < n; ++j)
          total[j] += line[j] * widen(w[result.weight.col(n0 + j)]);
      }
    }
    auto value = [&](int64_t j) {
      S v = line[j];
      if (scale != nullptr) v *= scale[n0 + j];
      if (result.bias != nullptr) v += widen(result.bias[n0 + j]);
      return v;
    };
    if (out.cols != nullptr && out.col_stride == 1 && scale == nullptr && result.bias == nullptr) {
      const int64_t* cols = out.cols + n0;
      if (result.accumulate) {
        for (int64_t j = from; j < n; ++j) to[cols[j]] = narrow<R>(widen(to[cols[j]]) + line[j]);
      } else {
        for (int64_t j = from; j < n; ++j) to[cols[j]] = narrow<R>(line[j]);
      }
    } else if (plain && !result.accumulate) {
      for (int64_t j = from; j < n; ++j) to[n0 + j] = narrow<R>(value(j));
    } else {
      for (int64_t j = from; j < n; ++j) {
        R& cell = to[out.col(n0 + j)];
        cell = narrow<R>(result.accumulate ? value(j) + widen(cell) : value(j));
      }
    }
  }
}

// Whether register tiles may go straight to the result instead of through the tile of sums.
template <class T, class R>
bool writes_direct(const Result<T, R>& r) {
  return std::is_same_v<R, Sum<T>> && (r.bias == nullptr || std::is_same_v<T, R>) &&
         r.out.cols == nullptr && r.out.col_stride == 1 && r.factors.table == nullptr &&
         r.sums == nullptr && r.mixture.count == 0;
}

// Computes the rows [m0, m1) and columns [n0, n1) of a product; needs no other thread.
template <class T, class R>
void product(const Product<T, R>& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  using S = Sum<T>;
  using G = Tile<S>;
  static thread_local Scratch<S> scratch;
  const bool direct = writes_direct(p.result) && p.k > 0;
  const bool wide = p.b_by_k && (m1 - m0 <= 4 * G::kRows || p.k <= G::kK / G::kWide ||
                                 p.result.out.cols != nullptr);
  const int64_t k_block = wide ? G::kK / G::kWide : G::kK;
  const int64_t n_block = wide ? G::kN * G::kWide : G::kN;
  const int64_t m_block = wide && !direct ? G::kM / G::kWide : G::kM;
  const int64_t apart =
      G::kCols * k_block + 2 * G::kLanes;  // B panels, off each other's cache sets
  for (int64_t mb = m0; mb < m1; mb += m_block) {
    const int64_t m = std::min(m_block, m1 - mb);
    const int64_t tiles = (m + G::kRows - 1) / G::kRows;  // of equal height, give or take one
    for (int64_t nb = n0; nb < n1; nb += n_block) {
      const int64_t n = std::min(n_block, n1 - nb);
      const int64_t whole = direct ? n / G::kCols * G::kCols : 0;  // columns written directly
      for (int64_t kb = 0; kb < p.k; kb += k_block) {
        const int64_t k = std::min(k_block, p.k - kb);
        auto tile = [&](int64_t t, int64_t j) {
          const int64_t first = t * m / tiles, rows = (t + 1) * m / tiles - first;
          const bool straight = j < whole;
          S* to[G::kRows];
          for (int64_t r = 0; r < rows; ++r) {
            to[r] = straight ? reinterpret_cast<S*>(p.result.out.row(mb + first + r))
                             : scratch.sums + (first + r) * n_block - nb;
          }
          const bool biased = straight && kb + k == p.k;
          any_register_tile<S>(rows, scratch.a + t * G::kStep * G::kK,
                               scratch.b + j / G::kCols * apart, k, to, nb + j,
                               kb > 0 || (straight && p.result.accumulate),
                               biased ? reinterpret_cast<const S*>(p.result.bias) : nullptr);
        };
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t first = t * m / tiles, rows = (t + 1) * m / tiles - first;
          S* panel = scratch.a + t * G::kStep * G::kK;
          if (p.a_by_k) {
            pack_along<G::kStep, T>(p.a, {}, {}, mb + first, rows, kb, k, G::kStep, panel, 0);
          } else {
            pack_across<T>(p.a, {}, {}, mb + first, rows, kb, k, G::kStep, panel, scratch.line);
          }
        }
        if (p.b_by_k) {  // all panels first, then row after row of the result
          pack_along<G::kCols>(p.b, p.b_factors, p.b_mixture, nb, n, kb, k, G::kCols, scratch.b,
                               apart);
          for (int64_t t = 0; t < tiles; ++t) {
            for (int64_t j = 0; j < n; j += G::kCols) tile(t, j);
          }
        } else {  // panel by panel, used while it is in the L1 cache
          for (int64_t j = 0; j < n; j += G::kCols) {
            pack_across<T>(p.b, p.b_factors, p.b_mixture, nb + j,
                           std::min<int64_t>(G::kCols, n - j), kb, k, G::kCols,
                           scratch.b + j / G::kCols * apart, scratch.line);
            for (int64_t t = 0; t < tiles; ++t) tile(t, j);
          }
        }
      }
      if (p.k == 0) std::fill_n(scratch.sums, m * n_block, S{});
      if (p.result.mixture.count > 0) {
        finish_mixture(p.result, scratch.sums, n_block, mb, m, nb, n);
      } else {
        finish(p.result, scratch.sums, n_block, mb, m, nb, whole, n);
      }
    }
  }
}

// to[j - j0] = sum over rows of from(row, j), in blocks of rows so that rounding does not pile up.
template <class T>
void sum_columns(const Matrix<const T>& from, int64_t j0, int64_t j1, int64_t rows, Sum<T>* to) {
  constexpr int64_t kCols = 256, kRows = 128;
  for (int64_t j = j0; j < j1; j += kCols, to += kCols) {
    const int64_t n = std::min(kCols, j1 - j);
    std::fill_n(to, n, Sum<T>{});
    for (int64_t block = 0; block < rows; block += kRows) {
      Sum<T> part[kCols] = {};
      for (int64_t r = block; r < std::min(rows, block + kRows); ++r) {
        const T* row = from.row(r) + j;
        for (int64_t c = 0; c < n; ++c) part[c] += widen(row[c]);
      }
      for (int64_t c = 0; c < n; ++c) to[c] += part[c];
    }
  }
}

// to[r, c] (+)= from[r, c], through to's tables.
template <class T, class R>
void deposit(Matrix<const T> from, int64_t rows, int64_t cols, bool add, Matrix<R> to) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = from.row(r);
    R* y = to.row(r);
    if (to.cols == nullptr && to.col_stride == 1) {
      for (int64_t c = 0; c < cols; ++c) y[c] = narrow<R>(widen(x[c]) + (add ? widen(y[c]) : 0));
    } else {
      for (int64_t c = 0; c < cols; ++c) {
        R& cell = y[to.col(c)];
        cell = narrow<R>(widen(x[c]) + (add ? widen(cell) : 0));
      }
    }
  }
}
