// What the primitives compute, for the tests to compare: every function runs one small kernel.
#include <cstring>

#include "device/atomic.cuh"
#include "device/barrier.cuh"
#include "device/cp_async.cuh"
#include "device/launch.cuh"
#include "device/ldmatrix.cuh"
#include "device/mma.cuh"
#include "device/philox.cuh"
#include "device/reduce.cuh"
#include "places.h"

#define FA_TEST extern "C" __attribute__((visibility("default"))) void

using namespace fastattn;

namespace {

struct Params {
  Global<const float> in;
  Global<float> out;
  Global<const uint16_t> elements;
  Global<uint32_t> words;
  uint64_t key;
  int variant;
};

void run(void (*kernel)(Params), const char* name, int threads, const Params& params,
         int64_t blocks = 1) {
  launch(kernel, name, Grid{blocks}, threads, 16 * 1024, nullptr, params);
}

template <class T>
FA_KERNEL(32, 1) void product(FA_PARAMS(Params) p) {
  // Tiles in rows: a (16, 16) and b (16, 8) of 16-bit elements, d (16, 8) of float32.
  const int g = lane_index() / 4, c = 2 * (lane_index() % 4);
  const auto pair = [&](int first, int second) {
    return load(p.elements + first) | static_cast<uint32_t>(load(p.elements + second)) << 16;
  };
  const auto of_a = [&](int row, int k) { return pair(16 * row + k, 16 * row + k + 1); };
  const auto of_b = [&](int k) { return pair(256 + 8 * k + g, 256 + 8 * (k + 1) + g); };
  const uint32_t a[4] = {of_a(g, c), of_a(g + 8, c), of_a(g, c + 8), of_a(g + 8, c + 8)};
  const uint32_t b[2] = {of_b(c), of_b(c + 8)};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = load(p.in + (8 * (g + i / 2 * 8) + c + i % 2));
  mma_16x8x16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) store(p.out + (8 * (g + i / 2 * 8) + c + i % 2), d[i]);
}

FA_KERNEL(32, 1) void matrices(FA_PARAMS(Params) p) {
  // Four matrices of 64 elements; lane l gives row l.
  const Shared<uint16_t> row = shared_memory<uint16_t>(0) + 8 * lane_index();
  for (int i = 0; i < 8; ++i) store(row + i, load(p.elements + (8 * lane_index() + i)));
  sync_warp();
  uint32_t registers[4];
  if (p.variant == 0) load_matrices(registers, row);
  if (p.variant == 1) load_matrices_transposed(registers, row);
  for (int i = 0; i < 4; ++i) store(p.words + (4 * lane_index() + i), registers[i]);
}

FA_KERNEL(128, 1) void reductions(FA_PARAMS(Params) p) {
  const int thread = thread_index();
  const float value = load(p.in + thread);
  const float results[] = {warp_sum<4>(value), warp_sum(value), warp_max<8>(value),
                           warp_max(value), block_sum<128>(value, shared_memory<float>(0))};
  for (int i = 0; i < 5; ++i) store(p.out + (128 * i + thread), results[i]);
}

FA_KERNEL(32, 1) void lanes_to_each_other(FA_PARAMS(Params) p) {
  const uint32_t lane = static_cast<uint32_t>(lane_index());
  const uint32_t results[] = {shuffle_xor(lane, 5), shuffle(lane, 7),
                              shuffle(lane, lane_index() / 2), ballot(lane % 3 == 0)};
  for (int i = 0; i < 4; ++i) store(p.words + (32 * i + lane_index()), results[i]);
}

FA_KERNEL(128, 1) void dropout_words(FA_PARAMS(Params) p) {
  // (plane, row, block of four columns) = (block_x, 0 to 31, 0 to 3)
  const int row = thread_index() / 4, group = thread_index() % 4;
  const PhiloxBlock block = philox(p.key, static_cast<uint32_t>(row), static_cast<uint32_t>(group),
                                   static_cast<uint32_t>(block_x()), 0);
  for (int i = 0; i < 4; ++i) {
    store(p.words + ((block_x() * 32 + row) * 16 + 4 * group + i), block.words[i]);
  }
}

FA_KERNEL(64, 1) void pipeline(FA_PARAMS(Params) p) {
  // Sums 8 tiles of 64 floats that arrive in a ring of three stages.
  const int thread = thread_index();
  const auto fetch = [&](int tile) {
    if (thread < 16) {
      const int first = 4 * thread;
      copy_async(shared_memory<float>(256 * (tile % 3)) + first, p.in + (64 * (tile % 8) + first),
                 tile < 8);
    }
    commit_copies();
  };
  fetch(0);
  fetch(1);
  float sum = 0.0f;
  for (int tile = 0; tile < 8; ++tile) {
    wait_copies<1>();
    sync_block();
    fetch(tile + 2);
    sum += load(shared_memory<float>(256 * (tile % 3)) + (63 - thread));
  }
  store(p.out + (63 - thread), sum);
}

FA_KERNEL(96, 1) void hand_over(FA_PARAMS(Params) p) {
  // Warp 0 writes two slots in turn, warps 1 and 2 read them.
  float sum = 0.0f;
  for (int step = 0; step < 8; ++step) {
    const Shared<float> slot = shared_memory<float>(128 * (step % 2)) + lane_index();
    const int full = 1 + step % 2, empty = 3 + step % 2;
    if (warp_index() == 0) {
      if (step > 1) sync_named(empty, 96);
      store(slot, load(p.in + (32 * step + lane_index())));
      arrive_named(full, 96);
    } else {
      sync_named(full, 96);
      sum += load(slot);
      if (step < 6) arrive_named(empty, 96);
    }
  }
  if (warp_index() > 0) store(p.out + (thread_index() - 32), sum);
}

FA_KERNEL(64, 1) void tickets(FA_PARAMS(Params) p) {
  // Each thread of each block draws another number.
  const Global<int> counter = {reinterpret_cast<int*>(p.words.pointer), p.words.region};
  const int ticket = atomic_add(counter, 1);
  store(p.words + (1 + ticket), 1u);
  atomic_add(p.out, 0.5f);
}

FA_KERNEL(32, 1) void banks(FA_PARAMS(Params) p) {
  const int lane = lane_index();
  switch (p.variant) {
    case 0: store(shared_memory<float>(0) + lane, 0.0f); break;                 // one turn
    case 1: store(shared_memory<float>(0) + 2 * lane, 0.0f); break;             // two
    case 2: store(shared_memory<float>(0) + 32 * lane, 0.0f); break;            // 32
    case 3: store(shared_memory<float>(0) + 33 * lane, 0.0f); break;            // one
    case 4: store(shared_memory<half_t>(0) + lane, half_t{0}); break;           // one: same words
    case 5:                                                                     // one a quarter
      store_vector(shared_memory<float>(0) + 4 * lane, Vector<float, 4>{});
      break;
    case 6:  // eight a quarter
      store_vector(shared_memory<float>(0) + 32 * lane, Vector<float, 4>{});
      break;
    case 7:  // two a half warp
      store_vector(shared_memory<float>(0) + 4 * lane, Vector<float, 2>{});
      break;
    default: {  // rows of 128 bytes, and with 16 bytes between them
      const int stride = p.variant == 8 ? 128 : 144;
      for (int i = 0; i < 8; ++i) store(shared_memory<half_t>(stride * lane) + i, half_t{0});
      sync_warp();
      uint32_t registers[4];
      load_matrices(registers, shared_memory<half_t>(stride * lane));
    }
  }
}

FA_KERNEL(32, 1) void sectors(FA_PARAMS(Params) p) {
  if (p.variant == 0) load(p.in + thread_index());
  if (p.variant == 1) load(p.in + 8 * thread_index());
  // Lanes that do more do not spoil what the others do together.
  if (p.variant == 2) {
    if (thread_index() % 2 == 0) load(p.in);
    load(p.in + thread_index());
  }
}

Params zeros() { return {{nullptr}, {nullptr}, {nullptr}, {nullptr}, 0, 0}; }

}  // namespace

FA_TEST multiply(const uint16_t* elements, const float* c, float* d, int bfloat16) {
  const emulator::Scope scope;
  Params params = zeros();
  params.elements = given(elements, 384);
  params.in = given(c, 128);
  params.out = taken(d, 128);
  run(bfloat16 ? product<bfloat16_t> : product<half_t>, "product", 32, params);
}

FA_TEST read_matrices(const uint16_t* elements, uint32_t* registers, int transposed) {
  const emulator::Scope scope;
  Params params = zeros();
  params.elements = given(elements, 256);
  params.words = taken(registers, 128);
  params.variant = transposed;
  run(matrices, "matrices", 32, params);
}

FA_TEST reduce(const float* in, float* out) {
  const emulator::Scope scope;
  Params params = zeros();
  params.in = given(in, 128);
  params.out = taken(out, 640);
  run(reductions, "reductions", 128, params);
}

FA_TEST exchange_lanes(uint32_t* out) {
  const emulator::Scope scope;
  Params params = zeros();
  params.words = taken(out, 128);
  run(lanes_to_each_other, "lanes_to_each_other", 32, params);
}

FA_TEST draw_words(uint64_t key, uint32_t* out, int planes) {
  const emulator::Scope scope;
  Params params = zeros();
  params.key = key;
  params.words = taken(out, planes * 32 * 16);
  run(dropout_words, "dropout_words", 128, params, planes);
}

FA_TEST sum_tiles(const float* in, float* out) {
  const emulator::Scope scope;
  Params params = zeros();
  params.in = given(in, 512);
  params.out = taken(out, 64);
  run(pipeline, "pipeline", 64, params);
}

FA_TEST hand_tiles_over(const float* in, float* out) {
  const emulator::Scope scope;
  Params params = zeros();
  params.in = given(in, 256);
  params.out = taken(out, 64);
  run(hand_over, "hand_over", 96, params);
}

FA_TEST draw_tickets(uint32_t* words, float* sum) {
  const emulator::Scope scope;
  Params params = zeros();
  given(words, 1 + 256);
  given(sum, 1);
  params.words = taken(words, 1 + 256);
  params.out = taken(sum, 1);
  run(tickets, "tickets", 64, params, 4);
}

FA_TEST touch_banks(int variant) {
  Params params = zeros();
  params.variant = variant;
  run(banks, "banks", 32, params);
}

FA_TEST touch_sectors(int variant) {
  const emulator::Scope scope;
  Buffer<float> in(256);
  Params params = zeros();
  params.in = in.input();
  params.variant = variant;
  run(sectors, "sectors", 32, params);
}

FA_TEST narrow(const float* in, uint16_t* out, int64_t size, int bfloat16) {
  for (int64_t i = 0; i < size; ++i) {
    out[i] = bfloat16 ? from_float<bfloat16_t>(in[i]).bits : from_float<half_t>(in[i]).bits;
  }
}

FA_TEST widen(const uint16_t* in, float* out, int64_t size, int bfloat16) {
  for (int64_t i = 0; i < size; ++i) {
    out[i] = bfloat16 ? to_float(bfloat16_t{in[i]}) : to_float(half_t{in[i]});
  }
}

FA_TEST exponentials(const float* in, float* out, int64_t size, int inverse) {
  for (int64_t i = 0; i < size; ++i) out[i] = inverse ? log2_fast(in[i]) : exp2_fast(in[i]);
}
