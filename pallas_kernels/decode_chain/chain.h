// What lies between two attentions of a dense decoder for up to 256 rows, in four launches each of which begins before the one
// ahead of it has ended (ADR 47): o, gate and up with SwiGLU, down, the next layer's qkv, by products.h.
//
// Weights depend on no launch, so a product's first blocks of them come while the launches ahead end: memory does not idle
// where a step has many short kernels.
#pragma once
#include <string>
#include <utility>

#include "products.h"

namespace {

constexpr int kStages = 4, kOfCut = 5;  // numbers of a stage's cut
constexpr int kLeastPart = 16;          // columns that leave a sum of squares

template <int WIDTH, int GROUPS, int SHARED>
std::string launch_splits(Stream stream, const Product& p, int splits, bool early) {
  switch (splits) {
    case 1: return launch_product<WIDTH, GROUPS, SHARED, 1, kEnded>(stream, p, early);
    case 2: return launch_product<WIDTH, GROUPS, SHARED, 2, kEnded>(stream, p, early);
    case 4: return launch_product<WIDTH, GROUPS, SHARED, 4, kEnded>(stream, p, early);
  }
  return "no product in " + std::to_string(splits) + " splits";
}
template <int WIDTH>
std::string launch_ended(Stream stream, const Product& p, const Cut& cut, int groups, bool early) {
  if (cut.shared == kWeights) return launch_splits<WIDTH, 2, kWeights>(stream, p, cut.splits, early);
  if constexpr (WIDTH < 128) {  // of x that is shared, narrow tiles of many blocks ask the second-level cache for less
    if (groups == 1) return launch_splits<WIDTH, 1, kRows>(stream, p, cut.splits, early);
    if (groups == 2) return launch_splits<WIDTH, 2, kRows>(stream, p, cut.splits, early);
    return launch_splits<WIDTH, 3, kRows>(stream, p, cut.splits, early);
  }
  return "no such tile";
}
template <int WIDTH>
std::string launch_gated(Stream stream, const Product& p, const Cut& cut, int groups, bool early) {
  if (cut.shared == kWeights) return launch_product<WIDTH, 2, kWeights, 1, kGated>(stream, p, early);
  if (groups == 1) return launch_product<WIDTH, 1, kRows, 1, kGated>(stream, p, early);
  if (groups == 2) return launch_product<WIDTH, 2, kRows, 1, kGated>(stream, p, early);
  return launch_product<WIDTH, 3, kRows, 1, kGated>(stream, p, early);
}

// The widths that cuda.py chooses from.
std::string launch(Stream stream, const Product& p, Kind kind, const Cut& cut, int groups, bool early) {
  switch (cut.width * 10 + kind) {
    case 640: return launch_ended<64>(stream, p, cut, groups, early);
    case 960: return launch_ended<96>(stream, p, cut, groups, early);
    case 1280: return launch_ended<128>(stream, p, cut, groups, early);
    case 641: return launch_gated<64>(stream, p, cut, groups, early);
    case 1281: return launch_gated<128>(stream, p, cut, groups, early);
    case 2241: return launch_gated<224>(stream, p, cut, groups, early);
  }
  return "no tile that is " + std::to_string(cut.width) + " wide";
}

int64_t up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

struct Work {
  uint16_t *x, *normed, *hidden;
  float* squares[2];  // of `x`, and of what a layer gives
  int64_t bytes;
};

Work lay_out(int64_t M, int64_t D, int64_t F, char* base) {
  int64_t at = 0;
  auto take = [&](int64_t bytes) { return base + std::exchange(at, at + up(bytes)); };
  Work w;
  w.x = reinterpret_cast<uint16_t*>(take(M * D * 2)), w.normed = reinterpret_cast<uint16_t*>(take(M * D * 2));
  w.hidden = reinterpret_cast<uint16_t*>(take(M * F * 2));
  for (float*& each : w.squares) each = reinterpret_cast<float*>(take(M * (D / kLeastPart + 16) * 4));  // tiles beyond the last column too
  w.bytes = at;
  return w;
}

struct Weights {  // of a layer; biases may be null, and all of what follows a last layer
  const uint16_t *o, *o_bias, *norm, *gate_up, *down, *next_norm, *next_qkv, *next_bias;
};

struct Chain {  // what all its launches share
  Stream stream;
  const int64_t* cuts;  // [kStages, kOfCut]
  int M, D, O, F, Q;
  float eps;
  Work w;
  Peers peers = {};
  std::string fault = "";

  // Of a layer whose residual stream is x. `early`: not what begins a recording.
  void record(const Weights& layer, const uint16_t* mixed, const uint16_t* x, uint16_t* out, uint16_t* qkv, bool early) {
    Product o = {}, gate_up = {}, down = {}, next = {};
    o.bias = layer.o_bias, o.residual = x, o.norm = layer.norm, o.out = w.x, o.normed = w.normed, o.out_squares = w.squares[0];
    o.peers = down.peers = peers, down.turn = 1;  // an exchange is not in the way of the one before
    multiply(0, o, kEnded, mixed, layer.o, D, O, nullptr, early);
    gate_up.out = w.hidden;
    multiply(1, gate_up, kGated, w.normed, layer.gate_up, F, D, &o, true);
    down.residual = w.x, down.norm = layer.next_norm, down.out = out, down.normed = w.normed, down.out_squares = w.squares[1];
    multiply(2, down, kEnded, w.hidden, layer.down, D, F, nullptr, true);
    if (layer.next_qkv == nullptr) return;
    next.bias = layer.next_bias, next.out = qkv;
    multiply(3, next, kEnded, w.normed, layer.next_qkv, Q, D, &down, true);
  }

  // `normed`: the product that gave x before its norm.
  void multiply(int stage, Product& p, Kind kind, const uint16_t* x, const uint16_t* weight, int N, int K, const Product* normed, bool early) {
    const int64_t* of = cuts + stage * kOfCut;
    const Cut cut = {int(of[0]), int(of[1]), int(of[2]), int(of[3]), int(of[4])};
    const int groups = cut.shared == kWeights ? 2 : (M + 63) / 64;
    p.eps = eps;
    if (normed != nullptr) p.squares = normed->out_squares, p.parts = (normed->out_parts + 3) / 4 * 4;
    if (fault.empty()) fault = describe(p, x, weight, M, N, K, cut, groups, kind, 8);
    if (fault.empty() && p.norm != nullptr && p.out_parts > N / kLeastPart + 12) fault = "too many sums of squares";
    if (fault.empty()) fault = launch(stream, p, kind, cut, groups, early);
  }
};

// Clusters of so many blocks that run at one time: multiprocessors stand in groups, and a group of them may have no room for
// the last. Zero where no device says.
int64_t clusters_at_once(int64_t size) {
#ifdef JAXLLM_EMULATED
  return 0;
#else
  using S = Shape<64, 2, 2>;
  const auto kernel = product<64, 2, kRows, 2, kEnded>;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension, attribute.val.clusterDim = {unsigned(size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = unsigned(size * 64), config.blockDim = S::kThreads, config.dynamicSmemBytes = S::kBytes;
  config.attrs = &attribute, config.numAttrs = 1;
  int found = 0;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes) != cudaSuccess) return 0;
  return cudaOccupancyMaxActiveClusters(&found, kernel, &config) == cudaSuccess ? found : 0;
#endif
}

}  // namespace

extern "C" int64_t jaxllm_clusters_at_once(int64_t size) { return clusters_at_once(size); }
