// When who came where, in launches that overlap: benchmarks/launches.cu reads it with -DJAXLLM_STAMPS. Otherwise nothing.
#pragma once

namespace {

enum Point { kBegun, kWaited, kFirst, kLast, kEnded, kPoints };  // first and last: product of a tile

#ifdef JAXLLM_STAMPS

constexpr unsigned kMostStamps = 1 << 22;
struct Stamp {
  unsigned long long nanoseconds;
  short launch, point;
  int multiprocessor;
};
__device__ Stamp stamps[kMostStamps];
__device__ unsigned stamped;

// By a block's first thread, or whoever says that it is.
DEVICE void stamp(int launch, int point, int thread) {
  if (thread != 0) return;
  unsigned long long now;
  unsigned multiprocessor;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
  asm volatile("mov.u32 %0, %smid;" : "=r"(multiprocessor));
  const unsigned at = atomicAdd(&stamped, 1);
  if (at < kMostStamps) stamps[at] = {now, short(launch), short(point), int(multiprocessor)};
}

#else

DEVICE void stamp(int, int, int) {}

#endif

}  // namespace
