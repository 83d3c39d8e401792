// What becomes of a tile's sums in wide.cu, whose tiles are 128 rows of a weight by all rows of x: those of others are added, then
// bias, residual, norm or activation.
#pragma once
#include "../decode_chain/tensor_cores.h"

namespace {

constexpr int kWide = 128, kComputing = 256;  // rows of a tile; threads that multiply, two warpgroups
constexpr int kWeightBytes = kWide * kDepth * 2, kMostSums = 64;  // tiles of a residual stream

enum Kind { kPlain = 0, kResidual = 1, kGated = 2 };

struct Unit {
  int tile, split, first, count;  // this block's tile; blocks of depth
};

// A cluster has two tiles side by side, of a product that may be cut into splits of k.
template <typename Stage>
DEVICE Unit unit_of(const Stage& stage, int block, int number) {
  const int depth = stage.K / kDepth, split = number % stage.splits, first = split * depth / stage.splits;
  return {number / stage.splits * 2 + block % 2, split, first, (split + 1) * depth / stage.splits - first};
}

struct Place {  // of a thread
  int block, thread, warp, group, lane;
  DEVICE Place(int block_, int thread_) : block(block_), thread(thread_), warp(thread_ / 32), group(thread_ / 128), lane(thread_ % 32) {}
  // The same, for a part of the work by itself. Registers that are kept through a loop over tiles lie in memory meanwhile, and
  // reading them again takes a microsecond.
  DEVICE Place again() const { return Place(opaque(block), opaque(thread)); }
};

// What a tile's end is about. `Stage` has N, kind, out and scaled; norm: also write `scaled` and `squares`.
template <typename Stage>
struct EndOf {
  const Stage& stage;
  const uint16_t *bias, *norm, *residual;
  int M;
};

DEVICE float low(uint32_t pair) { return wide(uint16_t(pair)); }
DEVICE float high(uint32_t pair) { return wide(uint16_t(pair >> 16)); }

// A group is eight rows of x. sums = {row 2t, row 2t + 1} of column g of a warp's sixteen, then of column g + 8, where the
// lane is 4g + t; finish() turns that about, so that a lane has two columns of row g.
DEVICE int sixteen_of(const Place& at) { return at.group * 64 + at.warp % 4 * 16; }  // in the block's tile

template <int COUNT>
DEVICE float4 group_of(const float (&products)[COUNT], int group) {
  return {products[group * 4], products[group * 4 + 1], products[group * 4 + 2], products[group * 4 + 3]};
}

DEVICE float4 added(const float4& a, const float4& b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

struct Pairs {  // two columns of row g, of either half of the sixteen
  uint32_t of[2];
};

// What a tile's end wants of its columns, asked for before it waits: of the thread's own, and of those it has after a transposition.
struct Columns {
  float bias[2] = {};
  uint32_t norm[2] = {};
  template <typename Now>
  DEVICE Columns(const Now& now, int tile, const Place& at) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int eight = tile * kWide + sixteen_of(at) + half * 8, own = eight + at.lane / 4, column = eight + at.lane % 4 * 2;
      if (now.bias != nullptr && own < now.stage.N) bias[half] = wide(now.bias[own]);
      if (now.norm != nullptr && column < now.stage.N) norm[half] = *reinterpret_cast<const uint32_t*>(now.norm + column);
    }
  }
};

// What is to be added to a group's sums.
template <typename Now>
DEVICE Pairs residual_of(const Now& now, int tile, const Place& at, int group) {
  Pairs pairs = {};
  if (now.stage.kind != kResidual) return pairs;
  const int row = group * 8 + at.lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = tile * kWide + sixteen_of(at) + half * 8 + at.lane % 4 * 2;
    if (row < now.M && column < now.stage.N)
      pairs.of[half] = load_fresh(reinterpret_cast<const uint32_t*>(now.residual + int64_t(row) * now.stage.N + column));
  }
  return pairs;
}

// Of a gated stage: the first half of the sixteen are gates, the second their ups. `scale` is of x's rows.
template <typename Now>
DEVICE void finish_gated(const Now& now, int tile, const Place& at, const float* scale, int group, float4 sums) {
  const int g = at.lane / 4, t = at.lane % 4, row = group * 8 + g;
  const float first = scale[group * 8 + 2 * t], second = scale[group * 8 + 2 * t + 1];
  const float a = gated(wide(narrow(times(sums.x, first))), wide(narrow(times(sums.z, first))));
  const float b = gated(wide(narrow(times(sums.y, second))), wide(narrow(times(sums.w, second))));
  const uint32_t pair = transposed(narrow(a, b));
  const int column = tile * (kWide / 2) + sixteen_of(at) / 2 + 2 * t;
  if (row < now.M && column < now.stage.N) *reinterpret_cast<uint32_t*>(now.stage.out + int64_t(row) * now.stage.N + column) = pair;
}

// `squares`: of the warp's columns, by row.
template <typename Now>
DEVICE void finish(const Now& now, int tile, const Place& at, float* squares_of_rows, const Columns& columns, const float* scale,
                   int group, float4 sums, Pairs residual) {
  const auto& stage = now.stage;
  if (stage.kind == kGated) return finish_gated(now, tile, at, scale, group, sums);
  const int g = at.lane / 4, t = at.lane % 4, row = group * 8 + g, sixteen = tile * kWide + sixteen_of(at);
  if (scale != nullptr) {
    const float first = scale[group * 8 + 2 * t], second = scale[group * 8 + 2 * t + 1];
    sums = {times(sums.x, first), times(sums.y, second), times(sums.z, first), times(sums.w, second)};
  }
  float squares = 0.f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = sixteen + half * 8 + 2 * t;
    const float bias = columns.bias[half];
    uint32_t pair = transposed(half ? narrow(sums.z + bias, sums.w + bias) : narrow(sums.x + bias, sums.y + bias));
    if (row >= now.M || column >= stage.N) continue;
    const int64_t place = int64_t(row) * stage.N + column;
    if (stage.kind == kResidual) {
      const uint32_t other = residual.of[half];
      pair = narrow(low(pair) + low(other), high(pair) + high(other));
    }
    *reinterpret_cast<uint32_t*>(stage.out + place) = pair;
    if (now.norm == nullptr) continue;
    const uint32_t weight = columns.norm[half];
    *reinterpret_cast<uint32_t*>(stage.scaled + place) = narrow(times(low(pair), low(weight)), times(high(pair), high(weight)));
    squares += times(low(pair), low(pair)) + times(high(pair), high(pair));
  }
  if (now.norm == nullptr) return;
  squares += shuffle_xor(squares, 1);
  squares += shuffle_xor(squares, 2);
  if (t == 0) squares_of_rows[row] = squares;
}

// Sums of all sources, first to last, of up to AT_ONCE groups of rows. This one's own are `sums`; those of the others are awaited
// where from(source, r) says, and zeros put back: a sum itself says that it is there. Eight are asked for at one time.
template <int AT_ONCE, typename From>
DEVICE void add_sources(int sources, int mine, int count, float4 (&sums)[AT_ONCE], From from) {
  constexpr int SOURCES = 8 / AT_ONCE;
  float4 totals[AT_ONCE];
#pragma unroll 1
  for (int first = 0; first < sources; first += SOURCES) {
    float4 parts[SOURCES][AT_ONCE];
    auto each = [&](auto use) {
#pragma unroll
      for (int s = 0; s < SOURCES; ++s)
#pragma unroll
        for (int r = 0; r < AT_ONCE; ++r)
          if (first + s < sources && first + s != mine && r < count) use(parts[s][r], from(first + s, r));
    };
    each([](float4& part, float4* at) { part = look(at); });
    each([](float4& part, float4* at) { await_sums(at, part), *at = float4{0.f, 0.f, 0.f, 0.f}; });
#pragma unroll
    for (int s = 0; s < SOURCES; ++s)
#pragma unroll
      for (int r = 0; r < AT_ONCE; ++r) {
        if (first + s >= sources) break;
        const float4 part = first + s == mine ? sums[r] : parts[s][r];
        float4& total = totals[r];
        total = first + s ? added(total, part) : part;
      }
  }
#pragma unroll
  for (int r = 0; r < AT_ONCE; ++r) sums[r] = totals[r];
}

// All splits' sums of this block's share of the rows. `products`: this block's own. What of them are others' shares goes to them by
// `ways`, memory that is zero; what is its own waits in `kept`, where x was: x of what follows comes when all blocks have ended this.
// (Of a product that is not cut a block may have several tiles, and their x is there; then it waits in that memory.) exchange(place,
// count, sums) adds those of other devices.
template <int T, typename Now, typename Control, typename Exchange>
DEVICE void add_up(const Now& now, const Unit& unit, const Place& at, Control& control, const float* scale, float4* ways, float4* kept,
                   const float (&products)[T / 2], Exchange exchange) {
  constexpr int GROUPS = T / 8, AT_ONCE = T > 64 ? 4 : 2;
  const auto& stage = now.stage;
  const Columns columns(now, unit.tile, at);
  const int begin = unit.split * GROUPS / stage.splits, end = (unit.split + 1) * GROUPS / stage.splits;
  auto way = [&](int split, int group) {
    return ways + ((unit.tile * stage.splits + split) * GROUPS + group) * kComputing + at.thread;
  };
  const bool cut = stage.splits > 1;
  if (!cut) kept = ways + at.block * (GROUPS * kComputing);
  kept += at.thread - begin * kComputing;
  sync_computing();  // all have multiplied, and read the squares of the unit before
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    const float4 four = group_of(products, group);
    if (group >= begin && group < end)
      kept[group * kComputing] = four;
    else
      put_sums(way(unit.split, group), four);
  }
#pragma unroll 1
  for (int group = begin; group < end; group += AT_ONCE) {
    const int count = end - group;
    float4 sums[AT_ONCE];
    Pairs residual[AT_ONCE];
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r) {
      residual[r] = residual_of(now, unit.tile, at, r < count ? group + r : end - 1);
      if (r >= count) continue;
      sums[r] = kept[(group + r) * kComputing];
      if (!cut) kept[(group + r) * kComputing] = float4{0.f, 0.f, 0.f, 0.f};
    }
    add_sources(stage.splits, unit.split, count, sums, [&](int split, int r) { return way(split, group + r); });
    exchange(unit.tile * GROUPS + group, count, sums);
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r)
      if (r < count) finish(now, unit.tile, at, control.squares[at.warp], columns, scale, group + r, sums[r], residual[r]);
  }
  if (now.norm == nullptr) return;
  sync_computing();
  const int m = begin * 8 + at.thread;
  if (m >= end * 8 || m >= now.M) return;
  float sum = 0.f;
  for (int warp = 0; warp < kComputing / 32; ++warp) sum += control.squares[warp][m];
  stage.squares[m * kMostSums + unit.tile] = sum;
}

}  // namespace
