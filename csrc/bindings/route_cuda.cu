// route on CUDA: stable-ABI tensors to the raw pointers of csrc/cuda, on the current stream.
#include "bindings/tensor_cuda.h"
#include "cuda/route.cuh"
#include "cuda/route_grad.cuh"

namespace weightshare::cuda {
namespace {

Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

RouteScore score_of(StringHandle name) {
  const std::string asked = text_of(name);
  const bool known = asked == "sigmoid" || asked == "softmax" || asked == "sqrt_softplus";
  const RouteScore score = asked == "sigmoid"   ? kSigmoid
                           : asked == "softmax" ? kSoftmax
                                                : kSqrtSoftplus;
  STD_TORCH_CHECK(known, "score_fn: expected sigmoid, softmax or sqrt_softplus");
  return score;
}

RouteType type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return kRouteDouble;
    case ScalarType::Float:
      return kRouteFloat;
    case ScalarType::BFloat16:
      return kRouteBfloat16;
    case ScalarType::Half:
      return kRouteHalf;
    default:
      STD_TORCH_CHECK(false, "scores: expected float32, float64, bfloat16 or float16");
  }
}

ScalarType wide_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Contiguous, with what a kernel relies on checked; nothing for None.
MaybeTensor checked(const MaybeTensor& t, const char* name, ScalarType dtype, int64_t size,
                    const Tensor& like) {
  if (!t) return t;
  STD_TORCH_CHECK(t->scalar_type() == dtype && t->numel() == size &&
                      t->get_device_index() == like.get_device_index(),
                  name, ": expected ", size, " elements of the right dtype on the same device");
  return torch::stable::contiguous(*t);
}

// Of a name of its own: an overload of pointer() here would hide the one for tensors, and a tensor
// converts to a MaybeTensor, so that it would call itself.
template <class T>
const T* pointer_or_null(const MaybeTensor& t) {
  return t ? pointer<T>(*t) : nullptr;
}

RouteShape shape_of(int64_t rows, int64_t experts, int64_t k) {
  STD_TORCH_CHECK(experts < 0x7fffffff && k < 0x7fffffff, "route: too many experts");
  RouteShape shape = {};
  shape.rows = rows;
  shape.k_of_pair = Divisor(k < 1 ? 1 : k);
  shape.experts = static_cast<int>(experts);
  shape.k = static_cast<int>(k);
  shape.groups = shape.topk_groups = shape.group_top = 1;
  return shape;
}

struct TableTensors {
  Tensor counts, offsets, permutation, inverse;

  TableTensors(const Tensor& like, int64_t pairs, int64_t experts)
      : counts(make(like, {experts}, ScalarType::Long)),
        offsets(make(like, {experts + 1}, ScalarType::Long)),
        permutation(make(like, {pairs}, ScalarType::Long)),
        inverse(make(like, {pairs}, ScalarType::Long)) {}
};

template <class S>
void run(const RouteShape& shape, const RouteTokens<S>& tokens, const TableTensors& tables,
         const Tensor& like) {
  int processors = 0;
  check_launch("route", cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount,
                                               like.get_device_index()));
  const RoutePlan plan = route_plan<S>(shape, processors);
  STD_TORCH_CHECK(plan.warps > 0, "route: ", shape.experts,
                  " experts do not fit the shared memory of a block");
  const Tensor bins = make(like, {plan.blocks * (shape.experts + 1)}, ScalarType::Int);
  check_launch(
      "route",
      route<S>(shape, tokens,
               {mutable_pointer<int64_t>(tables.counts), mutable_pointer<int64_t>(tables.offsets),
                mutable_pointer<int64_t>(tables.permutation),
                mutable_pointer<int64_t>(tables.inverse), mutable_pointer<int32_t>(bins)},
               plan, current_stream(like)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& scores, const MaybeTensor& bias_, const MaybeTensor& padding_, int64_t k,
    StringHandle fn, int64_t groups, int64_t topk_groups, int64_t group_top, bool normalize,
    double scale) {
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  const Tensor logits = torch::stable::contiguous(scores);
  RouteShape shape = shape_of(scores.size(0), scores.size(1), k);
  shape.score = score_of(fn);
  STD_TORCH_CHECK(k >= 1 && groups >= 1 && shape.experts % groups == 0 && topk_groups >= 1 &&
                      topk_groups <= groups && group_top >= 1 &&
                      group_top <= shape.experts / groups &&
                      k <= topk_groups * (shape.experts / groups),
                  "route: k or groups do not fit the ", shape.experts, " experts");
  shape.groups = static_cast<int>(groups);
  shape.topk_groups = static_cast<int>(topk_groups);
  shape.group_top = static_cast<int>(group_top);
  shape.type = type_of(scores);
  shape.normalize = normalize;
  shape.scale = scale;
  const ScalarType wide = wide_type(scores);
  const MaybeTensor bias = checked(bias_, "bias", wide, shape.experts, scores);
  const MaybeTensor padding = checked(padding_, "padding", ScalarType::Bool, shape.rows, scores);
  const Tensor ids = make(scores, {shape.rows, k}, ScalarType::Long);
  const Tensor gates = make(scores, {shape.rows, k}, wide);
  const TableTensors tables(scores, shape.rows * k, shape.experts);
  const auto launch_as = [&](auto zero) {
    using S = decltype(zero);
    run<S>(shape,
           {logits.const_data_ptr(), pointer_or_null<S>(bias), pointer_or_null<bool>(padding),
            mutable_pointer<int64_t>(ids), mutable_pointer<S>(gates)},
           tables, scores);
  };
  if (shape.type == kRouteDouble)
    launch_as(double{});
  else
    launch_as(float{});
  return {ids, gates, tables.counts, tables.offsets, tables.permutation, tables.inverse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> tables(const Tensor& experts,
                                                  const MaybeTensor& padding_,
                                                  int64_t num_experts) {
  const torch::stable::accelerator::DeviceGuard guard(experts.get_device_index());
  STD_TORCH_CHECK(experts.dim() == 2 && experts.scalar_type() == ScalarType::Long,
                  "experts: expected int64 [T, k]");
  const Tensor ids = torch::stable::contiguous(experts);
  const RouteShape shape = shape_of(ids.size(0), num_experts, ids.size(1));
  const MaybeTensor padding = checked(padding_, "padding", ScalarType::Bool, shape.rows, ids);
  const TableTensors made(ids, ids.numel(), num_experts);
  // Without logits the kernel only reads the ids.
  run<float>(shape,
             {nullptr, nullptr, pointer_or_null<bool>(padding),
              const_cast<int64_t*>(pointer<int64_t>(ids)), nullptr},
             made, ids);
  return {made.counts, made.offsets, made.permutation, made.inverse};
}

Tensor backward(const Tensor& grad_gates, const Tensor& scores, const Tensor& experts,
                const MaybeTensor& padding_, StringHandle fn, bool normalize, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  RouteShape shape = shape_of(scores.size(0), scores.size(1), experts.size(1));
  shape.score = score_of(fn);
  shape.type = type_of(scores);
  shape.normalize = normalize;
  shape.scale = scale;
  const int64_t pairs = shape.rows * shape.k;
  const Tensor x = torch::stable::contiguous(scores);
  const MaybeTensor grad = checked(grad_gates, "grad_gates", wide_type(scores), pairs, scores);
  const MaybeTensor ids = checked(experts, "experts", ScalarType::Long, pairs, scores);
  const MaybeTensor padding = checked(padding_, "padding", ScalarType::Bool, shape.rows, scores);
  const Tensor to = torch::stable::empty_like(x);
  const auto launch_as = [&](auto zero) {
    using S = decltype(zero);
    check_launch("route", route_grad<S>(shape,
                                        {pointer_or_null<S>(grad), x.const_data_ptr(),
                                         pointer_or_null<bool>(padding),
                                         pointer_or_null<int64_t>(ids), to.mutable_data_ptr()},
                                        current_stream(scores)));
  };
  if (shape.type == kRouteDouble)
    launch_as(double{});
  else
    launch_as(float{});
  return to;
}

}  // namespace
}  // namespace weightshare::cuda

STABLE_TORCH_LIBRARY_IMPL(weightshare, CUDA, m) {
  m.impl("route", TORCH_BOX(&weightshare::cuda::forward));
  m.impl("route_grad", TORCH_BOX(&weightshare::cuda::backward));
  m.impl("route_tables", TORCH_BOX(&weightshare::cuda::tables));
}
