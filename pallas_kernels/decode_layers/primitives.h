// What our CUDA kernels ask of the machine, on sm_90a. emulator.h has the same names for a CPU.
#pragma once
#ifdef JAXLLM_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#define DEVICE __device__ __forceinline__
#define SELDOM __device__ __noinline__  // kept out of the way of what runs often
#define RESIDENT __device__  // memory that starts as zeros and outlives launches

namespace {

constexpr int kDevices = 1;  // that share such memory: the emulator plays several
DEVICE constexpr int here() { return 0; }
DEVICE float wide(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
DEVICE uint16_t narrow(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE float wide_f16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
DEVICE float exp_(float x) { return __expf(x); }
// 0 below 2^-126: exp2f scales there and back, which the compiler does one number after the other.
DEVICE float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float divided(float a, float b) { return __fdividef(a, b); }  // 0 above 2^126
DEVICE float reciprocal_root(float x) { return rsqrtf(x); }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
// Rounded as written, so that no two copies of one line differ in what the compiler made of it.
DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// From the second-level cache: written by other blocks of this launch. Volatile, since CUDA's own __ldcg may be moved over
// a barrier and out of a loop.
DEVICE float load_fresh(const float* from) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
  return value;
}

DEVICE uint32_t load_fresh(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

DEVICE uint4 load_fresh(const uint4* from) {
  uint4 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from)
               : "memory");
  return value;
}

DEVICE float4 load_fresh(const float4* from) {
  float4 value;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(from)
               : "memory");
  return value;
}

DEVICE uint2 load_fresh(const uint2* from) {
  uint2 value;
  asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from) : "memory");
  return value;
}

DEVICE float2 load_fresh(const float2* from) {
  float2 value;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "l"(from) : "memory");
  return value;
}

DEVICE float from_lane(float value, int lane) { return __shfl_sync(~0u, value, lane); }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE int shuffle(int value, int lane) { return __shfl_sync(~0u, value, lane); }
DEVICE int shuffle_up(int value, int delta) { return __shfl_up_sync(~0u, value, delta); }
DEVICE int sum_of_warp(int value) { return __reduce_add_sync(~0u, value); }
DEVICE int most_of_warp(int value) { return __reduce_max_sync(~0u, value); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_all() { __syncthreads(); }
DEVICE void sync_computing() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
DEVICE void sync_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory"); }  // one of warpgroups

template <int count>
DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// c[16][8] += a[16][16] @ b[16][8]: bf16 in, f32 sums. Lane = 4 * g + t; rows g and g + 8, columns 2t and 2t + 1 of c.
DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// (a & mask) ^ flip. Written out: with two constants the compiler makes it two instructions.
DEVICE uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t flip) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(a), "r"(mask), "r"(flip));
  return result;
}

// Of two bf16 each: differences, products. Subnormal numbers are kept.
DEVICE uint32_t less_pair(uint32_t a, uint32_t b) {
  uint32_t difference;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}

DEVICE uint32_t times_pair(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// Four bytes of the eight in a (0 to 3) and b (4 to 7), the selector's lowest digit first.
DEVICE uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// Rows and columns of 8 x 8 halves swapped. A lane brings columns 2t and 2t + 1 of row g, and gets those of the other.
DEVICE uint32_t transposed(uint32_t pair) {
  uint32_t other;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(other) : "r"(pair));
  return other;
}

// The low halves of two words, or the high ones, as one.
DEVICE uint32_t halves(uint32_t a, uint32_t b, bool high) { return bytes_of(a, b, high ? 0x7632 : 0x5410); }

DEVICE uint32_t narrow(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

DEVICE uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

DEVICE void init_barrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

DEVICE void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

DEVICE void wait_for(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Device memory to shared memory by the copy engine; the barrier counts the bytes. Read once: first to leave the cache.
DEVICE void copy_in(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy;\n}" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// 16 bytes by the thread itself, which goes on; its next arrive_with_copies says when all it asked for so are there.
DEVICE void copy_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

DEVICE void arrive_with_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Between ordinary stores to shared memory and a copy that goes to the same place.
DEVICE void before_copy_in() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Everything this block wrote before the block-wide barrier above is seen by who awaits the count.
DEVICE void signal(uint32_t* counter, uint32_t amount) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(amount) : "memory");
}

DEVICE void await(const uint32_t* counter, uint32_t count) {
  uint32_t seen;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  while (seen < count);
}

DEVICE uint32_t count_up(uint32_t* counter, uint32_t by = 1) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(by) : "memory");
  return before;
}


#ifdef JAXLLM_TIMELINE  // when a block's first thread came to which point: benchmarks/decode_layers.py
constexpr int kMarks = 4096;
__device__ unsigned long long timeline[160][kMarks];  // nanoseconds * 32 + point
__device__ int marks[160];
DEVICE void mark(int program, int thread, int at, int point) {
  if (thread != 0) return;
  marks[program] = at + 1;
  unsigned long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
  if (at < kMarks) timeline[program][at] = now * 32 + point;
}
#else
DEVICE void mark(int, int, int, int) {}
#endif

}  // namespace
#endif
