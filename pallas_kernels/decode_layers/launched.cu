// All layers of a decode step of up to 256 rows, as launches each of which begins before the one ahead of it has ended (ADR 47):
// attention by decode_attention/kernel.h, what lies between two of them by decode_chain/chain.h. A call records them once, in the
// step's CUDA graph; inside one recording a launch may overlap the next, between two recordings it cannot.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../decode_attention/kernel.h"
#include "../decode_chain/chain.h"
#include "groups.h"

namespace {

namespace ffi = xla::ffi;

enum Has { kQkvBias = 1, kOBias = 2, kQkNorms = 4 };  // which optional arrays layers have, in the order they come in

ffi::Error failure(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInternal, "launched_layers: " + what); }

struct Sizes {  // attributes, as they come
  int64_t num_layers, rows, blocks, D, F, heads, kv_heads, page_size, width, sums;
};

struct Layer {
  const uint16_t *qkv, *qkv_bias, *o, *o_bias, *norms, *gate_up, *down, *qk_norms;  // biases and the last may be null
  uint16_t *k_pages, *v_pages;
};

struct Room {  // that a call works in, beyond the chain's
  uint16_t* mixed;
  int64_t bytes;
};

Room lay_out(Params& a, const Sizes& z, char* base) {
  int64_t at = up(lay_out(z.rows, z.D, z.F, z.sums, nullptr).bytes);
  auto take = [&](int64_t bytes) { return base + std::exchange(at, at + up(bytes)); };
  auto numbers = [&](int64_t count) { return reinterpret_cast<uint16_t*>(take(count * 2)); };
  auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count * 4)); };
  a.rows = int(z.rows), a.programs = int(z.blocks), a.heads = int(z.heads), a.kv_heads = int(z.kv_heads), a.width = int(z.width);
  a.addends = a.page_shift = 0;
  while (kUnit << a.page_shift < z.page_size) ++a.page_shift;
  Room room;
  room.mixed = numbers(z.rows * z.heads * kHead);
  const Results kept = results_of(a);
  a.parts = floats(kept.parts * kHead), a.part_stats = floats(kept.parts * 2);
  a.runs = floats(kept.runs * kHead), a.run_stats = floats(kept.runs * 2);
  room.bytes = at;
  return room;
}

constexpr int kMostRows = 256;
int64_t bytes_of_sums(int64_t D, int64_t ranks) { return 2 * ranks * kMostRows * D * 4; }

std::string run_layers(Stream stream, const Sizes& z, const Peers& peers, ffi::RemainingArgs args, ffi::RemainingRets rets,
                       ffi::Span<const int64_t> cuts, int64_t has, float eps, float scale) {
  size_t at = 0;
  int64_t pages = 0;
  auto next = [&]() -> void* {
    const ffi::AnyBuffer got = args.get<ffi::AnyBuffer>(at++).value();
    pages = got.dimensions()[0];
    return got.untyped_data();
  };
  auto bits = [&] { return static_cast<uint16_t*>(next()); };
  auto bits_if = [&](bool there) { return there ? bits() : nullptr; };
  auto result = [&](size_t i) { return rets.get<ffi::AnyBuffer>(i).value()->untyped_data(); };
  if (cuts.size() < kStages * kOfCut) return "needs the cuts of four products";
  if (z.blocks * kWorkers > kMaxWorkers || z.rows * z.kv_heads > kMaxSegments) return "too many workers or rows";
  Chain chain = {stream, cuts.begin(), int(z.blocks), int(z.rows), int(z.D), int(z.heads) * kHead, int(z.F), int(z.heads + 2 * z.kv_heads) * kHead, eps};
  char* base = static_cast<char*>(result(1));
  chain.w = lay_out(z.rows, z.D, z.F, z.sums, base), chain.peers = peers;
  Call a{};
  const Room room = lay_out(a, z, base);
  a.eps = eps, a.scale = scale * kLog2e;
  const uint16_t* x = bits();
  a.table = static_cast<int*>(next()), a.lens = static_cast<int*>(next());
  a.cosines = static_cast<float*>(next()), a.sines = static_cast<float*>(next()), a.out = room.mixed;
  std::vector<Layer> layers(z.num_layers);
  for (Layer& l : layers) {
    l.qkv = bits(), l.o = bits(), l.norms = bits(), l.gate_up = bits(), l.down = bits();
    l.qkv_bias = bits_if(has & kQkvBias), l.o_bias = bits_if(has & kOBias), l.qk_norms = bits_if(has & kQkNorms);
    l.k_pages = bits(), l.v_pages = bits();  // the results are the same memory
  }
  if (at != args.size()) return "unexpected number of buffers";

  uint16_t* out = static_cast<uint16_t*>(result(0));
  chain.first(x, layers[0].norms, layers[0].qkv);
  a.qkv = chain.w.sums, a.addends = chain.splits(kStages - 1);
  for (size_t i = 0; i < layers.size() && chain.fault.empty(); ++i) {
    const Layer &l = layers[i], next = i + 1 < layers.size() ? layers[i + 1] : Layer{};
    a.k_pages = l.k_pages, a.v_pages = l.v_pages, a.norms = l.qk_norms, a.bias = l.qkv_bias;
    chain.fault = map_pages(a, pages);
    if (chain.fault.empty()) chain.fault = launch_attention(stream, a, true);
    const Weights weights = {l.o, l.o_bias, l.norms + z.D, l.gate_up, l.down, next.norms, next.qkv, next.qkv_bias};
    chain.record(weights, room.mixed, i ? out : x, out, nullptr, true);
  }
  return chain.fault;
}

#define JAXLLM_BINDING                                                                                                   \
  .RemainingArgs().RemainingRets().Attr<ffi::Span<const int64_t>>("cuts").Attr<ffi::Span<const int64_t>>("groups")          \
      .Attr<int64_t>("num_layers").Attr<int64_t>("rows").Attr<int64_t>("blocks").Attr<int64_t>("D").Attr<int64_t>("F")     \
      .Attr<int64_t>("heads").Attr<int64_t>("kv_heads").Attr<int64_t>("page_size").Attr<int64_t>("width")                  \
      .Attr<int64_t>("sums").Attr<int64_t>("has").Attr<float>("eps").Attr<float>("scale")
#define JAXLLM_ARGUMENTS                                                                                                 \
  ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Span<const int64_t> cuts, ffi::Span<const int64_t> numbers,          \
      int64_t num_layers, int64_t rows,                                                                                    \
      int64_t blocks, int64_t D, int64_t F, int64_t heads, int64_t kv_heads, int64_t page_size, int64_t width,             \
      int64_t sums, int64_t has, float eps, float scale
#define JAXLLM_VALUES                                                                                                    \
  {num_layers, rows, blocks, D, F, heads, kv_heads, page_size, width, sums}, peers, args, rets, cuts, has, eps, scale

#ifdef JAXLLM_EMULATED
ffi::Error launched_impl(int32_t device, JAXLLM_ARGUMENTS) {
  for (int i : {0, 1}) {  // NaN, as memory may hold
    const auto buffer = *rets.get<ffi::AnyBuffer>(i);
    std::memset(buffer->untyped_data(), 0xff, buffer->size_bytes());
  }
  std::string fault;
  Peers peers = {};
  Group* group = find_peers(peers, numbers, device, fault);
  std::vector<Grid> recorded;
  if (fault.empty()) fault = run_layers(&recorded, JAXLLM_VALUES);
  for (Grid& grid : recorded) grid.device = peers.rank;
  using Streams = std::vector<std::vector<Grid>*>;
  if (!fault.empty()) return failure(fault);
  if (group == nullptr) {
    fault = alone([&] { return run_streams({&recorded}, unsigned(rows)); });
  } else {
    fault = together(*group, peers, &recorded, [&](const std::vector<const void*>& all) {
      Streams streams;
      for (const void* each : all) streams.push_back(static_cast<std::vector<Grid>*>(const_cast<void*>(each)));
      const std::string found = run_streams(streams, unsigned(rows));
      for (const void* sums : group->sums)
        for (int64_t i = 0; i < group->bytes; ++i)
          if (found.empty() && static_cast<const char*>(sums)[i]) return std::string("sums that nobody took");
      return found;
    });
  }
  return fault.empty() ? ffi::Error::Success() : failure(fault);
}
XLA_FFI_DEFINE_HANDLER(launched_handler, launched_impl, ffi::Ffi::Bind().Ctx<ffi::DeviceOrdinal>() JAXLLM_BINDING);
#else
ffi::Error launched_impl(cudaStream_t stream, JAXLLM_ARGUMENTS) {
  int device = -1;
  if (cudaGetDevice(&device) != cudaSuccess) return failure("no current device");
  std::string fault;
  Peers peers = {};
  find_peers(peers, numbers, device, fault);
  if (fault.empty()) fault = run_layers(stream, JAXLLM_VALUES);
  return fault.empty() ? ffi::Error::Success() : failure(fault);
}
XLA_FFI_DEFINE_HANDLER(launched_handler, launched_impl, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>() JAXLLM_BINDING,
                       {ffi::Traits::kCmdBufferCompatible});

cudaError_t load_kernels() {
  cudaFuncAttributes attributes;
  for (Kind kind : {kSums, kGated})
    for (int width : {64, 96, 128, 224})
      for (int groups : {1, 2, 3})
        for (int shared : {kWeights, kRows}) launch(nullptr, Product{}, kind, {width, 1, shared}, groups, false);  // those there are
  for (Kind kind : {kSums, kGated})
    for (int width : {64, 128, 192, 224}) launch_packed(nullptr, Product{}, kind, {width, 1, kOfPacked}, false);
  const uint16_t some = 0;
  for (int N : {1024, 4096, 8192})
    for (const uint16_t* norm : {static_cast<const uint16_t*>(nullptr), &some}) {
      Settle nothing = {};
      nothing.N = N, nothing.norm = norm, nothing.peers.ranks = 2;
      launch(nullptr, nothing);
    }
  const cudaError_t error = cudaFuncGetAttributes(&attributes, decode_attention);
  return error == cudaSuccess ? cudaGetLastError() : error;
}
#endif

}  // namespace

extern "C" XLA_FFI_Error* jaxllm_launched_layers(XLA_FFI_CallFrame* frame) { return launched_handler(frame); }
extern "C" int64_t jaxllm_launched_layers_work(int64_t rows, int64_t blocks, int64_t D, int64_t F, int64_t heads, int64_t kv_heads,
                                               int64_t page_size, int64_t width, int64_t sums) {
  Params a{};
  return lay_out(a, {0, rows, blocks, D, F, heads, kv_heads, page_size, width, sums}, nullptr).bytes;
}
// Bytes that a device of `ranks` needs for what the others send it, and the number of the group of these devices, in rank
// order; -1 and a reason in `why` when it cannot be made.
extern "C" int64_t jaxllm_launched_layers_sums(int64_t D, int64_t ranks) { return bytes_of_sums(D, ranks); }
extern "C" int jaxllm_launched_layers_group(const int* devices, int count, int64_t bytes, char* why, int why_bytes) {
  return number_of_group({devices, devices + count}, bytes, why, why_bytes);
}
