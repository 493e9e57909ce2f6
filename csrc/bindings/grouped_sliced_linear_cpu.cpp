// grouped_sliced_linear on the CPU. Few rows: one pass over W, every row's dot products per loaded
// line of it. More: one product per band of W on all rows that use it, read and written through
// the table of those rows. So many rows that each group keeps the library busy by itself: the
// library, group by group.
#include "bindings/tensor_cpu.h"

namespace weightshare {
namespace {

using Sizes = std::vector<int64_t>;

// Up to here our dot products serve, and up to there our product; measured on Zen 4, two threads.
constexpr int64_t kDotRows = 24;
constexpr int64_t kOurRows = 2048;

// The groups that have any rows and outputs, in the order of the batch; checks what kernels rely
// on: widths within [0, n] and [0, k], sizes that add up to `rows`.
std::vector<Group> groups_of(const Sizes& sizes, const Sizes& outs, const Sizes& ins, int64_t rows,
                             int64_t n, int64_t k) {
  STD_TORCH_CHECK(sizes.size() == outs.size() && sizes.size() == ins.size(),
                  "grouped_sliced_linear: sizes, outs and ins must be equally long");
  std::vector<Group> groups;
  int64_t start = 0;
  for (size_t g = 0; g < sizes.size(); ++g) {
    STD_TORCH_CHECK(sizes[g] >= 0 && outs[g] >= 0 && outs[g] <= n && ins[g] >= 0 && ins[g] <= k,
                    "grouped_sliced_linear: a group does not fit the tensors");
    if (sizes[g] > 0 && outs[g] > 0) groups.push_back({start, sizes[g], outs[g], ins[g]});
    start += sizes[g];
  }
  STD_TORCH_CHECK(start == rows, "grouped_sliced_linear: sizes must add up to the rows of x");
  return groups;
}

// View of t[r0 : r0 + rows, c0 : c0 + cols].
Tensor part_of(Tensor t, int64_t r0, int64_t rows, int64_t c0, int64_t cols) {
  Tensor tall = torch::stable::narrow(t, 0, r0, rows);
  return torch::stable::narrow(tall, 1, c0, cols);
}

bool adjacent(const std::vector<int64_t>& rows) {
  return rows.back() - rows.front() + 1 == static_cast<int64_t>(rows.size());
}

// Rows of t, by their adjacent table, and columns [c0, c1): a view where the rows are neighbours.
Tensor take(const Tensor& t, const std::vector<int64_t>& rows, int64_t c0, int64_t c1) {
  using torch::stable::detail::from;
  const int64_t size = rows.size();
  if (adjacent(rows)) return part_of(t, rows.front(), size, c0, c1 - c0);
  const Tensor cols = part_of(t, 0, t.size(0), c0, c1 - c0);
  const Tensor index = torch::stable::new_empty(t, {size}, ScalarType::Long);
  std::copy(rows.begin(), rows.end(), mutable_pointer<int64_t>(index));
  return call<3>("aten::index_select", "", {from(cols), from(int64_t{0}), from(index)});
}

// Matrix of t [rows, cols] from column c on, its rows read through a table.
template <class T>
Matrix<const T> through(const Tensor& t, const std::vector<int64_t>& rows, int64_t c) {
  return {pointer<T>(t) + c * t.stride(1), t.stride(0), t.stride(1), rows.data()};
}

void addmm(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, bool add) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), self.get(), a.get(), b.get(), add ? 1.0 : 0.0, 1.0));
}

// Each group by the library, straight into its part of y.
void by_library(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                const std::vector<Group>& groups, const Tensor& y) {
  for (const Group& g : groups) {
    const Tensor to = part_of(y, g.start, g.size, 0, g.out);
    Tensor shift = bias ? *bias : to;
    if (bias) shift = torch::stable::narrow(shift, 0, 0, g.out);
    addmm(to, shift, part_of(x, g.start, g.size, 0, g.in),
          torch::stable::transpose(part_of(weight, 0, g.out, 0, g.in), 0, 1), bias.has_value());
  }
}

// Rows whose group has no inputs at all: the bias alone, or zero.
template <class T>
void without_inputs(const std::vector<Group>& groups, const T* bias, Matrix<T> y) {
  for (const Group& g : groups) {
    for (int64_t r = g.start; g.in == 0 && r < g.start + g.size; ++r) {
      if (bias == nullptr) {
        std::fill_n(y.row(r), g.out, T{});
      } else {
        std::copy_n(bias, g.out, y.row(r));
      }
    }
  }
}

// Every band by our product. Low precision is summed in `sums` where a band has several segments.
template <class T, class R>
void by_product(const Tensor& x, const Tensor& weight, const T* bias,
                const std::vector<Band>& bands, Matrix<R> y) {
  const bool along = weight.stride(1) != 1 && weight.stride(0) == 1;
  for (const Band& band : bands) {
    for (const Segment& s : band.segments) {
      const T* from = pointer<T>(weight) + band.n0 * weight.stride(0) + s.k0 * weight.stride(1);
      const Matrix<const T> b = along ? Matrix<const T>{from, weight.stride(1), weight.stride(0)}
                                      : Matrix<const T>{from, weight.stride(0), weight.stride(1)};
      const int64_t m = s.rows.size();
      Product<T, R> p{m,    band.n1 - band.n0, s.k1 - s.k0, through<T>(x, s.rows, s.k0), false, b,
                      along};
      p.result.out = {y.data + band.n0, y.row_stride, 1, s.rows.data()};
      p.result.bias = bias == nullptr || s.k0 > 0 ? nullptr : bias + band.n0;
      p.result.accumulate = s.k0 > 0;
      run(p);
    }
  }
}

// Every band by dot products. Threads share the lines of W by cost: reading one costs about what
// the arithmetic of 12 rows does.
template <class T>
void by_dots(const Dots<T>& d, const std::vector<Band>& bands) {
  constexpr int64_t kReading = 12;
  double total = 0;
  std::vector<double> before;
  for (const Band& b : bands) {
    before.push_back(total);
    total += static_cast<double>(b.n1 - b.n0) * (kReading + b.rows.size());
  }
  // The line of W at a share of the cost.
  auto line = [&](double share) {
    size_t i = bands.size() - 1;
    while (i > 0 && before[i] > share * total) --i;
    const double inside = (share * total - before[i]) / (kReading + bands[i].rows.size());
    return share >= 1 ? bands.back().n1 : bands[i].n0 + static_cast<int64_t>(inside);
  };
  const int64_t parts = std::max<int64_t>(
      1, std::min<int64_t>(torch::stable::get_num_threads(), bands.back().n1 / 16));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t n0 = line(static_cast<double>(part) / parts);
      const int64_t n1 = line(static_cast<double>(part + 1) / parts);
      for (const Band& b : bands) {
        const int64_t from = std::max(b.n0, n0), to = std::min(b.n1, n1);
        if (from < to) WS_CHOSEN(dots<T>)(d, b, from, to);
      }
    }
  });
}

// x as the dot products read it: in the type of sums, and rows apart by an odd number of cache
// lines, so that the rows of x and those of W, often a power of two apart, do not share a set.
template <class T>
std::vector<Sum<T>> spread(const Tensor& x, const std::vector<Group>& groups, int64_t pitch) {
  std::vector<Sum<T>> store(x.size(0) * pitch);
  for (const Group& g : groups) {
    for (int64_t r = g.start; r < g.start + g.size; ++r) {
      const T* from = pointer<T>(x) + r * x.stride(0);
      for (int64_t c = 0; c < g.in; ++c) store[r * pitch + c] = widen(from[c]);
    }
  }
  return store;
}

// Zeroes y beyond each group's outputs.
void zero_beyond(const Tensor& y, const Sizes& sizes, const Sizes& outs) {
  const int64_t item = y.element_size(), width = y.size(1);
  char* row = static_cast<char*>(y.mutable_data_ptr());
  for (size_t g = 0; g < sizes.size(); ++g) {
    for (int64_t r = 0; r < sizes[g]; ++r, row += width * item) {
      std::memset(row + outs[g] * item, 0, (width - outs[g]) * item);
    }
  }
}

template <class T>
void compute(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
             const std::vector<Group>& groups, const Tensor& y) {
  const T* shift = bias ? pointer<T>(*bias) : nullptr;
  const Matrix<T> to = mutable_matrix<T>(y);
  without_inputs(groups, shift, to);
  const std::vector<Band> bands = bands_of(groups);
  if (weight.stride(1) == 1 && x.size(0) <= kDotRows) {
    const int64_t pitch = (x.size(1) / 16 | 1) * 16 + 16;
    const std::vector<Sum<T>> rows = spread<T>(x, groups, pitch);
    by_dots<T>({matrix<T>(weight), rows.data(), pitch, shift, to}, bands);
    return;
  }
  const bool once =
      std::all_of(bands.begin(), bands.end(), [](const Band& b) { return b.segments.size() < 2; });
  if (std::is_same_v<T, Sum<T>> || once) {
    by_product<T, T>(x, weight, shift, bands, to);
  } else {
    std::vector<Sum<T>> sums(y.numel());
    by_product<T, Sum<T>>(x, weight, shift, bands, {sums.data(), y.size(1), 1});
    for (const Group& g : groups) {
      if (g.in == 0) continue;
      WS_CHOSEN(deposit<Sum<T>, T>)({sums.data() + g.start * y.size(1), y.size(1), 1}, g.size,
                                    g.out, false, {to.row(g.start), to.row_stride, 1});
    }
  }
}

Tensor forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, Sizes sizes,
               Sizes outs, Sizes ins, int64_t width) {
  const int64_t n = std::min(weight.size(0), width), k = std::min(weight.size(1), x.size(1));
  const auto groups = groups_of(sizes, outs, ins, x.size(0), n, k);
  Tensor y = with_last(x, width);
  if (y.numel() == 0) return y;
  zero_beyond(y, sizes, outs);
  if (groups.empty()) return y;
  const Tensor flat = rows_of(x);
  const MaybeTensor shift = bias ? MaybeTensor(torch::stable::contiguous(*bias)) : bias;
  if (x.size(0) > (is_low_precision(x) ? kFewRows : kOurRows)) {
    by_library(flat, weight, shift, groups, y);
  } else {
    dispatch(x.scalar_type(),
             [&](auto zero) { compute<decltype(zero)>(flat, weight, shift, groups, y); });
  }
  return y;
}

// One segment of the weight gradient: target (+)= g[rows]^T x[rows], of the segment's size.
void segment_gradient(const Tensor& target, const Tensor& g, const Tensor& x, const Band& band,
                      const Segment& s, bool accumulate) {
  if (target.scalar_type() == x.scalar_type()) {
    addmm(target, target, torch::stable::transpose(take(g, s.rows, band.n0, band.n1), 0, 1),
          take(x, s.rows, s.k0, s.k1), accumulate);
    return;
  }
  dispatch(x.scalar_type(), [&](auto zero) {  // a sum kept in fp32 over lower inputs
    using T = decltype(zero);
    const int64_t depth = s.rows.size();
    const Matrix<float> to = mutable_matrix<float>(target);
    if (depth > kFewRows) {
      const Tensor whole =
          library_matmul(torch::stable::transpose(take(g, s.rows, band.n0, band.n1), 0, 1),
                         take(x, s.rows, s.k0, s.k1));
      WS_CHOSEN(deposit<T, float>)(matrix<T>(whole), target.size(0), target.size(1), accumulate,
                                   to);
      return;
    }
    if constexpr (!std::is_same_v<Sum<T>, double>) {
      Product<T, float> p{target.size(0),
                          target.size(1),
                          depth,
                          through<T>(g, s.rows, band.n0),
                          true,
                          through<T>(x, s.rows, s.k0),
                          true};
      p.result.out = to;
      p.result.accumulate = accumulate;
      run(p);
    }
  });
}

// Sums of g over the rows that use each output; zero beyond.
Tensor bias_gradient(const Tensor& g, const std::vector<Band>& bands, int64_t size) {
  Tensor db = torch::stable::new_zeros(g, {size});
  if (size == 0) return db;
  dispatch(g.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* to = mutable_pointer<T>(db);
    for (const Band& band : bands) {
      const int64_t rows = band.rows.size();
      const int64_t grain = std::max<int64_t>(64, 32768 / rows);
      torch::stable::parallel_for(band.n0, band.n1, grain, [&](int64_t begin, int64_t end) {
        std::vector<Sum<T>> sums(end - begin);
        WS_CHOSEN(sum_columns<T>)(through<T>(g, band.rows, 0), begin, end, rows, sums.data());
        for (int64_t j = begin; j < end; ++j) to[j] = narrow<T>(sums[j - begin]);
      });
    }
  });
  return db;
}

// Zeroes the part of the buffer that no segment writes.
void zero_outside(const Tensor& buffer, const std::vector<Band>& bands) {
  auto zero = [&](int64_t n0, int64_t n1, int64_t k0) {
    Tensor part = part_of(buffer, n0, n1 - n0, k0, buffer.size(1) - k0);
    if (part.numel() > 0) torch::stable::zero_(part);
  };
  int64_t below = 0;
  for (const Band& b : bands) {
    zero(b.n0, b.n1, b.segments.empty() ? 0 : b.segments.back().k1);
    below = b.n1;
  }
  zero(below, buffer.size(0), 0);
}

Tensor grad_weight_(const Tensor& buffer, const Tensor& grad, const Tensor& x, Sizes sizes,
                    Sizes outs, Sizes ins, bool accumulate, int64_t bias_size) {
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() &&
                      (buffer.scalar_type() == x.scalar_type() ||
                       (buffer.scalar_type() == ScalarType::Float && is_low_precision(x))),
                  "grouped_sliced_linear_grad_weight_: buffer must have x's dtype, or float32");
  STD_TORCH_CHECK(bias_size == 0 || bias_size == buffer.size(0),
                  "grouped_sliced_linear_grad_weight_: a bias has as many elements as W rows");
  const int64_t n = std::min(buffer.size(0), grad.size(1)), k = std::min(buffer.size(1), x.size(1));
  const auto bands = bands_of(groups_of(sizes, outs, ins, x.size(0), n, k));
  const Tensor g = rows_of(grad), input = rows_of(x);
  if (!accumulate) zero_outside(buffer, bands);
  for (const Band& band : bands) {
    for (const Segment& s : band.segments) {
      const Tensor target = part_of(buffer, band.n0, band.n1 - band.n0, s.k0, s.k1 - s.k0);
      segment_gradient(target, g, input, band, s, accumulate);
    }
  }
  return bias_gradient(g, bands, bias_size);
}

}  // namespace
}  // namespace weightshare

STABLE_TORCH_LIBRARY_IMPL(weightshare, CPU, m) {
  m.impl("grouped_sliced_linear", TORCH_BOX(&weightshare::forward));
  m.impl("grouped_sliced_linear_grad_weight_", TORCH_BOX(&weightshare::grad_weight_));
}
