// The call through XLA's FFI: buffers to Steps, one launch. Included by wide.cu.
#pragma once
#include "../decode_chain/maps.h"
#include "groups.h"

namespace {

namespace ffi = xla::ffi;

enum Has { kQkvBias = 1, kOBias = 2, kQkNorms = 4 };  // which optional weights a layer has, in the order in which they come

ffi::Error failure(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInternal, "wide layers: " + what); }

#ifdef JAXLLM_EMULATED

// One grid of all these devices' blocks.
template <int T>
std::string play(const std::vector<const Steps*>& devices) {
  constexpr size_t words = (Shape<T>::kControlAt + sizeof(Control)) / 16 + 65;
  const int blocks = devices[0]->blocks, all = blocks * int(devices.size());
  std::vector<std::vector<uint4>> memory(all, std::vector<uint4>(words, uint4{~0u, ~0u, ~0u, ~0u}));
  std::vector<void*> shared;
  for (auto& each : memory) shared.push_back(reinterpret_cast<void*>((uintptr_t(each.data()) + 1023) / 1024 * 1024));
  auto body = [&](int program, int thread) {
    decode<T>(*devices[program / blocks], static_cast<char*>(shared[program]), program % blocks, thread);
  };
  const std::string fault = run_grid(all, kBlockThreads, kComputing, unsigned(devices[0]->M), body, shared.data(), blocks);
  for (auto& device : arrivals)
    for (uint32_t left : device)
      if (fault.empty() && left) return "a counter is not zero after the call";
  for (auto& device : on_their_way)
    for (size_t i = 0; i < size_t(blocks) * (kMostRows / 8) * kComputing; ++i)
      if (fault.empty() && missing(device[i]) != 4) return "sums that nobody took";
  return fault;
}

template <int T>
std::string launch(Stream, const Steps& p, Group* group) {
  if (group == nullptr) return alone([&] { return play<T>({&p}); });
  return together(*group, p.peers, &p, [](const std::vector<const void*>& all) {
    std::vector<const Steps*> devices;
    for (const void* each : all) devices.push_back(static_cast<const Steps*>(each));
    return play<T>(devices);
  });
}

#else

template <int T>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kBlockThreads, 1) wide_layers(const __grid_constant__ Steps p) {
  extern __shared__ __align__(1024) char raw[];
  decode<T>(p, raw, int(blockIdx.x), int(threadIdx.x));
}

template <int T>
std::string launch(Stream stream, const Steps& p, Group*) {
  constexpr int bytes = Shape<T>::kControlAt + int(sizeof(Control));
  // Of each device by itself, so at each call; only recordings of the step's graph come here.
  cudaError_t error = cudaFuncSetAttribute(wide_layers<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    wide_layers<T><<<p.blocks, kBlockThreads, bytes, stream>>>(p);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

template <int... T>
cudaError_t load() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSuccess;
  ((error = error == cudaSuccess ? cudaFuncGetAttributes(&attributes, wide_layers<T>) : error), ...);
  return error;
}
cudaError_t load_kernels() { return load<16, 32, 64, 96, kMostRows>(); }

#endif

int padded(int M) {
  for (int T : {16, 32, 64, 96})
    if (M <= T) return T;
  return kMostRows;
}

std::string launch(Stream stream, const Steps& p, Group* group) {
  switch (padded(p.M)) {
    case 16: return launch<16>(stream, p, group);
    case 32: return launch<32>(stream, p, group);
    case 64: return launch<64>(stream, p, group);
    case 96: return launch<96>(stream, p, group);
    default: return launch<128>(stream, p, group);
  }
}

// Bytes of what `ranks` devices send one of them.
int64_t bytes_of_sums(int64_t M, int64_t D, int64_t ranks) {
  const int64_t tiles = (D + 2 * kWide - 1) / (2 * kWide) * 2, threads = padded(int(M)) / 8 * kComputing;
  return 2 * ranks * tiles * threads * int64_t(sizeof(float4));
}

int64_t up(int64_t bytes) { return (bytes + 255) / 256 * 256; }
int64_t tiles_of(int64_t columns, bool gated) { return (columns + (gated ? 63 : 127)) / (gated ? 64 : 128); }

struct Sizes {  // attributes, as they come
  int64_t num_layers, rows, blocks, D, F, heads, kv_heads, page_size, width;
};

struct Work {
  uint16_t *x, *scaled, *hidden, *scaled_again, *qkv, *mixed;
  float *squares, *squares_again;
  int64_t bytes;
};

Work lay_out(Steps& p, const Sizes& z, char* base) {
  int64_t at = 0;
  auto take = [&](int64_t bytes) { return base + std::exchange(at, at + up(bytes)); };
  auto numbers = [&](int64_t count) { return reinterpret_cast<uint16_t*>(take(count * 2)); };
  auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count * 4)); };
  Params& a = p.attention;
  p.M = int(z.rows), p.groups = padded(p.M) / 8, p.blocks = int(z.blocks), p.num_layers = int(z.num_layers);
  a.rows = p.M, a.programs = p.blocks, a.heads = int(z.heads), a.kv_heads = int(z.kv_heads), a.width = int(z.width), a.addends = 0;
  a.page_shift = 0;
  while (kUnit << a.page_shift < z.page_size) ++a.page_shift;
  Work w;
  w.x = numbers(z.rows * z.D), w.scaled = numbers(z.rows * z.D), w.hidden = numbers(z.rows * z.F);
  w.scaled_again = numbers(z.rows * z.D), w.qkv = numbers(z.rows * (z.heads + 2 * z.kv_heads) * kHead);
  w.mixed = numbers(z.rows * z.heads * kHead);
  w.squares = floats(kMostRows * kMostSums), w.squares_again = floats(kMostRows * kMostSums);
  const Results kept = results_of(a);
  a.parts = floats(kept.parts * kHead), a.part_stats = floats(kept.parts * 2);
  a.runs = floats(kept.runs * kHead), a.run_stats = floats(kept.runs * 2);
  w.bytes = at;
  return w;
}

std::string fill(Steps& p, const Sizes& z, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Span<const int64_t> splits, int64_t has) {
  size_t at = 0;
  int64_t first_dimension = 0;
  auto next = [&]() -> void* {
    const ffi::AnyBuffer got = args.get<ffi::AnyBuffer>(at++).value();
    first_dimension = got.dimensions()[0];
    return got.untyped_data();
  };
  auto bits = [&] { return static_cast<uint16_t*>(next()); };
  auto floats = [&] { return static_cast<const float*>(next()); };
  auto ints = [&] { return static_cast<const int*>(next()); };
  auto result = [&](size_t i) { return static_cast<uint16_t*>(rets.get<ffi::AnyBuffer>(i).value()->untyped_data()); };
  const Work w = lay_out(p, z, reinterpret_cast<char*>(result(1)));
  const int D = int(z.D), F = int(z.F), O = int(z.heads) * kHead, Q = int(z.heads + 2 * z.kv_heads) * kHead;
  if (splits.size() < kStages) return "needs the splits of four products";
  if (p.num_layers > kMostLayers) return "too many layers";
  if (p.blocks > kMostBlocks || p.blocks * kWorkers > kMaxWorkers || p.M * p.attention.kv_heads > kMaxSegments) return "too many workers or rows";

  std::string fault;
  auto keep = [&](const std::string& found) { fault = fault.empty() ? found : fault; };
  auto describe = [&](int number, const uint16_t* from, int N, int K, Kind kind) -> Stage& {
    Stage& stage = p.stages[number];
    stage.N = N, stage.K = K, stage.kind = kind, stage.splits = int(splits[number]);
    stage.units = int((tiles_of(N, kind == kGated) + 1) / 2) * stage.splits;
    if (stage.units / stage.splits * 2 > kMostTiles || tiles_of(D, false) > kMostSums) keep("too many tiles");
    keep(map_of(stage.x, from, p.M, K, padded(p.M) / 2, false));
    return stage;
  };
  uint16_t* out = result(0);
  Stage& o = describe(0, w.mixed, D, O, kResidual);
  o.residual = out, o.out = w.x, o.scaled = w.scaled, o.squares = w.squares;
  Stage& gate_up = describe(1, w.scaled, F, D, kGated);
  gate_up.out = w.hidden, gate_up.squares_in = w.squares, gate_up.tiles_in = int(tiles_of(D, false));
  Stage& down = describe(2, w.hidden, D, F, kResidual);
  down.residual = w.x, down.out = out, down.scaled = w.scaled_again, down.squares = w.squares_again;
  Stage& qkv = describe(3, w.scaled_again, Q, D, kPlain);
  qkv.out = w.qkv, qkv.squares_in = w.squares_again, qkv.tiles_in = int(tiles_of(D, false));

  Params& a = p.attention;
  p.x = bits(), p.qkv = bits();
  a.table = ints(), a.lens = ints(), a.cosines = floats(), a.sines = floats();
  a.qkv = w.qkv, a.out = w.mixed;
  auto map_weight = [&](int layer, int number, const uint16_t* weight) {
    const Stage& stage = p.stages[number];
    const bool gated = stage.kind == kGated;
    keep(map_of(p.maps[layer].weights[number], weight, gated ? 2 * stage.N : stage.N, stage.K, kWide, gated));
  };
  for (int i = 0; i < p.num_layers; ++i) {
    Layer& l = p.layers[i];
    // The first layer's qkv comes ready; every other belongs to the layer before.
    const uint16_t* weight = i > 0 ? bits() : nullptr;
    map_weight(i, 0, bits());
    const uint16_t* norms = bits();
    map_weight(i, 1, bits()), map_weight(i, 2, bits());
    const uint16_t* bias = has & kQkvBias && i > 0 ? bits() : nullptr;
    l.o_bias = has & kOBias ? bits() : nullptr;
    l.qk_norms = has & kQkNorms ? bits() : nullptr;
    l.k_pages = bits();  // the results are the same memory
    const int64_t keys = first_dimension * a.kv_heads * z.page_size;
    l.v_pages = bits();
    const int box = kUnit << (a.page_shift < kMostShift ? a.page_shift : kMostShift);
    keep(map_of(p.maps[i].keys, l.k_pages, keys, kHead, box, false)), keep(map_of(p.maps[i].values, l.v_pages, keys, kHead, box, false));
    l.middle_norm = norms + D;
    if (i > 0) {
      Layer& before = p.layers[i - 1];
      map_weight(i - 1, 3, weight), before.qkv_bias = bias, before.next_norm = norms;
    }
  }
  return at == args.size() ? fault : "unexpected number of buffers";
}

ffi::Error run_wide(Stream stream, int device, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Span<const int64_t> splits,
                    ffi::Span<const int64_t> numbers, int64_t num_layers, int64_t rows, int64_t blocks, int64_t D, int64_t F, int64_t heads,
                    int64_t kv_heads, int64_t page_size, int64_t width, int64_t has, float eps, float scale) {
  auto p = std::make_unique<Steps>();
  p->eps = p->attention.eps = eps, p->attention.scale = scale * kLog2e;
#ifdef JAXLLM_EMULATED
  for (int i : {0, 1}) {  // NaN, as memory may hold
    const auto buffer = *rets.get<ffi::AnyBuffer>(i);
    std::memset(buffer->untyped_data(), 0xff, buffer->size_bytes());
  }
#endif
  std::string fault = fill(*p, {num_layers, rows, blocks, D, F, heads, kv_heads, page_size, width}, args, rets, splits, has);
  Group* group = find_peers(p->peers, numbers, device, fault);
  if (group != nullptr && group->bytes < bytes_of_sums(rows, D, p->peers.ranks)) fault = "the peers' memory is too small";
  if (fault.empty()) fault = launch(stream, *p, group);
  return fault.empty() ? ffi::Error::Success() : failure(fault);
}

#define JAXLLM_BINDING                                                                                                        \
  .RemainingArgs().RemainingRets().Attr<ffi::Span<const int64_t>>("splits").Attr<ffi::Span<const int64_t>>("groups")            \
      .Attr<int64_t>("num_layers").Attr<int64_t>("rows").Attr<int64_t>("blocks").Attr<int64_t>("D").Attr<int64_t>("F")          \
      .Attr<int64_t>("heads").Attr<int64_t>("kv_heads").Attr<int64_t>("page_size").Attr<int64_t>("width")                       \
      .Attr<int64_t>("has").Attr<float>("eps").Attr<float>("scale")
#define JAXLLM_ARGUMENTS                                                                                                      \
  ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Span<const int64_t> splits, ffi::Span<const int64_t> numbers,          \
      int64_t num_layers, int64_t rows, int64_t blocks, int64_t D, int64_t F, int64_t heads, int64_t kv_heads,                  \
      int64_t page_size, int64_t width, int64_t has, float eps, float scale
#define JAXLLM_VALUES                                                                                                         \
  args, rets, splits, numbers, num_layers, rows, blocks, D, F, heads, kv_heads, page_size, width, has, eps, scale

#ifdef JAXLLM_EMULATED
ffi::Error wide_impl(int32_t device, JAXLLM_ARGUMENTS) { return run_wide(0, device, JAXLLM_VALUES); }
XLA_FFI_DEFINE_HANDLER(wide_handler, wide_impl, ffi::Ffi::Bind().Ctx<ffi::DeviceOrdinal>() JAXLLM_BINDING);
#else
ffi::Error wide_impl(cudaStream_t stream, JAXLLM_ARGUMENTS) {
  int device = -1;
  if (cudaGetDevice(&device) != cudaSuccess) return failure("no current device");
  return run_wide(stream, device, JAXLLM_VALUES);
}
XLA_FFI_DEFINE_HANDLER(wide_handler, wide_impl, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>() JAXLLM_BINDING,
                       {ffi::Traits::kCmdBufferCompatible});
#endif

}  // namespace

extern "C" XLA_FFI_Error* jaxllm_wide_layers(XLA_FFI_CallFrame* frame) { return wide_handler(frame); }
extern "C" int64_t jaxllm_wide_layers_work(int64_t num_layers, int64_t rows, int64_t blocks, int64_t D, int64_t F, int64_t heads,
                                           int64_t kv_heads, int64_t page_size, int64_t width) {
  auto p = std::make_unique<Steps>();
  return lay_out(*p, {num_layers, rows, blocks, D, F, heads, kv_heads, page_size, width}, nullptr).bytes;
}
// Bytes that a device of `ranks` needs for what the others send it, and the number of the group of these devices, in rank
// order; -1 and a reason in `why` when it cannot be made.
extern "C" int64_t jaxllm_wide_layers_sums(int64_t rows, int64_t D, int64_t ranks) { return bytes_of_sums(rows, D, ranks); }
extern "C" int jaxllm_wide_layers_group(const int* devices, int count, int64_t bytes, char* why, int why_bytes) {
  return number_of_group({devices, devices + count}, bytes, why, why_bytes);
}
#ifdef JAXLLM_TIMELINE
extern "C" int jaxllm_wide_layers_timeline(unsigned long long* times, int* counts) {
  int error = cudaMemcpyFromSymbol(counts, marks, sizeof marks);
  if (!error) error = cudaMemcpyFromSymbol(times, timeline, sizeof timeline);
  return error;
}
#endif
