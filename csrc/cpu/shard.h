// LoRA gathered from shard pools on the CPU: h = x A^T, y = base + factor * h B, and their
// gradients. Row j of A (or of B) is a chain of shards, rows of a pool picked by an index table; no
// matrix is ever put together.
//
// Two register tiles make all products, and both read a shard along its columns:
//   shrink   h, and dh = dy B^T: dot products of rows with shards
//   combine  y and dx: rows of sums over shards, times numbers of h; and the gradients of pools:
//            shards of sums over rows of x or dy, times numbers of h or dh
// A shard is a few hundred columns, read once for all rows of its adapter where they are few; what
// comes next is fetched meanwhile, since a chain of shards is no stream that a processor foresees.
//
// Threads divide rows and ranks in shrink, columns in the rest; of a pool's gradient they divide
// the columns within a shard, so that a shard named twice belongs to one thread. Each number is
// summed by one thread in an order that depends neither on the threads nor on the rows beside it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace weightshare {

// A pool of shards and the tables of which of them make up each adapter's matrix.
struct ShardSide {
  const void* pool;  // [shards, width], in T or, where `wide`, in float under a T of 16 bits
  bool wide;
  int64_t shards, stride, width;  // in elements; stride is that of the pool's rows
  const int32_t* index;           // [adapters] of [ranks, pieces], `step` apart
  int64_t step, ranks, pieces;
  const void* zeros;  // as wide as a shard, for numbers outside the pool

  int64_t columns() const { return pieces * width; }

  // Row of the pool, or -1 for a shard of zeros.
  int64_t shard(int64_t adapter, int64_t rank, int64_t piece) const {
    const int64_t n = index[adapter * step + rank * pieces + piece];
    return n >= 0 && n < shards ? n : -1;
  }

  template <class P>
  const P* line(int64_t adapter, int64_t rank, int64_t piece) const {
    const int64_t n = shard(adapter, rank, piece);
    return n < 0 ? static_cast<const P*>(zeros) : static_cast<const P*>(pool) + n * stride;
  }

  // Ranks up to the last that has a shard at all: adapters of smaller rank cost less.
  int64_t used(int64_t adapter) const {
    for (int64_t rank = ranks; rank > 0; --rank) {
      for (int64_t piece = 0; piece < pieces; ++piece)
        if (shard(adapter, rank - 1, piece) >= 0) return rank;
    }
    return 0;
  }
};

// Rows [first, first + rows) of the order of `token` belong to an adapter.
struct ShardSegment {
  int64_t adapter, first, rows;
};

template <class S>
struct ShardRows {
  std::vector<ShardSegment> segments;  // none is empty
  const int64_t* token = nullptr;      // of each row; null: the rows as they lie
  const S* scales = nullptr;           // of each adapter, or null
  S scale = 1;

  int64_t at(int64_t row) const { return token == nullptr ? row : token[row]; }
  S factor(int64_t adapter) const { return scales == nullptr ? scale : scale * scales[adapter]; }
};

// A matrix with a row per token and columns side by side.
template <class T>
struct ShardMatrix {
  T* data = nullptr;
  int64_t stride = 0;

  T* row(int64_t r) const { return data + r * stride; }
};

// Rows of h that are worked on together, and ranks: what a thread takes at a time.
constexpr int64_t kShardRows = 18, kShardRanks = 4;

// Bytes of shards that are asked for before they are used.
constexpr int64_t kShardAhead = 16384;

// One matrix to be multiplied by: from[rows, columns] with the shards gives `to`[rows, ranks].
template <class T>
struct ShardShrink {
  ShardSide side;
  ShardMatrix<const T> from;
  ShardMatrix<Sum<T>> to;
};

// A block of rows that meets blocks of ranks.
struct ShardBlock {
  int64_t target, segment, first, rows, blocks;
  double cost;  // of a block of ranks
};

template <class T>
std::vector<ShardBlock> shrink_blocks(const std::vector<ShardShrink<T>>& shrinks,
                                      const ShardRows<Sum<T>>& rows) {
  constexpr double kRead = 12;  // what reading a shard costs, in rows
  std::vector<ShardBlock> blocks;
  for (size_t s = 0; s < rows.segments.size(); ++s) {
    const ShardSegment& segment = rows.segments[s];
    const int64_t parts = (segment.rows + kShardRows - 1) / kShardRows;  // about equally high
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t r0 = segment.rows * part / parts, r1 = segment.rows * (part + 1) / parts;
      for (size_t t = 0; t < shrinks.size(); ++t) {
        const ShardSide& side = shrinks[t].side;
        blocks.push_back({static_cast<int64_t>(t), static_cast<int64_t>(s), segment.first + r0,
                          r1 - r0, (side.ranks + kShardRanks - 1) / kShardRanks,
                          (r1 - r0 + kRead) * static_cast<double>(side.columns() + 1)});
      }
    }
  }
  return blocks;
}

// A thread's share of them: body(block, first rank, last rank).
template <class F>
void each_shrink(const std::vector<ShardBlock>& blocks, int64_t part, int64_t parts,
                 const F& body) {
  double total = 0;
  for (const ShardBlock& b : blocks) total += b.cost * b.blocks;
  const double low = total * part / parts, high = total * (part + 1) / parts;
  double before = 0;
  for (const ShardBlock& b : blocks) {
    auto cut = [&](double at) {
      const double block = (at - before) / b.cost;
      return block <= 0 ? int64_t{0} : block >= b.blocks ? b.blocks : static_cast<int64_t>(block);
    };
    const int64_t begin = cut(low), end = part + 1 == parts ? b.blocks : cut(high);
    if (begin < end) body(b, begin * kShardRanks, end * kShardRanks);
    before += b.cost * b.blocks;
  }
}

// to[row] = base[row] + sum over all ranks of all sides of h[row] times their shards.
template <class T>
struct ShardExpand {
  std::vector<ShardSide> sides;  // of as many columns each
  ShardMatrix<const Sum<T>> h;   // the ranks of the sides, one after another
  bool scaled;                   // h is still to be multiplied by the factor of its adapter
  ShardMatrix<const T> base;     // or null for zero
  ShardMatrix<T> to;
};

// shards (+)= factor * left^T right of every adapter; `side.pool` is where they are written.
template <class T, class R>
struct ShardOuter {
  ShardSide side;
  R* to;
  ShardMatrix<const Sum<T>> left;
  int64_t left_step;  // from column to column
  ShardMatrix<const T> right;
  // Whether a shard is written, not added to: for each segment, piece and rank; null: never.
  const uint8_t* first = nullptr;
};

}  // namespace weightshare
