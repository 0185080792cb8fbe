// Memory under supervision: bounds, alignment, first writes, races, late copies, bank conflicts.
//
// For every byte of shared memory, and of global memory that a launcher gave as an output, a shadow
// knows whether it was written, and by which thread, at which line and in which epoch it was last
// written and read. Two accesses to a byte, one of them a write, race if neither is known to come
// before the other. What orders them (see Warp in machine.h):
//   - sync_block, sync_named and arrive_named: what a warp did before it arrives comes before what
//     the warps that wait for the barrier do after it, and so on from warp to warp;
//   - sync_warp, for the lanes of a warp;
//   - nothing else. PTX promises no order of memory for shuffles, ballots, ldmatrix and mma.sync,
//     though they make lanes wait. Blocks of one launch are never ordered, launches always.
// Two atomic accesses do not race. Of a byte's readers since its last write two are remembered,
// beyond those in one warp's epoch; which ones is drawn by the seed.
#pragma once

#include <cstdint>

#include "emulator/region.h"
#include "emulator/where.h"

namespace fastattn::emulator {

enum class Access { read, write, atomic };

// Called before the access itself. They return only if it is right.
void check_global(const Region* region, const void* at, int bytes, Access access, Where where);
void check_shared(const void* at, int bytes, Access access, Where where);
// The same for another thread's part of a warp's common access.
void check_shared_by(int thread, const void* at, int bytes, Access access, Where where);

// cp.async: the bytes of `to` arrive at the wait that covers them, and are nobody's until then.
void begin_copy(void* to, const Region* region, const void* from, bool valid, Where where);
void commit_copies();
void wait_copies(int pending);

unsigned char* shared_base();

// Memory that is given to kernels, until the outermost scope of this thread ends. A tensor has the
// `sizes` and `strides` (in elements) of its dimensions. Bytes of an output count as unwritten
// until a kernel writes them, unless the same tensor was given before in this scope.
const Region* give_input(const void* data, int element, int dims, const int64_t* sizes,
                         const int64_t* strides);
const Region* give_output(void* data, int element, int dims, const int64_t* sizes,
                          const int64_t* strides);
struct Scope {
  Scope();
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
};

// The lanes' actions since their warp last met; count_accesses makes Counts of it.
void note_access(int thread, const void* at, int bytes, bool shared, Where where);
void forget_accesses();

}  // namespace fastattn::emulator
