// shard_lora on the CPU: stable-ABI tensors to the kernels of cpu/shard.h, and their threads.
#include "bindings/kept_cpu.h"
#include "bindings/tensor_cpu.h"

namespace weightshare {
namespace {

using Tensors = std::vector<Tensor>;

ScalarType sum_type(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Memory that pointers of a problem point into, for as long as they do.
struct Held {
  Tensors tensors;
  std::vector<int64_t> order;
  std::optional<Kept> zeros;

  Tensor keep(const Tensor& t) { return tensors.emplace_back(t); }
  Tensor rows(const Tensor& t) { return keep(rows_as_they_lie(t)); }
};

// Index tables [adapters, r, l] of which each adapter's lies in one piece.
Tensor tables_as_they_lie(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3 && t.scalar_type() == ScalarType::Int,
                  "index: expected int32 [adapters, r, l]");
  const bool dense = (t.stride(2) == 1 || t.size(2) == 1) &&
                     (t.stride(1) == t.size(2) || t.size(1) == 1 || t.numel() == 0);
  return dense ? t : torch::stable::contiguous(t);
}

// A pool, which `dtype` is multiplied with, and its index tables.
ShardSide side_of(Held& held, const Tensor& pool, const Tensor& index, ScalarType dtype) {
  STD_TORCH_CHECK(pool.dim() == 2, "pool: expected [shards, columns]");
  const bool wide = pool.scalar_type() != dtype;
  STD_TORCH_CHECK(!wide || (pool.scalar_type() == ScalarType::Float && dtype != ScalarType::Double),
                  "pool: expected the dtype of x, or float32 with a lower one");
  const Tensor rows = held.rows(pool);
  const Tensor table = held.keep(tables_as_they_lie(index));
  return {rows.const_data_ptr(), wide,
          rows.size(0),          rows.stride(0),
          rows.size(1),          pointer<int32_t>(table),
          table.stride(0),       table.size(1),
          table.size(2),         nullptr};
}

std::vector<ShardSide> sides_of(Held& held, const Tensors& pools, const Tensors& tables,
                                ScalarType dtype, int64_t adapters) {
  STD_TORCH_CHECK(pools.size() == tables.size() && !pools.empty(),
                  "expected as many pools as index tables, and at least one");
  std::vector<ShardSide> sides;
  for (size_t i = 0; i < pools.size(); ++i) {
    sides.push_back(side_of(held, pools[i], tables[i], dtype));
    STD_TORCH_CHECK(tables[i].size(0) == adapters, "index: expected tables of ", adapters,
                    " adapters");
  }
  return sides;
}

// What the sides read where a number is outside their pool.
void give_zeros(Held& held, std::vector<ShardSide*> sides) {
  int64_t widest = 0;
  for (const ShardSide* side : sides) widest = std::max(widest, side->width);
  held.zeros.emplace(widest * sizeof(double));
  std::fill_n(held.zeros->as<double>(), widest, 0.0);
  for (ShardSide* side : sides) side->zeros = held.zeros->as<void>();
}

struct Groups {
  const MaybeTensor &offsets, &permutation, &scales;
  double scale;
};

template <class S>
void read_scales(ShardRows<S>& rows, Held& held, const MaybeTensor& scales, double scale,
                 int64_t adapters) {
  rows.scale = static_cast<S>(scale);
  if (!scales.has_value()) return;
  const Tensor values = held.keep(torch::stable::contiguous(*scales));
  STD_TORCH_CHECK(values.numel() == adapters &&
                      values.scalar_type() ==
                          (std::is_same_v<S, double> ? ScalarType::Double : ScalarType::Float),
                  "scales: expected float32 (float64 for float64) of ", adapters, " adapters");
  rows.scales = pointer<S>(values);
}

// Rows by adapter from the tables of group_by_adapter, whose values are checked.
template <class S>
ShardRows<S> rows_of_groups(Held& held, const Groups& groups, int64_t count, int64_t adapters) {
  ShardRows<S> rows;
  read_scales(rows, held, groups.scales, groups.scale, adapters);
  if (!groups.offsets.has_value() || !groups.permutation.has_value()) {
    if (count > 0 && adapters > 0) rows.segments.push_back({0, 0, count});
    return rows;
  }
  const Tensor offset_table = held.keep(torch::stable::contiguous(*groups.offsets));
  const int64_t* offsets = integers(offset_table, adapters + 1, "offsets");
  const Tensor order = held.keep(torch::stable::contiguous(*groups.permutation));
  rows.token = integers(order, count, "permutation");
  bool inside = offsets[0] >= 0 && offsets[adapters] <= count;
  for (int64_t a = 0; a < adapters; ++a) {
    inside &= offsets[a] <= offsets[a + 1];
    if (offsets[a] < offsets[a + 1])
      rows.segments.push_back({a, offsets[a], offsets[a + 1] - offsets[a]});
  }
  STD_TORCH_CHECK(inside, "offsets: expected to ascend within 0..", count);
  for (int64_t r = 0; r < count; ++r) inside &= rows.token[r] >= 0 && rows.token[r] < count;
  STD_TORCH_CHECK(inside, "permutation: a row is outside 0..", count - 1);
  return rows;
}

// Rows by adapter from the adapter of each row: a stable counting sort.
template <class S>
ShardRows<S> rows_of_ids(Held& held, const MaybeTensor& ids, const MaybeTensor& scales,
                         double scale, int64_t count, int64_t adapters) {
  const MaybeTensor none;
  if (!ids.has_value())
    return rows_of_groups<S>(held, {none, none, scales, scale}, count, adapters);
  ShardRows<S> rows;
  read_scales(rows, held, scales, scale, adapters);
  const Tensor list = held.keep(torch::stable::contiguous(*ids));
  const int64_t* adapter = integers(list, count, "ids");
  held.order.resize(count);
  std::vector<int64_t> next(adapters + 2);
  auto bin = [&](int64_t r) {
    return static_cast<uint64_t>(adapter[r]) < static_cast<uint64_t>(adapters) ? adapter[r]
                                                                               : adapters;
  };
  for (int64_t r = 0; r < count; ++r) ++next[bin(r) + 1];
  for (int64_t a = 0; a <= adapters; ++a) {
    if (a < adapters && next[a + 1] > 0) rows.segments.push_back({a, next[a], next[a + 1]});
    next[a + 1] += next[a];
  }
  for (int64_t r = 0; r < count; ++r) held.order[next[bin(r)]++] = r;
  rows.token = held.order.data();
  return rows;
}

// Whether every row has an adapter; where not, body(row) for those that have none.
template <class S, class F>
void each_bare(const ShardRows<S>& rows, int64_t count, const F& body) {
  int64_t with = 0;
  for (const ShardSegment& segment : rows.segments) with += segment.rows;
  if (with == count) return;
  std::vector<bool> has(count);
  for (const ShardSegment& segment : rows.segments) {
    for (int64_t r = 0; r < segment.rows; ++r) has[rows.at(segment.first + r)] = true;
  }
  for (int64_t r = 0; r < count; ++r)
    if (!has[r]) body(r);
}

// Multiplications and, weighted, what is read for them.
template <class S>
double work_of(const ShardRows<S>& rows, const std::vector<ShardSide>& sides) {
  double work = 0, columns = 0;
  for (const ShardSide& side : sides) columns += static_cast<double>(side.ranks) * side.columns();
  for (const ShardSegment& segment : rows.segments) work += (segment.rows + 4) * columns;
  return work;
}

// h = from A^T on all threads; rows of no adapter get zero.
template <class T>
void shrink(const std::vector<ShardShrink<T>>& shrinks, const ShardRows<Sum<T>>& rows, bool scaled,
            int64_t count, double work) {
  const std::vector<ShardBlock> blocks = shrink_blocks(shrinks, rows);
  on_threads(work, [&](int64_t part, int64_t parts) {
    WS_CHOSEN_PAIRS(T, shard_shrink<T>)(shrinks, rows, blocks, scaled, part, parts);
  });
  each_bare(rows, count, [&](int64_t r) {
    for (const ShardShrink<T>& s : shrinks) std::fill_n(s.to.row(r), s.side.ranks, Sum<T>{});
  });
}

template <class T>
void expand(const std::vector<ShardExpand<T>>& expands, const ShardRows<Sum<T>>& rows,
            int64_t count, double work) {
  on_threads(work, [&](int64_t part, int64_t parts) {
    for (const ShardExpand<T>& e : expands) {
      const auto [n0, n1] = columns(e.sides[0].columns(), part, parts);
      WS_CHOSEN_PAIRS(T, shard_expand<T>)(e, rows, n0, n1);
    }
  });
  each_bare(rows, count, [&](int64_t r) {
    for (const ShardExpand<T>& e : expands) {
      const int64_t n = e.sides[0].columns();
      if (e.base.data == nullptr) {
        std::fill_n(e.to.row(r), n, T{});
      } else {
        std::copy_n(e.base.row(r), n, e.to.row(r));
      }
    }
  });
}

Tensor sums_like(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns}, sum_type(like.scalar_type()));
}

// What a forward pass is given, and its outputs.
struct Forward {
  const Tensor& x;
  const Tensors &bases, &a_pools, &b_pools, &a_index, &b_index;
  Tensors ys;
  int64_t ranks = 0;

  void start() {
    STD_TORCH_CHECK(x.dim() == 2 && !bases.empty() && bases.size() == a_index.size() &&
                        bases.size() == b_index.size() && bases.size() == a_pools.size() &&
                        bases.size() == b_pools.size(),
                    "shard_lora: expected x [N, d_in] and lists of one entry per target");
    for (size_t t = 0; t < bases.size(); ++t) {
      STD_TORCH_CHECK(bases[t].dim() == 2 && a_index[t].dim() == 3 &&
                          bases[t].size(0) == x.size(0) &&
                          bases[t].scalar_type() == x.scalar_type(),
                      "base: expected [N, d_out] in the dtype of x");
      ranks += a_index[t].size(1);
      ys.push_back(with_last(bases[t], bases[t].size(1)));
    }
  }

  template <class T>
  void run(Held& held, const ShardRows<Sum<T>>& rows, ShardMatrix<Sum<T>> h) {
    const int64_t count = x.size(0), adapters = a_index[0].size(0);
    auto as = sides_of(held, a_pools, a_index, x.scalar_type(), adapters);
    auto bs = sides_of(held, b_pools, b_index, x.scalar_type(), adapters);
    std::vector<ShardSide*> all;
    for (auto* sides : {&as, &bs})
      for (ShardSide& side : *sides) all.push_back(&side);
    give_zeros(held, all);
    const Tensor from = rows_as_they_lie(x);
    std::vector<ShardShrink<T>> shrinks;
    std::vector<ShardExpand<T>> expands;
    for (size_t t = 0; t < as.size(); ++t) {
      STD_TORCH_CHECK(as[t].columns() == x.size(1) && bs[t].columns() == bases[t].size(1) &&
                          as[t].ranks == bs[t].ranks,
                      "shard_lora: shapes do not fit");
      const Tensor base = held.rows(bases[t]);
      shrinks.push_back({as[t], {pointer<T>(from), from.stride(0)}, h});
      expands.push_back({{bs[t]},
                         {h.data, h.stride},
                         true,
                         {pointer<T>(base), base.stride(0)},
                         {mutable_pointer<T>(ys[t]), bases[t].size(1)}});
      h.data += as[t].ranks;
    }
    shrink(shrinks, rows, false, count, work_of(rows, as));
    expand(expands, rows, count, work_of(rows, bs));
  }
};

std::tuple<Tensors, Tensor> forward(const Tensor& x, const Tensors& bases, const Tensors& a_pools,
                                    const Tensors& b_pools, const Tensors& a_index,
                                    const Tensors& b_index, const MaybeTensor& offsets,
                                    const MaybeTensor& permutation, const MaybeTensor& scales,
                                    double scale) {
  Forward f{x, bases, a_pools, b_pools, a_index, b_index};
  f.start();
  const Tensor h = sums_like(x, x.size(0), f.ranks);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Held held;
    const auto rows = rows_of_groups<Sum<T>>(held, {offsets, permutation, scales, scale}, x.size(0),
                                             a_index[0].size(0));
    f.run<T>(held, rows, {mutable_pointer<Sum<T>>(h), f.ranks});
  });
  return {f.ys, h};
}

Tensors decode(const Tensor& x, const Tensors& bases, const Tensors& a_pools,
               const Tensors& b_pools, const Tensors& a_index, const Tensors& b_index,
               const MaybeTensor& ids, const MaybeTensor& scales, double scale) {
  Forward f{x, bases, a_pools, b_pools, a_index, b_index};
  f.start();
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Held held;
    const auto rows = rows_of_ids<Sum<T>>(held, ids, scales, scale, x.size(0), a_index[0].size(0));
    const Kept h(x.size(0) * f.ranks * sizeof(Sum<T>));
    f.run<T>(held, rows, {h.as<Sum<T>>(), f.ranks});
  });
  return f.ys;
}

std::tuple<Tensor, Tensor> grad_x(const Tensors& grads, const Tensors& a_pools,
                                  const Tensors& b_pools, const Tensors& a_index,
                                  const Tensors& b_index, const MaybeTensor& offsets,
                                  const MaybeTensor& permutation, const MaybeTensor& scales,
                                  double scale, bool wants_x) {
  STD_TORCH_CHECK(!grads.empty() && grads.size() == a_index.size() &&
                      grads.size() == b_index.size() && grads.size() == a_pools.size() &&
                      grads.size() == b_pools.size() && grads[0].dim() == 2 &&
                      a_index[0].dim() == 3 && a_pools[0].dim() == 2,
                  "shard_lora_grad_x: expected lists of one entry per target");
  const Tensor& like = grads[0];
  const int64_t count = like.size(0), adapters = a_index[0].size(0);
  const int64_t d = a_index[0].size(2) * a_pools[0].size(1);
  int64_t ranks = 0;
  for (const Tensor& table : a_index) ranks += table.dim() == 3 ? table.size(1) : 0;
  const Tensor dh = sums_like(like, count, ranks);
  const Tensor dx = wants_x ? with_last(like, d) : torch::stable::new_empty(like, {0});
  dispatch(like.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using S = Sum<T>;
    Held held;
    const auto rows =
        rows_of_groups<S>(held, {offsets, permutation, scales, scale}, count, adapters);
    auto as = sides_of(held, a_pools, a_index, like.scalar_type(), adapters);
    auto bs = sides_of(held, b_pools, b_index, like.scalar_type(), adapters);
    std::vector<ShardSide*> all;
    for (auto* sides : {&as, &bs})
      for (ShardSide& side : *sides) all.push_back(&side);
    give_zeros(held, all);
    std::vector<ShardShrink<T>> shrinks;
    S* to = mutable_pointer<S>(dh);
    for (size_t t = 0; t < bs.size(); ++t) {
      STD_TORCH_CHECK(grads[t].dim() == 2 && grads[t].size(0) == count &&
                          grads[t].scalar_type() == like.scalar_type() &&
                          bs[t].columns() == grads[t].size(1) && as[t].ranks == bs[t].ranks &&
                          as[t].columns() == d,
                      "shard_lora_grad_x: shapes do not fit");
      const Tensor grad = held.rows(grads[t]);
      shrinks.push_back({bs[t], {pointer<T>(grad), grad.stride(0)}, {to, ranks}});
      to += bs[t].ranks;
    }
    shrink(shrinks, rows, true, count, work_of(rows, bs));
    if (!wants_x) return;
    const double work = work_of(rows, as);
    const std::vector<ShardExpand<T>> expands{
        {std::move(as), {pointer<S>(dh), ranks}, false, {}, {mutable_pointer<T>(dx), d}}};
    expand(expands, rows, count, work);
  });
  return {dx, dh};
}

// Which writes to a shard are its first, and zeros for the shards that have none.
struct FirstWrites {
  std::vector<uint8_t> named, first;

  template <class S>
  FirstWrites(const ShardSide& side, const ShardRows<S>& rows) : named(side.shards) {
    first.reserve(rows.segments.size() * side.pieces * side.ranks);
    for (const ShardSegment& segment : rows.segments) {
      for (int64_t piece = 0; piece < side.pieces; ++piece) {
        for (int64_t rank = 0; rank < side.ranks; ++rank) {
          const int64_t n = side.shard(segment.adapter, rank, piece);
          first.push_back(n >= 0 && !named[n]);
          if (n >= 0) named[n] = 1;
        }
      }
    }
  }

  template <class R>
  void clear(const ShardSide& side, R* to, int64_t part, int64_t parts) const {
    const int64_t end = side.shards * (part + 1) / parts;
    for (int64_t n = side.shards * part / parts; n < end; ++n)
      if (!named[n])
        std::memset(static_cast<void*>(to + n * side.stride), 0, side.width * sizeof(R));
  }
};

template <class T, class R>
void outer_into(ShardOuter<T, R>& o, const ShardRows<Sum<T>>& rows, bool add) {
  std::optional<FirstWrites> writes;
  double work = work_of(rows, {o.side});
  if (!add) {
    writes.emplace(o.side, rows);
    o.first = writes->first.data();
    work += static_cast<double>(o.side.shards) * o.side.width / 4;
  }
  on_threads(work, [&](int64_t part, int64_t parts) {
    if (writes.has_value()) writes->clear(o.side, o.to, part, parts);
    const auto [c0, c1] = columns(o.side.width, part, parts);
    if (c0 < c1) WS_CHOSEN_PAIRS(T, shard_outer<T, R>)(o, rows, c0, c1);
  });
}

void outer_(const Tensor& buffer, const Tensor& left, const Tensor& right, const Tensor& index,
            const MaybeTensor& offsets, const MaybeTensor& permutation, const MaybeTensor& scales,
            double scale, bool add) {
  const ScalarType dtype = right.scalar_type();
  STD_TORCH_CHECK(right.dim() == 2 && left.dim() == 2 && index.dim() == 3 && buffer.dim() == 2 &&
                      left.size(0) == right.size(0) && left.size(1) == index.size(1) &&
                      index.size(2) * buffer.size(1) == right.size(1) &&
                      left.scalar_type() == sum_type(dtype),
                  "shard_outer_: shapes or dtypes do not fit");
  const Tensor plain = rows_as_they_lie(buffer);  // a copy where columns are apart
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Sum<T>;
    Held held;
    const auto rows = rows_of_groups<S>(held, {offsets, permutation, scales, scale}, right.size(0),
                                        index.size(0));
    const ShardSide side = side_of(held, plain, index, dtype);
    const Tensor from = held.rows(right);
    auto into = [&]<class R>(R* to) {
      ShardOuter<T, R> o{side,
                         to,
                         {pointer<S>(left), left.stride(0)},
                         left.stride(1),
                         {pointer<T>(from), from.stride(0)}};
      outer_into(o, rows, add);
    };
    if (side.wide) return into(mutable_pointer<S>(plain));
    into(mutable_pointer<T>(plain));
  });
  if (plain.get() != buffer.get()) {
    Tensor whole = buffer;
    torch::stable::copy_(whole, plain);
  }
}

}  // namespace
}  // namespace weightshare

STABLE_TORCH_LIBRARY_IMPL(weightshare, CPU, m) {
  m.impl("shard_lora", TORCH_BOX(&weightshare::forward));
  m.impl("shard_lora_decode", TORCH_BOX(&weightshare::decode));
  m.impl("shard_lora_grad_x", TORCH_BOX(&weightshare::grad_x));
  m.impl("shard_outer_", TORCH_BOX(&weightshare::outer_));
}
