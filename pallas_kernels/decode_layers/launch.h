// The call through XLA's FFI: buffers to Params, memory of the counters cleared, one launch. Included by decode_layers.cu.
#pragma once
#include <string>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Which optional weights a layer has, in the order in which they come; and whether final norm and head come behind them.
enum Has { kQkvBias = 1, kOBias = 2, kQkNorms = 4, kTheHead = 8, kF16 = 16 };

ffi::Error failure(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInternal, "decode_layers: " + what); }

int64_t up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Lays the work buffer out; returns the bytes of its front that start as zeros, and of all of it.
struct Layout {
  int64_t zeros, all;
};

Layout lay_out(Params& p, unsigned char* base) {
  int64_t at = 0;
  auto take = [&](int64_t bytes) { return base + std::exchange(at, at + up(bytes)); };
  const int64_t wide_ = int64_t(p.heads + 2 * p.kv_heads) * kHead, runs = int64_t(p.rows) * p.kv_heads * p.splits;
  const int64_t group = p.heads / p.kv_heads;
  Work& w = p.work;
  w.begun = reinterpret_cast<uint32_t*>(take(4));
  w.ended = reinterpret_cast<uint32_t*>(take(p.num_layers * 16));
  w.attended = reinterpret_cast<uint32_t*>(take(p.num_layers * 4));
  w.arrived = reinterpret_cast<uint32_t*>(take(int64_t(p.num_layers) * p.rows * p.kv_heads * 4));
  w.mixed = reinterpret_cast<uint16_t*>(take(int64_t(kRows) * p.heads * kHead * 2));
  const int64_t zeros = at;
  w.scaled = reinterpret_cast<uint16_t*>(take(int64_t(kRows) * p.D * 2));
  w.hidden = reinterpret_cast<uint16_t*>(take(int64_t(kRows) * p.F * 2));
  w.qkv = reinterpret_cast<uint16_t*>(take(kRows * wide_ * 2));
  w.squares = reinterpret_cast<float*>(take(int64_t(p.programs) * kRows * 4));
  w.parts = reinterpret_cast<float*>(take(runs * group * kHead * 4));
  w.stats = reinterpret_cast<float*>(take(runs * group * 8));
  return {zeros, at};
}

struct Sizes {  // attributes, as they come
  int64_t num_layers, rows, programs, D, F, heads, kv_heads, page_size, width, V, group, has;
  float eps, scale;
};

std::string fill(Params& p, const Sizes& z, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  p.num_layers = int(z.num_layers), p.rows = int(z.rows), p.programs = int(z.programs), p.D = int(z.D), p.F = int(z.F);
  p.heads = int(z.heads), p.kv_heads = int(z.kv_heads), p.page_size = int(z.page_size), p.width = int(z.width);
  p.splits = (p.width * p.page_size + kSplit - 1) / kSplit;
  p.eps = z.eps, p.scale = z.scale, p.V = int(z.V);
  p.group_shift = z.group == 128, p.f16 = z.has & kF16 ? 1 : 0;
  p.last_layer = p.num_layers - (z.has & kTheHead ? 0 : 1);
  if (p.num_layers > kMaxLayers) return "too many layers";
  if (p.rows * p.kv_heads > kThreads) return "too many kv heads";
  if ((p.D / kUnit + p.programs - 1) / p.programs > kMaxUnits) return "too few programs for the residual stream";
  size_t at = 0;
  bool good = true;
  auto next = [&]() -> void* {
    auto got = args.get<ffi::AnyBuffer>(at++);
    good = good && got.has_value();
    return got.has_value() ? got->untyped_data() : nullptr;
  };
  auto bits = [&] { return static_cast<uint16_t*>(next()); };
  auto weights = [&] { return static_cast<const Stored*>(next()); };
  p.x = bits();
  p.table = static_cast<const int*>(next());
  p.lens = static_cast<const int*>(next());
  p.cosines = static_cast<const float*>(next());
  p.sines = static_cast<const float*>(next());
  for (int i = 0; i < p.num_layers; ++i) {
    Layer& l = p.layers[i];
    l.qkv = weights(), l.o = weights(), l.norms = bits(), l.gate_up = weights(), l.down = weights();
    l.qkv_bias = z.has & kQkvBias ? bits() : nullptr;
    l.o_bias = z.has & kOBias ? bits() : nullptr;
    l.qk_norms = z.has & kQkNorms ? bits() : nullptr;
    if (kKind != kBf16)
      for (const void*& scales : p.scales[i]) scales = next();
    l.k_pages = bits(), l.v_pages = bits();  // the results are the same memory
  }
  if (z.has & kTheHead) {
    Layer& end = p.layers[p.num_layers] = {};
    end.norms = bits(), end.qkv = weights();
    if (kKind != kBf16) p.scales[p.num_layers][kQkv] = next();
  }
  auto out = rets.get<ffi::AnyBuffer>(0), work = rets.get<ffi::AnyBuffer>(1);
  if (!good || at != args.size() || !out.has_value() || !work.has_value()) return "unexpected number of buffers";
  p.out = z.has & kTheHead ? nullptr : static_cast<uint16_t*>((*out)->untyped_data());
  p.logits = z.has & kTheHead ? static_cast<float*>((*out)->untyped_data()) : nullptr;
  if (lay_out(p, static_cast<unsigned char*>((*work)->untyped_data())).all > int64_t((*work)->size_bytes()))
    return "the work buffer is too small";
  return "";
}

#define JAXLLM_SIZES                                                                                                   \
  .Attr<int64_t>("num_layers").Attr<int64_t>("rows").Attr<int64_t>("programs").Attr<int64_t>("D").Attr<int64_t>("F")     \
      .Attr<int64_t>("heads").Attr<int64_t>("kv_heads").Attr<int64_t>("page_size").Attr<int64_t>("width")                \
      .Attr<int64_t>("V").Attr<int64_t>("group").Attr<int64_t>("has").Attr<float>("eps").Attr<float>("scale")
#define JAXLLM_SIZE_ARGUMENTS                                                                                          \
  int64_t num_layers, int64_t rows, int64_t programs, int64_t D, int64_t F, int64_t heads, int64_t kv_heads,             \
      int64_t page_size, int64_t width, int64_t V, int64_t group, int64_t has, float eps, float scale
#define JAXLLM_SIZE_VALUES {num_layers, rows, programs, D, F, heads, kv_heads, page_size, width, V, group, has, eps, scale}

#ifdef JAXLLM_EMULATED

ffi::Error decode_layers_impl(ffi::RemainingArgs args, ffi::RemainingRets rets, JAXLLM_SIZE_ARGUMENTS) {
  auto p = std::make_unique<Params>();
  const std::string why = fill(*p, JAXLLM_SIZE_VALUES, args, rets);
  if (!why.empty()) return failure(why);
  auto* base = static_cast<unsigned char*>((*rets.get<ffi::AnyBuffer>(1))->untyped_data());
  const Layout layout = lay_out(*p, base);
  std::memset(base, 0xff, layout.all);  // NaN, as memory may hold
  std::memset(base, 0, layout.zeros);
  std::vector<std::unique_ptr<Shared>> shared(p->programs);
  for (auto& each : shared) {
    each = std::make_unique<Shared>();
    std::memset(static_cast<void*>(each.get()), 0xff, sizeof(Shared));
  }
  const std::string fault = run_grid(p->programs, kAllThreads, kThreads, unsigned(p->rows),
                                     [&](int program, int thread) { run(*p, *shared[program], program, thread); });
  return fault.empty() ? ffi::Error::Success() : failure(fault);
}

XLA_FFI_DEFINE_HANDLER(decode_layers_handler, decode_layers_impl, ffi::Ffi::Bind().RemainingArgs().RemainingRets() JAXLLM_SIZES);

#else

__global__ void __launch_bounds__(kAllThreads, 1) decode_layers(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char raw[];
  run(p, *reinterpret_cast<Shared*>(raw), int(blockIdx.x), int(threadIdx.x));
}

ffi::Error decode_layers_impl(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets, JAXLLM_SIZE_ARGUMENTS) {
  Params p;
  const std::string why = fill(p, JAXLLM_SIZE_VALUES, args, rets);
  if (!why.empty()) return failure(why);
  const Layout layout = lay_out(p, static_cast<unsigned char*>((*rets.get<ffi::AnyBuffer>(1))->untyped_data()));
  // Of each device by itself, so at each call; only recordings of the step's graph come here.
  cudaError_t error = cudaFuncSetAttribute(decode_layers, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error == cudaSuccess) error = cudaMemsetAsync(p.work.begun, 0, layout.zeros, stream);
  if (error == cudaSuccess) {
    decode_layers<<<p.programs, kAllThreads, sizeof(Shared), stream>>>(p);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? ffi::Error::Success() : failure(cudaGetErrorString(error));
}

XLA_FFI_DEFINE_HANDLER(decode_layers_handler, decode_layers_impl,
                       ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets() JAXLLM_SIZES,
                       {ffi::Traits::kCmdBufferCompatible});

#endif

}  // namespace

extern "C" XLA_FFI_Error* jaxllm_decode_layers(XLA_FFI_CallFrame* frame) { return decode_layers_handler(frame); }

extern "C" int64_t jaxllm_decode_layers_work(int64_t num_layers, int64_t rows, int64_t programs, int64_t D, int64_t F,
                                             int64_t heads, int64_t kv_heads, int64_t page_size, int64_t width) {
  Params p{};
  p.num_layers = int(num_layers), p.rows = int(rows), p.programs = int(programs), p.D = int(D), p.F = int(F);
  p.heads = int(heads), p.kv_heads = int(kv_heads), p.page_size = int(page_size), p.width = int(width);
  p.splits = (p.width * p.page_size + kSplit - 1) / kSplit;
  return lay_out(p, nullptr).all;
}

#if defined(JAXLLM_TIMELINE) && !defined(JAXLLM_EMULATED)
// Copies what was marked since the last call: `times` [160][4096], `counts` [160].
extern "C" int jaxllm_decode_layers_timeline(unsigned long long* times, int* counts) {
  int error = cudaDeviceSynchronize();
  if (!error) error = cudaMemcpyFromSymbol(times, timeline, sizeof timeline);
  if (!error) error = cudaMemcpyFromSymbol(counts, marks, sizeof marks);
  static const int none[160] = {};
  if (!error) error = cudaMemcpyToSymbol(marks, none, sizeof marks);
  return error;
}
#endif
