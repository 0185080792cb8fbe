// Kernels with one bug each, and their right twins: Bug is what differs.
#include <cstring>
#include <exception>
#include <string>

#include "device/atomic.cuh"
#include "device/barrier.cuh"
#include "device/cp_async.cuh"
#include "device/launch.cuh"
#include "device/ldmatrix.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"
#include "places.h"

namespace fastattn {

struct Params {
  Global<const float> in;
  Global<float> out;
  Global<int> counter;
};

// --- deadlock ---

template <bool Bug>
FA_KERNEL(64, 1) void missing_barrier(FA_PARAMS(Params) p) {
  if (!Bug || warp_index() == 0) sync_block();
  store(p.out + thread_index(), 1.0f);
}

template <bool Bug>
FA_KERNEL(64, 1) void crossed_barriers(FA_PARAMS(Params)) {
  const bool first = warp_index() == 0 || !Bug;
  sync_named(first ? 1 : 2, 64);
  sync_named(first ? 2 : 1, 64);
}

template <bool Bug>
FA_KERNEL(96, 1) void missing_arrival(FA_PARAMS(Params)) {
  if (warp_index() < 2) sync_named(3, Bug ? 96 : 64);
}

// --- named barriers ---

template <bool Bug>
FA_KERNEL(64, 1) void counts_differ(FA_PARAMS(Params)) {
  sync_named(1, Bug && warp_index() == 1 ? 32 : 64);
}
template <bool Bug>
FA_KERNEL(64, 1) void arrives_twice(FA_PARAMS(Params)) {
  if (warp_index() == 0) {
    arrive_named(1, 64);
    if (Bug) arrive_named(1, 64);
  } else {
    sync_named(2, 32);
    sync_named(1, 64);
  }
}
template <bool Bug>
FA_KERNEL(64, 1) void number_of_barrier(FA_PARAMS(Params)) {
  sync_named(Bug ? 16 : 15, 64);
}
template <bool Bug>
FA_KERNEL(64, 1) void odd_count(FA_PARAMS(Params)) {
  sync_named(1, Bug ? 48 : 64);
}
template <bool Bug>
FA_KERNEL(64, 1) void count_beyond_block(FA_PARAMS(Params)) {
  sync_named(1, Bug ? 96 : 64);
}

// --- out of bounds: `in` and `out` have 64 elements, shared memory 256 bytes ---

template <bool Bug>
FA_KERNEL(64, 1) void read_beyond(FA_PARAMS(Params) p) {
  store(p.out + thread_index(), load(p.in + (thread_index() + Bug)));
}
template <bool Bug>
FA_KERNEL(64, 1) void read_before(FA_PARAMS(Params) p) {
  store(p.out + thread_index(), load(p.in + (thread_index() - Bug)));
}
template <bool Bug>
FA_KERNEL(64, 1) void vector_beyond(FA_PARAMS(Params) p) {
  if (thread_index() < 16 + Bug) {
    store_vector(p.out + 4 * thread_index(), Vector<float, 4>{{1, 2, 3, 4}});
  }
}
template <bool Bug>
FA_KERNEL(64, 1) void shared_beyond(FA_PARAMS(Params)) {
  store(shared_memory<float>(Bug ? 4 : 0) + thread_index(), 1.0f);
}
template <bool Bug>
FA_KERNEL(64, 1) void shared_before(FA_PARAMS(Params)) {
  store(shared_memory<float>(0) + (thread_index() - Bug), 1.0f);
}
template <bool Bug>
FA_KERNEL(64, 1) void copy_beyond(FA_PARAMS(Params) p) {
  const int first = 4 * thread_index();
  // Lanes without data copy zeros, and do not read.
  if (thread_index() < 16) {
    const bool valid = thread_index() < 15;
    copy_async(shared_memory<float>(0) + first, p.in + (valid ? first : 64), valid || Bug);
  }
}
template <bool Bug>
FA_KERNEL(32, 1) void matrix_beyond(FA_PARAMS(Params)) {
  const int lane = lane_index();
  if (lane < 16) store_vector(shared_memory<uint32_t>(16 * lane), Vector<uint32_t, 4>{});
  sync_warp();
  uint32_t registers[4];
  load_matrices(registers, shared_memory<half_t>(16 * (Bug ? lane : lane % 16)));
}
template <bool Bug>
FA_KERNEL(64, 1) void null_place(FA_PARAMS(Params) p) {
  store(p.out + thread_index(), load(Bug ? Global<const float>{nullptr} : p.in));
}
// `out` has rows of 6 of 8 elements.
template <bool Bug>
FA_KERNEL(32, 1) void write_of_padding(FA_PARAMS(Params) p) {
  if (thread_index() < (Bug ? 8 : 6)) store(p.out + thread_index(), 1.0f);
}

// --- not written before ---

template <bool Bug>
FA_KERNEL(64, 1) void unwritten_shared(FA_PARAMS(Params) p) {
  if (!Bug || thread_index() != 5) store(shared_memory<float>(0) + thread_index(), 1.0f);
  sync_block();
  store(p.out + thread_index(), load(shared_memory<float>(0) + (thread_index() ^ 32)));
}
template <bool Bug>
FA_KERNEL(64, 1) void unwritten_global(FA_PARAMS(Params) p) {
  if (!Bug || thread_index() != 5) store(p.out + thread_index(), 1.0f);
  sync_block();
  load(p.out + thread_index());
}
template <bool Bug>
FA_KERNEL(32, 1) void half_written_matrix(FA_PARAMS(Params)) {
  const int lane = lane_index();
  if (lane < (Bug ? 15 : 16)) {
    store_vector(shared_memory<uint32_t>(16 * lane), Vector<uint32_t, 4>{});
  }
  sync_warp();
  uint32_t registers[4];
  load_matrices_transposed(registers, shared_memory<half_t>(16 * (lane % 16)));
}
template <bool Bug>
FA_KERNEL(64, 1) void first_launch(FA_PARAMS(Params) p) {
  if (!Bug || thread_index() < 60) store(p.out + thread_index(), 1.0f);
}
FA_KERNEL(64, 1) void second_launch(FA_PARAMS(Params) p) { load(p.in + thread_index()); }

// --- races ---

template <bool Bug>
FA_KERNEL(64, 1) void read_after_write(FA_PARAMS(Params) p) {
  store(shared_memory<float>(0) + thread_index(), 0.0f);
  sync_block();
  store(shared_memory<float>(0) + thread_index(), 1.0f);
  if (!Bug) sync_block();
  if (Bug) sync_warp();
  store(p.out + thread_index(), load(shared_memory<float>(0) + (thread_index() ^ 32)));
}
template <bool Bug>
FA_KERNEL(128, 1) void write_after_read(FA_PARAMS(Params)) {
  const Shared<float> shared = shared_memory<float>(0);
  for (int step = 0; step < 3; ++step) {
    if (warp_index() == step % 4) store(shared + lane_index(), 1.0f);
    sync_block();
    load(shared + (lane_index() ^ 1));
    if (!Bug) sync_block();
  }
}
template <bool Bug>
FA_KERNEL(64, 1) void write_after_write(FA_PARAMS(Params)) {
  store(shared_memory<float>(0) + (Bug ? lane_index() : thread_index()), 1.0f);
}
// A producer and a consumer with a full and an empty barrier; the bug forgets the empty one.
template <bool Bug>
FA_KERNEL(64, 1) void ring(FA_PARAMS(Params)) {
  const Shared<float> slot = shared_memory<float>(0) + lane_index();
  for (int step = 0; step < 4; ++step) {
    if (warp_index() == 0) {
      if (!Bug && step > 0) sync_named(2, 64);
      store(slot, 1.0f);
      if (Bug && step > 0) sync_named(2, 64);
      arrive_named(1, 64);
    } else {
      sync_named(1, 64);
      load(slot);
      if (step < 3) arrive_named(2, 64);
    }
  }
}
// Who only arrives knows nothing of what the others did.
template <bool Bug>
FA_KERNEL(64, 1) void arrival_is_no_wait(FA_PARAMS(Params)) {
  if (warp_index() == 0) {
    store(shared_memory<float>(0) + lane_index(), 1.0f);
    sync_named(1, 64);
  } else {
    if (Bug) arrive_named(1, 64);
    if (!Bug) sync_named(1, 64);
    store(shared_memory<float>(0) + lane_index(), 2.0f);
  }
}
// Warp 0 to 1 to 2, though 0 and 2 never meet.
template <bool Bug>
FA_KERNEL(96, 1) void chain(FA_PARAMS(Params)) {
  const Shared<float> slot = shared_memory<float>(0) + lane_index();
  if (warp_index() == 0) store(slot, 0.0f);
  sync_block();
  if (warp_index() == 0) {
    store(slot, 1.0f);
    arrive_named(1, 64);
  } else if (warp_index() == 1) {
    if (Bug) arrive_named(2, 64);
    sync_named(1, 64);
    if (!Bug) arrive_named(2, 64);
  } else {
    sync_named(2, 64);
    load(slot);
  }
}
template <bool Bug>
FA_KERNEL(32, 1) void within_warp(FA_PARAMS(Params)) {
  const Shared<float> shared = shared_memory<float>(0);
  store(shared + lane_index(), 0.0f);
  sync_warp();
  store(shared + lane_index(), 1.0f);
  if (Bug) warp_sum(1.0f);  // a shuffle makes lanes wait, but orders no memory
  if (!Bug) sync_warp();
  load(shared + (lane_index() ^ 1));
}
template <bool Bug>
FA_KERNEL(32, 1) void between_blocks(FA_PARAMS(Params) p) {
  const int block = Bug ? 0 : block_x();
  store(p.out + (32 * block + thread_index()), 1.0f);
}
template <bool Bug>
FA_KERNEL(32, 1) void between_bytes(FA_PARAMS(Params)) {
  // Neighbours share a word, never a byte.
  const Shared<half_t> shared = shared_memory<half_t>(0);
  store(shared + (Bug ? lane_index() / 2 : lane_index()), half_t{0});
}
template <bool Bug>
FA_KERNEL(64, 1) void global_without_barrier(FA_PARAMS(Params) p) {
  store(p.out + thread_index(), 0.0f);
  sync_block();
  store(p.out + thread_index(), 1.0f);
  if (!Bug) sync_block();
  load(p.out + (63 - thread_index()));
}
template <bool Bug>
FA_KERNEL(32, 1) void atomic_and_plain(FA_PARAMS(Params) p) {
  atomic_add(p.counter, 1);
  if (Bug && block_x() == 1 && thread_index() == 7) load(p.counter);
}

// --- asynchronous copies ---

template <int Error>
void copy_pipeline(const Params& p) {
  const int thread = thread_index();
  const Shared<float> shared = shared_memory<float>(0);
  if (thread < 16) copy_async(shared + 4 * thread, p.in + 4 * thread);
  if (Error != 1) commit_copies();
  if (Error == 4 && thread == 3) store(shared + 12, 0.0f);
  if (Error != 2) wait_copies<Error == 3 ? 1 : 0>();
  if (Error != 5) sync_block();
  load(shared + (63 - thread));
}
template <bool Bug>
FA_KERNEL(64, 1) void no_commit(FA_PARAMS(Params) p) { copy_pipeline<Bug ? 1 : 0>(p); }
template <bool Bug>
FA_KERNEL(64, 1) void no_wait(FA_PARAMS(Params) p) { copy_pipeline<Bug ? 2 : 0>(p); }
template <bool Bug>
FA_KERNEL(64, 1) void wait_of_one(FA_PARAMS(Params) p) { copy_pipeline<Bug ? 3 : 0>(p); }
template <bool Bug>
FA_KERNEL(64, 1) void store_under_copy(FA_PARAMS(Params) p) { copy_pipeline<Bug ? 4 : 0>(p); }
template <bool Bug>
FA_KERNEL(64, 1) void wait_without_barrier(FA_PARAMS(Params) p) { copy_pipeline<Bug ? 5 : 0>(p); }

// The next copy into a stage that others may still read.
template <bool Bug>
FA_KERNEL(64, 1) void copy_after_read(FA_PARAMS(Params) p) {
  const Shared<float> shared = shared_memory<float>(0);
  for (int step = 0; step < 2; ++step) {
    if (thread_index() < 16) copy_async(shared + 4 * thread_index(), p.in + 4 * thread_index());
    commit_copies();
    wait_copies<0>();
    sync_block();
    load(shared + (63 - thread_index()));
    if (!Bug) sync_block();
  }
}

// --- alignment ---

template <bool Bug>
FA_KERNEL(32, 1) void misaligned_vector(FA_PARAMS(Params) p) {
  if (thread_index() < 8) load_vector<4>(p.in + (4 * thread_index() + Bug));
}
template <bool Bug>
FA_KERNEL(32, 1) void misaligned_pair(FA_PARAMS(Params)) {
  if (thread_index() == 31) return;
  store_vector(shared_memory<float>(Bug ? 4 : 0) + 2 * thread_index(), Vector<float, 2>{});
}
template <bool Bug>
FA_KERNEL(32, 1) void misaligned_scalar(FA_PARAMS(Params)) {
  if (thread_index() == 0) store(shared_memory<float>(Bug ? 2 : 4), 1.0f);
}
template <bool Bug>
FA_KERNEL(32, 1) void misaligned_copy(FA_PARAMS(Params) p) {
  if (thread_index() == 0) copy_async(shared_memory<float>(Bug ? 8 : 16), p.in);
}
template <bool Bug>
FA_KERNEL(32, 1) void misaligned_matrix(FA_PARAMS(Params)) {
  store(shared_memory<float>(4 * lane_index()), 0.0f);
  sync_warp();
  uint32_t registers[4];
  load_matrices(registers, shared_memory<half_t>(Bug && lane_index() == 9 ? 24 : 16));
}

// --- divergence ---

template <bool Bug>
FA_KERNEL(32, 1) void half_of_a_warp(FA_PARAMS(Params)) {
  if (!Bug || lane_index() < 16) shuffle(1.0f, 0);
}
template <bool Bug>
FA_KERNEL(32, 1) void two_primitives(FA_PARAMS(Params)) {
  if (Bug && lane_index() == 3) {
    ballot(true);
  } else {
    shuffle(1.0f, 0);
  }
}
template <bool Bug>
FA_KERNEL(32, 1) void two_lines(FA_PARAMS(Params)) {
  if (Bug && lane_index() == 3) {
    shuffle_xor(1.0f, 1);
  } else {
    shuffle_xor(1.0f, 1);
  }
}
template <bool Bug>
FA_KERNEL(64, 1) void barrier_of_lanes(FA_PARAMS(Params)) {
  if (!Bug || lane_index() != 9) sync_block();
}
template <bool Bug>
FA_KERNEL(32, 1) void loop_of_lanes(FA_PARAMS(Params)) {
  for (int i = 0; i < (Bug ? lane_index() : 3); ++i) sync_warp();
}
template <bool Bug>
FA_KERNEL(32, 1) void product_of_lanes(FA_PARAMS(Params)) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (!Bug || lane_index() != 31) mma_16x8x16<half_t>(d, a, b);
}
template <bool Bug>
FA_KERNEL(64, 1) void barriers_of_lanes(FA_PARAMS(Params)) {
  sync_named(Bug && lane_index() == 1 ? 2 : 1, 64);
}

// --- how they are run ---

template <bool Bug>
FA_KERNEL(64, 1) void nothing(FA_PARAMS(Params)) {}

struct Run {
  const char* name;
  Buffer<float> in, out;
  Buffer<int> counter;

  Params params() {
    counter.input();  // its value counts
    return {in.input(), out.output(), counter.output()};
  }
  void operator()(void (*kernel)(Params), int threads, Grid grid = {}, int shared = 256) {
    launch(kernel, name, grid, threads, shared, nullptr, params());
  }
};

template <bool Bug>
void run_program(const std::string& name) {
  const emulator::Scope scope;
  Run run = {name.c_str(), Buffer<float>(64), Buffer<float>(64), Buffer<int>(1)};
  const auto is = [&](const char* other) { return name == other; };
#define FA_RUN(kernel, ...) \
  if (is(#kernel)) return run(kernel<Bug>, __VA_ARGS__)
  FA_RUN(missing_barrier, 64);
  FA_RUN(crossed_barriers, 64);
  FA_RUN(missing_arrival, 96);
  FA_RUN(counts_differ, 64);
  FA_RUN(arrives_twice, 64);
  FA_RUN(number_of_barrier, 64);
  FA_RUN(odd_count, 64);
  FA_RUN(count_beyond_block, 64);
  FA_RUN(read_beyond, 64);
  FA_RUN(read_before, 64);
  FA_RUN(vector_beyond, 64);
  FA_RUN(shared_beyond, 64);
  FA_RUN(shared_before, 64);
  FA_RUN(copy_beyond, 64);
  FA_RUN(matrix_beyond, 32);
  FA_RUN(null_place, 64);
  FA_RUN(unwritten_shared, 64);
  FA_RUN(unwritten_global, 64);
  FA_RUN(half_written_matrix, 32);
  FA_RUN(read_after_write, 64);
  FA_RUN(write_after_read, 128);
  FA_RUN(write_after_write, 64);
  FA_RUN(ring, 64);
  FA_RUN(arrival_is_no_wait, 64);
  FA_RUN(chain, 96);
  FA_RUN(within_warp, 32);
  FA_RUN(between_blocks, 32, Grid{2});
  FA_RUN(between_bytes, 32);
  FA_RUN(global_without_barrier, 64);
  FA_RUN(atomic_and_plain, 32, Grid{2});
  FA_RUN(no_commit, 64);
  FA_RUN(no_wait, 64);
  FA_RUN(wait_of_one, 64);
  FA_RUN(store_under_copy, 64);
  FA_RUN(wait_without_barrier, 64);
  FA_RUN(copy_after_read, 64);
  FA_RUN(misaligned_vector, 32);
  FA_RUN(misaligned_pair, 32);
  FA_RUN(misaligned_scalar, 32);
  FA_RUN(misaligned_copy, 32);
  FA_RUN(misaligned_matrix, 32);
  FA_RUN(half_of_a_warp, 32);
  FA_RUN(two_primitives, 32);
  FA_RUN(two_lines, 32);
  FA_RUN(barrier_of_lanes, 64);
  FA_RUN(loop_of_lanes, 32);
  FA_RUN(product_of_lanes, 32);
  FA_RUN(barriers_of_lanes, 64);
#undef FA_RUN
  if (is("write_of_padding")) {
    const int64_t sizes[] = {4, 6}, strides[] = {8, 1};
    Params params = run.params();
    Buffer<float> padded(32);
    params.out = {padded.data(), emulator::give_output(padded.data(), 4, 2, sizes, strides)};
    return launch(write_of_padding<Bug>, run.name, Grid{}, 32, 0, nullptr, params);
  }
  if (is("unwritten_partial")) {
    Params params = run.params();
    launch(first_launch<Bug>, run.name, Grid{}, 64, 0, nullptr, params);
    params.in = run.out.input();
    return launch(second_launch, run.name, Grid{}, 64, 0, nullptr, params);
  }
  // A launch with one wrong number.
  if (is("threads_beyond_bound")) return run(nothing<Bug>, Bug ? 96 : 64);
  if (is("threads_beyond_block")) return run(nothing<Bug>, Bug ? 1056 : 32);
  if (is("threads_odd")) return run(nothing<Bug>, Bug ? 48 : 32);
  if (is("threads_none")) return run(nothing<Bug>, Bug ? 0 : 32);
  if (is("shared_too_large")) return run(nothing<Bug>, 64, {}, Bug ? 227 * 1024 + 1 : 227 * 1024);
  if (is("grid_too_high")) return run(nothing<Bug>, 32, Grid{1, Bug ? 65536 : 1, 1});
  throw std::runtime_error("no program " + name);
}

}  // namespace fastattn

// The report of a program, empty if there is none; valid until the next call.
extern "C" __attribute__((visibility("default"))) const char* run_program(const char* name, int bug,
                                                                          uint64_t seed) {
  static std::string report;
  report.clear();
  fastattn::emulator::set_seed(seed);
  try {
    bug ? fastattn::run_program<true>(name) : fastattn::run_program<false>(name);
  } catch (const std::exception& error) {
    report = error.what();
  }
  return report.c_str();
}
