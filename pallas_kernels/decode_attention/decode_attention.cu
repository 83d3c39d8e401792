// Attention of one query a row over paged keys and values, by warps that never stop reading.
//
// One block a multiprocessor. Every warp is a worker of its own: one of its lanes asks the copy engine for 16 keys or
// values of one head at a time (4 KiB, contiguous), into the warp's own ring in shared memory, and the warp takes them in
// order. Nothing in the loop waits for another warp.
//
// A row's keys are cut into splits, at most kSplits of them, whose length depends on the row's own length only. What a
// head's splits give is folded in order: kRun splits make a run (all of them do if there are at most kWhole), runs make the
// row. The fold is one formula wherever it happens, in registers or from memory, so a row's bits depend neither on other
// rows nor on how many workers there are.
//
// Work is counted in tiles of 16 keys over all rows and heads; worker w of W has the splits that begin in its W-th share.
// So a warp has whole runs, which stay in registers, and at most two cut ones. Of a cut run the worker that has its beginning
// leaves the fold so far, the others each split's result; whoever counts up last folds them.
#include "../decode_layers/primitives.h"

namespace {

#ifndef JAXLLM_WARPS  // a benchmark may try others
#define JAXLLM_WARPS 8
#define JAXLLM_SLOTS 6
#endif
#ifndef JAXLLM_SPLIT
#define JAXLLM_SPLIT 64
#endif

constexpr int kHead = 128, kTile = 16, kWarps = JAXLLM_WARPS, kThreads = kWarps * 32, kSlots = JAXLLM_SLOTS;
constexpr int kRowBytes = kHead * 2, kSlotBytes = kTile * kRowBytes;
constexpr int kSplit = JAXLLM_SPLIT, kSplits = 128, kRun = 16, kWhole = 32;
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
  int rows, programs, heads, kv_heads, page_shift, width, addends, slots, most_runs;  // pages have kTile << page_shift keys
  float eps, scale;                      // scale: times log2 e
};

// Splits of cut runs, by the run's first worker, then runs of rows, that have been stored. All zeros between launches.
RESIDENT uint32_t arrivals[kMaxWorkers + kMaxSegments];

struct Scratch {  // of a warp
  union {
    alignas(16) uint16_t queries[kMaxGroup][kHead];
    struct {
      alignas(16) float weights[kTile][kMaxGroup];  // probabilities, not yet divided by their total
      alignas(16) float old_factors[kMaxGroup], new_factors[kMaxGroup];
    };
  };
};

struct Shared {
  alignas(128) unsigned char ring[kWarps][kSlots][kSlotBytes];
  Scratch scratch[kWarps];
  uint64_t full[kWarps][kSlots];
};

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
  Segment first;    // the one it begins in
  int begin, end;   // tiles, beginnings of splits
};

DEVICE Segment segment_at(const Params& p, int row, int row_base, int at) {
  Segment s;
  s.row = row, s.length = p.lens[row], s.tiles = tiles_of(s.length), s.split = split_of(s.length);
  s.head = (at - row_base) / s.tiles, s.base = row_base + s.head * s.tiles;
  return s;
}

// What a worker has to do, found by its lanes together, each with some rows in a row. False: nothing.
DEVICE bool find_share(const Params& p, int worker, int lane, Deal& deal, Share& share) {
  const int each = (p.rows + 31) / 32, first = lane * each, last = least(first + each, p.rows);
  int mine = 0, most = 0, live = 0;
  for (int row = first; row < last; ++row) {
    const int tiles = tiles_of(p.lens[row]);
    mine += tiles, most = tiles > most ? tiles : most, live += tiles > 0;
  }
  mine *= p.kv_heads;
  int until = mine;
  for (int delta = 1; delta < 32; delta *= 2) {
    const int below = shuffle_up(until, delta);
    if (lane >= delta) until += below;
  }
  deal.total = shuffle(until, 31), deal.workers = p.programs * kWarps;
  if (deal.total == 0) return false;
  most = most_of_warp(most), live = sum_of_warp(live);
  // Rows of one length, about as many segments as workers, or a multiple: cutting them would gain nothing.
  const int segments = live * p.kv_heads, rounds = (segments + deal.workers - 1) / deal.workers;
  const bool alike = int64_t(most) * segments * 20 <= int64_t(deal.total) * 21;
  deal.whole = alike && segments * 16 >= rounds * deal.workers * 15;
  deal.each = deal.total / deal.workers, deal.rest = deal.total % deal.workers, deal.slack = deal.each / 8;
  const int ends[2] = {boundary(deal, worker), boundary(deal, worker + 1)};
  int found[2] = {-1, -1}, at[2] = {}, base = until - mine;
  for (int row = first; row < last; ++row) {
    const int tiles = tiles_of(p.lens[row]) * p.kv_heads;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (ends[i] >= base && ends[i] < base + tiles) found[i] = row, at[i] = base;
    base += tiles;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (ends[i] == deal.total) {
      share.end = deal.total;
      continue;
    }
    const int row = most_of_warp(found[i]);
    const Segment s = segment_at(p, row, sum_of_warp(at[i]), ends[i]);
    const int moved = snapped(deal, s, ends[i]);
    if (i == 0)
      share.begin = moved, share.first = s;
    else
      share.end = moved;
  }
  return share.begin < share.end;
}

struct Cursor {
  int row, head, tile, tiles, left;  // left: tiles of this worker's share
};

DEVICE void skip_empty(const Params& p, Cursor& c) {
  while (c.tiles == 0) c.tiles = tiles_of(p.lens[++c.row]);
}

DEVICE Cursor cursor_of(const Params& p, const Share& share) {
  const Segment& s = share.first;
  Cursor c = {s.row, s.head, share.begin - s.base, s.tiles, share.end - share.begin};
  if (c.tile == s.tiles) {  // moved to the end of a segment
    c.tile = 0;
    if (++c.head == p.kv_heads) c.head = 0, c.tiles = 0, skip_empty(p, c);
  }
  return c;
}

DEVICE void advance(const Params& p, Cursor& c, int tiles) {
  c.left -= tiles, c.tile += tiles;
  if (c.tile < c.tiles) return;
  c.tile = 0;
  if (++c.head < p.kv_heads) return;
  c.head = 0;
  if (c.left > 0) c.tiles = 0, skip_empty(p, c);
}

// ---- the ring ----

struct Lane {
  Scratch& scratch;  // of its warp
  int lane, g, t, group;
};

struct Worker : Lane {
  const Params& p;
  unsigned char (*ring)[kSlotBytes];
  uint64_t* full;
  int number;
  Deal deal;
  Cursor ahead;            // what is fetched next
  int64_t place = 0;       // of a tile whose keys are on their way and whose values are next
  int pages = 0;           // lane i: page of tile `window` + i of row `window_row`
  int window_row = -1, window = 0;
  int slot = 0;            // taken next
  uint32_t phase = 0;
  bool values = false;     // are fetched next
};

// The next 4 KiB into a slot that nobody reads any more.
DEVICE void fetch(Worker& w, int slot) {
  const Params& p = w.p;
  Cursor& c = w.ahead;
  if (c.left == 0) return;
  if (!w.values) {
    if (c.row != w.window_row || c.tile < w.window || c.tile >= w.window + 32) {
      w.window_row = c.row, w.window = c.tile;
      const int tile = c.tile + w.lane;
      w.pages = tile < c.tiles ? p.table[int64_t(c.row) * p.width + (tile >> p.page_shift)] : 0;
    }
    const int64_t tile = (int64_t(shuffle(w.pages, c.tile - w.window)) * p.kv_heads + c.head) << p.page_shift;
    w.place = (tile + (c.tile & ((1 << p.page_shift) - 1))) * kTile * kHead;
  }
  if (w.lane == 0) {
    expect_bytes(&w.full[slot], kSlotBytes);
    copy_in(w.ring[slot], (w.values ? p.v_pages : p.k_pages) + w.place, kSlotBytes, &w.full[slot]);
  }
  if (w.values) advance(p, c, 1);
  w.values = !w.values;
}

DEVICE unsigned char* take(Worker& w) {
  wait_for(&w.full[w.slot], w.phase);
  return w.ring[w.slot];
}

// All lanes have read the slot: it is filled again.
DEVICE void give_back(Worker& w) {
  sync_warp();
  fetch(w, w.slot);
  if (++w.slot == kSlots) w.slot = 0, w.phase ^= 1;
}

// ---- queries, new keys and values ----

// One number of the projection's result, rounded to the model's dtype.
DEVICE float projected(const Params& p, int row, int column) {
  const int64_t wide_ = int64_t(p.heads + 2 * p.kv_heads) * kHead, at = row * wide_ + column;
  if (p.addends == 0) return wide(static_cast<const uint16_t*>(p.qkv)[at]);
  const float* sums = static_cast<const float*>(p.qkv);
  float total = sums[at];
#pragma unroll 1
  for (int i = 1; i < p.addends; ++i) total += sums[i * p.rows * wide_ + at];
  if (p.bias != nullptr) total += wide(p.bias[column]);
  return wide(narrow(total));
}

struct Pairs {  // a lane's columns of a head: lane, lane + 32; and the same of its second half
  uint16_t first[2], second[2];
};

// A head of the row's queries or keys, normed if the model does that, and rotated.
SELDOM Pairs rotated(const Params& p, int lane, int row, int head, const uint16_t* norm) {
  float a[2], b[2], squares = 0.f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[i] = projected(p, row, head * kHead + lane + 32 * i), b[i] = projected(p, row, head * kHead + lane + 32 * i + 64);
    squares += a[i] * a[i] + b[i] * b[i];
  }
  if (norm != nullptr) {
    for (int mask = 16; mask; mask >>= 1) squares += shuffle_xor(squares, mask);
    const float scale = reciprocal_root(squares / kHead + p.eps);
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // rounded between, as the model rounds
      a[i] = wide(narrow(a[i] * scale * wide(norm[lane + 32 * i])));
      b[i] = wide(narrow(b[i] * scale * wide(norm[lane + 32 * i + 64])));
    }
  }
  Pairs pairs;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float c = p.cosines[int64_t(row) * 64 + lane + 32 * i], s = p.sines[int64_t(row) * 64 + lane + 32 * i];
    pairs.first[i] = narrow(times(a[i], c) - times(b[i], s));  // not fused: rope_page_write rounds so
    pairs.second[i] = narrow(times(b[i], c) + times(a[i], s));
  }
  return pairs;
}

DEVICE void put(const Pairs& pairs, int lane, uint16_t* to) {
#pragma unroll
  for (int i = 0; i < 2; ++i) to[lane + 32 * i] = pairs.first[i], to[lane + 32 * i + 64] = pairs.second[i];
}

// This lane's part of the group's queries as the tensor core's second operand: columns 32c + 8t .. of query g.
DEVICE void load_queries(Worker& w, const Segment& s, uint4 (&queries)[4]) {
  const Params& p = w.p;
  const int group = w.group;
  const uint16_t* from;
  if (p.q != nullptr) {
    const int token = p.tokens == nullptr ? s.row : p.tokens[s.row];
    from = p.q + (int64_t(token) * p.heads + s.head * group + w.g) * kHead;
  } else {
    for (int i = 0; i < group; ++i) put(rotated(p, w.lane, s.row, s.head * group + i, p.norms), w.lane, w.scratch.queries[i]);
    sync_warp();
    from = w.scratch.queries[w.g];
  }
#pragma unroll
  for (int c = 0; c < 4; ++c)
    queries[c] = w.g < group ? *reinterpret_cast<const uint4*>(from + c * 32 + w.t * 8) : uint4{0, 0, 0, 0};
  sync_warp();  // the same memory holds probabilities next
}

DEVICE int64_t last_place(const Params& p, const Segment& s) {  // where the row's last key and value go
  const int at = s.length - 1;
  const int64_t page = p.table[int64_t(s.row) * p.width + (at / kTile >> p.page_shift)], page_size = kTile << p.page_shift;
  return ((page * p.kv_heads + s.head) * page_size + at % page_size) * kHead;
}

// The row's new key, or value, to its page and to the slot: the copy may have brought what was in the page before.
SELDOM void enter(const Params& p, const Segment& s, int lane, unsigned char* slot, bool value) {
  uint16_t* own = reinterpret_cast<uint16_t*>(slot + (s.length - 1) % kTile * kRowBytes);
  uint16_t* page = (value ? p.v_pages : p.k_pages) + last_place(p, s);
  if (value) {
#pragma unroll
    for (int at = lane; at < kHead; at += 32)
      own[at] = page[at] = narrow(projected(p, s.row, (p.heads + p.kv_heads + s.head) * kHead + at));
  } else {
    const Pairs pairs = rotated(p, lane, s.row, p.heads + s.head, p.norms == nullptr ? nullptr : p.norms + kHead);
    put(pairs, lane, own);
    put(pairs, lane, page);
  }
  before_copy_in();
  sync_warp();
}

// ---- sums ----

template <int G>
struct Sums {  // of a group's queries; every lane has 4 columns of all, and statistics of two: heads 2t and 2t + 1
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {}, out[G][4] = {};
};

template <int G>
DEVICE void load_factors(const float* from, float (&to)[G]) {
#pragma unroll
  for (int h = 0; h < G; h += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + h);
    to[h] = four.x, to[h + 1] = four.y, to[h + 2] = four.z, to[h + 3] = four.w;
  }
}

// Sums of what came before and of what comes next as one. All folds are this.
template <int G>
DEVICE void fold(const Lane& w, Sums<G>& sums, const Sums<G>& next) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float most = larger(sums.most[h], next.most[h]);
    const float a = exp2_(sums.most[h] - most), b = exp2_(next.most[h] - most);
    sums.total[h] = fused(next.total[h], b, times(sums.total[h], a));
    sums.most[h] = most;
    if (w.g == 0) w.scratch.old_factors[2 * w.t + h] = a, w.scratch.new_factors[2 * w.t + h] = b;
  }
  sync_warp();
  float a[G], b[G];
  load_factors<G>(w.scratch.old_factors, a);
  load_factors<G>(w.scratch.new_factors, b);
#pragma unroll
  for (int h = 0; h < G; ++h)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums.out[h][i] = fused(next.out[h][i], b[h], times(sums.out[h][i], a[h]));
  sync_warp();
}

template <int G>
DEVICE void add_value(const Worker& w, Sums<G>& sums, const unsigned char* values, int key) {
  const uint2 bits = *reinterpret_cast<const uint2*>(values + key * kRowBytes + w.lane * 8);
  const float v[4] = {wide(uint16_t(bits.x)), wide(uint16_t(bits.x >> 16)), wide(uint16_t(bits.y)), wide(uint16_t(bits.y >> 16))};
  float weight[G];
  load_factors<G>(w.scratch.weights[key], weight);
#pragma unroll
  for (int h = 0; h < G; ++h)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums.out[h][i] = fused(weight[h], v[i], sums.out[h][i]);
}

DEVICE void multiply(float (&acc)[4], uint4 low, uint4 high, uint4 x) {
  // The columns of a lane's 16 bytes are in the same places on both sides, so their order does not matter.
  mma(acc, low.x, high.x, low.y, high.y, x.x, x.y);
  mma(acc, low.z, high.z, low.w, high.w, x.z, x.w);
}

// 16 keys and values, `live` of which are there. Totals stay apart in the lanes until the split ends.
template <int G>
DEVICE void attend(Worker& w, const Segment& s, const uint4 (&queries)[4], int live, bool enters, Sums<G>& sums) {
  unsigned char* keys = take(w);
  if (enters) enter(w.p, s, w.lane, keys, false);
  float scores[2][4] = {};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const unsigned char* at = keys + w.g * kRowBytes + (c * 32 + w.t * 8) * 2;
    multiply(scores[c & 1], *reinterpret_cast<const uint4*>(at), *reinterpret_cast<const uint4*>(at + 8 * kRowBytes), queries[c]);
  }
  give_back(w);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float a = w.g < live ? times(scores[0][h] + scores[1][h], w.p.scale) : -INFINITY;
    const float b = w.g + 8 < live ? times(scores[0][h + 2] + scores[1][h + 2], w.p.scale) : -INFINITY;
    float most = larger(a, b);
    for (int mask = 4; mask < 32; mask <<= 1) most = larger(most, shuffle_xor(most, mask));
    most = larger(most, sums.most[h]);
    const float shrink = exp2_(sums.most[h] - most), pa = exp2_(a - most), pb = exp2_(b - most);
    sums.total[h] = fused(sums.total[h], shrink, pa + pb);
    sums.most[h] = most;
    w.scratch.weights[w.g][2 * w.t + h] = pa, w.scratch.weights[w.g + 8][2 * w.t + h] = pb;
    if (w.g == 0) w.scratch.old_factors[2 * w.t + h] = shrink;
  }
  unsigned char* values = take(w);
  if (enters) enter(w.p, s, w.lane, values, true);
  sync_warp();  // probabilities are there
  float shrink[G];
  load_factors<G>(w.scratch.old_factors, shrink);
#pragma unroll
  for (int h = 0; h < G; ++h)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums.out[h][i] = times(sums.out[h][i], shrink[h]);
  if (live == kTile) {
#pragma unroll(kWarps <= 8 ? 8 : 4)
    for (int key = 0; key < kTile; ++key) add_value(w, sums, values, key);
  } else {
#pragma unroll 1
    for (int key = 0; key < live; ++key) add_value(w, sums, values, key);
  }
  give_back(w);
}

template <int G>
DEVICE void attend_split(Worker& w, const Segment& s, const uint4 (&queries)[4], int split, Sums<G>& sums) {
  const int last = least((split + 1) * s.split, s.tiles);
  for (int tile = split * s.split; tile < last; ++tile) {
    const int live = least(s.length - tile * kTile, kTile);
    attend(w, s, queries, live, w.p.q == nullptr && tile == s.tiles - 1, sums);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h)
    for (int mask = 4; mask < 32; mask <<= 1) sums.total[h] += shuffle_xor(sums.total[h], mask);
}

// ---- runs ----

template <int G>
DEVICE void store(const Lane& w, float* to, float* stats, int64_t at, const Sums<G>& sums) {
  const int group = w.group;
  to += at * group * kHead + w.lane * 4, stats += at * group * 2;
#pragma unroll
  for (int h = 0; h < G; ++h)
    if (h < group)
      *reinterpret_cast<float4*>(to + h * kHead) = {sums.out[h][0], sums.out[h][1], sums.out[h][2], sums.out[h][3]};
  if (w.g == 0)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (2 * w.t + h < group) stats[4 * w.t + 2 * h] = sums.most[h], stats[4 * w.t + 2 * h + 1] = sums.total[h];
}

template <int G>
DEVICE void load(const Lane& w, const float* from, const float* stats, int64_t at, Sums<G>& sums) {
  const int group = w.group;
  from += at * group * kHead + w.lane * 4, stats += at * group * 2;
#pragma unroll
  for (int h = 0; h < G; ++h) {
    const float4 four = h < group ? load_fresh(reinterpret_cast<const float4*>(from + h * kHead)) : float4{0, 0, 0, 0};
    sums.out[h][0] = four.x, sums.out[h][1] = four.y, sums.out[h][2] = four.z, sums.out[h][3] = four.w;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float2 both = 2 * w.t + h < group ? load_fresh(reinterpret_cast<const float2*>(stats + 4 * w.t + 2 * h)) : float2{0, 1};
    sums.most[h] = both.x, sums.total[h] = both.y;
  }
}

// Stored results first .. last - 1, folded in order; some of them are on their way at a time.
template <int G>
SELDOM void fold_stored(const Lane w, const float* from, const float* stats, int64_t base, int first, int last, Sums<G>& start) {
  constexpr int kBatch = kWarps > 8 ? 1 : G <= 4 ? 6 : 2;
  Sums<G> sums = start;  // in registers
  for (int at = first; at < last; at += kBatch) {
    Sums<G> next[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (at + i < last) load(w, from, stats, base + at + i, next[i]);
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (at + i < last) fold(w, sums, next[i]);
  }
  start = sums;
}

// Everything this warp stored is there for whoever counts up last; true: that is this one, and all counts are there.
DEVICE bool last_to_arrive(Worker& w, int counter, int by, int all) {
  sync_warp();
  int last = 0;
  if (w.lane == 0) {
    last = count_up(&arrivals[counter], uint32_t(by)) + by == uint32_t(all);
    if (last) arrivals[counter] = 0;
  }
  return shuffle(last, 0) != 0;
}

template <int G>
DEVICE void write_out(Worker& w, const Segment& s, const Sums<G>& sums) {
  const Params& p = w.p;
  const int group = w.group, token = p.tokens == nullptr ? s.row : p.tokens[s.row];
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (w.g == 0) w.scratch.new_factors[2 * w.t + h] = 1.f / sums.total[h];
  sync_warp();
  float share[G];
  load_factors<G>(w.scratch.new_factors, share);
  uint16_t* to = p.out + (int64_t(token) * p.heads + s.head * group) * kHead + w.lane * 4;
#pragma unroll
  for (int h = 0; h < G; ++h)
    if (h < group) {
      uint32_t pair[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t low = narrow(sums.out[h][2 * i] * share[h]), high = narrow(sums.out[h][2 * i + 1] * share[h]);
        pair[i] = low | high << 16;
      }
      *reinterpret_cast<uint2*>(to + h * kHead) = uint2{pair[0], pair[1]};
    }
  sync_warp();
}

struct Run {
  int first, last, number, runs;  // splits
};

DEVICE Run run_of(const Segment& s, int split) {
  const int splits = (s.tiles + s.split - 1) / s.split;
  if (splits <= kWhole) return {0, splits, 0, 1};
  const int number = split / kRun;
  return {number * kRun, least((number + 1) * kRun, splits), number, (splits + kRun - 1) / kRun};
}

// A run is done: the row, if it is its only one or the last to arrive.
template <int G>
DEVICE void finish_run(Worker& w, const Segment& s, const Run& run, Sums<G>& sums) {
  const Params& p = w.p;
  if (run.runs > 1) {
    const int segment = s.row * p.kv_heads + s.head;
    const int64_t base = int64_t(segment) * p.most_runs;
    store(w, p.runs, p.run_stats, base + run.number, sums);
    if (!last_to_arrive(w, kMaxWorkers + segment, 1, run.runs)) return;
    Sums<G> all;
    fold_stored<G>(w, p.runs, p.run_stats, base, 0, run.runs, all);
    sums = all;
  }
  write_out(w, s, sums);
}

// The splits first .. last - 1 of a run, all that this worker has of it.
template <int G>
DEVICE void work_on(Worker& w, const Segment& s, const Run& run, const uint4 (&queries)[4], int first, int last) {
  const Params& p = w.p;
  const int at = s.base + run.first * s.split;
  const bool begins = first == run.first;
  const int owner = begins ? w.number : owner_of(w.deal, s, at);
  const int64_t base = int64_t(owner) * p.slots;
  Sums<G> sums;
  for (int split = first; split < last; ++split) {
    Sums<G> next;
    attend_split(w, s, queries, split, next);
    if (begins)
      fold(w, sums, next);
    else
      store(w, p.parts, p.part_stats, base + split - run.first, next);
  }
  if (!begins || last < run.last) {
    if (begins) store(w, p.parts, p.part_stats, base, sums);
    if (!last_to_arrive(w, owner, last - first, run.last - run.first)) return;
    // How far the one that begins the run came: where the next worker begins.
    const int next = snapped(w.deal, s, boundary(w.deal, owner + 1)), done = (next - at) / s.split;
    Sums<G> all;
    load(w, p.parts, p.part_stats, base, all);
    fold_stored<G>(w, p.parts, p.part_stats, base, done, run.last - run.first, all);
    sums = all;
  }
  finish_run(w, s, run, sums);
}

// ---- the whole ----

DEVICE void clear_empty_rows(const Params& p, int worker, int lane) {
  if (p.tokens != nullptr) return;
  for (int row = worker; row < p.rows; row += p.programs * kWarps)
    if (p.lens[row] == 0)
      for (int at = lane; at < p.heads * kHead / 8; at += 32)
        reinterpret_cast<uint4*>(p.out + int64_t(row) * p.heads * kHead)[at] = uint4{0, 0, 0, 0};
}

template <int G>
DEVICE void run(const Params& p, Shared& shared, int program, int thread) {
  const int warp = thread / 32, lane = thread % 32, number = program * kWarps + warp;
  Worker w{{shared.scratch[warp], lane, lane / 4, lane % 4, p.heads / p.kv_heads}, p, shared.ring[warp], shared.full[warp], number};
  if (lane == 0) {
    for (int slot = 0; slot < kSlots; ++slot) init_barrier(&w.full[slot], 1);
    publish_barriers();
  }
  sync_warp();
  Share share;
  const bool any = find_share(p, number, lane, w.deal, share);
  Cursor c = {};
  if (any) {
    c = w.ahead = cursor_of(p, share);
#pragma unroll 1
    for (int slot = 0; slot < kSlots; ++slot) fetch(w, slot);
  }
  clear_empty_rows(p, number, lane);
  int at = any ? share.begin : 0;
  while (c.left > 0) {
    Segment s{c.row, c.head, p.lens[c.row], c.tiles, 0, at - c.tile};
    s.split = split_of(s.length);
    const int tiles = least(c.tiles - c.tile, c.left), first = c.tile / s.split, last = (c.tile + tiles + s.split - 1) / s.split;
    uint4 queries[4];
    load_queries(w, s, queries);
    for (int split = first; split < last;) {
      const Run run = run_of(s, split);
      const int end = least(run.last, last);
      work_on<G>(w, s, run, queries, split, end);
      split = end;
    }
    at += tiles;
    advance(p, c, tiles);
  }
}

}  // namespace

#include "call.h"
