// The tiles of the attention kernels, one struct for each loop.
//
// A warp owns 16 m_tiles rows of what a block holds. With 32 rows each operand that it reads from
// shared memory serves two steps of the tensor cores, which then bound the loop; with 16 shared
// memory binds it as well. So 32 wherever 255 registers hold the accumulators, and 16 where Full,
// that is a call with softcap, ALiBi, bias, mask, dropout or a scale that is not positive, needs
// registers of its own. No block takes more than the 99 KB of shared memory of sm_86, 89 and 120.
#pragma once

#include "attention/tile.cuh"
#include "device/platform.cuh"

namespace fastattn {

// A query tile stays, tiles of keys and values stream, one of each in shared memory.
template <class T, int HeadDim, bool Full>
struct ForwardTraits {
  using Type = T;
  static constexpr int head_dim = HeadDim;
  static constexpr bool full = Full;
  static constexpr int warps = 4;
  static constexpr int threads = warps * warp_threads;
  static constexpr int m_tiles = !Full && HeadDim <= 128 ? 2 : 1;
  static constexpr int rows = warps * 16 * m_tiles;
  static constexpr int columns = HeadDim <= 128 ? 64 : 32;
  static constexpr int blocks = HeadDim <= 64 && Full ? 3 : 2;
  // Q as operands in registers, instead of read from shared memory for every tile of keys.
  static constexpr bool q_in_registers = HeadDim * m_tiles <= 128;
  static constexpr int q_bytes = 0;
  static constexpr int k_bytes = tile_bytes<T, HeadDim>(rows);
  static constexpr int v_bytes = k_bytes + tile_bytes<T, HeadDim>(columns);
  static constexpr int shared_bytes = v_bytes + tile_bytes<T, HeadDim>(columns);
};

// dQ: a query tile and its dO stay, tiles of keys and values stream, two of each in shared memory.
template <class T, int HeadDim, bool Full>
struct QueriesTraits {
  using Type = T;
  static constexpr int head_dim = HeadDim;
  static constexpr bool full = Full;
  static constexpr int warps = HeadDim == 128 ? 8 : 4;
  static constexpr int threads = warps * warp_threads;
  static constexpr int m_tiles = !Full && HeadDim <= 64 ? 2 : 1;
  static constexpr int rows = warps * 16 * m_tiles;
  static constexpr int columns = HeadDim <= 128 ? 32 : 16;
  static constexpr int blocks = HeadDim <= 64 ? 2 : 1;
  // As operands in registers, instead of read from shared memory for every tile of keys.
  static constexpr bool q_in_registers = HeadDim == 128 || (Full && HeadDim <= 64);
  static constexpr bool dout_in_registers = q_in_registers && !(Full && HeadDim == 128);
  static constexpr int q_bytes = 0;
  static constexpr int dout_bytes = tile_bytes<T, HeadDim>(rows);
  static constexpr int stages_bytes = 2 * dout_bytes;  // K and V, again K and V
  static constexpr int stage_bytes = 2 * tile_bytes<T, HeadDim>(columns);
  static constexpr int shared_bytes = stages_bytes + 2 * stage_bytes;
};

enum class Part { both, keys, values };

// dK and dV: a tile of keys and values stays, tiles of queries and dO stream, two of each in shared
// memory. At a head_dim of 256 registers hold one accumulator: dK and dV are two launches.
template <class T, int HeadDim, bool Full, Part Wanted>
struct KeysTraits {
  using Type = T;
  static constexpr int head_dim = HeadDim;
  static constexpr bool full = Full;
  static constexpr bool dk = Wanted != Part::values, dv = Wanted != Part::keys;
  static constexpr int warps = HeadDim == 128 ? 8 : 4;
  static constexpr int threads = warps * warp_threads;
  static constexpr int m_tiles = !Full && HeadDim <= 64 ? 2 : 1;
  static constexpr int rows = warps * 16 * m_tiles;
  static constexpr int columns = HeadDim <= 128 ? 32 : 16;
  static constexpr int blocks = HeadDim <= 64 ? 2 : 1;
  static constexpr int k_bytes = 0;
  static constexpr int v_bytes = tile_bytes<T, HeadDim>(rows);
  static constexpr int stages_bytes = 2 * v_bytes;  // Q and dO, again Q and dO
  static constexpr int stage_bytes = 2 * tile_bytes<T, HeadDim>(columns);
  static constexpr int state_bytes = stages_bytes + 2 * stage_bytes;  // lse and delta, twice
  static constexpr int shared_bytes =
      state_bytes + 2 * 2 * columns * static_cast<int>(sizeof(float));
};

}  // namespace fastattn
