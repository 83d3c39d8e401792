// Products of a tile by the tensor cores of a worker's four warps (mma, keys by queries): 16 keys' scores a warp, then 32 columns of
// the output a warp, with what all four have made of the scores. An instruction has 16 x 8 places, of which a group of queries
// fills up to all; a warpgroup's would have 64 x 64 for the same eight rows, and the card is at its power limit (ADR 49).
#pragma once

namespace {

// A lane has of queries 2t and 2t + 1 the columns 32 * warp + 16i + 8h + g.
struct Sums {
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {}, out[2][2][2] = {};  // [i][h][query]

  template <typename Use>
  DEVICE void each(const Worker& w, Use use) {  // use(query, column, number)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int q = 0; q < 2; ++q) use(q, 32 * w.warp + 16 * i + 8 * h + w.g(), out[i][h][q]);
  }
};

struct Folds {  // of a lane's two queries
  Fold of[2];
  DEVICE Folds(Sums& sums, const Sums& next)
      : of{Fold(sums.most[0], sums.total[0], next.most[0], next.total[0]), Fold(sums.most[1], sums.total[1], next.most[1], next.total[1])} {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int q = 0; q < 2; ++q) sums.out[i][h][q] = of[q](sums.out[i][h][q], next.out[i][h][q]);
  }
};

// Over the eight lanes that have the same queries.
template <typename Join>
DEVICE float over_keys(float value, Join join) {
  for (int mask = 4; mask < 32; mask <<= 1) value = join(value, shuffle_xor(value, mask));
  return value;
}

// 64 keys and values, or the `live` that are left of a row and head, folded into what came before. `queries`: as the first
// product's second operand takes them.
template <typename Feed>
DEVICE void attend(Worker& w, Feed& feed, const uint32_t (&queries)[kHead / 16][2], int live, Sums& sums) {
  const bool enters = w.p.q == nullptr && live <= kTile;
  Between& between = w.s.between;
  char* keys = feed.take();
  if (enters) mend(w, keys, live, true, 0);
  float parts[2][4] = {};  // of even and odd pieces of a head, each a chain of its own
#pragma unroll
  for (int k = 0; k < kHead / 16; ++k) {
    uint32_t a[4];
    load_matrices(a, keys + k / 4 * kPartBytes + swizzled((16 * w.warp + w.lane % 16) * kRowBytes + k % 4 * 32 + w.lane / 16 * 16));
    mma(parts[k % 2], a[0], a[1], a[2], a[3], queries[k][0], queries[k][1]);
  }
  feed.give_back();
  float scores[2][2];  // keys g and g + 8
  Sums next;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const float score = times(parts[0][2 * h + q] + parts[1][2 * h + q], w.p.scale);
      scores[h][q] = 16 * w.warp + 8 * h + w.g() < live ? score : -INFINITY;
    }
#pragma unroll
  for (int q = 0; q < 2; ++q) next.most[q] = over_keys(larger(scores[0][q], scores[1][q]), larger);
  if (w.g() == 0) *reinterpret_cast<float2*>(&between.most[w.warp][2 * w.t()]) = {next.most[0], next.most[1]};
  w.sync();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    const float2 own = *reinterpret_cast<const float2*>(&between.most[warp][2 * w.t()]);
    next.most[0] = larger(next.most[0], own.x), next.most[1] = larger(next.most[1], own.y);
  }
  uint32_t high[2], low[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int q = 0; q < 2; ++q) next.total[q] += scores[h][q] = exp2_(scores[h][q] - next.most[q]);
    const uint32_t pair = narrow(scores[h][0], scores[h][1]);
    high[h] = transposed(pair);
    low[h] = transposed(narrow(scores[h][0] - wide(uint16_t(pair)), scores[h][1] - wide(uint16_t(pair >> 16))));
  }
  between.probabilities[w.warp][w.lane] = uint4{high[0], high[1], low[0], low[1]};
#pragma unroll
  for (int q = 0; q < 2; ++q) next.total[q] = over_keys(next.total[q], [](float a, float b) { return a + b; });
  if (w.g() == 0) *reinterpret_cast<float2*>(&between.total[w.warp][2 * w.t()]) = {next.total[0], next.total[1]};
  char* values = feed.take();
  if (live < kTile || enters) mend(w, values, live, enters, 1);
  w.sync();
  float out[2][2][4] = {};  // of the rounded probabilities and of what rounding took, each a chain of its own
#pragma unroll
  for (int k = 0; k < kWarps; ++k) {
    const uint4 b = between.probabilities[k][w.lane];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = 16 * k + w.lane / 16 * 8 + w.lane % 8, piece = 4 * w.warp + 2 * i + w.lane / 8 % 2;
      uint32_t a[4];
      load_matrices_across(a, values + piece / 8 * kPartBytes + swizzled(key * kRowBytes + piece % 8 * 16));
      mma(out[i][0], a[0], a[1], a[2], a[3], b.x, b.y);
      mma(out[i][1], a[0], a[1], a[2], a[3], b.z, b.w);
    }
  }
  feed.give_back();
  next.total[0] = next.total[1] = 0.f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    const float2 own = *reinterpret_cast<const float2*>(&between.total[warp][2 * w.t()]);
    next.total[0] += own.x, next.total[1] += own.y;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int q = 0; q < 2; ++q) next.out[i][h][q] = out[i][0][2 * h + q] + out[i][1][2 * h + q];
  Folds(sums, next);
}

// The tiles of a segment from where `live` keys of it are left to where no more than `stop` are; all warps.
template <typename Feed>
DEVICE void attend_tiles(Worker& w, Feed& feed, int live, int stop, Sums& sums) {
  uint32_t queries[kHead / 16][2];
  const uint32_t* pairs = reinterpret_cast<const uint32_t*>(w.s.queries[w.turn][w.g()]);
#pragma unroll
  for (int k = 0; k < kHead / 16; ++k)
#pragma unroll
    for (int h = 0; h < 2; ++h) queries[k][h] = w.g() < w.group ? pairs[k * 8 + h * 4 + w.t()] : 0;
#pragma unroll 1
  for (; live > stop; live -= kTile) attend(w, feed, queries, live, sums);
}

DEVICE void store(const Worker& w, float* to, float* stats, int64_t at, Sums& sums) {
  const int64_t place = at * w.group + 2 * w.t();
  sums.each(w, [&](int q, int column, float number) {
    if (2 * w.t() + q < w.group) to[(place + q) * kHead + column] = number;
  });
#pragma unroll
  for (int q = 0; q < 2; ++q)
    if (w.warp == 0 && w.g() == 0 && 2 * w.t() + q < w.group) stats[2 * (place + q)] = sums.most[q], stats[2 * (place + q) + 1] = sums.total[q];
}

// What the run had before this split, if it is not the first, and the split; kept for the next one where a cut run's beginning goes.
DEVICE void fold_split(const Worker& w, int64_t at, bool first, Sums& sums) {
  if (!first) {
    Sums before;
    auto place = [&](int q) { return at * w.group + least(2 * w.t() + q, w.group - 1); };
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const float2 known = load_fresh(reinterpret_cast<const float2*>(w.p.part_stats + 2 * place(q)));
      before.most[q] = known.x, before.total[q] = known.y;
    }
    before.each(w, [&](int q, int column, float& number) { number = load_fresh(w.p.parts + place(q) * kHead + column); });
    Folds(before, sums);
    sums = before;
  }
  w.sync();  // all have read the statistics
  store(w, w.p.parts, w.p.part_stats, at, sums);
  w.sync();
}

DEVICE void write_out(const Worker& w, const Segment& s, Sums& sums) {
  uint32_t* to = reinterpret_cast<uint32_t*>(out_of(w, s, least(w.g(), w.group - 1)));
  const float share[2] = {1.f / sums.total[0], 1.f / sums.total[1]};
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t pair = transposed(narrow(sums.out[i][h][0] * share[0], sums.out[i][h][1] * share[1]));
      if (w.g() < w.group) to[16 * w.warp + 8 * i + 4 * h + w.t()] = pair;
    }
}

}  // namespace
