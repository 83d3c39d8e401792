// Attention as four warps do it: where tiles of 64 keys or values lie, their products (by_warps.h), folds, results.
// Who includes it says where tiles and a segment's queries come from: a Feed that can take() the next tile and give it back, and
// that begins and ends segments.
#pragma once
#include "../decode_chain/tensor_cores.h"

#ifndef JAXLLM_SPLIT  // a benchmark may try others
#define JAXLLM_SPLIT 64
#endif

namespace {

constexpr int kHead = 128, kTile = 64, kUnit = 16, kWarps = 4, kGroupThreads = kWarps * 32, kWorkers = 2;
constexpr int kRowBytes = 128, kPartBytes = kTile * kRowBytes, kTileBytes = 2 * kPartBytes;  // of a tile: two parts of 64 columns
constexpr int kSplit = JAXLLM_SPLIT;

}  // namespace

#include "dealing.h"
#include "heads.h"

namespace {

struct Between {  // of a tile, what the warps of a worker tell each other where each has some of its keys (by_warps.h)
  alignas(16) float most[kWarps][kMaxGroup], total[kWarps][kMaxGroup];
  uint4 probabilities[kWarps][32];  // as the second product takes them: rounded, and what rounding took
};

struct Own {  // a worker's, in shared memory; `deal` is written before a warp asks for it
  alignas(16) uint16_t queries[2][kMaxGroup][kHead], fresh[2][2][kHead];  // of two segments; fresh: the row's new key and value
  Cursor at[kWarps];  // each warp's: kept here while it works, as registers are few
  bool last[2];
  Deal deal;
  Between between;
};

struct Worker {
  const Params& p;
  Own& s;
  int number, warp, lane, group;
  uint32_t folds = 0;
  int turn = 0;  // which of the two segments in `s`
  DEVICE int g() const { return lane / 4; }
  DEVICE int t() const { return lane % 4; }
  DEVICE int thread() const { return warp * 32 + lane; }
  // Whose rows of the products are the queries. The workers' are on schedulers of their own.
  DEVICE bool leads() const { return warp == number % kWorkers; }
  DEVICE void sync() const { sync_group(number % kWorkers); }
};

// ---- copies ----

constexpr int kMostShift = 2;  // of a box: a tile at most
DEVICE int box_shift(const Params& p) { return least(p.page_shift, kMostShift); }
// Of a tile, two lanes for each box: the unit of the tile with which a lane's own begins.
DEVICE int unit_of(const Params& p, int lane) { return least(lane / 2 << box_shift(p), kTile / kUnit - 1); }

struct Boxes {  // of a tile: their number, and where in the map a lane's own lies
  int count, row;
};

// Where a worker's tiles lie, one after the other; all lanes of a warp together.
struct Walk {
  Cursor at;
  int pages = 0;  // lane i: page `window` + i of row `window_row`
  int window_row = -1, window = 0;

  DEVICE Boxes boxes(const Params& p, int lane) {
    const int shift = box_shift(p), units = (at.length + kUnit - 1) / kUnit, first = at.tile * (kTile / kUnit);
    const int page_of_tile = first >> p.page_shift, last = (first + kTile / kUnit - 1) >> p.page_shift;
    if (at.row != window_row || page_of_tile < window || last >= window + 32) {
      window_row = at.row, window = page_of_tile;
      pages = (window + lane) << p.page_shift < units ? p.table[int64_t(at.row) * p.width + window + lane] : 0;
    }
    const int unit = first + unit_of(p, lane), inside = unit & ((1 << p.page_shift) - 1);
    const int page = shuffle(pages, (unit >> p.page_shift) - window);
    const int row = (((page * p.kv_heads + at.head) << p.page_shift) + inside) * kUnit;
    return {(least(units - first, kTile / kUnit) + (1 << shift) - 1) >> shift, row};
  }
};

// Keys or values of a tile into a slot; the barrier is told what to expect.
DEVICE void copy_boxes(const Params& p, const TileMap* map, const Boxes& boxes, int lane, char* slot, uint64_t* full) {
  if (lane == 0) expect_bytes(full, boxes.count * (kUnit << box_shift(p)) * kRowBytes * 2);
  sync_warp();
  if (lane >= 2 * boxes.count) return;
  copy_tile(slot + lane % 2 * kPartBytes + unit_of(p, lane) * kUnit * kRowBytes, map, lane % 2 * kDepth, boxes.row, full);
}

// ---- queries, new keys and values ----

DEVICE int64_t last_place(const Params& p, const Segment& s) {  // where the row's last key and value go
  const int at = s.length - 1;
  const int64_t page = p.table[int64_t(s.row) * p.width + (at / kUnit >> p.page_shift)], page_size = kUnit << p.page_shift;
  return ((page * p.kv_heads + s.head) * page_size + at % page_size) * kHead;
}

// A head of the row's, rotated if it is one of queries or keys.
DEVICE Head made(const Params& p, int row, int head, int lane) {
  Head found;
  found.project(p, row, head, lane);
  const bool key = head >= p.heads;
  if (head < p.heads + p.kv_heads) Turn(p, row, lane, p.norms == nullptr ? nullptr : p.norms + (key ? kHead : 0)).apply(p, found);
  return found;
}

// The group's queries, and the new key and value where `enters`, each by a warp; nobody reads those of before any more.
SELDOM void prepare(const Params& p, Own& own, int turn, const Segment s, int group, int warp, int lane, bool enters) {
#pragma unroll 1
  for (int i = warp; i < group; i += kWarps) {
    Head head;
    if (p.q != nullptr) {
      const int token = p.tokens == nullptr ? s.row : p.tokens[s.row];
      head.load(p.q + (int64_t(token) * p.heads + s.head * group + i) * kHead, lane);
    } else {
      head = made(p, s.row, s.head * group + i, lane);
    }
    head.store(own.queries[turn][i], lane);
  }
  if (enters && warp >= 2) {  // they have the fewest queries
    const int value = warp - 2;
    const Head head = made(p, s.row, p.heads + s.head + value * p.kv_heads, lane);
    head.store(own.fresh[turn][value], lane);
    head.store((value ? p.v_pages : p.k_pages) + last_place(p, s), lane);
  }
}

// The same by one warp, of the projection's result, of which four heads are asked for before any is used.
SELDOM void prepare_alone(const Params& p, Own& own, int turn, const Segment s, int group, int lane, bool enters) {
  constexpr int kBatch = 4;
  Turn rotation(p, s.row, lane, p.norms);
  const int all = enters ? group + 2 : group;
#pragma unroll 1
  for (int base = 0; base < all; base += kBatch) {
    Head heads[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = base + i;
      if (at < all) heads[i].project(p, s.row, at < group ? s.head * group + at : p.heads + s.head + (at - group) * p.kv_heads, lane);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = base + i, value = at - group;
      if (at >= all) break;
      if (value == 0 && p.norms != nullptr) rotation.norm.load(p.norms + kHead, lane);
      if (value < 1) rotation.apply(p, heads[i]);
      heads[i].store(value < 0 ? own.queries[turn][at] : own.fresh[turn][value], lane);
      if (value >= 0) heads[i].store((value ? p.v_pages : p.k_pages) + last_place(p, s), lane);
    }
  }
}

// Puts the row's new key, or value, in its place and nothing where no key is: zero times whatever lay there may be NaN.
DEVICE void mend(Worker& w, char* slot, int live, bool enters, int value) {
  if (value)
    for (int at = live * 16 + w.thread(); at < kTile * 16; at += kGroupThreads)
      *reinterpret_cast<uint4*>(slot + at / 8 % 2 * kPartBytes + at / 16 * kRowBytes + at % 8 * 16) = uint4{0, 0, 0, 0};
  if (enters && w.warp == 0)
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<uint32_t*>(slot + half * kPartBytes + swizzled((live - 1) * kRowBytes + w.lane * 4)) =
          reinterpret_cast<const uint32_t*>(w.s.fresh[w.turn][value])[half * 32 + w.lane];
  before_copy_in();
  w.sync();
}

// ---- sums ----

// What came before and what comes next as one. All folds are this formula.
struct Fold {
  float a, b;
  DEVICE Fold(float& most, float& total, float next_most, float next_total) {
    const float both = larger(most, next_most);
    a = exp2_(most - both), b = exp2_(next_most - both);
    total = fused(next_total, b, times(total, a)), most = both;
  }
  DEVICE float operator()(float before, float next) const { return fused(next, b, times(before, a)); }
};

DEVICE uint16_t* out_of(const Worker& w, const Segment& s, int query) {
  const Params& p = w.p;
  const int token = p.tokens == nullptr ? s.row : p.tokens[s.row];
  return p.out + (int64_t(token) * p.heads + s.head * w.group + query) * kHead;
}

}  // namespace

#include "by_warps.h"

namespace {

// ---- results in memory ----

// Eight columns of a query, in every thread of the four warps.
struct Piece {
  float most, total, out[8];
};

// Everything the warp that leads stored, or all warps before a barrier, is there for whoever counts up last; true, in all: that is this worker, and all counts are there.
DEVICE bool last_to_arrive(Worker& w, int counter, int by, int all) {
  bool& told = w.s.last[w.folds++ % 2];  // read before it is written again: there is a barrier between
  sync_warp();
  if (w.leads() && w.lane == 0) {
    told = count_up(&arrivals[here()][counter], uint32_t(by)) + by == uint32_t(all);
    if (told) arrivals[here()][counter] = 0;
  }
  w.sync();
  return told;
}

// Stored results: the base-th, then first .. last - 1 behind it, folded in order; some of them are on their way at a time.
SELDOM Piece fold_stored(int group, int thread, const float* from, const float* stats, int64_t base, int first, int last) {
  constexpr int kBatch = 6;
  const int query = thread / 16, column = thread % 16 * 8, place = least(query, group - 1);
  auto load = [&](int64_t at, Piece& to) {
    const float2 known = load_fresh(reinterpret_cast<const float2*>(stats + (at * group + place) * 2));
    const float4* own = reinterpret_cast<const float4*>(from + (at * group + place) * kHead + column);
    const float4 low = load_fresh(own), high = load_fresh(own + 1);
    to = {known.x, known.y, {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
  };
  Piece piece;
  load(base, piece);
#pragma unroll 1
  for (int at = first; at < last; at += kBatch) {
    Piece next[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (at + i < last) load(base + at + i, next[i]);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (at + i >= last) break;
      const Fold both(piece.most, piece.total, next[i].most, next[i].total);
#pragma unroll
      for (int c = 0; c < 8; ++c) piece.out[c] = both(piece.out[c], next[i].out[c]);
    }
  }
  return piece;
}

DEVICE void store(const Worker& w, float* to, float* stats, int64_t at, const Piece& piece) {
  const int query = w.thread() / 16, column = w.thread() % 16 * 8;
  if (query >= w.group) return;
  const int64_t place = at * w.group + query;
  if (column == 0) stats[2 * place] = piece.most, stats[2 * place + 1] = piece.total;
  float4* own = reinterpret_cast<float4*>(to + place * kHead + column);
  own[0] = {piece.out[0], piece.out[1], piece.out[2], piece.out[3]}, own[1] = {piece.out[4], piece.out[5], piece.out[6], piece.out[7]};
}

DEVICE void write_out(const Worker& w, const Segment& s, const Piece& piece) {
  const int query = w.thread() / 16, column = w.thread() % 16 * 8;
  if (query >= w.group) return;
  const float share = 1.f / piece.total;
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = narrow(piece.out[2 * i] * share, piece.out[2 * i + 1] * share);
  *reinterpret_cast<uint4*>(out_of(w, s, query) + column) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
}

// ---- runs ----

// A run is done: the row, if it is its only one or the last to arrive. Kept: Sums or Piece.
template <typename Kept>
DEVICE void finish_run(Worker& w, const Segment& s, const Run& run, Kept& kept) {
  const Params& p = w.p;
  if (run.runs == 1) return write_out(w, s, kept);
  const int segment = s.row * p.kv_heads + s.head;
  const int64_t base = int64_t(segment) * p.most_runs;
  store(w, p.runs, p.run_stats, base + run.number, kept);
  w.sync();  // all warps stored
  if (!last_to_arrive(w, kMaxWorkers + segment, 1, run.runs)) return;
  write_out(w, s, fold_stored(w.group, w.thread(), p.runs, p.run_stats, base, 1, run.runs));
}

// The splits first .. last - 1 of a run, all that this worker has of it.
template <typename Feed>
DEVICE void work_on(Worker& w, Feed& feed, const Segment& s, const Run& run, int first, int last) {
  const Params& p = w.p;
  const int at = s.base + run.first * s.split;
  const bool begins = first == run.first;
  const int owner = begins ? w.number : owner_of(w.s.deal, s, at);
  const int64_t base = int64_t(owner) * p.slots;
  const bool apart = !begins || s.split > 1;  // splits of one tile are folded where they are made
  const int step = apart ? 1 : last - first;
  Sums sums;
#pragma unroll 1
  for (int split = first; split < last; split += step) {
    sums = {};
    const int end = least((split + step) * s.split, s.tiles);
    attend_tiles(w, feed, s.length - split * s.split * kTile, s.length - end * kTile, sums);
    if (!begins)
      store(w, p.parts, p.part_stats, base + split - run.first, sums);
    else if (apart)
      fold_split(w, base, split == first, sums);
  }
  if (begins && last == run.last) return finish_run(w, s, run, sums);
  if (begins) store(w, p.parts, p.part_stats, base, sums);
  w.sync();
  if (!last_to_arrive(w, owner, last - first, run.last - run.first)) return;
  // How far the one that begins the run came: where the next worker begins.
  const int next = snapped(w.s.deal, s, boundary(w.s.deal, owner + 1)), done = (next - at) / s.split;
  Piece whole = fold_stored(w.group, w.thread(), p.parts, p.part_stats, base, done, run.last - run.first);
  finish_run(w, s, run, whole);
}

// ---- the whole ----

DEVICE void clear_empty_rows(const Params& p, int worker, int thread) {
  if (p.tokens != nullptr) return;
  for (int row = worker; row < p.rows; row += p.programs * kWorkers)
    if (p.lens[row] == 0)
      for (int at = thread; at < p.heads * kHead / 8; at += kGroupThreads)
        reinterpret_cast<uint4*>(p.out + int64_t(row) * p.heads * kHead)[at] = uint4{0, 0, 0, 0};
}

// A segment's queries by the warps that want them.
DEVICE void prepare_together(Worker& w, const Segment& s, bool enters) {
  w.sync();  // all have read those of before
  prepare(w.p, w.s, w.turn, s, w.group, w.warp, w.lane, enters);
  w.sync();
}

// All that a worker has to do.
template <typename Feed>
DEVICE void attend_share(Worker& w, Feed& feed, const Share& share) {
  const Params& p = w.p;
  Cursor& kept = w.s.at[w.warp];
  Cursor c = cursor_of(p, share);
#pragma unroll 1
  while (c.left > 0) {
    Segment s{c.row, c.head, c.length, tiles_of(c.length), 0, c.base};
    s.split = split_of(s.length);
    const int tiles = tiles_ahead(c), first = c.tile / s.split, last = (c.tile + tiles + s.split - 1) / s.split;
    const bool ends = c.tile + tiles == s.tiles;
    advance(p, share, c, tiles);
    sync_warp();  // all lanes have read what was kept
    kept = c;
    feed.begin(w, s, p.q == nullptr && ends);
#pragma unroll 1
    for (int split = first; split < last;) {
      const Run run = run_of(s, split);
      const int end = least(run.last, last);
      work_on(w, feed, s, run, split, end);
      split = end;
    }
    feed.end(w);
    sync_warp();
    c = kept;
  }
}

}  // namespace
