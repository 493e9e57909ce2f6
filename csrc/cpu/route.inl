// Scores, the choice of experts and their gates for one instruction set; included by route_isa.h.
//
// Loops over kRouteLanes neighbours are vectors on every instruction set, and sums run along lanes
// in one order on all of them. The k best of a row of n are found in three steps that have no
// branch on the data: the k-th largest of 16 lane-wise maxima is a bound that at least k elements
// reach; few more do (11 of 256 for k = 8); each of those few is ranked by counting the better
// ones.

constexpr int64_t kRouteLanes = 16;

inline int64_t whole_lanes(int64_t n) { return (n + kRouteLanes - 1) / kRouteLanes * kRouteLanes; }

// ---- score functions ----------------------------------------------------------------------------

// exp, within an ulp or so; NaN stays. Cody-Waite reduction, polynomial of the Cephes library. The
// power of two is applied in two halves, so that the result overflows and underflows by itself.
inline float exponential(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
  const float shifted = x * 1.44269504088896341f + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  const int32_t whole =
      static_cast<int32_t>(std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kMagic));
  const int32_t half = whole >> 1;
  const auto power = [](int32_t e) {
    return std::bit_cast<float>(static_cast<uint32_t>(e + 127) << 23);
  };
  return p * power(half) * power(whole - half);
}
inline double exponential(double x) { return std::exp(x); }

// log(1 + u) for u in 0..1, by 2 atanh(u / (2 + u)), which loses nothing for small u.
inline float log_1_plus(float u) {
  const float z = u / (2.0f + u), w = z * z;
  float p = 0.11620364f;
  p = p * w + 0.10851448f;
  p = p * w + 0.14296309f;
  p = p * w + 0.19999850f;
  p = p * w + 0.33333334f;
  return 2.0f * (z + z * w * p);
}
inline double log_1_plus(double u) { return std::log1p(u); }

template <class S>
inline S sigmoid(S x) {
  return S(1) / (S(1) + exponential(-x));
}

template <class S>
inline S sqrt_softplus(S x) {
  const S magnitude = x < S(0) ? -x : x;
  return std::sqrt((x > S(0) ? x : S(0)) + log_1_plus(exponential(-magnitude)));
}

// The larger of each lane; a NaN in `b` does not count.
template <class S>
inline void larger(S* a, const S* b) {
  for (int64_t l = 0; l < kRouteLanes; ++l) a[l] = b[l] > a[l] ? b[l] : a[l];
}

template <class S>
inline S largest_lane(const S* lanes) {
  S m[kRouteLanes];
  for (int64_t l = 0; l < kRouteLanes; ++l) m[l] = lanes[l];
#pragma GCC unroll 4
  for (int64_t half = kRouteLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) m[l] = m[l + half] > m[l] ? m[l + half] : m[l];
  return m[0];
}

// In place over a row padded to whole lanes with -inf.
template <class S>
void softmax_row(S* s, int64_t width) {
  S lanes[kRouteLanes];
  for (int64_t l = 0; l < kRouteLanes; ++l) lanes[l] = s[l];
  for (int64_t e = kRouteLanes; e < width; e += kRouteLanes) larger(lanes, s + e);
  const S top = largest_lane(lanes);
  for (int64_t l = 0; l < kRouteLanes; ++l) lanes[l] = S(0);
  for (int64_t e = 0; e < width; e += kRouteLanes) {
    for (int64_t l = 0; l < kRouteLanes; ++l) {
      s[e + l] = exponential(s[e + l] - top);
      lanes[l] += s[e + l];
    }
  }
#pragma GCC unroll 4
  for (int64_t half = kRouteLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  const S total = lanes[0];
  for (int64_t e = 0; e < width; ++e) s[e] /= total;
}

// Scores of n logits; beyond them, up to whole lanes, s holds what may be overwritten.
template <class T>
void score_row(const T* x, int64_t n, ScoreFn fn, Sum<T>* s) {
  using S = Sum<T>;
  if (fn == ScoreFn::sigmoid) {
    for (int64_t e = 0; e < n; ++e) s[e] = sigmoid<S>(widen(x[e]));
  } else if (fn == ScoreFn::sqrt_softplus) {
    for (int64_t e = 0; e < n; ++e) s[e] = sqrt_softplus<S>(widen(x[e]));
  } else {
    for (int64_t e = 0; e < n; ++e) s[e] = widen(x[e]);
    for (int64_t e = n; e < whole_lanes(n); ++e) s[e] = -std::numeric_limits<S>::infinity();
    softmax_row(s, whole_lanes(n));
  }
}

// ---- the k best of a row ------------------------------------------------------------------------

// Appends those of kRouteLanes elements that reach the bound, and their ids from `id` on; writes up
// to kRouteLanes elements behind the last one, too. Returns how many there are.
template <class S>
inline int64_t append_reaching(const S* v, S bound, int64_t id, S* to, int32_t* ids) {
  uint32_t bits = 0;
  for (int64_t l = 0; l < kRouteLanes; ++l) bits |= static_cast<uint32_t>(v[l] >= bound) << l;
  int64_t count = 0;
  for (; bits != 0; bits &= bits - 1, ++count) {
    const int l = std::countr_zero(bits);
    to[count] = v[l];
    ids[count] = static_cast<int32_t>(id + l);
  }
  return count;
}
#if defined(__x86_64__) && WS_BYTES == 64
template <>
inline int64_t append_reaching(const float* v, float bound, int64_t id, float* to, int32_t* ids) {
  const __m512 value = _mm512_loadu_ps(v);
  const __mmask16 bits = _mm512_cmp_ps_mask(value, _mm512_set1_ps(bound), _CMP_GE_OQ);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(id)));
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(bits, value));
  _mm512_storeu_si512(ids, _mm512_maskz_compress_epi32(bits, at));
  return std::popcount(static_cast<uint32_t>(bits));
}
#elif defined(__x86_64__)
template <>
inline int64_t append_reaching(const float* v, float bound, int64_t id, float* to, int32_t* ids) {
  const __m128 b = _mm_set1_ps(bound);
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i)
    bits |= static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpge_ps(_mm_loadu_ps(v + 4 * i), b)))
            << 4 * i;
  int64_t count = 0;
  for (; bits != 0; bits &= bits - 1, ++count) {
    const int l = std::countr_zero(bits);
    to[count] = v[l];
    ids[count] = static_cast<int32_t>(id + l);
  }
  return count;
}
#endif

constexpr int64_t kRanked = 64;  // most elements that are ranked by counting, which is quadratic

// Memory that the rows of one thread share.
template <class S>
struct RouteScratch {
  std::vector<S> scores, choice, part;  // a row each, in whole lanes; `part` is of one group
  std::vector<S> totals;                // of the groups
  std::vector<S> few;                   // candidates and their ids
  std::vector<int32_t> few_ids, order, best, group_ids;

  explicit RouteScratch(const RouteOptions& o)
      : scores(whole_lanes(o.experts)),
        choice(whole_lanes(o.experts)),
        part(whole_lanes(o.experts)),
        totals(whole_lanes(o.groups)),
        few(whole_lanes(o.experts) + 2 * kRouteLanes),
        few_ids(few.size()),
        order(std::max({o.topk_groups, o.group_top, kRanked})),
        best(std::max(o.k, kRanked)) {}
};

// Ids of n <= kRanked values, best first; v is padded to whole lanes with -inf.
template <class S>
void rank_few(const S* v, const int32_t* ids, int64_t n, int32_t* best) {
  using Int = std::conditional_t<std::is_same_v<S, double>, int64_t, int32_t>;
  Int rank[kRanked];
  for (int64_t block = 0; block < n; block += kRouteLanes) {
    Int better[kRouteLanes] = {};
    S mine[kRouteLanes];
    for (int64_t l = 0; l < kRouteLanes; ++l) mine[l] = v[block + l];
    const int64_t before = std::min(block, n), within = std::min(block + kRouteLanes, n);
    for (int64_t i = 0; i < before; ++i)  // of equals the earlier is better
      for (int64_t l = 0; l < kRouteLanes; ++l) better[l] += v[i] >= mine[l];
    for (int64_t i = before; i < within; ++i) {
      for (int64_t l = 0; l < kRouteLanes; ++l)
        better[l] += (v[i] > mine[l]) | ((v[i] == mine[l]) & (Int(i - block) < Int(l)));
    }
    for (int64_t i = within; i < n; ++i)
      for (int64_t l = 0; l < kRouteLanes; ++l) better[l] += v[i] > mine[l];
    for (int64_t l = 0; l < kRouteLanes; ++l) rank[block + l] = better[l];
  }
  for (int64_t i = 0; i < n; ++i) best[rank[i]] = ids == nullptr ? static_cast<int32_t>(i) : ids[i];
}

// The k-th largest of 16 lane-wise maxima.
template <class S>
S bound_of(const S* v, int64_t width, int64_t k) {
  using Int = std::conditional_t<std::is_same_v<S, double>, int64_t, int32_t>;
  S top[kRouteLanes];
  Int better[kRouteLanes] = {};
  for (int64_t l = 0; l < kRouteLanes; ++l) top[l] = v[l];
  for (int64_t e = kRouteLanes; e < width; e += kRouteLanes) larger(top, v + e);
  for (int64_t i = 0; i < kRouteLanes; ++i)
    for (int64_t l = 0; l < kRouteLanes; ++l) better[l] += top[i] > top[l];
  for (int64_t l = 0; l < kRouteLanes; ++l)  // negated: the least of those becomes the largest
    top[l] = better[l] < Int(k) ? -top[l] : -std::numeric_limits<S>::infinity();
  return -largest_lane(top);
}

// Ids of the k best of v[0..n), best first, of equals the earlier one; v is free of NaN and padded
// to whole lanes with -inf. Up to kRanked elements of `best` are written.
template <class S>
void best_of(const S* v, int64_t n, int64_t k, RouteScratch<S>& scratch, int32_t* best) {
  if (n <= kRanked) return rank_few(v, static_cast<int32_t*>(nullptr), n, best);
  S* few = scratch.few.data();
  int32_t* ids = scratch.few_ids.data();
  int64_t count = 0;
  if (k <= kRouteLanes) {
    const S bound = bound_of(v, whole_lanes(n), k);
    for (int64_t e = 0; e < n; e += kRouteLanes)
      count += append_reaching(v + e, bound, e, few + count, ids + count);
    while (ids[count - 1] >= n) --count;  // what is behind the row reaches a bound of -inf
  } else {
    for (; count < n; ++count) few[count] = v[count], ids[count] = static_cast<int32_t>(count);
  }
  if (count <= kRanked) {
    for (int64_t l = count; l < whole_lanes(count); ++l)
      few[l] = -std::numeric_limits<S>::infinity();
    return rank_few(few, ids, count, best);
  }
  std::partial_sort(ids, ids + k, ids + count,
                    [v](int32_t a, int32_t b) { return v[a] > v[b] || (v[a] == v[b] && a < b); });
  std::copy(ids, ids + k, best);
}

// ---- groups -------------------------------------------------------------------------------------

// Sum of the two best of a padded row.
template <class S>
S two_best(const S* v, int64_t width) {
  S first[kRouteLanes], second[kRouteLanes];
  for (int64_t l = 0; l < kRouteLanes; ++l) {
    first[l] = v[l];
    second[l] = -std::numeric_limits<S>::infinity();
  }
  const auto merge = [&](int64_t l, S a, S b) {  // a >= b
    const S low = first[l] > a ? a : first[l], rest = second[l] > b ? second[l] : b;
    first[l] = first[l] > a ? first[l] : a;
    second[l] = low > rest ? low : rest;
  };
  for (int64_t e = kRouteLanes; e < width; e += kRouteLanes)
    for (int64_t l = 0; l < kRouteLanes; ++l)
      merge(l, v[e + l], -std::numeric_limits<S>::infinity());
#pragma GCC unroll 4
  for (int64_t half = kRouteLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) merge(l, first[l + half], second[l + half]);
  return first[0] + second[0];
}

// Copies n values and pads them to whole lanes with -inf.
template <class S>
void copy_padded(const S* from, int64_t n, S* to) {
  std::copy(from, from + n, to);
  std::fill(to + n, to + whole_lanes(n), -std::numeric_limits<S>::infinity());
}

// The k best among the experts of the best groups.
template <class S>
void best_in_groups(const RouteOptions& o, RouteScratch<S>& scratch, int32_t* best) {
  const int64_t size = o.experts / o.groups;
  S *choice = scratch.choice.data(), *part = scratch.part.data(), *totals = scratch.totals.data();
  for (int64_t g = 0; g < o.groups; ++g) {
    copy_padded(choice + g * size, size, part);
    if (o.group_top == 2) {
      totals[g] = two_best(part, whole_lanes(size));
    } else {
      best_of(part, size, o.group_top, scratch, scratch.order.data());
      totals[g] = part[scratch.order[0]];
      for (int64_t j = 1; j < o.group_top; ++j) totals[g] += part[scratch.order[j]];
    }
    if (std::isnan(totals[g])) totals[g] = -std::numeric_limits<S>::infinity();
  }
  std::fill(totals + o.groups, totals + whole_lanes(o.groups), -std::numeric_limits<S>::infinity());
  int32_t* chosen = scratch.order.data();
  best_of(totals, o.groups, o.topk_groups, scratch, chosen);
  std::sort(chosen, chosen + o.topk_groups);
  for (int64_t i = 0; i < o.topk_groups; ++i)
    std::copy(choice + chosen[i] * size, choice + (chosen[i] + 1) * size, part + i * size);
  const int64_t n = o.topk_groups * size;
  std::fill(part + n, part + whole_lanes(n), -std::numeric_limits<S>::infinity());
  std::vector<int32_t>& groups = scratch.group_ids;
  groups.assign(chosen, chosen + o.topk_groups);
  best_of(part, n, o.k, scratch, best);
  for (int64_t j = 0; j < o.k; ++j)
    best[j] = static_cast<int32_t>(groups[best[j] / size] * size + best[j] % size);
}

// ---- rows ---------------------------------------------------------------------------------------

template <class T>
void choose_rows(const RouteRows<T>& rows, int64_t r0, int64_t r1) {
  using S = Sum<T>;
  const RouteOptions& o = rows.o;
  RouteScratch<S> scratch(o);
  S *s = scratch.scores.data(), *choice = scratch.choice.data();
  int32_t* best = scratch.best.data();
  constexpr S kLowest = -std::numeric_limits<S>::infinity();
  for (int64_t r = r0; r < r1; ++r) {
    int64_t* ids = rows.ids + r * o.k;
    S* gates = rows.gates + r * o.k;
    if (rows.padding != nullptr && rows.padding[r]) {
      for (int64_t j = 0; j < o.k; ++j) ids[j] = j, gates[j] = S(0);
      continue;
    }
    score_row(rows.logits + r * o.experts, o.experts, o.fn, s);
    for (int64_t e = 0; e < o.experts; ++e) {
      const S v = rows.bias == nullptr ? s[e] : s[e] + rows.bias[e];
      choice[e] = v == v ? v : kLowest;
    }
    std::fill(choice + o.experts, choice + whole_lanes(o.experts), kLowest);
    if (o.topk_groups < o.groups)
      best_in_groups(o, scratch, best);
    else
      best_of(choice, o.experts, o.k, scratch, best);
    S total = S(0);
    for (int64_t j = 0; j < o.k; ++j) {
      ids[j] = best[j];
      gates[j] = s[best[j]];
      total += gates[j];
    }
    const S divisor = o.normalize ? total + S(kRouteEpsilon) : S(1);
    for (int64_t j = 0; j < o.k; ++j) gates[j] = gates[j] / divisor * S(o.scale);
  }
}

// Gradient of the chosen scores, from that of the gates.
template <class S>
void unnormalize(const RouteOptions& o, const S* grad, const S* chosen, S* d) {
  for (int64_t j = 0; j < o.k; ++j) d[j] = grad[j] * S(o.scale);
  if (!o.normalize) return;
  S total = S(0), along = S(0);
  for (int64_t j = 0; j < o.k; ++j) total += chosen[j];
  total += S(kRouteEpsilon);
  for (int64_t j = 0; j < o.k; ++j) along += d[j] * chosen[j] / total;
  for (int64_t j = 0; j < o.k; ++j) d[j] = (d[j] - along) / total;
}

template <class T>
void choose_rows_backward(const RouteGradRows<T>& rows, int64_t r0, int64_t r1) {
  using S = Sum<T>;
  const RouteOptions& o = rows.o;
  std::vector<S> scores(whole_lanes(o.experts)), chosen(o.k), d(o.k), at(o.k);
  for (int64_t r = r0; r < r1; ++r) {
    const T* x = rows.logits + r * o.experts;
    T* to = rows.to + r * o.experts;
    const int64_t* ids = rows.ids + r * o.k;
    std::fill(to, to + o.experts, narrow<T>(S(0)));
    if (rows.padding != nullptr && rows.padding[r]) continue;
    if (o.fn == ScoreFn::softmax) {
      S* s = scores.data();
      score_row(x, o.experts, o.fn, s);
      for (int64_t j = 0; j < o.k; ++j) chosen[j] = s[ids[j]];
      unnormalize(o, rows.grad + r * o.k, chosen.data(), d.data());
      S along = S(0);
      for (int64_t j = 0; j < o.k; ++j) along += d[j] * chosen[j];
      for (int64_t e = 0; e < o.experts; ++e) to[e] = narrow<T>(s[e] * -along);
      for (int64_t j = 0; j < o.k; ++j) to[ids[j]] = narrow<T>(chosen[j] * (d[j] - along));
      continue;
    }
    const bool sigmoids = o.fn == ScoreFn::sigmoid;
    for (int64_t j = 0; j < o.k; ++j) at[j] = widen(x[ids[j]]);
    for (int64_t j = 0; j < o.k; ++j) chosen[j] = sigmoids ? sigmoid(at[j]) : sqrt_softplus(at[j]);
    unnormalize(o, rows.grad + r * o.k, chosen.data(), d.data());
    for (int64_t j = 0; j < o.k; ++j) {
      const S s = chosen[j];  // where sqrt(softplus) vanishes, so does its slope
      const S slope = sigmoids ? s * (S(1) - s) : s > S(0) ? sigmoid(at[j]) / (S(2) * s) : s;
      to[ids[j]] = narrow<T>(d[j] * slope);
    }
  }
}
