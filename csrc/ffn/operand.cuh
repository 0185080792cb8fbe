// An operand's tiles on their way to the tensor core: global memory, shared memory, registers.
//
// An operand is a matrix of `extent` (the rows of A, the columns of B) by `depth`, the direction of
// the sums. One of the two is contiguous in memory, and a tile keeps that order in shared memory:
// lines of 16-byte chunks, so that both orders are copied by cp.async as they lie. ldmatrix then
// reads rows where the depth is contiguous, and transposes where it is not.
//
// Chunk c of line l stands at the place c ^ (l mod 8) of its line, of 64-byte lines at the place
// c ^ (l / 2 mod 4). So the 8 chunks of an 8x8 matrix, which ldmatrix reads at once, lie in other
// banks each, and so do the 8 chunks that a quarter of a warp writes.
#pragma once

#include "device/cp_async.cuh"
#include "device/ldmatrix.cuh"

namespace fastattn::ffn {

// Of an operand in memory: which direction is contiguous, in rows that are aligned to 16 bytes; or
// any strides and any alignment, which is read by the element.
enum class Order { depth_inner, extent_inner, any };

template <class T>
struct Operand {
  Global<const T> data;
  int extent, depth;
  int64_t extent_stride, depth_stride;  // in elements
};

// The tiles of Extent by Depth elements of one operand.
template <class T, Order order, int Extent, int Depth, int Threads>
struct OperandTile {
  static constexpr bool depth_inner = order != Order::extent_inner;
  static constexpr int vector = 8;  // elements of 16 bytes
  static constexpr int lines = depth_inner ? Extent : Depth;
  static constexpr int chunks = (depth_inner ? Depth : Extent) / vector;  // of a line
  static constexpr int elements = Extent * Depth;
  static constexpr int bytes = elements * static_cast<int>(sizeof(T));

  // Where a chunk of a line begins.
  FA_DEVICE static int place(int line, int chunk) {
    constexpr int lines_of_128_bytes = chunks >= 8 ? 1 : 8 / chunks;
    constexpr int mask = (chunks >= 8 ? 8 : chunks) - 1;
    return (line * chunks + (chunk ^ (line / lines_of_128_bytes & mask))) * vector;
  }

  // A thread's copies: its first chunk of the next tile. The others of a tile stand
  // `step` lines apart, a multiple of 8, so that the swizzle is the same.
  static constexpr int step = Threads / chunks;
  static constexpr int copies = lines / step;
  static_assert(Threads % chunks == 0 && lines % step == 0 && step % 8 == 0);

  Global<const T> next;
  int64_t line_stride, tile_stride;
  int first, depth;  // in the directions of extent and depth
  int extent;

  // Tiles of the operand's rows or columns from `first_of_tile` on.
  FA_DEVICE OperandTile(const Operand<T>& from, int first_of_tile)
      : line_stride(depth_inner ? from.extent_stride : from.depth_stride),
        tile_stride(from.depth_stride * Depth),
        extent(from.extent) {
    if constexpr (order == Order::any) {
      first = first_of_tile;
      depth = from.depth;
      next = from.data + first * from.extent_stride;
    } else {
      const int line = thread_index() / chunks, along = thread_index() % chunks * vector;
      first = first_of_tile + (depth_inner ? line : along);
      depth = from.depth - (depth_inner ? along : line);
      next = from.data + (depth_inner ? first * line_stride + along : line * line_stride + first);
    }
  }

  // Begins the copy of the next tile; zeros where the operand has ended.
  FA_DEVICE void copy(Shared<T> to, const Operand<T>& from) {
    if constexpr (order == Order::any) {
      copy_elements(to, from);
    } else {
      const Shared<T> mine = to + place(thread_index() / chunks, thread_index() % chunks);
      FA_UNROLL
      for (int i = 0; i < copies; ++i) {
        const bool inside = depth_inner ? depth > 0 && first + i * step < extent
                                        : depth > i * step && first < extent;
        copy_async(mine + i * Threads * vector, next + i * step * line_stride, inside);
      }
    }
    next = next + tile_stride;
    depth -= Depth;
  }

  // By ordinary loads and stores, a few of each at a time; neighbouring threads read neighbouring
  // elements if there are any.
  FA_DEVICE void copy_elements(Shared<T> to, const Operand<T>& from) const {
    constexpr int batch = 8;
    static_assert(elements % (Threads * batch) == 0);
    const bool along_depth = from.depth_stride == 1;
    for (int start = thread_index(); start < elements; start += Threads * batch) {
      T values[batch];
      FA_UNROLL
      for (int i = 0; i < batch; ++i) {
        const int index = start + i * Threads;
        const int e = along_depth ? index / Depth : index % Extent;
        const int d = along_depth ? index % Depth : index / Extent;
        const bool inside = first + e < extent && d < depth;
        values[i] = inside ? load(next + (e * from.extent_stride + d * from.depth_stride))
                           : from_float<T>(0.0f);
      }
      FA_UNROLL
      for (int i = 0; i < batch; ++i) {
        const int index = start + i * Threads;
        const int e = along_depth ? index / Depth : index % Extent;
        const int d = along_depth ? index % Depth : index / Extent;
        store(to + (place(e, d / vector) + d % vector), values[i]);
      }
    }
  }

  // A fragment of 16 by 16 elements, at the tile's row or column `along` and the depth 16 `slice`,
  // as mma.cuh has it: for A four matrices, for B those of two neighbouring 16x8 tiles.
  template <bool is_a>
  FA_DEVICE static void fragment(uint32_t (&registers)[4], Shared<T> tile, int along, int slice) {
    const int matrix = lane_index() / 8, row = lane_index() % 8;
    const int low = matrix % 2, high = matrix / 2;
    const int extent_half = is_a ? low : high, depth_half = is_a ? high : low;
    if constexpr (depth_inner) {
      const int line = along + extent_half * 8 + row;
      load_matrices(registers, tile + place(line, slice * 2 + depth_half));
    } else {
      const int line = slice * 16 + depth_half * 8 + row;
      load_matrices_transposed(registers, tile + place(line, along / vector + extent_half));
    }
  }
};

}  // namespace fastattn::ffn
