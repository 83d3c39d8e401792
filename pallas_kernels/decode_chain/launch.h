// The call through XLA's FFI: buffers to Params, one launch. Included by decode_chain.cu.
#pragma once
#include "maps.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

enum Has { kOBias = 1, kFollowing = 2, kNextBias = 4 };  // which optional arrays there are, in the order they come in

ffi::Error failure(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInternal, "decode_chain: " + what); }

#ifdef JAXLLM_EMULATED

using Stream = int;

template <int T>
std::string launch(Stream, const Params& p) {
  constexpr size_t words = (Shape<T>::kControlAt + sizeof(Control)) / 16 + 65;
  std::vector<std::vector<uint4>> memory(p.blocks, std::vector<uint4>(words, uint4{~0u, ~0u, ~0u, ~0u}));
  std::vector<void*> shared;
  for (auto& each : memory) shared.push_back(reinterpret_cast<void*>((uintptr_t(each.data()) + 1023) / 1024 * 1024));
  auto body = [&](int block, int thread) { decode<T>(p, static_cast<char*>(shared[block]), block, thread); };
  return run_grid(p.blocks, kBlockThreads, kComputing, unsigned(p.M), body, shared.data());
}

#else

using Stream = cudaStream_t;

template <int T>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kBlockThreads, 1) decode_chain(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) char raw[];
  decode<T>(p, raw, int(blockIdx.x), int(threadIdx.x));
}

template <int T>
std::string launch(Stream stream, const Params& p) {
  constexpr int bytes = Shape<T>::kControlAt + int(sizeof(Control));
  // Of each device by itself, so at each call; only recordings of the step's graph come here.
  cudaError_t error = cudaFuncSetAttribute(decode_chain<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    decode_chain<T><<<p.blocks, kBlockThreads, bytes, stream>>>(p);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

#endif

int padded(int M) {
  for (int T : {32, 64, 96})
    if (M <= T) return T;
  return kMostRows;
}

std::string launch(Stream stream, const Params& p) {
  switch (padded(p.M)) {
    case 32: return launch<32>(stream, p);
    case 64: return launch<64>(stream, p);
    case 96: return launch<96>(stream, p);
    default: return launch<128>(stream, p);
  }
}

int64_t up(int64_t bytes) { return (bytes + 255) / 256 * 256; }
int64_t tiles_of(int64_t columns, bool gated = false) { return (columns + (gated ? 63 : 127)) / (gated ? 64 : 128); }

struct Work {
  uint16_t *x, *scaled, *hidden, *scaled_again;
  float *squares, *squares_again;
  int64_t bytes;
};

Work lay_out(int64_t M, int64_t D, int64_t F, char* base) {
  int64_t at = 0;
  auto take = [&](int64_t bytes) { return base + std::exchange(at, at + up(bytes)); };
  Work w;
  w.x = reinterpret_cast<uint16_t*>(take(M * D * 2)), w.scaled = reinterpret_cast<uint16_t*>(take(M * D * 2));
  w.hidden = reinterpret_cast<uint16_t*>(take(M * F * 2)), w.scaled_again = reinterpret_cast<uint16_t*>(take(M * D * 2));
  const int64_t squares = kMostRows * kMostSums * 4;
  w.squares = reinterpret_cast<float*>(take(squares)), w.squares_again = reinterpret_cast<float*>(take(squares));
  w.bytes = at;
  return w;
}

ffi::Error chain_impl(Stream stream, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Span<const int64_t> splits,
                      int64_t blocks, int64_t has, float eps) {
  size_t at = 0;
  auto next = [&] { return args.get<ffi::AnyBuffer>(at++).value(); };
  auto data = [](ffi::AnyBuffer buffer) { return static_cast<const uint16_t*>(buffer.untyped_data()); };
  auto result = [&](size_t i) { return static_cast<uint16_t*>(rets.get<ffi::AnyBuffer>(i).value()->untyped_data()); };
  const ffi::AnyBuffer x = next(), mixed = next(), o = next(), norms = next(), gate_up = next(), down = next();
  const uint16_t* o_bias = has & kOBias ? data(next()) : nullptr;
  const uint16_t* next_norms = has & kFollowing ? data(next()) : nullptr;
  const int M = int(x.dimensions()[0]), D = int(x.dimensions()[1]), O = int(o.dimensions()[1]), F = int(down.dimensions()[1]);
  const Work w = lay_out(M, D, F, reinterpret_cast<char*>(result(1)));
  Params p = {};
  p.M = M, p.eps = eps, p.blocks = int(blocks), p.num_stages = has & kFollowing ? 4 : 3;
  if (splits.size() < kStages) return failure("needs the splits of four products");
  if (blocks > kMostBlocks) return failure("at most " + std::to_string(kMostBlocks) + " blocks, got " + std::to_string(blocks));

  std::string fault;
  auto describe = [&](int number, const uint16_t* from, const uint16_t* weight, int N, int K, Kind kind) -> Stage& {
    Stage& stage = p.stages[number];
    stage.N = N, stage.K = K, stage.kind = kind, stage.splits = int(splits[number]);
    stage.units = int((tiles_of(N, kind == kGated) + 1) / 2) * stage.splits;
    if (stage.units / stage.splits * 2 > kMostTiles || tiles_of(D) > kMostSums) fault = "too many tiles";
    if (fault.empty()) fault = map_of(stage.weight, weight, kind == kGated ? 2 * N : N, K, kWide, kind == kGated);
    if (fault.empty()) fault = map_of(stage.x, from, M, K, padded(M) / 2, false);
    return stage;
  };
  Stage& first = describe(0, data(mixed), data(o), D, O, kResidual);
  first.bias = o_bias, first.residual = data(x), first.norm = data(norms) + D;
  first.out = w.x, first.scaled = w.scaled, first.squares = w.squares;

  Stage& second = describe(1, w.scaled, data(gate_up), F, D, kGated);
  second.out = w.hidden, second.squares_in = w.squares, second.tiles_in = int(tiles_of(D));

  Stage& third = describe(2, w.hidden, data(down), D, F, kResidual);
  third.residual = w.x, third.norm = next_norms;
  third.out = result(0), third.scaled = w.scaled_again, third.squares = w.squares_again;

  if (has & kFollowing) {
    const ffi::AnyBuffer qkv = next();
    Stage& fourth = describe(3, w.scaled_again, data(qkv), int(qkv.dimensions()[0]), D, kPlain);
    fourth.bias = has & kNextBias ? data(next()) : nullptr;
    fourth.squares_in = w.squares_again, fourth.tiles_in = int(tiles_of(D)), fourth.out = result(2);
  }
  if (fault.empty()) fault = launch(stream, p);
  return fault.empty() ? ffi::Error::Success() : failure(fault);
}

#define JAXLLM_BINDING                                                                                          \
  .RemainingArgs().RemainingRets().Attr<ffi::Span<const int64_t>>("splits").Attr<int64_t>("blocks")\
      .Attr<int64_t>("has").Attr<float>("eps")

#ifdef JAXLLM_EMULATED
ffi::Error emulated_impl(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Span<const int64_t> splits, int64_t blocks,
                         int64_t has, float eps) {
  return chain_impl(0, args, rets, splits, blocks, has, eps);
}
XLA_FFI_DEFINE_HANDLER(chain_handler, emulated_impl, ffi::Ffi::Bind() JAXLLM_BINDING);
#else
XLA_FFI_DEFINE_HANDLER(chain_handler, chain_impl, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>() JAXLLM_BINDING,
                       {ffi::Traits::kCmdBufferCompatible});
#endif

}  // namespace

extern "C" XLA_FFI_Error* jaxllm_decode_chain(XLA_FFI_CallFrame* frame) { return chain_handler(frame); }
extern "C" int64_t jaxllm_decode_chain_work(int64_t M, int64_t D, int64_t F) {
  return lay_out(M, D, F, nullptr).bytes;
}
#ifdef JAXLLM_TIMELINE
extern "C" int jaxllm_decode_chain_timeline(unsigned long long* times, int* counts) {
  int error = cudaMemcpyFromSymbol(counts, marks, sizeof marks);
  if (!error) error = cudaMemcpyFromSymbol(times, timeline, sizeof timeline);
  return error;
}
#endif
