// moe_mlp on the CPU: stable-ABI tensors to the kernels of cpu/moe.h, and their threads.
#include "bindings/kept_cpu.h"
#include "bindings/tensor_cpu.h"

namespace weightshare {
namespace {

// A problem and the memory behind its pointers.
template <class T>
struct Problem {
  Moe<T> moe;
  std::vector<int64_t> token, pair, widths;
  std::vector<Sum<T>> gate;
  Tensor x;
  int64_t pairs, k, rows;
};

struct Routes {
  const Tensor &gates, &offsets, &permutation;
  const MaybeTensor& widths;
  int64_t width;
  const std::string& activation;
};

Activation activation_of(const std::string& name) {
  if (name == "swiglu") return Activation::swiglu;
  if (name == "gelu") return Activation::gelu;
  STD_TORCH_CHECK(name == "relu2", "activation: ", name, " is unknown");
  return Activation::relu2;
}

template <class T>
Stack<const T> stack(const Tensor& t) {
  return {pointer<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

// The rows of the routing: their pairs, tokens and gates; a table's values are checked.
template <class T>
void read_routes(Problem<T>& p, const Routes& routes) {
  const Tensor gates = torch::stable::contiguous(routes.gates);
  const Tensor offset_table = torch::stable::contiguous(routes.offsets);
  const Tensor order = torch::stable::contiguous(routes.permutation);
  p.pairs = gates.numel(), p.k = gates.size(1);
  const int64_t* offsets = integers(offset_table, p.moe.experts + 1, "offsets");
  bool inside = offsets[0] == 0 && offsets[p.moe.experts] <= p.pairs;
  for (int64_t e = 0; e < p.moe.experts; ++e) inside &= offsets[e] <= offsets[e + 1];
  STD_TORCH_CHECK(inside, "offsets: expected to ascend from 0 to at most ", p.pairs);
  p.rows = offsets[p.moe.experts];
  const int64_t* table = integers(order, p.pairs, "permutation");
  p.pair.assign(table, table + p.rows);
  p.token.resize(p.rows), p.gate.resize(p.rows);
  for (int64_t r = 0; r < p.rows; ++r) {
    STD_TORCH_CHECK(table[r] >= 0 && table[r] < p.pairs, "permutation: ", table[r],
                    " is outside 0..", p.pairs - 1);
    p.token[r] = table[r] / p.k;
  }
  dispatch(gates.scalar_type(), [&](auto zero) {
    const auto* values = pointer<decltype(zero)>(gates);
    for (int64_t r = 0; r < p.rows; ++r) p.gate[r] = static_cast<Sum<T>>(widen(values[table[r]]));
  });
  p.widths.assign(p.moe.experts, routes.width);
  if (routes.widths.has_value()) {
    const Tensor list = torch::stable::contiguous(*routes.widths);
    const int64_t* values = integers(list, p.moe.experts, "widths");
    for (int64_t e = 0; e < p.moe.experts; ++e)
      p.widths[e] = std::max<int64_t>(0, std::min(routes.width, values[e]));
  }
  p.moe.token = p.token.data(), p.moe.gate = p.gate.data(), p.moe.widths = p.widths.data();
  WS_CHOSEN_PAIRS(T, moe_plan<T>)(p.moe, offsets);
}

template <class T>
void describe(Problem<T>& p, const Tensor& x, const Tensor& gate_up, const Tensor& down,
              const Routes& routes) {
  p.x = rows_as_they_lie(x);
  Moe<T>& m = p.moe;
  m.tokens = x.size(0), m.d = x.size(1), m.experts = down.size(0), m.f = down.size(2);
  m.width = routes.width, m.activation = activation_of(routes.activation);
  m.x = pointer<T>(p.x), m.x_stride = p.x.stride(0);
  m.gate_up = stack<T>(gate_up), m.down = stack<T>(down);
  m.few = m.gate_up.col_stride == 1 && m.down.col_stride == 1;
  STD_TORCH_CHECK(gate_up.scalar_type() == x.scalar_type() && down.scalar_type() == x.scalar_type(),
                  "moe_mlp: gate_up and down must have the dtype of x");
  STD_TORCH_CHECK(gate_up.size(0) == m.experts && gate_up.size(1) == m.parts() * m.f &&
                      gate_up.size(2) == m.d && down.size(1) == m.d && m.width >= 0 &&
                      m.width <= m.f && routes.gates.size(0) == m.tokens,
                  "moe_mlp: shapes do not fit");
  read_routes(p, routes);
}

// A result summed by columns, through `sums` where its dtype is lower.
template <class T, class F>
void by_columns(double work, int64_t rows, int64_t n, T* result, const F& body) {
  using S = Sum<T>;
  constexpr bool direct = std::is_same_v<T, S>;
  const Kept sums(direct ? 0 : rows * n * sizeof(S));
  S* to = direct ? reinterpret_cast<S*>(result) : sums.as<S>();
  on_threads(work, [&](int64_t part, int64_t parts) {
    const auto [n0, n1] = columns(n, part, parts);
    if (n0 == n1) return;
    body(n0, n1, to);
    if (direct) return;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = n0; c < n1; ++c) result[r * n + c] = narrow<T>(to[r * n + c]);
    }
  });
}

template <class T>
void forward_of(const Problem<T>& p, T* h, T* y) {
  const Moe<T>& m = p.moe;
  const Kept hidden((m.lanes * m.width + 64) * sizeof(Sum<T>));
  const MoeHidden<T> to{hidden.as<void>(), h};
  const double work = static_cast<double>(p.rows) * m.d * m.width;
  on_threads(work, [&](int64_t part, int64_t parts) {
    WS_CHOSEN_PAIRS(T, moe_up<T>)(m, {part, parts}, to);
  });
  by_columns(work, m.tokens, m.d, y, [&](int64_t n0, int64_t n1, Sum<T>* sums) {
    WS_CHOSEN_PAIRS(T, moe_down<T>)(m, n0, n1, to.a, sums);
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& gate_up, const Tensor& down,
                                   const Tensor& gates, const Tensor& offsets,
                                   const Tensor& permutation, const Tensor& inverse,
                                   const MaybeTensor& widths, int64_t width, StringHandle name,
                                   bool save) {
  const std::string activation = text_of(name);
  const int64_t parts = activation_of(activation) == Activation::swiglu ? 2 : 1;
  const Tensor y = with_last(x, x.size(1));
  const int64_t sizes[2] = {save ? permutation.size(0) : 0, save ? parts * width : 0};
  const Tensor h =
      save ? torch::stable::new_empty(x, {sizes[0], sizes[1]}) : torch::stable::new_empty(x, {0});
  advise_huge(h.mutable_data_ptr(), h.numel() * h.element_size());
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Problem<T> p;
    describe(p, x, gate_up, down, {gates, offsets, permutation, widths, width, activation});
    forward_of(p, save ? mutable_pointer<T>(h) : nullptr, mutable_pointer<T>(y));
  });
  return {y, h};
}

// A gradient has its weight's shape, and its dtype or that of sums.
void check_buffer(const MaybeTensor& buffer, const Tensor& weight) {
  if (!buffer.has_value()) return;
  const ScalarType kind = buffer->scalar_type(), low = weight.scalar_type();
  bool fits = buffer->dim() == 3 &&
              (kind == low || (kind == ScalarType::Float && low != ScalarType::Double));
  for (int64_t i = 0; i < 3 && fits; ++i) fits = buffer->size(i) == weight.size(i);
  STD_TORCH_CHECK(fits, "buffer: expected the shape of its weight, and its dtype or float32");
}

// The gradients of the weights, into buffers of T or of the type of sums.
template <class T>
void weight_gradients(const Problem<T>& p, const MaybeTensor& gate_up, const MaybeTensor& down,
                      bool add_gate_up, bool add_down, const T* grad, int64_t grad_stride,
                      const MoeGradHidden<T>& from) {
  auto into = [&p](const MaybeTensor& buffer, const auto& body) {
    if (!buffer.has_value()) return;
    auto run = [&](auto zero) {
      using R = decltype(zero);
      body(Stack<R>{mutable_pointer<R>(*buffer), buffer->stride(0), buffer->stride(1),
                    buffer->stride(2)});
    };
    if (buffer->scalar_type() == p.x.scalar_type()) return run(T{});
    run(Sum<T>{});
  };
  const Moe<T>& m = p.moe;
  const double work = static_cast<double>(p.rows + m.experts) * m.d * m.f;
  on_threads(work, [&](int64_t part, int64_t parts) {
    each_gradient_row(m, part, parts, [&](int64_t e, int which, int64_t r0, int64_t r1) {
      if (which == 0) {
        into(gate_up, [&]<class R>(const Stack<R>& to) {
          WS_CHOSEN_PAIRS(T, moe_grad_gate_up<T, R>)(m, e, r0, r1, from, to, add_gate_up);
        });
      } else {
        into(down, [&]<class R>(const Stack<R>& to) {
          WS_CHOSEN_PAIRS(T, moe_grad_down<T, R>)
          (m, e, r0, r1, grad, grad_stride, from, to, add_down);
        });
      }
    });
  });
}

// The gates' gradient, from its parts of every chunk; pairs that went nowhere have none.
template <class T>
void gate_gradient(const Problem<T>& p, const Sum<T>* parts, const Tensor& to) {
  dispatch(to.scalar_type(), [&](auto zero) {
    using R = decltype(zero);
    R* values = mutable_pointer<R>(to);
    std::fill_n(values, p.pairs, R{});
    for (int64_t e = 0; e < p.moe.experts; ++e) {
      const int64_t chunks = moe_chunks(p.widths[e]);
      for (int64_t t = p.moe.first_tile[e]; t < p.moe.first_tile[e + 1]; ++t) {
        const MoeTile& tile = p.moe.tiles[t];
        for (int64_t r = tile.row; r < tile.row + tile.rows; ++r) {
          Sum<T> total{};
          for (int64_t c = 0; c < chunks; ++c) total += parts[c * p.rows + r];
          values[p.pair[r]] = narrow<R>(static_cast<Sum<R>>(total));
        }
      }
    }
  });
}

template <class T>
void backward_of(const Problem<T>& p, const MaybeTensor& gate_up_buffer,
                 const MaybeTensor& down_buffer, const Tensor& grad, const Tensor& h,
                 bool add_gate_up, bool add_down, T* dx, const Tensor& dgates) {
  using S = Sum<T>;
  const Moe<T>& m = p.moe;
  const int64_t pitch = (m.width + 63) / 64 * 64;
  const Kept dh((m.lanes * m.parts() * m.width + 64) * sizeof(S));
  const Kept dh_rows(sizeof(T) < sizeof(S) ? m.lanes * m.parts() * m.width * sizeof(T) : 0);
  const Kept gated((m.lanes * pitch + 64) * sizeof(S));
  const Kept gates(moe_chunks(m.width) * p.rows * sizeof(S));
  const MoeGradHidden<T> to{dh.as<void>(), dh_rows.as<T>(), gated.as<void>(),
                            gates.as<S>(), p.rows,          pitch};
  const T* dy = pointer<T>(grad);
  const double work = static_cast<double>(p.rows) * m.d * m.width;
  on_threads(work, [&](int64_t part, int64_t parts) {
    WS_CHOSEN_PAIRS(T, moe_grad_hidden<T>)(m, {part, parts}, dy, grad.stride(0), pointer<T>(h), to);
  });
  gate_gradient(p, to.gates, dgates);
  if (dx != nullptr) {
    by_columns(work, m.tokens, m.d, dx, [&](int64_t n0, int64_t n1, S* sums) {
      WS_CHOSEN_PAIRS(T, moe_grad_x<T>)(m, n0, n1, to.dh, sums);
    });
  }
  weight_gradients(p, gate_up_buffer, down_buffer, add_gate_up, add_down, dy, grad.stride(0), to);
}

std::tuple<Tensor, Tensor> backward_(const MaybeTensor& gate_up_buffer,
                                     const MaybeTensor& down_buffer, const Tensor& grad,
                                     const Tensor& x, const Tensor& gate_up, const Tensor& down,
                                     const Tensor& h, const Tensor& gates, const Tensor& offsets,
                                     const Tensor& permutation, const Tensor& inverse,
                                     const MaybeTensor& widths, int64_t width, StringHandle name,
                                     bool add_gate_up, bool add_down, bool wants_x) {
  const std::string activation = text_of(name);
  const Tensor dy = rows_as_they_lie(grad), saved = torch::stable::contiguous(h);
  const Tensor dx = wants_x ? with_last(x, x.size(1)) : torch::stable::new_empty(x, {0});
  const Tensor dgates = with_last(gates, gates.size(1));
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Problem<T> p;
    describe(p, x, gate_up, down, {gates, offsets, permutation, widths, width, activation});
    check_buffer(gate_up_buffer, gate_up);
    check_buffer(down_buffer, down);
    STD_TORCH_CHECK(saved.scalar_type() == x.scalar_type() && dy.scalar_type() == x.scalar_type(),
                    "moe_mlp_backward_: h and grad must have the dtype of x");
    STD_TORCH_CHECK(saved.numel() == p.pairs * p.moe.parts() * width && dy.size(0) == x.size(0) &&
                        dy.size(1) == x.size(1),
                    "moe_mlp_backward_: shapes do not fit");
    backward_of(p, gate_up_buffer, down_buffer, dy, saved, add_gate_up, add_down,
                wants_x ? mutable_pointer<T>(dx) : nullptr, dgates);
  });
  return {dx, dgates};
}

}  // namespace
}  // namespace weightshare

STABLE_TORCH_LIBRARY_IMPL(weightshare, CPU, m) {
  m.impl("moe_mlp", TORCH_BOX(&weightshare::forward));
  m.impl("moe_mlp_backward_", TORCH_BOX(&weightshare::backward_));
}
