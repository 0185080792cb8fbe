// Joint operations of the lanes of a warp: shuffles, ballots, ldmatrix, mma.sync.
#include <cstring>

#include "emulator/checks.h"
#include "emulator/counts.h"
#include "emulator/machine.h"
#include "emulator/numbers.h"

namespace fastattn::emulator {

namespace {

struct Exchange {
  uint32_t value, result;
  int source;
};

constexpr Meeting shuffle_meeting = {
    "shuffle", [](Warp& warp) {
      ++counts->shuffles;
      for (void* argument : warp.arguments) {
        auto& lane = *static_cast<Exchange*>(argument);
        lane.result = static_cast<const Exchange*>(warp.arguments[lane.source & 31])->value;
      }
    }};

constexpr Meeting vote_meeting = {
    "ballot", [](Warp& warp) {
      ++counts->shuffles;
      uint32_t result = 0;
      for (int lane = 0; lane < lanes; ++lane) {
        result |= static_cast<const Exchange*>(warp.arguments[lane])->value << lane;
      }
      for (void* argument : warp.arguments) static_cast<Exchange*>(argument)->result = result;
    }};

struct Matrices {
  uint32_t* registers;
  const unsigned char* row;
  bool transposed;
};

constexpr Meeting matrix_meeting = {
    "load_matrices", [](Warp& warp) {
      ++counts->load_matrices;
      uint16_t elements[4][8][8];
      for (int lane = 0; lane < lanes; ++lane) {
        const unsigned char* row = static_cast<const Matrices*>(warp.arguments[lane])->row;
        check_shared_by(warp.index * lanes + lane, row, 16, Access::read, warp.where);
        std::memcpy(elements[lane / 8][lane % 8], row, 16);
      }
      for (int lane = 0; lane < lanes; ++lane) {
        const auto& to = *static_cast<const Matrices*>(warp.arguments[lane]);
        const int row = lane / 4, column = 2 * (lane % 4);
        for (int m = 0; m < 4; ++m) {
          const auto& matrix = elements[m];
          const uint32_t first = to.transposed ? matrix[column][row] : matrix[row][column];
          const uint32_t second = to.transposed ? matrix[column + 1][row] : matrix[row][column + 1];
          to.registers[m] = first | second << 16;
        }
      }
    }};

struct Product {
  float* d;
  const uint32_t *a, *b;
};

// Fragments as in csrc/device/mma.cuh. Products are exact in float32, and are summed in the order
// of k; a tensor core sums them in no documented order.
template <bool bfloat16>
void multiply_warp(Warp& warp) {
  ++counts->mma;
  const auto number = [](uint32_t pair, int half) {
    const auto bits = static_cast<uint16_t>(pair >> 16 * half);
    return bfloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
  };
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < lanes; ++lane) {
    const auto& operands = *static_cast<const Product*>(warp.arguments[lane]);
    const int g = lane / 4, c = 2 * (lane % 4);
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[g + 8 * half][c + i] = number(operands.a[half], i);
        a[g + 8 * half][c + 8 + i] = number(operands.a[2 + half], i);
        b[c + 8 * half + i][g] = number(operands.b[half], i);
        d[g + 8 * half][c + i] = operands.d[2 * half + i];
      }
    }
  }
  using Row = float __attribute__((vector_size(16)));
  for (int i = 0; i < 16; ++i) {
    Row sum[2];
    std::memcpy(sum, d[i], sizeof sum);
    for (int k = 0; k < 16; ++k) {
      Row row[2];
      std::memcpy(row, b[k], sizeof row);
      sum[0] += a[i][k] * row[0];
      sum[1] += a[i][k] * row[1];
    }
    std::memcpy(d[i], sum, sizeof sum);
  }
  for (int lane = 0; lane < lanes; ++lane) {
    float* to = static_cast<const Product*>(warp.arguments[lane])->d;
    const int g = lane / 4, c = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) to[i] = d[g + 8 * (i / 2)][c + i % 2];
  }
}

constexpr Meeting half_meeting = {"mma_16x8x16", multiply_warp<false>};
constexpr Meeting bfloat16_meeting = {"mma_16x8x16", multiply_warp<true>};

}  // namespace

uint32_t exchange(uint32_t value, int source, Where where) {
  Exchange lane = {value, 0, source};
  meet(shuffle_meeting, &lane, where);
  return lane.result;
}

uint32_t vote(bool predicate, Where where) {
  Exchange lane = {predicate, 0, 0};
  meet(vote_meeting, &lane, where);
  return lane.result;
}

void read_matrices(uint32_t (&registers)[4], const void* row, bool transposed, Where where) {
  Matrices lane = {registers, static_cast<const unsigned char*>(row), transposed};
  meet(matrix_meeting, &lane, where);
}

void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16,
              Where where) {
  Product lane = {d, a, b};
  meet(bfloat16 ? bfloat16_meeting : half_meeting, &lane, where);
}

}  // namespace fastattn::emulator
