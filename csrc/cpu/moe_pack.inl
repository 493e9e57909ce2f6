// Moving runs of elements, and packing operands of moe_tile.inl, for one instruction set.

// ---- runs of elements ---------------------------------------------------------------------------

// n elements widened, or narrowed, a vector at a time.
template <class T>
inline void widen_run(const T* from, int64_t n, Sum<T>* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, bfloat16>) {
    constexpr int L = MoeShape<float>::kLanes;
    typedef uint16_t Narrow __attribute__((vector_size(2 * L), aligned(2), may_alias));
    typedef uint32_t Wide __attribute__((vector_size(4 * L), aligned(4), may_alias));
    for (; i + L <= n; i += L)
      *reinterpret_cast<Wide*>(to + i) =
          __builtin_convertvector(*reinterpret_cast<const Narrow*>(from + i), Wide) << 16;
  }
  for (; i < n; ++i) to[i] = widen(from[i]);
}

template <class T>
inline void narrow_run(const Sum<T>* from, int64_t n, T* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, bfloat16>) {
    constexpr int L = MoeShape<float>::kLanes;
    typedef uint16_t Narrow __attribute__((vector_size(2 * L), aligned(2), may_alias));
    typedef uint32_t Wide __attribute__((vector_size(4 * L), aligned(4), may_alias));
#if WS_PAIRS
    for (; i + L <= n; i += L)
      *reinterpret_cast<Narrow*>(to + i) =
          (Narrow)_mm512_cvtneps_pbh(*reinterpret_cast<const __m512_u*>(from + i));
#endif
    for (; i + L <= n; i += L) {
      const Wide bits = *reinterpret_cast<const Wide*>(from + i);
      const Wide rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
      const Wide chosen = (bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
      *reinterpret_cast<Narrow*>(to + i) = __builtin_convertvector(chosen, Narrow);
    }
  }
  for (; i < n; ++i) to[i] = narrow<T>(from[i]);
}

// n sums to where they are not read again soon: past the caches where that is possible, since a
// line that is written whole need not be read first.
template <class R, class S>
inline void write_run(const S* from, int64_t n, R* to) {
#if WS_BYTES == 64
  if (n * sizeof(R) % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    alignas(64) R line[64 / sizeof(R)];
    for (int64_t i = 0; i < n; i += 64 / sizeof(R)) {
      if constexpr (std::is_same_v<R, S>) {
        std::memcpy(line, from + i, 64);
      } else {
        narrow_run(from + i, 64 / sizeof(R), line);
      }
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i),
                          *reinterpret_cast<const __m512i*>(line));
    }
    return;
  }
#endif
  if constexpr (std::is_same_v<R, S>) {
    std::copy_n(from, n, to);
  } else {
    narrow_run(from, n, to);
  }
}

// to += factor * from
template <class S>
inline void add_run(const S* from, S factor, int64_t n, S* to) {
  using V = typename MoeShape<S>::Vector;
  constexpr int L = MoeShape<S>::kLanes;
  int64_t i = 0;
  for (; i + L <= n; i += L)
    *reinterpret_cast<V*>(to + i) += factor * *reinterpret_cast<const V*>(from + i);
  for (; i < n; ++i) to[i] += factor * from[i];
}

// ---- packing ------------------------------------------------------------------------------------

// Two elements as a unit, the first in the low half.
inline uint32_t pair_of(bfloat16 low, bfloat16 high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

inline void pair_run(const bfloat16* __restrict low, const bfloat16* __restrict high, int64_t n,
                     uint32_t* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = pair_of(low[i], high[i]);
}

// Rows of T become lanes: to[unit][lane], for the elements [0, depth) of `lines[lane]`; a null line
// is zero. `zeros` has `depth` elements, `scratch` kDepth of S per lane of a vector.
template <class T>
void pack_lanes(const T* const* lines, int64_t lanes, int64_t depth, const T* zeros,
                Sum<T>* scratch, Unit<T>* to) {
  using S = Sum<T>;
  using U = Unit<T>;
  constexpr int L = MoeShape<S>::kLanes;
  constexpr int64_t kRun = MoeShape<S>::kDepth;
  constexpr bool direct = std::is_same_v<T, S> || kInPairs<T>;
  using Load =
      std::conditional_t<kInPairs<T>, typename MoeShape<S>::Loose, typename Tile<S>::Vector>;
  const int64_t whole = depth / kPer<T>, units = units_of<T>(depth);
  for (int64_t from = 0; from < units; from += kRun) {
    const int64_t run = std::min(kRun, units - from), moved = std::min(run, whole - from);
    // The last group first: a half vector spills into the lanes that the group before it writes.
    for (int64_t group = (lanes - 1) / L * L; group >= 0; group -= L) {
      const U* line[L];
      for (int64_t i = 0; i < L; ++i) {
        const T* row = group + i < lanes ? lines[group + i] : nullptr;
        if (row == nullptr) row = zeros;
        if constexpr (direct) {
          line[i] = reinterpret_cast<const U*>(row) + from;
        } else {
          S* wide = scratch + i * kRun;
          widen_run(row + from, run, wide);
          line[i] = reinterpret_cast<const U*>(wide);
        }
      }
      U* out = to + from * lanes + group;
      const int64_t here = std::min<int64_t>(L, lanes - group);
      int64_t k = 0;
      // A spill past the last unit would leave the panel.
      for (; k + L <= moved && (here == L || from + k + L < units); k += L)
        transpose<S, Load>(reinterpret_cast<const Sum<T>* const*>(line), k,
                           reinterpret_cast<Sum<T>*>(out + k * lanes), lanes);
      for (; k < moved; ++k) {
        for (int64_t i = 0; i < here; ++i) std::memcpy(out + k * lanes + i, line[i] + k, sizeof(U));
      }
      if constexpr (kInPairs<T>) {
        if (moved < run) {  // an odd element, alone
          for (int64_t i = 0; i < here; ++i) {
            const T* row = lines[group + i];
            out[moved * lanes + i] = row == nullptr ? 0 : row[depth - 1].bits;
          }
        }
      }
    }
  }
}

// Rows of T become units: to[unit][n], columns [0, n) of the rows `lines`; the rest of `pitch` is
// zero. Rows are elements of the contraction here.
template <class T>
void pack_units(const T* const* lines, int64_t rows, int64_t n, int64_t col_stride, int64_t pitch,
                Unit<T>* to) {
  for (int64_t r = 0; r < rows; r += kPer<T>, to += pitch) {
    if constexpr (kInPairs<T>) {
      const T *low = lines[r], *high = r + 1 < rows ? lines[r + 1] : nullptr;
      if (high == nullptr) {
        for (int64_t i = 0; i < n; ++i) to[i] = low[i * col_stride].bits;
      } else if (col_stride == 1) {
        pair_run(low, high, n, to);
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] = pair_of(low[i * col_stride], high[i * col_stride]);
      }
    } else {
      const T* row = lines[r];
      if (col_stride == 1) {
        widen_run(row, n, to);
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] = widen(row[i * col_stride]);
      }
    }
    std::fill(to + n, to + pitch, Unit<T>{});
  }
}

// A weight as broadcast operand: lines [j0, j0 + lines) and elements [k0, k0 + depth) of w, whose
// element (k, j) is w[k * k_stride + j * j_stride]. Read in place where units lie in one piece.
template <class T>
Operand operand_of(const T* w, int64_t k_stride, int64_t j_stride, int64_t lines, int64_t depth,
                   Unit<T>* scratch) {
  using U = Unit<T>;
  if (kInPairs<T> && k_stride == 1 && depth % 2 == 0)
    return {reinterpret_cast<const char*>(w), 2 * sizeof(T), j_stride * int64_t{sizeof(T)}, true};
  const bool across = j_stride == 1 && k_stride != 1;
  if (std::is_same_v<T, U> && !across)
    return {reinterpret_cast<const char*>(w), k_stride * int64_t{sizeof(T)},
            j_stride * int64_t{sizeof(T)}, k_stride == 1};
  const int64_t pitch = lines;
  constexpr int64_t kAhead = 32;
  const T* rows[2];
  for (int64_t k = 0; k < depth; k += kPer<T>) {
    for (int64_t i = 0; i < kPer<T>; ++i) rows[i] = w + (k + i) * k_stride;
    if (across && k + kAhead + kPer<T> <= depth) {
      for (int64_t j = 0; j < lines; j += 64 / sizeof(T))
        for (int64_t i = 0; i < kPer<T>; ++i)
          __builtin_prefetch(w + (k + kAhead + i) * k_stride + j, 0, 2);
    }
    pack_units<T>(rows, std::min<int64_t>(kPer<T>, depth - k), lines, j_stride, pitch,
                  scratch + k / kPer<T> * pitch);
  }
  return {reinterpret_cast<const char*>(scratch), pitch * int64_t{sizeof(U)}, sizeof(U)};
}
