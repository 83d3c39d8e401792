// Matrices in device memory as the copy engine takes them, in tiles of kDepth columns, and launches that overlap. Host code.
#pragma once
#include <string>
#include <vector>

#ifndef JAXLLM_PROMOTION
#define JAXLLM_PROMOTION CU_TENSOR_MAP_L2_PROMOTION_L2_128B
#endif

namespace {

#ifdef JAXLLM_EMULATED

using Stream = std::vector<Grid>*;  // launches that a call records, to be run at its end; null: each runs at once

std::string play(Stream stream, Grid grid, unsigned seed) {
  if (stream != nullptr) return stream->push_back(std::move(grid)), "";
  std::vector<Grid> grids;
  grids.push_back(std::move(grid));
  return run_streams({&grids}, seed);
}
std::string play_recorded(Stream stream, unsigned seed) {
  const std::string fault = run_streams({stream}, seed);
  stream->clear();
  return fault;
}

std::string map_of(TileMap& map, const void* base, int64_t rows, int64_t columns, int box, bool) {
  map = {static_cast<const uint16_t*>(base), rows, columns, box};
  return "";
}

#else

using Stream = cudaStream_t;

// `turns`: two halves of a matrix, eight rows of each in turn. Lines of 128 bytes: asking the second-level cache for 256 costs a tenth
// of the bandwidth (benchmarks/results/decode_attention_h200).
std::string map_of(TileMap& map, const void* base, int64_t rows, int64_t columns, int box, bool turns) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult answer;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &answer);
    return error == cudaSuccess && answer == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  const cuuint64_t line = cuuint64_t(columns) * 2, half = cuuint64_t(rows) / 2;
  const cuuint64_t sizes[4] = {cuuint64_t(columns), turns ? 8 : cuuint64_t(rows), 2, half / 8};
  const cuuint64_t pitches[3] = {line, half * line, 8 * line};
  const cuuint32_t tile[4] = {kDepth, turns ? 8 : cuuint32_t(box), 2, cuuint32_t(box / 16)}, steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, turns ? 4 : 2, const_cast<void*>(base), sizes, pitches, tile, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, JAXLLM_PROMOTION,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? "" : "no tensor map: error " + std::to_string(int(result));
}

#ifdef JAXLLM_IN_TURN  // for benchmarks
constexpr bool kOverlap = false;
#else
constexpr bool kOverlap = true;
#endif

// `early`: the launch may begin before the one ahead of it has ended. `cluster`: blocks of one. No blocks: the kernel is loaded only.
template <typename Kernel, typename Arguments>
std::string launch_kernel(Kernel kernel, dim3 blocks, int threads, int bytes, Stream stream, bool early, const Arguments& arguments,
                          int cluster = 1) {
  if (blocks.x == 0) {
    cudaFuncAttributes found;
    const cudaError_t error = cudaFuncGetAttributes(&found, kernel);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = bytes, config.stream = stream, config.attrs = attributes;
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {unsigned(cluster), 1, 1};
  }
  if (early && kOverlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

#endif

}  // namespace
