// Tiles of a 16-bit matrix in shared memory, and the tensor core's operands from them.
//
// A row of a tile has Width elements, in chunks of 8 (16 bytes). Chunk c of row r lies at place
// c xor (r mod 8) of its row: the 8 rows that one step of ldmatrix reads at one c, and the 8 chunks
// of a row that one step of a copy writes, then lie in 8 different groups of 4 banks. Rows of 128
// bytes and more need no padding for that.
#pragma once

#include "attention/params.cuh"
#include "device/cp_async.cuh"
#include "device/ldmatrix.cuh"
#include "device/memory.cuh"
#include "device/mma.cuh"
#include "device/platform.cuh"
#include "device/registers.cuh"
#include "device/warp.cuh"

namespace fastattn {

constexpr int chunk_elements = 8;

template <class T, int Width>
struct Tile {
  static_assert(sizeof(T) == 2 && Width % 64 == 0);
  static constexpr int chunks = Width / chunk_elements;

  Shared<T> data;

  FA_DEVICE static int offset(int row, int chunk) {
    return row * Width + ((chunk ^ (row & 7)) * chunk_elements);
  }
  FA_DEVICE Shared<T> at(int row, int chunk) const { return data + offset(row, chunk); }

  // From offset(row, c) with c < 2 to offset(row, c + chunk), `chunk` being even: one instruction.
  FA_DEVICE static int moved(int offset, int chunk) { return offset ^ (chunk * chunk_elements); }
};

template <class T, int Width>
constexpr int tile_bytes(int rows) {
  return rows * Width * static_cast<int>(sizeof(T));
}

// Zeros in the first `width` elements of a block's share of a gap's rows: Rows in every tiles * Rows.
template <int Rows, int Threads, class T>
FA_DEVICE void clear_rows(const Matrix<T>& to, Sequence gap, int head, int tile, int tiles, int width,
                          bool aligned) {
  const int step = aligned ? chunk_elements : 1, steps = width / step;
  Vector<T, chunk_elements> zeros;
  FA_UNROLL
  for (int e = 0; e < chunk_elements; ++e) zeros[e] = from_float<T>(0.0f);
  for (int64_t first = int64_t{tile} * Rows; first < gap.length; first += int64_t{tiles} * Rows) {
    const int rows = static_cast<int>(cut(gap.length - first, 0, Rows));
    FA_ROLL
    for (int i = thread_index(); i < rows * steps; i += Threads) {
      const int row = i / steps, column = (i - row * steps) * step;
      const Global<T> place = to.at(0, gap.start + first + row, head) + column;
      if (aligned) {
        store_vector(place, zeros);
      } else {
        store(place, zeros[0]);
      }
    }
  }
}

// Copies the first `width` elements of Rows rows into a tile, by all Threads of the block: row r
// begins r * stride elements after `from`, and is read if exists(r). All else becomes zero. With
// `aligned`, rows are whole chunks at multiples of 16 bytes, and the copy is a part of the thread's
// open group of asynchronous copies; else it goes element by element, done before a barrier.
template <int Rows, int Threads, class T, int Width, class Exists>
FA_DEVICE void load_rows(Tile<T, Width> tile, Global<const T> from, int64_t stride, int width,
                         bool aligned, Exists exists) {
  using Places = Tile<T, Width>;
  constexpr int rows_at_once = Threads / Places::chunks;
  static_assert(Threads % Places::chunks == 0 && Rows % rows_at_once == 0);
  const int thread = renewed(thread_index());
  const int chunk = thread % Places::chunks, first_row = thread / Places::chunks;
  const int column = chunk * chunk_elements;
  Global<const T> place = from + (first_row * stride + column);
  if (aligned) {
    const int64_t step = renewed(rows_at_once * stride);
    FA_UNROLL
    for (int r = 0; r < Rows; r += rows_at_once) {
      const int row = first_row + r;
      copy_async(tile.at(row, chunk), place, column < width && exists(row));
      place = place + step;
    }
  } else {
    FA_ROLL
    for (int x = 0; x < Rows / rows_at_once * chunk_elements; ++x) {
      const int r = x / chunk_elements * rows_at_once, e = x % chunk_elements;
      const bool inside = column + e < width && exists(first_row + r);
      const T value = inside ? load(place + (r * stride + e)) : from_float<T>(0.0f);
      store(tile.at(first_row + r, chunk) + e, value);
    }
  }
}

// The A operand: 16 rows from `row`, columns 16 step to 16 step + 15.
// Read from shared memory wherever it is needed, MTiles times; it is made again in every round of a
// loop.
template <class T, int Width>
class SharedLeft {
 public:
  FA_DEVICE SharedLeft(Tile<T, Width> tile, int row)
      : tile_(tile) {
    const int lane = renewed(lane_index());
    offset_ = Tile<T, Width>::offset(row + lane % 16, lane / 16);
  }
  template <int MTiles>
  FA_DEVICE void get(uint32_t (&a)[MTiles][4], int step) const {
    const int offset = Tile<T, Width>::moved(offset_, 2 * step);
    FA_UNROLL
    for (int m = 0; m < MTiles; ++m) load_matrices(a[m], tile_.data + (offset + 16 * m * Width));
  }

 private:
  Tile<T, Width> tile_;
  int offset_;
};

// One that stays in registers.
template <int MTiles, int Steps>
struct RegisterLeft {
  uint32_t values[Steps][MTiles][4];
  FA_DEVICE void get(uint32_t (&a)[MTiles][4], int step) const {
    FA_UNROLL
    for (int m = 0; m < MTiles; ++m) {
      FA_UNROLL
      for (int x = 0; x < 4; ++x) a[m][x] = values[step][m][x];
    }
  }
  template <class T, int Width>
  FA_DEVICE void fill(Tile<T, Width> tile, int row) {
    FA_UNROLL
    for (int step = 0; step < Steps; ++step) {
      SharedLeft<T, Width>{tile, row}.get(values[step], step);
    }
  }
};

// Accumulators of MTiles x NTiles tiles of 16 x 8, rounded to the A operand of another product: two
// neighbouring tiles are its 16 columns, lane by lane.
template <class T, int MTiles, int NTiles>
FA_DEVICE RegisterLeft<MTiles, NTiles / 2> as_left(const float (&d)[MTiles][NTiles][4]) {
  RegisterLeft<MTiles, NTiles / 2> left;
  FA_UNROLL
  for (int step = 0; step < NTiles / 2; ++step) {
    FA_UNROLL
    for (int m = 0; m < MTiles; ++m) {
      FA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float(&tile)[4] = d[m][2 * step + half];
        left.values[step][m][2 * half] = pack<T>(tile[0], tile[1]);
        left.values[step][m][2 * half + 1] = pack<T>(tile[2], tile[3]);
      }
    }
  }
  return left;
}

// d += A B^T, the rows of B being 8 NTiles rows of a tile; 16 Steps columns.
template <int Steps, int MTiles, int NTiles, class Left, class T, int Width>
FA_DEVICE void add_product_transposed(float (&d)[MTiles][NTiles][4], const Left& left,
                                      Tile<T, Width> right) {
  const int lane = renewed(lane_index());
  const int origin = Tile<T, Width>::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  FA_UNROLL
  for (int step = 0; step < Steps; ++step) {
    uint32_t a[MTiles][4];
    left.get(a, step);
    FA_UNROLL
    for (int n = 0; n < NTiles; n += 2) {
      uint32_t b[4];
      load_matrices(b, right.data + (Tile<T, Width>::moved(origin, 2 * step) + 8 * n * Width));
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
      FA_UNROLL
      for (int m = 0; m < MTiles; ++m) {
        mma_16x8x16<T>(d[m][n], a[m], first);
        mma_16x8x16<T>(d[m][n + 1], a[m], second);
      }
    }
  }
}

// d += A B, B being 16 Steps rows of a tile; 8 NTiles columns.
template <int Steps, int MTiles, int NTiles, class Left, class T, int Width>
FA_DEVICE void add_product(float (&d)[MTiles][NTiles][4], const Left& left, Tile<T, Width> right) {
  const int lane = renewed(lane_index());
  const int origin = Tile<T, Width>::offset(lane % 16, lane / 16);
  FA_UNROLL
  for (int step = 0; step < Steps; ++step) {
    uint32_t a[MTiles][4];
    left.get(a, step);
    FA_UNROLL
    for (int n = 0; n < NTiles; n += 2) {
      uint32_t b[4];
      load_matrices_transposed(
          b, right.data + (Tile<T, Width>::moved(origin, n) + 16 * step * Width));
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
      FA_UNROLL
      for (int m = 0; m < MTiles; ++m) {
        mma_16x8x16<T>(d[m][n], a[m], first);
        mma_16x8x16<T>(d[m][n + 1], a[m], second);
      }
    }
  }
}

template <int MTiles, int NTiles>
FA_DEVICE void clear(float (&d)[MTiles][NTiles][4]) {
  FA_UNROLL
  for (int m = 0; m < MTiles; ++m) {
    FA_UNROLL
    for (int n = 0; n < NTiles; ++n) {
      FA_UNROLL
      for (int x = 0; x < 4; ++x) d[m][n][x] = 0.0f;
    }
  }
}

// Stores a warp's accumulators, times one factor for each of a lane's rows, to `width` columns of
// global memory by way of 16 MTiles rows of a tile that only this warp reads: so that a row is
// written in 16 bytes at a time. Row r of the tile begins r * stride elements after `to`, and is
// written if r < rows; as zeros from row `zero_from` on, whatever the accumulators hold.
template <int MTiles, int NTiles, class T>
FA_DEVICE void store_rows(const float (&d)[MTiles][NTiles][4], const float (&factor)[MTiles][2],
                          Tile<T, 8 * NTiles> tile, int row, Global<T> to, int64_t stride, int rows,
                          int zero_from, int width, bool aligned) {
  const int lane = lane_index();
  sync_warp();
  FA_UNROLL
  for (int m = 0; m < MTiles; ++m) {
    FA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = row + 16 * m + 8 * half + lane / 4;
      const bool zero = r >= zero_from;
      FA_UNROLL
      for (int n = 0; n < NTiles; ++n) {
        const float f = factor[m][half];
        Vector<T, 2> pair;
        pair[0] = from_float<T>(zero ? 0.0f : d[m][n][2 * half] * f);
        pair[1] = from_float<T>(zero ? 0.0f : d[m][n][2 * half + 1] * f);
        store_vector(tile.at(r, n) + 2 * (lane % 4), pair);
      }
    }
  }
  sync_warp();
  constexpr int rows_at_once = warp_threads / NTiles > 0 ? warp_threads / NTiles : 1;
  const int chunk = lane % NTiles, column = chunk * chunk_elements;
  FA_ROLL
  for (int r = row + lane / NTiles; r < row + 16 * MTiles; r += rows_at_once) {
    if (r >= rows || column >= width) continue;
    const Vector<T, chunk_elements> values = load_vector<chunk_elements>(tile.at(r, chunk));
    const Global<T> place = to + (r * stride + column);
    if (aligned) {
      store_vector(place, values);
    } else {
      for (int e = 0; e < chunk_elements && column + e < width; ++e) store(place + e, values[e]);
    }
  }
}

}  // namespace fastattn
