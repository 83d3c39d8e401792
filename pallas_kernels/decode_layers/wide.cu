// All layers of a dense decoder for one token each of up to 128 rows, in one kernel whose blocks all run at one time.
//
// decode_layers.cu does the same for up to 8 rows with warps' tensor cores; here a layer is warpgroup.h's attention and the four
// products of decode_chain.cu, which begin with what follows the attention and end with the next layer's qkv. Weights, keys and
// values come through one ring in shared memory, in the order in which they are used, as far ahead as there is room: across the
// ends of stages and layers, since none of them depends on anything.
//
// A product is out[m][n] = sum over k of x[m][k] * w[n][k]. A block takes tiles of 128 rows of w, the tensor cores' left
// operand, and all rows of x, the right one; both come in blocks of 64 of k. Two neighbouring blocks are a cluster with tiles
// side by side, each of which loads half of x for both. Of a narrow product each tile is cut into splits of k; blocks give their
// sums to memory, and each adds up all splits, first to last, for a share of the rows. A sum itself says that it is there: what
// nobody wrote yet is zero, and whoever has read puts the zero back.
//
// In an attention the two warpgroups of a block are two workers; their tiles stand in the ring in turns.
//
// An RMS norm is split: the stage that makes x also writes x * weight and the sums of squares of its columns; the stage that
// reads it scales its sums. Gate and up stand in turns of eight rows in a tile, so that one thread has both of a column.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#ifndef JAXLLM_ROW_ROOM  // KiB of x on their way; a benchmark may try others
#define JAXLLM_ROW_ROOM 64
#endif

#include "../decode_attention/warpgroup.h"
#include "ends.h"

namespace {

constexpr int kMostLayers = 37, kAttention = 4;  // the latter: its signal, behind the stages'
constexpr int kMostRows = 128, kStages = 4, kMostTiles = 512;
constexpr int kMostWeightSlots = 12, kMostRowSlots = 12;
constexpr int kSharedBytes = 227 * 1024, kMostBlocks = 160;
// A block begins with 65,536 / 384 registers a thread, in eights; asking for more in all than these waits for ever.
constexpr int kComputingRegisters = 208, kOtherRegisters = 88;
static_assert(2 * kComputingRegisters + kOtherRegisters <= 3 * (65536 / kBlockThreads / 8 * 8));

struct Stage {  // o, gate and up, down, the next layer's qkv: what is alike in all layers
  TileMap x;
  const float* squares_in;   // [kMostRows, kMostSums], of the second and the fourth: sums of squares of x's rows, tile by tile
  const uint16_t* residual;  // [M, N], of kResidual; the first layer's first stage has another
  uint16_t *out, *scaled;    // [M, N]
  float* squares;            // [kMostRows, kMostSums]
  int N, K;                  // kGated: N columns out, 2N rows of the weight
  int kind, tiles_in, splits;
  int units;  // of work, for a cluster: pairs of tiles * splits
};

struct Maps {  // of a layer: the stages' weights, of which the last layer has three; the pages as warpgroup.h takes them
  TileMap weights[kStages], keys, values;
};

struct Layer {
  const uint16_t *o_bias, *qkv_bias;         // [N] or null
  const uint16_t *middle_norm, *next_norm;   // [D]: what o and down scale for the stage behind them; the last layer has one
  const uint16_t *qk_norms;                  // [2][H] or null
  uint16_t *k_pages, *v_pages;
};

struct Steps {
  Maps maps[kMostLayers];  // apart from what follows, since maps are aligned and arguments of a kernel have 32,764 bytes
  Layer layers[kMostLayers];
  Stage stages[kStages];
  Peers peers;
  Params attention;             // but for what differs between layers
  const uint16_t *x, *qkv;      // [M, D], [M, Q]: what the first layer begins with
  int M, num_layers, blocks, groups;  // groups: of eight rows, padded
  float eps;
};

// Counters that outlive launches, as zeros: stages' signals and attention's, which count on through all layers, and blocks that
// have nothing more to do. And sums on their way from block to block, of a thread behind those of the others.
// A device's own, so two launches must not run on it at one time; XLA's steps of a process do not.
struct Counters {
  uint32_t done[kStages + 1], left;
};
RESIDENT Counters counters[kDevices];
RESIDENT float4 on_their_way[kDevices][kMostBlocks * (kMostRows / 8) * kComputing];

struct Control {  // behind the slots
  uint64_t weights_there[kMostWeightSlots], weights_read[kMostWeightSlots];
  uint64_t rows_there[kMostRowSlots], rows_read[kMostRowSlots], scaled[2], ended, told;
  uint64_t prepared[kWorkers][2], attended[kWorkers][2];  // a worker's segments, in turns
  Share shares[kWorkers];
  int tiles[kWorkers];  // of the shares
  Own own[kWorkers];
  Params attention[kWorkers];  // of the present layer, as the worker sees it
  float scale[2][kMostRows];  // 1 / root mean square of x's rows, of the stages that want it
  float squares[kComputing / 32][kMostRows];  // of a warp's columns
};

template <int T>
struct Shape {
  static constexpr int kGroups = T / 8;  // of rows of x, in a thread's sums
  static constexpr int kRowBytes = T * kDepth * 2;
  static constexpr int kFits = JAXLLM_ROW_ROOM * 1024 / kRowBytes, kRowSlots = kFits < kMostRowSlots ? kFits : kMostRowSlots;
  static_assert(kRowSlots * kRowBytes >= kGroups * kComputing * 16);  // a block's sums have room there
  static constexpr int kRoom = (kSharedBytes - int(sizeof(Control)) - kRowSlots * kRowBytes) / kWeightBytes;
  static constexpr int kWeightSlots = kRoom < kMostWeightSlots ? kRoom : kMostWeightSlots;
  static constexpr int kRowsAt = kWeightSlots * kWeightBytes, kControlAt = kRowsAt + kRowSlots * kRowBytes;
};

DEVICE int stages_of(const Steps& p, int layer) { return layer + 1 < p.num_layers ? kStages : kStages - 1; }

// Calls attend(layer) and use(layer, stage, unit) for what this block has to do, in order. All warps go through the same.
template <typename Attend, typename Use>
DEVICE void each_unit(const Steps& p, int block, Attend attend, Use use) {
#pragma unroll 1
  for (int layer = 0; layer < p.num_layers; ++layer) {
    attend(layer);
#pragma unroll 1
    for (int number = 0; number < stages_of(p, layer); ++number) {
      const Stage& stage = p.stages[number];
#pragma unroll 1
      for (int unit = block / 2; unit < stage.units; unit += p.blocks / 2) use(layer, number, unit_of(stage, block, unit));
    }
  }
}

// Calls use(worker, values) for a block's tiles of an attention, in their order in the ring.
template <typename Use>
DEVICE void each_tile(const Control& control, Use use) {
  const int most = control.tiles[0] > control.tiles[1] ? control.tiles[0] : control.tiles[1];
#pragma unroll 1
  for (int i = 0; i < 4 * most; ++i)
    if (i / 4 < control.tiles[i % kWorkers]) use(i % kWorkers, i / kWorkers % 2);
}

// Everything that goes through the ring, by a warp: its first lane asks for weights, all of them for keys and values.
template <int T>
DEVICE void copy_weights(const Steps& p, char* slots, Control& control, int block, int lane) {
  using S = Shape<T>;
  Slot<S::kWeightSlots> turn;
  int asked = 0;
  auto next = [&] {
    if (asked++ >= S::kWeightSlots) wait_for(&control.weights_read[turn.slot], turn.phase ^ 1);
    return slots + turn.slot * kWeightBytes;
  };
  auto attend = [&](int layer) {
    const Maps& maps = p.maps[layer];
    Walk walks[kWorkers];
    Boxes boxes[kWorkers];  // of a worker's tile: keys and values lie alike
#pragma unroll
    for (int w = 0; w < kWorkers; ++w)
      if (control.tiles[w] > 0) walks[w].at = cursor_of(p.attention, control.shares[w]);
    auto copy = [&](int worker, Walk& walk, Boxes& own, int values) {
      if (!values) {
        own = walk.boxes(p.attention, lane);
        advance(p.attention, control.shares[worker], walk.at, 1);
      }
      char* to = next();
      copy_boxes(p.attention, values ? &maps.values : &maps.keys, own, lane, to, &control.weights_there[turn.slot]);
      turn.next();
    };
    each_tile(control, [&](int worker, int values) {
      worker == 0 ? copy(0, walks[0], boxes[0], values) : copy(1, walks[1], boxes[1], values);
    });
  };
  each_unit(p, block, attend, [&](int layer, int number, const Unit& unit) {
    const Stage& stage = p.stages[number];
    const TileMap* weight = &p.maps[layer].weights[number];
#pragma unroll 1
    for (int i = 0; i < unit.count; ++i, turn.next()) {
      char* to = next();
      uint64_t* there = &control.weights_there[turn.slot];
      sync_warp();
      if (lane > 0) continue;
      expect_bytes(there, kWeightBytes);
      const int column = (unit.first + i) * kDepth;
      if (stage.kind == kGated)
        copy_in_turns(to, weight, column, unit.tile * (kWide / 16), there);
      else
        copy_tile(to, weight, column, unit.tile * kWide, there);
    }
  });
}

// Signals of a layer's stage: one a block and unit. Of an attention: one a block.
DEVICE void await_stage(const Steps& p, int layer, int number) {
  await(&counters[here()].done[number], uint32_t(p.stages[number].units * 2) * (layer + 1));
  between_stores_and_copies();
}
DEVICE void await_attention(const Steps& p, int layer) {
  await(&counters[here()].done[kAttention], uint32_t(p.blocks) * (layer + 1));
  between_stores_and_copies();
}

template <int T>
DEVICE void copy_rows(const Steps& p, char* slots, Control& control, int block) {
  using S = Shape<T>;
  Slot<S::kRowSlots> turn;
  int asked = 0, awaited = -1;
  each_unit(p, block, [&](int layer) { awaited = -1; }, [&](int layer, int number, const Unit& unit) {
    if (awaited != number) number == 0 ? await_attention(p, layer) : await_stage(p, layer, number - 1);
    awaited = number;
#pragma unroll 1
    for (int i = 0; i < unit.count; ++i, turn.next()) {
      if (asked++ >= S::kRowSlots) wait_for(&control.rows_read[turn.slot], turn.phase ^ 1);
      uint64_t* there = &control.rows_there[turn.slot];
      expect_bytes(there, S::kRowBytes);
      char* to = slots + turn.slot * S::kRowBytes + block % 2 * (S::kRowBytes / 2);
      copy_to_pair(to, &p.stages[number].x, (unit.first + i) * kDepth, block % 2 * (T / 2), there);
    }
  });
}

constexpr int kRowsAtOnce = 4;  // of scale_rows: loads on their way together

// Queries, new keys and values of a worker's segments in a layer, by a warp that has nothing else to do; the first one's are the
// worker's own affair. `segments`: how many there were in all.
DEVICE void prepare_ahead(const Steps& p, Control& control, int worker, int lane, uint32_t& segments) {
  if (control.tiles[worker] == 0) return;
  Cursor c = cursor_of(p.attention, control.shares[worker]);
#pragma unroll 1
  for (bool first = true; c.left > 0; first = false, ++segments) {
    const int turn = segments % 2, length = c.length, tiles = tiles_ahead(c);
    const Segment s{c.row, c.head, length, tiles_of(length), 0, 0};
    const bool enters = c.tile + tiles == s.tiles;
    advance(p.attention, control.shares[worker], c, tiles);
    if (first) {
      if (c.left > 0) wait_for(&control.prepared[worker][turn], segments / 2 & 1);  // then qkv is there
      continue;
    }
    if (segments > 1) wait_for(&control.attended[worker][turn], segments / 2 + 1 & 1);
    prepare_alone(control.attention[worker], control.own[worker], turn, s, p.attention.heads / p.attention.kv_heads, lane, enters);
    sync_warp();
    if (lane == 0) arrive(&control.prepared[worker][turn]);
  }
}

// What the norms divide by, by one warp while the others multiply; before that, a worker's segments.
DEVICE void scale_rows(const Steps& p, Control& control, int block, int lane) {
  uint32_t segments = 0;
#pragma unroll 1
  for (int step = 0; step < 2 * p.num_layers; ++step) {  // after each of the two stages of a layer that write a norm's x
    const int layer = step / 2, turn = step % 2, number = 1 + 2 * turn;
    if (turn == 0) prepare_ahead(p, control, 0, lane, segments);
    if (number >= stages_of(p, layer)) continue;
    const Stage& stage = p.stages[number];
    if (block / 2 >= stage.units) continue;  // nobody here waits for it
    if (lane == 0) await_stage(p, layer, number - 1);
    sync_warp();
    for (int rows = 0; rows < p.M; rows += 4 * kRowsAtOnce) {  // eight lanes a row, four tiles a load
      const int begin = rows + lane / 8;
      float sums[kRowsAtOnce] = {};
      for (int tile = lane % 8 * 4; tile < kMostSums; tile += 32) {
        float4 four[kRowsAtOnce];
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r)
          if (tile < stage.tiles_in && begin + 4 * r < p.M)
            four[r] = load_fresh(reinterpret_cast<const float4*>(stage.squares_in + (begin + 4 * r) * kMostSums + tile));
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          if (tile < stage.tiles_in) sums[r] += four[r].x;
          if (tile + 1 < stage.tiles_in) sums[r] += four[r].y;
          if (tile + 2 < stage.tiles_in) sums[r] += four[r].z;
          if (tile + 3 < stage.tiles_in) sums[r] += four[r].w;
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        for (int mask = 4; mask; mask /= 2) sums[r] += shuffle_xor(sums[r], mask);
        const int m = begin + 4 * r;
        if (lane % 8 == 0 && m < p.M) control.scale[turn][m] = reciprocal_root(sums[r] / float(stage.K) + p.eps);
      }
    }
    sync_warp();
    if (lane == 0) arrive(&control.scaled[turn]);
  }
}

// Tells all blocks what this one has ended: a release of the whole device, which no computing warp has to wait for. When
// all blocks have ended everything nobody waits for a counter any more, and the last warp here clears them. Before that, the
// other worker's segments.
DEVICE void tell(const Steps& p, Control& control, int block, int lane) {
  uint32_t phase = 0, segments = 0;
  auto tell_one = [&](int number) {
    if (lane == 0) {
      wait_for(&control.ended, phase);
      arrive(&control.told);
      signal(&counters[here()].done[number], 1);
    }
    phase ^= 1;
  };
  auto attend = [&](int) {
    prepare_ahead(p, control, 1, lane, segments);
    tell_one(kAttention);
  };
  each_unit(p, block, attend, [&](int, int number, const Unit&) { tell_one(number); });
  const int last = lane == 0 && count_up(&counters[here()].left) == uint32_t(p.blocks - 1);
  if (!shuffle(last, 0)) return;
  Counters& all = counters[here()];
  if (lane <= kAttention) all.done[lane] = 0;
  if (lane == 0) all.left = 0;
}

// Of a timeline (benchmarks/wide_layers.py): what a block's first computing thread has come to, a stage.
enum Point { kBegun, kWeightsThere, kRowsThere, kMultiplied, kAdded, kEnded, kPoints };
enum AttentionPoint { kWaits = kStages * kPoints, kQkvThere, kAttended };

}  // namespace

#include "wide_ends.h"

namespace {

// This block's warps are done with something: told to all by the warp that tells.
DEVICE void end_part(Control& control, const Place& at, int& ended) {
  between_stores_and_copies();
  before_copy_in();
  sync_warp();
  if (at.lane == 0) {  // not twice before it was seen once: a phase that comes round again looks like none
    if (ended > 0) wait_for(&control.told, uint32_t(ended - 1) & 1);
    arrive(&control.ended);
  }
  ++ended;
}

template <int T>
DEVICE void end_unit(const Steps& p, int layer, int number, const Unit& unit, const Place at, char* slots, Control& control, const float* scale,
                     const float (&sums)[T / 2], int& marks) {
  constexpr int GROUPS = Shape<T>::kGroups;
  const Stage& stage = p.stages[number];
  const Layer& l = p.layers[layer];
  const uint16_t* bias = number == 0 ? l.o_bias : number == 3 ? l.qkv_bias : nullptr;
  const uint16_t* norm = number == 0 ? l.middle_norm : number == 2 ? l.next_norm : nullptr;
  const Now now = {{stage, bias, norm, layer + number == 0 ? p.x : stage.residual, p.M}, number / 2};
  if (stage.splits == 1 && stage.kind == kGated) {
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) finish_gated(now, unit.tile, at, scale, group, group_of(sums, group));
  } else {
    const bool shared = p.peers.ranks > 1 && stage.kind == kResidual;
    add_up<T>(now, unit, at, control, scale, on_their_way[here()], reinterpret_cast<float4*>(slots + Shape<T>::kRowsAt), sums,
              [&](int place, int count, auto& part) {
                if (shared) exchange(p, now, at.thread, place, count, part);
              });
    mark(at.block, at.thread, marks++, number * kPoints + kAdded);
  }
}

// ---- attention ----

template <int T>
struct Feed {  // a worker's tiles of those in the ring. The other's are passed over, and given back, once they are there: else
               // a slot could be filled twice while nobody looks
  using Slots = Slot<Shape<T>::kWeightSlots>;
  Slots& turn;
  char* slots;
  Control& control;
  int lane, worker, others;  // others: tiles of the other worker
  uint32_t& segments;        // this worker's, of all layers before and now
  int tile = 0, values = 0;
  bool first = true;
  DEVICE void begin(Worker& w, const Segment& s, bool enters) {
    w.turn = segments % 2;
    uint64_t* prepared = &control.prepared[worker][w.turn];
    if (!first) return wait_for(prepared, segments / 2 & 1);
    prepare_together(w, s, enters);
    if (w.thread() == 0) arrive(prepared);
    first = false;
  }
  DEVICE void end(Worker& w) {
    sync_warp();
    if (lane == 0) arrive(&control.attended[worker][w.turn]);
    ++segments;
  }
  DEVICE void leave() {
    sync_warp();
    if (lane == 0) arrive(&control.weights_read[turn.slot]);
    turn.next();
  }
  DEVICE void pass() {
    wait_for(&control.weights_there[turn.slot], turn.phase);
    leave();
  }
  DEVICE char* take() {
    if (worker == 1 && tile < others) pass();
    wait_for(&control.weights_there[turn.slot], turn.phase);
    return slots + turn.slot * kWeightBytes;
  }
  DEVICE void give_back() {
    leave();
    if (worker == 0 && tile < others) pass();
    tile += values, values ^= 1;
  }
  DEVICE void pass_rest() {
#pragma unroll 1
    for (; tile < others; ++tile) pass(), pass();
  }
};

template <int T>
DEVICE void attend_layer(const Steps& p, int layer, char* slots, Control& control, const Place at, Slot<Shape<T>::kWeightSlots>& turn,
                         uint32_t& segments, int& marks) {
  Params& view = control.attention[at.group];
  mark(at.block, at.thread, marks++, kWaits);
  if (at.thread % kGroupThreads == 0) {
    if (layer > 0) await(&counters[here()].done[kStages - 1], uint32_t(p.stages[kStages - 1].units * 2) * layer);
    const Layer& l = p.layers[layer];  // all warps have ended the layer before
    view.qkv = layer > 0 ? p.attention.qkv : p.qkv, view.norms = l.qk_norms, view.k_pages = l.k_pages, view.v_pages = l.v_pages;
  }
  mark(at.block, at.thread, marks++, kQkvThere);
  Worker w{view, control.own[at.group], at.block * kWorkers + at.group, at.warp % kWarps, at.lane, p.attention.heads / p.attention.kv_heads};
  Feed<T> feed{turn, slots, control, at.lane, at.group, control.tiles[1 - at.group], segments};
  if (control.tiles[at.group] > 0) attend_share(w, feed, control.shares[at.group]);
  feed.pass_rest();
  mark(at.block, at.thread, marks++, kAttended);
}

// ---- the whole ----

template <int T>
DEVICE void compute(const Steps& p, char* slots, Control& control, const Place& given) {
  using S = Shape<T>;
  Slot<S::kWeightSlots> weights;
  Slot<S::kRowSlots> rows;
  uint32_t segments = 0;
  int ended = 0, marks = 0;
  auto attend = [&](int layer) {
    attend_layer<T>(p, layer, slots, control, given.again(), weights, segments, marks);
    end_part(control, given.again(), ended);
  };
  each_unit(p, given.block, attend, [&](int layer, int number, const Unit& unit) {
    const Place at = given.again();
    float sums[T / 2];
#pragma unroll
    for (int i = 0; i < T / 2; ++i) sums[i] = 0.f;
    int weight_slot = 0, row_slot = 0;  // of the block before
    auto release = [&] {
      if (at.lane == 0) arrive(&control.weights_read[weight_slot]);
      if (at.lane < 2) arrive_at(&control.rows_read[row_slot], at.lane);
    };
    mark(at.block, at.thread, marks++, number * kPoints + kBegun);
#pragma unroll 1
    for (int i = 0; i < unit.count; ++i) {
      wait_for(&control.weights_there[weights.slot], weights.phase);
      if (i == 0) mark(at.block, at.thread, marks++, number * kPoints + kWeightsThere);
      wait_for(&control.rows_there[rows.slot], rows.phase);
      if (i == 0) mark(at.block, at.thread, marks++, number * kPoints + kRowsThere);
      const char* w = slots + weights.slot * kWeightBytes + at.group * 64 * kDepth * 2;
      const char* x = slots + S::kRowsAt + rows.slot * S::kRowBytes;
      begin_products();
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) multiply<T>(sums, w + k * 2, x + k * 2);
      end_products();
      await_products<1>();
      if (i > 0) release();
      weight_slot = weights.slot, row_slot = rows.slot;
      weights.next(), rows.next();
    }
    await_products<0>();
    hold(sums);
    release();
    mark(at.block, at.thread, marks++, number * kPoints + kMultiplied);
    const bool wants = number % 2;
    if (wants) wait_for(&control.scaled[number / 2], layer & 1);
    end_unit<T>(p, layer, number, unit, at.again(), slots, control, wants ? control.scale[number / 2] : nullptr, sums, marks);
    end_part(control, at, ended);
    mark(at.block, at.thread, marks++, number * kPoints + kEnded);
  });
}

DEVICE void begin(const Steps& p, Control& control, const Place& at) {
  if (at.group >= kWorkers) return;
  if (at.thread % kGroupThreads == 0) control.attention[at.group] = p.attention;
  if (at.warp % kWarps > 0) return;
  Deal deal;
  Share share;
  const bool any = find_share(p.attention, at.block * kWorkers + at.group, at.lane, deal, share);
  if (at.lane > 0) return;
  control.tiles[at.group] = any ? share.end - share.begin : 0;
  if (any) control.shares[at.group] = share;
  control.own[at.group].deal = deal;
}

template <int T>
DEVICE void decode(const Steps& p, char* raw, int block, int thread) {
  using S = Shape<T>;
  Control& control = *reinterpret_cast<Control*>(raw + S::kControlAt);
  const Place at(block, thread);
  const int role = at.warp - kComputing / 32;
  if (role == 0 && at.lane == 0) {
#pragma unroll 1
    for (int i = 0; i < S::kWeightSlots; ++i)
      init_barrier(&control.weights_there[i], 1), init_barrier(&control.weights_read[i], kComputing / 32);
#pragma unroll 1
    for (int i = 0; i < S::kRowSlots; ++i)
      init_barrier(&control.rows_there[i], 1), init_barrier(&control.rows_read[i], kComputing / 32 * 2);
    for (int i = 0; i < 2; ++i) init_barrier(&control.scaled[i], 1);
    for (int i = 0; i < 2 * kWorkers; ++i)
      init_barrier(&control.prepared[i / 2][i % 2], 1), init_barrier(&control.attended[i / 2][i % 2], kWarps);
    init_barrier(&control.ended, kComputing / 32), init_barrier(&control.told, 1);
    publish_barriers();
  }
  begin(p, control, at);
  sync_all();
  arrive_at_cluster();
  await_cluster();  // barriers are there before others count on them
  if (role < 0) {
    take_registers<kComputingRegisters>();
    clear_empty_rows(p.attention, block * kWorkers + at.group, thread % kGroupThreads);
    compute<T>(p, raw, control, at);
  } else {
    give_registers<kOtherRegisters>();
    if (role == 0) tell(p, control, block, at.lane);
    if (role == 1 && at.lane == 0) copy_rows<T>(p, raw + S::kRowsAt, control, block);
    if (role == 2) scale_rows(p, control, block, at.lane);
    if (role == 3) copy_weights<T>(p, raw, control, block, at.lane);  // no warp that exponentiates has its scheduler
  }
  leave_cluster();  // nobody leaves while the other copies to it, or tells it something
}

}  // namespace

#include "wide_launch.h"
