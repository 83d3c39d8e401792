// Attention of one token a row, in the middle of decode_layers.cu: runs of 64 keys that lie in the ring, a warp each, and their merge.
#pragma once

namespace {

// A lane's columns of a head: 32c + 8t .. + 7, c = 0 .. 3, as the tensor core's second operand has them. The other half of a
// rotated pair is in the same lane: c and c + 2.
struct Head {
  uint4 chunks[4];
};

DEVICE void widen(const uint4& from, float (&to)[8]) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = wide(uint16_t(words[i / 2] >> 16 * (i % 2)));
}

DEVICE uint4 narrowed(const float (&from)[8]) {
  return {narrow(from[0], from[1]), narrow(from[2], from[3]), narrow(from[4], from[5]), narrow(from[6], from[7])};
}

// What turns a row's heads, of this lane's columns.
struct Rotation {
  float c[2][8], s[2][8];
  DEVICE void load(const Reader& r, int row) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const int at = row * kHead / 2 + half * 32 + r.t * 8 + i;
        const float4 cosines = *reinterpret_cast<const float4*>(r.p.cosines + at);
        const float4 sines = *reinterpret_cast<const float4*>(r.p.sines + at);
        c[half][i] = cosines.x, c[half][i + 1] = cosines.y, c[half][i + 2] = cosines.z, c[half][i + 3] = cosines.w;
        s[half][i] = sines.x, s[half][i + 1] = sines.y, s[half][i + 2] = sines.z, s[half][i + 3] = sines.w;
      }
  }
};

// A head in four lanes: normed if the model does that, and rotated.
DEVICE void turn(const Reader& r, const Rotation& by, bool normed, const Head& norm, Head& head) {
  float x[4][8];
#pragma unroll
  for (int c = 0; c < 4; ++c) widen(head.chunks[c], x[c]);
  if (normed) {
    float squares = 0.f;
#pragma unroll
    for (int c = 0; c < 4; ++c)
#pragma unroll
      for (int i = 0; i < 8; ++i) squares = fused(x[c][i], x[c][i], squares);
    squares += shuffle_xor(squares, 1);
    squares += shuffle_xor(squares, 2);
    const float scale = reciprocal_root(squares / kHead + r.p.eps);
#pragma unroll
    for (int c = 0; c < 4; ++c) {  // rounded between, as the model rounds
      float weights[8];
      widen(norm.chunks[c], weights);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[c][i] = times(times(x[c][i], scale), weights[i]);
      widen(narrowed(x[c]), x[c]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float first[8], second[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // not fused: as rope_page_write rounds
      first[i] = times(x[half][i], by.c[half][i]) - times(x[half + 2][i], by.s[half][i]);
      second[i] = times(x[half + 2][i], by.c[half][i]) + times(x[half][i], by.s[half][i]);
    }
    head.chunks[half] = narrowed(first), head.chunks[half + 2] = narrowed(second);
  }
}

// A run and what of it does not depend on this layer's queries and keys: loaded while others' qkv is still on its way.
struct Prepared {
  Unit unit;
  bool last;  // the run with the row's new key
  Rotation rotation;
  Head norm = {};         // of this lane's head
  uint16_t *key, *value;  // where the new ones go in the pages
  DEVICE void load(const Reader& r, const Layer& l, int number) {
    find_unit(r.p, number, unit);
    rotation.load(r, unit.row);
    load_norm(r, l, r.g);
    last = unit.split == unit.splits - 1;
    const int64_t at = last ? page_at(r.p, unit, unit.length - 1) : 0;
    key = l.k_pages + at, value = l.v_pages + at;
  }
  DEVICE void load_norm(const Reader& r, const Layer& l, int head) {
    if (l.qk_norms == nullptr) return;
    const uint16_t* from = l.qk_norms + (head < r.p.heads / r.p.kv_heads ? 0 : kHead);
#pragma unroll
    for (int c = 0; c < 4; ++c) norm.chunks[c] = *reinterpret_cast<const uint4*>(from + c * 32 + r.t * 8);
  }
};

// What came out of qkv: queries of the heads g, in the lanes behind them the new key, and a lane's part of the new value.
// These two go to their page, and to the slot, whose copy may be older than they are.
struct Fresh {
  Head head = {};
  uint2 value = {};
  DEVICE void load(const Reader& r, const Prepared& run, const uint16_t* row, int number) {
    const int group = r.p.heads / r.p.kv_heads, head_kv = r.p.heads + run.unit.head;
    const uint16_t* from = row + (number < group ? run.unit.head * group + number : head_kv) * kHead + r.t * 8;
    if (number < group + run.last)
#pragma unroll
      for (int c = 0; c < 4; ++c) head.chunks[c] = load_fresh(reinterpret_cast<const uint4*>(from + c * 32));
    if (run.last) value = load_fresh(reinterpret_cast<const uint2*>(row + (head_kv + r.p.kv_heads) * kHead + r.lane * 4));
  }
  DEVICE void enter(const Reader& r, const Prepared& run, int number, uint16_t* keys, uint16_t* values) const {
    const int at = place_in((run.unit.length - 1) % kSplit);
    if (number == r.p.heads / r.p.kv_heads)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        *reinterpret_cast<uint4*>(keys + at + c * 32 + r.t * 8) = head.chunks[c];
        *reinterpret_cast<uint4*>(run.key + c * 32 + r.t * 8) = head.chunks[c];
      }
    *reinterpret_cast<uint2*>(values + at + r.lane * 4) = value;
    *reinterpret_cast<uint2*>(run.value + r.lane * 4) = value;
  }
};

struct Place {  // where a run's result goes until the row's other runs are there
  float *out, *stats;  // [group][H]; [group][2]: maximum, total
};

DEVICE Place place_of(const Params& p, const Unit& unit, int split) {
  const int group = p.heads / p.kv_heads;
  const int64_t at = (int64_t(unit.row) * p.kv_heads + unit.head) * p.splits + split;
  return {p.work.parts + at * group * kHead, p.work.stats + at * group * 2};
}

// Values of 16 keys, times probabilities of heads 2t and 2t + 1 of the keys that are rows g and g + 8 of the scores. A lane
// reads four keys' columns 8g .. + 7 and 64 + 8g .. + 7. An A operand is a pair of columns of each, in rows g and g + 8; so sums are
// of columns 8g + 64half + 2pair and the next, in both cases of heads 2t and 2t + 1.
DEVICE void add_values(const Reader& r, const uint16_t* values, const float (&probabilities)[4], float (&out)[2][4][4]) {
  uint32_t most[2], rest[2];  // rounded to bf16, and what is left of them: 16 bits of each
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float one = probabilities[2 * i], other = probabilities[2 * i + 1];
    const uint32_t rounded = narrow(one, other);
    most[i] = transposed(rounded);
    rest[i] = transposed(narrow(one - wide(uint16_t(rounded)), other - wide(uint16_t(rounded >> 16))));
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t v[kTogether][4];
#pragma unroll
    for (int key = 0; key < kTogether; ++key) {
      const uint4 columns = *reinterpret_cast<const uint4*>(values + r.t * kGap + key * kHead + half * 64 + r.g * 8);
      v[key][0] = columns.x, v[key][1] = columns.y, v[key][2] = columns.z, v[key][3] = columns.w;
    }
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const uint32_t a[4] = {halves(v[0][pair], v[1][pair], false), halves(v[0][pair], v[1][pair], true),
                             halves(v[2][pair], v[3][pair], false), halves(v[2][pair], v[3][pair], true)};
      mma(out[half][pair], a[0], a[1], a[2], a[3], most[0], most[1]);
      mma(out[half][pair], a[0], a[1], a[2], a[3], rest[0], rest[1]);
    }
  }
}

// The run in `slot`, by one warp: scores, one maximum, probabilities, their sums with the values, to their place. Row g of 16
// scores is key 4 (g / 2) + g % 2, row g + 8 the second next: so key pairs of a lane's values are rows 2t and 2t + 1 (+ 8).
DEVICE void attend(const Reader& r, const Layer& l, Prepared& run, int slot, uint32_t phase) {
  const Params& p = r.p;
  const Unit& unit = run.unit;
  const int group = p.heads / p.kv_heads, first = unit.split * kSplit;
  const int left = unit.length - first < kSplit ? unit.length - first : kSplit;
  const uint16_t* row = p.work.qkv + int64_t(unit.row) * (p.heads + 2 * p.kv_heads) * kHead;
  uint16_t* keys = reinterpret_cast<uint16_t*>(r.s.ring[slot]);
  uint16_t* values = keys + kGroups * kGap;
  Head query = {};
#pragma unroll 1
  for (int base = 0; base < group + run.last; base += kRows) {  // eight queries and a key: in two turns
    Fresh fresh;
    fresh.load(r, run, row, base + r.g);
    if (base > 0) run.load_norm(r, l, base + r.g);
    turn(r, run.rotation, l.qk_norms != nullptr, run.norm, fresh.head);
    if (base == 0) wait_for(&r.s.full[slot], phase), query = fresh.head;
    if (run.last) fresh.enter(r, run, base + r.g, keys, values);
  }
  // Products take 16 keys: values that are not there must be numbers.
  for (int at = left; at % kUnit; ++at) *reinterpret_cast<uint2*>(values + place_in(at) + r.lane * 4) = uint2{0, 0};
  sync_warp();
  float scores[kSplit / kUnit][4] = {};
#pragma unroll
  for (int i = 0; i < kSplit / kUnit; ++i)
    if (i * kUnit < left)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint16_t* at = keys + place_in(i * kUnit + r.g / 2 * kTogether + r.g % 2) + c * 32 + r.t * 8;
        multiply(scores[i], *reinterpret_cast<const uint4*>(at), *reinterpret_cast<const uint4*>(at + 2 * kHead), query.chunks[c]);
      }
  const Place place = place_of(p, unit, unit.split);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float most = -INFINITY, total = 0.f;
#pragma unroll
    for (int i = 0; i < kSplit / kUnit; ++i)
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        float& score = scores[i][h + 2 * low];
        score = i * kUnit + r.g / 2 * kTogether + r.g % 2 + 2 * low < left ? times(times(score, p.scale), kLog2e) : -INFINITY;
        most = larger(most, score);
      }
    for (int mask = 4; mask < 32; mask <<= 1) most = larger(most, shuffle_xor(most, mask));
#pragma unroll
    for (int i = 0; i < kSplit / kUnit; ++i)
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        float& score = scores[i][h + 2 * low];
        score = exp2_(score - most), total += score;
      }
    for (int mask = 4; mask < 32; mask <<= 1) total += shuffle_xor(total, mask);
    const int head = 2 * r.t + h;
    if (r.g == 0 && head < group) place.stats[head * 2] = most, place.stats[head * 2 + 1] = total;
  }
  float out[2][4][4] = {};  // [half][pair][row][head]
#pragma unroll
  for (int i = 0; i < kSplit / kUnit; ++i)
    if (i * kUnit < left) add_values(r, values + i * kUnit / kTogether * kGap, scores[i], out);
  before_copy_in();
  sync_warp();
  if (r.lane < kWarps) arrive(&r.s.empty[slot]);
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (2 * r.t + h < group)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int pair = 0; pair < 4; pair += 2)
          *reinterpret_cast<Four*>(place.out + (2 * r.t + h) * kHead + half * 64 + r.g * 8 + pair * 2) =
              Four{out[half][pair][h], out[half][pair][h + 2], out[half][pair + 1][h], out[half][pair + 1][h + 2]};
}

// All runs of a row and head, in order: attention's output. A warp has 64 columns of one query head, a lane the numbers of
// one run in each 32.
DEVICE void merge(const Reader& r, const Unit& unit, int group) {
  const Params& p = r.p;
  const int column = r.warp % 2 * 64 + r.lane * 2;
  const Place place = place_of(p, unit, 0);
  const int pitch = group * kHead;  // floats from run to run
  constexpr int kEarly = 20;        // runs whose results are asked for before their weights are known: 1,280 tokens
  constexpr int kBatch = 8;         // of the others, which are asked for together; never on both sides of a 32nd one
  for (int head = r.warp / 2; head < group; head += kWarps / 2) {
    const float *parts = place.out + head * kHead + column, *stats = place.stats + head * 2;
    auto part_of = [&](int run) {
      return run < unit.splits ? load_fresh(reinterpret_cast<const float2*>(parts + run * pitch)) : float2{0.f, 0.f};
    };
    auto stats_of = [&](int run) {
      return run < unit.splits ? load_fresh(reinterpret_cast<const float2*>(stats + run * group * 2)) : float2{-INFINITY, 0.f};
    };
    float2 early[kEarly];
#pragma unroll
    for (int i = 0; i < kEarly; ++i) early[i] = part_of(i);
    const float2 first = stats_of(r.lane);
    float most = first.x, total = 0.f, factor = 0.f, out[2] = {};
#pragma unroll 1
    for (int base = 32; base < unit.splits; base += 32) most = larger(most, stats_of(base + r.lane).x);
    for (int mask = 16; mask; mask >>= 1) most = larger(most, shuffle_xor(most, mask));
    auto weigh = [&](const float2& mine) {  // of 32 runs
      factor = exp2_(mine.x - most);
      float sum = times(mine.y, factor);
      for (int mask = 16; mask; mask >>= 1) sum += shuffle_xor(sum, mask);
      total += sum;
    };
    auto add = [&](const float2& part, int run) {
      const float weight = from_lane(factor, run % 32);
      out[0] = fused(part.x, weight, out[0]), out[1] = fused(part.y, weight, out[1]);
    };
    weigh(first);
#pragma unroll
    for (int i = 0; i < kEarly; ++i) add(early[i], i);
#pragma unroll 1
    for (int base = kEarly; base < unit.splits;) {
      if (base % 32 == 0) weigh(stats_of(base + r.lane));
      const int count = base % 32 + kBatch > 32 ? 32 - base % 32 : kBatch;
      float2 next[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) next[i] = i < count ? part_of(base + i) : float2{0.f, 0.f};
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (i < count) add(next[i], base + i);
      base += count;
    }
    uint16_t* to = p.work.mixed + int64_t(unit.row) * p.heads * kHead + (unit.head * group + head) * kHead + placed(column);
    *reinterpret_cast<uint32_t*>(to) = narrow(out[0] / total, out[1] / total);
  }
}

// This block's part of the runs of a row and head: of a thread each.
struct Due {
  uint32_t runs = 0, all;
  DEVICE Due(const Params& p, int thread, const Range& runs_) {
    int start = 0;
#pragma unroll 1
    for (int row = 0; row < thread / p.kv_heads && row < p.rows; ++row) start += splits_of(p.lens[row]) * p.kv_heads;
    if (thread >= p.rows * p.kv_heads) return;
    const int splits = splits_of(p.lens[thread / p.kv_heads]);
    start += thread % p.kv_heads * splits;
    const int begin = start > runs_.first ? start : runs_.first, end = start + splits < runs_.last ? start + splits : runs_.last;
    runs = begin < end ? end - begin : 0, all = splits;
  }
};

// Says which rows and heads this block's runs belong to; whoever brings a row's last run merges it.
DEVICE void finish(Reader& r, int layer, const Range& runs, const Due& due) {
  const Params& p = r.p;
  const int thread = r.warp * 32 + r.lane;
  mark(r, 22);
  sync_computing();
  mark(r, 23);
  r.s.done[thread] =
      due.runs && count_up(&p.work.arrived[layer * p.rows * p.kv_heads + thread], due.runs) + due.runs == due.all;
  sync_computing();
  mark(r, 24);
  uint32_t merged = 0;
  for (int number = runs.first; number < runs.last;) {
    Unit unit;
    find_unit(p, number, unit);
    if (r.s.done[unit.row * p.kv_heads + unit.head]) merge(r, unit, p.heads / p.kv_heads), ++merged;
    number += unit.splits - unit.split;
  }
  if (merged) {
    mark(r, 25);
    end_stage(r, &p.work.attended[layer], merged);
    mark(r, 26);
  }
}

DEVICE void run_attention(Reader& r, int layer, const Range& runs, const Due& due) {
  const Params& p = r.p;
  const Layer& l = p.layers[layer];
  if (runs.first == runs.last) return;
  mark(r, 20);
  // A slot's runs are always the same warp's: a barrier's waiter must see every phase.
  const int until = runs.last - runs.first;
  int number = r.warp < kSlots ? (r.warp + kSlots - int(r.taken % kSlots)) % kSlots : until;
  bool begun = false;
  do {
    Prepared run;
    run.load(r, l, runs.first + (number < until ? number : 0));  // always: what is not, keeps its registers
    if (!begun) begin_stage(r, &p.work.ended[layer * 4 + kQkv], p.programs), mark(r, 21);
    begun = true;
    if (number < until) attend(r, l, run, r.warp, (r.taken + number) / kSlots & 1);
    number += kSlots;
  } while (number < until);
  r.taken += until;
  finish(r, layer, runs, due);
}

}  // namespace
