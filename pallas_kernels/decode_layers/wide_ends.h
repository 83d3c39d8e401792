// What becomes of a tile's sums: other splits' and other devices' are added, then bias, residual, norm or activation. Of wide.cu.
#pragma once

namespace {

struct Now {  // what a tile's end is about
  const Stage& stage;
  const uint16_t *bias, *norm, *residual;  // norm: also write `scaled` and `squares`
  uint32_t exchange;  // its number, of kResidual
};

DEVICE int sixteen_of(const Place& at) { return at.group * 64 + at.warp % 4 * 16; }  // in the block's tile

struct Pairs {  // two columns of row g, of either half of the sixteen
  uint32_t of[2];
};

// What a tile's end wants of its columns, asked for before it waits: of the thread's own, and of those it has after a transposition.
struct Columns {
  float bias[2] = {};
  uint32_t norm[2] = {};
  DEVICE Columns(const Now& now, const Unit& unit, const Place& at) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int eight = unit.tile * kWide + sixteen_of(at) + half * 8, own = eight + at.lane / 4, column = eight + at.lane % 4 * 2;
      if (now.bias != nullptr && own < now.stage.N) bias[half] = wide(now.bias[own]);
      if (now.norm != nullptr && column < now.stage.N) norm[half] = *reinterpret_cast<const uint32_t*>(now.norm + column);
    }
  }
};

// What is to be added to a group's sums.
DEVICE Pairs residual_of(const Steps& p, const Now& now, const Unit& unit, const Place& at, int group) {
  const Stage& stage = now.stage;
  Pairs pairs = {};
  if (stage.kind != kResidual) return pairs;
  const int row = group * 8 + at.lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = unit.tile * kWide + sixteen_of(at) + half * 8 + at.lane % 4 * 2;
    if (row < p.M && column < stage.N)
      pairs.of[half] = load_fresh(reinterpret_cast<const uint32_t*>(now.residual + int64_t(row) * stage.N + column));
  }
  return pairs;
}

// Of a gated stage: the first half of the sixteen are gates, the second their ups.
DEVICE void finish_gated(const Steps& p, const Stage& stage, const Unit& unit, const Place& at, const float* scale, int group,
                         float4 sums) {
  const int g = at.lane / 4, t = at.lane % 4, row = group * 8 + g;
  const float first = scale[group * 8 + 2 * t], second = scale[group * 8 + 2 * t + 1];
  const float a = gated(wide(narrow(times(sums.x, first))), wide(narrow(times(sums.z, first))));
  const float b = gated(wide(narrow(times(sums.y, second))), wide(narrow(times(sums.w, second))));
  const uint32_t pair = transposed(narrow(a, b));
  const int column = unit.tile * (kWide / 2) + sixteen_of(at) / 2 + 2 * t;
  if (row < p.M && column < stage.N) *reinterpret_cast<uint32_t*>(stage.out + int64_t(row) * stage.N + column) = pair;
}

DEVICE void finish(const Steps& p, const Now& now, const Unit& unit, const Place& at, Control& control, const Columns& columns,
                   const float* scale, int group, float4 sums, Pairs residual) {
  const Stage& stage = now.stage;
  if (stage.kind == kGated) return finish_gated(p, stage, unit, at, scale, group, sums);
  const int g = at.lane / 4, t = at.lane % 4, row = group * 8 + g, sixteen = unit.tile * kWide + sixteen_of(at);
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
    if (row >= p.M || column >= stage.N) continue;
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
  if (t == 0) control.squares[at.warp][row] = squares;
}

// The first of a thread's two lines; the other one is kComputing behind: a warp's lie side by side.
DEVICE uint4* line_of(const Steps& p, int device, int parity, int source, int place, int thread) {
  const int64_t places = int64_t(p.stages[0].units / p.stages[0].splits * 2) * p.groups;  // o's and down's tiles are the same
  return p.peers.lines[device] + parity * p.peers.half + (source * places + place) * 2 * kComputing + thread;
}

// Sums of up to AT_ONCE groups of rows, of all devices.
template <int AT_ONCE>
DEVICE void exchange(const Steps& p, int thread, uint32_t flag, int place, int count, float4 (&sums)[AT_ONCE]) {
  const int rank = p.peers.rank, ranks = p.peers.ranks;
#pragma unroll
  for (int r = 0; r < AT_ONCE; ++r)
    if (r < count)
      for (int next = 1; next < ranks; ++next) {
        uint4* to = line_of(p, (rank + next) % ranks, flag & 1, rank, place + r, thread);
        put_line(to, sums[r].x, sums[r].y, flag), put_line(to + kComputing, sums[r].z, sums[r].w, flag);
      }
#pragma unroll
  for (int r = 0; r < AT_ONCE; ++r)
    if (r < count) {
      float4 total = {};
      for (int source = 0; source < ranks; ++source) {
        float4 part = sums[r];
        if (source != rank) {
          const uint4* from = line_of(p, rank, flag & 1, source, place + r, thread);
          await_line(from, flag, part.x, part.y), await_line(from + kComputing, flag, part.z, part.w);
        }
        total = source ? float4{total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w} : part;
      }
      sums[r] = total;
    }
}

// Where a thread's sums of a split go: those of a product that is not cut are for itself.
DEVICE float4* way_of(const Stage& stage, const Unit& unit, const Place& at, int split, int groups) {
  const int block = stage.splits > 1 ? unit.tile * stage.splits + split : at.block;
  return on_their_way[here()] + int64_t(block) * (groups * kComputing) + at.thread;
}

// All splits' sums of this block's share of the rows. Eight loads are on their way together.
template <int T>
DEVICE void add_up(const Steps& p, const Now& now, const Unit& unit, const Place& at, Control& control, const Columns& columns,
                   const float* scale, int begin, int end) {
  constexpr int GROUPS = Shape<T>::kGroups, AT_ONCE = T > 64 ? 4 : 2, SPLITS = 8 / AT_ONCE;
  const Stage& stage = now.stage;
#pragma unroll 1
  for (int group = begin; group < end; group += AT_ONCE) {
    float4 sums[AT_ONCE];
    Pairs residual[AT_ONCE];
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r)
      residual[r] = residual_of(p, now, unit, at, group + r < end ? group + r : end - 1);
#pragma unroll 1
    for (int first = 0; first < stage.splits; first += SPLITS) {
      float4 parts[SPLITS][AT_ONCE];
      auto each = [&](auto use) {
#pragma unroll
        for (int s = 0; s < SPLITS; ++s)
#pragma unroll
          for (int r = 0; r < AT_ONCE; ++r)
            if (first + s < stage.splits && group + r < end)
              use(parts[s][r], way_of(stage, unit, at, first + s, GROUPS) + (group + r) * kComputing, sums[r], first + s);
      };
      each([](float4& part, float4* from, float4&, int) { part = look(from); });
      each([](float4& part, float4* from, float4& sum, int split) {
        await_sums(from, part);
        sum = split ? float4{sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w} : part;
        *from = float4{0.f, 0.f, 0.f, 0.f};
      });
    }
    if (p.peers.ranks > 1 && stage.kind == kResidual)
      exchange(p, at.thread, now.exchange, unit.tile * GROUPS + group, end - group, sums);
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r)
      if (group + r < end) finish(p, now, unit, at, control, columns, scale, group + r, sums[r], residual[r]);
  }
}

}  // namespace
