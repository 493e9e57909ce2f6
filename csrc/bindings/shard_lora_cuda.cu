// shard_lora_decode on CUDA: stable-ABI tensors to the raw pointers of csrc/cuda, on the current
// stream.
#include <vector>

#include "bindings/tensor_cuda.h"
#include "cuda/shard_lora.cuh"

namespace weightshare::cuda {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kMostColumns = int64_t(1) << 28;  // of a row: columns are counted in 32 bits
constexpr int64_t kMostShards = int64_t(1) << 31;   // that an int32 can name

// Call f with a value of the C++ type of x, and one of that of the pools.
template <class F>
void dispatch(ScalarType dtype, bool wide_pools, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::BFloat16:
      return wide_pools ? f(__nv_bfloat16{}, float{}) : f(__nv_bfloat16{}, __nv_bfloat16{});
    case ScalarType::Half:
      return wide_pools ? f(__half{}, float{}) : f(__half{}, __half{});
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16 or float16");
  }
}

void check_kind(const Tensor& t, const char* name, int64_t dims, ScalarType dtype,
                const Tensor& x) {
  STD_TORCH_CHECK(
      t.dim() == dims && t.scalar_type() == dtype && t.get_device_index() == x.get_device_index(),
      name, ": expected ", dims, " dimensions, the dtype that fits x and its device");
}

// Rows whose elements lie side by side, however far the rows are apart.
Tensor with_rows(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// A table [adapters, r, l] each of whose matrices is contiguous.
Tensor with_matrices(const Tensor& t) {
  const bool dense = (t.size(2) <= 1 || t.stride(2) == 1) &&
                     (t.size(1) <= 1 || t.stride(1) == t.size(2) || t.size(2) == 0);
  return dense ? t : torch::stable::contiguous(t);
}

Tensor pool_as(const Tensor& t, const char* name, ScalarType dtype, const Tensor& x) {
  const bool narrower = dtype == ScalarType::Float && t.scalar_type() == x.scalar_type();
  const Tensor pool = narrower && t.scalar_type() != dtype ? torch::stable::to(t, dtype) : t;
  check_kind(pool, name, 2, dtype, x);
  return torch::stable::contiguous(pool);
}

template <class P>
ShardMatrix<P> matrix_of(const Tensor& pool, const Tensor& index) {
  const int64_t shards = pool.size(0);
  return {pointer<P>(pool),
          pointer<int32_t>(index),
          index.stride(0),
          static_cast<uint32_t>(shards < kMostShards ? shards : kMostShards),
          static_cast<int>(pool.size(1)),
          static_cast<int>(index.size(2))};
}

// The tensors that a launch reads, in layouts that the kernel takes; kept until it is enqueued.
struct Inputs {
  Tensor x;
  Tensors bases, a_pools, b_pools, a_index, b_index;

  Inputs(const Tensor& x_, const Tensors& bases_, const Tensors& a_pools_, const Tensors& b_pools_,
         const Tensors& a_index_, const Tensors& b_index_)
      : x(with_rows(x_)) {
    const size_t count = bases_.size();
    STD_TORCH_CHECK(a_pools_.size() == count && b_pools_.size() == count &&
                        a_index_.size() == count && b_index_.size() == count,
                    "shard_lora_decode: expected one entry per target in every list");
    wide_pools = x.scalar_type() == ScalarType::Float;
    for (const Tensors* pools : {&a_pools_, &b_pools_})
      for (const Tensor& pool : *pools) wide_pools |= pool.scalar_type() == ScalarType::Float;
    const ScalarType kind = wide_pools ? ScalarType::Float : x.scalar_type();
    for (size_t g = 0; g < count; ++g) {
      check_kind(bases_[g], "bases", 2, x.scalar_type(), x);
      check_kind(a_index_[g], "a_index", 3, ScalarType::Int, x);
      check_kind(b_index_[g], "b_index", 3, ScalarType::Int, x);
      bases.push_back(with_rows(bases_[g]));
      a_pools.push_back(pool_as(a_pools_[g], "a_pools", kind, x));
      b_pools.push_back(pool_as(b_pools_[g], "b_pools", kind, x));
      a_index.push_back(with_matrices(a_index_[g]));
      b_index.push_back(with_matrices(b_index_[g]));
      check_sizes(g);
    }
  }

  bool wide_pools;  // float32

 private:
  void check_sizes(size_t g) const {
    const Tensor &a = a_index[g], &b = b_index[g];
    STD_TORCH_CHECK(bases[g].size(0) == x.size(0) && a.size(0) == a_index[0].size(0) &&
                        a.size(0) == b.size(0) && a.size(1) == b.size(1) &&
                        a.size(2) * a_pools[g].size(1) == x.size(1) &&
                        b.size(2) * b_pools[g].size(1) == bases[g].size(1),
                    "shard_lora_decode: the sizes of target ", g, " do not fit together");
    STD_TORCH_CHECK(x.size(1) < kMostColumns && bases[g].size(1) < kMostColumns &&
                        a.size(0) < kMostShards - 1 && a.size(1) < kMostColumns / kShardRows &&
                        a.size(2) < kMostColumns && b.size(2) < kMostColumns,
                    "shard_lora_decode: target ", g, " has a size beyond what a kernel counts");
  }
};

// Up to kShardTargets targets in one launch.
template <class T, class P>
void run(const Inputs& in, size_t first, size_t last, const Tensors& ys, const MaybeTensor& ids,
         const MaybeTensor& scales, double scale) {
  ShardCall<T, P> call = {};
  call.x = pointer<T>(in.x);
  call.x_stride = in.x.stride(0);
  call.ids = ids ? pointer<int64_t>(*ids) : nullptr;
  call.scales = scales ? pointer<Sum<T>>(*scales) : nullptr;
  call.scale = static_cast<Sum<T>>(scale);
  call.count = static_cast<int>(last - first);
  call.d_in = static_cast<int>(in.x.size(1));
  call.adapters = static_cast<int>(in.a_index[first].size(0));
  for (size_t g = first; g < last; ++g) {
    ShardTarget<T, P>& target = call.targets[g - first];
    target.a = matrix_of<P>(in.a_pools[g], in.a_index[g]);
    target.b = matrix_of<P>(in.b_pools[g], in.b_index[g]);
    target.base = pointer<T>(in.bases[g]);
    target.base_stride = in.bases[g].stride(0);
    target.y = mutable_pointer<T>(ys[g]);
    target.y_stride = target.d_out = static_cast<int>(ys[g].size(1));
    target.rank = static_cast<int>(in.a_index[g].size(1));
    target.first = call.ranks;
    call.ranks += static_cast<int>(divide_up(target.rank, kShardPad)) * kShardPad;
  }
  int processors = 0;
  check_launch(
      "shard_lora_decode",
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, in.x.get_device_index()));
  const int64_t rows = in.x.size(0);
  const Tensor h =
      torch::stable::new_empty(in.x, {shard_scratch(rows, call.ranks)},
                               std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float);
  call.h = mutable_pointer<Sum<T>>(h);
  check_launch("shard_lora_decode", shard_lora(call, rows, processors, current_stream(in.x)));
}

Tensors decode(const Tensor& x, const Tensors& bases, const Tensors& a_pools,
               const Tensors& b_pools, const Tensors& a_index, const Tensors& b_index,
               const MaybeTensor& ids_, const MaybeTensor& scales_, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(x.dim() == 2, "x: expected [N, d_in]");
  const Inputs in(x, bases, a_pools, b_pools, a_index, b_index);
  MaybeTensor ids = ids_, scales = scales_;
  if (ids) {
    check_kind(*ids, "ids", 1, ScalarType::Long, x);
    STD_TORCH_CHECK(ids->size(0) == x.size(0), "ids: expected one per row of x");
    ids = torch::stable::contiguous(*ids);
  }
  if (scales) {
    const bool twice = x.scalar_type() == ScalarType::Double;
    check_kind(*scales, "scales", 1, twice ? ScalarType::Double : ScalarType::Float, x);
    STD_TORCH_CHECK(bases.empty() || scales->size(0) == in.a_index[0].size(0),
                    "scales: expected one per adapter");
    scales = torch::stable::contiguous(*scales);
  }
  Tensors ys;
  for (const Tensor& base : in.bases)
    ys.push_back(torch::stable::new_empty(base, {base.size(0), base.size(1)}));
  for (size_t first = 0; first < bases.size(); first += kShardTargets) {
    const size_t last = least(first + kShardTargets, bases.size());
    dispatch(x.scalar_type(), in.wide_pools, [&](auto element, auto of_pool) {
      run<decltype(element), decltype(of_pool)>(in, first, last, ys, ids, scales, scale);
    });
  }
  return ys;
}

}  // namespace
}  // namespace weightshare::cuda

STABLE_TORCH_LIBRARY_IMPL(weightshare, CUDA, m) {
  m.impl("shard_lora_decode", TORCH_BOX(&weightshare::cuda::decode));
}
