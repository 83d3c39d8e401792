// All layers of a dense decoder for one token of up to 8 rows, in one launch that never stops reading weights.
//
// One block a multiprocessor, as many blocks as share the work evenly; all of them live until the end, so they may wait
// for each other. Warps of their own fetch weights, keys and values through a ring in shared memory, across the ends of
// stages: they depend on nothing. Eight warps compute. A layer is five stages, each of which starts when all blocks have ended the one before:
// qkv, attention, o, gate and up, down. A product's rows are dealt out in units of 16 (the tensor core's), whole: no
// sum is split between blocks, and the eight warps' parts are added in their order, so a row's bits depend neither on the
// other rows nor on their number. Attention is split into runs of 64 keys, a slot of the ring and a warp each, always the
// same ones, merged in their order by whichever block ends the last.
//
// While the activations of a stage are on their way, what the ring holds of its weights goes to registers, and the ring takes
// more. Half-full slots, of a last unit by itself, may be on their way in twice the number: the memory wants so many bytes.
//
// RMS norms are split: who makes the residual stream also hands on x * norm weight and sums of squares; who reads that
// multiplies its sums by the rows' scales. Rotation and the norms of queries and keys are done where attention reads them.
//
// The final norm and the head, where they are asked for, are one more layer of which there is only the first product.
//
// Weights are of one kind, a library each: bf16, or as weights.h says. A slot's bytes are the same in all.
#ifndef JAXLLM_WEIGHTS
#define JAXLLM_WEIGHTS kBf16
#endif
#include "primitives.h"
#include "weights.h"

namespace {

#ifndef JAXLLM_DEPTH  // a benchmark may try others
#define JAXLLM_DEPTH (8192 / kBits)
#define JAXLLM_SLOTS 6
#endif
#ifndef JAXLLM_AHEAD
#define JAXLLM_AHEAD (kBits == 4 ? 2 : 4)
#endif
#ifndef JAXLLM_FLIGHT
#define JAXLLM_FLIGHT 2
#endif
#ifndef JAXLLM_HELD
#define JAXLLM_HELD (kKind == kBf16 ? 3 : kKind == kInt8 ? 2 : 1)
#endif
#ifndef JAXLLM_FETCHERS
#define JAXLLM_FETCHERS 4  // a warp issues a copy in some 36 ns: each lane's is an instruction of its own
#endif

constexpr int kRows = 8, kWarps = 8, kThreads = kWarps * 32, kMaxLayers = 80;
constexpr int kSplit = 64;  // keys of a run
constexpr int kFetchers = JAXLLM_FETCHERS, kAllThreads = kThreads + kFetchers * 32;
constexpr int kDepth = JAXLLM_DEPTH;     // columns of a slot
constexpr int kRowBytes = kDepth * kBits / 8, kPitch = kRowBytes + 64;  // odd multiples of 64, so that 8 lanes meet no bank twice
constexpr int kSlotRows = 2 * kUnit, kSlots = JAXLLM_SLOTS, kSlotBytes = kSlotRows * kPitch;
constexpr int kShare = kDepth / kWarps, kHalves = kShare / kChunk;  // a warp's columns of a slot
// Of packed weights a slot has pieces, in order of inputs, each of the one unit and then of the other; behind them int4's
// scales, [unit][group][16].
constexpr int kPieces = kDepth / kPieceInputs, kUnitScales = kDepth / kGroupInputs * kUnit * 2;
static_assert(!kPacked || 2 * kPieces * kPiece + (kByGroup ? 2 * kUnitScales : 0) <= kSlotBytes);
constexpr int kAhead = JAXLLM_AHEAD;    // slots whose activations are in registers
constexpr int kFlight = JAXLLM_FLIGHT;  // slots whose copies may be on their way at one time; half full, twice as many
// Fewer than all: a lane that waits for a slot's last copies would miss them when others of its warp already fill it again.
constexpr int kHalfFlight = 2 * kFlight < kSlots ? 2 * kFlight : kSlots - 1;
constexpr int kHeld = JAXLLM_HELD;      // slots whose weights are in registers before a stage begins
constexpr int kHeadPoint = 27;  // of a timeline: behind the stages' and attention's
constexpr int kMaxUnits = 8;          // of the residual stream that one block keeps
constexpr float kLog2e = 1.4426950408889634f;

using Stored = std::conditional_t<kKind == kBf16, uint16_t, unsigned char>;  // of a row's columns one each; of packed ones bytes

struct Layer {  // of the end: `qkv` is the head [V][D], `norms` the final one's weights
  const Stored *qkv, *o;
  const uint16_t* norms;
  const Stored *gate_up, *down;
  const uint16_t *qkv_bias, *o_bias, *qk_norms;
  uint16_t *k_pages, *v_pages;
};

struct Work {  // device memory; `counters` and `mixed` start as zeros
  uint32_t *begun, *ended, *attended, *arrived;  // [1], [L][4], [L], [L][rows * kv heads]
  uint16_t *mixed, *scaled, *hidden, *qkv;       // [8][NH], [8][D], [8][F], [8][R]
  float *squares, *parts, *stats;                // [programs][8]; [rows][K][splits][group][H]; the same with [group][2]
};

struct Params {
  Layer layers[kMaxLayers + 1];
  Work work;
  const uint16_t* x;  // [rows][D]
  uint16_t* out;      // [rows][D], or null
  float* logits;      // [rows][V]; where `out` is null
  const int *table, *lens;   // [rows][width], [rows]
  const float *cosines, *sines;  // [rows][H / 2]
  int num_layers, last_layer;  // the latter: of the products, with the head one more
  int V, rows, programs, D, F, heads, kv_heads, page_size, width, splits;
  float eps, scale;
  // Of each stage's weights: f32[outputs], or of int4 [groups][outputs] in bf16 or f16. A group is 64 inputs << group_shift.
  const void* scales[kKind == kBf16 ? 1 : kMaxLayers + 1][4];
  int group_shift, f16;
};

enum Stage { kQkv, kO, kGateUp, kDown };
constexpr int kHead = 128;

struct Shared {
  alignas(128) unsigned char ring[kSlots][kSlotBytes];
  alignas(16) float scratch[2][kWarps][2][kUnit][kRows];  // two groups' sums
  uint16_t residual[kMaxUnits * kUnit][kRows];
  float squares[kWarps][kRows], scales[kRows];
  uint64_t full[kSlots], empty[kSlots];
  bool done[kThreads];  // of each row and kv head: all its runs are there
};
static_assert(kSlots <= kWarps && kFlight <= kHalfFlight && 1 <= kHeld && kHeld <= kAhead);

struct alignas(16) Four {
  float values[4];
};

struct Product {
  const Stored* weights;
  int depth, rows, half;  // half: the row of W where `up` begins; 0 = rows as they are
  DEVICE int units() const { return (rows + kUnit - 1) / kUnit; }
  // 16 rows of packed weights. Of a gated product a unit of gate comes before what belongs to it in up.
  DEVICE int strip(int unit) const { return half == 0 ? unit : unit / 2 + unit % 2 * (half / kUnit); }
};

DEVICE Product product_of(const Params& p, int layer, Stage stage) {
  const Layer& l = p.layers[layer];
  switch (stage) {
    case kQkv: return {l.qkv, p.D, layer == p.num_layers ? p.V : (p.heads + 2 * p.kv_heads) * kHead, 0};
    case kO: return {l.o, p.heads * kHead, p.D, 0};
    case kGateUp: return {l.gate_up, p.D, 2 * p.F, p.F};
    default: return {l.down, p.F, p.D, 0};
  }
}

DEVICE int first_unit(const Params& p, int units, int program) { return program * units / p.programs; }

// Row of W behind row `row` of a unit. Of a gated product the first 8 are gate's, the others what belongs to them in up.
DEVICE int64_t weight_row(const Product& w, int unit, int row) {
  if (w.half == 0) return int64_t(unit) * kUnit + row;
  return int64_t(unit) * 8 + (row & 7) + (row >= 8 ? w.half : 0);
}

struct Range {
  int first, last;
};

// This block's units. Strips of gate and up are not parted.
DEVICE Range share_of(const Params& p, const Product& w, int program) {
  const int together = kPacked && w.half ? 2 : 1, all = w.units() / together;
  return {first_unit(p, all, program) * together, first_unit(p, all, program + 1) * together};
}

// ---- runs of keys ----

struct Unit {
  int row, head, split, splits, length;  // head: of keys and values
};

DEVICE int splits_of(int length) { return (length + kSplit - 1) / kSplit; }

// The unit-th run of keys over all rows, splits fastest.
DEVICE void find_unit(const Params& p, int unit, Unit& found) {
#pragma unroll 1
  for (int row = 0; row < p.rows; ++row) {
    const int length = p.lens[row], splits = splits_of(length), count = splits * p.kv_heads;
    if (unit < count) {
      found = {row, unit / splits, unit % splits, splits, length};
      return;
    }
    unit -= count;
  }
}

// This block's share of all runs, neighbours of each other.
DEVICE Range runs_of(const Params& p, int program) {
  int all = 0;
#pragma unroll 1
  for (int row = 0; row < p.rows; ++row) all += splits_of(p.lens[row]) * p.kv_heads;
  return {first_unit(p, all, program), first_unit(p, all, program + 1)};
}

// Where in a layer's pages a row's key or value lies.
DEVICE int64_t page_at(const Params& p, const Unit& unit, int key) {
  const int64_t page = p.table[unit.row * p.width + key / p.page_size];
  return ((page * p.kv_heads + unit.head) * p.page_size + key % p.page_size) * kHead;
}

// Keys 4i .. 4i + 3 of a run lie together in a slot, behind all keys the values likewise. Behind each four comes a gap, so
// that the eight lanes that read four keys of each of four such groups at one time meet no bank twice.
constexpr int kTogether = 4, kGroups = kSplit / kTogether, kGap = kTogether * kHead + 16;  // the last: numbers of bf16
static_assert(kSlotBytes >= 2 * kGroups * kGap * 2);
DEVICE int place_in(int key) { return key / kTogether * kGap + key % kTogether * kHead; }

// ---- copies ----

DEVICE int between(int least, int value, int most) { return value < least ? least : value > most ? most : value; }

// Where in the weights a slot is, and the one behind it.
struct Cursor {
  const Params& p;
  int program, layer, stage, unit, last, column;
  Product w;
  DEVICE Cursor(const Params& p, int program) : p(p), program(program), layer(0), stage(kQkv) { enter(); }
  DEVICE void enter() {  // the stage, or the first behind it in which this block has a share
    for (; there(); next_stage()) {
      w = product_of(p, layer, Stage(stage));
      const Range share = share_of(p, w, program);
      unit = share.first, last = share.last, column = 0;
      if (unit < last) return;
    }
  }
  DEVICE void next_stage() {
    if (++stage > kDown || layer == p.num_layers) stage = kQkv, ++layer;
  }
  DEVICE bool there() const { return layer <= p.last_layer; }
  DEVICE int rows() const { return between(0, w.rows - unit * kUnit, last - unit < 2 ? kUnit : 2 * kUnit); }
  DEVICE int columns() const { return w.depth - column < kDepth ? w.depth - column : kDepth; }
  DEVICE const Stored* row(int at) const { return w.weights + weight_row(w, unit + at / kUnit, at % kUnit) * w.depth + column; }
  // Of packed weights the number-th piece, of unit `unit + u`.
  DEVICE const Stored* piece(int u, int number) const {
    const int strip = w.strip(unit + u), across = w.depth / kPieceInputs;
    const int64_t tile = int64_t(strip / kTileUnits) * across + column / kPieceInputs + number;
    return w.weights + tile * kPieceStride + strip % kTileUnits * kPiece;
  }
  DEVICE bool neighbours() const {  // both units' pieces
    const int strip = w.strip(unit);
    return unit + 1 < last && w.strip(unit + 1) == strip + 1 && strip % kTileUnits != kTileUnits - 1;
  }
  DEVICE void advance() {
    column += kDepth;
    if (column < w.depth) return;
    column = 0, unit += 2;
    if (unit < last) return;
    next_stage();
    enter();
  }
};

struct Fetcher {  // one of the warps that fill the ring; together they do what is said below for 32 lanes
  static constexpr int kMine = kSlotRows / kFetchers;
  Shared& s;
  int number, lane;
  Cursor now;  // the weights that go to the next slot
  uint32_t filled = 0;

  DEVICE Fetcher(const Params& p, Shared& s, int program, int number, int lane)
      : s(s), number(number), lane(lane), now(p, program) {}

  // The next slot, once it is free; told how many bytes this warp will bring, and whether the slot will be half full.
  DEVICE int next(uint32_t bytes, bool half) {
    const int slot = filled % kSlots;
    if (filled >= kSlots) wait_for(&s.empty[slot], (filled / kSlots + 1) & 1);
    // More on their way than it takes would only make others' loads wait in the second-level cache.
    const uint32_t flight = half ? kHalfFlight : kFlight, before = filled - flight;
    if (filled >= flight) wait_for(&s.full[before % kSlots], before / kSlots & 1);
    if (lane == 0) expect_bytes(&s.full[slot], bytes);
    sync_warp();
    ++filled;
    return slot;
  }

  DEVICE void rows() {
    const int mine = between(0, now.rows() - number * kMine, kMine), bytes = now.columns() * kBits / 8, row = number * kMine + lane;
    const int slot = next(mine * bytes, now.rows() <= kUnit);
    if (lane < mine) copy_in(s.ring[slot] + row * kPitch, now.row(row), bytes, &s.full[slot]);
  }

  // Piece by piece, both units' in one copy where they are neighbours.
  DEVICE void pieces() {
    const bool both = now.neighbours(), one = now.rows() <= kUnit, parted = !both && !one;
    const int copies = now.columns() / kPieceInputs << parted, bytes = both ? 2 * kPiece : kPiece;
    const int mine = (copies - number + kFetchers - 1) / kFetchers, copy = lane * kFetchers + number;
    const int slot = next(mine * bytes, one), piece = copy >> parted, u = parted ? copy & 1 : 0;
    if (lane < mine) copy_in(s.ring[slot] + (2 * piece + u) * kPiece, now.piece(u, piece), bytes, &s.full[slot]);
    if constexpr (kByGroup) scales(slot);
  }

  // A lane's 8 of a slot's, and its arrival.
  DEVICE void scales(int slot) {
    const Params& p = now.p;
    constexpr int kGroupsMost = kDepth / kGroupInputs;
    const int at = number * 32 + lane, u = at / 2 / kGroupsMost, group = at / 2 % kGroupsMost, high = at % 2 * 8;
    if (u * kUnit < now.rows() && group < (now.columns() / kGroupInputs) >> p.group_shift) {
      const auto* from = static_cast<const uint16_t*>(p.scales[now.layer][now.stage]);
      const int64_t row = (now.column / kGroupInputs >> p.group_shift) + group;
      unsigned char* to = s.ring[slot] + 2 * kPieces * kPiece + u * kUnitScales + (group * kUnit + high) * 2;
      copy_16(to, from + row * now.w.rows + now.w.strip(now.unit + u) * kUnit + high);
    }
    arrive_with_copies(&s.full[slot]);
  }

  DEVICE void weights() {
    if constexpr (kPacked) pieces();
    else rows();
    now.advance();
  }
};
static_assert(!kPacked || 2 * kPieces <= 32 * kFetchers);
static_assert(!kByGroup || 4 * (kDepth / kGroupInputs) == 32 * kFetchers);

// Keys, then values, of this block's runs, 4 of them a copy: a page's are neighbours.
DEVICE void fetch_runs(const Params& p, Fetcher& f, const Layer& l, const Range& runs) {
  constexpr int kMine = 2 * kGroups / kFetchers, kBytes = kTogether * kHead * 2;
#pragma unroll 1
  for (int number = runs.first; number < runs.last; ++number) {
    Unit unit;
    find_unit(p, number, unit);
    const int first = unit.split * kSplit, there = between(0, (unit.length - first + kTogether - 1) / kTogether, kGroups);
    int mine = 0;
    for (int i = 0; i < kMine; ++i) mine += (f.number * kMine + i) % kGroups < there;
    const int slot = f.next(mine * kBytes, false), task = f.number * kMine + f.lane, group = task % kGroups;
    if constexpr (kByGroup) before_copy_in();  // scales were there
    if (f.lane < kMine && group < there) {
      uint16_t* to = reinterpret_cast<uint16_t*>(f.s.ring[slot]) + task * kGap;
      copy_in(to, (task < kGroups ? l.k_pages : l.v_pages) + page_at(p, unit, first + group * kTogether), kBytes, &f.s.full[slot]);
    }
    if constexpr (kByGroup) arrive_with_copies(&f.s.full[slot]);
  }
}

DEVICE void fetch(const Params& p, Shared& s, int program, int number, int lane) {
  Fetcher f(p, s, program, number, lane);
  const Range runs = runs_of(p, program);
#pragma unroll 1
  for (int layer = 0; layer <= p.last_layer; ++layer) {
    bool read = layer == p.num_layers;
#pragma unroll 1
    while (true) {  // qkv, runs, the others; some may be nothing
      if (!read && (f.now.layer != layer || f.now.stage != kQkv)) fetch_runs(p, f, p.layers[layer], runs), read = true;
      if (f.now.layer != layer) break;
      f.weights();
    }
  }
}

// ---- products ----

struct Reader {  // one of the eight warps'
  const Params& p;
  Shared& s;
  int program, warp, lane, g, t;
  uint32_t taken = 0;   // slots
  uint32_t parity = 0;  // of the scratch
  mutable int marked = 0;
};

// Of a timeline: which of a stage's points this is.
DEVICE void mark(const Reader& r, int point) { mark(r.program, r.warp * 32 + r.lane, r.marked++, point); }

// x[row g][column + 0..7] of the rows that are there, past the first-level cache: other blocks wrote it in this launch.
DEVICE uint4 activations(const Reader& r, const uint16_t* x, int depth, int column) {
  if (r.g >= r.p.rows || column >= depth) return uint4{0, 0, 0, 0};
  return load_fresh(reinterpret_cast<const uint4*>(x + int64_t(r.g) * depth + column));
}

// This warp's columns of x, of kAhead slots; where x is longer, each is replaced when it has been used.
struct Activations {
  uint4 held[kAhead][kHalves][kX];
  DEVICE void load(const Reader& r, const uint16_t* x, int depth, int i, int slot) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
#pragma unroll
      for (int part = 0; part < kX; ++part)
        held[i][h][part] = activations(r, x, depth, slot * kDepth + r.warp * kShare + r.t * 8 + h * kChunk + part * 32);
  }
  // With those of the next slot that needs the place of slot `used`, or of the next units.
  DEVICE void replace(const Reader& r, const uint16_t* x, int depth, int i, int used) {
    const int slots = (depth + kDepth - 1) / kDepth;
    if (slots > kAhead) load(r, x, depth, i, used + kAhead < slots ? used + kAhead : i);
  }
  DEVICE void load_all(const Reader& r, const uint16_t* x, int depth) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(r, x, depth, i, i);
  }
};

// This warp's h-th chunk of unit u in a slot, `column` the first of it.
DEVICE Chunk chunk_in(const Reader& r, const unsigned char* slot, int u, int h) {
  Chunk c;
  if constexpr (kPacked) {
    const int column = r.warp * kShare + h * kChunk;
    const unsigned char* at = slot + (2 * (column / kPieceInputs) + u) * kPiece + r.lane * 16;
    c.low = *reinterpret_cast<const uint4*>(at), c.high = *reinterpret_cast<const uint4*>(at + 2 * kPiece);
    if constexpr (kByGroup)
#pragma unroll
      for (int part = 0; part < kChunk / kGroupInputs; ++part) {
        const int group = (column / kGroupInputs + part) >> r.p.group_shift;
        const auto* scales = reinterpret_cast<const uint16_t*>(slot + 2 * kPieces * kPiece + u * kUnitScales) + group * kUnit;
        c.scales[part] = scales[r.g] | uint32_t(scales[r.g + 8]) << 16;
      }
  } else {
    const unsigned char* at = slot + (u * kUnit + r.g) * kPitch + (r.warp * kShare + h * kChunk) * kBits / 8 + r.t * 16;
    c.low = *reinterpret_cast<const uint4*>(at), c.high = *reinterpret_cast<const uint4*>(at + 8 * kPitch);
  }
  return c;
}

// Of this warp's columns of the next slot, the number-th of these units: use(r, unit, half, chunk), then it is free.
template <typename Use>
DEVICE void take_slot(Reader& r, const Product& w, int number, int units, Use use) {
  const int slot = r.taken % kSlots, column = number * kDepth + r.warp * kShare;
  wait_for(&r.s.full[slot], (r.taken / kSlots) & 1);
  if (column < w.depth)
#pragma unroll
    for (int u = 0; u < 2; ++u)
      if (u < units)
#pragma unroll
        for (int h = 0; h < kHalves; ++h)
          if (kShare <= 64 || column + h * kChunk < w.depth) use(r, u, h, chunk_in(r, r.s.ring[slot], u, h));
  sync_warp();
  if (r.lane == 0) arrive(&r.s.empty[slot]);
  ++r.taken;
}

// The first slots of a stage, taken while what they are multiplied with is on its way: so much more of the next fits in the
// ring. Zeros where there is nothing: what is never written would keep its registers through the whole kernel.
struct Held {
  Chunk chunks[kHeld][2][kHalves] = {};
  DEVICE void take(Reader& r, const Product& w, int units) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (i * kDepth < w.depth) take_slot(r, w, i, units, [&](const Reader&, int u, int h, const Chunk& c) { chunks[i][u][h] = c; });
  }
  DEVICE void times(const Reader& r, const Product& w, const uint16_t* x, Activations& ahead, float (&acc)[2][4]) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int h = 0; h < kHalves; ++h) multiply(r, acc[u], chunks[i][u][h], ahead.held[i][h]);
      ahead.replace(r, x, w.depth, i, i);
    }
  }
};

// W[units][depth] @ x, this warp's columns of every slot from the done-th, and what is done, into the scratch of this group.
// Leaves `ahead` as it came, and nothing done.
DEVICE void accumulate(Reader& r, const Product& w, const uint16_t* x, Activations& ahead, int units, float (&acc)[2][4], int done) {
  const int slots = (w.depth + kDepth - 1) / kDepth;
#pragma unroll 1
  for (int base = 0; base < slots; base += kAhead)
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i >= slots) break;
      if (i < kHeld && base + i < done) continue;
      take_slot(r, w, base + i, units, [&](const Reader& r, int u, int h, const Chunk& c) { multiply(r, acc[u], c, ahead.held[i][h]); });
      ahead.replace(r, x, w.depth, i, base + i);
    }
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    float(*to)[kRows] = r.s.scratch[r.parity][r.warp][u];
    to[r.g][2 * r.t] = acc[u][0], to[r.g][2 * r.t + 1] = acc[u][1];
    to[r.g + 8][2 * r.t] = acc[u][2], to[r.g + 8][2 * r.t + 1] = acc[u][3];
    acc[u][0] = acc[u][1] = acc[u][2] = acc[u][3] = 0.f;
  }
}

// The sum of the eight warps' parts of one output, in their order.
DEVICE float summed(const Reader& r, int unit, int row, int b) {
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += r.s.scratch[r.parity][w][unit][row][b];
  return sum;
}

// A block's columns of the residual stream, with what the next norm needs of them: handed on in `scaled`, squares returned.
DEVICE float hand_on(const Reader& r, bool normed, uint16_t norm, int kept, int column, int b, float value) {
  const uint16_t narrow_ = narrow(value);
  const float rounded = wide(narrow_);
  r.s.residual[kept][b] = narrow_;
  if (normed)
    r.p.work.scaled[int64_t(b) * r.p.D + placed(column)] = narrow(rounded * wide(norm));
  else
    r.p.out[int64_t(b) * r.p.D + column] = narrow_;
  return rounded * rounded;
}

// All warps' squares of this block, to device memory. Before the end of a stage is signalled.
DEVICE void publish_squares(const Reader& r, float squares) {
  squares += shuffle_xor(squares, 8);
  squares += shuffle_xor(squares, 16);
  if (r.lane < kRows) r.s.squares[r.warp][r.lane] = squares;
  sync_computing();
  if (r.warp == 0 && r.lane < kRows) {
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += r.s.squares[w][r.lane];
    r.p.work.squares[r.program * kRows + r.lane] = sum;
  }
}

DEVICE void end_stage(const Reader& r, uint32_t* counter, uint32_t amount = 1) {
  sync_computing();
  if (r.warp == 0) {
    sync_warp();
    if (r.lane == 0) signal(counter, amount);
  }
}

DEVICE void begin_stage(const Reader& r, const uint32_t* counter, uint32_t count) {
  if (r.warp == 0 && r.lane == 0) await(counter, count);
  sync_computing();
}

// 1 / rms of row `warp`, from the squares of all blocks; every lane loads early and the sum is made when it is needed.
struct Scale {
  float part = 0.f;
  DEVICE void load(const Reader& r) {
    for (int i = r.lane; i < r.p.programs; i += 32) part += load_fresh(&r.p.work.squares[i * kRows + r.warp]);
  }
  DEVICE void publish(const Reader& r) {
    float sum = part;
    for (int mask = 16; mask; mask >>= 1) sum += shuffle_xor(sum, mask);
    if (r.lane == 0) r.s.scales[r.warp] = reciprocal_root(sum / r.p.D + r.p.eps);
  }
};

DEVICE void run_product(Reader& r, int layer, Stage stage, const uint32_t* before, uint32_t count) {
  const Params& p = r.p;
  const Layer& l = p.layers[layer];
  const Product w = product_of(p, layer, stage);
  const Range share = share_of(p, w, r.program);
  const int begin = share.first, end = share.last;
  const bool head = layer == p.num_layers;
  const int points = head ? kHeadPoint : 5 * stage;
  const bool normed = stage == kQkv || stage == kGateUp, sums = !normed;
  const uint16_t* x = stage == kO ? p.work.mixed : stage == kDown ? p.work.hidden : p.work.scaled;
  const uint16_t* next = stage == kO ? l.norms + p.D
                         : stage == kDown && layer < p.last_layer ? p.layers[layer + 1].norms : nullptr;
  const uint16_t* biases = stage == kQkv ? l.qkv_bias : stage == kO ? l.o_bias : nullptr;
  const int thread = r.warp * 32 + r.lane, u = thread / 128, row = thread / 8 % kUnit, b = thread % kRows;
  mark(r, points);
  Held held;
  if (begin < end) held.take(r, w, end - begin < 2 ? 1 : 2);
  begin_stage(r, before, count);
  mark(r, points + 1);
  Activations ahead;
  ahead.load_all(r, x, w.depth);
  Scale scale;
  if (normed) scale.load(r);
  float acc[2][4] = {};
  held.times(r, w, x, ahead, acc);
  float squares = 0.f;
#pragma unroll 1
  for (int unit = begin; unit < end; unit += 2) {
    const int units = end - unit < 2 ? 1 : 2, column = (unit + u) * kUnit + row;
    const bool there = u < units && b < p.rows;
    const float bias = there && biases != nullptr ? wide(biases[column]) : 0.f;
    const uint16_t norm = there && next != nullptr ? next[column] : 0;
    const int hidden = kPacked ? unit / 2 * kUnit + row : (unit + u) * 8 + row;  // of this row of gate
    const bool gated = stage == kGateUp, gate_row = kPacked ? u == 0 : row < 8;
    float factor = 1.f, up_factor = 1.f;
    if (kByOutput && there && (gated ? gate_row : column < w.rows)) {
      const auto* scales = static_cast<const float*>(p.scales[layer][stage]);
      factor = scales[gated ? hidden : column];
      if (gated) up_factor = scales[p.F + hidden];
    }
    auto sum_of = [&](int u, int row, float factor) { return kByOutput ? summed(r, u, row, b) * factor : summed(r, u, row, b); };
    accumulate(r, w, x, ahead, units, acc, unit == begin ? kHeld : 0);
    if (normed && unit == begin) scale.publish(r);
    sync_computing();
    if (unit == begin) mark(r, points + 2);
    if (there && gated && gate_row) {
      const float gate = sum_of(u, row, factor) * r.s.scales[b];
      const float up = (kPacked ? sum_of(1, row, up_factor) : sum_of(u, row + 8, up_factor)) * r.s.scales[b];
      p.work.hidden[int64_t(b) * p.F + placed(hidden)] = narrow(gate / (1.f + exp_(-gate)) * up);
    } else if (there && head) {
      if (column < p.V) p.logits[int64_t(b) * p.V + column] = sum_of(u, row, factor) * r.s.scales[b];
    } else if (there && stage == kQkv) {
      const int wide_ = (p.heads + 2 * p.kv_heads) * kHead;
      p.work.qkv[int64_t(b) * wide_ + column] = narrow(sum_of(u, row, factor) * r.s.scales[b] + bias);
    } else if (there && sums) {
      const int kept = (unit - begin + u) * kUnit + row;
      const float value = wide(r.s.residual[kept][b]) + (sum_of(u, row, factor) + bias);
      squares += hand_on(r, next != nullptr, norm, kept, column, b, value);
    }
    r.parity ^= 1;
  }
  if (sums) publish_squares(r, squares);
  mark(r, points + 3);
  if (!head) end_stage(r, &p.work.ended[layer * 4 + stage]);
  mark(r, points + 4);
}

DEVICE void begin_residual(Reader& r) {
  const Params& p = r.p;
  const int units = p.D / kUnit, begin = first_unit(p, units, r.program), end = first_unit(p, units, r.program + 1);
  const int thread = r.warp * 32 + r.lane, b = thread % kRows;
  float squares = 0.f;
  for (int kept = thread / kRows; kept < (end - begin) * kUnit; kept += kThreads / kRows) {
    if (b >= p.rows) continue;
    const int column = begin * kUnit + kept;
    squares += hand_on(r, true, p.layers[0].norms[column], kept, column, b, wide(p.x[int64_t(b) * p.D + column]));
  }
  publish_squares(r, squares);
  end_stage(r, p.work.begun);
}

}  // namespace

#include "attention.h"

namespace {

// ---- the whole ----

DEVICE void run(const Params& p, Shared& s, int program, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  if (thread == 0) {
    for (int slot = 0; slot < kSlots; ++slot) init_barrier(&s.full[slot], kFetchers * (kByGroup ? 33 : 1)), init_barrier(&s.empty[slot], kWarps);
    publish_barriers();
  }
  sync_all();
  if (warp >= kWarps) {
    if (kFetchers == 4) give_registers<72>();  // four warps give and take them together
    fetch(p, s, program, warp - kWarps, lane);
    return;
  }
  if (kFetchers == 4) take_registers<216>();
  Reader r{p, s, program, warp, lane, lane / 4, lane % 4};
  const Range runs = runs_of(p, program);
  const Due due(p, thread, runs);
  uint32_t merges = 0;
#pragma unroll 1
  for (int row = 0; row < p.rows; ++row) merges += p.lens[row] > 0 ? p.kv_heads : 0;
  begin_residual(r);
  // One copy of the code for all products: a layer's instructions should stay in the multiprocessor's cache.
  const uint32_t *before = p.work.begun, *ended = p.work.ended;
#pragma unroll 1
  for (int layer = 0; layer <= p.last_layer; ++layer)
#pragma unroll 1
    for (int stage = kQkv; stage <= (layer == p.num_layers ? kQkv : kDown); ++stage, before = ended++) {
      if (stage == kO) run_attention(r, layer, runs, due);
      const bool attended = stage == kO;
      run_product(r, layer, Stage(stage), attended ? &p.work.attended[layer] : before, attended ? merges : p.programs);
    }
}

}  // namespace

#include "launch.h"
