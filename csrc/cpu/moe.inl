// The kernels of moe.h for one instruction set; included once per set by isa.h. WS_PAIRS is 1 where
// bfloat16 is multiplied in pairs.

template <class T>
constexpr bool kInPairs = WS_PAIRS && std::is_same_v<T, bfloat16>;
template <class T>
constexpr int kPer = kInPairs<T> ? 2 : 1;  // elements of the contraction per unit
template <class T>
using Unit = std::conditional_t<kInPairs<T>, uint32_t, Sum<T>>;

template <class T>
inline int64_t units_of(int64_t elements) {
  return (elements + kPer<T> - 1) / kPer<T>;
}

template <class S>
struct MoeShape {
  static constexpr int kLanes = WS_BYTES / sizeof(S);
  // A half vector costs half where 512 bits are two passes of 256, and wastes fewer lanes.
  static constexpr int kGrain = WS_BYTES == 64 ? kLanes / 2 : kLanes;
  static constexpr int kVectors = WS_BYTES == 64 ? 4 : 2;
  static constexpr int kRows = kVectors * kLanes;  // lanes of a tile
  static constexpr int kBlock = WS_BYTES == 64 ? 4 : 8;  // tiles worked on together
  static constexpr int kDepth = 1024;  // units per pass; the packed lanes stay in the L2 cache
  // Up to so many rows a weight is met by dot products, which leave no lane of a vector empty.
  // Less than a tile: of an expert's tiles, the last alone may have few.
  static constexpr int kFew = WS_BYTES == 64 ? kRows / 8 : kRows / 4;
  static constexpr int kWide = 96;     // columns packed at a time where a weight runs across
  static constexpr int kWideDepth = 256;
  typedef S Vector __attribute__((vector_size(WS_BYTES), aligned(sizeof(S)), may_alias));
  typedef S Half __attribute__((vector_size(WS_BYTES / 2), aligned(sizeof(S)), may_alias));
};

// A broadcast operand: unit k of line j lies at data + k * unit_step + j * line_step, in bytes.
// Lines that come straight from memory are fetched while those before them are used.
struct Operand {
  const char* data;
  int64_t unit_step, line_step;
  bool fetch = false;

  Operand line(int64_t j) const { return {data + j * line_step, unit_step, line_step, fetch}; }
};

template <class T, class V>
inline void multiply(V& sum, Unit<T> b, const V& a) {
#if WS_PAIRS
  if constexpr (kInPairs<T>) {
    if constexpr (sizeof(V) == 64) {
      sum = (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(b));
    } else {
      sum = (V)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)_mm256_set1_epi32(b));
    }
    return;
  }
#endif
  if constexpr (!kInPairs<T>) sum += b * a;
}

// c[j][lane] (+)= sum over units of a[unit][lane] * b(unit, j), for R lines j and V vectors (and a
// half, H) of lanes.
template <class T, int V, int H, int R>
void moe_tile(const Unit<T>* a, int64_t a_step, Operand b, int64_t units, Sum<T>* c,
              int64_t c_step, bool add) {
  using G = MoeShape<Sum<T>>;
  using Full = typename G::Vector;
  using Half = typename G::Half;
  constexpr int L = G::kLanes;
  Full sum[R][V > 0 ? V : 1];
  Half half[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      sum[r][v] = add ? reinterpret_cast<const Full*>(c + r * c_step)[v] : Full{};
    if (H)
      half[r] = add ? *reinterpret_cast<const Half*>(c + r * c_step + V * L) : Half{};
  }
  const char* line = b.data;
  auto step = [&]() WS_INLINE {
    Full x[V > 0 ? V : 1];
    Half y{};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = reinterpret_cast<const Full*>(a)[v];
    if (H) y = *reinterpret_cast<const Half*>(a + V * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Unit<T> w;
      std::memcpy(&w, line + r * b.line_step, sizeof w);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) multiply<T>(sum[r][v], w, x[v]);
      if (H) multiply<T>(half[r], w, y);
    }
    a += a_step, line += b.unit_step;
  };
  constexpr int64_t kLine = 64 / sizeof(Unit<T>);  // units of a cache line
  int64_t k = 0;
  for (; b.fetch && k + kLine <= units; k += kLine) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) __builtin_prefetch(line + (R + r) * b.line_step, 0, 3);
    for (int64_t i = 0; i < kLine; ++i) step();
  }
  for (; k < units; ++k) step();
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) reinterpret_cast<Full*>(c + r * c_step)[v] = sum[r][v];
    if (H) *reinterpret_cast<Half*>(c + r * c_step + V * L) = half[r];
  }
}

template <class T, int V, int H, int R>
void moe_lines(const Unit<T>* a, int64_t a_step, Operand b, int64_t lines, int64_t units,
               Sum<T>* c, int64_t c_step, bool add) {
  int64_t j = 0;
  for (; j + R <= lines; j += R)
    moe_tile<T, V, H, R>(a, a_step, b.line(j), units, c + j * c_step, c_step, add);
  if constexpr (R > 1) {
    if (j < lines)
      moe_lines<T, V, H, R / 2>(a, a_step, b.line(j), lines - j, units, c + j * c_step, c_step,
                                add);
  }
}

// The same for any number of lines, and of lanes that is a multiple of the grain, up to a tile.
template <class T>
void moe_product(const Unit<T>* a, int64_t a_step, int64_t lanes, Operand b, int64_t lines,
                 int64_t units, Sum<T>* c, int64_t c_step, bool add) {
  using G = MoeShape<Sum<T>>;
  // Registers: lines x vectors of sums, the lanes, one broadcast; 32 with AVX-512, else 16.
  constexpr bool wide = WS_BYTES == 64;
#define WS_LINES(V, H, R) \
  return moe_lines<T, V, H, R>(a, a_step, b, lines, units, c, c_step, add)
  const int64_t grains = lanes / G::kGrain;
  if constexpr (wide) {
    switch (grains) {
      case 1: WS_LINES(0, 1, 8);
      case 2: WS_LINES(1, 0, 8);
      case 3: WS_LINES(1, 1, 8);
      case 4: WS_LINES(2, 0, 8);
      case 5: WS_LINES(2, 1, 8);
      case 6: WS_LINES(3, 0, 8);
      case 7: WS_LINES(3, 1, 6);
      case 8: WS_LINES(4, 0, 6);
    }
  } else {
    if (grains == 1) WS_LINES(1, 0, 8);
    if (grains == 2) WS_LINES(2, 0, 6);
  }
#undef WS_LINES
}

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
        transpose<Sum<T>>(reinterpret_cast<const Sum<T>* const*>(line), k,
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

// ---- activations --------------------------------------------------------------------------------

// e^v within 1 ulp or so, in a form that compilers vectorise; double by the library.
inline float exp_of(float v) {
  v = v < -87.0f ? -87.0f : v;
  v = v > 88.0f ? 88.0f : v;
  const float shifted = v * 1.44269504f + 12582912.0f;  // the integer ends up in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}
inline double exp_of(double v) { return std::exp(v); }

// 2 Phi(v), Phi the normal distribution; accurate relative to itself on both sides.
inline float twice_phi(float v) {
  const float z = std::fabs(v) * 0.70710678f;
  // erfc(z) = t exp(-z^2 + P(t)), t = 1 / (1 + z / 2): a Chebyshev fit, 1.2e-7 relative.
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const float tail = t * exp_of(p - z * z);
  return v < 0 ? tail : 2.0f - tail;
}
inline double twice_phi(double v) { return std::erfc(-v * 0.70710678118654752440); }

// Hidden unit of a gate (or the only) and an up pre-activation, and the derivatives to both.
template <Activation A, class S>
struct Active {
  S value, by_gate, by_up;

  Active(S g, S u) {
    if constexpr (A == Activation::swiglu) {
      const S s = S(1) / (S(1) + exp_of(-g));
      value = g * s * u;
      by_gate = s * (S(1) + g * (S(1) - s)) * u;
      by_up = g * s;
    } else if constexpr (A == Activation::gelu) {
      const S phi = S(0.5) * twice_phi(g);
      value = g * phi;
      by_gate = phi + g * S(0.39894228040143267794) * exp_of(S(-0.5) * g * g);
      by_up = 0;
    } else {
      const S v = g > 0 ? g : (g != g ? g : S(0));
      value = v * v;
      by_gate = 2 * v;
      by_up = 0;
    }
  }
};

template <class F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::swiglu:
      return f(std::integral_constant<Activation, Activation::swiglu>());
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>());
    case Activation::relu2:
      return f(std::integral_constant<Activation, Activation::relu2>());
  }
}

// Hidden units of n pre-activations.
template <Activation A, class S>
void activate_run(const S* __restrict gate, const S* __restrict up, int64_t n, S* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = Active<A, S>(gate[i], up[i]).value;
}

// Where `across` is the gradient of the hidden units of a line, less the gates `weight`.
template <class S>
struct GradLine {
  const S *across, *gate, *up, *weight;
  S *total, *by_gate, *by_up, *gated;
};

template <Activation A, class S>
void grad_run(const GradLine<S>& line, int64_t n) {
  const S *__restrict across = line.across, *__restrict gate = line.gate;
  const S *__restrict up = line.up, *__restrict weight = line.weight;
  S *__restrict total = line.total, *__restrict by_gate = line.by_gate;
  S *__restrict by_up = line.by_up, *__restrict gated = line.gated;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const Active<A, S> active(gate[i], up[i]);
    const S scaled = weight[i] * across[i];
    total[i] += across[i] * active.value;
    by_gate[i] = scaled * active.by_gate;
    by_up[i] = scaled * active.by_up;
    gated[i] = weight[i] * active.value;
  }
}

// ---- moving tiles -------------------------------------------------------------------------------

// Calls body(row, first column, values, count) for every row of lanes of c [lines][lanes], in
// pieces of up to a vector: c turned by squares.
template <class S, class F>
void each_row(const S* c, int64_t lanes, int64_t lines, int64_t rows, const F& body) {
  constexpr int L = MoeShape<S>::kLanes;
  alignas(64) S square[L][L], copy[L][L];
  for (int64_t j = 0; j < lines; j += L) {
    const int64_t n = std::min<int64_t>(L, lines - j);
    for (int64_t i = 0; i < rows; i += L) {
      const S* line[L];
      for (int64_t r = 0; r < L; ++r) line[r] = c + (j + std::min(r, n - 1)) * lanes + i;
      if (i + L > lanes) {  // a half vector: reading a whole one would leave the tile
        for (int64_t r = 0; r < L; ++r) {
          for (int64_t l = 0; l < L; ++l) copy[r][l] = i + l < lanes ? line[r][l] : S{};
          line[r] = copy[r];
        }
      }
      transpose<S>(line, 0, square[0], L);
      const int64_t m = std::min<int64_t>(L, rows - i);
      for (int64_t l = 0; l < m; ++l) body(i + l, j, square[l], n);
    }
  }
}

// to[line][lane] = element (lane, line) of rows `stride` apart; lanes beyond `rows` are zero.
template <class T>
void turn_rows(const T* from, int64_t stride, int64_t rows, int64_t lines, int64_t lanes,
               Sum<T>* to) {
  using S = Sum<T>;
  constexpr int L = MoeShape<S>::kLanes;
  alignas(64) S square[L][L], turned[L][L];
  for (int64_t i = 0; i < lanes; i += L) {
    const int64_t m = std::min<int64_t>(L, lanes - i);
    for (int64_t j = 0; j < lines; j += L) {
      const int64_t n = std::min<int64_t>(L, lines - j);
      const S* line[L];
      for (int64_t l = 0; l < L; ++l) {
        line[l] = square[l];
        if (i + l >= rows) {
          std::fill_n(square[l], L, S{});
        } else {
          widen_run(from + (i + l) * stride + j, n, square[l]);
        }
      }
      if (m == L && n == L) {
        transpose<S>(line, 0, to + j * lanes + i, lanes);
        continue;
      }
      transpose<S>(line, 0, turned[0], L);
      for (int64_t c = 0; c < n; ++c) std::copy_n(turned[c], m, to + (j + c) * lanes + i);
    }
  }
}

// ---- scratch ------------------------------------------------------------------------------------

// A thread's scratch, one piece of memory that stays with it.
class MoeScratch {
 public:
  template <class... P>
  explicit MoeScratch(std::pair<P**, int64_t>... wanted) {
    constexpr size_t kAlign = 64;
    const size_t sizes[] = {
        (static_cast<size_t>(wanted.second) * sizeof(P) + 2 * kAlign) / kAlign * kAlign...};
    size_t total = 0;
    for (size_t size : sizes) total += size;
    static thread_local std::vector<char> kept;
    if (kept.size() < total + kAlign) kept.resize(total + kAlign);
    char* at = kept.data();
    at += (kAlign - reinterpret_cast<uintptr_t>(at) % kAlign) % kAlign;
    size_t number = 0;
    ((*wanted.first = reinterpret_cast<P*>(at), at += sizes[number++]), ...);
  }
};

template <class P>
std::pair<P**, int64_t> room(P*& pointer, int64_t count) {
  return {&pointer, count};
}

// Pointers to the rows of a tile in a matrix with a row per token; null beyond the last.
template <class T>
void rows_of_tile(const Moe<T>& moe, const MoeTile& tile, const T* data, int64_t stride,
                  const T** lines) {
  for (int64_t i = 0; i < tile.lanes; ++i)
    lines[i] = i < tile.rows ? data + moe.token[tile.row + i] * stride : nullptr;
}

// Cuts the rows of every expert into tiles, and tiles into blocks.
template <class T>
void moe_plan(Moe<T>& moe, const int64_t* offsets) {
  using G = MoeShape<Sum<T>>;
  moe.lanes = 0;
  for (int64_t e = 0; e < moe.experts; ++e) {
    moe.first_tile.push_back(moe.tiles.size());
    for (int64_t row = offsets[e]; row < offsets[e + 1]; row += G::kRows) {
      const int64_t rows = std::min<int64_t>(G::kRows, offsets[e + 1] - row);
      const int64_t lanes = (rows + G::kGrain - 1) / G::kGrain * G::kGrain;
      const int64_t number = moe.tiles.size();
      if ((number - moe.first_tile[e]) % G::kBlock == 0)
        moe.blocks.push_back({e, number, number, 0});
      moe.blocks.back().last = number + 1;
      moe.blocks.back().lanes += lanes;
      moe.tiles.push_back({e, row, rows, lanes, moe.lanes});
      moe.lanes += lanes;
    }
  }
  moe.first_tile.push_back(moe.tiles.size());
}

// ---- forward ------------------------------------------------------------------------------------

// sums[line][row] = w_line . x_row over `units`, for few rows: a weight streams past once.
template <class T, int M>
void moe_dots(const Unit<T>* const* x, const T* const* w, int64_t depth, int64_t ahead,
              Sum<T> (*sums)[4]) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  using V = typename G::Vector;
  constexpr int L = G::kLanes, J = 4;
  V acc[M][J];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) acc[m][j] = V{};
  }
  auto load = [](const T* p) WS_INLINE {
    if constexpr (kInPairs<T>) {
      return *reinterpret_cast<const V*>(p);
    } else {
      return wide_load(p);
    }
  };
  auto step = [&](const T* const* lines, const Unit<T>* const* rows, int64_t k) WS_INLINE {
    V b[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) b[j] = load(lines[j] + k * kPer<T>);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V a = *reinterpret_cast<const V*>(rows[m] + k);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
#if WS_PAIRS
        if constexpr (kInPairs<T>) {
          acc[m][j] = (V)_mm512_dpbf16_ps((__m512)acc[m][j], (__m512bh)a, (__m512bh)b[j]);
          continue;
        }
#endif
        if constexpr (!kInPairs<T>) acc[m][j] += a * b[j];
      }
    }
  };
  const int64_t whole = depth / kPer<T> / L * L;
  for (int64_t k = 0; k < whole; k += L) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) __builtin_prefetch(w[j] + k * kPer<T> + ahead, 0, 2);
    step(w, x, k);
  }
  if (whole * kPer<T> < depth) {  // the rest, filled up with zeros
    T line[J][L * kPer<T>] = {};
    Unit<T> row[M][L] = {};
    const T* lines[J];
    const Unit<T>* rows[M];
    const int64_t done = whole * kPer<T>;
    for (int j = 0; j < J; ++j) {
      std::copy_n(w[j] + done, depth - done, line[j]);
      lines[j] = line[j];
    }
    for (int m = 0; m < M; ++m) {
      std::copy_n(x[m] + whole, units_of<T>(depth) - whole, row[m]);
      rows[m] = row[m];
    }
    step(lines, rows, 0);
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      S lanes[L];
      *reinterpret_cast<V*>(lanes) = acc[m][j];
      sums[j][m] = sum_of_lanes(lanes);
    }
  }
}

template <class T, int M = 4>
void any_moe_dots(int64_t rows, const Unit<T>* const* x, const T* const* w, int64_t depth,
                  int64_t ahead, Sum<T> (*sums)[4]) {
  if (rows == M) {
    moe_dots<T, M>(x, w, depth, ahead, sums);
  } else if constexpr (M > 1) {
    any_moe_dots<T, M - 1>(rows, x, w, depth, ahead, sums);
  }
}

// sums[row][j - j0] = w_j . x_row for the lines [j0, j1) of a weight, few rows.
template <class T>
void dots_of_lines(const Unit<T>* x, int64_t rows, int64_t pitch, const T* w, int64_t stride,
                   int64_t j0, int64_t j1, int64_t depth, Sum<T>* sums) {
  constexpr int64_t kTile = 4, kDistance = 16384 / sizeof(T);
  const int64_t ahead = (kDistance + kTile * stride - 1) / (kTile * stride) * kTile * stride;
  Sum<T> tile[kTile][kTile];
  for (int64_t j = j0; j < j1; j += kTile) {
    const T* lines[kTile];
    for (int64_t i = 0; i < kTile; ++i) lines[i] = w + std::min(j + i, j1 - 1) * stride;
    for (int64_t m = 0; m < rows; m += kTile) {
      const int64_t count = std::min(kTile, rows - m);
      const Unit<T>* row[kTile];
      for (int64_t i = 0; i < count; ++i) row[i] = x + (m + i) * pitch;
      any_moe_dots<T>(count, row, lines, depth, ahead, tile);
      for (int64_t i = 0; i < count; ++i) {
        Sum<T>* to = sums + (m + i) * kMoeChunk + j - j0;
        for (int64_t l = 0; l < std::min(kTile, j1 - j); ++l) to[l] = tile[l][i];
      }
    }
  }
}

// A row of T as units: widened, or as it is.
template <class T>
void copy_units(const T* from, int64_t depth, Unit<T>* to) {
  if constexpr (kInPairs<T>) {
    to[units_of<T>(depth) - 1] = 0;
    std::memcpy(to, from, depth * sizeof(T));
  } else {
    widen_run(from, depth, to);
  }
}

template <class T>
int64_t depth_of(const Moe<T>& moe) {
  return units_of<T>(moe.width);
}

// Whether a tile meets the weights by dot products, as one row after another.
template <class T>
bool few_rows(const Moe<T>& moe, const MoeTile& tile) {
  return moe.few && tile.rows <= MoeShape<Sum<T>>::kFew;
}

// Hidden units [c0, c0 + n) of few rows, from their sums [row][kMoeChunk].
template <class T>
void store_few(const Moe<T>& moe, const MoeTile& tile, int64_t c0, int64_t n, const Sum<T>* gates,
               const Sum<T>* ups, const MoeHidden<T>& to) {
  using S = Sum<T>;
  const int64_t depth = depth_of(moe), pitch = moe.parts() * moe.width;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const S *gate = gates + i * kMoeChunk, *up = ups + i * kMoeChunk;
    S value[kMoeChunk + 1];
    with_activation(moe.activation,
                    [&](auto act) WS_INLINE { activate_run<act.value>(gate, up, n, value); });
    value[n] = 0;
    Unit<T>* a = static_cast<Unit<T>*>(to.a) + tile.at * depth + i * depth;
    if constexpr (kInPairs<T>) {
      T line[kMoeChunk + 1];
      narrow_run(value, n + 1, line);
      std::memcpy(a + c0 / 2, line, units_of<T>(n) * sizeof(Unit<T>));
    } else {
      std::copy_n(value, n, a + c0);
    }
    for (int64_t part = 0; to.h != nullptr && part < moe.parts(); ++part)
      narrow_run(part ? up : gate, n, to.h + (tile.row + i) * pitch + part * moe.width + c0);
  }
}

// Sums of a chunk of lines for one tile: [line][lanes].
template <class T>
void store_hidden(const Moe<T>& moe, const MoeTile& tile, int64_t c0, int64_t n, const Sum<T>* gate,
                  const Sum<T>* up, const MoeHidden<T>& to) {
  using S = Sum<T>;
  const int64_t lanes = tile.lanes;
  Unit<T>* a = static_cast<Unit<T>*>(to.a) + tile.at * depth_of(moe) + c0 / kPer<T> * lanes;
  with_activation(moe.activation, [&](auto act) WS_INLINE {
    if constexpr (kInPairs<T>) {
      S value[MoeShape<S>::kRows];
      T low[MoeShape<S>::kRows], high[MoeShape<S>::kRows] = {};
      for (int64_t j = 0; j < n; j += 2, a += lanes) {
        activate_run<act.value>(gate + j * lanes, up + j * lanes, lanes, value);
        narrow_run(value, lanes, low);
        if (j + 1 < n) {
          activate_run<act.value>(gate + (j + 1) * lanes, up + (j + 1) * lanes, lanes, value);
          narrow_run(value, lanes, high);
        } else {
          std::fill_n(high, lanes, T{});
        }
        pair_run(low, high, lanes, a);
      }
    } else {
      activate_run<act.value>(gate, up, n * lanes, a);
    }
  });
  if (to.h == nullptr) return;
  const int64_t pitch = moe.parts() * moe.width;
  for (int64_t part = 0; part < moe.parts(); ++part) {
    each_row(part ? up : gate, lanes, n, tile.rows,
             [&](int64_t i, int64_t j, const S* values, int64_t count) WS_INLINE {
               narrow_run(values, count,
                          to.h + (tile.row + i) * pitch + part * moe.width + c0 + j);
             });
  }
}

template <class T>
void moe_up(const Moe<T>& moe, MoeShare share, const MoeHidden<T>& to) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  const int64_t units = units_of<T>(moe.d), tile_sums = kMoeChunk * G::kRows;
  share.each(moe, [&](const MoeBlock& block, int64_t chunk0, int64_t chunk1) {
    const int64_t width = moe.widths[block.expert], f0 = chunk0 * kMoeChunk;
    const int64_t f1 = std::min(width, chunk1 * kMoeChunk), tiles = block.last - block.first;
    Unit<T>*x, *packed;
    S *sums, *wide;
    T* zeros;
    MoeScratch scratch(room(x, (G::kBlock * G::kRows + G::kLanes) * units),
                       room(packed, kMoeChunk * units), room(sums, 2 * G::kBlock * tile_sums),
                       room(wide, G::kLanes * G::kDepth), room(zeros, moe.d + 64));
    std::fill_n(zeros, moe.d, T{});
    Unit<T>* panels[G::kBlock];
    const T* lines[G::kRows];
    Unit<T>* next = x;
    for (int64_t t = 0; t < tiles; ++t) {
      const MoeTile& tile = moe.tiles[block.first + t];
      panels[t] = next;
      next += tile.lanes * units;
      rows_of_tile(moe, tile, moe.x, moe.x_stride, lines);
      if (few_rows(moe, tile)) {
        for (int64_t i = 0; i < tile.rows; ++i) copy_units(lines[i], moe.d, panels[t] + i * units);
      } else {
        pack_lanes<T>(lines, tile.lanes, moe.d, zeros, wide, panels[t]);
      }
    }
    const bool few = few_rows(moe, moe.tiles[block.last - 1]);  // the last tile alone may be
    const int64_t full = tiles - few;
    for (int64_t c0 = f0; c0 < f1; c0 += kMoeChunk) {
      const int64_t n = std::min(kMoeChunk, f1 - c0);
      for (int64_t part = 0; part < moe.parts(); ++part) {
        S* here = sums + part * G::kBlock * tile_sums;
        for (int64_t k0 = 0; full > 0 && (k0 < units || k0 == 0); k0 += G::kDepth) {
          const int64_t run = std::min<int64_t>(G::kDepth, units - k0);
          const int64_t depth = std::min(moe.d - k0 * kPer<T>, run * kPer<T>);
          const Operand w =
              operand_of<T>(moe.gate_up.at(block.expert, part * moe.f + c0, k0 * kPer<T>),
                            moe.gate_up.col_stride, moe.gate_up.row_stride, n, depth, packed);
          for (int64_t t = 0; t < full; ++t) {
            const int64_t lanes = moe.tiles[block.first + t].lanes;
            moe_product<T>(panels[t] + k0 * lanes, lanes, lanes, w, n, run, here + t * tile_sums,
                           lanes, k0 > 0);
          }
        }
        if (few) {
          dots_of_lines<T>(panels[full], moe.tiles[block.last - 1].rows, units,
                           moe.gate_up.at(block.expert, part * moe.f, 0), moe.gate_up.row_stride,
                           c0, c0 + n, moe.d, here + full * tile_sums);
        }
      }
      for (int64_t t = 0; t < tiles; ++t) {
        const S* gate = sums + t * tile_sums;
        const S* up = moe.parts() == 2 ? gate + G::kBlock * tile_sums : gate;
        if (t < full) {
          store_hidden(moe, moe.tiles[block.first + t], c0, n, gate, up, to);
        } else {
          store_few(moe, moe.tiles[block.first + t], c0, n, gate, up, to);
        }
      }
    }
  });
}

// The sums of a tile, times the gates where given, added to the rows of its tokens.
template <class T>
void scatter(const Moe<T>& moe, const MoeTile& tile, const Sum<T>* sums, int64_t n, bool gated,
             Sum<T>* to) {
  using S = Sum<T>;
  each_row(sums, tile.lanes, n, tile.rows,
           [&](int64_t i, int64_t j, const S* values, int64_t count) WS_INLINE {
             add_run(values, gated ? moe.gate[tile.row + i] : S(1), count,
                     to + moe.token[tile.row + i] * moe.d + j);
           });
}

// Second product: columns [n0, n1) of the result, rows of all tokens, in the order of the experts.
template <class T>
void moe_down(const Moe<T>& moe, int64_t n0, int64_t n1, const void* packed_hidden, Sum<T>* y) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  const auto* hidden = static_cast<const Unit<T>*>(packed_hidden);
  const int64_t pitch = depth_of(moe), tile_sums = kMoeChunk * G::kRows;
  Unit<T>* packed;
  S* sums;
  MoeScratch scratch(room(packed, kMoeChunk * pitch), room(sums, G::kBlock * tile_sums));
  for (int64_t t = 0; t < moe.tokens; ++t) std::fill_n(y + t * moe.d + n0, n1 - n0, S{});
  for (const MoeBlock& block : moe.blocks) {
    const int64_t width = moe.widths[block.expert], units = units_of<T>(width);
    const MoeTile& tail = moe.tiles[block.last - 1];
    const bool few = few_rows(moe, tail);
    const int64_t full = block.last - few;
    for (int64_t c0 = n0; c0 < n1; c0 += kMoeChunk) {
      const int64_t n = std::min(kMoeChunk, n1 - c0);
      for (int64_t k0 = 0; full > block.first && k0 < units; k0 += G::kDepth) {
        const int64_t run = std::min<int64_t>(G::kDepth, units - k0);
        const int64_t depth = std::min(width - k0 * kPer<T>, run * kPer<T>);
        const Operand w = operand_of<T>(moe.down.at(block.expert, c0, k0 * kPer<T>),
                                        moe.down.col_stride, moe.down.row_stride, n, depth, packed);
        for (int64_t t = block.first; t < full; ++t) {
          const MoeTile& tile = moe.tiles[t];
          moe_product<T>(hidden + tile.at * pitch + k0 * tile.lanes, tile.lanes, tile.lanes, w, n,
                         run, sums + (t - block.first) * tile_sums, tile.lanes, k0 > 0);
        }
      }
      for (int64_t t = block.first; units > 0 && t < full; ++t)
        scatter(moe, moe.tiles[t], sums + (t - block.first) * tile_sums, n, true, y + c0);
      if (few) {
        dots_of_lines<T>(hidden + tail.at * pitch, tail.rows, pitch,
                         moe.down.at(block.expert, 0, 0), moe.down.row_stride, c0, c0 + n, width,
                         sums);
        for (int64_t i = 0; i < tail.rows; ++i)
          add_run(sums + i * kMoeChunk, moe.gate[tail.row + i], n,
                  y + moe.token[tail.row + i] * moe.d + c0);
      }
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------

template <class T>
void grad_activation(const Moe<T>& moe, const MoeTile& tile, int64_t c0, int64_t n,
                     const Sum<T>* across, const Sum<T>* gate, const Sum<T>* up,
                     Sum<T>* work, const MoeGradHidden<T>& to) {
  using S = Sum<T>;
  const int64_t lanes = tile.lanes, depth = depth_of(moe), parts = moe.parts();
  S *by_gate = work, *by_up = work + n * lanes, *gated = work + 2 * n * lanes;
  S weight[MoeShape<S>::kRows], total[MoeShape<S>::kRows];
  for (int64_t i = 0; i < lanes; ++i) {
    weight[i] = i < tile.rows ? moe.gate[tile.row + i] : S{};
    total[i] = S{};
  }
  with_activation(moe.activation, [&](auto act) WS_INLINE {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t at = j * lanes;
      grad_run<act.value, S>({across + at, gate + at, up + at, weight, total, by_gate + at,
                              by_up + at, gated + at},
                             lanes);
    }
  });
  std::copy_n(total, tile.rows, to.gates + c0 / kMoeChunk * to.rows + tile.row);
  for (int64_t part = 0; part < parts; ++part) {
    const S* from = part ? by_up : by_gate;
    Unit<T>* out = static_cast<Unit<T>*>(to.dh) + (tile.at * parts + part * lanes) * depth + c0 / kPer<T> * lanes;
    if constexpr (kInPairs<T>) {
      T* plain = to.dh_rows + (tile.at * parts + part * lanes) * moe.width + c0 * lanes;
      narrow_run(from, n * lanes, plain);
      const T none[MoeShape<S>::kRows] = {};
      for (int64_t j = 0; j < n; j += 2, out += lanes)
        pair_run(plain + j * lanes, j + 1 < n ? plain + (j + 1) * lanes : none, lanes, out);
    } else {
      std::copy_n(from, n * lanes, out);
    }
  }
  // Pairs of lanes are as good as floats where they are only moved.
  const int64_t pairs = lanes / kPer<T>;
  if constexpr (kInPairs<T>) narrow_run(gated, n * lanes, reinterpret_cast<T*>(by_gate));
  Unit<T>* units = static_cast<Unit<T>*>(to.gated) + tile.at / kPer<T> * to.pitch + c0;
  each_row(kInPairs<T> ? by_gate : gated, pairs, n, pairs,
           [&](int64_t i, int64_t j, const S* values, int64_t count) WS_INLINE {
             std::memcpy(units + i * to.pitch + j, values, count * sizeof(S));
           });
}

// The gradient of the hidden units and all that follows from it row by row.
template <class T>
void moe_grad_hidden(const Moe<T>& moe, MoeShare share, const T* grad, int64_t grad_stride,
                     const T* h, const MoeGradHidden<T>& to) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  constexpr int64_t kSums = G::kWide * G::kRows;
  const int64_t units = units_of<T>(moe.d), pitch = moe.parts() * moe.width;
  share.each(moe, [&](const MoeBlock& block, int64_t chunk0, int64_t chunk1) {
    const int64_t width = moe.widths[block.expert], f0 = chunk0 * kMoeChunk;
    const int64_t f1 = std::min(width, chunk1 * kMoeChunk), tiles = block.last - block.first;
    Unit<T>*dy, *packed;
    S *sums, *wide, *work;
    T* zeros;
    MoeScratch scratch(room(dy, (G::kBlock * G::kRows + G::kLanes) * units),
                       room(packed, G::kWide * G::kDepth), room(sums, G::kBlock * kSums),
                       room(wide, G::kLanes * G::kDepth), room(work, 5 * kMoeChunk * G::kRows),
                       room(zeros, moe.d + 64));
    std::fill_n(zeros, moe.d, T{});
    Unit<T>* panels[G::kBlock];
    const T* lines[G::kRows];
    Unit<T>* next = dy;
    for (int64_t t = 0; t < tiles; ++t) {
      const MoeTile& tile = moe.tiles[block.first + t];
      panels[t] = next;
      next += tile.lanes * units;
      rows_of_tile(moe, tile, grad, grad_stride, lines);
      pack_lanes<T>(lines, tile.lanes, moe.d, zeros, wide, panels[t]);
    }
    for (int64_t c0 = f0; c0 < f1; c0 += G::kWide) {
      const int64_t n = std::min<int64_t>(G::kWide, f1 - c0);
      for (int64_t k0 = 0; k0 < units; k0 += G::kWideDepth) {
        const int64_t run = std::min<int64_t>(G::kWideDepth, units - k0);
        const int64_t depth = std::min(moe.d - k0 * kPer<T>, run * kPer<T>);
        const Operand w = operand_of<T>(moe.down.at(block.expert, k0 * kPer<T>, c0),
                                        moe.down.row_stride, moe.down.col_stride, n, depth, packed);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t lanes = moe.tiles[block.first + t].lanes;
          moe_product<T>(panels[t] + k0 * lanes, lanes, lanes, w, n, run, sums + t * kSums, lanes,
                         k0 > 0);
        }
      }
      for (int64_t t = 0; t < tiles; ++t) {
        const MoeTile& tile = moe.tiles[block.first + t];
        if (units == 0) std::fill_n(sums + t * kSums, n * tile.lanes, S{});
        for (int64_t j = 0; j < n; j += kMoeChunk) {
          const int64_t m = std::min(kMoeChunk, n - j), size = m * tile.lanes;
          S *gate = work, *up = work + (moe.parts() - 1) * size;
          for (int64_t part = 0; part < moe.parts(); ++part)
            turn_rows(h + tile.row * pitch + part * moe.width + c0 + j, pitch, tile.rows, m,
                      tile.lanes, part ? up : gate);
          grad_activation(moe, tile, c0 + j, m, sums + t * kSums + j * tile.lanes, gate, up,
                          work + 2 * size, to);
        }
      }
    }
  });
}

// Columns [n0, n1) of the gradient of x, summed over a token's experts in their order.
template <class T>
void moe_grad_x(const Moe<T>& moe, int64_t n0, int64_t n1, const void* packed_dh, Sum<T>* dx) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  const auto* dh = static_cast<const Unit<T>*>(packed_dh);
  constexpr int64_t kSums = G::kWide * G::kRows;
  const int64_t pitch = depth_of(moe), parts = moe.parts();
  Unit<T>* packed;
  S* sums;
  MoeScratch scratch(room(packed, G::kWide * G::kDepth), room(sums, G::kBlock * kSums));
  for (int64_t t = 0; t < moe.tokens; ++t) std::fill_n(dx + t * moe.d + n0, n1 - n0, S{});
  for (const MoeBlock& block : moe.blocks) {
    const int64_t width = moe.widths[block.expert], units = units_of<T>(width);
    for (int64_t c0 = n0; units > 0 && c0 < n1; c0 += G::kWide) {
      const int64_t n = std::min<int64_t>(G::kWide, n1 - c0);
      for (int64_t part = 0; part < parts; ++part) {
        for (int64_t k0 = 0; k0 < units; k0 += G::kWideDepth) {
          const int64_t run = std::min<int64_t>(G::kWideDepth, units - k0);
          const int64_t depth = std::min(width - k0 * kPer<T>, run * kPer<T>);
          const Operand w =
              operand_of<T>(moe.gate_up.at(block.expert, part * moe.f + k0 * kPer<T>, c0),
                            moe.gate_up.row_stride, moe.gate_up.col_stride, n, depth, packed);
          for (int64_t t = block.first; t < block.last; ++t) {
            const MoeTile& tile = moe.tiles[t];
            const Unit<T>* a = dh + (tile.at * parts + part * tile.lanes) * pitch + k0 * tile.lanes;
            moe_product<T>(a, tile.lanes, tile.lanes, w, n, run, sums + (t - block.first) * kSums,
                           tile.lanes, part > 0 || k0 > 0);
          }
        }
      }
      for (int64_t t = block.first; t < block.last; ++t)
        scatter(moe, moe.tiles[t], sums + (t - block.first) * kSums, n, false, dx + c0);
    }
  }
}

// Rows of a gradient: to[j][c] (+)= sum over tiles of lanes[unit][c] * operand(unit, j).
template <class T, class R>
struct MoeOuter {
  const Unit<T>* lanes;  // of the first tile
  int64_t pitch;
  R* to;
  int64_t row_stride, col_stride;
  bool add;
};

template <class T, class R, class F, class At>
void moe_outer(const MoeOuter<T, R>& o, int64_t tiles, int64_t lines, int64_t n, const F& operand,
               const At& place) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  constexpr int64_t kLines = 24, kRows = G::kRows;
  alignas(64) S sums[kLines * kRows];
  for (int64_t j = 0; j < lines; j += kLines) {
    const int64_t m = std::min(kLines, lines - j);
    for (int64_t c = 0; c < n; c += kRows) {
      const int64_t here = std::min(kRows, n - c);
      const int64_t lanes = (here + G::kGrain - 1) / G::kGrain * G::kGrain;
      const bool direct = std::is_same_v<R, S> && o.col_stride == 1 && lanes == here && o.add;
      S* to = direct ? reinterpret_cast<S*>(o.to + j * o.row_stride + c) : sums;
      for (int64_t t = 0; t < tiles; ++t) {
        const auto [start, units] = place(t);
        moe_product<T>(o.lanes + start * o.pitch + c, o.pitch, lanes, operand(t, j), m, units, to,
                       direct ? o.row_stride : kRows, t > 0 || (direct && o.add));
      }
      if (direct) continue;
      for (int64_t r = 0; r < m; ++r) {
        R* row = o.to + (j + r) * o.row_stride + c * o.col_stride;
        if (o.col_stride == 1 && !o.add) {
          write_run(sums + r * kRows, here, row);
          continue;
        }
        for (int64_t i = 0; i < here; ++i) {
          R& cell = row[i * o.col_stride];
          cell = narrow<R>(sums[r * kRows + i] + (o.add ? widen(cell) : S{}));
        }
      }
    }
  }
}

template <class R>
void clear_rows(const Stack<R>& to, int64_t e, int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
  for (int64_t r = r0; r < r1; ++r) {
    R* row = to.at(e, r, c0);
    if (to.col_stride == 1) {
      std::fill_n(row, c1 - c0, R{});
    } else {
      for (int64_t c = 0; c < c1 - c0; ++c) row[c * to.col_stride] = R{};
    }
  }
}

// Rows [r0, r1) of an expert's gate_up gradient, dh^T x.
template <class T, class R>
void moe_grad_gate_up(const Moe<T>& moe, int64_t e, int64_t r0, int64_t r1,
                      const MoeGradHidden<T>& from, const Stack<R>& to, bool add) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  const int64_t first = moe.first_tile[e], tiles = moe.first_tile[e + 1] - first;
  const int64_t width = tiles ? moe.widths[e] : 0, parts = moe.parts();
  std::vector<int64_t> starts(tiles + 1);
  for (int64_t t = 0; t < tiles; ++t)
    starts[t + 1] = starts[t] + units_of<T>(moe.tiles[first + t].rows);
  const int64_t most = std::max<int64_t>(1, starts[tiles]);
  const int64_t group = std::max<int64_t>(
      G::kRows, std::min<int64_t>(moe.d, 65536 / most) / G::kRows * G::kRows);
  const int64_t pitch = std::min(group, moe.d) + G::kRows;
  Unit<T>* x;
  MoeScratch scratch(room(x, most * pitch));
  for (int64_t c0 = 0; c0 < moe.d; c0 += group) {
    const int64_t n = std::min(group, moe.d - c0);
    for (int64_t t = 0; t < tiles; ++t) {
      const MoeTile& tile = moe.tiles[first + t];
      const T* lines[G::kRows];
      rows_of_tile(moe, tile, moe.x + c0, moe.x_stride, lines);
      pack_units<T>(lines, tile.rows, n, 1, pitch, x + starts[t] * pitch);
    }
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t low = part * moe.f, j0 = std::max(r0, low), j1 = std::min(r1, low + width);
      if (j0 < j1) {
        const MoeOuter<T, R> o{x, pitch, to.at(e, j0, c0), to.row_stride, to.col_stride, add};
        moe_outer(
            o, tiles, j1 - j0, n,
            [&](int64_t t, int64_t j) {
              const MoeTile& tile = moe.tiles[first + t];
              const int64_t line = j0 - low + j, lanes = tile.lanes;
              if constexpr (kInPairs<T>) {
                const T* at = from.dh_rows + (tile.at * parts + part * lanes) * moe.width;
                return Operand{reinterpret_cast<const char*>(at + line * lanes), 2 * sizeof(T),
                               lanes * int64_t{sizeof(T)}};
              } else {
                const S* at = static_cast<const S*>(from.dh) + (tile.at * parts + part * lanes) * depth_of(moe);
                return Operand{reinterpret_cast<const char*>(at + line * lanes), sizeof(S),
                               lanes * int64_t{sizeof(S)}};
              }
            },
            [&](int64_t t) { return std::pair(starts[t], starts[t + 1] - starts[t]); });
      }
      if (!add)
        clear_rows(to, e, std::max(r0, low + width), std::min(r1, low + moe.f), c0, c0 + n);
    }
  }
}

// Rows [r0, r1) of an expert's down gradient, dy^T (gate a).
template <class T, class R>
void moe_grad_down(const Moe<T>& moe, int64_t e, int64_t r0, int64_t r1, const T* grad,
                   int64_t grad_stride, const MoeGradHidden<T>& from, const Stack<R>& to,
                   bool add) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  const int64_t first = moe.first_tile[e], tiles = moe.first_tile[e + 1] - first;
  const int64_t width = tiles ? moe.widths[e] : 0;
  std::vector<int64_t> starts(tiles + 1);
  for (int64_t t = 0; t < tiles; ++t)
    starts[t + 1] = starts[t] + units_of<T>(moe.tiles[first + t].rows);
  Unit<T>* dy;
  MoeScratch scratch(room(dy, std::max<int64_t>(1, starts[tiles]) * G::kWide));
  for (int64_t j0 = r0; width > 0 && j0 < r1; j0 += G::kWide) {
    const int64_t lines = std::min<int64_t>(G::kWide, r1 - j0);
    for (int64_t t = 0; t < tiles; ++t) {
      const MoeTile& tile = moe.tiles[first + t];
      const T* rows[G::kRows];
      rows_of_tile(moe, tile, grad + j0, grad_stride, rows);
      pack_units<T>(rows, tile.rows, lines, 1, lines, dy + starts[t] * lines);
    }
    const int64_t base = moe.tiles[first].at / kPer<T>;
    const MoeOuter<T, R> o{static_cast<const Unit<T>*>(from.gated) + base * from.pitch, from.pitch, to.at(e, j0, 0),
                           to.row_stride, to.col_stride, add};
    moe_outer(
        o, tiles, lines, width,
        [&](int64_t t, int64_t j) {
          return Operand{reinterpret_cast<const char*>(dy + starts[t] * lines + j),
                         lines * int64_t{sizeof(Unit<T>)}, sizeof(Unit<T>)};
        },
        [&](int64_t t) {
          return std::pair(moe.tiles[first + t].at / kPer<T> - base, starts[t + 1] - starts[t]);
        });
  }
  if (!add) clear_rows(to, e, r0, r1, width, moe.f);
}
