// What draw.cu asks of the machine beyond decode_layers/primitives.h: clusters of blocks that read each other's shared
// memory, and atomics on shared memory. Both for sm_90a and for the emulator.
#pragma once
#include "../decode_layers/primitives.h"

namespace {

#ifdef JAXLLM_EMULATED

constexpr int kThreads = 64;
inline void* const* emulated_blocks = nullptr;  // shared memory of each block of the cluster

DEVICE void sync_cluster() { meet(machine->everyone); }
template <typename T>
DEVICE const T& peer(const T&, int rank) {
  return *static_cast<const T*>(emulated_blocks[rank]);
}
DEVICE uint32_t add_to(uint32_t* at, uint32_t value) {
  const uint32_t before = *at;
  *at += value;
  return before;
}
DEVICE void raise_to(uint32_t* at, uint32_t value) { *at = *at > value ? *at : value; }
DEVICE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
DEVICE float product(float a, float b) { return a * b; }
template <typename T>
DEVICE T load_once(const T* from) {
  return *from;
}
inline float log_(float x) { return std::log(x); }
inline float log1p_(float x) { return std::log1p(x); }

#else

constexpr int kThreads = 512;

DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
template <typename T>
DEVICE const T& peer(const T& mine, int rank) {
  const T* other;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(&mine), "r"(rank));
  return *other;
}
template <typename T>
DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
DEVICE uint32_t add_to(uint32_t* at, uint32_t value) { return atomicAdd(at, value); }
DEVICE void raise_to(uint32_t* at, uint32_t value) { atomicMax(at, value); }
DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }
DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE float product(float a, float b) { return __fmul_rn(a, b); }  // not to be joined with what follows
template <typename T>
DEVICE T load_once(const T* from) {
  return __ldcs(from);
}
DEVICE float log_(float x) { return logf(x); }
DEVICE float log1p_(float x) { return log1pf(x); }

#endif

constexpr int kWarps = kThreads / 32;

struct Smaller {
  template <typename T>
  DEVICE T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Larger {
  template <typename T>
  DEVICE T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Sum {
  template <typename T>
  DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

// Numbers of any type that travel between warps and blocks as 64 bits.
DEVICE uint64_t packed(uint64_t value) { return value; }
DEVICE uint64_t packed(uint32_t value) { return value; }
DEVICE uint64_t packed(float value) { return as_bits(value); }
template <typename T>
DEVICE T unpacked(uint64_t value);
template <>
DEVICE uint64_t unpacked<uint64_t>(uint64_t value) {
  return value;
}
template <>
DEVICE uint32_t unpacked<uint32_t>(uint64_t value) {
  return uint32_t(value);
}
template <>
DEVICE float unpacked<float>(uint64_t value) {
  return as_float(uint32_t(value));
}

struct Exchange {
  uint64_t of_warps[kWarps], of_block[2];  // of_block in turns: a block may be one exchange ahead of who reads it
};

// What the threads of a block hold, joined in one order; the same bits in every thread.
template <typename T, typename Join>
DEVICE T over_block(Exchange& room, int thread, T value, Join join) {
  for (int mask = 16; mask; mask /= 2) value = join(value, shuffle_xor(value, mask));
  sync_all();
  if (thread % 32 == 0) room.of_warps[thread / 32] = packed(value);
  sync_all();
  value = unpacked<T>(room.of_warps[0]);
  for (int warp = 1; warp < kWarps; ++warp) value = join(value, unpacked<T>(room.of_warps[warp]));
  return value;
}

// The same of all blocks of a cluster; what a block wrote to its shared memory before is seen by all after.
template <typename T, typename Join>
DEVICE T over_cluster(Exchange& room, int& turn, int blocks, int thread, T value, Join join) {
  value = over_block(room, thread, value, join);
  turn ^= 1;
  if (thread == 0) room.of_block[turn] = packed(value);
  sync_cluster();
  value = unpacked<T>(peer(room, 0).of_block[turn]);
  for (int rank = 1; rank < blocks; ++rank) value = join(value, unpacked<T>(peer(room, rank).of_block[turn]));
  return value;
}

// The sum over threads before this one, in one order.
DEVICE float sum_before(Exchange& room, int thread, float value) {
  float before = 0.f, total = value;
  for (int mask = 1; mask < 32; mask *= 2) {
    const float other = shuffle_xor(total, mask);
    if (thread & mask) before += other;
    total += other;
  }
  sync_all();
  if (thread % 32 == 0) room.of_warps[thread / 32] = packed(total);
  sync_all();
  float warps = 0.f;
  for (int warp = 0; warp < thread / 32; ++warp) warps += unpacked<float>(room.of_warps[warp]);
  return warps + before;
}

}  // namespace
