// out[m][n] = sum over k of x[m][k] * w[n][k] for many rows of x, by tiles: of decode_chain.cu, launched.cu and gated_matmul.cu.
//
// A tile is 64, 128 or 192 rows of x by WIDTH of w. Each warpgroup multiplies 64 rows, by itself: while one ends its tile the other goes
// on, up to as many blocks of 64 of k as shared memory holds. One thread asks for blocks, across the ends of tiles. Two
// neighbouring blocks of the grid are a cluster: either side by side along x, and each loads half of w for both, or along w, and each
// loads half of x. The depth may be cut into splits, whose sums go to memory in f32. Otherwise w is gates and ups, N rows of each: the
// first half of a tile's columns are gates, the second their ups, so that one thread has both. k is summed in one order whatever
// the tile, so a row's bits do not depend on its company.
//
// Weights depend on no launch before: a first ring of them is asked for before what makes x has ended, `window` slots at a time, as
// what that launch still loads waits behind all that was asked for.
#pragma once
#include "wide_products.h"

#include "maps.h"
#include "stamps.h"

namespace {

constexpr int kMostSlots = 10, kSharedBytes = 226 * 1024;  // the rest: for a block of settle() beside it

enum Common { kWeights = 0, kRows = 1, kOfPacked = 2 };  // what the two of a cluster have in common; kOfPacked: x, by packed_products.h
enum Kind { kSums = 0, kGated = 1 };

struct Product {
  TileMap x, w;
  const void* packed;  // in place of w: packed_products.h
  uint32_t base;       // kBase, from here so that the compiler does not know it: of two known masks it makes an instruction more
  void* out;      // kSums: f32 [splits, M, N]; kGated: bf16 [M, N]
  int M, N, K;    // kGated: w has 2N rows
  int row_tiles, column_tiles;  // of a cluster: two tiles of the kind that it does not share
  int run;        // row tiles whose x stays in the second-level cache while w passes
  int splits, blocks;
  int window;     // slots whose first weights may be on their way at one time
  int number;     // of the launch, for stamps
};

struct Barriers {  // behind the slots
  uint64_t first[kMostSlots];  // a slot's first weights: before what makes x has ended
  uint64_t there[kMostSlots], read[kMostSlots];
};

template <int WIDTH, int GROUPS, int SHARED>
struct Shape {
  static constexpr int kTileRows = 64 * GROUPS, kRowBytes = kTileRows * kDepth * 2, kComputing = 128 * GROUPS;
  // The last warp copies. Registers are taken by fours of warps: those of the last four go to who multiplies where that gives three
  // warpgroups enough, or leaves a block of settle() room beside.
  static constexpr bool kMoves = GROUPS == 3 || (GROUPS == 2 && WIDTH == 224 && SHARED == kRows);
  static constexpr int kThreads = kComputing + (kMoves ? 128 : 32);
  static constexpr int kSlotBytes = kRowBytes + WIDTH * kDepth * 2;
  static constexpr int kFits = (kSharedBytes - int(sizeof(Barriers))) / kSlotBytes, kSlots = kFits < kMostSlots ? kFits : kMostSlots;
  static constexpr int kRingAt = kSlots * kSlotBytes, kBytes = kRingAt + int(sizeof(Barriers));
};

struct Tile {
  int row, column, split, first, count;  // blocks of depth
};

// Calls use(tile) for what a block has to do, in order; all its warps go through the same. Runs of row tiles one after the
// other; in a run all of w passes once.
template <int SHARED, typename Use>
DEVICE void each_tile(const Product& p, int block, Use use) {
  const int all = p.row_tiles * p.column_tiles * p.splits, depth = p.K / kDepth;
#pragma unroll 1
  for (int number = block / 2; number < all; number += p.blocks / 2) {
    const int split = number % p.splits, unit = number / p.splits;
    const int run = unit / (p.run * p.column_tiles), inside = unit - run * p.run * p.column_tiles, first = run * p.run;
    const int rows = p.row_tiles - first < p.run ? p.row_tiles - first : p.run;
    const int row = first + inside % rows, column = inside / rows;
    const int from = split * depth / p.splits, count = (split + 1) * depth / p.splits - from;
    if (SHARED == kWeights)
      use(Tile{row * 2 + block % 2, column, split, from, count});
    else
      use(Tile{row, column * 2 + block % 2, split, from, count});
  }
}

template <int WIDTH, int GROUPS, int SHARED, int KIND>
DEVICE void copy_blocks(const Product& p, char* slots, Barriers& ring, int block) {
  using S = Shape<WIDTH, GROUPS, SHARED>;
  constexpr int kHalf = WIDTH / 2, kHalfBytes = kHalf * kDepth * 2;
  const int rank = block % 2;
  auto ask_for_weights = [&](const Tile& tile, int slot, int i, uint64_t* barrier) {
    const int first = KIND == kGated ? tile.column * kHalf : tile.column * WIDTH, second = KIND == kGated ? p.N + first : first + kHalf;
    const int k = (tile.first + i) * kDepth;
    char* to = slots + slot * S::kSlotBytes + S::kRowBytes;
    if (SHARED == kWeights) {
      copy_to_pair(to + rank * kHalfBytes, &p.w, k, rank ? second : first, barrier);
    } else {
      copy_tile(to, &p.w, k, first, barrier);
      copy_tile(to + kHalfBytes, &p.w, k, second, barrier);
    }
  };
  Slot<S::kSlots> turn;
  int asked = 0, ahead = -1;  // blocks; of those, the first whose weights were asked for early
  each_tile<SHARED>(p, block, [&](const Tile& tile) {
    if (ahead < 0) {
      ahead = tile.count < S::kSlots ? tile.count : S::kSlots;
#pragma unroll 1
      for (int i = 0; i < ahead; ++i) {
        if (i >= p.window) wait_for(&ring.first[i - p.window], 0);
        expect_bytes(&ring.first[i], 2 * kHalfBytes);
        ask_for_weights(tile, i, i, &ring.first[i]);
      }
      await_launch_before();
      stamp(p.number, kWaited, 0);
    }
#pragma unroll 1
    for (int i = 0; i < tile.count; ++i, ++asked, turn.next()) {
      if (asked >= S::kSlots) wait_for(&ring.read[turn.slot], turn.phase ^ 1);
      uint64_t* there = &ring.there[turn.slot];
      expect_bytes(there, asked < ahead ? S::kRowBytes : S::kSlotBytes);
      if (asked >= ahead) ask_for_weights(tile, turn.slot, i, there);
      char* to = slots + turn.slot * S::kSlotBytes;
      const int k = (tile.first + i) * kDepth, row = tile.row * S::kTileRows;
      if (SHARED == kWeights)
        copy_kept(to, &p.x, k, row, there);
      else
        copy_to_pair(to + rank * (S::kRowBytes / 2), &p.x, k, row + rank * (S::kTileRows / 2), there);
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

// SwiGLU of a warpgroup's 64 rows to memory, in pieces of 16 bytes of which four lanes have neighbours.
template <int WIDTH>
DEVICE void end_gated(const Product& p, int first_row, int first_column, int thread, const float (&sums)[WIDTH / 2]) {
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
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out) + int64_t(row + half * 8) * p.N + column) = piece;
    }
  }
}

// A warpgroup's sums to memory, as they are: four lanes have neighbours.
template <int WIDTH>
DEVICE void end_sums(const Product& p, int split, int first_row, int first_column, int thread, const float (&sums)[WIDTH / 2]) {
  const int lane = thread % 32, row = first_row + thread / 32 % 4 * 16 + lane / 4;
  float* to = static_cast<float*>(p.out) + (int64_t(split) * p.M + row) * p.N + first_column + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < WIDTH / 2; i += 4) {
    const int column = i * 2;  // of the tile
    if (first_column + column >= p.N) break;
    if (row < p.M) *reinterpret_cast<float2*>(to + column) = {sums[i], sums[i + 1]};
    if (row + 8 < p.M) *reinterpret_cast<float2*>(to + column + int64_t(8) * p.N) = {sums[i + 2], sums[i + 3]};
  }
}

template <int WIDTH, int GROUPS, int SHARED, int KIND>
DEVICE void compute_tiles(const Product& p, const char* slots, Barriers& ring, int block, int thread) {
  using S = Shape<WIDTH, GROUPS, SHARED>;
  const int group = thread / 128, lane = thread % 32;
  Slot<S::kSlots> turn;
  bool begins = true;
  int left = 0;  // blocks behind the last one released
  each_tile<SHARED>(p, block, [&](const Tile& tile) { left += tile.count; });
  each_tile<SHARED>(p, block, [&](const Tile& tile) {
    float sums[WIDTH / 2];
    int before = 0;
    // Where a block is still to come to the slot, and so waits for this: who tells the other block of the cluster something that nobody
    // waits for may tell it to one that is gone, which is a launch that fails.
    auto release = [&] {
      if (--left >= S::kSlots && lane < 2) arrive_at(&ring.read[before], lane);
    };
#pragma unroll 1
    for (int i = 0; i < tile.count; ++i, turn.next()) {
      if (begins && i < S::kSlots) wait_for(&ring.first[i], 0);
      wait_for(&ring.there[turn.slot], turn.phase);
      if (i == 0) stamp(p.number, kFirst, thread);
      const char* x = slots + turn.slot * S::kSlotBytes + group * 64 * kDepth * 2;
      const char* w = slots + turn.slot * S::kSlotBytes + S::kRowBytes;
      begin_products();
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        if constexpr (S::kMoves && WIDTH > 128) {  // an instruction has fewer registers than the launch
          multiply_wide<WIDTH / 2>(reinterpret_cast<float(&)[WIDTH / 4]>(sums[0]), x + k * 2, w + k * 2, i + k > 0);
          multiply_wide<WIDTH / 2>(reinterpret_cast<float(&)[WIDTH / 4]>(sums[WIDTH / 4]), x + k * 2, w + (WIDTH / 2 * kDepth + k) * 2, i + k > 0);
        } else {
          multiply_wide<WIDTH>(sums, x + k * 2, w + k * 2, i + k > 0);
        }
      }
      end_products();
      await_products<1>();
      if (i > 0) release();
      before = turn.slot;
    }
    await_products<0>();
    hold(sums);
    release();
    begins = false;
    stamp(p.number, kLast, thread);
    const int row = tile.row * S::kTileRows + group * 64;
    if constexpr (KIND == kGated)
      end_gated<WIDTH>(p, row, tile.column * (WIDTH / 2), thread, sums);
    else
      end_sums<WIDTH>(p, tile.split, row, tile.column * WIDTH, thread, sums);
  });
}

template <int WIDTH, int GROUPS, int SHARED, int KIND>
DEVICE void multiply_all(const Product& p, char* slots, int block, int thread) {
  using S = Shape<WIDTH, GROUPS, SHARED>;
  Barriers& ring = *reinterpret_cast<Barriers*>(slots + S::kRingAt);
  if (thread == S::kComputing) {
    for (int i = 0; i < S::kSlots; ++i) init_barrier(&ring.first[i], 1), init_barrier(&ring.there[i], 1), init_barrier(&ring.read[i], GROUPS * 4 * 2);
    publish_barriers();
  }
  stamp(p.number, kBegun, thread);
  allow_launch_behind();
  meet_cluster();  // barriers are there before others count on them
  if (thread < S::kComputing) {
    if (S::kMoves) take_registers<160>();
    compute_tiles<WIDTH, GROUPS, SHARED, KIND>(p, slots, ring, block, thread);
  } else {
    if (S::kMoves) give_registers<32>();
    if (thread == S::kComputing) copy_blocks<WIDTH, GROUPS, SHARED, KIND>(p, slots, ring, block);
  }
  stamp(p.number, kEnded, thread);  // what the other block sends or tells this one has been waited for
}

#ifdef JAXLLM_EMULATED

// S: the shape's numbers of bytes and threads.
template <typename S, typename Body>
std::string play_product(Stream stream, const Product& p, bool early, Body body) {
  constexpr size_t words = S::kBytes / 16 + 65;
  auto memory = std::make_shared<std::vector<std::vector<uint4>>>(p.blocks, std::vector<uint4>(words, uint4{~0u, ~0u, ~0u, ~0u}));
  Grid grid = {p.blocks, S::kThreads, S::kComputing};
  for (auto& each : *memory) grid.shared.push_back(reinterpret_cast<void*>((uintptr_t(each.data()) + 1023) / 1024 * 1024));
  grid.body = [p, body, shared = grid.shared](int block, int thread) { body(p, static_cast<char*>(shared[block]), block, thread); };
  grid.kept = memory, grid.early = early;
  return play(stream, std::move(grid), unsigned(p.M));
}

template <int WIDTH, int GROUPS, int SHARED, int KIND>
std::string launch_product(Stream stream, const Product& p, bool early) {
  return play_product<Shape<WIDTH, GROUPS, SHARED>>(stream, p, early, multiply_all<WIDTH, GROUPS, SHARED, KIND>);
}

#else

template <typename S, typename Kernel>
std::string launch_shaped(Stream stream, const Product& p, bool early, Kernel kernel) {
  // Of each device by itself, so at each call; only recordings of the step's graph come here.
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return launch_kernel(kernel, p.blocks, S::kThreads, S::kBytes, stream, early, p, 2);
}

// No more than beside a block of settle(), which a bound by threads would let be passed.
template <int WIDTH, int GROUPS, int SHARED, int KIND>
__global__ void __maxnreg__((Shape<WIDTH, GROUPS, SHARED>::kMoves ? 128 : 168))
    product(const __grid_constant__ Product p) {
  extern __shared__ __align__(1024) char raw[];
  multiply_all<WIDTH, GROUPS, SHARED, KIND>(p, raw, int(blockIdx.x), int(threadIdx.x));
}

template <int WIDTH, int GROUPS, int SHARED, int KIND>
std::string launch_product(Stream stream, const Product& p, bool early) {
  return launch_shaped<Shape<WIDTH, GROUPS, SHARED>>(stream, p, early, product<WIDTH, GROUPS, SHARED, KIND>);
}

#endif

struct Cut {  // how a product is dealt out, as cuda.py chooses
  int width, splits, shared;
};

// A product's numbers and its tensor maps. Host code.
std::string describe(Product& p, const void* x, const void* w, int M, int N, int K, const Cut& cut, int groups, Kind kind, int run, int blocks) {
  p.M = M, p.N = N, p.K = K, p.splits = cut.splits, p.window = kMostSlots;
  const int tile_rows = 64 * groups, columns = kind == kGated ? cut.width / 2 : cut.width;
  const int row_tiles = (M + tile_rows - 1) / tile_rows, column_tiles = (N + columns - 1) / columns;
  p.row_tiles = cut.shared == kRows ? row_tiles : (row_tiles + 1) / 2;
  p.column_tiles = cut.shared == kWeights ? column_tiles : (column_tiles + 1) / 2;
  p.run = run < p.row_tiles ? run : p.row_tiles;
  const int units = p.row_tiles * p.column_tiles * cut.splits;
  p.blocks = blocks / 2 < units ? blocks / 2 * 2 : units * 2;
  const std::string fault = map_of(p.x, x, M, K, cut.shared == kWeights ? tile_rows : tile_rows / 2, false);
  return fault.empty() ? map_of(p.w, w, kind == kGated ? 2 * N : N, K, cut.width / 2, false) : fault;
}

}  // namespace
