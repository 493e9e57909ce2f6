// Score functions on sixteen neighbours at a time, for one instruction set; included by
// isa.h.

constexpr int64_t kRouteLanes = 16;  // sums run along these in one order on all instruction sets

inline int64_t whole_lanes(int64_t n) { return (n + kRouteLanes - 1) / kRouteLanes * kRouteLanes; }

// Sixteen neighbours, in as many vectors as that takes. Loops over 16 scalars would be unrolled
// before the compiler thinks of vectors.
template <class S>
struct Lanes {
  static constexpr int kWidth = WS_BYTES / sizeof(S), kVectors = kRouteLanes / kWidth;
  typedef S V __attribute__((vector_size(WS_BYTES), aligned(sizeof(S)), may_alias));
  V v[kVectors];

  static Lanes load(const S* from) {
    Lanes made;
    for (int i = 0; i < kVectors; ++i) made.v[i] = *reinterpret_cast<const V*>(from + i * kWidth);
    return made;
  }
  static Lanes all(S value) {
    Lanes made;
    for (int i = 0; i < kVectors; ++i) made.v[i] = V{} + value;
    return made;
  }
  void store(S* to) const {
    for (int i = 0; i < kVectors; ++i) *reinterpret_cast<V*>(to + i * kWidth) = v[i];
  }
  void add(const Lanes& b) {
    for (int i = 0; i < kVectors; ++i) v[i] += b.v[i];
  }
  void larger(const Lanes& b) {  // a NaN in b does not count
    for (int i = 0; i < kVectors; ++i) v[i] = b.v[i] > v[i] ? b.v[i] : v[i];
  }
  void smaller(const Lanes& b) {
    for (int i = 0; i < kVectors; ++i) v[i] = b.v[i] < v[i] ? b.v[i] : v[i];
  }
  // All lanes into one, by halves.
  template <class Merge>
  S reduce(const Merge& merge) const {
    S m[kRouteLanes];
    store(m);
    for (int64_t half = kRouteLanes / 2; half > 0; half /= 2)
      for (int64_t l = 0; l < half; ++l) m[l] = merge(m[l], m[l + half]);
    return m[0];
  }
  S largest() const {
    return reduce([](S a, S b) { return b > a ? b : a; });
  }
  S sum() const {
    return reduce([](S a, S b) { return a + b; });
  }
};

// Per lane, a count of comparisons that were true: of the lanes' width, as comparisons are.
template <class S>
struct LaneCounts {
  using L = Lanes<S>;
  using Int = std::conditional_t<std::is_same_v<S, double>, int64_t, int32_t>;
  typedef Int I __attribute__((vector_size(WS_BYTES), aligned(sizeof(Int)), may_alias));
  I v[L::kVectors] = {};

  void greater(S than, const L& lanes) {
    for (int i = 0; i < L::kVectors; ++i) v[i] -= (typename L::V{} + than) > lanes.v[i];
  }
  void at_least(S as, const L& lanes) {
    for (int i = 0; i < L::kVectors; ++i) v[i] -= (typename L::V{} + as) >= lanes.v[i];
  }
  // Greater, or equal where the lane is behind another one.
  void greater_from(S than, Int lane, const L& lanes) {
    static constexpr Int kNumbers[kRouteLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                  8, 9, 10, 11, 12, 13, 14, 15};
    for (int i = 0; i < L::kVectors; ++i) {
      const I number = *reinterpret_cast<const I*>(kNumbers + i * L::kWidth);
      const typename L::V value = typename L::V{} + than;
      v[i] -= (value > lanes.v[i]) | ((value == lanes.v[i]) & (number > I{} + lane));
    }
  }
};

// ---- score functions ----------------------------------------------------------------------------
//
// Whole lanes only, so that equal logits get equal scores wherever they stand in a row.

// exp, within an ulp or so; NaN stays. Cody-Waite reduction, polynomial of the Cephes library. The
// power of two is applied in two halves, so that the result overflows and underflows by itself.
inline Lanes<float> exponential(Lanes<float> lanes) {
  using V = Lanes<float>::V;
  using I = LaneCounts<float>::I;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
  for (V& x : lanes.v) {
    const V low = V{} - 104.0f, high = V{} + 89.0f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const V shifted = x * 1.44269504088896341f + kMagic;
    const V n = shifted - kMagic;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = V{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r * r + r) + 1.0f;
    const V magic = V{} + kMagic;
    const I whole = reinterpret_cast<const I&>(shifted) - reinterpret_cast<const I&>(magic);
    const I half = whole >> 1;
    const I a = (half + 127) << 23, b = (whole - half + 127) << 23;
    x = p * reinterpret_cast<const V&>(a) * reinterpret_cast<const V&>(b);
  }
  return lanes;
}
inline Lanes<double> exponential(Lanes<double> lanes) {
  double each[kRouteLanes];
  lanes.store(each);
  for (double& x : each) x = std::exp(x);
  return Lanes<double>::load(each);
}

// log(1 + u) for u in 0..1, by 2 atanh(u / (2 + u)), which loses nothing for small u.
inline Lanes<float> log_1_plus(Lanes<float> lanes) {
  using V = Lanes<float>::V;
  for (V& u : lanes.v) {
    const V z = u / (u + 2.0f), w = z * z;
    V p = V{} + 0.11620364f;
    p = p * w + 0.10851448f;
    p = p * w + 0.14296309f;
    p = p * w + 0.19999850f;
    p = p * w + 0.33333334f;
    u = (z + z * w * p) * 2.0f;
  }
  return lanes;
}
inline Lanes<double> log_1_plus(Lanes<double> lanes) {
  double each[kRouteLanes];
  lanes.store(each);
  for (double& u : each) u = std::log1p(u);
  return Lanes<double>::load(each);
}

template <class S>
Lanes<S> sigmoid(Lanes<S> lanes) {
  for (auto& x : lanes.v) x = -x;
  lanes = exponential(lanes);
  for (auto& x : lanes.v) x = S(1) / (x + S(1));
  return lanes;
}

template <class S>
Lanes<S> softplus(Lanes<S> lanes) {
  using V = typename Lanes<S>::V;
  Lanes<S> part = lanes;
  for (V& x : part.v) x = x < V{} ? x : -x;
  part = log_1_plus(exponential(part));
  for (int i = 0; i < Lanes<S>::kVectors; ++i)
    lanes.v[i] = (lanes.v[i] > V{} ? lanes.v[i] : V{}) + part.v[i];
  return lanes;
}

template <class S>
void softmax_row(S* s, int64_t width) {
  using L = Lanes<S>;
  L top = L::load(s);
  for (int64_t e = kRouteLanes; e < width; e += kRouteLanes) top.larger(L::load(s + e));
  const S largest = top.largest();
  L sums = L::all(0);
  for (int64_t e = 0; e < width; e += kRouteLanes) {
    L x = L::load(s + e);
    for (auto& v : x.v) v -= largest;
    x = exponential(x);
    sums.add(x);
    x.store(s + e);
  }
  const S total = sums.sum();
  for (int64_t e = 0; e < width; ++e) s[e] /= total;
}

// Scores of a row of logits, in place; beyond the row it holds -inf up to whole lanes.
template <class S>
void score_row(S* s, int64_t n, ScoreFn fn) {
  const int64_t width = whole_lanes(n);
  if (fn == ScoreFn::softmax) return softmax_row(s, width);
  if (fn == ScoreFn::sigmoid) {
    for (int64_t e = 0; e < width; e += kRouteLanes) sigmoid(Lanes<S>::load(s + e)).store(s + e);
    return;
  }
  for (int64_t e = 0; e < width; e += kRouteLanes) softplus(Lanes<S>::load(s + e)).store(s + e);
  for (int64_t e = 0; e < width; ++e) s[e] = std::sqrt(s[e]);
}

template <class T>
void widen_row(const T* x, int64_t n, Sum<T>* s) {
  for (int64_t e = 0; e < n; ++e) s[e] = widen(x[e]);
  std::fill(s + n, s + whole_lanes(n), -std::numeric_limits<Sum<T>>::infinity());
}
