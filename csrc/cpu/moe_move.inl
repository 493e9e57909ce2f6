// Tiles turned, rows found, scratch held and experts cut into tiles: moe.h, one instruction set.

// ---- moving tiles -------------------------------------------------------------------------------

// Calls body(row, first column, values, count) for every row of lanes of c [lines][lanes], in
// pieces of up to a vector: c turned by squares.
template <class S, class F>
void each_row(const S* c, int64_t lanes, int64_t lines, int64_t rows, const F& body) {
  constexpr int L = MoeShape<S>::kLanes;
  alignas(64) S square[L][L], copy[L][L];
  for (int64_t j = 0; j < lines; j += L) {
    const int64_t n = std::min<int64_t>(L, lines - j);
    for (int64_t i = 0; i < rows; i += L) {
      const S* line[L];
      for (int64_t r = 0; r < L; ++r) line[r] = c + (j + std::min(r, n - 1)) * lanes + i;
      if (i + L > lanes) {  // a half vector: reading a whole one would leave the tile
        for (int64_t r = 0; r < L; ++r) {
          for (int64_t l = 0; l < L; ++l) copy[r][l] = i + l < lanes ? line[r][l] : S{};
          line[r] = copy[r];
        }
      }
      transpose<S>(line, 0, square[0], L);
      const int64_t m = std::min<int64_t>(L, rows - i);
      for (int64_t l = 0; l < m; ++l) body(i + l, j, square[l], n);
    }
  }
}

// to[line][lane] = element (lane, line) of rows `stride` apart; lanes beyond `rows` are zero.
template <class T>
void turn_rows(const T* from, int64_t stride, int64_t rows, int64_t lines, int64_t lanes,
               Sum<T>* to) {
  using S = Sum<T>;
  constexpr int L = MoeShape<S>::kLanes;
  alignas(64) S square[L][L], turned[L][L];
  for (int64_t i = 0; i < lanes; i += L) {
    const int64_t m = std::min<int64_t>(L, lanes - i);
    for (int64_t j = 0; j < lines; j += L) {
      const int64_t n = std::min<int64_t>(L, lines - j);
      const S* line[L];
      for (int64_t l = 0; l < L; ++l) {
        line[l] = square[l];
        if (i + l >= rows) {
          std::fill_n(square[l], L, S{});
        } else {
          widen_run(from + (i + l) * stride + j, n, square[l]);
        }
      }
      if (m == L && n == L) {
        transpose<S>(line, 0, to + j * lanes + i, lanes);
        continue;
      }
      transpose<S>(line, 0, turned[0], L);
      for (int64_t c = 0; c < n; ++c) std::copy_n(turned[c], m, to + (j + c) * lanes + i);
    }
  }
}

// ---- scratch ------------------------------------------------------------------------------------

// A thread's scratch, one piece of memory that stays with it.
class MoeScratch {
 public:
  template <class... P>
  explicit MoeScratch(std::pair<P**, int64_t>... wanted) {
    constexpr size_t kAlign = 64;
    const size_t sizes[] = {(static_cast<size_t>(wanted.second) * sizeof(P) + 2 * kAlign) / kAlign *
                            kAlign...};
    size_t total = 0;
    for (size_t size : sizes) total += size;
    static thread_local std::vector<char> kept;
    if (kept.size() < total + kAlign) kept.resize(total + kAlign);
    char* at = kept.data();
    at += (kAlign - reinterpret_cast<uintptr_t>(at) % kAlign) % kAlign;
    size_t number = 0;
    ((*wanted.first = reinterpret_cast<P*>(at), at += sizes[number++]), ...);
  }
};

template <class P>
std::pair<P**, int64_t> room(P*& pointer, int64_t count) {
  return {&pointer, count};
}

// Pointers to the rows of a tile in a matrix with a row per token; null beyond the last.
template <class T>
void rows_of_tile(const Moe<T>& moe, const MoeTile& tile, const T* data, int64_t stride,
                  const T** lines) {
  for (int64_t i = 0; i < tile.lanes; ++i)
    lines[i] = i < tile.rows ? data + moe.token[tile.row + i] * stride : nullptr;
}

// Cuts the rows of every expert into tiles, and tiles into blocks.
template <class T>
void moe_plan(Moe<T>& moe, const int64_t* offsets) {
  using G = MoeShape<Sum<T>>;
  moe.lanes = 0;
  for (int64_t e = 0; e < moe.experts; ++e) {
    moe.first_tile.push_back(moe.tiles.size());
    for (int64_t row = offsets[e]; row < offsets[e + 1]; row += G::kRows) {
      const int64_t rows = std::min<int64_t>(G::kRows, offsets[e + 1] - row);
      const int64_t lanes = (rows + G::kGrain - 1) / G::kGrain * G::kGrain;
      const int64_t number = moe.tiles.size();
      if ((number - moe.first_tile[e]) % G::kBlock == 0)
        moe.blocks.push_back({e, number, number, 0});
      moe.blocks.back().last = number + 1;
      moe.blocks.back().lanes += lanes;
      moe.tiles.push_back({e, row, rows, lanes, moe.lanes});
      moe.lanes += lanes;
    }
  }
  moe.first_tile.push_back(moe.tiles.size());
}
