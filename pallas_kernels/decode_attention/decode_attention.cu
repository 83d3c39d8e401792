// Attention of one query a row over paged keys and values, by warps that never stop reading.
//
// One block a multiprocessor. Every warp is a worker of its own: it asks the copy engine for 32 keys or values of one head
// at a time (8 KiB, 16 keys of them contiguous), into its own ring in shared memory, and takes them in order: keys of up to
// 64, then their values. Nothing in the loop waits for another warp. Both products are the tensor cores': [queries x columns]
// x [columns x keys], and [columns x keys] x [keys x queries], for which probabilities are split into two bf16 that together
// have 16 bits.
//
// A row's keys are cut into splits, at most kSplits of them, whose length depends on the row's own length only. What a
// head's splits give is folded in order: kRun splits make a run (all of them do if there are at most kWhole), runs make the
// row. The fold is one formula wherever it happens, in registers or from memory, so a row's bits depend neither on other
// rows nor on how many workers there are.
//
// Work is counted in tiles of 32 keys over all rows and heads; worker w of W has the splits that begin in its W-th share.
// So a warp has whole runs, which stay in registers, and at most two cut ones. Of a cut run the worker that has its beginning
// leaves the fold so far, the others each split's result; whoever counts up last folds them.
#include <string>

#include "../decode_layers/primitives.h"

namespace {

#ifndef JAXLLM_WARPS  // a benchmark may try others
#define JAXLLM_WARPS 8
#define JAXLLM_SLOTS 3
#endif
#ifndef JAXLLM_SPLIT
#define JAXLLM_SPLIT 64
#endif

constexpr int kHead = 128, kTile = 32, kUnit = 16, kWarps = JAXLLM_WARPS, kThreads = kWarps * 32, kSlots = JAXLLM_SLOTS;
constexpr int kChunk = 2;  // tiles whose scores are known before values are read
constexpr int kRowBytes = kHead * 2, kPart = 8, kPartBytes = kPart * kRowBytes;  // keys of a copy
constexpr int kPitch = kPartBytes + 64, kSlotBytes = kTile / kPart * kPitch;     // from copy to copy: other banks
constexpr int kSplit = JAXLLM_SPLIT, kWorkers = kWarps, kComputing = kThreads;

}  // namespace

#include "dealing.h"

namespace {

struct Shared {
  alignas(128) unsigned char ring[kWarps][kSlots][kSlotBytes];
  alignas(16) uint16_t queries[kWarps][kMaxGroup][kHead];
  uint64_t full[kWarps][kSlots];
};

// ---- the ring ----

struct Lane {
  int lane, g, t, group;
};

struct Worker : Lane {
  const Params& p;
  unsigned char (*ring)[kSlotBytes];
  uint64_t* full;
  uint16_t (*queries)[kHead];
  int number;
  Deal deal;
  Cursor ahead;            // the chunk that is being fetched
  int step = 0;            // tiles of it that have been asked for: keys, then values
  int pages = 0;           // lane i: page of unit `window` + i of row `window_row`
  int window_row = -1, window = 0;
  int slot = 0;            // taken next
  uint32_t phase = 0;
};

// The next tile into a slot that nobody reads any more; what lies behind the row's last unit stays as it is.
DEVICE void fetch(Worker& w, int slot) {
  const Params& p = w.p;
  Cursor& c = w.ahead;
  if (c.left == 0) return;
  const int tiles = least(tiles_of(c.length) - c.tile, kChunk), units = (c.length + kUnit - 1) / kUnit;
  const int first = c.tile * (kTile / kUnit);
  if (c.row != w.window_row || first < w.window || first + kChunk * (kTile / kUnit) > w.window + 32) {
    w.window_row = c.row, w.window = first;
    w.pages = first + w.lane < units ? p.table[int64_t(c.row) * p.width + ((first + w.lane) >> p.page_shift)] : 0;
  }
  const bool values = w.step >= tiles;
  const int from = first + (w.step - (values ? tiles : 0)) * (kTile / kUnit), there = least(units - from, kTile / kUnit);
  const int unit = from + w.lane / 2 % (kTile / kUnit), page = shuffle(w.pages, unit - w.window);
  if (w.lane == 0) expect_bytes(&w.full[slot], there * 2 * kPartBytes);
  sync_warp();
  if (w.lane < 2 * there) {
    const int64_t head = (int64_t(page) * p.kv_heads + c.head) << p.page_shift;
    const int64_t place = ((head + (unit & ((1 << p.page_shift) - 1))) * 2 + w.lane % 2) * kPart * kHead;
    copy_in(w.ring[slot] + w.lane * kPitch, (values ? p.v_pages : p.k_pages) + place, kPartBytes, &w.full[slot]);
  }
  if (++w.step < 2 * tiles) return;
  w.step = 0;
  advance(p, c, tiles);
}

// Where a key, or value, of a tile lies in its slot.
DEVICE unsigned char* row_of(unsigned char* slot, int key) { return slot + key / kPart * kPitch + key % kPart * kRowBytes; }

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

}  // namespace

#include "heads.h"

namespace {

// ---- queries, new keys and values ----

// This lane's part of the group's queries: columns 32c + 8t .. of query g.
DEVICE void load_queries(Worker& w, const Segment& s, uint4 (&queries)[4]) {
  const Params& p = w.p;
  const int group = w.group;
  const uint16_t* from;
  if (p.q != nullptr) {
    const int token = p.tokens == nullptr ? s.row : p.tokens[s.row];
    from = p.q + (int64_t(token) * p.heads + s.head * group + w.g) * kHead;
  } else {
    make_queries(p, s.row, s.head * group, group, w.lane, w.queries);
    from = w.queries[w.g];
  }
#pragma unroll
  for (int c = 0; c < 4; ++c)
    queries[c] = w.g < group ? *reinterpret_cast<const uint4*>(from + c * 32 + w.t * 8) : uint4{0, 0, 0, 0};
  sync_warp();  // the same memory holds the next segment's
}

DEVICE int64_t last_place(const Params& p, const Segment& s) {  // where the row's last key and value go
  const int at = s.length - 1;
  const int64_t page = p.table[int64_t(s.row) * p.width + (at / kUnit >> p.page_shift)], page_size = kUnit << p.page_shift;
  return ((page * p.kv_heads + s.head) * page_size + at % page_size) * kHead;
}

// The row's new key, or value, to its page and to the slot: the copy may have brought what was in the page before.
SELDOM void enter(const Params& p, const Segment& s, int lane, unsigned char* slot, bool value) {
  Head head;
  head.project(p, s.row, p.heads + s.head + (value ? p.kv_heads : 0), lane);
  const int64_t place = last_place(p, s);
  if (!value) Turn(p, s.row, lane, p.norms == nullptr ? nullptr : p.norms + kHead).apply(p, head);
  head.store((value ? p.v_pages : p.k_pages) + place, lane);
  head.store(reinterpret_cast<uint16_t*>(row_of(slot, (s.length - 1) % kTile)), lane);
  before_copy_in();
  sync_warp();
}

// ---- sums ----

// Of a group's queries. A lane has the statistics of head g, and of heads 2t and 2t + 1 the columns 8g .. 8g + 7 of both
// halves: column 64 i + 8g + 2j is out[4 i + j][head], the one behind it out[4 i + j][2 + head].
struct Sums {
  float most = -INFINITY, total = 0.f, out[8][4] = {};
};

// What lanes know of heads g, for this lane's two.
struct Two {
  float of[2];
  DEVICE Two(const Lane& w, float mine) {
#pragma unroll
    for (int h = 0; h < 2; ++h) of[h] = from_lane(mine, 4 * (2 * w.t + h));
  }
};

DEVICE void shrink(Sums& sums, const Two& by) {
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums.out[j][i] = times(sums.out[j][i], by.of[i % 2]);
}

// Sums of what came before and of what comes next as one. All folds are this.
DEVICE void fold(const Lane& w, Sums& sums, const Sums& next) {
  const float most = larger(sums.most, next.most), a = exp2_(sums.most - most), b = exp2_(next.most - most);
  sums.total = fused(next.total, b, times(sums.total, a)), sums.most = most;
  shrink(sums, Two(w, a));
  const Two by(w, b);
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums.out[j][i] = fused(next.out[j][i], by.of[i % 2], sums.out[j][i]);
}

// The keys of a product are these 8 of pair `pair` of a tile's parts: neighbours in n lie on different banks. Those of
// `low` 0 and 1 together are what a product over keys takes.
DEVICE int key_of(int pair, int low, int n) { return (2 * pair + n % 2) * kPart + 4 * low + n / 2; }

// Scores of query g and the keys 2t and 2t + 1 of each eight.
DEVICE void score(const Worker& w, const uint4 (&queries)[4], unsigned char* keys, float (&scores)[4][2]) {
  float sums[4][4] = {};
#pragma unroll
  for (int c = 0; c < 4; ++c)
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const uint4 key = *reinterpret_cast<const uint4*>(row_of(keys, key_of(u / 2, u % 2, w.g)) + w.t * 16 + c * 64);
      // The columns of a lane's 16 bytes are in the same places on both sides, so their order does not matter.
      mma(sums[u], queries[c].x, 0, queries[c].y, 0, key.x, key.y);
      mma(sums[u], queries[c].z, 0, queries[c].w, 0, key.z, key.w);
    }
#pragma unroll
  for (int u = 0; u < 4; ++u) scores[u][0] = sums[u][0], scores[u][1] = sums[u][1];
}

// Scores to probabilities, not yet divided by their total. What came before shrinks to the new maximum.
DEVICE void exponentials(const Worker& w, int live, float (&scores)[kChunk][4][2], Sums& sums) {
  float most = sums.most, total = 0.f;
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
#pragma unroll
    for (int u = 0; u < 4; ++u)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& score = scores[i][u][h];
        score = i * kTile + key_of(u / 2, u % 2, 2 * w.t + h) < live ? times(score, w.p.scale) : -INFINITY;
        most = larger(most, score);
      }
  for (int mask = 1; mask < 4; mask <<= 1) most = larger(most, shuffle_xor(most, mask));
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
#pragma unroll
    for (int u = 0; u < 4; ++u)
#pragma unroll
      for (int h = 0; h < 2; ++h) total += scores[i][u][h] = exp2_(scores[i][u][h] - most);
  const float by = exp2_(sums.most - most);
  sums.total = fused(sums.total, by, total), sums.most = most;
  shrink(sums, Two(w, by));
}

DEVICE uint4 value_of(unsigned char* values, int key, int column, bool there) {
  return there ? *reinterpret_cast<const uint4*>(row_of(values, key) + column * 2) : uint4{0, 0, 0, 0};
}

// Two probabilities as two bf16 each: rounded, and what is then missing.
DEVICE void split_in_two(const float (&p)[2], uint32_t& high, uint32_t& low) {
  high = narrow(p[0], p[1]);
  low = narrow(p[0] - wide(uint16_t(high)), p[1] - wide(uint16_t(high >> 16)));
}

// A tile's values times its probabilities. A register of the tensor core's first operand has two keys of one column, so
// pairs are made of two rows. Lanes with odd t read them the other way round, for the banks.
DEVICE void add_values(const Worker& w, unsigned char* values, const float (&p)[4][2], int live, Sums& sums) {
  const int odd = w.t % 2;
  const uint32_t firsts = odd ? 0x1054 : 0x5410, seconds = odd ? 0x3276 : 0x7632;  // of a pair of columns
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t high[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) split_in_two(p[2 * pair + i], high[i], low[i]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      union {
        uint4 row;
        uint32_t pair[4];
      } x[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = key_of(pair, i, 2 * w.t + (odd ^ j));
          x[i][j].row = value_of(values, key, half * 64 + w.g * 8, key < live);
        }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t a0 = bytes_of(x[0][0].pair[j], x[0][1].pair[j], firsts), a1 = bytes_of(x[0][0].pair[j], x[0][1].pair[j], seconds);
        const uint32_t a2 = bytes_of(x[1][0].pair[j], x[1][1].pair[j], firsts), a3 = bytes_of(x[1][0].pair[j], x[1][1].pair[j], seconds);
        mma(sums.out[half * 4 + j], a0, a1, a2, a3, high[0], high[1]);
        mma(sums.out[half * 4 + j], a0, a1, a2, a3, low[0], low[1]);
      }
    }
  }
}

DEVICE void move_up(float (&scores)[kChunk][4][2], const float (&last)[4][2]) {
#pragma unroll
  for (int u = 0; u < 4; ++u)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float kept = last[u][h];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) scores[i][u][h] = i + 1 < kChunk ? scores[i + 1][u][h] : kept;
    }
}

// Up to 64 keys and values of a split, beginning with tile `first`. Totals stay apart in the lanes until the split ends.
DEVICE void attend(Worker& w, const Segment& s, const uint4 (&queries)[4], int first, Sums& sums) {
  const int tiles = least(s.tiles - first, kChunk), live = s.length - first * kTile;
  const bool enters = w.p.q == nullptr && first + tiles == s.tiles;
  float scores[kChunk][4][2] = {};
#pragma unroll 1
  for (int i = 0; i < kChunk; ++i) {  // one copy of the code: each tile's are moved to their place
    float own[4][2] = {};
    if (i < tiles) {
      unsigned char* keys = take(w);
      if (enters && i == tiles - 1) enter(w.p, s, w.lane, keys, false);
      score(w, queries, keys, own);
      give_back(w);
    }
    move_up(scores, own);
  }
  exponentials(w, live, scores, sums);
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    unsigned char* values = take(w);
    if (enters && i == tiles - 1) enter(w.p, s, w.lane, values, true);
    add_values(w, values, scores[0], live - i * kTile, sums);
    give_back(w);
    move_up(scores, scores[0]);
  }
}

DEVICE void attend_split(Worker& w, const Segment& s, const uint4 (&queries)[4], int split, Sums& sums) {
  const int last = least((split + 1) * s.split, s.tiles);
#pragma unroll 1
  for (int first = split * s.split; first < last; first += kChunk) attend(w, s, queries, first, sums);
  for (int mask = 1; mask < 4; mask <<= 1) sums.total += shuffle_xor(sums.total, mask);
}

// ---- runs ----

DEVICE void store(const Lane& w, float* to, float* stats, int64_t at, const Sums& sums) {
  to += at * w.group * kHead + w.g * 8, stats += at * w.group * 2;
  if (w.t == 0 && w.g < w.group) stats[2 * w.g] = sums.most, stats[2 * w.g + 1] = sums.total;
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (2 * w.t + h < w.group)
#pragma unroll
      for (int j = 0; j < 8; j += 2)
        *reinterpret_cast<float4*>(to + (2 * w.t + h) * kHead + j / 4 * 64 + j % 4 * 2) = {sums.out[j][h], sums.out[j][2 + h],
                                                                                          sums.out[j + 1][h], sums.out[j + 1][2 + h]};
}

DEVICE void load(const Lane& w, const float* from, const float* stats, int64_t at, Sums& sums) {
  from += at * w.group * kHead + w.g * 8, stats += at * w.group * 2;
  const float2 known = w.g < w.group ? load_fresh(reinterpret_cast<const float2*>(stats + 2 * w.g)) : float2{0, 1};
  sums.most = known.x, sums.total = known.y;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float* own = from + (2 * w.t + h) * kHead + j / 4 * 64 + j % 4 * 2;
      const float4 four = 2 * w.t + h < w.group ? load_fresh(reinterpret_cast<const float4*>(own)) : float4{0, 0, 0, 0};
      sums.out[j][h] = four.x, sums.out[j][2 + h] = four.y, sums.out[j + 1][h] = four.z, sums.out[j + 1][2 + h] = four.w;
    }
}

// Stored results first .. last - 1, folded in order; some of them are on their way at a time.
SELDOM void fold_stored(const Lane w, const float* from, const float* stats, int64_t base, int first, int last, Sums& start) {
  constexpr int kBatch = kWarps > 8 ? 1 : 3;
  Sums sums = start;  // in registers
  for (int at = first; at < last; at += kBatch) {
    Sums next[kBatch];
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
    last = count_up(&arrivals[here()][counter], uint32_t(by)) + by == uint32_t(all);
    if (last) arrivals[here()][counter] = 0;
  }
  return shuffle(last, 0) != 0;
}

DEVICE void write_out(Worker& w, const Segment& s, const Sums& sums) {
  const Params& p = w.p;
  const int token = p.tokens == nullptr ? s.row : p.tokens[s.row];
  const Two share(w, 1.f / sums.total);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int head = 2 * w.t + h;
    if (head >= w.group) continue;
    uint16_t* to = p.out + (int64_t(token) * p.heads + s.head * w.group + head) * kHead + w.g * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float(&out)[4] = sums.out[half * 4 + j];
        pairs[j] = narrow(out[h] * share.of[h], out[2 + h] * share.of[h]);
      }
      *reinterpret_cast<uint4*>(to + half * 64) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }
}

// A run is done: the row, if it is its only one or the last to arrive.
DEVICE void finish_run(Worker& w, const Segment& s, const Run& run, Sums& sums) {
  const Params& p = w.p;
  if (run.runs > 1) {
    const int segment = s.row * p.kv_heads + s.head;
    const int64_t base = int64_t(segment) * p.most_runs;
    store(w, p.runs, p.run_stats, base + run.number, sums);
    if (!last_to_arrive(w, kMaxWorkers + segment, 1, run.runs)) return;
    Sums all;
    fold_stored(w, p.runs, p.run_stats, base, 0, run.runs, all);
    sums = all;
  }
  write_out(w, s, sums);
}

// The splits first .. last - 1 of a run, all that this worker has of it.
DEVICE void work_on(Worker& w, const Segment& s, const Run& run, const uint4 (&queries)[4], int first, int last) {
  const Params& p = w.p;
  const int at = s.base + run.first * s.split;
  const bool begins = first == run.first;
  const int owner = begins ? w.number : owner_of(w.deal, s, at);
  const int64_t base = int64_t(owner) * p.slots;
  Sums sums;
  for (int split = first; split < last; ++split) {
    Sums next;
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
    Sums all;
    load(w, p.parts, p.part_stats, base, all);
    fold_stored(w, p.parts, p.part_stats, base, done, run.last - run.first, all);
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

DEVICE void run(const Params& p, Shared& shared, int program, int thread) {
  const int warp = thread / 32, lane = thread % 32, number = program * kWarps + warp;
  Worker w{{lane, lane / 4, lane % 4, p.heads / p.kv_heads}, p, shared.ring[warp], shared.full[warp], shared.queries[warp], number};
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
    Segment s{c.row, c.head, c.length, tiles_of(c.length), 0, at - c.tile};
    s.split = split_of(s.length);
    const int tiles = least(s.tiles - c.tile, c.left), first = c.tile / s.split, last = (c.tile + tiles + s.split - 1) / s.split;
    uint4 queries[4];
    load_queries(w, s, queries);
    for (int split = first; split < last;) {
      const Run run = run_of(s, split);
      const int end = least(run.last, last);
      work_on(w, s, run, queries, split, end);
      split = end;
    }
    at += tiles;
    advance(p, c, tiles);
  }
}

using Call = Params;
std::string map_pages(Call&, int64_t) { return ""; }  // the copy engine is told addresses
constexpr int kBlocksAtOnce = 1;

}  // namespace

#include "call.h"
