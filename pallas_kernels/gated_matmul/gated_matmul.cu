// out[m][n] = silu(gate) * up, gate and up sums over k of x[m][k] * w[n][k] with rows n and N + n of w, for many rows of x.
//
// A tile is 128 rows of x by WIDTH of w. Each of two warpgroups multiplies 64 rows, by itself: while one ends its tile the
// other goes on, up to as many blocks of 64 of k as shared memory holds. One thread asks for blocks, across the ends of tiles. Two neighbouring
// blocks are a cluster: either side by side along x, and each loads half of w for both, or along w, and each loads half of x. The first
// half of a tile's columns are gates, the second their ups, so that one thread has both. k is summed in one order
// whatever the tile, so a row's bits depend neither on its company nor on how the product is cut up.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "../decode_chain/ends.h"
#include "wide_products.h"

namespace {

constexpr int kGroups = 2, kTileRows = 64 * kGroups, kRowBytes = kTileRows * kDepth * 2;  // of a tile's x. Three groups: too few registers
constexpr int kThreads = 128 * kGroups + 32;  // the last warp copies
constexpr int kMostSlots = 8, kSharedBytes = 227 * 1024;

enum Shared { kWeights = 0, kRows = 1 };  // what the two of a cluster have in common

struct Params {
  TileMap x, w;
  uint16_t* out;  // [M, N]
  int M, N, K;    // w has 2N rows
  int row_tiles, column_tiles;  // of a cluster: two tiles of the kind that it does not share
  int run;  // row tiles whose x stays in the second-level cache while w passes
  int blocks;
};

struct Control {  // behind the slots
  uint64_t there[kMostSlots], read[kMostSlots];
};

template <int WIDTH>
struct Shape {
  static constexpr int kSlotBytes = kRowBytes + WIDTH * kDepth * 2;
  static constexpr int kFits = (kSharedBytes - int(sizeof(Control))) / kSlotBytes, kSlots = kFits < kMostSlots ? kFits : kMostSlots;
  static constexpr int kControlAt = kSlots * kSlotBytes;
};

// Calls use(row tile, column tile) for what a block has to do, in order; all its warps go through the same. Runs of row tiles one after the
// other; in a run all of w passes once.
template <int SHARED, typename Use>
DEVICE void each_tile(const Params& p, int block, Use use) {
  const int all = p.row_tiles * p.column_tiles;
#pragma unroll 1
  for (int unit = block / 2; unit < all; unit += p.blocks / 2) {
    const int run = unit / (p.run * p.column_tiles), inside = unit - run * p.run * p.column_tiles, first = run * p.run;
    const int rows = p.row_tiles - first < p.run ? p.row_tiles - first : p.run;
    const int row = first + inside % rows, column = inside / rows;
    if (SHARED == kWeights)
      use(row * 2 + block % 2, column);
    else
      use(row, column * 2 + block % 2);
  }
}

template <int WIDTH, int SHARED>
DEVICE void copy_blocks(const Params& p, char* slots, Control& control, int block) {
  using S = Shape<WIDTH>;
  constexpr int kHalf = WIDTH / 2, kHalfBytes = kHalf * kDepth * 2;
  const int rank = block % 2, count = p.K / kDepth;
  Slot<S::kSlots> turn;
  int asked = 0;
  each_tile<SHARED>(p, block, [&](int row_tile, int column_tile) {
    const int gate = column_tile * kHalf, up = p.N + gate;
#pragma unroll 1
    for (int i = 0; i < count; ++i, turn.next()) {
      if (asked++ >= S::kSlots) wait_for(&control.read[turn.slot], turn.phase ^ 1);
      uint64_t* there = &control.there[turn.slot];
      expect_bytes(there, S::kSlotBytes);
      char *to = slots + turn.slot * S::kSlotBytes, *weights = to + kRowBytes;
      const int k = i * kDepth, row = row_tile * kTileRows;
      if (SHARED == kWeights) {
        copy_kept(to, &p.x, k, row, there);
        copy_to_pair(weights + rank * kHalfBytes, &p.w, k, rank ? up : gate, there);
      } else {
        copy_to_pair(to + rank * (kRowBytes / 2), &p.x, k, row + rank * (kTileRows / 2), there);
        copy_tile(weights, &p.w, k, gate, there);
        copy_tile(weights + kHalfBytes, &p.w, k, up, there);
      }
    }
  });
}

// Words of four groups of eight columns, of which a lane has its two columns each, turned about: then it has all eight of one.
DEVICE uint4 one_of_four(uint32_t (&words)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = exchanged(odd ? words[i] : words[i + 1], 1);
    (odd ? words[i] : words[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = exchanged(upper ? words[i] : words[i + 2], 2);
    (upper ? words[i] : words[i + 2]) = other;
  }
  return {words[0], words[1], words[2], words[3]};
}

// 64 rows of a tile to memory, in pieces of 16 bytes of which four lanes have neighbours.
template <int WIDTH>
DEVICE void end_tile(const Params& p, int first_row, int first_column, int thread, const float (&sums)[WIDTH / 2]) {
  constexpr int kEights = WIDTH / 16;
  const int lane = thread % 32, row = first_row + thread / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int eights = 0; eights < kEights; eights += 4) {
    const int own = eights + lane % 4, column = first_column + own * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // the row, and the one eight below
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (eights + i >= kEights) continue;
        const int at = (eights + i) * 4 + half * 2;
        words[i] = narrow(gated(sums[at], sums[WIDTH / 4 + at]), gated(sums[at + 1], sums[WIDTH / 4 + at + 1]));
      }
      const uint4 piece = one_of_four(words, lane);
      if (row + half * 8 < p.M && own < kEights && column < p.N)
        *reinterpret_cast<uint4*>(p.out + int64_t(row + half * 8) * p.N + column) = piece;
    }
  }
}

template <int WIDTH, int SHARED>
DEVICE void compute(const Params& p, const char* slots, Control& control, int block, int thread) {
  using S = Shape<WIDTH>;
  const int group = thread / 128, lane = thread % 32, count = p.K / kDepth;
  Slot<S::kSlots> turn;
  each_tile<SHARED>(p, block, [&](int row_tile, int column_tile) {
    float sums[WIDTH / 2];
    int before = 0;
    auto release = [&] {
      if (lane < 2) arrive_at(&control.read[before], lane);
    };
#pragma unroll 1
    for (int i = 0; i < count; ++i, turn.next()) {
      wait_for(&control.there[turn.slot], turn.phase);
      const char* x = slots + turn.slot * S::kSlotBytes + group * 64 * kDepth * 2;
      const char* w = slots + turn.slot * S::kSlotBytes + kRowBytes;
      begin_products();
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) multiply_wide<WIDTH>(sums, x + k * 2, w + k * 2, i + k > 0);
      end_products();
      await_products<1>();
      if (i > 0) release();
      before = turn.slot;
    }
    await_products<0>();
    hold(sums);
    release();
    end_tile<WIDTH>(p, row_tile * kTileRows + group * 64, column_tile * (WIDTH / 2), thread, sums);
  });
}

template <int WIDTH, int SHARED>
DEVICE void multiply_all(const Params& p, char* slots, int block, int thread) {
  using S = Shape<WIDTH>;
  Control& control = *reinterpret_cast<Control*>(slots + S::kControlAt);
  if (thread == 128 * kGroups) {
    for (int i = 0; i < S::kSlots; ++i) init_barrier(&control.there[i], 1), init_barrier(&control.read[i], kGroups * 4 * 2);
    publish_barriers();
  }
  meet_cluster();  // barriers are there before others count on them
  if (thread < 128 * kGroups)
    compute<WIDTH, SHARED>(p, slots, control, block, thread);
  else if (thread == 128 * kGroups)
    copy_blocks<WIDTH, SHARED>(p, slots, control, block);
  meet_cluster();  // nobody leaves while the other copies to it
}

}  // namespace

#include "launch.h"
