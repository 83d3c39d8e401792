// The sum of one array a device over NVLink peer memory, for up to 8 devices of one process. No multicast.
//
// Lines of 16 bytes {data, flag, data, flag} are pushed to the peers and polled there, so one store carries data and
// its arrival, and no fence or barrier is needed (NCCL's LL protocol). A block of one device meets only the same block
// of the others: it owns a counter of its calls (the flag) and, for each of two parities, lines that only the same
// block of one peer writes. A block starts call e + 2 only when every peer has sent it lines of call e + 1, so has
// finished reading those of call e: two parities suffice. Sums run in rank order in f32: all devices hold the same
// bits, whatever the timing.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "peers.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kMaxRanks = 8, kMaxBlocks = 64, kThreads = 512;
constexpr int64_t kLines = 2048;  // of one block, parity, source and phase

struct Peers {
  uint4* lines[kMaxRanks];
  uint32_t* calls;  // this device's counter of each block
  int rank;
};

__device__ __forceinline__ uint4* line(uint4* base, int ranks, int phase, int parity, int source, int64_t i) {
  return base + (((int64_t(phase) * 2 + parity) * ranks + source) * kMaxBlocks + blockIdx.x) * kLines + i;
}

__device__ __forceinline__ void put(uint4* to, uint2 data, uint32_t flag) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(data.x), "r"(flag), "r"(data.y),
               "r"(flag)
               : "memory");
}

__device__ __forceinline__ uint4 look(const uint4* from) {
  uint4 v;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

template <typename T>
struct Sum;

template <>
struct Sum<float> {
  float v[2] = {0.f, 0.f};
  __device__ void add(uint2 d) {
    v[0] += __uint_as_float(d.x);
    v[1] += __uint_as_float(d.y);
  }
  __device__ uint2 get() const { return make_uint2(__float_as_uint(v[0]), __float_as_uint(v[1])); }
};

template <typename Pair, float2 (*Widen)(Pair), Pair (*Narrow)(float2)>
struct PairSum {
  float2 a = {0.f, 0.f}, b = {0.f, 0.f};
  __device__ void add(uint2 d) {
    float2 x = Widen(*reinterpret_cast<Pair*>(&d.x)), y = Widen(*reinterpret_cast<Pair*>(&d.y));
    a.x += x.x, a.y += x.y, b.x += y.x, b.y += y.y;
  }
  __device__ uint2 get() const {
    Pair x = Narrow(a), y = Narrow(b);
    return make_uint2(*reinterpret_cast<uint32_t*>(&x), *reinterpret_cast<uint32_t*>(&y));
  }
};

__device__ __forceinline__ float2 widen_bf16(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ __nv_bfloat162 narrow_bf16(float2 x) { return __float22bfloat162_rn(x); }
__device__ __forceinline__ float2 widen_f16(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ __half2 narrow_f16(float2 x) { return __float22half2_rn(x); }

template <>
struct Sum<__nv_bfloat16> : PairSum<__nv_bfloat162, widen_bf16, narrow_bf16> {};
template <>
struct Sum<__half> : PairSum<__half2, widen_f16, narrow_f16> {};

// This block's next call: its flag, never 0, and the parity of its lines.
__device__ __forceinline__ uint32_t next_call(const Peers& peers) {
  uint32_t call = peers.calls[blockIdx.x] + 1;
  return call == 0 ? 2 : call;
}

__device__ __forceinline__ void done(const Peers& peers, uint32_t call) {
  __syncthreads();  // every thread has read the counter
  if (threadIdx.x == 0) peers.calls[blockIdx.x] = call;
}

// The sum over ranks of unit i, own part given, the others' awaited in this device's lines.
template <typename T, int N>
__device__ __forceinline__ uint2 gather(const Peers& peers, uint2 own, uint32_t call, int64_t i) {
  uint4 got[N];
#pragma unroll
  for (int s = 0; s < N; ++s)
    if (s != peers.rank) got[s] = look(line(peers.lines[peers.rank], N, 0, call & 1, s, i));
  Sum<T> sum;
#pragma unroll
  for (int s = 0; s < N; ++s) {
    if (s == peers.rank) {
      sum.add(own);
      continue;
    }
    while (got[s].y != call || got[s].w != call) got[s] = look(line(peers.lines[peers.rank], N, 0, call & 1, s, i));
    sum.add(make_uint2(got[s].x, got[s].z));
  }
  return sum.get();
}

// Everyone sends everything to everyone and sums it all.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) one_shot(const __grid_constant__ Peers peers, const uint2* x, uint2* out, int64_t units,
                                                     int64_t per) {
  const uint32_t call = next_call(peers);
  const int64_t first = blockIdx.x * per, count = min(per, units - first);
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const uint2 own = x[first + i];
#pragma unroll
    for (int d = 1; d < N; ++d) {
      const int peer = (peers.rank + d) % N;
      put(line(peers.lines[peer], N, 0, call & 1, peers.rank, i), own, call);
    }
  }
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
    out[first + i] = gather<T, N>(peers, x[first + i], call, i);
  done(peers, call);
}

// Each rank sums one share of the units and sends the sums to all. `share` units a rank, `per` of them a block.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) two_shot(const __grid_constant__ Peers peers, const uint2* x, uint2* out, int64_t share,
                                                     int64_t per) {
  const uint32_t call = next_call(peers);
  const int rank = peers.rank;
  const int64_t first = blockIdx.x * per, count = min(per, share - first);
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
#pragma unroll
    for (int d = 1; d < N; ++d) {
      const int peer = (rank + d) % N;
      put(line(peers.lines[peer], N, 0, call & 1, rank, i), x[peer * share + first + i], call);
    }
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const int64_t at = rank * share + first + i;
    const uint2 sum = gather<T, N>(peers, x[at], call, i);
    out[at] = sum;
#pragma unroll
    for (int d = 1; d < N; ++d) put(line(peers.lines[(rank + d) % N], N, 1, call & 1, rank, i), sum, call);
  }
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
#pragma unroll
    for (int d = 1; d < N; ++d) {
      const int peer = (rank + d) % N;
      uint4 got;
      do got = look(line(peers.lines[rank], N, 1, call & 1, peer, i));
      while (got.y != call || got.w != call);
      out[peer * share + first + i] = make_uint2(got.x, got.z);
    }
  done(peers, call);
}

struct Group {
  std::vector<int> devices;
  std::vector<void*> lines, calls;
};

std::mutex groups_mutex;
std::vector<Group*> groups;  // never freed: executables refer to them by number

ffi::Error failure(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInternal, "all_reduce: " + what); }

template <typename T, int N>
void launch(cudaStream_t stream, const Peers& peers, const void* x, void* out, int64_t units, bool two) {
  const int64_t share = two ? units / N : units;
  const int64_t wanted = (share + kThreads - 1) / kThreads;
  const int64_t blocks = wanted < kMaxBlocks ? wanted : kMaxBlocks;
  const int64_t per = (share + blocks - 1) / blocks;
  const unsigned grid = unsigned((share + per - 1) / per);  // no block without a unit: each meets its peers
  auto in = static_cast<const uint2*>(x);
  auto to = static_cast<uint2*>(out);
  if (two)
    two_shot<T, N><<<grid, kThreads, 0, stream>>>(peers, in, to, share, per);
  else
    one_shot<T, N><<<grid, kThreads, 0, stream>>>(peers, in, to, share, per);
}

template <typename T>
ffi::Error launch_for(int ranks, cudaStream_t stream, const Peers& peers, const void* x, void* out, int64_t units,
                      bool two) {
  switch (ranks) {
    case 2: launch<T, 2>(stream, peers, x, out, units, two); break;
    case 4: launch<T, 4>(stream, peers, x, out, units, two); break;
    case 8: launch<T, 8>(stream, peers, x, out, units, two); break;
    default: return failure("2, 4 or 8 devices, not " + std::to_string(ranks));
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? ffi::Error::Success() : failure(cudaGetErrorString(error));
}

ffi::Error all_reduce(cudaStream_t stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out,
                      ffi::Span<const int64_t> numbers, int64_t shots) {
  const bool two = shots == 2;
  int device = -1;
  if (cudaGetDevice(&device) != cudaSuccess) return failure("no current device");
  for (int64_t number : numbers) {
    const Group& group = *groups[number];
    const int ranks = int(group.devices.size());
    for (int rank = 0; rank < ranks; ++rank) {
      if (group.devices[rank] != device) continue;
      Peers peers{};
      for (int r = 0; r < ranks; ++r) peers.lines[r] = static_cast<uint4*>(group.lines[r]);
      peers.calls = static_cast<uint32_t*>(group.calls[rank]);
      peers.rank = rank;
      const int64_t units = int64_t(x.size_bytes()) / 8;
      switch (x.element_type()) {
        case ffi::DataType::BF16:
          return launch_for<__nv_bfloat16>(ranks, stream, peers, x.untyped_data(), out->untyped_data(), units, two);
        case ffi::DataType::F16:
          return launch_for<__half>(ranks, stream, peers, x.untyped_data(), out->untyped_data(), units, two);
        case ffi::DataType::F32:
          return launch_for<float>(ranks, stream, peers, x.untyped_data(), out->untyped_data(), units, two);
        default: return failure("bf16, f16 or f32 only");
      }
    }
  }
  return failure("device " + std::to_string(device) + " is in none of the groups");
}

// What may be left loaded lazily would be loaded while a peer waits: load every kernel now.
template <typename T, int N>
cudaError_t load() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, one_shot<T, N>);
  return error != cudaSuccess ? error : cudaFuncGetAttributes(&attributes, two_shot<T, N>);
}

template <int N>
cudaError_t load_all() {
  cudaError_t error = load<__nv_bfloat16, N>();
  if (error == cudaSuccess) error = load<__half, N>();
  return error != cudaSuccess ? error : load<float, N>();
}

cudaError_t make(Group& group) {
  const int ranks = int(group.devices.size());
  cudaError_t error = take_among_peers(group.devices, sizeof(uint4) * 2 * 2 * ranks * kMaxBlocks * kLines, group.lines);
  if (error == cudaSuccess) error = take_among_peers(group.devices, sizeof(uint32_t) * kMaxBlocks, group.calls);
  if (error != cudaSuccess) return error;
  return on_each(group.devices, [&] {
    return ranks == 2 ? load_all<2>() : ranks == 4 ? load_all<4>() : ranks == 8 ? load_all<8>() : cudaErrorInvalidValue;
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_all_reduce, all_reduce,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("groups")
                                  .Attr<int64_t>("shots"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

// The number of the group of these devices, in rank order; -1 and a reason in `why` when it cannot be made.
extern "C" int jaxllm_all_reduce_group(const int* devices, int count, char* why, int why_bytes) {
  std::lock_guard<std::mutex> lock(groups_mutex);
  const std::vector<int> wanted(devices, devices + count);
  for (size_t number = 0; number < groups.size(); ++number)
    if (groups[number]->devices == wanted) return int(number);
  auto* group = new Group{wanted, {}, {}};
  const cudaError_t error = make(*group);
  if (error != cudaSuccess) {
    snprintf(why, why_bytes, "%s", cudaGetErrorString(error));
    return -1;
  }
  groups.push_back(group);
  return int(groups.size()) - 1;
}

extern "C" int64_t jaxllm_all_reduce_most_bytes() { return 8 * kLines * kMaxBlocks; }
