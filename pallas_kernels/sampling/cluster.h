// What draw.cu asks of the machine beyond decode_layers/primitives.h: clusters of blocks that read each other's shared
// memory, and atomics on shared memory. Both for sm_90a and for the emulator.
#pragma once
#include "../decode_layers/primitives.h"

namespace {

#ifdef JAXLLM_EMULATED

constexpr int kThreads = 64;
inline void* const* emulated_blocks = nullptr;  // shared memory of each block of the cluster

DEVICE void publish() {}
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
inline float exp_fast(float x) { return std::exp(x); }
inline float log_(float x) { return std::log(x); }
inline float log1p_(float x) { return std::log1p(x); }

#else

#ifndef JAXLLM_THREADS
#define JAXLLM_THREADS 512
#endif
constexpr int kThreads = JAXLLM_THREADS;

// All threads of the cluster arrive; what one of them wrote is seen by the others if it was published before.
DEVICE void meet_cluster() {
  sync_warp();  // .aligned: a warp arrives as one
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What this thread wrote, and others of its block before they met it at a barrier of the block.
DEVICE void publish() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }
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
DEVICE float product(float a, float b) { return __fmul_rn(a, b); }  // not to be joined with what follows
template <typename T>
DEVICE T load_once(const T* from) {
  return __ldcs(from);
}
DEVICE float exp_fast(float x) {  // 0 below 2^-126
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
  return power;
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

template <typename T, typename Join>
DEVICE T over_lanes(T value, int lanes, Join join) {
  for (int mask = 1; mask < lanes; mask *= 2) value = join(value, shuffle_xor(value, mask));
  return value;
}

// What the threads of a block hold, joined in one order; the same bits in every thread.
template <typename T, typename Join>
DEVICE T over_block(Exchange& room, int thread, T value, Join join) {
  value = over_lanes(value, 32, join);
  sync_all();
  if (thread % 32 == 0) room.of_warps[thread / 32] = packed(value);
  sync_all();
  return over_lanes(unpacked<T>(room.of_warps[thread % kWarps]), kWarps, join);
}

// The same of all blocks of a cluster, a power of two; what a block wrote to its shared memory before is seen by all after.
template <typename T, typename Join>
DEVICE T over_cluster(Exchange& room, int& turn, int blocks, int thread, T value, Join join) {
  value = over_block(room, thread, value, join);
  turn ^= 1;
  if (thread == 0) {
    room.of_block[turn] = packed(value);
    publish();
  }
  meet_cluster();
  return over_lanes(unpacked<T>(peer(room, thread % blocks).of_block[turn]), blocks, join);
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
