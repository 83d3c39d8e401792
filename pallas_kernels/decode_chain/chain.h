// What lies between two attentions of a dense decoder for up to 256 rows, in launches each of which begins before the one ahead
// of it has ended (ADR 47): o, gate and up with SwiGLU, down, the next layer's qkv, by products.h; and behind o, down and qkv
// settle(), which adds up what a product's depth was cut into and what other devices have of it, with bias, residual and the RMS norm
// that follows. Not behind qkv where who attends adds up for itself.
//
// Weights depend on no launch, so a product's first blocks of them come while the launches ahead end: memory does not idle
// where a step has many short kernels.
#pragma once
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "packed_products.h"

namespace {

constexpr int kStages = 4, kOfCut = 3;  // numbers of a stage's cut: width, splits, shared
constexpr int kSettling = 256;  // threads of a row, of one block or of a cluster's
constexpr int kTogether = 4;    // splits that a thread asks for at one time, of all its pieces of a row where rows are few
constexpr int kFewRows = 64;    // what multiplies beside leaves more registers then
constexpr int kPaired = 2;      // blocks of a row's threads behind packed products: each quarter of a multiprocessor has room for one warp
constexpr int kWindow = 2;      // slots of first weights that come at one time behind settle(): its loads would wait for more
constexpr int kPartFours = 2;   // pieces of four numbers that a thread has of a row's part, where there is no norm

struct Settle {
  const float* sums;         // [splits, M, N]; of no splits nothing is read
  const uint16_t *bias;      // [N] or null
  const uint16_t *residual;  // [M, N] or null: added to what the product gives in bf16
  const uint16_t *norm;      // [N] or null: also write `normed`
  uint16_t *out, *normed;    // [M, N]
  Peers peers;               // who have other parts of the sums, and which of the two halves of their memory
  int turn;
  int M, N, splits, parts;  // of a row: one if there is a norm
  int sharing = 1;          // blocks that a row's threads are those of: kPaired where there is a norm and room for few
  float eps;
  int number;  // of the launch, for stamps
};

DEVICE float4 wide_four(const uint2& v) {
  return {wide(uint16_t(v.x)), wide(uint16_t(v.x >> 16)), wide(uint16_t(v.y)), wide(uint16_t(v.y >> 16))};
}
DEVICE uint2 narrow_four(const float4& v) { return {narrow(v.x, v.y), narrow(v.z, v.w)}; }
DEVICE float4 plus(const float4& a, const float4& b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
DEVICE float square(const float4& v) { return times(v.x, v.x) + times(v.y, v.y) + (times(v.z, v.z) + times(v.w, v.w)); }

struct RowSums {  // in a block
  float sums[kSettling / 32];  // of a row's warps
  uint64_t there;              // where they come from several blocks
};

// Of a row's threads, the same for all, in one order however many blocks they are those of.
template <int SHARING>
DEVICE float sum_of_row(float value, RowSums& room, int thread) {
  for (int mask = 16; mask; mask /= 2) value += shuffle_xor(value, mask);
  if (SHARING > 1) {
    await_cluster();  // the others' barriers are there
    if (thread % 32 < SHARING) tell(&room.sums[thread / 32], thread % 32, value, &room.there);
    wait_for(&room.there, 0);
  } else {
    if (thread % 32 == 0) room.sums[thread / 32] = value;
    sync_all();
  }
  float sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < kSettling / 32; ++warp) sum += room.sums[warp];
  return sum;
}

// Splits in order, the first few asked for at one time; `at`: of a piece of four, among all of the rows.
template <int FOURS, int TOGETHER, typename Each>
DEVICE void add_splits(const Settle& p, float4 (&sums)[FOURS], int64_t at, const Each& each) {
  const float4* from = reinterpret_cast<const float4*>(p.sums) + at;
  const int64_t pitch = int64_t(p.M) * p.N / 4;
  each([&](int i, int four) { sums[i] = p.splits ? load_fresh(from + four) : float4{0.f, 0.f, 0.f, 0.f}; });
  float4 parts[TOGETHER][FOURS];
#pragma unroll
  for (int split = 1; split < TOGETHER; ++split) {
    from += pitch;
    if (split < p.splits) each([&](int i, int four) { parts[split][i] = load_fresh(from + four); });
  }
#pragma unroll
  for (int split = 1; split < TOGETHER; ++split)
    if (split < p.splits) each([&](int i, int) { sums[i] = plus(sums[i], parts[split][i]); });
#pragma unroll 1
  for (int split = TOGETHER; split < p.splits; ++split) {
    from += pitch;
    each([&](int i, int four) { sums[i] = plus(sums[i], load_fresh(from + four)); });
  }
}

// Adds what the other devices have of these sums, and sends them its own; `at`: of a piece of four, among all of the rows. What is looked for
// says itself that it is there; zeros are put back for the next time.
template <int FOURS, typename Each>
DEVICE void add_peers(const Settle& p, float4 (&sums)[FOURS], int64_t at, const Each& each) {
  const Peers& peers = p.peers;
  auto way = [&](int device, int source, int four) {
    return peers.sums[device] + p.turn * peers.half + int64_t(source) * p.M * (p.N / 4) + at + four;
  };
#pragma unroll 1
  for (int next = 1; next < peers.ranks; ++next)
    each([&](int i, int four) { put_sums(way((peers.rank + next) % peers.ranks, peers.rank, four), sums[i]); });
  float4 totals[FOURS];
#pragma unroll 1
  for (int source = 0; source < peers.ranks; ++source) {
    float4 parts[FOURS];
    each([&](int i, int four) { parts[i] = source == peers.rank ? sums[i] : look(way(peers.rank, source, four)); });
    each([&](int i, int four) {
      if (source != peers.rank) {
        float4* from = way(peers.rank, source, four);
        await_sums(from, parts[i]);
        *from = float4{0.f, 0.f, 0.f, 0.f};
      }
      totals[i] = source ? plus(totals[i], parts[i]) : parts[i];
    });
  }
  each([&](int i, int) { sums[i] = totals[i]; });
}

// A row or a part of it, of so many pieces of four numbers for a thread.
template <int FOURS, bool FEW, bool PEERS, int SHARING>
DEVICE void settle(const Settle& p, int block, RowSums& room, int thread) {
  stamp(p.number, kBegun, thread);
  allow_launch_behind();
  if (SHARING > 1) {
    if (thread == 0) {
      init_barrier(&room.there, 1);
      publish_barriers();
      expect_bytes(&room.there, sizeof room.sums);
    }
    arrive_at_cluster();
  }
  thread += block % SHARING * (kSettling / SHARING), block /= SHARING;
  const int64_t at = int64_t(block / p.parts) * p.N;
  const int first = block % p.parts * (FOURS * kSettling) + thread;
  const uint2* norms = reinterpret_cast<const uint2*>(p.norm);
  auto each = [&](auto use) {
#pragma unroll
    for (int i = 0; i < FOURS; ++i)
      if ((first + i * kSettling) * 4 < p.N) use(i, first + i * kSettling);
  };
  if (norms != nullptr) each([&](int, int four) { fetch(norms + four); });
  await_launch_before();
  stamp(p.number, kWaited, thread);
  uint2 outs[FOURS];
  float squares = 0.f;
  constexpr int kPieces = PEERS || FEW || FOURS == 1 ? FOURS : 2;
#pragma unroll
  for (int begin = 0; begin < FOURS; begin += kPieces) {
    auto some = [&](auto use) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if ((first + (begin + i) * kSettling) * 4 < p.N) use(i, first + (begin + i) * kSettling);
    };
    float4 sums[kPieces];
    uint2 added[kPieces];
    if (p.residual != nullptr) some([&](int i, int four) { added[i] = load_fresh(reinterpret_cast<const uint2*>(p.residual + at) + four); });
    add_splits<kPieces, PEERS ? 2 : kTogether>(p, sums, at / 4, some);
    if (PEERS) add_peers(p, sums, at / 4, some);
    stamp(p.number, kFirst, thread);
    some([&](int i, int four) {
      float4& sum = sums[i];
      if (p.bias != nullptr) sum = plus(sum, wide_four(reinterpret_cast<const uint2*>(p.bias)[four]));
      if (p.residual != nullptr) sum = plus(wide_four(narrow_four(sum)), wide_four(added[i]));
      const uint2 out = narrow_four(sum);
      reinterpret_cast<uint2*>(p.out + at)[four] = outs[begin + i] = out;
      squares += square(wide_four(out));
    });
  }
  if (norms == nullptr) return;
  uint2 weights[FOURS];
  each([&](int i, int four) { weights[i] = norms[four]; });
  const float scale = reciprocal_root(divided(sum_of_row<SHARING>(squares, room, thread), float(p.N)) + p.eps);
  each([&](int i, int four) {
    const float4 weight = wide_four(weights[i]), sum = wide_four(outs[i]);
    reinterpret_cast<uint2*>(p.normed + at)[four] =
        narrow_four({times(times(sum.x, scale), weight.x), times(times(sum.y, scale), weight.y), times(times(sum.z, scale), weight.z),
                     times(times(sum.w, scale), weight.w)});
  });
  stamp(p.number, kEnded, thread);
}

#ifdef JAXLLM_EMULATED

template <int FOURS, bool FEW, bool PEERS, int SHARING>
std::string launch_settle(Stream stream, const Settle& p, bool early) {
  const int clusters = p.M * p.parts, threads = kSettling / SHARING;
  auto rooms = std::make_shared<std::vector<RowSums>>(clusters * SHARING);
  std::vector<void*> shared;
  for (RowSums& room : *rooms) shared.push_back(&room), std::fill_n(room.sums, kSettling / 32, NAN);
  auto body = [p, rooms = rooms.get()](int block, int thread) { settle<FOURS, FEW, PEERS, SHARING>(p, block, (*rooms)[block], thread); };
  if (clusters <= 32) {
    Grid grid = {clusters * SHARING, threads, threads};
    grid.body = body, grid.shared = shared, grid.kept = rooms, grid.early = early, grid.cluster = SHARING;
    return play(stream, std::move(grid), unsigned(p.M));
  }
  if (PEERS) return "more rows than the emulator plays on several devices";
  std::string fault = play_recorded(stream, unsigned(p.M));  // more fibers than there is room for: cluster by cluster
  for (int first = 0; first < clusters * SHARING && fault.empty(); first += SHARING)
    fault = run_grid(SHARING, threads, threads, unsigned(first), [&](int block, int thread) { body(first + block, thread); }, &shared[first], 1 << 30, SHARING);
  return fault;
}

#else

template <int FOURS, bool FEW, bool PEERS, int SHARING>
// Few registers, so that it finds room beside a product's block: what that leaves of them.
__global__ void __maxnreg__((FOURS > 4 ? 255 : PEERS ? 128 : FEW ? 88 : 64)) settle_rows(const __grid_constant__ Settle p) {
  __shared__ RowSums room;
  settle<FOURS, FEW, PEERS, SHARING>(p, int(blockIdx.x), room, int(threadIdx.x));
}

template <int FOURS, bool FEW, bool PEERS, int SHARING>
std::string launch_settle(Stream stream, const Settle& p, bool early) {
  return launch_kernel(settle_rows<FOURS, FEW, PEERS, SHARING>, p.M * p.parts * SHARING, kSettling / SHARING, 0, stream, early, p, SHARING);
}

#endif

template <int FOURS>
std::string launch_settle(Stream stream, const Settle& p, bool early) {
  if (p.peers.ranks > 1) return launch_settle<FOURS, false, true, 1>(stream, p, early);
  if constexpr (FOURS == 1 || FOURS == 4)
    if (p.sharing > 1) return launch_settle<FOURS, FOURS == 4, false, kPaired>(stream, p, early);
  if constexpr (FOURS == 4)
    if (p.M <= kFewRows) return launch_settle<FOURS, true, false, 1>(stream, p, early);
  return launch_settle<FOURS, false, false, 1>(stream, p, early);
}
std::string launch(Stream stream, Settle p, bool early = true) {
  auto over = [&](int fours) { return (p.N + kSettling * 4 * fours - 1) / (kSettling * 4 * fours); };
  p.parts = p.norm == nullptr ? over(kPartFours) : 1;
  if (p.norm == nullptr) return launch_settle<kPartFours>(stream, p, early);
  if (over(1) == 1) return launch_settle<1>(stream, p, early);
  if (over(4) == 1) return launch_settle<4>(stream, p, early);
  return over(8) == 1 ? launch_settle<8>(stream, p, early) : "a row of more than 8,192 numbers";
}

template <int WIDTH, int KIND>
std::string launch_width(Stream stream, const Product& p, const Cut& cut, int groups, bool early) {
  if (cut.shared == kWeights) return launch_product<WIDTH, 2, kWeights, KIND>(stream, p, early);
  if (groups == 1) return launch_product<WIDTH, 1, kRows, KIND>(stream, p, early);
  if (groups == 2) return launch_product<WIDTH, 2, kRows, KIND>(stream, p, early);
  return launch_product<WIDTH, 3, kRows, KIND>(stream, p, early);
}

// The widths that cuda.py chooses from.
std::string launch(Stream stream, const Product& p, Kind kind, const Cut& cut, int groups, bool early) {
  switch (cut.width * 10 + kind) {
    case 640: return launch_width<64, kSums>(stream, p, cut, groups, early);
    case 960: return launch_width<96, kSums>(stream, p, cut, groups, early);
    case 1280: return launch_width<128, kSums>(stream, p, cut, groups, early);
    case 641: return launch_width<64, kGated>(stream, p, cut, groups, early);
    case 1281: return launch_width<128, kGated>(stream, p, cut, groups, early);
    case 2241: return launch_width<224, kGated>(stream, p, cut, groups, early);
  }
  return "no tile that is " + std::to_string(cut.width) + " wide";
}

int64_t up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

struct Work {
  uint16_t *x, *normed, *hidden;
  float* sums;
  int64_t bytes;
};

// `sums`: the most of a product that is cut, of all its splits.
Work lay_out(int64_t M, int64_t D, int64_t F, int64_t sums, char* base) {
  int64_t at = 0;
  auto take = [&](int64_t bytes) { return base + std::exchange(at, at + up(bytes)); };
  Work w;
  w.x = reinterpret_cast<uint16_t*>(take(M * D * 2)), w.normed = reinterpret_cast<uint16_t*>(take(M * D * 2));
  w.hidden = reinterpret_cast<uint16_t*>(take(M * F * 2)), w.sums = reinterpret_cast<float*>(take(M * sums * 4));
  w.bytes = at;
  return w;
}

struct Weights {  // of a layer; biases may be null, and all of what follows a last layer
  const uint16_t *o, *o_bias, *norm, *gate_up, *down, *next_norm, *next_qkv, *next_bias;
};

struct Chain {  // what all its launches share
  Stream stream;
  const int64_t* cuts;  // [kStages, kOfCut]
  int blocks, M, D, O, F, Q;
  float eps;
  Work w;
  Peers peers = {};
  std::string fault = "";
  int number = 0;  // of the next launch, for stamps

  // The first layer's qkv, of a residual stream that nobody has normed: in the sums of splits. Begins a recording.
  void first(const uint16_t* x, const uint16_t* norm, const uint16_t* qkv) {
    Settle p = {w.sums, nullptr, x, norm, w.x, w.normed};
    p.M = M, p.N = D, p.eps = eps;
    if (fault.empty()) fault = launch(stream, p, false);
    multiply(kStages - 1, kSums, w.normed, qkv, w.sums, Q, D);
  }
  // Of a layer whose residual stream is x. `qkv`: the next one's, or null: they stay in the sums of splits. `early`: not what begins a
  // recording.
  void record(const Weights& layer, const uint16_t* mixed, const uint16_t* x, uint16_t* out, uint16_t* qkv, bool early) {
    multiply(0, kSums, mixed, layer.o, w.sums, D, O, early);
    add_up(0, {w.sums, layer.o_bias, x, layer.norm, w.x, w.normed, peers, 0}, D);
    multiply(1, kGated, w.normed, layer.gate_up, w.hidden, F, D);
    multiply(2, kSums, w.hidden, layer.down, w.sums, D, F);
    add_up(2, {w.sums, nullptr, w.x, layer.next_norm, out, w.normed, peers, 1}, D);  // in the way of no exchange before
    if (layer.next_qkv == nullptr) return;
    multiply(3, kSums, w.normed, layer.next_qkv, w.sums, Q, D);
    if (qkv != nullptr) add_up(3, {w.sums, layer.next_bias, nullptr, nullptr, qkv}, Q);
  }
  int splits(int stage) const { return int(cuts[stage * kOfCut + 1]); }

  void multiply(int stage, Kind kind, const void* x, const void* weight, void* out, int N, int K, bool early = true) {
    const int64_t* of = cuts + stage * kOfCut;
    const Cut cut = {int(of[0]), int(of[1]), int(of[2])};
    const int groups = cut.shared == kWeights ? 2 : (M + 63) / 64;
    Product p = {};
    p.out = out, p.number = number++;
    const bool packed = cut.shared == kOfPacked;
    if (fault.empty())
      fault = packed ? describe_packed(p, x, weight, M, kind == kGated ? 2 * N : N, K, cut, kind, blocks)
                     : describe(p, x, weight, M, N, K, cut, groups, kind, 8, blocks);
    if (stage % 2) p.window = kWindow;  // settle() is ahead of it
    if (fault.empty()) fault = packed ? launch_packed(stream, p, kind, cut, early) : launch(stream, p, kind, cut, groups, early);
  }
  void add_up(int stage, Settle p, int N) {
    p.M = M, p.N = N, p.eps = eps, p.splits = splits(stage), p.number = number++;
    if (cuts[stage * kOfCut + 2] == kOfPacked) p.sharing = kPaired;
    if (fault.empty()) fault = launch(stream, p);
  }
};

}  // namespace
