// Attention of one query a row over paged keys and values, by tensor cores that read them where they land.
//
// One block a multiprocessor, of two workers: for each a warp that asks the copy engine for keys and values, 64 of one head at a
// time, as far ahead as shared memory allows, and four that multiply, each some of the keys and then some of a head's columns
// (by_warps.h).
//
// A row's new key and value are made, where that is asked for, together with the queries; who has a row's last keys writes them to
// their page and over what the copy brought of it.
//
// Splits, runs and shares are dealing.h's, in tiles of 64 keys. A cut run is folded by all four warps from memory, every thread
// some columns of one query, in the order and by the formula of the fold in registers: a row's bits depend on its own length only.
#pragma once
#ifndef JAXLLM_SLOTS  // a benchmark may try others
#define JAXLLM_SLOTS 6
#endif
#ifndef JAXLLM_FLIGHT
#define JAXLLM_FLIGHT 2
#endif

#include <memory>
#include <string>
#include <vector>

#include "warpgroup.h"
#include "../decode_chain/maps.h"
#include "../decode_chain/stamps.h"

namespace {

constexpr int kComputing = kWorkers * kGroupThreads, kThreads = kComputing + kGroupThreads;  // registers are taken by fours of warps
constexpr int kSlots = JAXLLM_SLOTS;
constexpr int kFlight = JAXLLM_FLIGHT;  // slots whose copies may be on their way at one time: more only wait for each other
static_assert(kFlight <= kSlots);

struct Call : Params {
  TileMap keys, values;  // the pages as [P * kv_heads * page_size][H], in boxes of 64 columns
  int number = 0;        // of the launch, for stamps
};

struct Ring {  // of tiles on their way to a worker
  alignas(1024) char slots[kSlots][kTileBytes];
  uint64_t full[kSlots], empty[kSlots];
};

struct Shared {
  Ring rings[kWorkers];
  Own own[kWorkers];
  Share shares[kWorkers][2];  // as the one who fetches and those who multiply have found them
};

DEVICE void fetch(const Call& p, const Share& share, Ring& ring, int lane) {
  Walk walk{cursor_of(p, share)};
  uint32_t asked = 0;
#pragma unroll 1
  while (walk.at.left > 0) {
    const Boxes boxes = walk.boxes(p, lane);
#pragma unroll 1
    for (int values = 0; values < 2; ++values, ++asked) {
      const uint32_t slot = asked % kSlots, round = asked / kSlots;
      if (round > 0) wait_for(&ring.empty[slot], (round - 1) & 1);
      const uint32_t before = asked - kFlight;
      if (kFlight < kSlots && asked >= kFlight) wait_for(&ring.full[before % kSlots], before / kSlots & 1);
      copy_boxes(p, values ? &p.values : &p.keys, boxes, lane, ring.slots[slot], &ring.full[slot]);
    }
    advance(p, share, walk.at, 1);
  }
}

struct Feed {
  Ring& ring;
  int lane;
  uint32_t taken = 0;
  DEVICE void begin(Worker& w, const Segment& s, bool enters) { prepare_together(w, s, enters); }
  DEVICE void end(Worker&) {}
  DEVICE char* take() {
    wait_for(&ring.full[taken % kSlots], taken / kSlots & 1);
    return ring.slots[taken % kSlots];
  }
  DEVICE void give_back() {
    sync_warp();
    if (lane == 0) arrive(&ring.empty[taken % kSlots]);
    ++taken;
  }
};

struct Place {  // of a thread. Made again behind what needs many registers: a number that is alive all through is spilled there, and
                // a spilled number costs a microsecond in every turn of a loop: shared memory leaves the first-level cache no room
  int thread;
  DEVICE Place again() const { return {opaque(thread)}; }
  DEVICE int lane() const { return thread % 32; }
  DEVICE int warp() const { return thread / 32 % kWarps; }
  DEVICE bool fetches() const { return thread / kGroupThreads == kWorkers; }
  // By warps that do not share a scheduler with one that leads. Less than zero: nobody's.
  DEVICE int worker() const { return fetches() ? warp() - kWorkers : thread / kGroupThreads; }
};

DEVICE void run(const Call& p, Shared& shared, int program, int thread) {
  stamp(p.number, kBegun, thread);
  allow_launch_behind();
  const Place given{thread};
  const int mine = given.worker();
  if (given.fetches() && mine >= 0 && given.lane() == 0) {
    Ring& ring = shared.rings[mine];
    for (int slot = 0; slot < kSlots; ++slot) init_barrier(&ring.full[slot], 1), init_barrier(&ring.empty[slot], kWarps);
    publish_barriers();
    ask_for_map(mine ? &p.values : &p.keys);
  }
  sync_all();
  Deal deal;
  bool any = false;
  if (mine >= 0) {
    Share found;
    any = find_share(p, program * kWorkers + mine, given.lane(), deal, found);
    shared.shares[mine][given.fetches()] = found;  // by all, the same
  }
  sync_warp();
  const Place at = given.again();
  if (at.fetches()) {
    give_registers<56>();
    if (any) fetch(p, shared.shares[at.worker()][1], shared.rings[at.worker()], at.lane());
    return;
  }
  take_registers<224>();
  await_launch_before();  // keys and values of earlier steps were asked for without that
  const int number = program * kWorkers + at.worker();
  clear_empty_rows(p, number, at.thread % kGroupThreads);
  stamp(p.number, kWaited, at.thread);
  if (!any) return;
  shared.own[at.worker()].deal = deal;  // by all, the same
  Worker w{p, shared.own[at.worker()], number, at.warp(), at.lane(), p.heads / p.kv_heads};
  Feed feed{shared.rings[at.worker()], at.lane()};
  attend_share(w, feed, shared.shares[at.worker()][0]);
  stamp(p.number, kEnded, at.thread);
}

std::string map_pages(Call& p, int64_t pages) {
  const int64_t rows = pages * p.kv_heads * (int64_t(kUnit) << p.page_shift);
  const int box = kUnit << (p.page_shift < kMostShift ? p.page_shift : kMostShift);
  std::string fault = map_of(p.keys, p.k_pages, rows, kHead, box, false);
  return fault.empty() ? map_of(p.values, p.v_pages, rows, kHead, box, false) : fault;
}

#ifdef JAXLLM_EMULATED

std::string launch_attention(Stream stream, const Call& p, bool early) {
  auto memory = std::make_shared<std::vector<std::unique_ptr<Shared>>>(p.programs);
  Grid grid = {p.programs, kThreads, kComputing};
  for (auto& each : *memory) {
    each = std::make_unique<Shared>();
    std::memset(grid.shared.emplace_back(each.get()), 0xff, sizeof(Shared));
  }
  grid.body = [p, memory = memory.get()](int program, int thread) { run(p, *(*memory)[program], program, thread); };
  grid.kept = memory, grid.early = early;
  return play(stream, std::move(grid), unsigned(p.rows));
}

#else

static_assert(sizeof(Shared) <= 232448, "shared memory of a multiprocessor");

__global__ void __launch_bounds__(kThreads, 1) decode_attention(const __grid_constant__ Call p) {
  extern __shared__ __align__(1024) char raw[];
  run(p, *reinterpret_cast<Shared*>(raw), int(blockIdx.x), int(threadIdx.x));
}

// `early`: it may begin before the launch ahead of it has ended.
std::string launch_attention(Stream stream, const Call& p, bool early) {
  // Of each device by itself, so at each call; only recordings of the step's graph come here.
  const cudaError_t error = cudaFuncSetAttribute(decode_attention, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return launch_kernel(decode_attention, p.programs, kThreads, sizeof(Shared), stream, early, p);
}

#endif

}  // namespace
