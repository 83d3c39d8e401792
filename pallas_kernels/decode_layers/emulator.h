// The machine of primitives.h on a CPU, for tests: every thread of the grid is a fiber, which one thread runs in random
// turns. Copies land late, a random while after they were issued; memory a copy goes to is poison until then. A wait that
// nobody will end is found and said. What it cannot show is speed, and the order in which a GPU makes writes visible.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define DEVICE inline
#define SELDOM inline
#define RESIDENT

namespace {

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};

constexpr int kWarpLanes = 32, kDevices = 8;  // what outlives launches has a place for each device, at [here()]
constexpr size_t kStack = 128 * 1024;

struct Meeting {  // a barrier of `size` fibers
  int size = kWarpLanes, here = 0;
  uint64_t rounds = 0;
};

struct WarpState {
  Meeting meeting;
  uint64_t asleep = 0;  // until that round: others may be far ahead of it
  float value[kWarpLanes];
  int word[kWarpLanes];
  uint64_t shuffled[kWarpLanes];  // of any type, by its bytes
  uint32_t a[kWarpLanes][4], b[kWarpLanes][2];
};

struct BlockState {
  Meeting all, computing, groups[4];
  bool allows = false;  // the launch behind to begin
  std::vector<WarpState> warps;
};

struct Issued {  // a product of tensor cores that read shared memory: done when it is waited for
  float* sums;
  const char *a, *b;
  int columns, group;
  bool adds;
  float left[2][16] = {};  // where there is no a: the thread's two rows of it, of what its registers `held` hold until then
  const uint32_t* held = nullptr;
  uint32_t as_held[4] = {};
};

struct Grid;

struct Fiber {
  std::vector<std::pair<void*, const void*>> fetched;  // pieces of 16 bytes, until it says where it arrives with them
  std::vector<Issued> products;
  int groups = 0;
  ucontext_t begin;
  jmp_buf left;
  bool begun = false;
  std::unique_ptr<char[]> stack;
  BlockState* block;
  Grid* grid;
  int program, thread, lane, warp;
  bool done = false;
};

// What a fiber waits for, beside those of its neighbours: they are looked at far more often than they have come.
struct Wait {
  bool (*come)(const void*) = nullptr;
  alignas(8) char what[24];
};

struct Copy {
  std::function<void()> move;
  uint32_t bytes;
  uint64_t* barrier;
};

struct Grid {  // a launch
  int programs, threads, computing;
  std::function<void(int, int)> body;  // program, thread
  std::vector<void*> shared;  // memory of each block, where somebody asks for another's or for its beginning
  bool early = false;         // may begin when all blocks of the one ahead allow it
  int per_device = 1 << 30;   // programs: a grid may be those of several devices, one after the other
  int device = 0;             // of the first
  int cluster = 2;            // programs, where the kernel has clusters
  std::shared_ptr<void> kept; // what `body` and `shared` point to
  Grid* ahead = nullptr;
  std::vector<Meeting> clusters;
  std::vector<Fiber> fibers;
  std::vector<Wait> waits;  // of each fiber
  std::vector<BlockState> blocks;
  size_t left = 1;  // fibers, once it has begun
  bool done() const { return left == 0; }
  bool allows() const {
    return !blocks.empty() && std::all_of(blocks.begin(), blocks.end(), [](const BlockState& each) { return each.allows; });
  }
};

struct Random {  // xorshift
  uint32_t state = 1;
  void seed(unsigned seed) { state = (seed + 1) * 2654435761u | 1; }
  uint32_t operator()() {
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state;
  }
};

struct Machine {
  jmp_buf left;  // where the scheduler is while a fiber has its turn
  std::vector<Copy> copies;
  Fiber* current = nullptr;
  Random random;
  bool moved = false;  // something happened in this turn that a wait may end by
  std::string fault;
};

Machine* machine = nullptr;

// _setjmp, not swapcontext, which asks the system for the signal mask at each turn.
__attribute__((noinline)) inline void yield() {
  if (!_setjmp(machine->current->left)) _longjmp(machine->left, 1);
}

// A fiber gets no turn before what it waits for has come: it would only look and give the turn back.
template <typename Come>
inline void wait_until(const Come& come) {
  static_assert(sizeof(Come) <= sizeof(Wait::what) && std::is_trivially_copyable_v<Come>);
  if (come()) return;
  Fiber& own = *machine->current;
  Wait& wait = own.grid->waits[&own - own.grid->fibers.data()];
  std::memcpy(wait.what, &come, sizeof come);
  wait.come = [](const void* what) { return (*static_cast<const Come*>(what))(); };
  yield();
  wait.come = nullptr;
}

inline void meet(Meeting& meeting) {
  const uint64_t round = meeting.rounds;
  machine->moved = true;
  if (++meeting.here == meeting.size) {
    meeting.here = 0;
    ++meeting.rounds;
    return;
  }
  wait_until([rounds = &meeting.rounds, round] { return *rounds != round; });
}

inline void meet_cluster() { meet(machine->current->grid->clusters[machine->current->program / machine->current->grid->cluster]); }
// The same place in the shared memory of another block of the cluster.
template <typename T>
inline T* of_peer(T* mine, int peer) {
  const Grid& grid = *machine->current->grid;
  const int own = machine->current->program, other = own / grid.cluster * grid.cluster + peer;
  const auto first = grid.fibers.begin() + int64_t(other) * grid.threads;
  if (std::all_of(first, first + grid.threads, [](const Fiber& fiber) { return fiber.done; }))
    throw std::logic_error("a block of the cluster that has left is told something");
  return reinterpret_cast<T*>(intptr_t(mine) + (static_cast<char*>(grid.shared[other]) - static_cast<char*>(grid.shared[own])));
}
inline int here() { return machine->current->grid->device + machine->current->program / machine->current->grid->per_device; }  // which device
inline WarpState& my_warp() { return machine->current->block->warps[machine->current->warp]; }

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float wide(uint16_t bits) { return as_float(uint32_t(bits) << 16); }
inline uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float wide_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 0    ? std::ldexp(float(fraction), -24)
                     : exponent == 31 ? (fraction ? NAN : INFINITY)
                                      : std::ldexp(float(fraction + 1024), exponent - 25);
  return bits >> 15 ? -size : size;
}
inline float exp_(float x) { return std::exp(x); }
inline float exp2_(float x) { return std::exp2(x); }
inline float divided(float a, float b) { return a / b; }
inline float reciprocal_root(float x) { return 1.f / std::sqrt(x); }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline float times(float a, float b) { return a * b; }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }

template <typename T>
inline T load_fresh(const T* from) {
  return *from;
}

inline void sync_warp() { meet(my_warp().meeting); }
inline void sync_all() { meet(machine->current->block->all); }
inline void sync_computing() { meet(machine->current->block->computing); }
inline void sync_group(int group) { meet(machine->current->block->groups[group]); }

inline float from_lane(float value, int lane) {
  WarpState& warp = my_warp();
  warp.value[machine->current->lane] = value;
  sync_warp();
  const float other = warp.value[lane];
  sync_warp();
  return other;
}

template <int count>
inline void give_registers() {}
template <int count>
inline void take_registers() {}

template <typename T>
inline T shuffle_xor(T value, int mask) {
  WarpState& warp = my_warp();
  std::memcpy(&warp.shuffled[machine->current->lane], &value, sizeof value);
  sync_warp();
  T other;
  std::memcpy(&other, &warp.shuffled[machine->current->lane ^ mask], sizeof other);
  sync_warp();
  return other;
}

// What every lane had, for one to choose from.
template <typename Choose>
inline int chosen(int value, Choose choose) {
  WarpState& warp = my_warp();
  warp.word[machine->current->lane] = value;
  sync_warp();
  const int got = choose(warp.word, machine->current->lane);
  sync_warp();
  return got;
}
inline int shuffle(int value, int lane) {
  return chosen(value, [=](const int* all, int) { return all[lane % kWarpLanes]; });
}
inline int shuffle_up(int value, int delta) {
  return chosen(value, [=](const int* all, int lane) { return all[lane < delta ? lane : lane - delta]; });
}
inline int sum_of_warp(int value) {
  return chosen(value, [](const int* all, int) { return std::accumulate(all, all + kWarpLanes, 0); });
}
inline int most_of_warp(int value) {
  return chosen(value, [](const int* all, int) { return *std::max_element(all, all + kWarpLanes); });
}

inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  WarpState& warp = my_warp();
  const int lane = machine->current->lane, g = lane / 4, t = lane % 4;
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  std::memcpy(warp.a[lane], a, sizeof a);
  std::memcpy(warp.b[lane], b, sizeof b);
  sync_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i / 2) * 8, column = 2 * t + i % 2;
    float sum = 0.f;
    for (int k = 0; k < 16; ++k) {
      const int part = k % 8 / 2, high = k / 8;  // the lane's t that holds k, and in which of its registers
      const uint32_t left = warp.a[row % 8 * 4 + part][row / 8 + 2 * high], right = warp.b[column * 4 + part][high];
      sum += wide(uint16_t(left >> 16 * (k % 2))) * wide(uint16_t(right >> 16 * (k % 2)));
    }
    c[i] += sum;
  }
  sync_warp();
}

inline uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t all = uint64_t(b) << 32 | a;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= uint32_t(all >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return chosen;
}
inline uint32_t halves(uint32_t a, uint32_t b, bool high) {
  return bytes_of(a, b, high ? 0x7632 : 0x5410);
}
inline uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t flip) { return (a & mask) ^ flip; }
inline uint32_t less_pair(uint32_t a, uint32_t b) {
  return narrow(wide(uint16_t(a)) - wide(uint16_t(b))) | uint32_t(narrow(wide(a >> 16) - wide(b >> 16))) << 16;
}
inline uint32_t times_pair(uint32_t a, uint32_t b) {
  return narrow(wide(uint16_t(a)) * wide(uint16_t(b))) | uint32_t(narrow(wide(a >> 16) * wide(b >> 16))) << 16;
}
inline uint32_t narrow(float low, float high) { return narrow(low) | uint32_t(narrow(high)) << 16; }
inline uint32_t transposed(uint32_t pair) {
  const int lane = machine->current->lane, g = lane / 4, t = lane % 4;
  uint32_t* all = my_warp().b[0];
  all[lane] = pair;
  sync_warp();
  const uint32_t got = halves(all[2 * t * 4 + g / 2], all[(2 * t + 1) * 4 + g / 2], g % 2);
  sync_warp();
  return got;
}

struct Bar {  // what a 64-bit barrier holds here
  int32_t bytes;
  uint8_t arrivals, pending, phase, unused;
};
static_assert(sizeof(Bar) == sizeof(uint64_t));
inline Bar& bar(uint64_t* at) { return *reinterpret_cast<Bar*>(at); }

inline void settle(Bar& b) {
  machine->moved = true;
  if (b.pending || b.bytes) return;
  b.pending = b.arrivals;
  b.phase ^= 1;
}
inline void init_barrier(uint64_t* at, uint32_t arrivals) { bar(at) = {0, uint8_t(arrivals), uint8_t(arrivals), 0, 0}; }
inline void publish_barriers() {}
inline void before_copy_in() {}
inline void expect_bytes(uint64_t* at, uint32_t bytes) {
  bar(at).bytes += int32_t(bytes);
  --bar(at).pending;
  settle(bar(at));
}
inline void arrive(uint64_t* at) {
  if (bar(at).pending == 0) throw std::logic_error("more arrivals than a barrier expects");
  --bar(at).pending;
  settle(bar(at));
}
inline void wait_for(uint64_t* at, uint32_t parity) {
  wait_until([=] { return bar(at).phase != (parity & 1); });
}
inline void later(Copy copy) {
  machine->copies.push_back(std::move(copy));
  machine->moved = true;
}
inline void copy_in(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    throw std::logic_error("the copy engine takes multiples of 16 bytes");
  std::memset(to, 0xff, bytes);  // NaN until it lands
  later({[=] { std::memcpy(to, from, bytes); }, bytes, barrier});
}
inline void copy_16(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) throw std::logic_error("not at 16 bytes");
  std::memset(to, 0xff, 16);
  machine->current->fetched.emplace_back(to, from);
}
inline void arrive_with_copies(uint64_t* barrier) {
  auto pieces = std::exchange(machine->current->fetched, {});
  later({[=] {
           for (const auto& [to, from] : pieces) std::memcpy(to, from, 16);
           if (bar(barrier).pending == 0) machine->fault = "more arrivals than a barrier expects";
           --bar(barrier).pending;
         },
         0, barrier});
}

inline void signal(uint32_t* counter, uint32_t amount) {
  *counter += amount;
  machine->moved = true;
}
inline void await(const uint32_t* counter, uint32_t count) {
  wait_until([=] { return *counter >= count; });
}
inline uint32_t count_up(uint32_t* counter, uint32_t by = 1) {
  machine->moved = true;
  return std::exchange(*counter, *counter + by);
}

inline void mark(int, int, int, int) {}

inline void land(Machine& m, size_t at) {
  const Copy copy = std::move(m.copies[at]);
  if (at + 1 < m.copies.size()) m.copies[at] = std::move(m.copies.back());
  m.copies.pop_back();
  copy.move();
  bar(copy.barrier).bytes -= int32_t(copy.bytes);
  settle(bar(copy.barrier));
}

inline void enter_fiber() {
  Machine& m = *machine;
  try {
    m.current->grid->body(m.current->program, m.current->thread);
  } catch (const std::exception& fault) {
    m.fault = fault.what();
  }
  m.current->done = m.moved = true;
  m.current->grid->waits[m.current - m.current->grid->fibers.data()].come = [](const void*) { return false; };
  yield();
}

__attribute__((noinline)) inline void give_turn(Machine& m, Fiber& fiber) {
  m.current = &fiber;
  if (_setjmp(m.left)) return;
  if (fiber.begun) _longjmp(fiber.left, 1);
  fiber.begun = true;
  setcontext(&fiber.begin);
}

inline void allow_launch_behind() {
  if (!std::exchange(machine->current->block->allows, true)) machine->moved = true;
}
inline void await_launch_before() {
  const Grid* ahead = machine->current->grid->ahead;
  if (ahead != nullptr) wait_until([=] { return ahead->done(); });
}

inline void begin(Grid& grid) {
  grid.clusters.resize((grid.programs + grid.cluster - 1) / grid.cluster);
  for (Meeting& each : grid.clusters) each.size = grid.cluster * grid.threads;
  grid.blocks = std::vector<BlockState>(grid.programs);
  grid.fibers = std::vector<Fiber>(size_t(grid.programs) * grid.threads);
  grid.waits = std::vector<Wait>(grid.fibers.size());
  grid.left = grid.fibers.size();
  for (size_t i = 0; i < grid.fibers.size(); ++i) {
    Fiber& fiber = grid.fibers[i];
    BlockState& block = grid.blocks[i / grid.threads];
    block.all.size = grid.threads, block.computing.size = grid.computing;
    for (Meeting& group : block.groups) group.size = 4 * kWarpLanes;
    block.warps.resize(grid.threads / kWarpLanes);
    fiber.block = &block, fiber.grid = &grid, fiber.program = int(i / grid.threads), fiber.thread = int(i % grid.threads);
    fiber.lane = fiber.thread % kWarpLanes, fiber.warp = fiber.thread / kWarpLanes;
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.begin);
    fiber.begin.uc_stack.ss_sp = fiber.stack.get();
    fiber.begin.uc_stack.ss_size = kStack;
    fiber.begin.uc_link = nullptr;
    makecontext(&fiber.begin, enter_fiber, 0);
  }
}

// Runs body(program, thread) of all grids, those of a stream one after the other: each when the one ahead of it has ended or, an early
// one, as soon as that allows it. What went wrong, or nothing.
inline std::string run_streams(const std::vector<std::vector<Grid>*>& streams, unsigned seed) {
  Machine m;
  machine = &m;
  m.random.seed(seed);
  std::vector<size_t> begun(streams.size());
  std::vector<Grid*> running;
  uint64_t round = 0;
  for (int quiet = 0; quiet < 512 && m.fault.empty(); quiet = m.moved ? 0 : quiet + 1) {
    m.moved = !m.copies.empty(), ++round;
    for (size_t i = 0; i < running.size();)
      if (running[i]->done())
        running[i]->fibers.clear(), running.erase(running.begin() + i), m.moved = true;
      else
        ++i;
    for (size_t stream = 0; stream < streams.size(); ++stream)
      for (size_t& at = begun[stream]; at < streams[stream]->size(); ++at, m.moved = true) {
        Grid& next = (*streams[stream])[at];
        next.ahead = at ? &next - 1 : nullptr;
        if (next.ahead != nullptr && !next.ahead->done() && !(next.early && next.ahead->allows())) break;
        begin(next), running.push_back(&next);
      }
    if (running.empty()) break;
    for (size_t i = m.copies.size(); i-- > 0;)
      if (m.random() % 4 == 0 && i < m.copies.size()) land(m, i);
    for (Grid* grid : running) {
      if (m.random() % 4 == 0) {
        BlockState& block = grid->blocks[m.random() % grid->blocks.size()];
        block.warps[m.random() % block.warps.size()].asleep = round + m.random() % 48;
      }
      size_t at = m.random() % grid->fibers.size();
      for (size_t i = 0; i < grid->fibers.size(); ++i, at = at + 1 == grid->fibers.size() ? 0 : at + 1) {
        const Wait& wait = grid->waits[at];
        if (wait.come && !wait.come(wait.what)) continue;
        Fiber& fiber = grid->fibers[at];
        if (m.random() % 4 == 0 || fiber.block->warps[fiber.warp].asleep > round) continue;  // others do not wait unasked
        give_turn(m, fiber);
        grid->left -= fiber.done;
      }
    }
  }
  if (m.fault.empty() && !running.empty()) m.fault = "threads wait for what nobody will do";
  machine = nullptr;
  return m.fault;
}

inline std::string run_grid(int programs, int threads, int computing, unsigned seed, std::function<void(int, int)> body,
                            void* const* shared = nullptr, int per_device = 1 << 30, int cluster = 2) {
  std::vector<Grid> grids(1);
  Grid& grid = grids[0];
  grid.programs = programs, grid.threads = threads, grid.computing = computing, grid.body = std::move(body), grid.per_device = per_device;
  grid.cluster = cluster;
  if (shared != nullptr) grid.shared.assign(shared, shared + programs);
  return run_streams({&grids}, seed);
}

}  // namespace
