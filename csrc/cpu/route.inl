// The choice of experts and their gates for one instruction set; included by isa.h.
//
// The k best of a row of n are found in three steps that have no branch on the data: the k-th
// largest of 16 lane-wise maxima is a bound that at least k elements reach; few more do (11 of 256
// for k = 8); each of those few is ranked by counting the better ones.

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
  using Counts = LaneCounts<S>;
  typename Counts::Int rank[kRanked];
  for (int64_t block = 0; block < n; block += kRouteLanes) {
    const auto mine = Lanes<S>::load(v + block);
    Counts better;
    int64_t i = 0;
    for (; i < block; ++i) better.at_least(v[i], mine);  // of equals the earlier is better
    for (; i < std::min(block + kRouteLanes, n); ++i) better.greater_from(v[i], i - block, mine);
    for (; i < n; ++i) better.greater(v[i], mine);
    std::memcpy(rank + block, better.v, sizeof better.v);
  }
  for (int64_t i = 0; i < n; ++i) best[rank[i]] = ids == nullptr ? static_cast<int32_t>(i) : ids[i];
}

// The k-th largest of 16 lane-wise maxima.
template <class S>
S bound_of(const S* v, int64_t width, int64_t k) {
  using Counts = LaneCounts<S>;
  auto top = Lanes<S>::load(v);
  for (int64_t e = kRouteLanes; e < width; e += kRouteLanes) top.larger(Lanes<S>::load(v + e));
  S each[kRouteLanes];
  top.store(each);
  Counts better;
  for (int64_t i = 0; i < kRouteLanes; ++i) better.greater(each[i], top);
  // The least of those that fewer than k exceed; negated, the largest.
  for (int i = 0; i < Lanes<S>::kVectors; ++i) {
    const auto none = typename Lanes<S>::V{} - std::numeric_limits<S>::infinity();
    const auto limit = typename Counts::I{} + typename Counts::Int(k);
    top.v[i] = better.v[i] < limit ? -top.v[i] : none;
  }
  return -top.largest();
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
  auto first = Lanes<S>::load(v), second = Lanes<S>::all(-std::numeric_limits<S>::infinity());
  for (int64_t e = kRouteLanes; e < width; e += kRouteLanes) {
    const auto next = Lanes<S>::load(v + e);
    auto low = first;
    low.smaller(next);
    first.larger(next);
    second.larger(low);
  }
  S a[kRouteLanes], b[kRouteLanes];
  first.store(a);
  second.store(b);
  for (int64_t half = kRouteLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) {
      const S high = a[l] > a[l + half] ? a[l] : a[l + half];
      const S low = a[l] > a[l + half] ? a[l + half] : a[l];
      const S rest = b[l] > b[l + half] ? b[l] : b[l + half];
      a[l] = high;
      b[l] = low > rest ? low : rest;
    }
  }
  return a[0] + b[0];
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
    widen_row(rows.logits + r * o.experts, o.experts, s);
    score_row(s, o.experts, o.fn);
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
  const int64_t width = whole_lanes(o.k);
  constexpr S kLowest = -std::numeric_limits<S>::infinity();
  std::vector<S> scores(whole_lanes(o.experts)), at(width), chosen(width), slope(width), d(o.k);
  for (int64_t r = r0; r < r1; ++r) {
    const T* x = rows.logits + r * o.experts;
    T* to = rows.to + r * o.experts;
    const int64_t* ids = rows.ids + r * o.k;
    std::fill(to, to + o.experts, narrow<T>(S(0)));
    if (rows.padding != nullptr && rows.padding[r]) continue;
    if (o.fn == ScoreFn::softmax) {
      S* s = scores.data();
      widen_row(x, o.experts, s);
      score_row(s, o.experts, o.fn);
      for (int64_t j = 0; j < o.k; ++j) chosen[j] = s[ids[j]];
      unnormalize(o, rows.grad + r * o.k, chosen.data(), d.data());
      S along = S(0);
      for (int64_t j = 0; j < o.k; ++j) along += d[j] * chosen[j];
      for (int64_t e = 0; e < o.experts; ++e) to[e] = narrow<T>(s[e] * -along);
      for (int64_t j = 0; j < o.k; ++j) to[ids[j]] = narrow<T>(chosen[j] * (d[j] - along));
      continue;
    }
    for (int64_t j = 0; j < o.k; ++j) at[j] = widen(x[ids[j]]);
    std::fill(at.begin() + o.k, at.end(), kLowest);
    chosen = at;
    score_row(chosen.data(), o.k, o.fn);
    unnormalize(o, rows.grad + r * o.k, chosen.data(), d.data());
    if (o.fn == ScoreFn::sigmoid) {
      for (int64_t j = 0; j < o.k; ++j) slope[j] = chosen[j] * (S(1) - chosen[j]);
    } else {  // sigmoid(x) / (2 s); where s vanishes, so does its slope
      slope = at;
      score_row(slope.data(), o.k, ScoreFn::sigmoid);
      for (int64_t j = 0; j < o.k; ++j)
        slope[j] = chosen[j] > S(0) ? slope[j] / (S(2) * chosen[j]) : chosen[j];
    }
    for (int64_t j = 0; j < o.k; ++j) to[ids[j]] = narrow<T>(d[j] * slope[j]);
  }
}
