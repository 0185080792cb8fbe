// One program per primitive of csrc/device, run by the emulator and by a GPU, which have to agree.
//
// A program is a kernel that reads `in` and writes `out`, both int32; conformance.py knows the
// sizes, draws the input and compares. Numbers are chosen so that one right answer exists, bit for
// bit; `math` gives the results of functions that are only approximate, whose errors Python
// measures.

#include "device/atomic.cuh"
#include "device/barrier.cuh"
#include "device/cp_async.cuh"
#include "device/ldmatrix.cuh"
#include "device/math.cuh"
#include "device/mma.cuh"
#include "device/online_softmax.cuh"
#include "device/philox.cuh"
#include "device/reduce.cuh"
#include "device/tensor.cuh"
#include "device/warp.cuh"

namespace fastattn {

struct Arguments {
  Global<const int> in;
  Global<int> out;
};

// The same memory as elements of another type.
template <class T, class Bits>
FA_DEVICE Global<T> as(Global<Bits> place, int64_t offset = 0) {
  return place_as<T>(place) + offset;
}

// in[i], as a float.
FA_DEVICE float number(const Arguments& p, int64_t i) {
  return bits_float(static_cast<uint32_t>(load(p.in + i)));
}

FA_DEVICE void put(const Arguments& p, int64_t i, uint32_t value) {
  store(p.out + i, static_cast<int>(value));
}
FA_DEVICE void put(const Arguments& p, int64_t i, float value) { put(p, i, float_bits(value)); }

// --- where a thread stands; 2 x 3 x 2 blocks of 64 threads -------------------------------------

FA_KERNEL(64, 1) void indices(FA_PARAMS(Arguments) p) {
  const int block = (block_z() * grid_y() + block_y()) * grid_x() + block_x();
  const int64_t at = static_cast<int64_t>(block) * block_threads() + thread_index();
  put(p, at,
      static_cast<uint32_t>(((warp_index() * 100 + lane_index()) * 100 + grid_z()) * 10 +
                            block_z()));
}

// --- memory ------------------------------------------------------------------------------------

template <int N>
FA_DEVICE void copy_vectors(const Arguments& p, int64_t& offset) {
  // Global to shared to global, N elements an access, shifted by a thread on the way.
  const int thread = thread_index(), next = (thread + 1) % block_threads();
  auto shared = shared_memory<int>(0);
  store_vector(shared + thread * N, load_vector<N>(p.in + offset + thread * N));
  sync_block();
  store_vector(p.out + offset + thread * N, load_vector<N>(shared + next * N));
  sync_block();
  offset += block_threads() * N;
}

FA_KERNEL(128, 1) void vectors(FA_PARAMS(Arguments) p) {
  int64_t offset = 0;
  copy_vectors<1>(p, offset);
  copy_vectors<2>(p, offset);
  copy_vectors<4>(p, offset);
  const int64_t at = offset + thread_index() * 4;
  store_vector(p.out + at, load_vector_once<4>(p.in + at));
}

FA_KERNEL(32, 1) void scalars(FA_PARAMS(Arguments) p) {
  // 16-bit elements one by one, reversed in shared memory.
  const auto in = as<const half_t>(p.in);
  const auto out = as<half_t>(p.out);
  auto shared = shared_memory<half_t>(64);
  for (int i = thread_index(); i < 256; i += block_threads())
    store(shared + (255 - i), load(in + i));
  sync_block();
  for (int i = thread_index(); i < 256; i += block_threads()) store(out + i, load(shared + i));
}

// --- warps and blocks --------------------------------------------------------------------------

FA_KERNEL(64, 1) void shuffles(FA_PARAMS(Arguments) p) {
  const int thread = thread_index(), threads = block_threads();
  const int value = load(p.in + thread);
  int64_t at = thread;
  for (int mask = 1; mask < warp_threads; mask *= 2, at += threads) {
    put(p, at, static_cast<uint32_t>(shuffle_xor(value, mask)));
  }
  for (int source = 0; source < warp_threads; source += 5, at += threads) {
    put(p, at, static_cast<uint32_t>(shuffle(value, source)));
  }
  put(p, at, static_cast<uint32_t>(shuffle(value, (lane_index() * 7 + 3) % warp_threads)));
  put(p, at + threads, ballot(value % 3 == 0));
}

FA_KERNEL(128, 1) void reductions(FA_PARAMS(Arguments) p) {
  const int thread = thread_index(), threads = block_threads();
  const float value = number(p, thread);
  auto scratch = shared_memory<float>(0);
  put(p, thread, warp_sum(value));
  put(p, thread + threads, warp_sum<4>(value));
  put(p, thread + 2 * threads, warp_max(value));
  put(p, thread + 3 * threads, warp_max<4>(value));
  put(p, thread + 4 * threads, block_sum<128>(value, scratch));
}

FA_KERNEL(96, 1) void barriers(FA_PARAMS(Arguments) p) {
  // Warp 0 makes, warps 1 and 2 use, through two slots; `full` and `empty` are two barriers a slot.
  const int lane = lane_index(), warp = warp_index();
  auto slots = shared_memory<int>(0);
  for (int round = 0; round < 6; ++round) {
    const int slot = round % 2, full = 1 + slot, empty = 3 + slot;
    if (warp == 0) {
      if (round >= 2) sync_named(empty, 96);
      store(slots + slot * 32 + lane, load(p.in + round * 32 + lane));
      arrive_named(full, 96);
    } else {
      sync_named(full, 96);
      const int value = load(slots + slot * 32 + (lane + warp) % 32);
      put(p, (round * 2 + warp - 1) * 32 + lane, static_cast<uint32_t>(value));
      if (round < 4) arrive_named(empty, 96);
    }
  }
}

FA_KERNEL(32, 1) void warp_memory(FA_PARAMS(Arguments) p) {
  const int lane = lane_index();
  auto shared = shared_memory<int>(0);
  for (int round = 0; round < 4; ++round) {
    store(shared + lane, load(p.in + round * 32 + lane));
    sync_warp();
    put(p, round * 32 + lane, static_cast<uint32_t>(load(shared + (lane * 3 + round) % 32)));
    sync_warp();
  }
}

FA_KERNEL(64, 1) void atomics(FA_PARAMS(Arguments) p) {
  // Sums of whole numbers: the same in any order.
  const int value = load(p.in + thread_index());
  if (thread_index() < 16) put(p, thread_index(), 0u);
  sync_block();
  atomic_add(p.out + value % 8, value);
  atomic_add(as<float>(p.out, 8) + value % 8, static_cast<float>(value));
}

// --- asynchronous copies -----------------------------------------------------------------------

FA_KERNEL(64, 1) void async_copies(FA_PARAMS(Arguments) p) {
  // Four groups, two in flight; every third copy is not valid and fills with zeros.
  const int thread = thread_index();
  auto shared = shared_memory<int>(0);
  constexpr int groups = 4, size = 64 * 4;
  auto begin = [&](int group) {
    const int at = group * size + thread * 4;
    copy_async(shared + at, p.in + at, (thread + group) % 3 != 0);
    commit_copies();
  };
  begin(0);
  begin(1);
  FA_UNROLL
  for (int group = 0; group < groups; ++group) {
    if (group + 2 < groups) begin(group + 2);
    if (group + 2 < groups) wait_copies<2>();
    if (group + 2 == groups) wait_copies<1>();
    if (group + 1 == groups) wait_copies<0>();
    sync_block();
    const int at = group * size + (63 - thread) * 4;
    store_vector(p.out + group * size + thread * 4, load_vector<4>(shared + at));
  }
}

// --- tensor cores ------------------------------------------------------------------------------

FA_KERNEL(32, 1) void matrices(FA_PARAMS(Arguments) p) {
  const int lane = lane_index();
  const auto in = as<const half_t>(p.in);
  auto shared = shared_memory<half_t>(0);
  for (int i = lane * 8; i < 256; i += 256) store_vector(shared + i, load_vector<8>(in + i));
  sync_warp();
  uint32_t registers[4];
  const int row = (lane * 5 + 2) % 32;  // any row of eight, in any order
  load_matrices(registers, shared + row * 8);
  for (int m = 0; m < 4; ++m) put(p, m * 32 + lane, registers[m]);
  load_matrices_transposed(registers, shared + row * 8);
  for (int m = 0; m < 4; ++m) put(p, (4 + m) * 32 + lane, registers[m]);
}

template <class T>
FA_KERNEL(32, 1)
void products(FA_PARAMS(Arguments) p) {
  // a: 16 x 16, b: 16 x 8 (k by column), d: 16 x 8, of whole numbers.
  const int lane = lane_index(), g = lane / 4, c = 2 * (lane % 4);
  auto a_at = [&](int row, int k) { return static_cast<float>(load(p.in + row * 16 + k)); };
  auto b_at = [&](int k, int column) {
    return static_cast<float>(load(p.in + 256 + k * 8 + column));
  };
  const int rows[4] = {g, g + 8, g, g + 8}, ks[4] = {c, c, c + 8, c + 8};
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = pack<T>(a_at(rows[i], ks[i]), a_at(rows[i], ks[i] + 1));
  for (int i = 0; i < 2; ++i) b[i] = pack<T>(b_at(c + 8 * i, g), b_at(c + 8 * i + 1, g));
  float d[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  mma_16x8x16<T>(d, a, b);
  mma_16x8x16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) put(p, (g + i / 2 * 8) * 8 + c + i % 2, d[i]);
}

// --- numbers -----------------------------------------------------------------------------------

template <class T>
FA_KERNEL(64, 1)
void rounding(FA_PARAMS(Arguments) p) {
  // in: float32 of every kind; out: both halves of a pair, and both again as float32.
  const int thread = thread_index(), at = (block_x() * block_threads() + thread) * 4;
  const float x = number(p, at), y = number(p, at + 1);
  const uint32_t pair = pack<T>(x, y);
  float first, second;
  unpack<T>(pair, first, second);
  put(p, at, pair);
  put(p, at + 1, first);
  put(p, at + 2, to_float(from_float<T>(x)) == first || is_nan(x) ? 1u : 0u);
  put(p, at + 3, second);
}

FA_KERNEL(64, 1) void random_words(FA_PARAMS(Arguments) p) {
  const int thread = thread_index();
  const uint64_t key = static_cast<uint32_t>(load(p.in)) |
                       static_cast<uint64_t>(static_cast<uint32_t>(load(p.in + 1))) << 32;
  const auto block =
      philox(key, static_cast<uint32_t>(thread), static_cast<uint32_t>(load(p.in + 2)), 7u, 0u);
  for (int i = 0; i < 4; ++i) put(p, thread * 4 + i, block.words[i]);
}

FA_KERNEL(64, 1) void math(FA_PARAMS(Arguments) p) {
  const int64_t i = static_cast<int64_t>(block_x()) * block_threads() + thread_index();
  const float x = number(p, i);
  const float results[] = {
      exp2_fast(x), log2_fast(abs(x)), rsqrt(abs(x)), erf(x),        tanh(x),
      exp(x),       max(x, 0.5f),      min(x, 0.5f),  fma(x, x, -x), reciprocal_fast(x)};
  constexpr int functions = sizeof results / sizeof *results;
  const int64_t count = static_cast<int64_t>(grid_x()) * block_threads();
  for (int f = 0; f < functions; ++f) put(p, f * count + i, results[f]);
}

FA_KERNEL(32, 1) void running_softmax(FA_PARAMS(Arguments) p) {
  // Whole powers of two, whose sums are exact; lane 0 sees nothing at all.
  const int lane = lane_index();
  OnlineSoftmax state;
  for (int tile = 0; tile < 4; ++tile) {
    const float score =
        lane == 0 ? -infinity : static_cast<float>(load(p.in + tile * 32 + lane) % 4);
    put(p, tile * 32 + lane, state.raise(score));
    state.sum += exp2_fast(score - state.shift());
  }
  put(p, 128 + lane, state.maximum);
  put(p, 160 + lane, state.sum);
  put(p, 192 + lane, lane == 0 ? state.lse() : 0.0f);
}

// --- the way in --------------------------------------------------------------------------------

struct Program {
  const char* name;
  void (*kernel)(Arguments);
  Grid grid;
  int threads;
  int shared;
};

const Program programs[] = {
    {"indices", indices, {2, 3, 2}, 64, 0},
    {"vectors", vectors, {1}, 128, 128 * 16},
    {"scalars", scalars, {1}, 32, 64 + 512},
    {"shuffles", shuffles, {1}, 64, 0},
    {"reductions", reductions, {1}, 128, 16},
    {"barriers", barriers, {1}, 96, 256},
    {"warp_memory", warp_memory, {1}, 32, 128},
    {"atomics", atomics, {1}, 64, 0},
    {"async_copies", async_copies, {1}, 64, 4 * 64 * 16},
    {"matrices", matrices, {1}, 32, 512},
    {"products of halves", products<half_t>, {1}, 32, 0},
    {"products of bfloat16s", products<bfloat16_t>, {1}, 32, 0},
    {"rounding to halves", rounding<half_t>, {64}, 64, 0},
    {"rounding to bfloat16s", rounding<bfloat16_t>, {64}, 64, 0},
    {"random_words", random_words, {1}, 64, 0},
    {"math", math, {64}, 64, 0},
    {"running_softmax", running_softmax, {1}, 32, 0},
};

void run(const Tensor& out, const Tensor& in, int64_t number) {
  constexpr int64_t count = sizeof programs / sizeof *programs;
  if (number < 0 || number >= count) throw std::runtime_error("there is no such program");
  const OnDevice device(out);
  const Program& program = programs[number];
  launch(program.kernel, program.name, program.grid, program.threads, program.shared,
         device.stream(), Arguments{input<int>(in), output<int>(out)});
}

}  // namespace fastattn

#define FA_REGISTER(key) STABLE_TORCH_LIBRARY_IMPL(fastattn_conformance, key, m)

STABLE_TORCH_LIBRARY(fastattn_conformance, m) {
  m.def("run(Tensor(a!) out, Tensor input, int number) -> ()");
}
FA_REGISTER(FA_DISPATCH_KEY) { m.impl("run", TORCH_BOX(&fastattn::run)); }
