// out[m][n] = sum over k of x[m][k] * w[n][k] for up to 32 rows of x and weights in 12 bits (bf12.py): of launched.cu, beside products.h.
//
// Weights are widened in registers, each warp a slab of 16 of w's rows, and are the tensor cores' left operand; rows of x are the
// right one, from shared memory. A tile is SLABS slabs, four to a warpgroup, by all rows of x: the last warpgroup's warps without a
// slab multiply zeros. While one stage's products run others are widened: the next one's where registers hold two, else those of
// other warpgroups. Two neighbouring blocks of the grid are a cluster with tiles side by side along w, of which each loads half of x
// for both. The bits are those of products.h where depths are cut alike: the same numbers, multiplied and added up in the same steps
// of 16.
#pragma once
#include "products.h"

namespace {

constexpr int kPackedRows = 32;  // of x: with 64, layers take as long as with weights in 16 bits
constexpr int kSlab = 16, kSlabBytes = 1552, kLaneBytes = 16, kPlane = 32 * kLaneBytes;  // rows; bytes: of a slab's 64 columns, of a lane
constexpr int kCopying = 4;  // warps, one for each four slabs that lie together in memory: a copy takes a warp some 36 ns

template <int SLABS>
struct PackedShape {
  static constexpr int kGroups = (SLABS + 3) / 4, kComputing = 128 * kGroups;
  // So few registers that a warp of settle(), of 88, finds room beside on each quarter of a multiprocessor, which has 512 a lane: three
  // warps of 112, four of 104 or five of 80 are there. Of those five the one that copies gives its own to the others.
  static constexpr bool kMoves = kGroups == 4;
  static constexpr int kThreads = kComputing + 32 * kCopying, kRegisters = kMoves ? 80 : kGroups == 3 ? 104 : 112;
  static constexpr int kHeld = kMoves ? 1 : 2;  // stages whose weights are in registers
  static constexpr int kRowBytes = kPackedRows * kDepth * 2, kSlotBytes = (kRowBytes + SLABS * kSlabBytes + 1023) / 1024 * 1024;
  static constexpr int kFits = (kSharedBytes - int(sizeof(Barriers))) / kSlotBytes, kSlots = kFits < kMostSlots ? kFits : kMostSlots;
  static constexpr int kRingAt = kSlots * kSlotBytes, kBytes = kRingAt + int(sizeof(Barriers));
  static_assert(SLABS % 4 == 0 ? SLABS <= 16 : SLABS <= 14);  // the fours that a warp of those that copy has one of
};

DEVICE int slabs_of(const Product& p, const Tile& tile, int slabs) {
  const int left = p.N / kSlab - tile.column * slabs;
  return left < 0 ? 0 : left < slabs ? left : slabs;
}

// By one thread of each warp that copies: weights, the last one's rows of x too.
template <int SLABS>
DEVICE void copy_packed(const Product& p, char* slots, Barriers& ring, int block, int warp) {
  using S = PackedShape<SLABS>;
  const int rank = block % 2, across = p.K / kDepth;
  const bool rows = warp == kCopying - 1;
  Slot<S::kSlots> turn;
  int asked = 0, ahead = -1;  // blocks of depth; of those, the first whose weights were asked for early
  each_tile<kRows>(p, block, [&](const Tile& tile) {
    const int slabs = slabs_of(p, tile, SLABS), all = tile.column * SLABS, four = all / 4 + warp;
    const int begin = four * 4 < all ? all : four * 4, count = (four * 4 + 4 < all + slabs ? four * 4 + 4 : all + slabs) - begin;
    const char* from = static_cast<const char*>(p.packed) + ((int64_t(four) * across + tile.first) * 4 + begin % 4) * kSlabBytes;
    auto ask_for_weights = [&](int slot, int i, uint64_t* barrier) {
      char* to = slots + slot * S::kSlotBytes + S::kRowBytes + (begin - all) * kSlabBytes;
      if (count > 0) copy_in(to, from + int64_t(i) * 4 * kSlabBytes, count * kSlabBytes, barrier);
    };
    if (ahead < 0) {
      ahead = tile.count < S::kSlots ? tile.count : S::kSlots;
#pragma unroll 1
      for (int i = 0; i < ahead; ++i) {
        if (i >= p.window) wait_for(&ring.first[i - p.window], 0);
        if (rows) expect_bytes(&ring.first[i], slabs * kSlabBytes);
        ask_for_weights(i, i, &ring.first[i]);
      }
      await_launch_before();
      stamp(p.number, kWaited, warp);
    }
#pragma unroll 1
    for (int i = 0; i < tile.count; ++i, ++asked, turn.next()) {
      if (asked >= S::kSlots) wait_for(&ring.read[turn.slot], turn.phase ^ 1);
      uint64_t* there = &ring.there[turn.slot];
      if (rows) {
        expect_bytes(there, S::kRowBytes + (asked < ahead ? 0 : slabs * kSlabBytes));
        copy_to_pair(slots + turn.slot * S::kSlotBytes + rank * (S::kRowBytes / 2), &p.x, (tile.first + i) * kDepth, rank * (kPackedRows / 2), there);
      }
      if (asked >= ahead) ask_for_weights(turn.slot, i, there);
    }
  });
}

// How far the pair of register j lies to the left in its words, and where its signs, mantissas and codes are once turned back. A number is
// put together where it lies: with 112 as what its code is added to, for which a tile's sums make up.
DEVICE constexpr int turn_of(int j) { return j % 2 * 8 + j / 2 * 4; }
constexpr uint32_t kSignMantissa = 0x807f807f, kCodes = 0x07800780, kBase = 0x38003800;
DEVICE constexpr uint32_t turned_left(uint32_t word, int by) { return by ? word << by | word >> (32 - by) : word; }
DEVICE uint32_t turned_right(uint32_t word, int by) { return turned_left(word, (32 - by) % 32); }

DEVICE void take(uint32_t (&numbers)[12], const char* slab, int lane) {
#pragma unroll
  for (int plane = 0; plane < 3; ++plane) {
    const uint4 of = *reinterpret_cast<const uint4*>(slab + plane * kPlane + lane * kLaneBytes);
    numbers[4 * plane] = of.x, numbers[4 * plane + 1] = of.y, numbers[4 * plane + 2] = of.z, numbers[4 * plane + 3] = of.w;
  }
}

// Zeros, and numbers that lie at the slab's end: of few slabs any.
DEVICE void mend(uint32_t (&a)[16], const uint32_t (&numbers)[12], uint32_t flags, const char* slab) {
  const uint16_t* end = reinterpret_cast<const uint16_t*>(slab + 3 * kPlane);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    if (!(flags >> step & 1)) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t codes = turned_right(numbers[8 + step], turn_of(j)), pair = turned_right(numbers[2 * step + j / 2], turn_of(j));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (codes >> (16 * half + 7) & 15) continue;
        const uint32_t bits = pair >> 16 * half & 0x807fu, index = bits & 0x7fu;
        const uint32_t number = index ? end[index] : bits;
        a[4 * step + j] = (a[4 * step + j] & (half ? 0x0000ffffu : 0xffff0000u)) | number << 16 * half;
      }
    }
  }
}

// (value & mask) | others, as one instruction.
#ifdef JAXLLM_EMULATED
DEVICE uint32_t joined(uint32_t value, uint32_t mask, uint32_t others) { return (value & mask) | others; }
#else
DEVICE uint32_t joined(uint32_t value, uint32_t mask, uint32_t others) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(value), "r"(mask), "r"(others));
  return out;
}
#endif

// A lane's part of a slab's 64 columns, four registers for each 16.
DEVICE void widen(uint32_t (&a)[16], const uint32_t (&numbers)[12], const uint32_t (&bases)[4]) {
#pragma unroll
  for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int turn = turn_of(j);
      const uint32_t exponents = joined(numbers[8 + step], turned_left(kCodes, turn), bases[j]);
      a[4 * step + j] = turned_right(joined(numbers[2 * step + j / 2], turned_left(kSignMantissa, turn), exponents), turn);
    }
}

// What numbers of a slab have to be multiplied by: two to the power of what its codes are added to, less 112.
DEVICE float scale_of(const char* slab) {
  const int base = *reinterpret_cast<const uint16_t*>(slab + 3 * kPlane) >> 7;
  return as_float(uint32_t(base + 15) << 23);
}

// A warpgroup's sums to memory, as they are: a lane has two rows of w, and of each eight rows of x two.
DEVICE void end_packed_sums(const Product& p, int split, int first_column, int lane, float scale, const float (&sums)[kPackedRows / 2]) {
  float* to = static_cast<float*>(p.out) + int64_t(split) * p.M * p.N + first_column + lane / 4;
#pragma unroll
  for (int i = 0; i < kPackedRows / 2; ++i) {
    const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < p.M) to[int64_t(row) * p.N + i / 2 % 2 * 8] = times(sums[i], scale);
  }
}

// SwiGLU: a slab's first eight rows are gates, the others their ups. A lane has two rows of x and one column of what comes out; it
// gives its neighbour in the next row of w one of them, and both have two columns.
DEVICE void end_packed_gated(const Product& p, int first_column, int lane, float scale, const float (&sums)[kPackedRows / 2]) {
  const int odd = lane / 4 % 2;
  uint16_t* to = static_cast<uint16_t*>(p.out) + first_column + lane / 4 - odd;
#pragma unroll
  for (int i = 0; i < kPackedRows / 2; i += 4) {
    auto sum = [&](int j) { return times(sums[i + j], scale); };
    const float first = gated(sum(0), sum(2)), second = gated(sum(1), sum(3));
    const float other = shuffle_xor(odd ? first : second, 4);
    const int row = i / 4 * 8 + lane % 4 * 2 + odd;
    if (row < p.M) *reinterpret_cast<uint32_t*>(to + int64_t(row) * (p.N / 2)) = odd ? narrow(other, second) : narrow(first, other);
  }
}

template <int SLABS, int KIND>
DEVICE void compute_packed(const Product& p, const char* slots, Barriers& ring, int block, int thread) {
  using S = PackedShape<SLABS>;
  const int warp = thread / 32, lane = thread % 32;
  Slot<S::kSlots> turn;
  uint32_t bases[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) bases[j] = turned_left(p.base, turn_of(j));
  bool begins = true;
  int left = 0;  // blocks of depth behind the last one released
  each_tile<kRows>(p, block, [&](const Tile& tile) { left += tile.count; });
  each_tile<kRows>(p, block, [&](const Tile& tile) {
    const bool mine = warp < slabs_of(p, tile, SLABS);
    float sums[kPackedRows / 2];
    uint32_t held[S::kHeld][16] = {};
    float scale = 0.f;
    int before = 0;
    auto release = [&] {  // as in products.h
      if (--left >= S::kSlots && lane < 2) arrive_at(&ring.read[before], lane);
    };
    auto stage = [&](int i, uint32_t (&a)[16]) {
      const bool early = begins && i < S::kSlots;  // weights are there before x
      uint64_t* there = &ring.there[turn.slot];
      wait_for(early ? &ring.first[i] : there, early ? 0 : turn.phase);
      const char* x = slots + turn.slot * S::kSlotBytes;
      const char* slab = x + S::kRowBytes + warp * kSlabBytes;
      uint32_t numbers[12], flags = 0;
      if (mine) {
        take(numbers, slab, lane);
        flags = *reinterpret_cast<const uint32_t*>(slab + 3 * kPlane) & 15;
        if (i == 0) scale = scale_of(slab);
      }
      if (S::kHeld == 1) {
        await_products<0>();  // which read what is widened into
        if (i > 0) release();
      }
      if (mine) {
        widen(a, numbers, bases);
        if (flags) mend(a, numbers, flags, slab);
      }
      if (early) wait_for(there, turn.phase);
      if (i == 0) stamp(p.number, kFirst, thread);
      begin_products();
      multiply_held<kPackedRows>(sums, a, x, i > 0);
      end_products();
      if (S::kHeld == 2) {
        await_products<1>();
        if (i > 0) release();
      }
      before = turn.slot, turn.next();
    };
#pragma unroll 1
    for (int i = 0; i < tile.count; i += S::kHeld) {
      stage(i, held[0]);
      if (S::kHeld == 2 && i + 1 < tile.count) stage(i + 1, held[S::kHeld - 1]);
    }
    await_products<0>();
    hold(sums);
    release();
    begins = false;
    stamp(p.number, kLast, thread);
    if (!mine) return;
    const int slab = tile.column * SLABS + warp;
    if constexpr (KIND == kGated)
      end_packed_gated(p, slab * (kSlab / 2), lane, scale, sums);
    else
      end_packed_sums(p, tile.split, slab * kSlab, lane, scale, sums);
  });
}

template <int SLABS, int KIND>
DEVICE void multiply_packed(const Product& p, char* slots, int block, int thread) {
  using S = PackedShape<SLABS>;
  Barriers& ring = *reinterpret_cast<Barriers*>(slots + S::kRingAt);
  if (thread == S::kComputing) {
    for (int i = 0; i < S::kSlots; ++i) init_barrier(&ring.first[i], 1), init_barrier(&ring.there[i], 1), init_barrier(&ring.read[i], S::kGroups * 4 * 2);
    publish_barriers();
  }
  stamp(p.number, kBegun, thread);
  allow_launch_behind();
  meet_cluster();  // barriers are there before others count on them
  if (thread < S::kComputing) {
    if (S::kMoves) take_registers<88>();
    compute_packed<SLABS, KIND>(p, slots, ring, block, thread);
  } else {
    if (S::kMoves) give_registers<24>();
    if (thread % 32 == 0) copy_packed<SLABS>(p, slots, ring, block, (thread - S::kComputing) / 32);
  }
  stamp(p.number, kEnded, thread);
}

#ifdef JAXLLM_EMULATED

template <int SLABS, int KIND>
std::string launch_packed(Stream stream, const Product& p, bool early) {
  using S = PackedShape<SLABS>;
  return play_product<S>(stream, p, early, multiply_packed<SLABS, KIND>);
}

#else

template <int SLABS, int KIND>
__global__ void __maxnreg__((PackedShape<SLABS>::kRegisters)) packed_product(const __grid_constant__ Product p) {
  extern __shared__ __align__(1024) char raw[];
  multiply_packed<SLABS, KIND>(p, raw, int(blockIdx.x), int(threadIdx.x));
}

template <int SLABS, int KIND>
std::string launch_packed(Stream stream, const Product& p, bool early) {
  using S = PackedShape<SLABS>;
  return launch_shaped<S>(stream, p, early, packed_product<SLABS, KIND>);
}

#endif

// `cut.width`: of a tile, rows of w. The widths that cuda.py chooses from.
std::string launch_packed(Stream stream, const Product& p, Kind kind, const Cut& cut, bool early) {
  switch (cut.width * 10 + kind) {
    case 640: return launch_packed<4, kSums>(stream, p, early);
    case 1280: return launch_packed<8, kSums>(stream, p, early);
    case 1920: return launch_packed<12, kSums>(stream, p, early);
    case 1281: return launch_packed<8, kGated>(stream, p, early);
    case 2241: return launch_packed<14, kGated>(stream, p, early);
  }
  return "no tile of packed weights that is " + std::to_string(cut.width) + " wide";
}

// A product's numbers and its tensor map. `N`: of w, so of a gated product twice as many as come out. Host code.
std::string describe_packed(Product& p, const void* x, const void* w, int M, int N, int K, const Cut& cut, Kind kind, int blocks) {
  if (M > kPackedRows) return "more rows than packed weights are multiplied by";
  p.M = M, p.N = N, p.K = K, p.splits = cut.splits, p.window = kMostSlots, p.packed = w, p.base = kBase;
  const int slabs = cut.width / kSlab, tiles = (N / kSlab + slabs - 1) / slabs;
  p.row_tiles = 1, p.run = 1, p.column_tiles = (tiles + 1) / 2;
  const int units = p.column_tiles * cut.splits;
  p.blocks = blocks / 2 < units ? blocks / 2 * 2 : units * 2;
  return map_of(p.x, x, M, K, kPackedRows / 2, false);
}

}  // namespace
