// How fast tiles of weights come on their way through shared memory: alone, with rows of x beside them (each block its own, or
// shared by the blocks of a cluster), with products, with weights packed tile by tile, and with launches that overlap.
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -cudart static -o tiles benchmarks/tiles.cu && ./tiles
//
// Prints us a launch of 32 in a row, on distinct weights, the median of five; w: TB/s of weights, l2: with x.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../pallas_kernels/decode_chain/wide_products.h"

namespace {

DEVICE void tile_m(void* to, const CUtensorMap* map, int c, int r, uint64_t* b, uint16_t mask) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)), "l"(map), "r"(c), "r"(r), "r"(shared_address(b)), "h"(mask) : "memory");
}
constexpr int ROWS = 128, DEPTH = 64, MAXSLOTS = 10;
struct P { CUtensorMap x, w; float* sink; int N, K, tiles, splits, units, clusters, packed; };

template <int WIDTH, int C, int XM, int MMA>
__global__ void __launch_bounds__(288, 1) probe(const __grid_constant__ P p) {
  extern __shared__ __align__(1024) char slots[];
  constexpr int XB = XM ? ROWS * 128 : 0, WB = WIDTH * 128, SLOT = ROWS * 128 + WB;
  constexpr int FITS = (226 * 1024) / SLOT, S = FITS < MAXSLOTS ? FITS : MAXSLOTS;
  __shared__ uint64_t there[MAXSLOTS], read_[MAXSLOTS];
  const int t = threadIdx.x, rank = blockIdx.x % C;
  if (t == 256) {
    for (int i = 0; i < S; ++i) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&there[i])), "r"(1) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&read_[i])), "r"(8 * (XM == 2 ? C : 1)) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  const int blocks = p.K / DEPTH;
  if (t == 256) {
    int asked = 0, slot = 0; uint32_t phase = 0;
    bool waited = false;
    for (int u = blockIdx.x / C; u < p.units; u += p.clusters) {
      const int split = u % p.splits, tile = u / p.splits * C + rank, first = split * blocks / p.splits, last = (split + 1) * blocks / p.splits;
      // weights of the first ring before the wait
      int i = first;
      if (!waited) {
        for (int s = 0; s < S && first + s < last; ++s) {
          expect_bytes(&there[s], XB + WB);
          if (p.packed) copy_tile(slots + s * SLOT + ROWS * 128, &p.w, 0, (tile * blocks + first + s) * WIDTH, &there[s]);
          else copy_tile(slots + s * SLOT + ROWS * 128, &p.w, (first + s) * DEPTH, tile * WIDTH, &there[s]);
        }
        asm volatile("griddepcontrol.wait;" ::: "memory");
      }
      for (; i < last; ++i) {
        if (asked >= S) wait_for(&read_[slot], phase ^ 1);
        char* to = slots + slot * SLOT;
        if (asked >= S || waited) {
          expect_bytes(&there[slot], XB + WB);
          if (p.packed) copy_tile(to + ROWS * 128, &p.w, 0, (tile * blocks + i) * WIDTH, &there[slot]);
          else copy_tile(to + ROWS * 128, &p.w, i * DEPTH, tile * WIDTH, &there[slot]);
        }
        asked++;
        if (XM == 1) copy_kept(to, &p.x, i * DEPTH, 0, &there[slot]);
        if (XM == 2) tile_m(to + rank * (XB / C), &p.x, i * DEPTH, rank * (ROWS / C), &there[slot], (1 << C) - 1);
        if (++slot == S) slot = 0, phase ^= 1;
      }
      waited = true;
    }
  } else if (t < 256) {
    const int group = t / 128, lane = t % 32;
    int slot = 0; uint32_t phase = 0;
    for (int u = blockIdx.x / C; u < p.units; u += p.clusters) {
      const int split = u % p.splits, first = split * blocks / p.splits, last = (split + 1) * blocks / p.splits;
      float d[WIDTH / 2];
      int before = -1;
      auto release = [&](int s) {
        if (XM == 2) { if (lane < C) arrive_at(&read_[s], lane); }
        else if (lane == 0) arrive_at(&read_[s], rank);
      };
      for (int i = first; i < last; ++i) {
        wait_for(&there[slot], phase);
        if (MMA) {
          const char* x = slots + slot * SLOT + group * 64 * 128;
          const char* w = slots + slot * SLOT + ROWS * 128;
          asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
          for (int k = 0; k < 4; ++k) multiply_wide<WIDTH>(d, x + k * 32, w + k * 32, i > first || k);
          asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          if (before >= 0) release(before);
          before = slot;
        } else { __syncwarp(); release(slot); }
        if (++slot == S) slot = 0, phase ^= 1;
      }
      if (MMA) {
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
        for (int i = 0; i < WIDTH / 2; ++i) asm volatile("" : "+f"(d[i]));
        release(before);
        float s = 0;
#pragma unroll
        for (int i = 0; i < WIDTH / 2; ++i) s += d[i];
        if (s == 12345.678f) p.sink[t] = s;
      }
    }
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

#define OK(x) do { auto e = (x); if (e != cudaSuccess) { printf("error %s line %d\n", cudaGetErrorString(e), __LINE__); exit(1); } } while (0)
using Encode = decltype(&cuTensorMapEncodeTiled);
Encode enc;
CUtensorMap map_of(void* base, int64_t rows, int64_t cols, int box) {
  CUtensorMap m; cuuint64_t sizes[2] = {cuuint64_t(cols), cuuint64_t(rows)}, pitch[1] = {cuuint64_t(cols) * 2}; cuuint32_t tile[2] = {DEPTH, cuuint32_t(box)}, st[2] = {1, 1};
  auto r = enc(&m, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, base, sizes, pitch, tile, st, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r) { printf("map error %d\n", r); exit(1); }
  return m;
}
char *weights, *xs; float* sink;
size_t kBytes = size_t(8) << 30;

template <int WIDTH, int C, int XM, int MMA>
void run(const char* name, int N, int K, int splits, int packed, int pdl, int most = 132) {
  const size_t each = size_t(N + 256) * K * 2; const int bufs = std::max(1, int(std::min<size_t>(16, kBytes / each)));
  std::vector<P> ps(bufs);
  const int tiles = (N + WIDTH - 1) / WIDTH, groups = (tiles + C - 1) / C;
  for (int i = 0; i < bufs; ++i) {
    P& p = ps[i]; char* w = weights + size_t(i) * each;
    p.x = map_of(xs, ROWS, K, XM == 2 ? ROWS / C : ROWS);
    p.w = packed ? map_of(w, int64_t(tiles) * WIDTH * (K / DEPTH), DEPTH, WIDTH) : map_of(w, N, K, WIDTH);
    p.sink = sink, p.N = N, p.K = K, p.tiles = tiles, p.splits = splits, p.units = groups * splits, p.packed = packed;
    p.clusters = std::min(p.units, most / C);
  }
  auto k = probe<WIDTH, C, XM, MMA>;
  constexpr int SLOT = ROWS * 128 + WIDTH * 128, FITS = (226 * 1024) / SLOT, S = FITS < MAXSLOTS ? FITS : MAXSLOTS;
  OK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, S * SLOT));
  cudaLaunchConfig_t cfg = {}; cudaLaunchAttribute at[2];
  cfg.gridDim = ps[0].clusters * C, cfg.blockDim = 288, cfg.dynamicSmemBytes = S * SLOT, cfg.attrs = at;
  at[0].id = cudaLaunchAttributeClusterDimension, at[0].val.clusterDim.x = C, at[0].val.clusterDim.y = 1, at[0].val.clusterDim.z = 1;
  at[1].id = cudaLaunchAttributeProgrammaticStreamSerialization, at[1].val.programmaticStreamSerializationAllowed = 1;
  cfg.numAttrs = pdl ? 2 : 1;
  cudaStream_t st; OK(cudaStreamCreate(&st)); cfg.stream = st;
  const int n = 32;
  cudaGraph_t g; cudaGraphExec_t ge;
  OK(cudaStreamBeginCapture(st, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < n; ++i) OK(cudaLaunchKernelEx(&cfg, k, ps[i % bufs]));
  OK(cudaStreamEndCapture(st, &g)); OK(cudaGraphInstantiate(&ge, g, 0));
  cudaEvent_t a, b; cudaEventCreate(&a), cudaEventCreate(&b);
  OK(cudaGraphLaunch(ge, st)); OK(cudaStreamSynchronize(st));
  std::vector<float> us;
  for (int r = 0; r < 5; ++r) {
    cudaEventRecord(a, st); OK(cudaGraphLaunch(ge, st)); cudaEventRecord(b, st); OK(cudaStreamSynchronize(st));
    float ms; cudaEventElapsedTime(&ms, a, b); us.push_back(ms * 1000 / n);
  }
  std::sort(us.begin(), us.end());
  const double mb = double(N) * K * 2 / 1e6, xmb = XM ? double(ps[0].units) * C * ROWS * (K / splits) * 2 / 1e6 / (XM == 2 ? C : 1) : 0;
  printf("%-8s w%-3d c%d x%d mma%d packed%d pdl%d splits%d blocks%-3d slots%d: %6.1f us  w %.2f TB/s  l2 %.2f TB/s\n", name, WIDTH, C, XM, MMA, packed, pdl, splits, ps[0].clusters * C, S, us[2], mb / us[2], (mb + xmb) / us[2]);
  fflush(stdout);
  cudaGraphExecDestroy(ge), cudaGraphDestroy(g), cudaStreamDestroy(st);
}

}  // namespace

int main() {
  void* f; cudaDriverEntryPointQueryResult q; OK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &q)); enc = Encode(f);
  OK(cudaMalloc(&weights, kBytes)); OK(cudaMalloc(&xs, 64 << 20)); OK(cudaMalloc(&sink, 1 << 20));
  { std::vector<uint16_t> h(32 << 20); uint32_t s = 1; for (auto& v : h) { s = s * 1664525u + 1013904223u; v = uint16_t((s >> 16 & 0x807f) | 0x3e80); }
    for (size_t o = 0; o + h.size() * 2 <= kBytes; o += h.size() * 2) OK(cudaMemcpy(weights + o, h.data(), h.size() * 2, cudaMemcpyHostToDevice));
    OK(cudaMemcpy(xs, h.data(), 32 << 20, cudaMemcpyHostToDevice)); }
#define BOTH(...) for (int pdl = 0; pdl < 2; ++pdl) { __VA_ARGS__; }
  for (int packed = 0; packed < 2; ++packed) BOTH(
    (run<224, 2, 0, 0>("gate_up", 28672, 4096, 1, packed, pdl));
    (run<224, 2, 2, 0>("gate_up", 28672, 4096, 1, packed, pdl));
    (run<224, 2, 1, 0>("gate_up", 28672, 4096, 1, packed, pdl));
    (run<224, 2, 2, 1>("gate_up", 28672, 4096, 1, packed, pdl));
    (run<224, 2, 0, 1>("gate_up", 28672, 4096, 1, packed, pdl));
    (run<256, 4, 2, 1>("gate_up", 28672, 4096, 1, packed, pdl));
    (run<128, 2, 2, 1>("gate_up", 28672, 4096, 1, packed, pdl));
    (run<128, 2, 2, 0>("gate_up", 28672, 4096, 1, packed, pdl));
    (run<128, 2, 0, 0>("gate_up", 28672, 4096, 1, packed, pdl));
    (run<128, 2, 2, 1>("down", 4096, 14336, 4, packed, pdl));
    (run<128, 2, 0, 0>("down", 4096, 14336, 4, packed, pdl));
    (run<128, 2, 2, 0>("down", 4096, 14336, 4, packed, pdl));
    (run<128, 4, 2, 1>("down", 4096, 14336, 3, packed, pdl));
    (run<256, 2, 2, 1>("down", 4096, 14336, 8, packed, pdl));
    (run<256, 2, 2, 1>("down", 4096, 14336, 7, packed, pdl));
    (run<96, 2, 2, 1>("qkv", 6144, 4096, 2, packed, pdl));
    (run<96, 2, 0, 0>("qkv", 6144, 4096, 2, packed, pdl));
    (run<192, 2, 2, 1>("qkv", 6144, 4096, 4, packed, pdl));
    (run<256, 2, 2, 1>("qkv", 6144, 4096, 5, packed, pdl));
    (run<128, 2, 2, 1>("qkv", 6144, 4096, 2, packed, pdl));
    (run<128, 2, 2, 1>("o", 4096, 4096, 4, packed, pdl));
    (run<128, 2, 0, 0>("o", 4096, 4096, 4, packed, pdl));
    (run<256, 2, 2, 1>("o", 4096, 4096, 8, packed, pdl));
  )
}
