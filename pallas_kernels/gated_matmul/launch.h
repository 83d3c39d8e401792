// The call through XLA's FFI: buffers to Params, one launch. Included by gated_matmul.cu.
#pragma once
#include "../decode_chain/maps.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

ffi::Error failure(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInternal, "gated_matmul: " + what); }

#ifdef JAXLLM_EMULATED

using Stream = int;

template <int WIDTH, int SHARED>
std::string launch(Stream, const Params& p) {
  using S = Shape<WIDTH>;
  constexpr size_t words = (S::kControlAt + sizeof(Control)) / 16 + 65;
  std::vector<std::vector<uint4>> memory(p.blocks, std::vector<uint4>(words, uint4{~0u, ~0u, ~0u, ~0u}));
  std::vector<void*> shared;
  for (auto& each : memory) shared.push_back(reinterpret_cast<void*>((uintptr_t(each.data()) + 1023) / 1024 * 1024));
  auto body = [&](int block, int thread) { multiply_all<WIDTH, SHARED>(p, static_cast<char*>(shared[block]), block, thread); };
  return run_grid(p.blocks, kThreads, 128 * kGroups, unsigned(p.M), body, shared.data());
}

#else

using Stream = cudaStream_t;

template <int WIDTH, int SHARED>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1) gated_matmul(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) char raw[];
  multiply_all<WIDTH, SHARED>(p, raw, int(blockIdx.x), int(threadIdx.x));
}

template <int WIDTH, int SHARED>
std::string launch(Stream stream, const Params& p) {
  constexpr int bytes = Shape<WIDTH>::kControlAt + int(sizeof(Control));
  // Of each device by itself, so at each call; only recordings of the step's graph come here.
  const auto kernel = gated_matmul<WIDTH, SHARED>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    kernel<<<p.blocks, kThreads, bytes, stream>>>(p);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

#endif

// The ways a product may be cut up that cuda.py chooses from.
std::string launch(Stream stream, const Params& p, int64_t width, int64_t shared) {
  switch (width * 10 + shared) {
    case 2560: return launch<256, kWeights>(stream, p);
    case 2240: return launch<224, kWeights>(stream, p);
    case 1920: return launch<192, kWeights>(stream, p);
    case 1280: return launch<128, kWeights>(stream, p);
    case 2241: return launch<224, kRows>(stream, p);
    case 1281: return launch<128, kRows>(stream, p);
  }
  return "no tile of " + std::to_string(kTileRows) + " by " + std::to_string(width) + " that shares " + std::to_string(shared);
}

ffi::Error gated_impl(Stream stream, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> out, int64_t width, int64_t shared, int64_t run, int64_t blocks) {
  Params p = {};
  p.M = int(x.dimensions()[0]), p.K = int(x.dimensions()[1]), p.N = int(out->dimensions()[1]);
  p.out = static_cast<uint16_t*>(out->untyped_data()), p.blocks = int(blocks) / 2 * 2;
  const int columns = int(width) / 2;
  const int row_tiles = (p.M + kTileRows - 1) / kTileRows, column_tiles = (p.N + columns - 1) / columns;
  p.row_tiles = shared == kRows ? row_tiles : (row_tiles + 1) / 2;
  p.column_tiles = shared == kWeights ? column_tiles : (column_tiles + 1) / 2;
  p.run = std::min(int(run), p.row_tiles), p.blocks = std::min(p.blocks, p.row_tiles * p.column_tiles * 2);
  std::string fault = map_of(p.x, x.untyped_data(), p.M, p.K, shared == kWeights ? kTileRows : kTileRows / 2, false);
  if (fault.empty()) fault = map_of(p.w, w.untyped_data(), w.dimensions()[0], p.K, int(width) / 2, false);
  if (fault.empty()) fault = launch(stream, p, width, shared);
  return fault.empty() ? ffi::Error::Success() : failure(fault);
}

#define JAXLLM_BINDING                                                                                                     \
  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int64_t>("width")        \
      .Attr<int64_t>("shared").Attr<int64_t>("run").Attr<int64_t>("blocks")

#ifdef JAXLLM_EMULATED
ffi::Error emulated_impl(ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> out, int64_t width, int64_t shared, int64_t run, int64_t blocks) {
  return gated_impl(0, x, w, out, width, shared, run, blocks);
}
XLA_FFI_DEFINE_HANDLER(gated_handler, emulated_impl, ffi::Ffi::Bind() JAXLLM_BINDING);
#else
XLA_FFI_DEFINE_HANDLER(gated_handler, gated_impl, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>() JAXLLM_BINDING,
                       {ffi::Traits::kCmdBufferCompatible});
#endif

}  // namespace

extern "C" XLA_FFI_Error* jaxllm_gated_matmul(XLA_FFI_CallFrame* frame) { return gated_handler(frame); }
extern "C" int64_t jaxllm_gated_matmul_work() { return 0; }
