// The call through XLA's FFI: buffers to Params, one launch. Included by draw.cu.
#pragma once
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

ffi::Error failure(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInternal, "sampling_draw: " + what); }

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using U32 = ffi::Buffer<ffi::U32>;

#define JAXLLM_ARGUMENTS                                                                                               \
  F32 logits, ffi::Buffer<ffi::U16> counts, S32 lines, U32 mask, S32 bias_ids, F32 bias, F32 repetition, F32 frequency, \
      F32 presence, U32 keys, F32 temperature, S32 top_k, F32 top_p, F32 min_p, ffi::Result<S32> tokens,                \
      ffi::Result<ffi::Buffer<ffi::PRED>> bad, int64_t blocks
#define JAXLLM_BINDING                                                                                                 \
  .Arg<F32>().Arg<ffi::Buffer<ffi::U16>>().Arg<S32>().Arg<U32>().Arg<S32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()  \
      .Arg<U32>().Arg<F32>().Arg<S32>().Arg<F32>().Arg<F32>().Ret<S32>().Ret<ffi::Buffer<ffi::PRED>>()                   \
      .Attr<int64_t>("blocks")
#define JAXLLM_PARAMS                                                                                                  \
  {logits.typed_data(), counts.typed_data(), lines.typed_data(), mask.typed_data(), bias_ids.typed_data(),               \
   bias.typed_data(), repetition.typed_data(), frequency.typed_data(), presence.typed_data(), keys.typed_data(),         \
   temperature.typed_data(), top_k.typed_data(), top_p.typed_data(), min_p.typed_data(), tokens->typed_data(),           \
   reinterpret_cast<uint8_t*>(bad->typed_data()), int(logits.dimensions()[0]), int(logits.dimensions()[1]),              \
   int(bias.dimensions()[1]), int(blocks), part_of(int(logits.dimensions()[1]), int(blocks))}

int part_of(int V, int blocks) { return (V + blocks * kPartUnit - 1) / (blocks * kPartUnit) * kPartUnit; }

#ifdef JAXLLM_EMULATED

ffi::Error draw_impl(JAXLLM_ARGUMENTS) {
  const Params p = JAXLLM_PARAMS;
  const size_t words = size_t(shared_bytes(p.part) + 15) / 16;
  std::vector<std::vector<uint4>> memory(blocks, std::vector<uint4>(words, uint4{~0u, ~0u, ~0u, ~0u}));
  std::vector<void*> shared;
  for (auto& each : memory) shared.push_back(each.data());
  emulated_blocks = shared.data();
  const std::string fault = run_grid(p.blocks, kThreads, kThreads, unsigned(p.rows), [&](int rank, int thread) {
    for (int row = 0; row < p.rows; ++row) draw(p, *static_cast<Shared*>(shared[rank]), row, rank, thread);
  }, nullptr, 1 << 30, p.blocks);
  return fault.empty() ? ffi::Error::Success() : failure(fault);
}

XLA_FFI_DEFINE_HANDLER(draw_handler, draw_impl, ffi::Ffi::Bind() JAXLLM_BINDING);

#else

__global__ void __launch_bounds__(kThreads, 1024 / kThreads) sampling_draw(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) unsigned char raw[];
  draw(p, *reinterpret_cast<Shared*>(raw), int(blockIdx.x) / p.blocks, int(blockIdx.x) % p.blocks, int(threadIdx.x));
}

ffi::Error draw_impl(cudaStream_t stream, JAXLLM_ARGUMENTS) {
  const Params p = JAXLLM_PARAMS;
  const int64_t bytes = shared_bytes(p.part);
  // Of each device by itself, so at each call; only recordings of the step's graph come here.
  cudaError_t error = cudaFuncSetAttribute(sampling_draw, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error == cudaSuccess) {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(p.blocks), cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t launch = {};
    launch.gridDim = dim3(unsigned(p.rows * p.blocks)), launch.blockDim = dim3(kThreads);
    launch.dynamicSmemBytes = size_t(bytes), launch.stream = stream;
    launch.attrs = &cluster, launch.numAttrs = 1;
    error = cudaLaunchKernelEx(&launch, sampling_draw, p);
  }
  return error == cudaSuccess ? ffi::Error::Success() : failure(cudaGetErrorString(error));
}

XLA_FFI_DEFINE_HANDLER(draw_handler, draw_impl,
                       ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>() JAXLLM_BINDING,
                       {ffi::Traits::kCmdBufferCompatible});

#endif

}  // namespace

extern "C" XLA_FFI_Error* jaxllm_sampling_draw(XLA_FFI_CallFrame* frame) { return draw_handler(frame); }
