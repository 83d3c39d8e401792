// What decode_chain.cu and decode_attention/decode_attention.cu ask of the machine beyond decode_layers/primitives.h: tiles by the copy
// engine, tensor cores that read shared memory, clusters. For sm_90a, and for the emulator.
#pragma once
#include "../decode_layers/primitives.h"

namespace {

constexpr int kDepth = 64;         // of a block: 128 bytes of a row, the widest the copy engine turns about
constexpr int kBlockThreads = 384; // two computing warpgroups; warps for weights, rows, scales and signals

constexpr int kMostRanks = 8;

// Devices that hold shares of the same layers (tensor parallelism): o and down give each a part of the sums, and every thread
// sends its own to the threads in its place on the others. Sums run in rank order, so all have the same bits.
struct Peers {
  float4* sums[kMostRanks];  // of each device: two halves, for o and for down, of which every source has a part
  int64_t half;
  int rank, ranks;           // ranks 0 or 1: nobody
};

// A ring's next slot, and the phase of its barrier.
template <int SLOTS>
struct Slot {
  int slot = 0;
  uint32_t phase = 0;
  DEVICE void next() {
    if (++slot == SLOTS) slot = 0, phase ^= 1;
  }
};

DEVICE float gated(float gate, float up) { return divided(gate, 1.f + exp_(-gate)) * up; }

// The 16-byte pieces of a row stand in another order in every row of eight, so that tensor cores find no bank twice.
DEVICE uint32_t swizzled(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }

#ifdef JAXLLM_EMULATED

// Four numbers whose words say by themselves whether they are there: zero is nobody's; in a peer's
// memory too. Looking, and waiting for what was missing.
DEVICE uint32_t never_zero(float x) { return bits_of(x) ? bits_of(x) : 0x80000000u; }
DEVICE int missing(const float4& v) { return !bits_of(v.x) + !bits_of(v.y) + !bits_of(v.z) + !bits_of(v.w); }
DEVICE void put_sums(float4* to, const float4& v) {
  if (missing(*to) != 4) throw std::logic_error("sums over others that nobody took");
  *to = {as_float(never_zero(v.x)), as_float(never_zero(v.y)), as_float(never_zero(v.z)), as_float(never_zero(v.w))};
  machine->moved = true;
}
DEVICE float4 look(const float4* from) { return *from; }
DEVICE void await_sums(const float4* from, float4& v) {
  wait_until([=] { return missing(*from) == 0; });
  v = *from;
}

struct TileMap {  // of a matrix [rows, columns], row after row
  const uint16_t* base;
  int64_t rows, columns;
  int box;  // rows of a tile
};

DEVICE void arrive_at_cluster() { meet_cluster(); }
DEVICE void leave_cluster() { meet_cluster(); }
DEVICE void await_cluster() {}
DEVICE void arrive_at(uint64_t* barrier, int peer) { arrive(of_peer(barrier, peer)); }
DEVICE void tell(float* mine, int peer, float value, uint64_t* barrier) {
  later({[to = of_peer(mine, peer), value] { *to = value; }, sizeof value, of_peer(barrier, peer)});
}
DEVICE void between_stores_and_copies() {}
DEVICE void fetch(const void*) {}
DEVICE void ask_for_map(const TileMap*) {}

template <typename RowOf>
DEVICE void copy_rows_of(char* place, const TileMap* map, int column, uint64_t* barrier, RowOf row_of) {
  const TileMap m = *map;
  std::memset(place, 0xff, size_t(m.box) * kDepth * 2);
  later({[=] {
           for (int r = 0; r < m.box; ++r)
             for (int c = 0; c < kDepth; ++c) {
               const int64_t row = row_of(r);
               const uint16_t value = row >= 0 && row < m.rows ? m.base[row * m.columns + column + c] : 0;
               std::memcpy(place + swizzled(r * kDepth * 2 + c * 2), &value, 2);
             }
         },
         uint32_t(m.box) * kDepth * 2, barrier});
}
DEVICE void copy_tile(void* to, const TileMap* map, int column, int row, uint64_t* barrier) {
  copy_rows_of(static_cast<char*>(to), map, column, barrier, [=](int r) { return int64_t(row) + r; });
}
DEVICE void copy_in_turns(void* to, const TileMap* map, int column, int eight, uint64_t* barrier) {
  const int64_t half = map->rows / 2;
  copy_rows_of(static_cast<char*>(to), map, column, barrier, [=](int r) {
    const int64_t row = (int64_t(eight) + r / 16) * 8 + r % 8;
    return row < half ? row + r % 16 / 8 * half : -1;
  });
}
DEVICE void copy_to_pair(void* to, const TileMap* map, int column, int row, uint64_t* barrier) {
  for (int peer = 0; peer < 2; ++peer)
    copy_rows_of(of_peer(static_cast<char*>(to), peer), map, column, of_peer(barrier, peer), [=](int r) { return int64_t(row) + r; });
}

// A product is done when it is waited for: an operand that was overwritten before shows.
template <int N, int COUNT>
DEVICE void multiply(float (&sums)[COUNT], const void* a, const void* b) {
  Fiber& mine = *machine->current;
  mine.products.push_back({sums, static_cast<const char*>(a), static_cast<const char*>(b), N, mine.groups, true});
}
DEVICE void begin_products() {}
DEVICE void end_products() { ++machine->current->groups; }
template <int LEFT>
DEVICE void await_products() {
  Fiber& mine = *machine->current;
  const int thread = mine.thread % 128, lane = thread % 32;
  while (!mine.products.empty() && mine.products.front().group < mine.groups - LEFT) {
    const Issued p = mine.products.front();
    mine.products.erase(mine.products.begin());
    if (p.held && !std::equal(p.held, p.held + 4, p.as_held)) throw std::logic_error("registers that a product still reads are written");
    const char* ground = static_cast<const char*>(mine.grid->shared[mine.program]);
    auto at = [&](const char* tile, int row, int k) {
      uint16_t bits;
      std::memcpy(&bits, ground + swizzled(uint32_t(tile - ground) + uint32_t(row) * kDepth * 2 + uint32_t(k) * 2), 2);
      return wide(bits);
    };
    for (int i = 0; i < p.columns / 2; ++i) {
      const int row = thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = 0.f;
      for (int k = 0; k < 16; ++k) sum += (p.a ? at(p.a, row, k) : p.left[i / 2 % 2][k]) * at(p.b, column, k);
      p.sums[i] = p.adds ? p.sums[i] + sum : sum;
    }
    machine->moved = true;
  }
  sync_warp();  // .sync.aligned: a warp does this as one, and a lane of it tells that all have read
}
template <int COUNT>
DEVICE void hold(float (&)[COUNT]) {}
// Lane l's word of matrix i: of those whose rows lanes 8i .. 8i + 7 point to.
inline void matrices_of_warp(uint32_t (&words)[4], const void* row, bool across) {
  WarpState& warp = my_warp();
  const int lane = machine->current->lane, g = lane / 4, t = lane % 4;
  warp.shuffled[lane] = reinterpret_cast<uint64_t>(row);
  sync_warp();
  for (int i = 0; i < 4; ++i) {
    auto at = [&](int r, int c) { return reinterpret_cast<const uint16_t*>(warp.shuffled[8 * i + r])[c]; };
    words[i] = across ? at(2 * t, g) | uint32_t(at(2 * t + 1, g)) << 16 : at(g, 2 * t) | uint32_t(at(g, 2 * t + 1)) << 16;
  }
  sync_warp();
}
DEVICE void load_matrices(uint32_t (&words)[4], const void* row) { matrices_of_warp(words, row, false); }
DEVICE void load_matrices_across(uint32_t (&words)[4], const void* row) { matrices_of_warp(words, row, true); }
DEVICE int opaque(int value) { return value; }

#else
#include <cuda.h>

using TileMap = CUtensorMap;

// Four numbers whose words say by themselves whether they are there: zero is nobody's; in a peer's
// memory too. Looking, and waiting for what was missing.
DEVICE uint32_t never_zero(float x) { return __float_as_uint(x) ? __float_as_uint(x) : 0x80000000u; }
DEVICE void put_sums(float4* to, const float4& v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(never_zero(v.x)), "r"(never_zero(v.y)),
               "r"(never_zero(v.z)), "r"(never_zero(v.w))
               : "memory");
}
DEVICE float4 look(const float4* from) {
  float4 v;
  asm volatile("ld.relaxed.sys.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
  return v;
}
DEVICE void await_sums(const float4* from, float4& v) {
  while (!__float_as_uint(v.x) || !__float_as_uint(v.y) || !__float_as_uint(v.z) || !__float_as_uint(v.w)) v = look(from);
}

DEVICE uint32_t address_at(const void* mine, int peer) {  // of another block of the cluster
  uint32_t at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(mine)), "r"(peer));
  return at;
}
// All threads of the cluster. Without a word about memory but barriers that were published.
DEVICE void arrive_at_cluster() {
  sync_warp();  // .aligned: a warp arrives as one
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
DEVICE void await_cluster() {
  sync_warp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE void meet_cluster() { arrive_at_cluster(), await_cluster(); }
// The last that they do: what they told each other's barriers has come.
DEVICE void leave_cluster() {
  sync_warp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// That what was in shared memory has been read. With .release.cluster it would be a fence of the whole device: 1.8 us.
DEVICE void arrive_at(uint64_t* barrier, int peer) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_at(barrier, peer)) : "memory");
}
// A number for another block of the cluster, of which its barrier expects the bytes.
DEVICE void tell(float* mine, int peer, float value, uint64_t* barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address_at(mine, peer)),
               "r"(__float_as_uint(value)), "r"(address_at(barrier, peer))
               : "memory");
}
// Between ordinary stores to device memory and copies of tiles from there.
DEVICE void between_stores_and_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// The next launch on the stream, where it is one that may begin early, begins once all blocks have said so; and what comes behind
// here sees all that the launch before has written. A launch that never waits so must not be waited for in turn.
DEVICE void allow_launch_behind() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void await_launch_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// To the first-level cache.
DEVICE void fetch(const void* from) { asm volatile("prefetch.global.L1 [%0];" ::"l"(from)); }

// Before its first use, which would wait for it.
DEVICE void ask_for_map(const TileMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Weights, read once: first to leave the cache.
DEVICE void copy_tile(void* to, const TileMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3}], [%4], policy;\n}" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// The same of two halves of a matrix, eight rows of each in turn.
DEVICE void copy_in_turns(void* to, const TileMap* map, int column, int eight, uint64_t* barrier) {
  asm volatile(
      "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3, %3, %4}], [%5], policy;\n}" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(0), "r"(eight), "r"(shared_address(barrier))
      : "memory");
}
// To the same place of both blocks of the cluster; the barrier of each counts what came to it.
DEVICE void copy_to_pair(void* to, const TileMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(uint16_t(3))
      : "memory");
}

// A matrix in shared memory whose rows are 128 bytes, swizzled: eight rows are 1,024 bytes (PTX ISA, "Matrix descriptor").
DEVICE uint64_t matrix(const void* at) {
  return uint64_t(shared_address(at) >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEVICE void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Four matrices of 8 x 8 from shared memory, each eight rows of 16 bytes; lane l points to row l % 8 of matrix l / 8, and gets of each
// row l / 4 the columns l % 4 * 2 and the next, or across, of column l / 4 those rows.
DEVICE void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void load_matrices_across(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

// A number of which the compiler knows nothing: what is made of it is made where it is wanted, and not kept through all layers.
DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
// What is done with sums stays behind the wait for them: a wait names no registers.
template <int COUNT>
DEVICE void hold(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i]));
}

#define JAXLLM_R8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define JAXLLM_R16(i) JAXLLM_R8(i), JAXLLM_R8(i + 8)
#define JAXLLM_R32(i) JAXLLM_R16(i), JAXLLM_R16(i + 16)
#define JAXLLM_P8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define JAXLLM_P16 JAXLLM_P8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define JAXLLM_P32 JAXLLM_P16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define JAXLLM_P48 JAXLLM_P32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define JAXLLM_P64 JAXLLM_P48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define JAXLLM_MULTIPLY(N, places, a_at, b_at, registers)                                                             \
  template <>                                                                                                         \
  DEVICE void multiply<N, N / 2>(float(&d)[N / 2], const void* a, const void* b) {                                    \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" places "}, %" a_at ", %" b_at           \
                 ", 1, 1, 1, 0, 0;\n"                                                                                 \
                 : registers                                                                                          \
                 : "l"(matrix(a)), "l"(matrix(b)));                                                                   \
  }

// sums[64][N] += a[64][16] @ b[N][16].T. Thread t of the warpgroup has rows t / 32 * 16 + t % 32 / 4 and the one 8 below,
// of each eight columns those at t % 4 * 2: {row, column}, {row, column + 1}, {row + 8, column}, {row + 8, column + 1}.
template <int N, int COUNT>
DEVICE void multiply(float (&d)[COUNT], const void* a, const void* b);
JAXLLM_MULTIPLY(16, JAXLLM_P8, "8", "9", JAXLLM_R8(0))
JAXLLM_MULTIPLY(32, JAXLLM_P16, "16", "17", JAXLLM_R16(0))
JAXLLM_MULTIPLY(64, JAXLLM_P32, "32", "33", JAXLLM_R32(0))
#define JAXLLM_COMMA ,
JAXLLM_MULTIPLY(96, JAXLLM_P48, "48", "49", JAXLLM_R32(0) JAXLLM_COMMA JAXLLM_R16(32))
JAXLLM_MULTIPLY(128, JAXLLM_P64, "64", "65", JAXLLM_R32(0) JAXLLM_COMMA JAXLLM_R32(32))

#endif

}  // namespace
