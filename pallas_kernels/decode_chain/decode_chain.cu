// Everything between two attentions of a dense decoder for up to 128 rows, in one kernel whose blocks all run at one time
// (ADR 31): four products with what stands around them, weights streamed without a stop from one into the next.
//
// A product is out[m][n] = sum over k of x[m][k] * w[n][k]. A block takes tiles of 128 rows of w, the tensor cores' left
// operand, and all rows of x, the right one; both come in blocks of 64 of k. Two neighbouring blocks are a cluster with tiles
// side by side, each of which loads half of x for both. Of a narrow product each tile is cut into splits of k; blocks give their
// sums to memory, and each adds up all splits, first to last, for a share of the rows. A sum itself says that it is there: what nobody
// wrote yet is zero, and whoever has read puts the zero back. One warp asks for weights as far ahead as shared memory allows,
// across the ends of stages: weights depend on nothing. Another asks for x once the stage that makes it is done everywhere.
//
// An RMS norm is split: the stage that makes x also writes x * weight and the sums of squares of its columns; the stage that
// reads it scales its sums. Gate and up stand in turns of eight rows in a tile, so that one thread has both of a column.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "ends.h"

namespace {

constexpr int kMostRows = 128, kStages = 4, kMostTiles = 512, kMostBlocks = 160;
constexpr int kMostWeightSlots = 12, kMostRowSlots = 12, kSharedBytes = 227 * 1024, kRowSlotBytes = 64 * 1024;

struct Stage {
  TileMap weight, x;
  const uint16_t* bias;      // [N] or null
  const uint16_t* residual;  // [M, N], of kResidual
  const uint16_t* norm;      // [N] or null: also write `scaled` and `squares`
  const float* squares_in;   // [kMostRows, kMostSums], of the second and the fourth: sums of squares of x's rows, tile by tile
  uint16_t *out, *scaled;    // [M, N]
  float* squares;            // [kMostRows, kMostSums]
  int N, K;                  // kGated: N columns out, 2N rows of the weight
  int kind, tiles_in, splits;
  int units;  // of work, for a cluster: pairs of tiles * splits
};

struct Params {
  Stage stages[kStages];
  int M, num_stages, blocks;
  float eps;
};

// Counters that outlive launches, as zeros: stages' signals, and blocks that have nothing more to do. And sums on their way from
// block to block, of a thread behind those of the others. A device's own, so two launches must not run on it at one time; XLA's
// steps of a process do not.
RESIDENT uint32_t done[kStages], left;
RESIDENT float4 on_their_way[kMostBlocks * (kMostRows / 8) * kComputing];

struct Control {  // behind the slots
  uint64_t weights_there[kMostWeightSlots], weights_read[kMostWeightSlots];
  uint64_t rows_there[kMostRowSlots], rows_read[kMostRowSlots], scaled[2], ended, told;
  float scale[2][kMostRows];  // 1 / root mean square of x's rows, of the stages that want it
  float squares[kComputing / 32][kMostRows];  // of a warp's columns
};

template <int T>
struct Shape {
  static constexpr int kGroups = T / 8;  // of rows of x, in a thread's sums
  static constexpr int kRowBytes = T * kDepth * 2;
  static constexpr int kFits = kRowSlotBytes / kRowBytes, kRowSlots = kFits < kMostRowSlots ? kFits : kMostRowSlots;
  static_assert(kRowSlots * kRowBytes >= kGroups * kComputing * 16);  // a block's sums have room there
  static constexpr int kRoom = (kSharedBytes - int(sizeof(Control)) - kRowSlots * kRowBytes) / kWeightBytes;
  static constexpr int kWeightSlots = kRoom < kMostWeightSlots ? kRoom : kMostWeightSlots;
  static constexpr int kRowsAt = kWeightSlots * kWeightBytes, kControlAt = kRowsAt + kRowSlots * kRowBytes;
};

// Calls use(stage, unit) for what this block has to do, in order. All warps go through the same.
template <typename Use>
DEVICE void each_unit(const Params& p, int block, Use use) {
#pragma unroll 1
  for (int number = 0; number < p.num_stages; ++number) {
    const Stage& stage = p.stages[number];
#pragma unroll 1
    for (int unit = block / 2; unit < stage.units; unit += p.blocks / 2) use(number, unit_of(stage, block, unit));
  }
}

template <int T>
DEVICE void copy_weights(const Params& p, char* slots, Control& control, int block) {
  using S = Shape<T>;
  Slot<S::kWeightSlots> turn;
  int asked = 0;
  each_unit(p, block, [&](int number, const Unit& unit) {
    const Stage& stage = p.stages[number];
#pragma unroll 1
    for (int i = 0; i < unit.count; ++i, turn.next()) {
      if (asked++ >= S::kWeightSlots) wait_for(&control.weights_read[turn.slot], turn.phase ^ 1);
      uint64_t* there = &control.weights_there[turn.slot];
      expect_bytes(there, kWeightBytes);
      char* to = slots + turn.slot * kWeightBytes;
      const int column = (unit.first + i) * kDepth;
      if (stage.kind == kGated)
        copy_in_turns(to, &stage.weight, column, unit.tile * (kWide / 16), there);
      else
        copy_tile(to, &stage.weight, column, unit.tile * kWide, there);
    }
  });
}

// Signals of a stage: one a block and unit.
DEVICE void await_stage(const Params& p, int number) {
  await(&done[number], uint32_t(p.stages[number].units * 2));
  between_stores_and_copies();
}

template <int T>
DEVICE void copy_rows(const Params& p, char* slots, Control& control, int block) {
  using S = Shape<T>;
  Slot<S::kRowSlots> turn;
  int asked = 0, ready = 0;
  each_unit(p, block, [&](int number, const Unit& unit) {
    for (; ready < number; ++ready) await_stage(p, ready);
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

constexpr int kRowsAtOnce = 8;  // of scale_rows: loads on their way together

// What the norms divide by, by one warp while the others multiply.
DEVICE void scale_rows(const Params& p, Control& control, int block, int lane) {
#pragma unroll 1
  for (int number = 1; number < p.num_stages; number += 2) {  // after each of the two that write a norm's x
    const Stage& stage = p.stages[number];
    const int turn = number / 2;
    if (block / 2 >= stage.units) continue;  // nobody here waits for it
    if (lane == 0) await_stage(p, number - 1);
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
// all blocks have ended everything nobody waits for a counter any more, and the last warp here clears them.
DEVICE void tell(const Params& p, Control& control, int block, int lane) {
  int last = 0;
  if (lane == 0) {
    uint32_t phase = 0;
    each_unit(p, block, [&](int number, const Unit&) {
      wait_for(&control.ended, phase);
      arrive(&control.told);
      signal(&done[number], 1);
      phase ^= 1;
    });
    last = count_up(&left) == uint32_t(p.blocks - 1);
  }
  if (!shuffle(last, 0)) return;
  if (lane < kStages) done[lane] = 0;
  if (lane == 0) left = 0;
}

// Of a timeline (benchmarks/decode_chain.py): what a block's first computing thread has come to, a stage.
enum Point { kBegun, kWeightsThere, kRowsThere, kMultiplied, kAdded, kEnded, kPoints };

template <int T>
DEVICE void end_unit(const Params& p, int number, const Unit& unit, const Place at, char* slots, Control& control, const float* scale,
                     const float (&sums)[T / 2], int ended, int& marks) {
  const Stage& stage = p.stages[number];
  const EndOf<Stage> now = {stage, stage.bias, stage.norm, stage.residual, p.M};
  if (stage.splits == 1 && stage.kind == kGated) {
#pragma unroll
    for (int group = 0; group < Shape<T>::kGroups; ++group) finish_gated(now, unit.tile, at, scale, group, group_of(sums, group));
  } else {
    add_up<T>(now, unit, at, control, scale, on_their_way, reinterpret_cast<float4*>(slots + Shape<T>::kRowsAt), sums,
              [](int, int, auto&) {});
    mark(at.block, at.thread, marks++, number * kPoints + kAdded);
  }
  between_stores_and_copies();
  before_copy_in();
  sync_warp();
  if (at.lane == 0) {  // not twice before it was seen once: a phase that comes round again looks like none
    if (ended > 0) wait_for(&control.told, uint32_t(ended - 1) & 1);
    arrive(&control.ended);
  }
  mark(at.block, at.thread, marks++, number * kPoints + kEnded);
}

template <int T>
DEVICE void compute(const Params& p, char* slots, Control& control, const Place& given) {
  using S = Shape<T>;
  Slot<S::kWeightSlots> weights;
  Slot<S::kRowSlots> rows;
  int ended = 0, marks = 0;
  each_unit(p, given.block, [&](int number, const Unit& unit) {
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
    if (wants) wait_for(&control.scaled[number / 2], 0);
    end_unit<T>(p, number, unit, at.again(), slots, control, wants ? control.scale[number / 2] : nullptr, sums, ended++, marks);
  });
}

template <int T>
DEVICE void decode(const Params& p, char* raw, int block, int thread) {
  using S = Shape<T>;
  Control& control = *reinterpret_cast<Control*>(raw + S::kControlAt);
  const Place at(block, thread);
  if (at.warp == kComputing / 32) {
    if (at.lane == 0) {
#pragma unroll 1
      for (int i = 0; i < S::kWeightSlots; ++i)
        init_barrier(&control.weights_there[i], 1), init_barrier(&control.weights_read[i], kComputing / 32);
#pragma unroll 1
      for (int i = 0; i < S::kRowSlots; ++i)
        init_barrier(&control.rows_there[i], 1), init_barrier(&control.rows_read[i], kComputing / 32 * 2);
      for (int i = 0; i < 2; ++i) init_barrier(&control.scaled[i], 1);
      init_barrier(&control.ended, kComputing / 32), init_barrier(&control.told, 1);
      publish_barriers();
    }
    arrive_at_cluster();
    if (at.lane == 0) copy_weights<T>(p, raw, control, block);
    await_cluster();
  } else {
    arrive_at_cluster();
    await_cluster();  // barriers are there before others count on them
  }
  if (at.warp < kComputing / 32) {
    compute<T>(p, raw, control, at);
  } else if (at.warp == kComputing / 32 + 1) {
    if (at.lane == 0) copy_rows<T>(p, raw + S::kRowsAt, control, block);
  } else if (at.warp == kComputing / 32 + 2) {
    scale_rows(p, control, block, at.lane);
  } else if (at.warp == kComputing / 32 + 3) {
    tell(p, control, block, at.lane);
  }
  meet_cluster();  // nobody leaves while the other copies to it
}

}  // namespace

#include "launch.h"
