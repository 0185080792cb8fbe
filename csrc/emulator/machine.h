// The machine: runs a grid, block after block in a seeded order, with a fiber for each thread.
//
// A thread runs until a primitive makes it wait, or gives the others a turn; who goes on then is
// drawn by a seeded generator. Everything repeats under a seed.
//
// Lanes of a warp meet in a `Meeting`: each brings its argument, and the last one to come does the
// work for all. Lanes that come to different meetings, or that ended, are an error at once.
// Barriers are meetings too, after which the whole warp waits.
//
// An error is a report that the launch throws as std::runtime_error; the threads' stacks are
// dropped where they stand, which is right for kernels, whose local variables own nothing.
#pragma once

#include <cstdint>
#include <string>

#include "emulator/where.h"

namespace fastattn::emulator {

constexpr int lanes = 32;
constexpr uint32_t full_mask = 0xffffffffu;
constexpr int max_threads = 1024;
constexpr int max_warps = max_threads / lanes;
constexpr int max_shared = 227 * 1024;  // bytes of a block (sm_90; sm_80 has 163 KB)

// Where the running thread stands.
struct Position {
  int thread = 0, threads = 0;
  int block[3] = {}, grid[3] = {};
};
extern Position position;

struct Warp;
struct Meeting {
  const char* name;
  void (*perform)(Warp&);  // called on the last lane's fiber
};

struct Warp {
  int index = 0;
  uint32_t ready = 0, met = 0, ended = 0;  // masks of lanes
  const Meeting* meeting = nullptr;        // of the lanes in `met`
  Where where = {};
  void* arguments[lanes] = {};
  int barrier = -1;  // at which all lanes wait after their meeting
  // Time: `epoch` counts what orders memory accesses. Accesses of the warp's lanes before the epoch
  // `ordered` come before what its lanes do now, those of warp w up to the epoch `knows[w]`.
  uint32_t epoch = 1, ordered = 0;
  uint32_t knows[max_warps] = {};
};
Warp& warp_of(int thread);

// All lanes of the running thread's warp.
void meet(const Meeting& meeting, void* argument, Where where);

// The value that the lane `source` of the warp gave.
uint32_t exchange(uint32_t value, int source, Where where);
uint32_t vote(bool predicate, Where where);
void sync_lanes(Where where);
void sync_barrier(int barrier, int threads, Where where);
void arrive_barrier(int barrier, int threads, Where where);
void sync_all(Where where);
void read_matrices(uint32_t (&registers)[4], const void* row, bool transposed, Where where);
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16,
              Where where);

// Lets other threads run first, or not.
void take_turns();
uint32_t draw(uint32_t choices);  // a seeded random number below `choices`

// Ends the launch. `what` is the report's title, each of `lines` an entry "name: text".
[[noreturn]] void fail(const std::string& what, const std::string& lines);
[[noreturn]] void fail_access(const std::string& what, int thread, const std::string& lines);
std::string text_of(Where where);
std::string text_of_thread(int thread);

struct Launch {
  const char* name;
  int64_t grid[3];
  int threads, shared;
  int bound;  // of FA_KERNEL, 0 if unknown
  void (*call)(const void* kernel, const void* params);
  const void *kernel, *params;
};
void run(const Launch& launch);
int thread_bound(const void* kernel);

// The machine tells the checks of memory, which define these, how far it is: at the beginning of a
// launch and of a block, and when the lanes of a warp have met or ended.
void memory_begin_launch(int64_t blocks);
void memory_begin_block(int shared_bytes);
void count_accesses(int warp);

void set_seed(uint64_t seed);

enum class Checks { fast, all };  // fast: bounds, alignment, deadlock and divergence only
extern Checks checks;

}  // namespace fastattn::emulator
