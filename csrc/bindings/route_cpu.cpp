// route on the CPU: scores, choice, gates and the sorted tables in one call.
#include <string_view>

#include "bindings/tensor_cpu.h"

namespace weightshare {
namespace {

Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(1, sizes.begin()[1]);
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.begin(), strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

Tensor integers(std::initializer_list<int64_t> sizes) {
  return empty(sizes, aoti_torch_dtype_int64());
}

ScoreFn score_fn(StringHandle name) {
  const std::string asked = text_of(name);
  const bool known = asked == "sigmoid" || asked == "softmax" || asked == "sqrt_softplus";
  const ScoreFn fn = asked == "sigmoid"   ? ScoreFn::sigmoid
                     : asked == "softmax" ? ScoreFn::softmax
                                          : ScoreFn::sqrt_softplus;
  STD_TORCH_CHECK(known, "score_fn: expected sigmoid, softmax or sqrt_softplus");
  return fn;
}

// A contiguous tensor, held as long as its pointer is used; null for None.
struct Padding {
  MaybeTensor held;

  Padding(const MaybeTensor& padding, int64_t rows) {
    if (!padding) return;
    STD_TORCH_CHECK(padding->scalar_type() == ScalarType::Bool && padding->numel() == rows,
                    "padding: expected bool of ", rows, " tokens");
    held = torch::stable::contiguous(*padding);
  }
  const bool* flags() const { return held ? pointer<bool>(*held) : nullptr; }
};

// Runs part(p, first row, last row) for contiguous parts of the rows, on all threads.
template <class Part>
void for_parts(int64_t parts, int64_t rows, const Part& part) {
  if (parts == 1) return part(0, 0, rows);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) part(p, rows * p / parts, rows * (p + 1) / parts);
  });
}

int64_t parts_for(int64_t rows, int64_t work_per_row) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min({threads, rows, rows * work_per_row / 8192}));
}

using Tables = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct TableTensors {
  Tensor counts, offsets, permutation, inverse;

  TableTensors(int64_t pairs, int64_t experts)
      : counts(integers({experts})),
        offsets(integers({experts + 1})),
        permutation(integers({pairs})),
        inverse(integers({pairs})) {}

  RouteTables on(const Tensor& ids, const Padding& padding) {
    return {ids.size(0),
            counts.numel(),
            ids.size(1),
            pointer<int64_t>(ids),
            padding.flags(),
            mutable_pointer<int64_t>(counts),
            mutable_pointer<int64_t>(offsets),
            mutable_pointer<int64_t>(permutation),
            mutable_pointer<int64_t>(inverse)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& scores, const MaybeTensor& bias, const MaybeTensor& padding_, int64_t k,
    StringHandle fn, int64_t groups, int64_t topk_groups, int64_t group_top, bool normalize,
    double scale) {
  const RouteOptions o{scores.size(0), scores.size(1), k,         score_fn(fn), groups,
                       topk_groups,    group_top,      normalize, scale};
  STD_TORCH_CHECK(o.experts <= INT32_MAX && k >= 1 && groups >= 1 && o.experts % groups == 0 &&
                      topk_groups >= 1 && topk_groups <= groups && group_top >= 1 &&
                      group_top <= o.experts / groups && k <= topk_groups * (o.experts / groups),
                  "route: k or groups do not fit the ", o.experts, " experts");
  const Tensor logits = torch::stable::contiguous(scores);
  const Padding padding(padding_, o.rows);
  const bool wide = scores.scalar_type() == ScalarType::Double;
  MaybeTensor shift;
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) &&
                        bias->numel() == o.experts,
                    "bias: expected float32 (float64 for float64 scores) of ", o.experts,
                    " experts");
    shift = torch::stable::contiguous(*bias);
  }
  const Tensor ids = integers({o.rows, k});
  const Tensor gates =
      empty({o.rows, k}, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  TableTensors made(o.rows * k, o.experts);
  const RouteTables tables = made.on(ids, padding);
  const int64_t parts = parts_for(o.rows, o.experts);
  std::vector<int64_t> bins(parts * (o.experts + 1));
  dispatch(scores.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RouteRows<T> rows{o,
                            pointer<T>(logits),
                            shift ? pointer<Sum<T>>(*shift) : nullptr,
                            padding.flags(),
                            mutable_pointer<int64_t>(ids),
                            mutable_pointer<Sum<T>>(gates)};
    for_parts(parts, o.rows, [&](int64_t p, int64_t r0, int64_t r1) {
      WS_CHOSEN(choose_rows<T>)(rows, r0, r1);
      tables.count(r0, r1, bins.data() + p * (o.experts + 1));
    });
  });
  tables.prefix(bins.data(), parts);
  for_parts(parts, o.rows, [&](int64_t p, int64_t r0, int64_t r1) {
    tables.place(r0, r1, bins.data() + p * (o.experts + 1));
  });
  return {ids, gates, made.counts, made.offsets, made.permutation, made.inverse};
}

Tables tables(const Tensor& experts, const MaybeTensor& padding_, int64_t num_experts) {
  STD_TORCH_CHECK(experts.dim() == 2 && experts.scalar_type() == ScalarType::Long,
                  "experts: expected int64 [T, k]");
  const Tensor ids = torch::stable::contiguous(experts);
  const int64_t rows = ids.size(0);
  const Padding padding(padding_, rows);
  TableTensors made(ids.numel(), num_experts);
  const RouteTables tables = made.on(ids, padding);
  const int64_t parts = parts_for(rows, 8 * ids.size(1));
  std::vector<int64_t> bins(parts * (num_experts + 1));
  for_parts(parts, rows, [&](int64_t p, int64_t r0, int64_t r1) {
    tables.count(r0, r1, bins.data() + p * (num_experts + 1));
  });
  tables.prefix(bins.data(), parts);
  for_parts(parts, rows, [&](int64_t p, int64_t r0, int64_t r1) {
    tables.place(r0, r1, bins.data() + p * (num_experts + 1));
  });
  return {made.counts, made.offsets, made.permutation, made.inverse};
}

Tensor backward(const Tensor& grad_gates, const Tensor& scores, const Tensor& experts,
                const MaybeTensor& padding_, StringHandle fn, bool normalize, double scale) {
  const int64_t k = experts.size(1);
  const RouteOptions o{scores.size(0), scores.size(1), k, score_fn(fn), 1, 1, 1, normalize, scale};
  const bool wide = scores.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(experts.scalar_type() == ScalarType::Long && experts.size(0) == o.rows,
                  "experts: expected int64 of ", o.rows, " rows");
  STD_TORCH_CHECK(
      grad_gates.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) &&
          grad_gates.numel() == experts.numel(),
      "grad_gates: expected the shape of experts, in float32 (float64 for float64 scores)");
  const Tensor g = torch::stable::contiguous(grad_gates), x = torch::stable::contiguous(scores);
  const Tensor ids = torch::stable::contiguous(experts);
  table(torch::stable::view(ids, {ids.numel()}), o.experts, "experts");
  const Padding padding(padding_, o.rows);
  Tensor to = torch::stable::empty_like(x);
  dispatch(scores.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RouteGradRows<T> rows{o,
                                pointer<Sum<T>>(g),
                                pointer<T>(x),
                                padding.flags(),
                                pointer<int64_t>(ids),
                                mutable_pointer<T>(to)};
    for_parts(parts_for(o.rows, o.experts), o.rows, [&](int64_t, int64_t r0, int64_t r1) {
      WS_CHOSEN(choose_rows_backward<T>)(rows, r0, r1);
    });
  });
  return to;
}

}  // namespace
}  // namespace weightshare

STABLE_TORCH_LIBRARY_IMPL(weightshare, CPU, m) {
  m.impl("route", TORCH_BOX(&weightshare::forward));
  m.impl("route_grad", TORCH_BOX(&weightshare::backward));
  m.impl("route_tables", TORCH_BOX(&weightshare::tables));
}
