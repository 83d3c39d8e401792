// Products of a tile by the warpgroup's tensor cores (WGMMA): of the 64 rows that these instructions have eight of one warp's
// sixteen are a group's queries, so that warp alone has anything to exponentiate or to fold, and none waits for another. In its
// other eight rows stands what rounding took from the probabilities: they have 16 bits together.
#pragma once

namespace {

constexpr bool kAllHold = false;  // sums: the warp that leads does

// Of a group's queries, in the warp that leads. A lane has of query g the columns 8n + 2t and the one behind it.
struct Sums {
  float most = -INFINITY, total = 0.f, out[kHead / 8][2] = {};
};

// This lane's queries, as the products take them; other warps than the one that leads have none.
DEVICE void load_queries(const Worker& w, uint32_t (&queries)[kHead / 16][4]) {
  const uint32_t* pairs = reinterpret_cast<const uint32_t*>(w.s.queries[w.turn][w.g()]);
  const bool there = w.leads() && w.g() < w.group;
#pragma unroll
  for (int k = 0; k < kHead / 16; ++k) {
    queries[k][0] = there ? pairs[k * 8 + w.t()] : 0, queries[k][2] = there ? pairs[k * 8 + 4 + w.t()] : 0;
    queries[k][1] = queries[k][3] = 0;
  }
}

DEVICE void fold(Sums& sums, const Sums& next) {
  const Fold both(sums.most, sums.total, next.most, next.total);
#pragma unroll
  for (int n = 0; n < kHead / 8; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) sums.out[n][h] = both(sums.out[n][h], next.out[n][h]);
}

// Scores of row g to probabilities, as the second product takes them: rounded, and in the rows behind what is then missing.
DEVICE void exponentials(const Worker& w, int live, float scale, const float (&scores)[kTile / 2], uint32_t (&probabilities)[kTile / 16][4],
                         float& most, float& total) {
  float own[kTile / 8][2];
#pragma unroll
  for (int j = 0; j < kTile / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      own[j][h] = 8 * j + 2 * w.t() + h < live ? times(scores[4 * j + h], scale) : -INFINITY;
      most = larger(most, own[j][h]);
    }
  for (int mask = 1; mask < 4; mask <<= 1) most = larger(most, shuffle_xor(most, mask));
#pragma unroll
  for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) total += own[j][h] = exp2_(own[j][h] - most);
    const uint32_t high = narrow(own[j][0], own[j][1]);
    probabilities[j / 2][j % 2 * 2] = high;
    probabilities[j / 2][j % 2 * 2 + 1] = narrow(own[j][0] - wide(uint16_t(high)), own[j][1] - wide(uint16_t(high >> 16)));
  }
  for (int mask = 1; mask < 4; mask <<= 1) total += shuffle_xor(total, mask);
}

// 64 keys and values, or the `live` that are left of a row and head, folded into what came before.
template <typename Feed>
DEVICE void attend(Worker& w, Feed& feed, int live, Sums& sums) {
  const bool enters = w.p.q == nullptr && live <= kTile;
  uint32_t queries[kHead / 16][4];
  load_queries(w, queries);
  char* keys = feed.take();
  if (enters) mend(w, keys, live, true, 0);
  float scores[kTile / 2];
  begin_products();
#pragma unroll
  for (int k = 0; k < kHead / 16; ++k) {
    const char* from = keys + k / 4 * kPartBytes + k % 4 * 32;
    if (k == 0)
      multiply_held<kTile, false>(scores, queries[k], from);
    else
      multiply_held<kTile, true>(scores, queries[k], from);
  }
  end_products();
  await_products<0>();
  feed.give_back();
  uint32_t probabilities[kTile / 16][4] = {};
  float most = -INFINITY, total = 0.f;
  if (w.leads()) exponentials(w, live, w.p.scale, scores, probabilities, most, total);
  char* values = feed.take();
  if (live < kTile || enters) mend(w, values, live, enters, 1);
  float out[kHead / 2];
  begin_products();
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k) {
    const char* from = values + k * 16 * kRowBytes;
    if (k == 0)
      multiply_across<kHead, kPartBytes, false>(out, probabilities[k], from);
    else
      multiply_across<kHead, kPartBytes, true>(out, probabilities[k], from);
  }
  end_products();
  await_products<0>();
  feed.give_back();
  if (!w.leads()) return;
  const Fold both(sums.most, sums.total, most, total);
#pragma unroll
  for (int n = 0; n < kHead / 8; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) sums.out[n][h] = both(sums.out[n][h], out[4 * n + h] + out[4 * n + 2 + h]);
}

// The tiles of a segment from where `live` keys of it are left to where no more than `stop` are; all warps, with sums in the one that leads.
template <typename Feed>
DEVICE void attend_tiles(Worker& w, Feed& feed, int live, int stop, Sums& sums) {
#pragma unroll 1
  for (; live > stop; live -= kTile) attend(w, feed, live, sums);
}

DEVICE void store(const Worker& w, float* to, float* stats, int64_t at, const Sums& sums) {
  if (!w.leads() || w.g() >= w.group) return;
  to += (at * w.group + w.g()) * kHead + 2 * w.t(), stats += (at * w.group + w.g()) * 2;
  if (w.t() == 0) stats[0] = sums.most, stats[1] = sums.total;
#pragma unroll
  for (int n = 0; n < kHead / 8; ++n) *reinterpret_cast<float2*>(to + 8 * n) = {sums.out[n][0], sums.out[n][1]};
}

// What the run had before this split, if it is not the first, and the split; kept for the next one where a cut run's beginning goes.
DEVICE void fold_split(const Worker& w, int64_t at, bool first, Sums& sums) {
  if (!first) {
    const int query = least(w.g(), w.group - 1);
    const float* from = w.p.parts + (at * w.group + query) * kHead + 2 * w.t();
    const float2 known = load_fresh(reinterpret_cast<const float2*>(w.p.part_stats + (at * w.group + query) * 2));
    Sums before;
    before.most = known.x, before.total = known.y;
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) {
      const float2 pair = load_fresh(reinterpret_cast<const float2*>(from + 8 * n));
      before.out[n][0] = pair.x, before.out[n][1] = pair.y;
    }
    fold(before, sums);
    sums = before;
  }
  sync_warp();  // all have read the statistics
  store(w, w.p.parts, w.p.part_stats, at, sums);
  sync_warp();
}

DEVICE void write_out(const Worker& w, const Segment& s, const Sums& sums) {
  if (!w.leads() || w.g() >= w.group) return;
  const float share = 1.f / sums.total;
  uint32_t* to = reinterpret_cast<uint32_t*>(out_of(w, s, w.g()));
#pragma unroll
  for (int n = 0; n < kHead / 8; ++n) to[4 * n + w.t()] = narrow(sums.out[n][0] * share, sums.out[n][1] * share);
}

}  // namespace
