#include "emulator/machine.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "emulator/counts.h"
#include "emulator/fiber.h"

namespace fastattn::emulator {

namespace {

// The threads that have arrived at a barrier of the block since its last release.
struct Barrier {
  int expected = 0, arrived = 0;  // threads; none expected when nobody is there
  uint32_t warps = 0;             // that arrived
  uint32_t waiting = 0;           // of them, those that wait
  uint32_t knows[max_warps] = {};
  Where where = {};
};
constexpr int barriers = 16;

struct Machine {
  std::mutex busy;
  uint64_t seed = 0, launches = 0, random = 1;
  // How threads take turns in this launch: a warp goes on with a chance of `patience` in 16.
  uint32_t patience = 0;

  bool running = false;
  const Launch* launch = nullptr;
  void* host = nullptr;  // the stack of run()
  void* stacks[max_threads] = {};
  Warp warps[max_warps];
  uint32_t warps_ready = 0;
  int alive = 0;
  Barrier barriers[emulator::barriers];
  std::string failure;

  Machine() {
    const char* text = std::getenv("FASTATTN_EMULATOR_SEED");
    seed = text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
  }
} machine;

Checks checks_of_environment() {
  const char* text = std::getenv("FASTATTN_EMULATOR_CHECKS");
  return text != nullptr && std::string(text) == "fast" ? Checks::fast : Checks::all;
}

uint32_t next_random() {
  uint64_t& x = machine.random;  // xorshift64* (Vigna 2016)
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  return static_cast<uint32_t>(x * 0x2545f4914f6cdd1dull >> 32);
}

std::string triple(const int* numbers) {
  return "(" + std::to_string(numbers[0]) + ", " + std::to_string(numbers[1]) + ", " +
         std::to_string(numbers[2]) + ")";
}

std::string text_of_launch() {
  const Launch& launch = *machine.launch;
  return std::string("  kernel: ") + launch.name + ", grid " + std::to_string(launch.grid[0]) +
         " x " + std::to_string(launch.grid[1]) + " x " + std::to_string(launch.grid[2]) +
         ", blocks of " + std::to_string(launch.threads) + " threads, " +
         std::to_string(launch.shared) + " bytes of shared memory\n";
}

std::string text_of_seed() {
  return "  seed: " + std::to_string(machine.seed) + ", launch " +
         std::to_string(machine.launches) + " under it (FASTATTN_EMULATOR_SEED)";
}

std::string text_of_range(int first, int last) {
  return first == last ? std::to_string(first) : std::to_string(first) + "-" + std::to_string(last);
}

// The threads of a block whose bit is set in their warp's mask: "threads 0-31, 64".
template <class Mask>
std::string text_of_threads(Mask mask_of_warp) {
  std::string text = "threads ";
  int first = -1;
  const int threads = machine.launch->threads;
  for (int thread = 0; thread <= threads; ++thread) {
    const bool in = thread < threads &&
                    (mask_of_warp(machine.warps[thread / lanes]) >> thread % lanes & 1) != 0;
    if (in && first < 0) first = thread;
    if (!in && first >= 0) {
      if (text.back() != ' ') text += ", ";
      text += text_of_range(first, thread - 1);
      first = -1;
    }
  }
  return text;
}

// One line for each group of threads that wait at the same place, and one for those that ended.
std::string text_of_waits() {
  std::map<std::string, std::vector<uint32_t>> groups;
  const int warps = machine.launch->threads / lanes;
  const auto add = [&](const std::string& place, int warp, uint32_t mask) {
    auto& group = groups[place];
    group.resize(max_warps);
    group[static_cast<size_t>(warp)] |= mask;
  };
  for (int w = 0; w < warps; ++w) {
    const Warp& warp = machine.warps[w];
    if (warp.met != 0) {
      add(std::string("at ") + warp.meeting->name + ", " + text_of(warp.where), w, warp.met);
    }
    if (warp.barrier >= 0) {
      const Barrier& barrier = machine.barriers[warp.barrier];
      add((warp.barrier == 0 ? std::string("at sync_block")
                             : "at named barrier " + std::to_string(warp.barrier)) +
              " (" + std::to_string(barrier.arrived) + " of " + std::to_string(barrier.expected) +
              " threads arrived), " + text_of(warp.where),
          w, full_mask);
    }
    if (warp.ended != 0) add("ended", w, warp.ended);
    if (warp.ready != 0) add("can run", w, warp.ready);
  }
  std::string text = "  block: " + triple(position.block) + "\n";
  for (const auto& [place, masks] : groups) {
    const auto mask = [&](const Warp& warp) { return masks[static_cast<size_t>(warp.index)]; };
    text += "  " + text_of_threads(mask) + ": " + place + "\n";
  }
  return text;
}

[[noreturn]] void leave_block() {
  void* dropped;
  fastattn_switch_stack(&dropped, machine.host);
  __builtin_unreachable();
}

int pick_in(uint32_t mask) {  // one of its bits
  const uint32_t turn = next_random() >> 27;
  const uint32_t turned = mask >> turn | mask << (-turn & 31);
  return static_cast<int>((static_cast<uint32_t>(__builtin_ctz(turned)) + turn) & 31);
}

// The thread that runs next, -1 if none can.
int pick_thread() {
  if (machine.warps_ready == 0) return -1;
  int warp = position.thread / lanes;
  const bool stays = machine.warps_ready >> warp & 1 && (next_random() >> 28) < machine.patience;
  if (!stays) warp = pick_in(machine.warps_ready);
  return warp * lanes + pick_in(machine.warps[warp].ready);
}

void switch_to(int thread) {
  const int before = position.thread;
  if (thread == before) return;
  position.thread = thread;
  fastattn_switch_stack(&machine.stacks[before], machine.stacks[thread]);
}

// The running thread waits, or ended: another one goes on.
void leave_thread() {
  const int next = pick_thread();
  if (next < 0) fail("deadlock: no thread of the block can run", text_of_waits());
  switch_to(next);
}

void set_ready(Warp& warp, uint32_t ready) {
  warp.ready = ready;
  const uint32_t bit = 1u << warp.index;
  machine.warps_ready = ready != 0 ? machine.warps_ready | bit : machine.warps_ready & ~bit;
}

[[noreturn]] void fail_divergence(const Warp& warp, const std::string& what) {
  fail("divergence: " + what,
       "  thread: " + text_of_thread(position.thread) + "\n" +
           (warp.met != 0 ? std::string("  other lanes: wait at ") + warp.meeting->name + ", " +
                                text_of(warp.where) + "\n"
                          : std::string()) +
           text_of_waits());
}

void thread_main() {
  machine.launch->call(machine.launch->kernel, machine.launch->params);
  Warp& warp = warp_of(position.thread);
  warp.ended |= 1u << position.thread % lanes;
  if (warp.met != 0) fail_divergence(warp, "a thread ends while lanes of its warp wait for it");
  set_ready(warp, warp.ready & ~(1u << position.thread % lanes));
  if (warp.ended == full_mask) count_accesses(warp.index);
  if (--machine.alive == 0) leave_block();
  leave_thread();
}

// --- what orders memory: barriers ---

void join(uint32_t (&knowledge)[max_warps], const uint32_t (&other)[max_warps]) {
  for (int w = 0; w < max_warps; ++w) {
    if (other[w] > knowledge[w]) knowledge[w] = other[w];
  }
}

// All that the lanes did so far comes before all that they do from now on.
void order_lanes(Warp& warp) { warp.ordered = ++warp.epoch; }

struct Arrival {
  int barrier, threads;
  bool waits;
};

void arrive(Warp& warp) {
  const Arrival& arrival = *static_cast<const Arrival*>(warp.arguments[0]);
  const auto fail_here = [&](const std::string& what, const std::string& more = "") {
    fail(what, "  thread: " + text_of_thread(warp.index * lanes) + " and its warp\n  where: " +
                   text_of(warp.where) + "\n" + more);
  };
  const int limit = machine.launch->threads;
  for (const void* argument : warp.arguments) {
    const Arrival& other = *static_cast<const Arrival*>(argument);
    if (other.barrier != arrival.barrier || other.threads != arrival.threads) {
      fail_here("divergence: lanes of a warp name different barriers or thread counts");
    }
  }
  const int number = arrival.barrier;
  Barrier& barrier = machine.barriers[number];
  const auto name = [&] { return "named barrier " + std::to_string(number); };
  if (barrier.arrived == 0) {
    barrier.expected = arrival.threads;
    barrier.where = warp.where;
  }
  if (barrier.expected != arrival.threads) {
    fail_here(name() + ": thread counts differ, " + std::to_string(arrival.threads) +
                  " here and " + std::to_string(barrier.expected) + " of those who came first",
              "  first: " + text_of(barrier.where) + "\n");
  }
  if (arrival.threads > limit) {
    fail_here(name() + ": waits for " + std::to_string(arrival.threads) +
              " threads, the block has " + std::to_string(limit));
  }
  if (barrier.warps >> warp.index & 1) {
    fail_here(name() + ": a warp arrives twice before the barrier is complete");
  }
  barrier.arrived += lanes;
  barrier.warps |= 1u << warp.index;
  warp.knows[warp.index] = warp.epoch++;  // what it did so far, others may know from here
  join(barrier.knows, warp.knows);
  if (arrival.waits) {
    barrier.waiting |= 1u << warp.index;
    warp.barrier = number;
    set_ready(warp, 0);
  }
  if (barrier.arrived < barrier.expected) return;
  for (int w = 0; w < max_warps; ++w) {
    if (!(barrier.waiting >> w & 1)) continue;
    Warp& released = machine.warps[w];
    join(released.knows, barrier.knows);
    order_lanes(released);
    released.barrier = -1;
    set_ready(released, full_mask);
  }
  barrier = {};
}

void check_barrier(int barrier, int threads, Where where) {
  if (barrier >= 1 && barrier < barriers && threads > 0 && threads % lanes == 0) return;
  fail_access("named barrier " + std::to_string(barrier) + " with " + std::to_string(threads) +
                  " threads: barriers have the numbers 1 to 15, and a multiple of 32 threads",
              position.thread, "  where: " + text_of(where) + "\n");
}

constexpr Meeting warp_meeting = {"sync_warp", [](Warp& warp) {
                                    ++counts->warp_syncs;
                                    order_lanes(warp);
                                  }};

constexpr Meeting block_meeting = {"sync_block", [](Warp& warp) {
                                     ++counts->block_syncs;
                                     arrive(warp);
                                   }};
constexpr Meeting sync_meeting = {"sync_named", [](Warp& warp) {
                                    ++counts->named_syncs;
                                    arrive(warp);
                                  }};
constexpr Meeting arrive_meeting = {"arrive_named", [](Warp& warp) {
                                      ++counts->named_arrivals;
                                      arrive(warp);
                                    }};

void run_block(const Launch& launch, int64_t number) {
  position.block[0] = static_cast<int>(number % launch.grid[0]);
  position.block[1] = static_cast<int>(number / launch.grid[0] % launch.grid[1]);
  position.block[2] = static_cast<int>(number / launch.grid[0] / launch.grid[1]);
  memory_begin_block(launch.shared);
  ++counts->blocks;
  const int warps = launch.threads / lanes;
  for (int w = 0; w < warps; ++w) {
    machine.warps[w] = Warp();
    machine.warps[w].index = w;
    machine.warps[w].ready = full_mask;
  }
  machine.warps_ready = full_mask >> (max_warps - warps);
  for (Barrier& barrier : machine.barriers) barrier = {};
  for (int thread = 0; thread < launch.threads; ++thread) {
    machine.stacks[thread] = prepare_stack(stack_top(thread), thread_main);
  }
  machine.alive = launch.threads;
  position.thread = 0;
  position.thread = pick_thread();
  fastattn_switch_stack(&machine.host, machine.stacks[position.thread]);
}

void check_launch(const Launch& launch) {
  const auto refuse = [](const std::string& why) { fail("illegal launch: " + why, ""); };
  if (launch.threads <= 0 || launch.threads > max_threads || launch.threads % lanes != 0) {
    refuse("a block has 32, 64, ... 1024 threads, not " + std::to_string(launch.threads));
  }
  if (launch.bound != 0 && launch.threads > launch.bound) {
    refuse(std::to_string(launch.threads) + " threads, the kernel's bound (FA_KERNEL) is " +
           std::to_string(launch.bound));
  }
  if (launch.shared < 0 || launch.shared > max_shared) {
    refuse(std::to_string(launch.shared) + " bytes of shared memory, a block has at most " +
           std::to_string(max_shared));
  }
  constexpr int64_t limits[] = {0x7fffffff, 65535, 65535};
  for (int axis = 0; axis < 3; ++axis) {
    if (launch.grid[axis] < 0 || launch.grid[axis] > limits[axis]) {
      refuse(std::string("grid ") + "xyz"[axis] + " is " + std::to_string(launch.grid[axis]) +
             ", at most " + std::to_string(limits[axis]) + " is possible");
    }
  }
}

}  // namespace

Position position;
Checks checks = checks_of_environment();

Warp& warp_of(int thread) { return machine.warps[thread / lanes]; }

uint32_t draw(uint32_t choices) {
  return static_cast<uint32_t>(static_cast<uint64_t>(next_random()) * choices >> 32);
}

void take_turns() {
  if (draw(2) == 0) switch_to(pick_thread());
}

void meet(const Meeting& meeting, void* argument, Where where) {
  if (!machine.running) throw std::runtime_error("fastattn emulator: no kernel runs");
  Warp& warp = warp_of(position.thread);
  const int lane = position.thread % lanes;
  if (warp.met == 0) {
    warp.meeting = &meeting;
    warp.where = where;
  } else if (warp.meeting != &meeting || !(warp.where == where)) {
    fail_divergence(warp, std::string("lanes of a warp reach different primitives: ") +
                              meeting.name + ", " + text_of(where));
  }
  if (warp.ended != 0) {
    fail_divergence(warp, std::string(meeting.name) + " in a warp some of whose lanes ended, " +
                              text_of(where));
  }
  warp.arguments[lane] = argument;
  warp.met |= 1u << lane;
  if (warp.met == full_mask) {
    warp.met = 0;
    set_ready(warp, full_mask);
    count_accesses(warp.index);
    meeting.perform(warp);
  } else {
    set_ready(warp, warp.ready & ~(1u << lane));
  }
  leave_thread();
}

void sync_lanes(Where where) { meet(warp_meeting, nullptr, where); }

void sync_all(Where where) {
  Arrival arrival = {0, position.threads, true};
  meet(block_meeting, &arrival, where);
}

void sync_barrier(int barrier, int threads, Where where) {
  check_barrier(barrier, threads, where);
  Arrival arrival = {barrier, threads, true};
  meet(sync_meeting, &arrival, where);
}

void arrive_barrier(int barrier, int threads, Where where) {
  check_barrier(barrier, threads, where);
  Arrival arrival = {barrier, threads, false};
  meet(arrive_meeting, &arrival, where);
}

std::string text_of(Where where) {
  std::string file = where.file;
  const size_t root = file.rfind("csrc/");
  if (root != std::string::npos) file = file.substr(root);
  return file + ":" + std::to_string(where.line);
}

std::string text_of_thread(int thread) {
  return std::to_string(thread) + " (warp " + std::to_string(thread / lanes) + ", lane " +
         std::to_string(thread % lanes) + ") of block " + triple(position.block);
}

void fail(const std::string& what, const std::string& lines) {
  std::string text = "fastattn emulator: " + what + "\n";
  if (machine.launch != nullptr) text += text_of_launch();
  text += lines + text_of_seed();
  if (!machine.running) throw std::runtime_error(text);
  machine.failure = std::move(text);
  leave_block();
}

void fail_access(const std::string& what, int thread, const std::string& lines) {
  fail(what, "  thread: " + text_of_thread(thread) + "\n" + lines);
}

void set_seed(uint64_t seed) {
  machine.seed = seed;
  machine.launches = 0;
}

int thread_bound(const void* kernel) {
  const auto* code = static_cast<const unsigned char*>(kernel);
#if defined(__x86_64__)
  constexpr unsigned char nop[] = {0x90}, landing[] = {0xf3, 0x0f, 0x1e, 0xfa};  // endbr64
#else
  constexpr unsigned char nop[] = {0x1f, 0x20, 0x03, 0xd5}, landing[] = {0x5f, 0x24, 0x03, 0xd5};
#endif
  if (std::memcmp(code, landing, sizeof landing) == 0) code += sizeof landing;
  int bound = 0;
  for (; std::memcmp(code, nop, sizeof nop) == 0; code += sizeof nop) bound += lanes;
  return bound;
}

void run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(machine.busy);
  struct Running {
    explicit Running(const Launch& launch) { machine.launch = &launch; }
    ~Running() {
      machine.running = false;
      machine.launch = nullptr;
    }
  } running(launch);
  ++machine.launches;
  check_launch(launch);
  // Seeds and launches that follow each other get unrelated numbers (splitmix64).
  machine.random = (machine.seed * 0x9e3779b97f4a7c15ull) ^ (machine.launches << 32);
  machine.random = (machine.random ^ machine.random >> 30) * 0xbf58476d1ce4e5b9ull + 1;
  for (int i = 0; i < 8; ++i) next_random();
  constexpr uint32_t patiences[] = {0, 8, 15, 16};
  machine.patience = patiences[draw(4)];
  counts = &all_counts[launch.name];
  ++counts->launches;
  counts->threads = static_cast<uint64_t>(launch.threads);
  counts->shared_bytes = static_cast<uint64_t>(launch.shared);
  position.threads = launch.threads;
  for (int axis = 0; axis < 3; ++axis) position.grid[axis] = static_cast<int>(launch.grid[axis]);
  const int64_t blocks = launch.grid[0] * launch.grid[1] * launch.grid[2];
  memory_begin_launch(blocks);
  machine.failure.clear();
  machine.running = true;
  // Blocks in steps that have no divisor in common with their number, from anywhere.
  int64_t step = draw(static_cast<uint32_t>(blocks < 0x7fffffff ? blocks : 0x7fffffff));
  while (std::gcd(step, blocks) != 1) ++step;
  int64_t block = draw(static_cast<uint32_t>(blocks < 0x7fffffff ? blocks : 0x7fffffff));
  for (int64_t i = 0; i < blocks && machine.failure.empty(); ++i) {
    run_block(launch, block);
    block = (block + step) % blocks;
  }
  if (!machine.failure.empty()) throw std::runtime_error(machine.failure);
}

}  // namespace fastattn::emulator
