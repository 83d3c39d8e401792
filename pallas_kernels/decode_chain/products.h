// out[m][n] = sum over k of x[m][k] * w[n][k] for many rows of x, by tiles: of decode_chain.cu and gated_matmul.cu.
//
// A tile is 64, 128 or 192 rows of x by WIDTH of w. Each warpgroup multiplies 64 rows, by itself: while one ends its tile the other goes
// on, up to as many blocks of 64 of k as shared memory holds. One thread asks for blocks, across the ends of tiles. Neighbouring
// blocks of the grid are a cluster: side by side along x, and each loads its part of w for all of them, or along w, and each loads
// its part of x. The depth may be cut into splits, by blocks of one cluster, each of which then ends some columns of the tile with
// what the others put into its shared memory. A tile ends with bias, residual and what the next norm wants, or, where w is gates
// and ups, N rows of each, with SwiGLU: the first half of a tile's columns are gates, the second their ups, so that one thread has
// both. k is summed in one order whatever the tile, so a row's bits do not depend on its company.
//
// An RMS norm lies on both sides of a product: who makes x multiplies it by the norm's weight and leaves sums of squares, a number
// for some columns of a row; the product of that is scaled by the row's root mean square at its end.
//
// Weights depend on no launch before: a first ring of them is asked for before what makes x has ended.
#pragma once
#include "wide_products.h"

#include "maps.h"

namespace {

constexpr int kMostSlots = 10, kSharedBytes = 227 * 1024;

enum Common { kWeights = 0, kRows = 1 };  // what those of a cluster have in common
enum Kind { kEnded = 0, kGated = 1 };

struct Product {
  TileMap x, w;
  uint16_t* out;                // [M, N]
  int M, N, K;                  // kGated: w has 2N rows
  int row_tiles, column_tiles;  // of a cluster: `sharers` tiles of the kind that it does not share
  int run;                      // row tiles whose x stays in the second-level cache while w passes
  int sharers, blocks;
  const float* squares;  // or null: [M, parts], of x before its norm's weight
  int parts;             // a multiple of four
  float eps;
  // Of kEnded, each may be null.
  const uint16_t *bias, *residual, *norm;  // [N], [M, N]: added to the product in bf16, [N]
  uint16_t* normed;                        // [M, N]: out * norm, if there is one
  Peers peers;                             // who have other parts of the sums, and which of the two halves of their memory
  int turn;
  float* out_squares;                      // [M, out_parts, up to a multiple of four]: of `out`, if there is a norm
  int out_parts;
};

template <int WIDTH, int GROUPS, int SPLITS>
struct Shape {
  static constexpr int kTileRows = 64 * GROUPS, kRowBytes = kTileRows * kDepth * 2, kComputing = 128 * GROUPS;
  // The last warp copies. Three warpgroups want registers of it that are taken by fours of warps.
  static constexpr bool kMoves = GROUPS == 3;
  static constexpr int kThreads = kComputing + (kMoves ? 128 : 32);
  static constexpr int kEights = WIDTH / SPLITS / 8;  // groups of eight columns that a block ends
  static constexpr int kRoomBytes = (SPLITS - 1) * kEights * kComputing * 16;  // what others put there
  static constexpr int kSlotBytes = kRowBytes + WIDTH * kDepth * 2;
  struct Barriers {  // behind the slots
    uint64_t there[kMostSlots], read[kMostSlots], put;
  };
  static constexpr int kFits = (kSharedBytes - kRoomBytes - int(sizeof(Barriers))) / kSlotBytes;
  static constexpr int kSlots = kFits < kMostSlots ? kFits : kMostSlots;
  static constexpr int kRoomAt = kSlots * kSlotBytes, kBarriersAt = kRoomAt + kRoomBytes, kBytes = kBarriersAt + int(sizeof(Barriers));
};

struct Member {  // which of its cluster a block is
  int cluster, split, sharer;
};

template <int SPLITS>
DEVICE Member member_of(const Product& p, int block) {
  const int size = p.sharers * SPLITS, rank = block % size;
  return {block / size, rank / p.sharers, rank % p.sharers};
}

struct Tile {
  int row, column, first, count;  // blocks of depth
  int number;                     // of what one block ends, among all
};

// Calls use(tile) for what a block has to do, in order; all its warps go through the same. Runs of row tiles one after the
// other; in a run all of w passes once.
template <int SHARED, int SPLITS, typename Use>
DEVICE void each_tile(const Product& p, const Member& me, Use use) {
  const int all = p.row_tiles * p.column_tiles, clusters = p.blocks / (p.sharers * SPLITS), depth = p.K / kDepth;
  const int from = me.split * depth / SPLITS, count = (me.split + 1) * depth / SPLITS - from;
#pragma unroll 1
  for (int unit = me.cluster; unit < all; unit += clusters) {
    const int run = unit / (p.run * p.column_tiles), inside = unit - run * p.run * p.column_tiles, first = run * p.run;
    const int rows = p.row_tiles - first < p.run ? p.row_tiles - first : p.run;
    const int row = first + inside % rows, column = inside / rows, number = (unit * SPLITS + me.split) * p.sharers + me.sharer;
    if (SHARED == kWeights)
      use(Tile{row * p.sharers + me.sharer, column, from, count, number});
    else
      use(Tile{row, column * p.sharers + me.sharer, from, count, number});
  }
}

template <int WIDTH, int GROUPS, int SHARED, int SPLITS, int KIND>
DEVICE void copy_blocks(const Product& p, char* slots, typename Shape<WIDTH, GROUPS, SPLITS>::Barriers& ring, const Member& me) {
  using S = Shape<WIDTH, GROUPS, SPLITS>;
  constexpr int kHalf = WIDTH / 2, kHalfBytes = kHalf * kDepth * 2;
  const int first_peer = me.split * p.sharers, part = S::kTileRows / p.sharers;
  auto ask_for_weights = [&](const Tile& tile, int slot, int i) {
    const int first = KIND == kGated ? tile.column * kHalf : tile.column * WIDTH, second = KIND == kGated ? p.N + first : first + kHalf;
    const int k = (tile.first + i) * kDepth;
    char* to = slots + slot * S::kSlotBytes + S::kRowBytes;
    expect_bytes(&ring.there[slot], S::kSlotBytes);
    if (SHARED == kWeights) {  // by two
      copy_to_peers(to + me.sharer * kHalfBytes, &p.w, k, me.sharer ? second : first, &ring.there[slot], first_peer, 2);
    } else {
      copy_tile(to, &p.w, k, first, &ring.there[slot]);
      copy_tile(to + kHalfBytes, &p.w, k, second, &ring.there[slot]);
    }
  };
  Slot<S::kSlots> turn;
  int asked = 0, ahead = -1;  // blocks; of those, the first whose weights were asked for early
  each_tile<SHARED, SPLITS>(p, me, [&](const Tile& tile) {
    if (ahead < 0) {
      ahead = tile.count < S::kSlots ? tile.count : S::kSlots;
#pragma unroll 1
      for (int i = 0; i < ahead; ++i) ask_for_weights(tile, i, i);
      await_launch_before();
    }
#pragma unroll 1
    for (int i = 0; i < tile.count; ++i, ++asked, turn.next()) {
      if (asked >= S::kSlots) wait_for(&ring.read[turn.slot], turn.phase ^ 1);
      if (asked >= ahead) ask_for_weights(tile, turn.slot, i);
      uint64_t* there = &ring.there[turn.slot];
      char* to = slots + turn.slot * S::kSlotBytes;
      const int k = (tile.first + i) * kDepth, row = tile.row * S::kTileRows;
      if (SHARED == kWeights)
        copy_kept(to, &p.x, k, row, there);
      else
        copy_to_peers(to + me.sharer * part * kDepth * 2, &p.x, k, row + me.sharer * part, there, first_peer, p.sharers);
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

DEVICE int up_to_four(int count) { return (count + 3) / 4 * 4; }

// To `out`, of four groups of eight columns from `first_column` on, of which there are `left`: pieces of 16 bytes of which four
// lanes have neighbours.
DEVICE void store_eights(const Product& p, uint16_t* out, int row, int first_column, int left, uint32_t (&words)[4], int lane) {
  const int own = lane % 4, column = first_column + own * 8;
  const uint4 piece = one_of_four(words, lane);
  if (row < p.M && own < left && column < p.N) *reinterpret_cast<uint4*>(out + int64_t(row) * p.N + column) = piece;
}

struct Scales {  // of a thread's two rows, eight apart
  float of[2];
};

// One over the root mean square of x. The four lanes that have a row get the same.
DEVICE Scales scales_of(const Product& p, int row, int lane) {
  Scales got;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0.f;
    if (row + half * 8 < p.M) {
      const float4* from = reinterpret_cast<const float4*>(p.squares + int64_t(row + half * 8) * p.parts);
#pragma unroll 8
      for (int i = lane % 4; i < p.parts / 4; i += 4) {
        const float4 v = load_fresh(from + i);
        sum += v.x + v.y + (v.z + v.w);
      }
    }
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    got.of[half] = reciprocal_root(divided(sum, float(p.K)) + p.eps);
  }
  return got;
}

// SwiGLU of a warpgroup's 64 rows to memory.
template <int WIDTH>
DEVICE void end_gated(const Product& p, int row, int first_column, int lane, const Scales& scales, const float (&sums)[WIDTH / 2]) {
  constexpr int kEights = WIDTH / 16;
#pragma unroll
  for (int eights = 0; eights < kEights; eights += 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (eights + i >= kEights) continue;
        const int at = (eights + i) * 4 + half * 2;
        float gate[2] = {sums[at], sums[at + 1]}, up[2] = {sums[WIDTH / 4 + at], sums[WIDTH / 4 + at + 1]};
        if (p.squares != nullptr)
#pragma unroll
          for (int j = 0; j < 2; ++j) gate[j] = times(gate[j], scales.of[half]), up[j] = times(up[j], scales.of[half]);
        words[i] = narrow(gated(gate[0], up[0]), gated(gate[1], up[1]));
      }
      store_eights(p, p.out, row + half * 8, first_column + eights * 8, kEights - eights, words, lane);
    }
  }
}

// What a thread adds to its part of a tile, asked for before the tile's products: two columns of each eight, of two rows.
template <int EIGHTS>
struct Beside {
  uint32_t bias[EIGHTS], norm[EIGHTS], residual[2][EIGHTS];

  DEVICE void load(const Product& p, int row, int column) {
    auto two = [](const uint16_t* from, int64_t at, bool there) {
      return from != nullptr && there ? load_fresh(reinterpret_cast<const uint32_t*>(from + at)) : 0;
    };
#pragma unroll
    for (int i = 0; i < EIGHTS; ++i) {
      const int at = column + i * 8;
      bias[i] = two(p.bias, at, at < p.N), norm[i] = two(p.norm, at, at < p.N);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        residual[half][i] = two(p.residual, int64_t(row + half * 8) * p.N + at, row + half * 8 < p.M && at < p.N);
    }
  }
};

DEVICE float4 plus(const float4& a, const float4& b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
DEVICE float low(uint32_t pair) { return wide(uint16_t(pair)); }
DEVICE float high(uint32_t pair) { return wide(uint16_t(pair >> 16)); }

// Adds what the other devices have of these sums, and sends them its own. What is looked for says itself that it is there; zeros are put
// back for the next time.
template <int EIGHTS, int COMPUTING>
SELDOM void add_peers(const Product& p, int number, int all, int thread, float4 (&own)[EIGHTS]) {
  constexpr int kBatch = 4;  // asked for together
  const Peers& peers = p.peers;
  auto way = [&](int device, int source, int i) {
    return peers.sums[device] + p.turn * peers.half + ((int64_t(source) * all + number) * EIGHTS + i) * COMPUTING + thread;
  };
#pragma unroll 1
  for (int next = 1; next < peers.ranks; ++next)
#pragma unroll
    for (int i = 0; i < EIGHTS; ++i) put_sums(way((peers.rank + next) % peers.ranks, peers.rank, i), own[i]);
#pragma unroll
  for (int first = 0; first < EIGHTS; first += kBatch) {
    float4 totals[kBatch];
#pragma unroll 1
    for (int source = 0; source < peers.ranks; ++source) {
      float4 parts[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (first + i < EIGHTS) parts[i] = source == peers.rank ? own[first + i] : look(way(peers.rank, source, first + i));
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i >= EIGHTS) continue;
        if (source != peers.rank) {
          float4* at = way(peers.rank, source, first + i);
          await_sums(at, parts[i]);
          *at = float4{0.f, 0.f, 0.f, 0.f};
        }
        totals[i] = source ? plus(totals[i], parts[i]) : parts[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (first + i < EIGHTS) own[first + i] = totals[i];
  }
}

// A tile's part of this block, with what the other splits put here, to memory.
template <int WIDTH, int GROUPS, int SPLITS>
DEVICE void end_tile(const Product& p, const Tile& tile, const Member& me, int row, int first_column, int thread, const Scales& scales,
                     const Beside<WIDTH / SPLITS / 8>& beside, float4* room, uint64_t* put, float (&sums)[WIDTH / 2]) {
  using S = Shape<WIDTH, GROUPS, SPLITS>;
  const int lane = thread % 32;
  if (p.squares != nullptr)
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) sums[i] = times(sums[i], scales.of[i / 2 % 2]);
  float4 own[S::kEights];
#pragma unroll
  for (int split = 0; split < SPLITS; ++split)
#pragma unroll
    for (int i = 0; i < S::kEights; ++i) {
      const int at = (split * S::kEights + i) * 4;
      const float4 v = {sums[at], sums[at + 1], sums[at + 2], sums[at + 3]};
      if (split == me.split)
        own[i] = v;
      else
        put_at(room + ((me.split - (me.split > split)) * S::kEights + i) * S::kComputing + thread, v, put, split * p.sharers + me.sharer);
    }
  if (SPLITS > 1) {
    wait_for_peers(put, 0);
#pragma unroll
    for (int i = 0; i < S::kEights; ++i) {
      float4 sum;
#pragma unroll
      for (int split = 0; split < SPLITS; ++split) {
        const float4 v = split == me.split ? own[i] : room[((split - (split > me.split)) * S::kEights + i) * S::kComputing + thread];
        sum = split ? plus(sum, v) : v;
      }
      own[i] = sum;
    }
  }
  if (p.peers.ranks > 1) {
    float4 sent[S::kEights];  // a call takes them from memory
#pragma unroll
    for (int i = 0; i < S::kEights; ++i) sent[i] = own[i];
    add_peers<S::kEights, S::kComputing>(p, tile.number, p.row_tiles * p.column_tiles * p.sharers * SPLITS, thread, sent);
#pragma unroll
    for (int i = 0; i < S::kEights; ++i) own[i] = sent[i];
  }
  float squares[2] = {};
#pragma unroll
  for (int eights = 0; eights < S::kEights; eights += 4) {
    uint32_t out[2][4] = {}, normed[2][4] = {};
#pragma unroll
    for (int i = eights; i < eights + 4; ++i) {
      if (i >= S::kEights) continue;
      const float4& sum = own[i];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t pair = narrow((half ? sum.z : sum.x) + low(beside.bias[i]), (half ? sum.w : sum.y) + high(beside.bias[i]));
        if (p.residual != nullptr)
          pair = narrow(low(pair) + low(beside.residual[half][i]), high(pair) + high(beside.residual[half][i]));
        out[half][i - eights] = pair;
        normed[half][i - eights] = narrow(times(low(pair), low(beside.norm[i])), times(high(pair), high(beside.norm[i])));
        squares[half] += times(low(pair), low(pair)) + times(high(pair), high(pair));
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_eights(p, p.out, row + half * 8, first_column + eights * 8, S::kEights - eights, out[half], lane);
      if (p.norm != nullptr)
        store_eights(p, p.normed, row + half * 8, first_column + eights * 8, S::kEights - eights, normed[half], lane);
    }
  }
  if (p.norm == nullptr) return;
  const int part = tile.column * SPLITS + me.split;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = squares[half];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (lane % 4 || row + half * 8 >= p.M) continue;
    const int pitch = up_to_four(p.out_parts);
    for (int at = part; at < pitch; at += p.out_parts) p.out_squares[int64_t(row + half * 8) * pitch + at] = at == part ? sum : 0.f;
  }
}

template <int WIDTH, int GROUPS, int SHARED, int SPLITS, int KIND>
DEVICE void compute_tiles(const Product& p, char* slots, typename Shape<WIDTH, GROUPS, SPLITS>::Barriers& ring, const Member& me, int thread) {
  using S = Shape<WIDTH, GROUPS, SPLITS>;
  const int group = thread / 128, lane = thread % 32;
  Slot<S::kSlots> turn;
  await_launch_before();
  each_tile<SHARED, SPLITS>(p, me, [&](const Tile& tile) {
    const int row = tile.row * S::kTileRows + group * 64 + thread / 32 % 4 * 16 + lane / 4;
    const int first_column = KIND == kGated ? tile.column * (WIDTH / 2) : tile.column * WIDTH + me.split * (WIDTH / SPLITS);
    Scales scales = {};
    if (p.squares != nullptr) scales = scales_of(p, row, lane);
    Beside<KIND == kGated ? 1 : S::kEights> beside;
    if (KIND == kEnded) beside.load(p, row, first_column + lane % 4 * 2);
    float sums[WIDTH / 2];
    int before = 0;
    auto release = [&] {
      if (lane < p.sharers) arrive_at(&ring.read[before], me.split * p.sharers + lane);
    };
#pragma unroll 1
    for (int i = 0; i < tile.count; ++i, turn.next()) {
      wait_for(&ring.there[turn.slot], turn.phase);
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
    if constexpr (KIND == kGated)
      end_gated<WIDTH>(p, row, first_column, lane, scales, sums);
    else
      end_tile<WIDTH, GROUPS, SPLITS>(p, tile, me, row, first_column, thread, scales, beside, reinterpret_cast<float4*>(slots + S::kRoomAt), &ring.put, sums);
  });
}

template <int WIDTH, int GROUPS, int SHARED, int SPLITS, int KIND>
DEVICE void multiply_all(const Product& p, char* slots, int block, int thread) {
  using S = Shape<WIDTH, GROUPS, SPLITS>;
  auto& ring = *reinterpret_cast<typename S::Barriers*>(slots + S::kBarriersAt);
  const Member me = member_of<SPLITS>(p, block);
  if (thread == S::kComputing) {
    for (int i = 0; i < S::kSlots; ++i) init_barrier(&ring.there[i], 1), init_barrier(&ring.read[i], GROUPS * 4 * p.sharers);
    init_barrier(&ring.put, 1);
    publish_barriers();
    if (SPLITS > 1) expect_bytes(&ring.put, S::kRoomBytes);
  }
  allow_launch_behind();
  meet_cluster();  // barriers are there before others count on them
  if (thread < S::kComputing) {
    if (S::kMoves) take_registers<160>();
    compute_tiles<WIDTH, GROUPS, SHARED, SPLITS, KIND>(p, slots, ring, me, thread);
  } else {
    if (S::kMoves) give_registers<32>();
    if (thread == S::kComputing) copy_blocks<WIDTH, GROUPS, SHARED, SPLITS, KIND>(p, slots, ring, me);
  }
  meet_cluster();  // nobody leaves while another copies to it
}

#ifdef JAXLLM_EMULATED

template <int WIDTH, int GROUPS, int SHARED, int SPLITS, int KIND>
std::string launch_product(Stream stream, const Product& p, bool early) {
  using S = Shape<WIDTH, GROUPS, SPLITS>;
  constexpr size_t words = S::kBytes / 16 + 65;
  auto memory = std::make_shared<std::vector<std::vector<uint4>>>(p.blocks, std::vector<uint4>(words, uint4{~0u, ~0u, ~0u, ~0u}));
  Grid grid = {p.blocks, S::kThreads, S::kComputing};
  for (auto& each : *memory) grid.shared.push_back(reinterpret_cast<void*>((uintptr_t(each.data()) + 1023) / 1024 * 1024));
  grid.body = [p, shared = grid.shared](int block, int thread) {
    multiply_all<WIDTH, GROUPS, SHARED, SPLITS, KIND>(p, static_cast<char*>(shared[block]), block, thread);
  };
  grid.kept = memory, grid.early = early, grid.cluster = p.sharers * SPLITS;
  return play(stream, std::move(grid), unsigned(p.M));
}

#else

template <int WIDTH, int GROUPS, int SHARED, int SPLITS, int KIND>
__global__ void __launch_bounds__(Shape<WIDTH, GROUPS, SPLITS>::kThreads, 1) product(const __grid_constant__ Product p) {
  extern __shared__ __align__(1024) char raw[];
  multiply_all<WIDTH, GROUPS, SHARED, SPLITS, KIND>(p, raw, int(blockIdx.x), int(threadIdx.x));
}

template <int WIDTH, int GROUPS, int SHARED, int SPLITS, int KIND>
std::string launch_product(Stream stream, const Product& p, bool early) {
  using S = Shape<WIDTH, GROUPS, SPLITS>;
  const auto kernel = product<WIDTH, GROUPS, SHARED, SPLITS, KIND>;
  // Of each device by itself, so at each call; only recordings of the step's graph come here.
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return launch_kernel(kernel, p.blocks, S::kThreads, S::kBytes, stream, early, p, p.sharers * SPLITS);
}

#endif

struct Cut {  // how a product is dealt out, as cuda.py chooses
  int width, splits, sharers, shared;
  int clusters;  // that run at one time
};

// A product's numbers and its tensor maps. Host code.
std::string describe(Product& p, const void* x, const void* w, int M, int N, int K, const Cut& cut, int groups, Kind kind, int run) {
  p.M = M, p.N = N, p.K = K, p.sharers = cut.sharers;
  const int tile_rows = 64 * groups, columns = kind == kGated ? cut.width / 2 : cut.width, size = cut.sharers * cut.splits;
  const int row_tiles = (M + tile_rows - 1) / tile_rows, column_tiles = (N + columns - 1) / columns;
  auto of_cluster = [&](int tiles) { return (tiles + cut.sharers - 1) / cut.sharers; };
  p.row_tiles = cut.shared == kRows ? row_tiles : of_cluster(row_tiles);
  p.column_tiles = cut.shared == kWeights ? column_tiles : of_cluster(column_tiles);
  p.out_parts = p.column_tiles * (cut.shared == kRows ? cut.sharers : 1) * cut.splits;
  const int64_t exchanged = int64_t(p.row_tiles) * p.column_tiles * cut.sharers * tile_rows * cut.width * 4;  // bytes
  if (p.peers.ranks > 1 && p.peers.ranks * exchanged > p.peers.half * int64_t(sizeof(float4))) return "the peers' memory is too small";
  p.run = run < p.row_tiles ? run : p.row_tiles;
  const int units = p.row_tiles * p.column_tiles;
  p.blocks = (cut.splits > 1 || units < cut.clusters ? units : cut.clusters) * size;  // of a cluster with splits each ends one tile
  const std::string fault = map_of(p.x, x, M, K, cut.shared == kWeights ? tile_rows : tile_rows / cut.sharers, false);
  return fault.empty() ? map_of(p.w, w, kind == kGated ? 2 * N : N, K, cut.width / 2, false) : fault;
}

}  // namespace
