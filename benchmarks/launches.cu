// Layers of a decode step of the 8B shape as launches that overlap, without JAX: us a layer for all of it, for attention and for
// what lies between, eight distinct layers, 1,147 keys a row in pages of 16, cuts as cuda.py chooses them; up to 32 rows also by the same
// weights in 12 bits, and first whether both give the same bits.
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -cudart static -I XLA_INCLUDES -o launches benchmarks/launches.cu
//
// where XLA_INCLUDES is what jax.ffi.include_dir() says. An argument: seconds of each, one choice of cuts alone. With -DJAXLLM_STAMPS instead, of one launch of the graph: when the blocks of each
// kernel began, had what is ahead, had their first and last product and ended (first, middle and last block, us), and whether the
// same multiprocessors are late in every layer. With -DJAXLLM_BESIDE: layers of a decode step on some multiprocessors beside gate and
// up of a prompt on the others, two streams for a second each; of what each does alone, how much of both is done.
#include "../pallas_kernels/decode_layers/launched.cu"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <chrono>
#include <map>
#include <random>
#include <thread>
#define OK(x) do { auto e_ = (x); if (e_ != cudaSuccess) { printf("error %s line %d\n", cudaGetErrorString(e_), __LINE__); exit(1); } } while (0)
#define GOOD(x) do { std::string f_ = (x); if (!f_.empty()) { printf("fault %s line %d\n", f_.c_str(), __LINE__); exit(1); } } while (0)
__global__ void fill(uint16_t* p, size_t n, float scale) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    uint32_t h = uint32_t(i * 2654435761u) ^ uint32_t(i >> 20); h ^= h >> 15; h *= 2246822519u; h ^= h >> 13;
    p[i] = narrow((float(h & 0xffff) / 65536.f - .5f) * scale);
  }
}
// bf16 in 12 bits, as bf12.py says: a warp a slab of 64 inputs, with one exponent for all slabs. `gated`: rows are all gates, then all ups.
__global__ void pack_slabs(const uint16_t* w, uint32_t* words, int N, int K, bool gated, int base, unsigned* escapes) {
  const int across = K / 64, slab = blockIdx.x / across, kb = blockIdx.x % across, lane = threadIdx.x, g = lane / 4, t = lane % 4;
  __shared__ int count;
  uint32_t* to = words + ((int64_t(slab / 4) * across + kb) * 4 + slab % 4) * 388;
  uint16_t* end = reinterpret_cast<uint16_t*>(to + 384);
  if (lane == 0) count = 0;
  if (lane < 8) end[lane] = 0;
  __syncwarp();
  int flags = 0;
  for (int step = 0; step < 4; ++step) {
    uint32_t codes = 0, pairs[2] = {};
    for (int j = 0; j < 4; ++j) {
      uint32_t pair = 0, both = 0;
      for (int i = 0; i < 2; ++i) {
        const int r = g + j % 2 * 8, k = kb * 64 + step * 16 + j / 2 * 8 + 2 * t + i;
        const int64_t row = gated ? (r < 8 ? slab * 8 + r : N / 2 + slab * 8 + r - 8) : slab * 16 + r;
        const uint32_t bits = w[row * K + k];
        int code = int(bits >> 7 & 255) - base;
        uint32_t kept = bits & 0x807f;
        if (code < 1 || code > 15) {
          flags |= 1 << step, code = 0, kept = bits & 0x8000;
          if (bits & 0x7fff) { const int at = atomicAdd(&count, 1) + 1; if (at > 7) __trap(); kept = at, end[at] = bits + (112 - base) * 128; }
        }
        pair |= kept << 16 * i, both |= uint32_t(code) << (7 + 16 * i);
      }
      codes |= turned_left(both, j % 2 * 8 + j / 2 * 4), pairs[j / 2] |= turned_left(pair, j % 2 * 8 + j / 2 * 4);
    }
    for (int h = 0; h < 2; ++h) to[step / 2 * 128 + lane * 4 + step % 2 * 2 + h] = pairs[h];
    to[256 + lane * 4 + step] = codes;
  }
  for (int mask = 16; mask; mask /= 2) flags |= __shfl_xor_sync(~0u, flags, mask);
  __syncwarp();
  if (lane == 0) end[0] = base << 7 | flags, atomicAdd(escapes, count);
}
struct Setup { int D, O, F, Q, L; } S = {4096, 4096, 14336, 6144, 8};
uint16_t* make(size_t n, float scale) { uint16_t* p; OK(cudaMalloc(&p, n * 2)); fill<<<528, 256>>>(p, n, scale); return p; }
#ifdef JAXLLM_STAMPS
constexpr int kOfLayer = 7;
const char* const kNames[kOfLayer] = {"attend", "o", "o+", "gate_up", "down", "down+", "qkv"};

void tell_stamps(int layers, int shown) {
  unsigned count;
  OK(cudaMemcpyFromSymbol(&count, stamped, sizeof count));
  std::vector<Stamp> all(std::min(count, kMostStamps));
  OK(cudaMemcpyFromSymbol(all.data(), stamps, all.size() * sizeof(Stamp)));
  unsigned long long origin = ~0ull;
  for (const Stamp& s : all) origin = std::min(origin, s.nanoseconds);
  std::map<std::pair<int, int>, std::vector<std::pair<double, int>>> found;  // launch and point: us, multiprocessor
  for (const Stamp& s : all) found[{s.launch, s.point}].push_back({(s.nanoseconds - origin) / 1e3, s.multiprocessor});
  for (auto& [key, times] : found) std::sort(times.begin(), times.end());
  for (int launch = 0; launch < shown * kOfLayer; ++launch) {
    std::map<int, int> blocks;  // of a multiprocessor
    for (const auto& [us, multiprocessor] : found[{launch, int(kBegun)}]) ++blocks[multiprocessor];
    std::map<int, int> counts;
    for (const auto& [multiprocessor, count] : blocks) ++counts[count];
    printf("   %-8s |", kNames[launch % kOfLayer]);
    for (int point = 0; point < kPoints; ++point) {
      const auto& t = found[{launch, point}];
      if (t.empty()) printf("                      - |"); else printf(" %7.1f %7.1f %7.1f |", t[0].first, t[t.size() / 2].first, t.back().first);
    }
    printf(" blocks:");
    for (const auto& [count, multiprocessors] : counts) printf(" %d on %d", count, multiprocessors);
    printf("\n");
  }
  for (int kind : {3, 4}) {  // gate and up, down: a multiprocessor's last product beside the middle one's
    std::map<int, double> late[2];  // in even and odd layers
    for (int l = 0; l < layers; ++l) {
      const auto& t = found[{l * kOfLayer + kind, int(kLast)}];
      for (const auto& [us, multiprocessor] : t) late[l % 2][multiprocessor] += (us - t[t.size() / 2].first) / (layers / 2);
    }
    double xx = 0, yy = 0, xy = 0;
    std::vector<std::pair<double, int>> order;
    for (const auto& [multiprocessor, x] : late[0]) {
      const double y = late[1][multiprocessor];
      xx += x * x, yy += y * y, xy += x * y, order.push_back({(x + y) / 2, multiprocessor});
    }
    std::sort(order.begin(), order.end());
    printf("   %s: late in even and in odd layers: correlation %.2f; multiprocessors from first to last:", kNames[kind], xy / std::sqrt(xx * yy + 1e-9));
    for (size_t i = 0; i < order.size(); i += 6) printf(" %d (%.1f us)", order[i].second, order[i].first);
    printf("\n");
  }
}
#endif

struct Bench {
  bool packed() const { return !cuts.empty() && cuts[2] == kOfPacked; }
  std::vector<uint16_t*> packed_o, packed_gu, packed_dn, packed_qkv;
  int M, blocks = 132; std::vector<int64_t> cuts; bool attends = true, chains = true;
  std::vector<uint16_t*> o, gu, dn, qkv, k, v; uint16_t *x, *norms, *out; char* work; int *table, *lens; float *cs; int pages;
  void record(cudaStream_t st, int rep) {
    const int64_t sums = 8 * 6144;
    Sizes z = {S.L, M, blocks, S.D, S.F, 32, 8, 16, 2048, sums};
    Call a{}; const Room room = lay_out(a, z, work); a.eps = 1e-5f, a.scale = .088f * kLog2e;
    a.table = table, a.lens = lens, a.cosines = cs, a.sines = cs, a.out = room.mixed;
    Chain chain = {st, cuts.data(), blocks, M, S.D, S.O, S.F, S.Q, 1e-5f, lay_out(M, S.D, S.F, sums, work)};
    a.qkv = chain.w.sums, a.addends = cuts.empty() ? 2 : chain.splits(kStages - 1);
    for (int r = 0; r < rep; ++r) for (int l = 0; l < S.L; ++l) {
      const bool first = r == 0 && l == 0;
      a.k_pages = k[l], a.v_pages = v[l]; GOOD(map_pages(a, pages));
      a.number = chain.number, chain.number += attends;
      if (attends) GOOD(launch_attention(st, a, !first));
      if (!chains) continue;
      if (packed()) chain.record({packed_o[l], nullptr, norms, packed_gu[l], packed_dn[l], norms, packed_qkv[l], nullptr}, room.mixed, x, out, nullptr, !first || attends);
      else chain.record({o[l], nullptr, norms, gu[l], dn[l], norms, qkv[l], nullptr}, room.mixed, x, out, nullptr, !first || attends);
      GOOD(chain.fault);
    }
  }
  void run(const char* what, double seconds) {
    cudaStream_t st; OK(cudaStreamCreate(&st)); 
    cudaGraph_t g; cudaGraphExec_t ge; const int rep = S.L > 8 ? 1 : 4;
    OK(cudaStreamBeginCapture(st, cudaStreamCaptureModeThreadLocal)); record(st, rep); OK(cudaStreamEndCapture(st, &g)); OK(cudaGraphInstantiate(&ge, g, 0));
    cudaEvent_t a, b; cudaEventCreate(&a), cudaEventCreate(&b); std::vector<float> us;
    auto begun = std::chrono::steady_clock::now(); double t = 0;
    do { cudaEventRecord(a, st); OK(cudaGraphLaunch(ge, st)); cudaEventRecord(b, st); OK(cudaStreamSynchronize(st)); float ms; cudaEventElapsedTime(&ms, a, b); us.push_back(ms * 1000 / rep / S.L);
      t = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count(); } while (us.size() < 5 || t < seconds);
    const size_t n = us.size();
    auto med = [&](size_t i, size_t j) { std::vector<float> v(us.begin() + i, us.begin() + j); std::sort(v.begin(), v.end()); return v[v.size() / 2]; };
    printf("M %d %s: us a layer: first five %.1f, last fifth %.1f (%zu)\n", M, what, med(0, 5), med(n - std::max<size_t>(1, n / 5), n), n); fflush(stdout);
    if (seconds > 1) system("nvidia-smi --query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active --format=csv,noheader");
#ifdef JAXLLM_STAMPS
    const unsigned none = 0;
    OK(cudaMemcpyToSymbol(stamped, &none, sizeof none)); OK(cudaGraphLaunch(ge, st)); OK(cudaStreamSynchronize(st));
    if (attends && chains) tell_stamps(rep * S.L, 2);
#endif
    cudaGraphExecDestroy(ge), cudaGraphDestroy(g), cudaStreamDestroy(st);
  }
};

#ifdef JAXLLM_BESIDE
struct Rate { double times = 0; cudaGraphExec_t graph; cudaStream_t stream; };  // graphs a second

template <typename Record>
Rate record(int priority, Record what) {
  Rate r; cudaGraph_t g; int low, high;
  OK(cudaDeviceGetStreamPriorityRange(&low, &high));
  OK(cudaStreamCreateWithPriority(&r.stream, cudaStreamNonBlocking, priority ? high : low));
  OK(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal)); what(r.stream); OK(cudaStreamEndCapture(r.stream, &g)); OK(cudaGraphInstantiate(&r.graph, g, 0));
  return r;
}
// All at one time: each with at most two graphs waiting.
void measure(std::vector<Rate*> all, double seconds) {
  std::vector<std::thread> threads;
  for (Rate* r : all) threads.emplace_back([r, seconds] {
    cudaEvent_t e[2]; for (auto& each : e) OK(cudaEventCreateWithFlags(&each, cudaEventDisableTiming));
    auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
    const double warm = now() + .3 * seconds, end = now() + seconds; double begun = 0, last = 0; int counted = -1;
    for (int i = 0; now() < end; ++i) {
      if (i > 1) { OK(cudaEventSynchronize(e[i % 2])); last = now(); if (last > warm && counted++ < 0) begun = last; }
      OK(cudaGraphLaunch(r->graph, r->stream)); OK(cudaEventRecord(e[i % 2], r->stream));
    }
    r->times = counted / (last - begun);
    OK(cudaStreamSynchronize(r->stream));
  });
  std::thread watch([seconds] { std::this_thread::sleep_for(std::chrono::duration<double>(.8 * seconds)); 
    if (FILE* f = popen("nvidia-smi --query-gpu=clocks.sm,power.draw.instant --format=csv,noheader", "r")) { char line[200]; while (fgets(line, sizeof line, f)) printf("      %s", line); pclose(f); } });
  for (auto& t : threads) t.join();
  watch.join();
}
void beside(Bench& B, int rows, const std::vector<int64_t>& cuts, int tokens) {
  uint16_t *x = make(size_t(tokens) * S.D, 1), *out = make(size_t(tokens) * S.F, 1);
  auto prompt = [&](int blocks) {
    return record(0, [&](cudaStream_t st) {
      for (int l = 0; l < S.L; ++l) {
        Product p = {}; p.out = out;
        GOOD(describe(p, x, B.gu[l], tokens, S.F, S.D, {256, 1, kWeights}, 2, kGated, 8, blocks));
        GOOD((launch_product<256, 2, kWeights, kGated>(st, p, false)));
      }
    });
  };
  auto step = [&](int blocks, bool attends, bool chains) {
    B.M = rows, B.cuts = cuts, B.blocks = blocks, B.attends = attends, B.chains = chains;
    return record(1, [&](cudaStream_t st) { B.record(st, 1); });
  };
  const double flops = 4.0 * tokens * S.F * S.D * S.L;
  Rate whole = prompt(132), dealt = prompt(1 << 20);
  measure({&whole}, 1), measure({&dealt}, 1);
  printf("%d tokens alone: %.0f TFLOP/s by blocks that stay, %.0f by others\n", tokens, whole.times * flops / 1e12, dealt.times * flops / 1e12);
  const double best = std::max(whole.times, dealt.times);
  struct What { const char* name; bool attends, chains; };
  for (const What& w : {What{"layers", true, true}, What{"attention", true, false}}) {
    Rate alone = step(132, w.attends, w.chains);
    measure({&alone}, 1);
    printf("%d rows, %s alone: %.1f us a layer\n", rows, w.name, 1e6 / alone.times / S.L);
    for (int blocks : {32, 48, 64, 88, 132})
      for (int others : {132 - blocks, 1 << 20}) {
        if (others == 0) continue;
        Rate d = step(blocks, w.attends, w.chains), p = prompt(others);
        measure({&d}, .4);
        const double part = d.times / alone.times;
        measure({&d, &p}, 1);
        printf("   %3d blocks (%.2f of the rate alone) beside %s: %.2f of decoding + %.2f of prompts = %.2f\n", blocks, part, others > 132 ? "as many as there are" : "the others", d.times / alone.times,
               p.times / best, d.times / alone.times + p.times / best);
        fflush(stdout);
      }
  }
  cudaFree(x), cudaFree(out);
}
#endif
int main(int argc, char** argv) {
  const double seconds = argc > 1 ? atof(argv[1]) : 0;
  Bench B; const int most = 256, len = 1152, per = len / 16; B.pages = most * per;
  for (int l = 0; l < S.L; ++l) B.o.push_back(make(size_t(S.D) * S.O, .05f)), B.gu.push_back(make(size_t(2) * S.F * S.D, .05f)), B.dn.push_back(make(size_t(S.D) * S.F, .03f)), B.qkv.push_back(make(size_t(S.Q) * S.D, .05f)),
    B.k.push_back(make(size_t(B.pages) * 8 * 16 * 128, 2)), B.v.push_back(make(size_t(B.pages) * 8 * 16 * 128, 2));
  unsigned* escapes; OK(cudaMalloc(&escapes, 4)); OK(cudaMemset(escapes, 0, 4));
  auto pack = [&](const uint16_t* w, int N, int K, bool gated) {
    uint32_t* words; OK(cudaMalloc(&words, size_t(N / 16) * (K / 64) * 1552));
    pack_slabs<<<N / 16 * (K / 64), 32>>>(w, words, N, K, gated, 121 - 15, escapes);
    return reinterpret_cast<uint16_t*>(words);
  };
  for (int l = 0; l < S.L; ++l) B.packed_o.push_back(pack(B.o[l], S.D, S.O, false)), B.packed_gu.push_back(pack(B.gu[l], 2 * S.F, S.D, true)), B.packed_dn.push_back(pack(B.dn[l], S.D, S.F, false)),
    B.packed_qkv.push_back(pack(B.qkv[l], S.Q, S.D, false));
  unsigned found; OK(cudaMemcpy(&found, escapes, 4, cudaMemcpyDeviceToHost)); printf("packed; %u escapes of %.0f million\n", found, S.L * 218.1);
  B.x = make(512 * S.D, 2), B.norms = make(2 * S.D, 2), B.out = make(512 * S.D, 1);
  OK(cudaMalloc(&B.work, 1 << 30)); OK(cudaMemset(B.work, 0, 1 << 30));
  std::vector<int> order(B.pages), table(size_t(most) * 2048), lens(most, len - 5); for (int i = 0; i < B.pages; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), std::mt19937(1));
  OK(cudaMalloc(&B.table, table.size() * 4));
  auto lay = [&](int mode) {
    for (int r = 0; r < most; ++r) for (int i = 0; i < per; ++i)
      table[size_t(r) * 2048 + i] = mode == 0 ? order[r * per + i] : mode == 1 ? r * per + i : mode == 2 ? i * most + r : i < 64 ? r * 64 + i : most * 64 + (i - 64) * most + r;
    OK(cudaMemcpy(B.table, table.data(), table.size() * 4, cudaMemcpyHostToDevice));
  };
  lay(0);
  OK(cudaMalloc(&B.lens, most * 4)); OK(cudaMemcpy(B.lens, lens.data(), most * 4, cudaMemcpyHostToDevice));
  B.cs = reinterpret_cast<float*>(make(most * 64 * 2, 0)); OK(cudaDeviceSynchronize());
  // Cuts of o, gate and up, down, qkv: width, splits, what neighbours share (1: x).
  using Cuts = std::vector<int64_t>;
  const std::vector<std::pair<const char*, Cuts>> few = {{"four splits", {128, 4, 1, 224, 1, 1, 128, 4, 1, 96, 2, 1}}, {"packed", {128, 4, 2, 224, 1, 2, 128, 4, 2, 192, 4, 2}}, {"packed, down of six", {128, 4, 2, 224, 1, 2, 192, 6, 2, 192, 4, 2}}},
    many = {{"two splits", {128, 2, 0, 224, 1, 0, 128, 2, 0, 96, 1, 0}}, {"of two, qkv of four", {128, 2, 0, 224, 1, 0, 128, 2, 0, 128, 4, 0}}};
#ifdef JAXLLM_BESIDE
  for (int rows : {128, 256}) beside(B, rows, rows > 192 ? many[0].second : few[0].second, 2048);
  return 0;
#endif
  for (int M : {9, 20, 32}) {  // the same bits by both, of depths that are cut alike
    std::vector<uint16_t> outs[2];
    const Cuts of[2] = {{128, 4, 1, 224, 1, 1, 128, 4, 1, 96, 4, 1}, {128, 4, 2, 224, 1, 2, 128, 4, 2, 192, 4, 2}};
    for (int i = 0; i < 2; ++i) {
      B.M = M, B.cuts = of[i], B.attends = false, B.chains = true;
      OK(cudaMemset(B.out, 0, 512 * S.D * 2)); fill<<<528, 256>>>(reinterpret_cast<uint16_t*>(B.work), 1 << 25, 2);
      cudaStream_t st; OK(cudaStreamCreate(&st)); B.record(st, 1); OK(cudaStreamSynchronize(st));
      outs[i].resize(M * S.D); OK(cudaMemcpy(outs[i].data(), B.out, M * S.D * 2, cudaMemcpyDeviceToHost));
    }
    size_t unlike = 0, zeros = 0;
    for (size_t i = 0; i < outs[0].size(); ++i) unlike += outs[0][i] != outs[1][i], zeros += !(outs[0][i] & 0x7fff);
    printf("M %d: %zu of %zu numbers differ between packed weights and others, %zu are zeros\n", M, unlike, outs[0].size(), zeros), fflush(stdout);
  }
  for (int M : {32, 64, 128, 192, 256}) {
    B.M = M;
    B.chains = false, B.attends = true, B.run("attention", seconds);
    B.chains = true;
    for (const auto& [name, cuts] : M > 192 ? many : few) {
      B.cuts = cuts;
      if (M > kPackedRows && B.packed()) continue;
      B.attends = false, B.run((std::string("chain, ") + name).c_str(), seconds);
      B.attends = true, B.run((std::string("all, ") + name).c_str(), seconds);
    }
    if (M == 128 && seconds == 0) B.cuts = few[0].second, B.run("all, longer", 1.5);
  }
}
