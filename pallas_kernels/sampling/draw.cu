// One token a row from logits and all that its request asks for, in one pass over device memory (ADR 0029).
//
// A cluster of blocks takes a row; each block holds its part of the row in shared memory, as masks, biases and penalties
// leave it. Thresholds: a histogram of distances below the best token, first of the threads' best ones or of tokens that
// can matter, says how far down the kept tokens can reach; those within reach are gathered and sorted in one block, which
// finds the exact thresholds among them and draws. A row that keeps more than kCandidates tokens finds its thresholds bit
// by bit over the whole row. Every sum runs in one order and every list is sorted before it is summed, so a row's token
// does not depend on its batch.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "cluster.h"

namespace {

constexpr uint32_t kMost = (1u << 15) - 1;  // of a count: how often the token was generated
constexpr float kFarthest = 26.f;           // below the best: noise is above -2.9 and below 23, so none is ever drawn
constexpr float kSteps = 32.f;              // bins of the histogram a unit of distance
constexpr int kBins = 1024;                 // more than kFarthest * kSteps
constexpr float kMassUnits = 4096.f;        // a token's mass relative to its bin's, as an integer
constexpr float kMargin = 2e-4f;            // of a mass, for that
constexpr float kMagic = 0x1p23f;           // added to a float below it: its low bits are the nearest integer
constexpr int kCandidates = 2048;           // a power of two
constexpr int kMostBlocks = 8;              // of a cluster
constexpr int kPartUnit = 128;              // a block's part of a row is a multiple of this
constexpr float kTiny = 1.17549435e-38f;
constexpr float kInfinity = INFINITY;
static_assert(kBins % kThreads == 0 && kCandidates % kThreads == 0);

struct Params {
  const float* logits;      // [B, V]
  const uint16_t* counts;   // [S1, V]
  const int* lines;         // [B], of counts
  const uint32_t* mask;     // [B, ceil(V / 32)]
  const int* bias_ids;      // [B, Nb]
  const float* bias;        // [B, Nb]
  const float *repetition, *frequency, *presence;
  const uint32_t* keys;     // [B, 2]
  const float* temperature;
  const int* top_k;
  const float *top_p, *min_p;
  int* tokens;
  uint8_t* bad;
  int rows, V, Nb, blocks, part;
};

struct Shared {
  Exchange room;
  uint32_t histogram[kBins];
  uint64_t list[kCandidates];    // candidates of this block
  uint32_t listed;               // how many there would be
  uint32_t counts[kMostBlocks];  // in the first block: how many the others have
  uint32_t bar;                  // ordered_bits of a score that a token of this block has reached
  alignas(16) float values[4];   // [part]: shared memory goes on
};

int64_t shared_bytes(int part) {  // the first block sorts all candidates where its values were
  return int64_t(sizeof(Shared)) + std::max<int64_t>(int64_t(part) * 4, kCandidates * 8);
}

// f32 as integers of the same order; -0 equals 0.
DEVICE uint32_t ordered_bits(float x) {
  const uint32_t bits = as_bits(x + 0.f);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}
DEVICE float from_ordered(uint32_t order) { return as_float(order >> 31 ? order & ~(1u << 31) : ~order); }

// The largest of these is the highest score, and of its tokens the first.
DEVICE uint64_t contender(float score, uint32_t token) { return uint64_t(ordered_bits(score)) << 32 | uint32_t(~token); }

struct Bits {
  uint32_t of[2];
};

// Threefry-2x32, 20 rounds, of the block (0, counter).
DEVICE Bits threefry(uint32_t key0, uint32_t key1, uint32_t counter) {
  const uint32_t schedule[3] = {key0, key1, key0 ^ key1 ^ 0x1BD11BDAu};
  constexpr int rotations[8] = {13, 15, 26, 6, 17, 29, 16, 24};
  uint32_t a = key0, b = counter + key1;
#pragma unroll
  for (int i = 0; i < 20; ++i) {
    a += b;
    b = (b << rotations[i % 8] | b >> (32 - rotations[i % 8])) ^ a;
    if (i % 4 == 3) {
      a += schedule[(i / 4 + 1) % 3];
      b += schedule[(i / 4 + 2) % 3] + uint32_t(i / 4 + 1);
    }
  }
  return {{a, b}};
}

DEVICE float gumbel(uint32_t bits) {
  const float u = (float(bits) + .5f) * 0x1p-32f;
  return -log_(-log1p_(-(u < 1.f - 0x1p-24f ? u : 1.f - 0x1p-24f)));
}

// One row's parameters, and which of its tokens this block has.
struct Row {
  uint32_t key0, key1;
  float inverse, top_p, best;
  float floor;  // the distance that min_p allows
  uint32_t k;  // 0: any number
  bool greedy, limits_mass;
  int begin, size;

  DEVICE Row(const Params& p, int row, int rank) {
    key0 = p.keys[2 * row], key1 = p.keys[2 * row + 1];
    const float temperature = p.temperature[row];
    top_p = p.top_p[row];
    floor = larger(-kFarthest, log_(p.min_p[row]));
    greedy = temperature == 0.f;
    inverse = 1.f / temperature;
    inverse = inverse < 3e38f ? inverse : 3e38f;  // times 0 it is 0
    const int top_k = p.top_k[row];
    k = top_k > 0 && top_k < p.V && !greedy ? uint32_t(top_k) : 0;
    limits_mass = top_p < 1.f && !greedy;
    begin = rank * p.part < p.V ? rank * p.part : p.V;
    size = p.V - begin < p.part ? p.V - begin : p.part;
  }

  DEVICE float scaled(float x) const { return (x - best) * inverse; }
  DEVICE float mass(float x) const { return exp_fast(scaled(x)); }
};

// What a request asks to be changed about its logits.
struct Asked {
  const uint16_t* counts;
  const uint32_t* mask;
  float repetition, frequency, presence;

  DEVICE Asked(const Params& p, int row) {
    repetition = p.repetition[row], frequency = p.frequency[row], presence = p.presence[row];
    counts = p.counts + int64_t(p.lines[row]) * p.V;
    mask = p.mask + int64_t(row) * ((p.V + 31) / 32);
  }
  DEVICE bool penalises() const { return repetition != 1.f || frequency != 0.f || presence != 0.f; }

  DEVICE float applied(float x, bool allowed, float bias, uint32_t count) const {
    x = (allowed ? x : -kInfinity) + bias;
    if (count) {
      x = x > 0.f ? x / repetition : x * repetition;
      const uint32_t times = count & kMost;
      x -= product(frequency, float(times));
      if (times) x -= presence;
    }
    return x;
  }
};

// W logits, counts and bits of the mask as they lie in memory: to be looked at once all loads are under way.
template <int W>
struct Tokens {
  uint4 x;
  uint2 count = {0, 0};
  uint32_t word;

  DEVICE void load(const float* logits, const uint16_t* counts, const uint32_t* mask, int at) {
    if constexpr (W == 4) {
      x = load_once(reinterpret_cast<const uint4*>(logits + at));
      if (counts) count = load_once(reinterpret_cast<const uint2*>(counts + at));
    } else {
      x.x = as_bits(load_once(logits + at));
      if (counts) count.x = load_once(counts + at);
    }
    word = mask[uint32_t(at) / 32];
  }
  DEVICE float logit(int i) const { return as_float(i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w); }
  DEVICE uint32_t times(int i) const { return (i < 2 ? count.x : count.y) >> i % 2 * 16 & 0xffff; }
};

// This block's part of the row to shared memory, without biases. The largest of it, and whether all was finite before.
template <int W>
DEVICE float fetch(const Row& row, const Asked& asked, const float* logits, int thread, float* values, bool& sound) {
  constexpr int kAhead = 4;
  const uint16_t* counts = asked.penalises() ? asked.counts + row.begin : nullptr;
  const uint32_t* mask = asked.mask + row.begin / 32;
  float best = -kInfinity;
  for (int base = thread * W; base < row.size; base += kThreads * W * kAhead) {
    Tokens<W> found[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {  // behind the end: the last ones once more
      const int at = base + i * kThreads * W, last = row.size - W;
      found[i].load(logits, counts, mask, at < last ? at : last);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = base + i * kThreads * W;
      if (at >= row.size) break;
      float x[W];
#pragma unroll
      for (int j = 0; j < W; ++j) {
        sound = sound && fabsf(found[i].logit(j)) < kInfinity;
        const bool allowed = found[i].word >> (uint32_t(at + j) % 32) & 1;
        x[j] = asked.applied(found[i].logit(j), allowed, 0.f, found[i].times(j));
        best = larger(best, x[j]);
      }
#pragma unroll
      for (int j = 0; j < W; ++j) values[at + j] = x[j];
    }
  }
  return best;
}

// Biased tokens of this block's part once more. Whether there were any of this thread's.
DEVICE bool add_biases(const Params& p, const Row& row, const Asked& asked, const float* logits, int number, int thread,
                       float* values) {
  bool any = false;
  for (int entry = thread; entry < p.Nb; entry += kThreads) {
    const int token = p.bias_ids[int64_t(number) * p.Nb + entry], at = token - row.begin;
    if (at < 0 || at >= row.size) continue;
    const bool allowed = asked.mask[token / 32] >> token % 32 & 1;
    const uint32_t count = asked.penalises() ? asked.counts[token] : 0;
    values[at] = asked.applied(logits[at], allowed, p.bias[int64_t(number) * p.Nb + entry], count);
    any = true;
  }
  return any;
}

// Calls visit(index in the part, value) for this thread's tokens, four neighbours at a time; -inf behind the end.
template <typename Visit>
DEVICE void each(const Row& row, int thread, const float* values, Visit visit) {
  for (int at = thread * 4; at < row.size; at += kThreads * 4) {
    const uint4 bits = *reinterpret_cast<const uint4*>(values + at);
    visit(at, as_float(bits.x)), visit(at + 1, as_float(bits.y));
    visit(at + 2, as_float(bits.z)), visit(at + 3, as_float(bits.w));
  }
}

struct Place {  // who this thread is
  const Params& p;
  Shared& my;
  int rank, thread;
  int turn = 0;

  template <typename T, typename Join>
  DEVICE T cluster(T value, Join join) {
    return over_cluster(my.room, turn, p.blocks, thread, value, join);
  }
  template <typename T, typename Join>
  DEVICE T block(T value, Join join) {
    return over_block(my.room, thread, value, join);
  }
};

// The highest score after noise of this thread's tokens that reach the threshold. Scores are worked out only where a
// cheap bound on the noise, -log(u) with u rounded down, may lift them above what the block has already seen.
DEVICE uint64_t drawn_from_all(Place& m, const Row& row, uint32_t threshold) {
  uint64_t winner = 0;
  for (int at = m.thread * 4; at < row.size; at += kThreads * 4) {
    const uint4 bits = *reinterpret_cast<const uint4*>(m.my.values + at);
    const float x[4] = {as_float(bits.x), as_float(bits.y), as_float(bits.z), as_float(bits.w)};
    const float bar = from_ordered(*reinterpret_cast<volatile uint32_t*>(&m.my.bar));
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t token = uint32_t(row.begin + at + 2 * pair);
      const Bits noise = threefry(row.key0, row.key1, token / 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float value = x[2 * pair + i], scaled = row.scaled(value);
        const float bound = as_float(0x3f800000u | noise.of[i] >> 9);  // 1 + u
        if (!(bound <= 1.f + 1.001f * exp_fast(scaled - bar))) continue;
        if (!(scaled >= row.floor) || ordered_bits(value) < threshold) continue;
        const float score = scaled + gumbel(noise.of[i]);
        const uint64_t one = contender(score, token + uint32_t(i));
        winner = winner > one ? winner : one;
        if (score > bar) raise_to(&m.my.bar, ordered_bits(score));
      }
    }
  }
  return winner;
}

// Counts a token at this distance where rows limit their number, else its mass in units of its bin's.
DEVICE void tally(Shared& my, const Row& row, float distance, bool counted) {
  const float steps = distance * -kSteps + kMagic;
  const float off = distance * -kSteps - (steps - kMagic);  // within half a bin: three terms of exp(-off / kSteps)
  constexpr float kLinear = kMassUnits / kSteps, kSquare = kLinear / kSteps / 2;
  const float units = off * (off * kSquare - kLinear) + (kMagic + kMassUnits);
  const uint32_t bin = as_bits(steps) - as_bits(kMagic), all = as_bits(units) - as_bits(kMagic);
  if (counted) add_to(&my.histogram[bin], row.k ? 1u : all);
}

DEVICE void clear(Shared& my, int thread) {
  for (int bin = thread; bin < kBins; bin += kThreads) my.histogram[bin] = 0;
  if (thread == 0) my.listed = 0;
}

// A distance within which all lies that the row keeps: where the histograms of all blocks hold enough, or `lowest`.
DEVICE float reach_of(Place& m, const Row& row, float whole, float lowest) {
  constexpr int kEach = kBins / kThreads;
  float own[kEach], sum = 0.f;
  for (int i = 0; i < kEach; ++i) {
    const int bin = m.thread * kEach + i;
    uint32_t units = 0;
#pragma unroll 8
    for (int rank = 0; rank < m.p.blocks; ++rank) units += peer(m.my, rank).histogram[bin];
    own[i] = row.k ? float(units) : float(units) * (1.f / kMassUnits) * exp_(float(bin) * (-1.f / kSteps));
    sum += own[i];
  }
  float reached = sum_before(m.my.room, m.thread, sum);
  const float wanted = row.k ? float(row.k) : row.top_p * whole * (1.f + kMargin);
  uint32_t last = kBins;
  for (int i = 0; i < kEach; ++i) {
    reached += own[i];
    if (reached >= wanted && last == kBins) last = uint32_t(m.thread * kEach + i);
  }
  last = m.block(last, Smaller());
  return larger(lowest, (float(last) + .5f) * (-1.f / kSteps));
}

// The tokens down to this distance go to the blocks' lists; how many there are in the row.
DEVICE uint32_t gather(Place& m, const Row& row, float reach) {
  Shared& my = m.my;
  each(row, m.thread, my.values, [&](int at, float x) {
    if (!(row.scaled(x) >= reach)) return;
    const uint32_t place = add_to(&my.listed, 1);
    if (place < kCandidates) my.list[place] = contender(x, uint32_t(row.begin + at));
  });
  sync_all();
  return m.cluster(m.thread == 0 ? my.listed : 0u, Sum());
}

// Largest first, in place; `size` is a power of two. Neighbours up to 32 apart are of one warp, stage after stage.
DEVICE void sort(uint64_t* keys, uint32_t size, int thread) {
  for (uint32_t run = 2; run <= size; run *= 2) {
    for (uint32_t reach = run / 2; reach; reach /= 2) {
      for (uint32_t pair = uint32_t(thread); pair < size / 2; pair += kThreads) {
        const uint32_t at = 2 * pair - (pair & (reach - 1));
        const uint64_t a = keys[at], b = keys[at + reach];
        if ((a < b) == !(at & run)) keys[at] = b, keys[at + reach] = a;
      }
      const uint32_t next = reach > 1 ? reach / 2 : run;
      if (reach > 32 || next > 32) sync_all();
      else sync_warp();
    }
  }
  sync_all();
}

// In one block: the token drawn from `keys`, the `size` candidates of the row. `whole` is the mass of all its tokens.
DEVICE uint64_t drawn_from_candidates(Place& m, const Row& row, uint64_t* keys, uint32_t size, float whole) {
  constexpr int kEach = kCandidates / kThreads;
  uint32_t room = 2;
  while (room < size) room *= 2;
  for (uint32_t i = size + uint32_t(m.thread); i < room; i += kThreads) keys[i] = 0;
  sync_all();
  sort(keys, room, m.thread);
  uint32_t lowest = row.k && size >= row.k ? uint32_t(keys[row.k - 1] >> 32) : 1;
  if (row.limits_mass) {
    float own[kEach], sum = 0.f;
    for (int i = 0; i < kEach; ++i) {
      const uint32_t at = uint32_t(m.thread * kEach + i);
      const uint32_t order = at < size ? uint32_t(keys[at] >> 32) : 0;
      own[i] = order >= lowest ? row.mass(from_ordered(order)) : 0.f;
      sum += own[i];
    }
    if (row.k) whole = m.block(sum, Sum());
    const float needed = larger(row.top_p * whole, kTiny);
    float reached = sum_before(m.my.room, m.thread, sum);
    uint32_t edge = kCandidates;
    for (int i = 0; i < kEach; ++i) {
      reached += own[i];
      if (own[i] > 0.f && reached >= needed && edge == kCandidates) edge = uint32_t(m.thread * kEach + i);
    }
    edge = m.block(edge, Smaller());
    if (edge < size) lowest = uint32_t(keys[edge] >> 32);
  }
  uint64_t winner = 0;
  for (uint32_t at = uint32_t(m.thread); at < size; at += kThreads) {
    const uint32_t order = uint32_t(keys[at] >> 32), token = ~uint32_t(keys[at]);
    if (order < lowest) break;
    const Bits noise = threefry(row.key0, row.key1, token / 2);
    const float score = row.scaled(from_ordered(order)) + gumbel(token % 2 ? noise.of[1] : noise.of[0]);
    const uint64_t one = contender(score, token);
    winner = winner > one ? winner : one;
  }
  return m.block(winner, Larger());
}

// The order that a token must reach, found bit by bit in passes over the row.
DEVICE uint32_t threshold_of_all(Place& m, const Row& row, float whole) {
  auto count_above = [&](uint32_t lowest) {
    uint32_t sum = 0;
    each(row, m.thread, m.my.values, [&](int, float x) {
      sum += ordered_bits(x) >= lowest && row.scaled(x) >= row.floor;
    });
    return m.cluster(sum, Sum());
  };
  auto mass_above = [&](uint32_t lowest) {
    float sum = 0.f;
    each(row, m.thread, m.my.values, [&](int, float x) {
      if (ordered_bits(x) >= lowest && row.scaled(x) >= row.floor) sum += row.mass(x);
    });
    return m.cluster(sum, Sum());
  };
  uint32_t lowest = 1;
  if (row.k) {
    uint32_t found = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1)
      if (count_above(found | bit) >= row.k) found |= bit;
    lowest = found > 1 ? found : 1;
  }
  if (!row.limits_mass) return lowest;
  if (row.k) whole = mass_above(lowest);
  const float needed = larger(row.top_p * whole, kTiny);
  uint32_t found = 0;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
    const uint32_t higher = found | bit;
    if (mass_above(higher > lowest ? higher : lowest) >= needed) found = higher;
  }
  return found > lowest ? found : lowest;
}

// Gathers the candidates of a row that limits how many tokens or how much mass it keeps; more than kCandidates are too
// many. `best` is this thread's, `whole` becomes the mass of all tokens if only mass is limited.
DEVICE uint32_t find_candidates(Place& m, const Row& row, float best, float& whole) {
  Shared& my = m.my;
  float lowest = row.floor;
  whole = 0.f;
  uint32_t size = kCandidates + 1;
  if (row.k) {  // no more than one token of each thread: if these are enough, so are all that are as near
    tally(my, row, row.scaled(best), row.scaled(best) >= row.floor);
    m.cluster(0u, Sum());
    size = gather(m, row, reach_of(m, row, whole, lowest));
  } else {
    each(row, m.thread, my.values, [&](int, float x) {
      const float mass = row.mass(x);
      whole += row.scaled(x) >= row.floor ? mass : 0.f;
    });
    whole = m.cluster(whole, Sum());
    // All tokens that each hold less than this hold less than what is left out: 1 - top_p.
    lowest = larger(lowest, log_(.99f * (1.f - row.top_p) * whole / float(m.p.V)));
  }
  if (size > kCandidates) {
    clear(my, m.thread);
    sync_all();
    each(row, m.thread, my.values, [&](int, float x) { tally(my, row, row.scaled(x), row.scaled(x) >= lowest); });
    m.cluster(0u, Sum());
    size = gather(m, row, reach_of(m, row, whole, lowest));
  }
  return size;
}

// In the first block: all candidates in one list, where its values were.
DEVICE uint64_t* collect(Place& m) {
  uint64_t* keys = reinterpret_cast<uint64_t*>(m.my.values);
  if (m.rank == 0) {
    if (m.thread < m.p.blocks) m.my.counts[m.thread] = peer(m.my, m.thread).listed;
    sync_all();
    for (int rank = m.thread / 32; rank < m.p.blocks; rank += kWarps) {  // a warp a block
      uint32_t first = 0;
      for (int before = 0; before < rank; ++before) first += m.my.counts[before];
      const Shared& other = peer(m.my, rank);
      const uint32_t count = m.my.counts[rank];
#pragma unroll 4
      for (uint32_t i = uint32_t(m.thread % 32); i < count; i += 32) keys[first + i] = other.list[i];
    }
  }
  return keys;
}

DEVICE void draw(const Params& p, Shared& my, int number, int rank, int thread) {
  Place m{p, my, rank, thread};
  Row row(p, number, rank);
  const Asked asked(p, number);
  const float* logits = p.logits + int64_t(number) * p.V + row.begin;
  clear(my, thread);
  if (thread == 0) my.bar = ordered_bits(-kInfinity);
  if (thread < 4 && row.size % 4 && row.size / 4 * 4 + thread >= row.size) my.values[row.size / 4 * 4 + thread] = -kInfinity;
  bool sound = true;
  float best = p.V % 4 ? fetch<1>(row, asked, logits, thread, my.values, sound)
                       : fetch<4>(row, asked, logits, thread, my.values, sound);
  sync_all();  // a biased token's place has been written
  if (m.block(uint32_t(add_biases(p, row, asked, logits, number, thread, my.values)), Larger())) {
    best = -kInfinity;
    each(row, thread, my.values, [&](int, float x) { best = larger(best, x); });
  }
  const uint64_t top = m.cluster(uint64_t(!sound) << 32 | ordered_bits(best), Larger());
  row.best = from_ordered(uint32_t(top));
  const bool bad = top >> 32 || !(fabsf(row.best) < kInfinity);
  uint64_t winner = 0;
  float whole;
  uint32_t size = kCandidates + 1;
  if (!bad && (row.k || row.limits_mass)) size = find_candidates(m, row, best, whole);
  if (size <= kCandidates) {
    uint64_t* keys = collect(m);
    meet_cluster();  // the others may go
    if (rank == 0) winner = drawn_from_candidates(m, row, keys, size, whole);
  } else {
    if (row.greedy) {
      each(row, thread, my.values, [&](int at, float x) {
        const uint64_t one = contender(x, uint32_t(row.begin + at));
        winner = at < row.size && one > winner ? one : winner;
      });
    } else if (!bad) {
      winner = drawn_from_all(m, row, row.k || row.limits_mass ? threshold_of_all(m, row, whole) : 1);
    }
    winner = m.cluster(winner, Larger());
    meet_cluster();  // nobody leaves whose shared memory is still read
  }
  if (rank == 0 && thread == 0) {
    const uint32_t token = ~uint32_t(winner);
    p.tokens[number] = token < uint32_t(p.V) ? int(token) : 0;
    p.bad[number] = bad;
  }
}

}  // namespace

#include "draw_launch.h"
