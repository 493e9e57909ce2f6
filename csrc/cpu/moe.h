// The experts of a sparse MoE on the CPU: y_t = sum_j gate_tj * down_e act(gate_up_e x_t).
//
// Every product here is one register tile (moe.inl): `lanes` is packed, unit by unit of the
// contraction, a vector wide; `other` is broadcast, element by element, from wherever it lies.
// Tokens are the lanes wherever a weight is read. They are gathered while they are packed, and a
// weight that runs along the contraction is not packed at all: with some 64 tokens an expert,
// packing it would cost a library a tenth of its time and more. The activation leaves
// the hidden units as packed lanes of the next product.
//
// A unit is one step of the contraction: an element in the type of sums or, where the processor
// has dot products of bfloat16 pairs (avx512_bf16), a pair of elements.
//
// Threads divide hidden units in the first product and columns of the result in the second, never
// tokens: skewed routing leaves none idle, each element is summed by one thread in a fixed order,
// and the result does not depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

// A lambda is compiled for the baseline, whatever the function around it is compiled for, unless it
// becomes part of that function.
#define WS_INLINE __attribute__((always_inline))

namespace weightshare {

enum class Activation { swiglu, gelu, relu2 };

// Matrices [experts][rows, cols] behind strides.
template <class T>
struct Stack {
  T* data;
  int64_t step, row_stride, col_stride;

  T* at(int64_t e, int64_t r, int64_t c) const {
    return data + e * step + r * row_stride + c * col_stride;
  }
};

// Up to kRows rows, in the order of the routing, of one expert; `at` counts lanes before it.
struct MoeTile {
  int64_t expert, row, rows, lanes, at;
};

// Tiles [first, last) of one expert that are worked on together.
struct MoeBlock {
  int64_t expert, first, last, lanes;
};

template <class T>
struct Moe {
  using S = Sum<T>;
  int64_t tokens, d, f, experts, width;
  Activation activation;
  bool few;               // few rows may meet a weight by dot products
  const int64_t* token;   // of each row
  const S* gate;          // of each row
  const int64_t* widths;  // of each expert
  const T* x;             // [tokens, d]
  int64_t x_stride;       // from row to row
  Stack<const T> gate_up, down;
  std::vector<MoeTile> tiles;
  std::vector<int64_t> first_tile;  // of each expert, and the end
  std::vector<MoeBlock> blocks;
  int64_t lanes;  // of all tiles

  int64_t parts() const { return activation == Activation::swiglu ? 2 : 1; }
};

// Hidden units as lanes of the second product, tile behind tile; units are of the instruction set.
template <class T>
struct MoeHidden {
  void* a;         // per tile [units of width, lanes], or [rows, units of width] where rows are few
  T* h = nullptr;  // [rows, parts * width]: pre-activations for backward, or null
};

// What the gradients of the weights and of x are made of, tile behind tile.
template <class T>
struct MoeGradHidden {
  void* dh;       // [parts, units of width, lanes]: lanes of the gradient of x
  T* dh_rows;     // [parts, width, lanes], where units are pairs: pairs along tokens
  void* gated;    // [units of lanes, pitch]: hidden units times their gate
  Sum<T>* gates;  // [chunks of width, rows]: parts of the gates' gradient
  int64_t rows;   // of all tiles
  int64_t pitch;  // of gated: width, rounded up to a tile's lanes
};

// Hidden units are worked on in chunks of this many: what a thread takes at a time.
constexpr int64_t kMoeChunk = 48;

inline int64_t moe_chunks(int64_t width) { return (width + kMoeChunk - 1) / kMoeChunk; }

// A thread's share [begin, end) of the chunks of all blocks, weighted by their lanes.
struct MoeShare {
  int64_t part, parts;

  template <class T>
  void each(const Moe<T>& moe, const auto& body) const {
    double total = 0;
    for (const MoeBlock& b : moe.blocks)
      total += static_cast<double>(b.lanes) * moe_chunks(moe.widths[b.expert]);
    const double low = total * part / parts, high = total * (part + 1) / parts;
    double before = 0;
    for (const MoeBlock& b : moe.blocks) {
      const int64_t chunks = moe_chunks(moe.widths[b.expert]);
      auto cut = [&](double cost) {
        const double at = (cost - before) / b.lanes;
        return at <= 0 ? int64_t{0} : at >= chunks ? chunks : static_cast<int64_t>(at);
      };
      const int64_t begin = cut(low), end = part + 1 == parts ? chunks : cut(high);
      if (begin < end) body(b, begin, end);
      before += static_cast<double>(b.lanes) * chunks;
    }
  }
};

// A thread's share of the rows of the weights' gradients: body(expert, which, r0, r1), which being
// 0 for gate_up and 1 for down. A row costs its tokens and a little for being written.
template <class T>
void each_gradient_row(const Moe<T>& moe, int64_t part, int64_t parts, const auto& body) {
  const int64_t rows[2] = {moe.parts() * moe.f, moe.d}, cols[2] = {moe.d, moe.f};
  auto cost = [&](int64_t e, int which) {
    int64_t tokens = 16;
    for (int64_t t = moe.first_tile[e]; t < moe.first_tile[e + 1]; ++t) tokens += moe.tiles[t].rows;
    return static_cast<double>(tokens) * cols[which];
  };
  double total = 0;
  for (int64_t e = 0; e < moe.experts; ++e)
    for (int which : {0, 1}) total += cost(e, which) * rows[which];
  const double low = total * part / parts, high = total * (part + 1) / parts;
  double before = 0;
  for (int64_t e = 0; e < moe.experts; ++e) {
    for (int which : {0, 1}) {
      const double each = cost(e, which);
      if (each == 0 || rows[which] == 0) continue;
      auto cut = [&](double at) {
        const double row = (at - before) / each;
        return row <= 0 ? int64_t{0} : row >= rows[which] ? rows[which] : static_cast<int64_t>(row);
      };
      const int64_t r0 = cut(low), r1 = part + 1 == parts ? rows[which] : cut(high);
      if (r0 < r1) body(e, which, r0, r1);
      before += each * rows[which];
    }
  }
}

}  // namespace weightshare
