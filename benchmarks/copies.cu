// How fast a GPU can copy what attention reads, and nothing else: tiles of 16 KB from anywhere in a large pool to shared memory, by
// tensor maps, as pallas_kernels/decode_attention does it. Prints TB/s by the size of lines that the second-level cache is asked for,
// the form of a copy, and how many of them a worker has on their way. Made from the probe that benchmarks/results/decode_attention_h200
// reports (run 6), which had more patterns. With any argument: the power that two seconds of it draw, where memory holds one number and
// where it holds random ones.
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o copies benchmarks/copies.cu && ./copies [power]
#include <cuda.h>
#include <cuda_runtime.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

constexpr int kTile = 16384, kRow = 256, kWorkers = 2, kMostSlots = 6;  // bytes; a worker: a warp that asks and one that takes
constexpr int64_t kPool = int64_t(64) << 30;
constexpr int kRepeats = 10;

enum Form { kTwoBoxes, kOneBox };  // of 64 rows x 64 columns, or of 64 columns x 2 x 64 rows

__device__ uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

__device__ void wait_for(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ void ask(const CUtensorMap* map, Form form, int lane, int row, char* to, uint64_t* full) {
  if (lane == 0)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(full)), "r"(kTile) : "memory");
  __syncwarp();
  if (form == kTwoBoxes && lane < 2)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to + lane * kTile / 2)),
        "l"(map), "r"(lane * 64), "r"(row), "r"(shared_address(full))
        : "memory");
  if (form == kOneBox && lane == 0)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(0), "r"(0), "r"(row), "r"(shared_address(full))
        : "memory");
}

__global__ void __launch_bounds__(kWorkers * 64, 1)
    copies(const __grid_constant__ CUtensorMap map, const uint32_t* tiles, int n, Form form, int slots) {
  extern __shared__ __align__(1024) char rings[];
  __shared__ uint64_t full[kWorkers][kMostSlots], empty[kWorkers][kMostSlots];
  const int worker = threadIdx.x / 64, lane = threadIdx.x % 32;
  const bool asks = threadIdx.x % 64 < 32;
  if (asks && lane == 0) {
    for (int i = 0; i < slots; ++i)
      for (uint64_t* each : {&full[worker][i], &empty[worker][i]})
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(each)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int64_t number = blockIdx.x * kWorkers + worker, all = gridDim.x * kWorkers;
  uint32_t k = 0;
  for (int64_t i = n * number / all; i < n * (number + 1) / all; ++i, ++k) {
    const uint32_t slot = k % slots, round = k / slots;
    if (asks) {
      if (round > 0) wait_for(&empty[worker][slot], (round - 1) & 1);
      ask(&map, form, lane, int(tiles[i]) * (kTile / kRow), rings + (worker * slots + slot) * kTile, &full[worker][slot]);
    } else {
      wait_for(&full[worker][slot], round & 1);
      __syncwarp();
      if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&empty[worker][slot])) : "memory");
    }
  }
}

bool map_of(CUtensorMap& map, void* base, Form form, CUtensorMapL2promotion lines) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult answer;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &answer);
  if (found == nullptr) return false;
  const cuuint64_t rows = kPool / kRow, flat[2] = {128, rows}, deep[3] = {64, 2, rows}, pitches[2] = {kRow, 0}, steps_[2] = {128, kRow};
  const cuuint32_t box[2] = {64, 64}, deep_box[3] = {64, 2, 64}, ones[3] = {1, 1, 1};
  const bool two = form == kTwoBoxes;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)(
             &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, two ? 2 : 3, base, two ? flat : deep, two ? pitches : steps_, two ? box : deep_box, ones,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, lines, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

float seconds_of(const CUtensorMap& map, const uint32_t* tiles, int n, Form form, int slots, int blocks) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  for (int i = -1; i < kRepeats; ++i) {
    if (i == 0) cudaEventRecord(begin);
    copies<<<blocks, kWorkers * 64, kWorkers * slots * kTile>>>(map, tiles + int64_t(i + 1) * n, n, form, slots);
  }
  cudaEventRecord(end);
  cudaEventSynchronize(end);
  float ms = 0.f;
  cudaEventElapsedTime(&ms, begin, end);
  return ms / 1e3f / kRepeats;
}

__global__ void fill(uint32_t* p, int64_t n) {  // bits of a hash: what a wire carries costs energy when it changes
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    uint32_t h = uint32_t(i) * 2654435761u ^ uint32_t(i >> 20);
    h ^= h >> 15, h *= 2246822519u, h ^= h >> 13, h *= 3266489917u, h ^= h >> 16;
    p[i] = h & 0x9fff9fff | 0x20002000;  // bf16 of moderate size
  }
}

// Until the second nvidia-smi has answered.
void tell_power(const CUtensorMap& map, const uint32_t* tiles, int n, int blocks) {
  const auto begun = std::chrono::steady_clock::now();
  auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count(); };
  double bytes = 0, spent = 0;
  for (int asked = 0; seconds() < 2.;) {
    for (int i = 0; i < 20; ++i) bytes += double(n) * kTile * kRepeats, spent += seconds_of(map, tiles, n, kTwoBoxes, 2, blocks) * kRepeats;
    if (seconds() > .7 + .6 * asked && asked < 2) {
      ++asked;
      if (std::system("nvidia-smi --query-gpu=clocks.sm,power.draw.instant,power.draw.average --format=csv,noheader &")) return;
    }
  }
  std::printf("%3d blocks: %.3f TB/s\n", blocks, bytes / spent / 1e12);
  std::fflush(stdout);
}

}  // namespace

int main(int count, char**) {
  char* pool = nullptr;
  uint32_t* tiles = nullptr;
  int blocks = 0;
  if (cudaMalloc(&pool, kPool) != cudaSuccess) return std::puts("no 64 GB of memory"), 1;
  cudaMemset(pool, 1, kPool);
  cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0);
  cudaFuncSetAttribute(copies, cudaFuncAttributeMaxDynamicSharedMemorySize, kWorkers * kMostSlots * kTile);
  std::mt19937_64 random(1);
  for (int64_t bytes : {int64_t(32) << 20, int64_t(128) << 20, int64_t(544) << 20, int64_t(8000) << 20}) {
    const int n = int(bytes / kTile);
    std::vector<uint32_t> order(size_t(n) * (kRepeats + 1));  // other tiles each time: the smallest would stay in the cache
    for (uint32_t& each : order) each = uint32_t(random() % (kPool / kTile));
    cudaMalloc(&tiles, order.size() * 4);
    cudaMemcpy(tiles, order.data(), order.size() * 4, cudaMemcpyHostToDevice);
    if (count > 1) {  // power alone
      CUtensorMap map;
      if (bytes >> 20 != 544 || !map_of(map, pool, kTwoBoxes, CUtensorMapL2promotion(2))) continue;
      for (int random : {0, 1}) {
        if (random) fill<<<1056, 256>>>(reinterpret_cast<uint32_t*>(pool), kPool / 4);
        std::printf("== %s\n", random ? "random numbers" : "one number everywhere");
        for (int used : {blocks, blocks / 2}) tell_power(map, tiles, n, used);
      }
      return 0;
    }
    for (Form form : {kTwoBoxes, kOneBox})
      for (int lines : {0, 64, 128, 256}) {
        CUtensorMap map;
        const auto promotion = CUtensorMapL2promotion(lines == 0 ? 0 : lines == 64 ? 1 : lines == 128 ? 2 : 3);
        if (!map_of(map, pool, form, promotion)) return std::puts("no tensor map"), 1;
        std::printf("%4lld MB, %s, lines of %3d:", (long long)(bytes >> 20), form == kTwoBoxes ? "two boxes" : "one box  ", lines);
        for (int slots : {2, 3, 4, 6}) {
          const float seconds = seconds_of(map, tiles, n, form, slots, blocks);
          std::printf("  %d on their way %.3f TB/s", slots, double(bytes) / seconds / 1e12);
        }
        std::printf("  %s\n", cudaGetErrorString(cudaGetLastError()));
      }
    cudaFree(tiles);
  }
  return 0;
}
