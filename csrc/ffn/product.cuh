// C = A B on the tensor cores, with what follows the product done in its registers.
//
//     forward     pre = A B + bias, out = activation(pre)
//     backward    out = (A B) activation'(pre), activated = activation(pre),
//                 sums = the column sums of out over every 32 rows
//
// A block computes a tile of C, its four warps a quarter each. Tiles of A and B pass through a ring
// of `stages` places in shared memory: while the warps multiply tile t, the tiles t + 1 and t + 2
// are under way, and a slice's fragments (16 of k) are read while the slice before is multiplied.
// The first fragments of a tile are read before the last slice of the tile before, so that the
// barrier between the two finds the tensor core busy:
//
//     slice of tile t       ...   last - 1                last                    0 of t + 1
//     copies                                              wait for t + 1, barrier; begin t + 3
//     fragments, read for         last of t               0 of t + 1              1 of t + 1
//     tensor core                 last - 1 of t           last of t               0 of t + 1
//
// Sums run over k in ascending order, whatever the tile: the bits of a row of C do not depend on
// the other rows, nor on the tile.
#pragma once

#include "device/barrier.cuh"
#include "device/launch.cuh"
#include "device/mma.cuh"
#include "device/warp.cuh"
#include "ffn/activation.cuh"
#include "ffn/operand.cuh"

namespace fastattn::ffn {

// 64 FLOP a byte that comes from the L2; 48 KB, so that two blocks share an SM wherever it has
// 100 KB; 64x64 a warp, because a warp of 64x32 would read shared memory as long as it multiplies.
struct LargeTile {
  static constexpr int rows = 128, columns = 128, depth = 32, stages = 3;
  static constexpr int warp_rows = 64, warp_columns = 64;
  static constexpr int threads = 128, blocks = 2;
};
// For few rows, and where large tiles would leave SMs idle: as many bytes under way, more blocks.
struct SmallTile {
  static constexpr int rows = 64, columns = 64, depth = 64, stages = 3;
  static constexpr int warp_rows = 32, warp_columns = 32;
  static constexpr int threads = 128, blocks = 3;
};

// Rows over which the backward's column sums run in a first stage, of all tiles.
constexpr int rows_of_a_sum = 32;
// Rows of tiles that are walked through together, so that their operands stay in the L2.
constexpr int group_rows = 8;

template <class T>
struct ProductParams {
  Operand<T> a, b;
  Global<const T> bias;     // forward: (n,), or null
  Global<const T> pre;      // backward: (m, n)
  Global<T> out;            // (m, n)
  Global<T> other;          // (m, n) or null; forward: pre, backward: activated
  Global<float> sums;       // backward: (m / rows_of_a_sum, n), or null
  int m, n, k;
  int64_t bias_stride;
  Activation activation;
  bool vectors;             // whether rows of C, and `pre`, are aligned to 16 bytes
};

enum class Pass { forward, backward };

template <class T, class Tile_, Order a_order, Order b_order, Pass pass_>
struct ProductTraits {
  using Element = T;
  using Tile = Tile_;
  using A = OperandTile<T, a_order, Tile::rows, Tile::depth, Tile::threads>;
  using B = OperandTile<T, b_order, Tile::columns, Tile::depth, Tile::threads>;
  static constexpr Pass pass = pass_;

  static constexpr int stage_elements = A::elements + B::elements;
  static constexpr int slices = Tile::depth / 16;
  static constexpr int warp_rows = Tile::rows / Tile::warp_rows;  // warps in a column of warps
  static constexpr int fragments_m = Tile::warp_rows / 16, fragments_n = Tile::warp_columns / 8;

  // After the product each warp turns 16 rows at a time from fragments to rows, in a strip of its
  // own. Its lines are padded by 8 floats: the 4 rows that half a warp writes lie in other banks.
  static constexpr int strip_line = Tile::warp_columns + 8;
  static constexpr int strip = 16 * strip_line;
  static constexpr int ring_bytes = Tile::stages * (A::bytes + B::bytes);
  static constexpr int strip_bytes = Tile::threads / warp_threads * strip * 4;
  static constexpr int shared_bytes = ring_bytes > strip_bytes ? ring_bytes : strip_bytes;
};

// Eight neighbouring elements of a row of C, at (row, column), as a thread finishes them.
template <class T>
struct Eight {
  const ProductParams<T>& p;
  int64_t offset;
  int count;  // that are inside

  FA_DEVICE Eight(const ProductParams<T>& params, int row, int column)
      : p(params), offset(static_cast<int64_t>(row) * params.n + column) {
    const int left = params.n - column;
    count = row >= params.m || left <= 0 ? 0 : left < 8 ? left : 8;
  }

  FA_DEVICE void read(Global<const T> from, float (&values)[8]) const {
    if (p.vectors) {
      Vector<T, 8> all{};
      if (count > 0) all = load_vector<8>(from + offset);
      FA_UNROLL
      for (int i = 0; i < 8; ++i) values[i] = to_float(all[i]);
    } else {
      FA_UNROLL
      for (int i = 0; i < 8; ++i) {
        values[i] = i < count ? to_float(load(from + (offset + i))) : 0.0f;
      }
    }
  }

  FA_DEVICE void write(Global<T> to, const float (&values)[8]) const {
    if (p.vectors) {
      Vector<T, 8> all;
      FA_UNROLL
      for (int i = 0; i < 8; ++i) all[i] = from_float<T>(values[i]);
      if (count > 0) store_vector(to + offset, all);
    } else {
      FA_UNROLL
      for (int i = 0; i < 8; ++i) {
        if (i < count) store(to + (offset + i), from_float<T>(values[i]));
      }
    }
  }
};

// The rest of the work on a warp's part of C, 8 columns a thread from `column` on.
template <class T, Pass pass>
struct Finish {
  const ProductParams<T>& p;
  int column;
  float bias_or_sums[8];

  FA_DEVICE Finish(const ProductParams<T>& params, int first_column)
      : p(params), column(first_column) {
    FA_UNROLL
    for (int i = 0; i < 8; ++i) {
      const bool biased = pass == Pass::forward && p.bias && column + i < p.n;
      bias_or_sums[i] = biased ? to_float(load(p.bias + (column + i) * p.bias_stride)) : 0.0f;
    }
  }

  FA_DEVICE void row(int row, float (&product)[8]) {
    const Eight<T> place(p, row, column);
    if constexpr (pass == Pass::forward) {
      FA_UNROLL
      for (int i = 0; i < 8; ++i) product[i] += bias_or_sums[i];
      if (p.other) place.write(p.other, product);
      with_activation(p.activation, [&](auto activation) {
        FA_UNROLL
        for (int i = 0; i < 8; ++i) product[i] = decltype(activation)::at(product[i]).value;
      });
      place.write(p.out, product);
    } else {
      float activated[8];
      place.read(p.pre, activated);
      with_activation(p.activation, [&](auto activation) {
        FA_UNROLL
        for (int i = 0; i < 8; ++i) {
          const Activated there = decltype(activation)::at(activated[i]);
          activated[i] = there.value;
          product[i] *= there.derivative;
        }
      });
      place.write(p.out, product);
      if (p.other) place.write(p.other, activated);
      FA_UNROLL
      for (int i = 0; i < 8; ++i) bias_or_sums[i] += i < place.count ? product[i] : 0.0f;
    }
  }

  // Writes the sums of the 32 rows before `end`, of which every group of Lanes neighbours has some.
  template <int Lanes>
  FA_DEVICE void write_sums(int end) {
    if (!p.sums) return;
    const int group = end / rows_of_a_sum - 1;
    FA_UNROLL
    for (int i = 0; i < 8; ++i) {
      float sum = bias_or_sums[i];
      FA_UNROLL
      for (int mask = Lanes; mask < warp_threads; mask *= 2) sum += shuffle_xor(sum, mask);
      bias_or_sums[i] = 0.0f;
      const bool mine = lane_index() < Lanes && column + i < p.n;
      if (mine && group * rows_of_a_sum < p.m) {
        store(p.sums + (static_cast<int64_t>(group) * p.n + column + i), sum);
      }
    }
  }
};

// The product of a tile, in a warp's registers as mma.cuh has it.
template <class Traits>
FA_DEVICE void multiply(const ProductParams<typename Traits::Element>& p, int first_row,
                        int first_column,
                        float (&c)[Traits::fragments_m][Traits::fragments_n][4]) {
  using T = typename Traits::Element;
  using Tile = typename Traits::Tile;
  using A = typename Traits::A;
  using B = typename Traits::B;
  const Shared<T> ring = shared_memory<T>(0);
  const int warp_row = warp_index() % Traits::warp_rows * Tile::warp_rows;
  const int warp_column = warp_index() / Traits::warp_rows * Tile::warp_columns;
  const int tiles = (p.k + Tile::depth - 1) / Tile::depth;

  FA_UNROLL
  for (int i = 0; i < Traits::fragments_m; ++i) {
    FA_UNROLL
    for (int j = 0; j < Traits::fragments_n; ++j) {
      FA_UNROLL
      for (int e = 0; e < 4; ++e) c[i][j][e] = 0.0f;
    }
  }
  if (tiles == 0) return;

  A a_tile(p.a, first_row);
  B b_tile(p.b, first_column);
  auto copy = [&](int stage) {
    a_tile.copy(ring + stage * Traits::stage_elements, p.a);
    b_tile.copy(ring + (stage * Traits::stage_elements + A::elements), p.b);
  };
  uint32_t a[2][Traits::fragments_m][4], b[2][Traits::fragments_n / 2][4];
  auto read = [&](int stage, int slice, int buffer) {
    const Shared<T> a_place = ring + stage * Traits::stage_elements;
    const Shared<T> b_place = a_place + A::elements;
    FA_UNROLL
    for (int i = 0; i < Traits::fragments_m; ++i) {
      A::template fragment<true>(a[buffer][i], a_place, warp_row + 16 * i, slice);
    }
    FA_UNROLL
    for (int j = 0; j < Traits::fragments_n / 2; ++j) {
      B::template fragment<false>(b[buffer][j], b_place, warp_column + 16 * j, slice);
    }
  };

  FA_UNROLL
  for (int stage = 0; stage < Tile::stages - 1; ++stage) {
    if (stage < tiles) copy(stage);
    commit_copies();
  }
  wait_copies<Tile::stages - 2>();
  sync_block();
  read(0, 0, 0);

  int stage = 0, free = Tile::stages - 1;  // the one that is read, and the one before it
  for (int tile = 0; tile < tiles; ++tile) {
    FA_UNROLL
    for (int slice = 0; slice < Traits::slices; ++slice) {
      const int buffer = slice % 2;
      if (slice == 0) {
        if (tile + Tile::stages - 1 < tiles) copy(free);
        commit_copies();
      }
      if (slice + 1 < Traits::slices) {
        read(stage, slice + 1, 1 - buffer);
      } else {
        wait_copies<Tile::stages - 2>();
        sync_block();
        free = stage;
        stage = stage + 1 == Tile::stages ? 0 : stage + 1;
        if (tile + 1 < tiles) read(stage, 0, 1 - buffer);
      }
      FA_UNROLL
      for (int i = 0; i < Traits::fragments_m; ++i) {
        FA_UNROLL
        for (int j = 0; j < Traits::fragments_n; ++j) {
          const auto& pair = b[buffer][j / 2];
          const uint32_t column[2] = {pair[j % 2 * 2], pair[j % 2 * 2 + 1]};
          mma_16x8x16<T>(c[i][j], a[buffer][i], column);
        }
      }
    }
  }
}

template <class Traits>
FA_KERNEL(Traits::Tile::threads, Traits::Tile::blocks)
void product_kernel(FA_PARAMS(ProductParams<typename Traits::Element>) p) {
  using Tile = typename Traits::Tile;
  const int tiles_n = (p.n + Tile::columns - 1) / Tile::columns;
  const int tiles_m = (p.m + Tile::rows - 1) / Tile::rows;
  const int group = block_x() / (group_rows * tiles_n), within = block_x() % (group_rows * tiles_n);
  const int left = tiles_m - group * group_rows;
  const int height = left < group_rows ? left : group_rows;
  const int first_row = (group * group_rows + within % height) * Tile::rows;
  const int first_column = within / height * Tile::columns;

  float c[Traits::fragments_m][Traits::fragments_n][4];
  multiply<Traits>(p, first_row, first_column, c);

  // The barrier after the last tile has freed the ring; no copy is under way.
  constexpr int lanes = Tile::warp_columns / 8;  // of a row
  const int lane = lane_index();
  const Shared<float> strip = shared_memory<float>(warp_index() * Traits::strip * 4);
  const Shared<float> write = strip + (lane / 4 * Traits::strip_line + lane % 4 * 2);
  // 8 lanes would read 8 floats each, 32 bytes apart, the first halves of all and then the second
  // ones, from every other 16 bytes of the banks: so half of the lanes begin with the second.
  const int turn = lane / 4 % 2 * 4;
  const Shared<float> read = strip + (lane / lanes * Traits::strip_line + lane % lanes * 8);
  const int row = first_row + warp_index() % Traits::warp_rows * Tile::warp_rows;
  const int column = first_column + warp_index() / Traits::warp_rows * Tile::warp_columns;
  Finish<typename Traits::Element, Traits::pass> finish(p, column + lane % lanes * 8);
  FA_UNROLL
  for (int i = 0; i < Traits::fragments_m; ++i) {
    sync_warp();
    FA_UNROLL
    for (int j = 0; j < Traits::fragments_n; ++j) {
      store_vector(write + 8 * j, Vector<float, 2>{{c[i][j][0], c[i][j][1]}});
      store_vector(write + (8 * Traits::strip_line + 8 * j),
                   Vector<float, 2>{{c[i][j][2], c[i][j][3]}});
    }
    sync_warp();
    FA_UNROLL
    for (int r = 0; r < 16; r += warp_threads / lanes) {
      const auto one = load_vector<4>(read + (r * Traits::strip_line + turn));
      const auto two = load_vector<4>(read + (r * Traits::strip_line + (turn ^ 4)));
      float product[8];
      FA_UNROLL
      for (int e = 0; e < 4; ++e) {
        product[e] = turn == 0 ? one[e] : two[e];
        product[e + 4] = turn == 0 ? two[e] : one[e];
      }
      finish.row(row + 16 * i + r + lane / lanes, product);
    }
    if constexpr (Traits::pass == Pass::backward) {
      if (i % 2 == 1) finish.template write_sums<lanes>(row + 16 * (i + 1));
    }
  }
}

template <class Traits>
void launch_product(const char* name, const ProductParams<typename Traits::Element>& p,
                    Stream stream) {
  using Tile = typename Traits::Tile;
  const int64_t tiles_m = (int64_t{p.m} + Tile::rows - 1) / Tile::rows;
  const int64_t tiles_n = (int64_t{p.n} + Tile::columns - 1) / Tile::columns;
  launch(product_kernel<Traits>, name, Grid{tiles_m * tiles_n}, Tile::threads,
         Traits::shared_bytes, stream, p);
}

}  // namespace fastattn::ffn
