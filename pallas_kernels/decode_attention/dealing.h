// What attention by warpgroups is told, who has which keys, and runs of their splits. A worker is whoever has a
// share of its own, kWorkers a block; kTile keys are dealt out together, kSplit make the smallest split.
#pragma once

namespace {

constexpr int kSplits = 128, kRun = 16, kWhole = 32;
#ifndef JAXLLM_EVEN  // 64ths of the workers that are busy to the end; a benchmark may try others
#define JAXLLM_EVEN 60
#endif
constexpr int kMaxGroup = 8, kMaxWorkers = 4096, kMaxSegments = 65536;
constexpr float kLog2e = 1.4426950408889634f;

struct Params {
  const uint16_t* q;                     // [tokens][heads][H], rotated; or null, and then what they are made from:
  const void* qkv;                       // [rows][(heads + 2 kv_heads) * H], or f32 [addends][...]
  const uint16_t *norms, *bias;          // [2][H] or null; [(heads + 2 kv_heads) * H] or null
  const float *cosines, *sines;          // [rows][H / 2]
  const int* tokens;                     // [rows]: where queries and outputs lie; null: row r's at r
  uint16_t *k_pages, *v_pages, *out;     // [P][kv_heads][page_size][H]; as q
  const int *table, *lens;               // [rows][width], [rows]
  float *parts, *part_stats;             // [workers][slots][group][H]; the same with [group][2]: maximum, total
  float *runs, *run_stats;               // [rows][kv_heads][most_runs][group][H]; likewise
  int rows, programs, heads, kv_heads, page_shift, width, addends, slots, most_runs;  // pages have kUnit << page_shift keys
  float eps, scale;                      // scale: times log2 e
};

// Splits of cut runs, by the run's first worker, then runs of rows, that have been stored. All zeros between launches.
RESIDENT uint32_t arrivals[kDevices][kMaxWorkers + kMaxSegments];

DEVICE int least(int a, int b) { return a < b ? a : b; }
DEVICE int tiles_of(int length) { return (length + kTile - 1) / kTile; }

// Tiles of a split of a row.
DEVICE int split_of(int length) {
  int split = kSplit;
  while (length > split * kSplits) split *= 2;
  return split / kTile;
}

// ---- dealing ----

struct Deal {
  int total, workers, each, rest;  // tiles: total = workers * each + rest
  int slack;                       // a boundary this near to the end of a segment moves there
  bool whole;                      // segments are not cut
};

struct Segment {  // the keys of one row and head of keys and values
  int row, head, length, tiles, split, base;  // split, base: in tiles; base: where it begins among all
};

// worker * total / workers.
DEVICE int boundary(const Deal& d, int worker) { return worker * d.each + worker * d.rest / d.workers; }

// The beginning of a split at or after `at`, a boundary inside the segment; or the segment's own, if that is near.
DEVICE int snapped(const Deal& d, const Segment& s, int at) {
  const int inside = at - s.base;
  if (inside == 0) return at;
  if (d.whole || s.tiles - inside < d.slack) return s.base + s.tiles;
  if (inside < d.slack) return s.base;
  return s.base + least((inside + s.split - 1) / s.split * s.split, s.tiles);
}

// Does the worker begin at or before `at`, the beginning of a split of the segment?
DEVICE bool begins_by(const Deal& d, const Segment& s, int worker, int at) {
  const int own = boundary(d, worker);
  return own < s.base || (own < s.base + s.tiles && snapped(d, s, own) <= at);
}

// Who has the split of the segment that begins at `at`.
DEVICE int owner_of(const Deal& d, const Segment& s, int at) {
  int worker = int(((int64_t(at) + 1) * d.workers + d.total - 1) / d.total) - 1;
  while (worker + 1 < d.workers && begins_by(d, s, worker + 1, at)) ++worker;
  while (worker > 0 && !begins_by(d, s, worker, at)) --worker;
  return worker;
}

struct Share {
  Segment first, last;  // the ones it begins and ends in
  int begin, end;       // tiles, beginnings of splits
};

DEVICE Segment segment_at(int row, int length, int row_base, int at) {
  Segment s;
  s.row = row, s.length = length, s.tiles = tiles_of(length), s.split = split_of(length);
  s.head = (at - row_base) / s.tiles, s.base = row_base + s.head * s.tiles;
  return s;
}

// Rows first .. last - 1 with their lengths, of which the first few are asked for together.
struct Lengths {
  static constexpr int kKnown = 8;
  const Params& p;
  int first, last, known[kKnown];
  DEVICE Lengths(const Params& p, int first, int last) : p(p), first(first), last(last) {
#pragma unroll
    for (int i = 0; i < kKnown; ++i) known[i] = first + i < last ? p.lens[first + i] : 0;
  }
  template <typename Use>
  DEVICE void each(Use use) const {
#pragma unroll
    for (int i = 0; i < kKnown; ++i)
      if (first + i < last) use(first + i, known[i]);
#pragma unroll 1
    for (int row = first + kKnown; row < last; ++row) use(row, p.lens[row]);
  }
};

// What a worker has to do, found by its lanes together, each with some rows in a row. False: nothing.
DEVICE bool find_share(const Params& p, int worker, int lane, Deal& deal, Share& share) {
  const int rows = (p.rows + 31) / 32, first = lane * rows;
  const Lengths lengths(p, first, least(first + rows, p.rows));
  int mine = 0, most = 0, live = 0;
  lengths.each([&](int, int length) {
    const int tiles = tiles_of(length);
    mine += tiles, most = tiles > most ? tiles : most, live += tiles > 0;
  });
  mine *= p.kv_heads;
  int until = mine;
  for (int delta = 1; delta < 32; delta *= 2) {
    const int below = shuffle_up(until, delta);
    if (lane >= delta) until += below;
  }
  deal.total = shuffle(until, 31), deal.workers = p.programs * kWorkers;
  if (deal.total == 0) return false;
  most = most_of_warp(most), live = sum_of_warp(live);
  // Rows of one length, about as many segments as workers, or a multiple: cutting them would gain little.
  const int segments = live * p.kv_heads, rounds = (segments + deal.workers - 1) / deal.workers;
  const bool alike = int64_t(most) * segments * 20 <= int64_t(deal.total) * 21;
  deal.whole = alike && segments * 64 >= rounds * deal.workers * JAXLLM_EVEN;
  deal.each = deal.total / deal.workers, deal.rest = deal.total % deal.workers, deal.slack = deal.each / 8;
  const int ends[2] = {boundary(deal, worker), boundary(deal, worker + 1)};
  int found[2] = {-1, -1}, long_[2] = {}, at[2] = {}, base = until - mine;
  lengths.each([&](int row, int length) {
    const int tiles = tiles_of(length) * p.kv_heads;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (ends[i] >= base && ends[i] < base + tiles) found[i] = row, long_[i] = length, at[i] = base;
    base += tiles;
  });
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (ends[i] == deal.total) {
      share.end = share.last.base = deal.total;
      continue;
    }
    const Segment s = segment_at(most_of_warp(found[i]), sum_of_warp(long_[i]), sum_of_warp(at[i]), ends[i]);
    const int moved = snapped(deal, s, ends[i]);
    if (i == 0)
      share.begin = moved, share.first = s;
    else
      share.end = moved, share.last = s;
  }
  return share.begin < share.end;
}

// Where a worker is. What it has of segments that are cut comes first, so that nobody waits for it at the end: the end of the one
// it begins in, then the beginning of the one it ends in, then what lies between.
enum Part { kCutEnd, kCutBeginning, kBetween };

struct Cursor {
  int row, head, tile, length, base;  // base: of the segment, in tiles
  int left, of_part, part;            // tiles of the share, and of this part of it
};

DEVICE void next_segment(const Params& p, Cursor& c) {
  c.tile = 0, c.base += tiles_of(c.length);
  if (++c.head < p.kv_heads) return;
  c.head = 0, c.length = 0;
  while (c.length == 0) c.length = p.lens[++c.row];
}

DEVICE void next_part(const Params& p, const Share& share, Cursor& c) {
  const Segment &first = share.first, &last = share.last;
  const bool cut = last.base < share.end && share.end < last.base + last.tiles && last.base > first.base;
  if (++c.part == kCutBeginning && cut) {
    c.row = last.row, c.head = last.head, c.tile = 0, c.length = last.length, c.base = last.base, c.of_part = share.end - last.base;
    return;
  }
  c.part = kBetween, c.of_part = c.left;
  c.row = first.row, c.head = first.head, c.tile = 0, c.length = first.length, c.base = first.base;
  if (share.begin > first.base && c.left > 0) next_segment(p, c);
}

DEVICE Cursor cursor_of(const Params& p, const Share& share) {
  const Segment& s = share.first;
  const int inside = share.begin - s.base, own = least(s.tiles - inside, share.end - share.begin);
  Cursor c = {s.row, s.head, inside, s.length, s.base, share.end - share.begin, own, kCutEnd};
  if (inside == 0 || own == 0) next_part(p, share, c);
  return c;
}

// Tiles of the present segment that are this worker's.
DEVICE int tiles_ahead(const Cursor& c) { return least(tiles_of(c.length) - c.tile, c.of_part); }

DEVICE void advance(const Params& p, const Share& share, Cursor& c, int tiles) {
  c.left -= tiles, c.of_part -= tiles, c.tile += tiles;
  if (c.left == 0) return;
  if (c.of_part == 0)
    next_part(p, share, c);
  else if (c.tile == tiles_of(c.length))
    next_segment(p, c);
}

// ---- runs ----

struct Run {
  int first, last, number, runs;  // splits
};

DEVICE Run run_of(const Segment& s, int split) {
  const int splits = (s.tiles + s.split - 1) / s.split;
  if (splits <= kWhole) return {0, splits, 0, 1};
  const int number = split / kRun;
  return {number * kRun, least((number + 1) * kRun, splits), number, (splits + kRun - 1) / kRun};
}

// How many queries' results there may be in memory at one time, of splits and of runs; says it to `p` too.
struct Results {
  int64_t parts, runs;
};

inline Results results_of(Params& p) {
  const int keys = p.width * (kUnit << p.page_shift), group = p.heads / p.kv_heads;
  const int splits = (keys + kSplit - 1) / kSplit;  // of the longest row that the table holds, and no more than kSplits
  p.slots = splits < kWhole ? splits : kWhole;
  p.most_runs = splits <= kWhole ? 0 : (splits < kSplits ? splits + kRun - 1 : kSplits) / kRun;
  return {int64_t(p.programs) * kWorkers * p.slots * group, int64_t(p.rows) * p.kv_heads * p.most_runs * group};
}

}  // namespace
