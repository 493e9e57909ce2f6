// The register tile of moe.h and the products made of it, for one instruction set.

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
  static constexpr int kRows = kVectors * kLanes;        // lanes of a tile
  static constexpr int kBlock = WS_BYTES == 64 ? 4 : 8;  // tiles worked on together
  static constexpr int kDepth = 256;  // units per pass, and so of one sum in registers
  // Up to so many rows a weight is met by dot products, which leave no lane of a vector empty.
  // Less than a tile: of an expert's tiles, the last alone may have few.
  static constexpr int kFew = WS_BYTES == 64 ? kRows / 8 : kRows / 4;
  static constexpr int kWide = 96;  // columns packed at a time where a weight runs across
  typedef S Vector __attribute__((vector_size(WS_BYTES), aligned(sizeof(S)), may_alias));
  // Pairs of bfloat16 begin wherever an element does.
  typedef S Loose __attribute__((vector_size(WS_BYTES), aligned(2), may_alias));
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
void moe_tile(const Unit<T>* a, int64_t a_step, Operand b, int64_t units, Sum<T>* c, int64_t c_step,
              bool add) {
  using G = MoeShape<Sum<T>>;
  using Full = typename G::Vector;
  using Half = typename G::Half;
  constexpr int L = G::kLanes;
  Full sum[R][V > 0 ? V : 1];
  Half half[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = Full{};
    half[r] = Half{};
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
  for (int r = 0; r < R; ++r) {  // added at the end: long sums are sums of shorter ones
    Full* full = reinterpret_cast<Full*>(c + r * c_step);
    Half* rest = reinterpret_cast<Half*>(c + r * c_step + V * L);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) full[v] = add ? full[v] + sum[r][v] : sum[r][v];
    if (H) *rest = add ? *rest + half[r] : half[r];
  }
}

template <class T, int V, int H, int R>
void moe_lines(const Unit<T>* a, int64_t a_step, Operand b, int64_t lines, int64_t units, Sum<T>* c,
               int64_t c_step, bool add) {
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
#define WS_LINES(V, H, R) return moe_lines<T, V, H, R>(a, a_step, b, lines, units, c, c_step, add)
  const int64_t grains = lanes / G::kGrain;
  if constexpr (wide) {
    switch (grains) {
      case 1:
        WS_LINES(0, 1, 8);
      case 2:
        WS_LINES(1, 0, 8);
      case 3:
        WS_LINES(1, 1, 8);
      case 4:
        WS_LINES(2, 0, 8);
      case 5:
        WS_LINES(2, 1, 8);
      case 6:
        WS_LINES(3, 0, 8);
      case 7:
        WS_LINES(3, 1, 6);
      case 8:
        WS_LINES(4, 0, 6);
    }
  } else {
    if (grains == 1) WS_LINES(1, 0, 8);
    if (grains == 2) WS_LINES(2, 0, 6);
  }
#undef WS_LINES
}
