// From stable-ABI tensors to the raw pointers that the CPU kernels read, and back.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <utility>
#include <vector>

#include "bindings/tensor.h"
#include "cpu/isa.h"

namespace weightshare {

// Calls f with a value of the C++ type of a floating dtype.
template <class F>
auto dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(bfloat16{});
    case ScalarType::Half:
      return f(float16{});
    default:
      STD_TORCH_CHECK(false, "weightshare: expected float32, float64, bfloat16 or float16");
  }
}

// Low precision with more rows than this goes to the library: its kernels use instructions that
// ours do not.
constexpr int64_t kFewRows = 48;

inline bool is_low_precision(const Tensor& t) {
  return t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half;
}

// [..., n] as contiguous [rows, n]; a copy only where the strides leave no choice.
inline Tensor rows_of(const Tensor& t) {
  const int64_t n = t.size(t.dim() - 1);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  Tensor dense = t.is_contiguous() ? t : torch::stable::contiguous(t);
  return t.dim() == 2 ? dense : torch::stable::view(dense, {rows, n});
}

// New tensor of the leading sizes of `like` and a last dimension of n.
inline Tensor with_last(const Tensor& like, int64_t n) {
  constexpr int64_t kDims = 16;
  const int64_t dims = like.dim();
  STD_TORCH_CHECK(dims <= kDims, "expected at most ", kDims, " dimensions, got ", dims);
  int64_t sizes[kDims], strides[kDims], step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    sizes[d] = d == dims - 1 ? n : like.size(d);
    strides[d] = step;
    step *= std::max<int64_t>(1, sizes[d]);
  }
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle made;  // past the dispatcher's boxing, which costs more than the allocation
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Pointer to an index table, contiguous and within [0, size), or null. It is checked again here,
// at the price of reading it once, because a traced graph takes tables whose values nobody saw.
inline const int64_t* table(const MaybeTensor& index, int64_t size, const char* name) {
  if (!index.has_value()) return nullptr;
  STD_TORCH_CHECK(index->scalar_type() == ScalarType::Long && index->is_contiguous(), name,
                  ": an index table must be contiguous int64");
  const auto* values = static_cast<const int64_t*>(index->const_data_ptr());
  bool inside = true;
  for (int64_t i = 0; i < index->numel(); ++i) inside &= values[i] >= 0 && values[i] < size;
  STD_TORCH_CHECK(inside, name, ": an index is outside 0..", size - 1);
  return values;
}

template <class T>
Matrix<const T> matrix(const Tensor& t) {
  return {pointer<T>(t), t.stride(0), t.stride(1)};
}

template <class T>
Matrix<T> mutable_matrix(const Tensor& t) {
  return {mutable_pointer<T>(t), t.stride(0), t.stride(1)};
}

// How a product is cut among threads: parts_m x parts_n rectangles.
struct Cut {
  int64_t parts_m, parts_n;
};

inline Cut cut_for(int64_t m, int64_t n, int64_t k) {
  const double work = static_cast<double>(m) * n * k;
  int64_t threads = torch::stable::get_num_threads();
  threads = std::max<int64_t>(1, std::min<int64_t>(threads, static_cast<int64_t>(work / 32768)));
  Cut best{1, threads};
  double least = -1;
  for (int64_t parts = 1; parts <= threads; ++parts) {
    if (threads % parts != 0) continue;
    // Every part packs its rows of one operand and its columns of the other.
    const double packed =
        static_cast<double>(m) * (threads / parts) + static_cast<double>(n) * parts;
    if (least < 0 || packed < least) least = packed, best = {parts, threads / parts};
  }
  return best;
}

// Runs a product on all threads. `part` may adapt the product to the part of rows it runs on.
template <class T, class R, class Part>
void run(const Product<T, R>& p, Cut cut, const Part& part) {
  constexpr int64_t kAlign = 32;  // columns of the widest register tile
  const int64_t columns = (p.n + kAlign - 1) / kAlign;
  if (cut.parts_m * cut.parts_n == 1) {
    WS_CHOSEN(product<T, R>)(part(p, 0), 0, p.m, 0, p.n);
    return;
  }
  torch::stable::parallel_for(0, cut.parts_m * cut.parts_n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / cut.parts_n, j = task % cut.parts_n;
      const int64_t n0 = std::min(p.n, columns * j / cut.parts_n * kAlign);
      const int64_t n1 = std::min(p.n, columns * (j + 1) / cut.parts_n * kAlign);
      const int64_t m0 = p.m * i / cut.parts_m, m1 = p.m * (i + 1) / cut.parts_m;
      WS_CHOSEN(product<T, R>)(part(p, i), m0, m1, n0, n1);
    }
  });
}

template <class T, class R>
void run(const Product<T, R>& p) {
  run(p, cut_for(p.m, p.n, p.k), [](const Product<T, R>& whole, int64_t) { return whole; });
}

// Pointer to a table of integers whose values are yet to be checked.
inline const int64_t* integers(const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.numel() == size,
                  name, ": expected a contiguous int64 tensor of ", size, " elements");
  return pointer<int64_t>(t);
}

// Rows that run along their columns; a copy where the strides leave no choice.
inline Tensor rows_as_they_lie(const Tensor& t) {
  return t.stride(1) == 1 || t.size(1) == 1 ? t : torch::stable::contiguous(t);
}

// body(part, parts) on all threads, of which few are used for little work.
template <class F>
void on_threads(double work, const F& body) {
  const int64_t threads = std::max<int64_t>(
      1, std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(work / 32768)));
  if (threads == 1) return body(int64_t{0}, int64_t{1});
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) body(part, threads);
  });
}

// A part of n columns, in whole cache lines.
inline std::pair<int64_t, int64_t> columns(int64_t n, int64_t part, int64_t parts) {
  constexpr int64_t kLine = 32;
  const int64_t lines = (n + kLine - 1) / kLine;
  return {std::min(n, lines * part / parts * kLine),
          std::min(n, lines * (part + 1) / parts * kLine)};
}

template <size_t N>
Tensor call(const char* op, const char* overload, std::array<StableIValue, N> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// PyTorch's own linear layer, on views as they are.
inline Tensor library_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  using torch::stable::detail::from;
  return call<3>("aten::linear", "", {from(x), from(weight), from(bias)});
}

inline Tensor library_matmul(const Tensor& a, const Tensor& b) {
  return torch::stable::matmul(a, b);
}

}  // namespace weightshare
