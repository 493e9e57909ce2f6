// Forward pass of moe.h for one instruction set.

// sums[line][row] = w_line . x_row over `units`, for few rows: a weight streams past once.
template <class T, int M>
void moe_dots(const Unit<T>* const* x, const T* const* w, int64_t depth, int64_t ahead,
              Sum<T> (*sums)[4]) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  using V = typename G::Vector;
  constexpr int L = G::kLanes, J = 4;
  V acc[M][J];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) acc[m][j] = V{};
  }
  auto load = [](const T* p) WS_INLINE {
    if constexpr (kInPairs<T>) {
      return V(*reinterpret_cast<const typename G::Loose*>(p));
    } else {
      return wide_load(p);
    }
  };
  auto step = [&](const T* const* lines, const Unit<T>* const* rows, int64_t k) WS_INLINE {
    V b[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) b[j] = load(lines[j] + k * kPer<T>);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V a = *reinterpret_cast<const V*>(rows[m] + k);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
#if WS_PAIRS
        if constexpr (kInPairs<T>) {
          acc[m][j] = (V)_mm512_dpbf16_ps((__m512)acc[m][j], (__m512bh)a, (__m512bh)b[j]);
          continue;
        }
#endif
        if constexpr (!kInPairs<T>) acc[m][j] += a * b[j];
      }
    }
  };
  const int64_t whole = depth / kPer<T> / L * L;
  for (int64_t k = 0; k < whole; k += L) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) __builtin_prefetch(w[j] + k * kPer<T> + ahead);
    step(w, x, k);
  }
  if (whole * kPer<T> < depth) {  // the rest, filled up with zeros
    T line[J][L * kPer<T>] = {};
    Unit<T> row[M][L] = {};
    const T* lines[J];
    const Unit<T>* rows[M];
    const int64_t done = whole * kPer<T>;
    for (int j = 0; j < J; ++j) {
      std::copy_n(w[j] + done, depth - done, line[j]);
      lines[j] = line[j];
    }
    for (int m = 0; m < M; ++m) {
      std::copy_n(x[m] + whole, units_of<T>(depth) - whole, row[m]);
      rows[m] = row[m];
    }
    step(lines, rows, 0);
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      S lanes[L];
      *reinterpret_cast<V*>(lanes) = acc[m][j];
      sums[j][m] = sum_of_lanes(lanes);
    }
  }
}

template <class T, int M = 4>
void any_moe_dots(int64_t rows, const Unit<T>* const* x, const T* const* w, int64_t depth,
                  int64_t ahead, Sum<T> (*sums)[4]) {
  if (rows == M) {
    moe_dots<T, M>(x, w, depth, ahead, sums);
  } else if constexpr (M > 1) {
    any_moe_dots<T, M - 1>(rows, x, w, depth, ahead, sums);
  }
}

// sums[row][j - j0] = w_j . x_row for the lines [j0, j1) of a weight, few rows.
template <class T>
void dots_of_lines(const Unit<T>* x, int64_t rows, int64_t pitch, const T* w, int64_t stride,
                   int64_t j0, int64_t j1, int64_t depth, Sum<T>* sums) {
  constexpr int64_t kTile = 4, kDistance = 16384 / sizeof(T);
  const int64_t step = std::max<int64_t>(1, kTile * stride);  // a repeated line has stride 0
  const int64_t ahead = (kDistance + step - 1) / step * step;
  Sum<T> tile[kTile][kTile];
  for (int64_t j = j0; j < j1; j += kTile) {
    const T* lines[kTile];
    for (int64_t i = 0; i < kTile; ++i) lines[i] = w + std::min(j + i, j1 - 1) * stride;
    for (int64_t m = 0; m < rows; m += kTile) {
      const int64_t count = std::min(kTile, rows - m);
      const Unit<T>* row[kTile];
      for (int64_t i = 0; i < count; ++i) row[i] = x + (m + i) * pitch;
      any_moe_dots<T>(count, row, lines, depth, ahead, tile);
      for (int64_t i = 0; i < count; ++i) {
        Sum<T>* to = sums + (m + i) * kMoeChunk + j - j0;
        for (int64_t l = 0; l < std::min(kTile, j1 - j); ++l) to[l] = tile[l][i];
      }
    }
  }
}

// A row of T as units: widened, or as it is.
template <class T>
void copy_units(const T* from, int64_t depth, Unit<T>* to) {
  if constexpr (kInPairs<T>) {
    to[units_of<T>(depth) - 1] = 0;
    std::memcpy(to, from, depth * sizeof(T));
  } else {
    widen_run(from, depth, to);
  }
}

template <class T>
int64_t depth_of(const Moe<T>& moe) {
  return units_of<T>(moe.width);
}

// Whether a tile meets the weights by dot products, as one row after another.
template <class T>
bool few_rows(const Moe<T>& moe, const MoeTile& tile) {
  return moe.few && tile.rows <= MoeShape<Sum<T>>::kFew;
}

// Hidden units [c0, c0 + n) of few rows, from their sums [row][kMoeChunk].
template <class T>
void store_few(const Moe<T>& moe, const MoeTile& tile, int64_t c0, int64_t n, const Sum<T>* gates,
               const Sum<T>* ups, const MoeHidden<T>& to) {
  using S = Sum<T>;
  const int64_t depth = depth_of(moe), pitch = moe.parts() * moe.width;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const S *gate = gates + i * kMoeChunk, *up = ups + i * kMoeChunk;
    S value[kMoeChunk + 1];
    with_activation(moe.activation,
                    [&](auto act) WS_INLINE { activate_run<act.value>(gate, up, n, value); });
    value[n] = 0;
    Unit<T>* a = static_cast<Unit<T>*>(to.a) + tile.at * depth + i * depth;
    if constexpr (kInPairs<T>) {
      T line[kMoeChunk + 1];
      narrow_run(value, n + 1, line);
      std::memcpy(a + c0 / 2, line, units_of<T>(n) * sizeof(Unit<T>));
    } else {
      std::copy_n(value, n, a + c0);
    }
    for (int64_t part = 0; to.h != nullptr && part < moe.parts(); ++part)
      narrow_run(part ? up : gate, n, to.h + (tile.row + i) * pitch + part * moe.width + c0);
  }
}

// Sums of a chunk of lines for one tile: [line][lanes].
template <class T>
void store_hidden(const Moe<T>& moe, const MoeTile& tile, int64_t c0, int64_t n, const Sum<T>* gate,
                  const Sum<T>* up, const MoeHidden<T>& to) {
  using S = Sum<T>;
  const int64_t lanes = tile.lanes;
  Unit<T>* a = static_cast<Unit<T>*>(to.a) + tile.at * depth_of(moe) + c0 / kPer<T> * lanes;
  with_activation(moe.activation, [&](auto act) WS_INLINE {
    if constexpr (kInPairs<T>) {
      S value[MoeShape<S>::kRows];
      T low[MoeShape<S>::kRows], high[MoeShape<S>::kRows] = {};
      for (int64_t j = 0; j < n; j += 2, a += lanes) {
        activate_run<act.value>(gate + j * lanes, up + j * lanes, lanes, value);
        narrow_run(value, lanes, low);
        if (j + 1 < n) {
          activate_run<act.value>(gate + (j + 1) * lanes, up + (j + 1) * lanes, lanes, value);
          narrow_run(value, lanes, high);
        } else {
          std::fill_n(high, lanes, T{});
        }
        pair_run(low, high, lanes, a);
      }
    } else {
      activate_run<act.value>(gate, up, n * lanes, a);
    }
  });
  if (to.h == nullptr) return;
  const int64_t pitch = moe.parts() * moe.width;
  for (int64_t part = 0; part < moe.parts(); ++part) {
    each_row(part ? up : gate, lanes, n, tile.rows,
             [&](int64_t i, int64_t j, const S* values, int64_t count) WS_INLINE {
               narrow_run(values, count, to.h + (tile.row + i) * pitch + part * moe.width + c0 + j);
             });
  }
}

template <class T>
void moe_up(const Moe<T>& moe, MoeShare share, const MoeHidden<T>& to) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  const int64_t units = units_of<T>(moe.d), tile_sums = kMoeChunk * G::kRows;
  share.each(moe, [&](const MoeBlock& block, int64_t chunk0, int64_t chunk1) {
    const int64_t width = moe.widths[block.expert], f0 = chunk0 * kMoeChunk;
    const int64_t f1 = std::min(width, chunk1 * kMoeChunk), tiles = block.last - block.first;
    Unit<T>*x, *packed;
    S *sums, *wide;
    T* zeros;
    MoeScratch scratch(room(x, (G::kBlock * G::kRows + G::kLanes) * units),
                       room(packed, kMoeChunk * units), room(sums, 2 * G::kBlock * tile_sums),
                       room(wide, G::kLanes * G::kDepth), room(zeros, moe.d + 64));
    std::fill_n(zeros, moe.d, T{});
    Unit<T>* panels[G::kBlock];
    const T* lines[G::kRows];
    Unit<T>* next = x;
    for (int64_t t = 0; t < tiles; ++t) {
      const MoeTile& tile = moe.tiles[block.first + t];
      panels[t] = next;
      next += tile.lanes * units;
      rows_of_tile(moe, tile, moe.x, moe.x_stride, lines);
      if (few_rows(moe, tile)) {
        for (int64_t i = 0; i < tile.rows; ++i) copy_units(lines[i], moe.d, panels[t] + i * units);
      } else {
        pack_lanes<T>(lines, tile.lanes, moe.d, zeros, wide, panels[t]);
      }
    }
    const bool few = few_rows(moe, moe.tiles[block.last - 1]);  // the last tile alone may be
    const int64_t full = tiles - few;
    for (int64_t c0 = f0; c0 < f1; c0 += kMoeChunk) {
      const int64_t n = std::min(kMoeChunk, f1 - c0);
      for (int64_t part = 0; part < moe.parts(); ++part) {
        S* here = sums + part * G::kBlock * tile_sums;
        for (int64_t k0 = 0; full > 0 && (k0 < units || k0 == 0); k0 += G::kDepth) {
          const int64_t run = std::min<int64_t>(G::kDepth, units - k0);
          const int64_t depth = std::min(moe.d - k0 * kPer<T>, run * kPer<T>);
          const Operand w =
              operand_of<T>(moe.gate_up.at(block.expert, part * moe.f + c0, k0 * kPer<T>),
                            moe.gate_up.col_stride, moe.gate_up.row_stride, n, depth, packed);
          for (int64_t t = 0; t < full; ++t) {
            const int64_t lanes = moe.tiles[block.first + t].lanes;
            moe_product<T>(panels[t] + k0 * lanes, lanes, lanes, w, n, run, here + t * tile_sums,
                           lanes, k0 > 0);
          }
        }
        if (few) {
          dots_of_lines<T>(panels[full], moe.tiles[block.last - 1].rows, units,
                           moe.gate_up.at(block.expert, part * moe.f, 0), moe.gate_up.row_stride,
                           c0, c0 + n, moe.d, here + full * tile_sums);
        }
      }
      for (int64_t t = 0; t < tiles; ++t) {
        const S* gate = sums + t * tile_sums;
        const S* up = moe.parts() == 2 ? gate + G::kBlock * tile_sums : gate;
        if (t < full) {
          store_hidden(moe, moe.tiles[block.first + t], c0, n, gate, up, to);
        } else {
          store_few(moe, moe.tiles[block.first + t], c0, n, gate, up, to);
        }
      }
    }
  });
}

// The sums of a tile, times the gates where given, added to the rows of its tokens.
template <class T>
void scatter(const Moe<T>& moe, const MoeTile& tile, const Sum<T>* sums, int64_t n, bool gated,
             Sum<T>* to) {
  using S = Sum<T>;
  each_row(sums, tile.lanes, n, tile.rows,
           [&](int64_t i, int64_t j, const S* values, int64_t count) WS_INLINE {
             add_run(values, gated ? moe.gate[tile.row + i] : S(1), count,
                     to + moe.token[tile.row + i] * moe.d + j);
           });
}

// Second product: columns [n0, n1) of the result, rows of all tokens, in the order of the experts.
template <class T>
void moe_down(const Moe<T>& moe, int64_t n0, int64_t n1, const void* packed_hidden, Sum<T>* y) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  const auto* hidden = static_cast<const Unit<T>*>(packed_hidden);
  const int64_t pitch = depth_of(moe), tile_sums = kMoeChunk * G::kRows;
  Unit<T>* packed;
  S* sums;
  MoeScratch scratch(room(packed, kMoeChunk * pitch), room(sums, G::kBlock * tile_sums));
  for (int64_t t = 0; t < moe.tokens; ++t) std::fill_n(y + t * moe.d + n0, n1 - n0, S{});
  for (const MoeBlock& block : moe.blocks) {
    const int64_t width = moe.widths[block.expert], units = units_of<T>(width);
    const MoeTile& tail = moe.tiles[block.last - 1];
    const bool few = few_rows(moe, tail);
    const int64_t full = block.last - few;
    for (int64_t c0 = n0; c0 < n1; c0 += kMoeChunk) {
      const int64_t n = std::min(kMoeChunk, n1 - c0);
      for (int64_t k0 = 0; full > block.first && k0 < units; k0 += G::kDepth) {
        const int64_t run = std::min<int64_t>(G::kDepth, units - k0);
        const int64_t depth = std::min(width - k0 * kPer<T>, run * kPer<T>);
        const Operand w = operand_of<T>(moe.down.at(block.expert, c0, k0 * kPer<T>),
                                        moe.down.col_stride, moe.down.row_stride, n, depth, packed);
        for (int64_t t = block.first; t < full; ++t) {
          const MoeTile& tile = moe.tiles[t];
          moe_product<T>(hidden + tile.at * pitch + k0 * tile.lanes, tile.lanes, tile.lanes, w, n,
                         run, sums + (t - block.first) * tile_sums, tile.lanes, k0 > 0);
        }
      }
      for (int64_t t = block.first; units > 0 && t < full; ++t)
        scatter(moe, moe.tiles[t], sums + (t - block.first) * tile_sums, n, true, y + c0);
      if (few) {
        dots_of_lines<T>(hidden + tail.at * pitch, tail.rows, pitch,
                         moe.down.at(block.expert, 0, 0), moe.down.row_stride, c0, c0 + n, width,
                         sums);
        for (int64_t i = 0; i < tail.rows; ++i)
          add_run(sums + i * kMoeChunk, moe.gate[tail.row + i], n,
                  y + moe.token[tail.row + i] * moe.d + c0);
      }
    }
  }
}
