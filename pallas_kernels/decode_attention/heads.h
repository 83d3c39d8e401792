// A row's heads from the projection's result: norms and rotation.
#pragma once

namespace {

// Two numbers of the projection's result that stand side by side, rounded to the model's dtype.
DEVICE float2 projected(const Params& p, int row, int column) {
  const int64_t wide_ = int64_t(p.heads + 2 * p.kv_heads) * kHead;
  const float* sums = static_cast<const float*>(p.qkv) + row * wide_ + column;
  float2 total = load_fresh(reinterpret_cast<const float2*>(sums));
#pragma unroll 4
  for (int i = 1; i < p.addends; ++i) {
    const float2 more = load_fresh(reinterpret_cast<const float2*>(sums + i * p.rows * wide_));
    total.x += more.x, total.y += more.y;
  }
  if (p.bias != nullptr) total.x += wide(p.bias[column]), total.y += wide(p.bias[column + 1]);
  return {wide(narrow(total.x)), wide(narrow(total.y))};
}

struct Head {  // a lane's columns of one: 2 lane and the next, and the two that they are turned with
  float first[2], second[2];
  DEVICE void set(uint32_t low, uint32_t high) {
    first[0] = wide(uint16_t(low)), first[1] = wide(uint16_t(low >> 16));
    second[0] = wide(uint16_t(high)), second[1] = wide(uint16_t(high >> 16));
  }
  DEVICE void load(const uint16_t* from, int lane) {
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(from);
    set(pairs[lane], pairs[lane + 32]);
  }
  DEVICE void project(const Params& p, int row, int head, int lane) {
    if (p.addends == 0) {  // made in this launch, where a kernel does all layers
      const int64_t at = (int64_t(row) * (p.heads + 2 * p.kv_heads) + head) * kHead;
      const uint32_t* pairs = reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(p.qkv) + at);
      return set(load_fresh(pairs + lane), load_fresh(pairs + lane + 32));
    }
    const float2 low = projected(p, row, head * kHead + 2 * lane), high = projected(p, row, head * kHead + 2 * lane + 64);
    first[0] = low.x, first[1] = low.y, second[0] = high.x, second[1] = high.y;
  }
  DEVICE void store(uint16_t* to, int lane) const {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
    pairs[lane] = narrow(first[0], first[1]), pairs[lane + 32] = narrow(second[0], second[1]);
  }
};

struct Turn {  // what makes queries or keys of a row's heads: norm, if the model has one, and rotation
  Head norm;
  float c[2], s[2];
  DEVICE Turn(const Params& p, int row, int lane, const uint16_t* norms) {
#pragma unroll
    for (int i = 0; i < 2; ++i) c[i] = p.cosines[int64_t(row) * 64 + 2 * lane + i], s[i] = p.sines[int64_t(row) * 64 + 2 * lane + i];
    if (norms != nullptr) norm.load(norms, lane);
  }
  DEVICE void apply(const Params& p, Head& h) const {
    if (p.norms != nullptr) {
      float squares = 0.f;
#pragma unroll
      for (int i = 0; i < 2; ++i) squares += h.first[i] * h.first[i] + h.second[i] * h.second[i];
      for (int mask = 16; mask; mask >>= 1) squares += shuffle_xor(squares, mask);
      const float scale = reciprocal_root(squares / kHead + p.eps);
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // rounded between, as the model rounds
        h.first[i] = wide(narrow(h.first[i] * scale * norm.first[i]));
        h.second[i] = wide(narrow(h.second[i] * scale * norm.second[i]));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float a = h.first[i], b = h.second[i];
      h.first[i] = times(a, c[i]) - times(b, s[i]);  // not fused: rope_page_write rounds so
      h.second[i] = times(b, c[i]) + times(a, s[i]);
    }
  }
};

}  // namespace
