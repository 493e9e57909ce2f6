// Backward pass of moe.h for one instruction set.

template <class T>
void grad_activation(const Moe<T>& moe, const MoeTile& tile, int64_t c0, int64_t n,
                     const Sum<T>* across, const Sum<T>* gate, const Sum<T>* up, Sum<T>* work,
                     const MoeGradHidden<T>& to) {
  using S = Sum<T>;
  const int64_t lanes = tile.lanes, depth = depth_of(moe), parts = moe.parts();
  S *by_gate = work, *by_up = work + n * lanes, *gated = work + 2 * n * lanes;
  S weight[MoeShape<S>::kRows], total[MoeShape<S>::kRows];
  for (int64_t i = 0; i < lanes; ++i) {
    weight[i] = i < tile.rows ? moe.gate[tile.row + i] : S{};
    total[i] = S{};
  }
  with_activation(moe.activation, [&](auto act) WS_INLINE {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t at = j * lanes;
      grad_run<act.value, S>(
          {across + at, gate + at, up + at, weight, total, by_gate + at, by_up + at, gated + at},
          lanes);
    }
  });
  std::copy_n(total, tile.rows, to.gates + c0 / kMoeChunk * to.rows + tile.row);
  for (int64_t part = 0; part < parts; ++part) {
    const S* from = part ? by_up : by_gate;
    Unit<T>* out = static_cast<Unit<T>*>(to.dh) + (tile.at * parts + part * lanes) * depth +
                   c0 / kPer<T> * lanes;
    if constexpr (kInPairs<T>) {
      T* plain = to.dh_rows + (tile.at * parts + part * lanes) * moe.width + c0 * lanes;
      narrow_run(from, n * lanes, plain);
      const T none[MoeShape<S>::kRows] = {};
      for (int64_t j = 0; j < n; j += 2, out += lanes)
        pair_run(plain + j * lanes, j + 1 < n ? plain + (j + 1) * lanes : none, lanes, out);
    } else {
      std::copy_n(from, n * lanes, out);
    }
  }
  // Pairs of lanes are as good as floats where they are only moved.
  const int64_t pairs = lanes / kPer<T>;
  if constexpr (kInPairs<T>) narrow_run(gated, n * lanes, reinterpret_cast<T*>(by_gate));
  Unit<T>* units = static_cast<Unit<T>*>(to.gated) + tile.at / kPer<T> * to.pitch + c0;
  each_row(kInPairs<T> ? by_gate : gated, pairs, n, pairs,
           [&](int64_t i, int64_t j, const S* values, int64_t count)
               WS_INLINE { std::memcpy(units + i * to.pitch + j, values, count * sizeof(S)); });
}

// The gradient of the hidden units and all that follows from it row by row.
template <class T>
void moe_grad_hidden(const Moe<T>& moe, MoeShare share, const T* grad, int64_t grad_stride,
                     const T* h, const MoeGradHidden<T>& to) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  constexpr int64_t kSums = G::kWide * G::kRows;
  const int64_t units = units_of<T>(moe.d), pitch = moe.parts() * moe.width;
  share.each(moe, [&](const MoeBlock& block, int64_t chunk0, int64_t chunk1) {
    const int64_t width = moe.widths[block.expert], f0 = chunk0 * kMoeChunk;
    const int64_t f1 = std::min(width, chunk1 * kMoeChunk), tiles = block.last - block.first;
    Unit<T>*dy, *packed;
    S *sums, *wide, *work;
    T* zeros;
    MoeScratch scratch(room(dy, (G::kBlock * G::kRows + G::kLanes) * units),
                       room(packed, G::kWide * G::kDepth), room(sums, G::kBlock * kSums),
                       room(wide, G::kLanes * G::kDepth), room(work, 5 * kMoeChunk * G::kRows),
                       room(zeros, moe.d + 64));
    std::fill_n(zeros, moe.d, T{});
    Unit<T>* panels[G::kBlock];
    const T* lines[G::kRows];
    Unit<T>* next = dy;
    for (int64_t t = 0; t < tiles; ++t) {
      const MoeTile& tile = moe.tiles[block.first + t];
      panels[t] = next;
      next += tile.lanes * units;
      rows_of_tile(moe, tile, grad, grad_stride, lines);
      pack_lanes<T>(lines, tile.lanes, moe.d, zeros, wide, panels[t]);
    }
    for (int64_t c0 = f0; c0 < f1; c0 += G::kWide) {
      const int64_t n = std::min<int64_t>(G::kWide, f1 - c0);
      for (int64_t k0 = 0; k0 < units; k0 += G::kDepth) {
        const int64_t run = std::min<int64_t>(G::kDepth, units - k0);
        const int64_t depth = std::min(moe.d - k0 * kPer<T>, run * kPer<T>);
        const Operand w = operand_of<T>(moe.down.at(block.expert, k0 * kPer<T>, c0),
                                        moe.down.row_stride, moe.down.col_stride, n, depth, packed);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t lanes = moe.tiles[block.first + t].lanes;
          moe_product<T>(panels[t] + k0 * lanes, lanes, lanes, w, n, run, sums + t * kSums, lanes,
                         k0 > 0);
        }
      }
      for (int64_t t = 0; t < tiles; ++t) {
        const MoeTile& tile = moe.tiles[block.first + t];
        if (units == 0) std::fill_n(sums + t * kSums, n * tile.lanes, S{});
        for (int64_t j = 0; j < n; j += kMoeChunk) {
          const int64_t m = std::min(kMoeChunk, n - j), size = m * tile.lanes;
          S *gate = work, *up = work + (moe.parts() - 1) * size;
          for (int64_t part = 0; part < moe.parts(); ++part)
            turn_rows(h + tile.row * pitch + part * moe.width + c0 + j, pitch, tile.rows, m,
                      tile.lanes, part ? up : gate);
          grad_activation(moe, tile, c0 + j, m, sums + t * kSums + j * tile.lanes, gate, up,
                          work + 2 * size, to);
        }
      }
    }
  });
}

// Columns [n0, n1) of the gradient of x, summed over a token's experts in their order.
template <class T>
void moe_grad_x(const Moe<T>& moe, int64_t n0, int64_t n1, const void* packed_dh, Sum<T>* dx) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  const auto* dh = static_cast<const Unit<T>*>(packed_dh);
  constexpr int64_t kSums = G::kWide * G::kRows;
  const int64_t pitch = depth_of(moe), parts = moe.parts();
  Unit<T>* packed;
  S* sums;
  MoeScratch scratch(room(packed, G::kWide * G::kDepth), room(sums, G::kBlock * kSums));
  for (int64_t t = 0; t < moe.tokens; ++t) std::fill_n(dx + t * moe.d + n0, n1 - n0, S{});
  for (const MoeBlock& block : moe.blocks) {
    const int64_t width = moe.widths[block.expert], units = units_of<T>(width);
    for (int64_t c0 = n0; units > 0 && c0 < n1; c0 += G::kWide) {
      const int64_t n = std::min<int64_t>(G::kWide, n1 - c0);
      for (int64_t part = 0; part < parts; ++part) {
        for (int64_t k0 = 0; k0 < units; k0 += G::kDepth) {
          const int64_t run = std::min<int64_t>(G::kDepth, units - k0);
          const int64_t depth = std::min(width - k0 * kPer<T>, run * kPer<T>);
          const Operand w =
              operand_of<T>(moe.gate_up.at(block.expert, part * moe.f + k0 * kPer<T>, c0),
                            moe.gate_up.row_stride, moe.gate_up.col_stride, n, depth, packed);
          for (int64_t t = block.first; t < block.last; ++t) {
            const MoeTile& tile = moe.tiles[t];
            const Unit<T>* a = dh + (tile.at * parts + part * tile.lanes) * pitch + k0 * tile.lanes;
            moe_product<T>(a, tile.lanes, tile.lanes, w, n, run, sums + (t - block.first) * kSums,
                           tile.lanes, part > 0 || k0 > 0);
          }
        }
      }
      for (int64_t t = block.first; t < block.last; ++t)
        scatter(moe, moe.tiles[t], sums + (t - block.first) * kSums, n, false, dx + c0);
    }
  }
}

// Rows of a gradient: to[j][c] (+)= sum over tiles of lanes[unit][c] * operand(unit, j).
template <class T, class R>
struct MoeOuter {
  const Unit<T>* lanes;  // of the first tile
  int64_t pitch;
  R* to;
  int64_t row_stride, col_stride;
  bool add;
};

template <class T, class R, class F, class At>
void moe_outer(const MoeOuter<T, R>& o, int64_t tiles, int64_t lines, int64_t n, const F& operand,
               const At& place) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  constexpr int64_t kLines = 24, kRows = G::kRows;
  alignas(64) S sums[kLines * kRows];
  for (int64_t j = 0; j < lines; j += kLines) {
    const int64_t m = std::min(kLines, lines - j);
    for (int64_t c = 0; c < n; c += kRows) {
      const int64_t here = std::min(kRows, n - c);
      const int64_t lanes = (here + G::kGrain - 1) / G::kGrain * G::kGrain;
      const bool direct = std::is_same_v<R, S> && o.col_stride == 1 && lanes == here && o.add;
      S* to = direct ? reinterpret_cast<S*>(o.to + j * o.row_stride + c) : sums;
      for (int64_t t = 0; t < tiles; ++t) {
        const auto [start, units] = place(t);
        moe_product<T>(o.lanes + start * o.pitch + c, o.pitch, lanes, operand(t, j), m, units, to,
                       direct ? o.row_stride : kRows, t > 0 || (direct && o.add));
      }
      if (direct) continue;
      for (int64_t r = 0; r < m; ++r) {
        R* row = o.to + (j + r) * o.row_stride + c * o.col_stride;
        if (o.col_stride == 1 && !o.add) {
          write_run(sums + r * kRows, here, row);
          continue;
        }
        for (int64_t i = 0; i < here; ++i) {
          R& cell = row[i * o.col_stride];
          cell = narrow<R>(sums[r * kRows + i] + (o.add ? widen(cell) : S{}));
        }
      }
    }
  }
}

template <class R>
void clear_rows(const Stack<R>& to, int64_t e, int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
  for (int64_t r = r0; r < r1; ++r) {
    R* row = to.at(e, r, c0);
    if (to.col_stride == 1) {
      std::fill_n(row, c1 - c0, R{});
    } else {
      for (int64_t c = 0; c < c1 - c0; ++c) row[c * to.col_stride] = R{};
    }
  }
}

// Rows [r0, r1) of an expert's gate_up gradient, dh^T x.
template <class T, class R>
void moe_grad_gate_up(const Moe<T>& moe, int64_t e, int64_t r0, int64_t r1,
                      const MoeGradHidden<T>& from, const Stack<R>& to, bool add) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  const int64_t first = moe.first_tile[e], tiles = moe.first_tile[e + 1] - first;
  const int64_t width = tiles ? moe.widths[e] : 0, parts = moe.parts();
  std::vector<int64_t> starts(tiles + 1);
  for (int64_t t = 0; t < tiles; ++t)
    starts[t + 1] = starts[t] + units_of<T>(moe.tiles[first + t].rows);
  const int64_t most = std::max<int64_t>(1, starts[tiles]);
  const int64_t group =
      std::max<int64_t>(G::kRows, std::min<int64_t>(moe.d, 65536 / most) / G::kRows * G::kRows);
  const int64_t pitch = std::min(group, moe.d) + G::kRows;
  Unit<T>* x;
  MoeScratch scratch(room(x, most * pitch));
  for (int64_t c0 = 0; c0 < moe.d; c0 += group) {
    const int64_t n = std::min(group, moe.d - c0);
    for (int64_t t = 0; t < tiles; ++t) {
      const MoeTile& tile = moe.tiles[first + t];
      const T* lines[G::kRows];
      rows_of_tile(moe, tile, moe.x + c0, moe.x_stride, lines);
      pack_units<T>(lines, tile.rows, n, 1, pitch, x + starts[t] * pitch);
    }
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t low = part * moe.f, j0 = std::max(r0, low), j1 = std::min(r1, low + width);
      if (j0 < j1) {
        const MoeOuter<T, R> o{x, pitch, to.at(e, j0, c0), to.row_stride, to.col_stride, add};
        moe_outer(
            o, tiles, j1 - j0, n,
            [&](int64_t t, int64_t j) {
              const MoeTile& tile = moe.tiles[first + t];
              const int64_t line = j0 - low + j, lanes = tile.lanes;
              if constexpr (kInPairs<T>) {
                const T* at = from.dh_rows + (tile.at * parts + part * lanes) * moe.width;
                return Operand{reinterpret_cast<const char*>(at + line * lanes), 2 * sizeof(T),
                               lanes * int64_t{sizeof(T)}};
              } else {
                const S* at = static_cast<const S*>(from.dh) +
                              (tile.at * parts + part * lanes) * depth_of(moe);
                return Operand{reinterpret_cast<const char*>(at + line * lanes), sizeof(S),
                               lanes * int64_t{sizeof(S)}};
              }
            },
            [&](int64_t t) { return std::pair(starts[t], starts[t + 1] - starts[t]); });
      }
      if (!add) clear_rows(to, e, std::max(r0, low + width), std::min(r1, low + moe.f), c0, c0 + n);
    }
  }
}

// Rows [r0, r1) of an expert's down gradient, dy^T (gate a).
template <class T, class R>
void moe_grad_down(const Moe<T>& moe, int64_t e, int64_t r0, int64_t r1, const T* grad,
                   int64_t grad_stride, const MoeGradHidden<T>& from, const Stack<R>& to,
                   bool add) {
  using S = Sum<T>;
  using G = MoeShape<S>;
  const int64_t first = moe.first_tile[e], tiles = moe.first_tile[e + 1] - first;
  const int64_t width = tiles ? moe.widths[e] : 0;
  std::vector<int64_t> starts(tiles + 1);
  for (int64_t t = 0; t < tiles; ++t)
    starts[t + 1] = starts[t] + units_of<T>(moe.tiles[first + t].rows);
  Unit<T>* dy;
  MoeScratch scratch(room(dy, std::max<int64_t>(1, starts[tiles]) * G::kWide));
  for (int64_t j0 = r0; width > 0 && j0 < r1; j0 += G::kWide) {
    const int64_t lines = std::min<int64_t>(G::kWide, r1 - j0);
    for (int64_t t = 0; t < tiles; ++t) {
      const MoeTile& tile = moe.tiles[first + t];
      const T* rows[G::kRows];
      rows_of_tile(moe, tile, grad + j0, grad_stride, rows);
      pack_units<T>(rows, tile.rows, lines, 1, lines, dy + starts[t] * lines);
    }
    const int64_t base = moe.tiles[first].at / kPer<T>;
    const MoeOuter<T, R> o{static_cast<const Unit<T>*>(from.gated) + base * from.pitch,
                           from.pitch,
                           to.at(e, j0, 0),
                           to.row_stride,
                           to.col_stride,
                           add};
    moe_outer(
        o, tiles, lines, width,
        [&](int64_t t, int64_t j) {
          return Operand{reinterpret_cast<const char*>(dy + starts[t] * lines + j),
                         lines * int64_t{sizeof(Unit<T>)}, sizeof(Unit<T>)};
        },
        [&](int64_t t) {
          return std::pair(moe.tiles[first + t].at / kPer<T> - base, starts[t + 1] - starts[t]);
        });
  }
  if (!add) clear_rows(to, e, r0, r1, width, moe.f);
}
