// Vectors of elements, widened to the type of sums as they are loaded: shard.h, one instruction
// set.

template <class S>
using Vector = typename MoeShape<S>::Vector;

// A vector of sums from elements of P.
template <class S, class P>
inline Vector<S> load_lanes(const P* p) {
  using V = Vector<S>;
  if constexpr (std::is_same_v<P, S>) {
    return *reinterpret_cast<const V*>(p);
  } else if constexpr (std::is_same_v<P, bfloat16>) {
    constexpr int kLow = MoeShape<float>::kLanes;
    typedef uint16_t Narrow __attribute__((vector_size(2 * kLow), aligned(2), may_alias));
    typedef uint32_t Wide __attribute__((vector_size(4 * kLow)));
    return (V)(__builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Wide) << 16);
  } else {
#if WS_BYTES == 64
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif WS_BYTES == 32
    return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    constexpr int L = MoeShape<S>::kLanes;
    S lanes[L];
    for (int i = 0; i < L; ++i) lanes[i] = widen(p[i]);
    return *reinterpret_cast<const V*>(lanes);
#endif
  }
}

// The first n of them, fewer than a vector has; the rest is zero.
template <class S, class P>
inline Vector<S> load_some(const P* p, int64_t n) {
  constexpr int L = MoeShape<S>::kLanes;
#if WS_BYTES == 64
  const uint32_t mask = (uint32_t{1} << n) - 1;
  if constexpr (std::is_same_v<P, double>) {
    return (Vector<S>)_mm512_maskz_loadu_pd(mask, p);
  } else if constexpr (std::is_same_v<P, float>) {
    return (Vector<S>)_mm512_maskz_loadu_ps(mask, p);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(mask, p);
    return load_lanes<S>(reinterpret_cast<const P*>(&half));
  }
#else
  P line[L] = {};
  std::memcpy(line, p, n * sizeof(P));
  return load_lanes<S>(line);
#endif
}

template <class R, class S>
inline void store_lanes(Vector<S> v, R* to) {
  if constexpr (std::is_same_v<R, S>) {
    *reinterpret_cast<Vector<S>*>(to) = v;
  } else {
#if WS_BYTES == 64
    if constexpr (std::is_same_v<R, float16>) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                          _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#endif
    S lanes[MoeShape<S>::kLanes];
    *reinterpret_cast<Vector<S>*>(lanes) = v;
    narrow_run(lanes, MoeShape<S>::kLanes, to);
  }
}

template <class R, class S>
inline void store_some(Vector<S> v, int64_t n, R* to) {
  R line[MoeShape<S>::kLanes];
  store_lanes<R, S>(v, line);
  std::memcpy(to, line, n * sizeof(R));
}

// n elements widened.
template <class S, class P>
inline void load_run(const P* from, int64_t n, S* to) {
  constexpr int L = MoeShape<S>::kLanes;
  int64_t i = 0;
  for (; i + L <= n; i += L) *reinterpret_cast<Vector<S>*>(to + i) = load_lanes<S>(from + i);
  for (; i < n; ++i) to[i] = widen(from[i]);
}

// Sums over the lanes of N vectors, all in the same order: in each round a pair of vectors becomes
// one, whose even lanes are sums of the first and whose odd lanes are sums of the second.
template <class S, int N, int Round = 1>
inline void fold_lanes(Vector<S>* x) {
  constexpr int L = MoeShape<S>::kLanes, kLeft = (N + 1) / 2;
  using Order = std::make_integer_sequence<int, L>;
  if constexpr (Round < L) {
#pragma GCC unroll 16
    for (int i = 0; i < kLeft; ++i) {
      const Vector<S> a = x[2 * i], b = x[2 * i + 1 < N ? 2 * i + 1 : 2 * i];
      x[i] = interleave<0>(a, b, Order()) + interleave<1>(a, b, Order());
    }
    fold_lanes<S, kLeft, 2 * Round>(x);
  }
}

// Where fold_lanes leaves the sum of vector i, counted in lanes.
template <class S>
constexpr int folded_at(int i) {
  constexpr int L = MoeShape<S>::kLanes;
  int at = i / L * L;
  for (int bit = 1, place = L / 2; bit < L; bit *= 2, place /= 2) at += i & bit ? place : 0;
  return at;
}
