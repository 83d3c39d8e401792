// Attention of one token a row, in the middle of decode_layers.cu: runs of 64 keys that lie in the ring, a warp each, and their merge.
#pragma once

namespace {

// What turns a row's heads: this lane's two pairs of cosines and sines, and of a norm's weights.
struct Rotation {
  float c[2], s[2];
  DEVICE Rotation(const Reader& r, int row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) c[i] = r.p.cosines[row * 64 + r.lane + 32 * i], s[i] = r.p.sines[row * 64 + r.lane + 32 * i];
  }
};

struct Pairs {  // columns lane, lane + 32 and what they are turned with, of one head
  float first[2], second[2];
  DEVICE void load(const Reader& r, const uint16_t* from) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      first[i] = wide(load_fresh(from + r.lane + 32 * i)), second[i] = wide(load_fresh(from + r.lane + 32 * i + 64));
  }
  // Normed if the model does that, and rotated.
  DEVICE void turn(const Reader& r, const Rotation& by, bool normed, const Pairs& norm, uint16_t* to) const {
    float a[2] = {first[0], first[1]}, b[2] = {second[0], second[1]};
    if (normed) {
      float squares = 0.f;
#pragma unroll
      for (int i = 0; i < 2; ++i) squares += a[i] * a[i] + b[i] * b[i];
      for (int mask = 16; mask; mask >>= 1) squares += shuffle_xor(squares, mask);
      const float scale = reciprocal_root(squares / kHead + r.p.eps);
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // rounded between, as the model rounds
        a[i] = wide(narrow(a[i] * scale * norm.first[i]));
        b[i] = wide(narrow(b[i] * scale * norm.second[i]));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[r.lane + 32 * i] = narrow(a[i] * by.c[i] - b[i] * by.s[i]);
      to[r.lane + 32 * i + 64] = narrow(b[i] * by.c[i] + a[i] * by.s[i]);
    }
  }
};

// A row's new key and value: to their page, and to the slot, whose copy may be older than they are.
struct New {
  Pairs key;
  uint16_t value[4];
  DEVICE void load(const Reader& r, const Unit& unit, const uint16_t* row) {
    key.load(r, row + (r.p.heads + unit.head) * kHead);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      value[i] = load_fresh(row + (r.p.heads + r.p.kv_heads + unit.head) * kHead + r.lane + 32 * i);
  }
  DEVICE void enter(const Reader& r, const Layer& l, const Unit& unit, const Rotation& by, const Pairs& norm, uint16_t* keys,
                    uint16_t* values) const {
    const int at = unit.length - 1, place = at % kSplit * kHead;
    uint16_t *key_page = page_row(r.p, l.k_pages, unit, at), *value_page = page_row(r.p, l.v_pages, unit, at);
    key.turn(r, by, l.qk_norms != nullptr, norm, keys + place);
    sync_warp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = r.lane + 32 * i;
      values[place + column] = value_page[column] = value[i];
      key_page[column] = keys[place + column];
    }
    sync_warp();
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

// The run in `slot`, by one warp: scores, one maximum, probabilities, their sums with the values, to their place. A lane has
// 4 columns of up to kGroup heads.
template <int kGroup>
DEVICE void attend(const Reader& r, const Layer& l, const Unit& unit, int slot, uint32_t phase) {
  const Params& p = r.p;
  const int group = p.heads / p.kv_heads, first = unit.split * kSplit;
  const int left = unit.length - first < kSplit ? unit.length - first : kSplit;
  unsigned char* own = reinterpret_cast<unsigned char*>(r.s.scratch) + r.warp * sizeof r.s.scratch / kWarps;
  uint16_t* queries = reinterpret_cast<uint16_t*>(own);                     // [8][H], until they are in registers
  float(*probabilities)[kRows] = reinterpret_cast<float(*)[kRows]>(own);  // [64 keys][8 heads]
  const uint16_t* row = p.work.qkv + int64_t(unit.row) * (p.heads + 2 * p.kv_heads) * kHead;
  const bool last = unit.split == (unit.length - 1) / kSplit;
  // All that comes from device memory, at one time.
  const Rotation by(r, unit.row);
  Pairs heads[kGroup], query_norm, key_norm;
  New added;
#pragma unroll
  for (int h = 0; h < kGroup; ++h)
    if (h < group) heads[h].load(r, row + (unit.head * group + h) * kHead);
  if (last) added.load(r, unit, row);
  if (l.qk_norms != nullptr) query_norm.load(r, l.qk_norms), key_norm.load(r, l.qk_norms + kHead);
#pragma unroll
  for (int h = 0; h < kGroup; ++h)
    if (h < group) heads[h].turn(r, by, l.qk_norms != nullptr, query_norm, queries + h * kHead);
  sync_warp();
  uint4 query[4];
#pragma unroll
  for (int c = 0; c < 4; ++c)
    query[c] = r.g < group ? *reinterpret_cast<const uint4*>(queries + r.g * kHead + c * 32 + r.t * 8) : uint4{0, 0, 0, 0};
  sync_warp();

  uint16_t* keys = reinterpret_cast<uint16_t*>(r.s.ring[slot]);
  uint16_t* values = keys + kSplit * kHead;
  wait_for(&r.s.full[slot], phase);
  if (last) added.enter(r, l, unit, by, key_norm, keys, values);
  float scores[kSplit / kUnit][4] = {};
#pragma unroll
  for (int i = 0; i < kSplit / kUnit; ++i)
    if (i * kUnit < left)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint16_t* at = keys + (i * kUnit + r.g) * kHead + c * 32 + r.t * 8;
        multiply(scores[i], *reinterpret_cast<const uint4*>(at), *reinterpret_cast<const uint4*>(at + 8 * kHead), query[c]);
      }
  const Place place = place_of(p, unit, unit.split);
#pragma unroll
  for (int h = 0; h < 2; ++h) {  // heads 2t and 2t + 1, keys g and g + 8 of each 16
    float most = -INFINITY, total = 0.f;
#pragma unroll
    for (int i = 0; i < kSplit / kUnit; ++i)
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        float& score = scores[i][h + 2 * low];
        score = i * kUnit + r.g + 8 * low < left ? score * p.scale * kLog2e : -INFINITY;
        most = larger(most, score);
      }
    for (int mask = 4; mask < 32; mask <<= 1) most = larger(most, shuffle_xor(most, mask));
#pragma unroll
    for (int i = 0; i < kSplit / kUnit; ++i)
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        const float probability = exp2_(scores[i][h + 2 * low] - most);
        total += probability;
        probabilities[i * kUnit + r.g + 8 * low][2 * r.t + h] = probability;
      }
    for (int mask = 4; mask < 32; mask <<= 1) total += shuffle_xor(total, mask);
    const int head = 2 * r.t + h;
    if (r.g == 0 && head < group) place.stats[head * 2] = most, place.stats[head * 2 + 1] = total;
  }
  sync_warp();
  float out[kGroup][4] = {};
#pragma unroll 8
  for (int j = 0; j < left; ++j) {
    const uint2 both = *reinterpret_cast<const uint2*>(values + j * kHead + r.lane * 4);
    const float v[4] = {wide(both.x & 0xffff), wide(both.x >> 16), wide(both.y & 0xffff), wide(both.y >> 16)};
#pragma unroll
    for (int h = 0; h < kGroup; ++h)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[h][i] += probabilities[j][h] * v[i];
  }
  before_copy_in();
  sync_warp();
  if (r.lane < kWarps) arrive(&r.s.empty[slot]);
#pragma unroll
  for (int h = 0; h < kGroup; ++h)
    if (h < group)
      *reinterpret_cast<Four*>(place.out + h * kHead + r.lane * 4) = Four{out[h][0], out[h][1], out[h][2], out[h][3]};
}

// All runs of a row and head, in order: attention's output. A warp has 64 columns of one query head, a lane the numbers of
// one run in each 32.
DEVICE void merge(const Reader& r, const Unit& unit, int group) {
  const Params& p = r.p;
  const int column = r.warp % 2 * 64 + r.lane * 2;
  const Place place = place_of(p, unit, 0);
  const int pitch = group * kHead;  // floats from run to run
  constexpr int kEarly = 16;        // runs whose results are asked for before their weights are known
  for (int head = r.warp / 2; head < group; head += kWarps / 2) {
    const float *parts = place.out + head * kHead + column, *stats = place.stats + head * 2;
    float2 early[kEarly], mine;
#pragma unroll
    for (int i = 0; i < kEarly; ++i) early[i] = i < unit.splits ? load_fresh(reinterpret_cast<const float2*>(parts + i * pitch)) : float2{0.f, 0.f};
    float most = -INFINITY, total = 0.f, out[2] = {};
#pragma unroll 1
    for (int base = 0; base < unit.splits; base += 32) {
      mine = base + r.lane < unit.splits ? load_fresh(reinterpret_cast<const float2*>(stats + (base + r.lane) * group * 2)) : float2{-INFINITY, 0.f};
      most = larger(most, mine.x);
    }
    for (int mask = 16; mask; mask >>= 1) most = larger(most, shuffle_xor(most, mask));
#pragma unroll 1
    for (int base = 0; base < unit.splits; base += 32) {
      if (unit.splits > 32)
        mine = base + r.lane < unit.splits ? load_fresh(reinterpret_cast<const float2*>(stats + (base + r.lane) * group * 2)) : float2{-INFINITY, 0.f};
      const float factor = exp2_(mine.x - most);
      float sum = mine.y * factor;
      for (int mask = 16; mask; mask >>= 1) sum += shuffle_xor(sum, mask);
      total += sum;
      const int runs = unit.splits - base < 32 ? unit.splits - base : 32;
#pragma unroll
      for (int i = 0; i < kEarly; ++i) {
        const float weight = from_lane(factor, i);
        const float2 part = base == 0 ? early[i] : i < runs ? load_fresh(reinterpret_cast<const float2*>(parts + (base + i) * pitch)) : float2{0.f, 0.f};
        out[0] += part.x * weight, out[1] += part.y * weight;
      }
#pragma unroll 4
      for (int i = kEarly; i < runs; ++i) {
        const float weight = from_lane(factor, i);
        const float2 part = load_fresh(reinterpret_cast<const float2*>(parts + (base + i) * pitch));
        out[0] += part.x * weight, out[1] += part.y * weight;
      }
    }
    uint16_t* to = p.work.mixed + int64_t(unit.row) * p.heads * kHead + (unit.head * group + head) * kHead + column;
    to[0] = narrow(out[0] / total), to[1] = narrow(out[1] / total);
  }
}

// Says which rows and heads this block's runs belong to; whoever brings a row's last run merges it.
DEVICE void finish(Reader& r, int layer, const Range& runs) {
  const Params& p = r.p;
  const int thread = r.warp * 32 + r.lane;
  mark(r, 22);
  sync_computing();
  mark(r, 23);
  int start = 0;  // a thread has one row and head
  for (int row = 0; row < thread / p.kv_heads && row < p.rows; ++row) start += splits_of(p.lens[row]) * p.kv_heads;
  bool done = false;
  if (thread < p.rows * p.kv_heads) {
    const int splits = splits_of(p.lens[thread / p.kv_heads]);
    start += thread % p.kv_heads * splits;
    const int begin = start > runs.first ? start : runs.first, end = start + splits < runs.last ? start + splits : runs.last;
    if (begin < end)
      done = count_up(&p.work.arrived[layer * p.rows * p.kv_heads + thread], end - begin) + (end - begin) == uint32_t(splits);
  }
  r.s.done[thread] = done;
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

template <int kGroup>
DEVICE void run_attention(Reader& r, int layer) {
  const Params& p = r.p;
  const Layer& l = p.layers[layer];
  const Range runs = runs_of(p, r.program);
  if (runs.first == runs.last) return;
  mark(r, 20);
  begin_stage(r, &p.work.ended[layer * 4 + kQkv], p.programs);
  mark(r, 21);
  for (int number = runs.first; number < runs.last; ++number, ++r.taken) {
    const int slot = r.taken % kSlots;
    if (slot != r.warp) continue;  // a slot's runs are always the same warp's: a barrier's waiter must see every phase
    Unit unit;
    find_unit(p, number, unit);
    attend<kGroup>(r, l, unit, slot, (r.taken / kSlots) & 1);
  }
  finish(r, layer, runs);
}

}  // namespace
