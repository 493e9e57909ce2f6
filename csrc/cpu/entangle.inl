// Passes over an entangled weight for one instruction set; included by isa.h.

// to[r] = from[r] * table[line[r]], row by row.
template <class T>
void scale_rows(const T* from, const Sum<T>* table, const int32_t* line, int64_t r0, int64_t r1,
                int64_t width, T* to) {
  for (int64_t r = r0; r < r1; ++r) {
    const T* x = from + r * width;
    const Sum<T>* f = table + line[r] * width;
    T* y = to + r * width;
    for (int64_t j = 0; j < width; ++j) y[j] = narrow<T>(widen(x[j]) * f[j]);
  }
}

// The same for the gradient g, and sums[line[r]] += g[r] * weight[r].
template <class T, class R>
void scale_rows_and_sum(const T* g, const T* weight, const Sum<T>* table, const int32_t* line,
                        int64_t r0, int64_t r1, int64_t width, bool add, R* to, int64_t pitch,
                        Sum<T>* sums) {
  for (int64_t r = r0; r < r1; ++r) {
    const T *x = g + r * width, *w = weight + r * width;
    const Sum<T>* f = table + line[r] * width;
    Sum<T>* total = sums + line[r] * width;
    R* y = to + r * pitch;
    if (add) {
      for (int64_t j = 0; j < width; ++j) {
        const Sum<T> v = widen(x[j]);
        y[j] = narrow<R>(widen(y[j]) + v * f[j]);
        total[j] += v * widen(w[j]);
      }
    } else {
      for (int64_t j = 0; j < width; ++j) {
        const Sum<T> v = widen(x[j]);
        y[j] = narrow<R>(v * f[j]);
        total[j] += v * widen(w[j]);
      }
    }
  }
}
