// How weights lie in a slot of decode_layers.cu's ring, and what a lane does with those it takes: one kind a library. bf16 and
// e4m3 are rows [N][K]. int8 and int4 are words as quant_matmul/packing.py lays them: pieces of 512 bytes, a strip of 16
// outputs x 64 inputs (int8: 32), in which a lane's 16 bytes are what it gives to the tensor core, so lanes pass nothing on.
// bf12 is bf16 as bf12.py lays it: slabs of 1,552 bytes, 16 outputs x 64 inputs, pieces here too. Of a gated product its units
// are as bf16's, 8 of gate and 8 of up: they lie so.
//
// Widening to bf16 is exact, so a product is one of bf16 activations with what is stored. Activations are not rounded to
// e4m3. A NaN of e4m3 is widened to 480: who stores weights has none.
#pragma once
#include <cstring>

namespace {

enum Kind { kBf16, kFp8, kInt8, kInt4, kBf12 };
constexpr Kind kKind = JAXLLM_WEIGHTS;
constexpr int kBits = kKind == kBf16 || kKind == kBf12 ? 16 : kKind == kInt4 ? 4 : 8;  // of bf12, what a slot has room for
constexpr bool kStrips = kKind == kInt8 || kKind == kInt4, kPacked = kStrips || kKind == kBf12;  // strips: of gate, of up
constexpr bool kByOutput = kKind == kFp8 || kKind == kInt8, kByGroup = kKind == kInt4, kScaled = kByOutput || kByGroup;

constexpr int kUnit = 16;             // outputs of the tensor core
constexpr int kChunk = kKind == kBf12 ? 64 : 512 / kBits;  // inputs of which a lane has 16 bytes of row g and 16 of row g + 8
constexpr int kX = kChunk / 32;       // 16 bytes of activations for that
constexpr int kPiece = kKind == kBf12 ? 1552 : 512;  // bytes of a piece; the next inputs' is kPieceStride on
constexpr int kPieceInputs = kKind == kBf12 ? 64 : kPiece * 8 / kBits / kUnit, kTileUnits = 4, kPieceStride = kPiece * kTileUnits;
constexpr int kGroupInputs = 64;      // the fewest that share a scale

// A lane's weights of a chunk: rows g and g + 8, or of packed ones a piece and the next. `scales`, of int4: of each 64 inputs
// row g's and above it row g + 8's. Of bf12 a slab: its signs and mantissas, its codes, its end.
struct Chunk {
  uint4 low = {}, high = {}, codes = {}, end = {};
  uint32_t scales[kByGroup ? 2 : 1] = {};
};

// Where an activation that a product will read lies among 64, so that a lane's 16 bytes are what it needs next, and those of
// its four neighbours in a row one behind the other. Of e4m3 a lane has 16 columns; of packed weights of each step of 16
// columns 2t, 2t + 1, 2t + 8, 2t + 9. Pairs stay neighbours.
DEVICE int placed(int column) {
  if (kKind == kBf16) return column;
  if (!kPacked) return (column & ~63) | (column >> 3 & 1) << 5 | (column >> 4 & 3) << 3 | (column & 7);
  const int step = column >> 4 & 3, part = column >> 3 & 1, t = column >> 1 & 3;
  return (column & ~63) | step >> 1 << 5 | t << 3 | (step & 1) << 2 | part << 1 | (column & 1);
}

DEVICE void multiply(float (&acc)[4], uint4 low, uint4 high, uint4 x) {
  // The columns of a lane's 16 bytes are in the same places on both sides, so their order does not matter.
  mma(acc, low.x, high.x, low.y, high.y, x.x, x.y);
  mma(acc, low.z, high.z, low.w, high.w, x.z, x.w);
}

struct Pairs {
  uint32_t first, second;
};

// Four e4m3 as bf16. Their exponent is 120 less than it should be, subnormal ones' too.
DEVICE Pairs widened_fp8(uint32_t word) {
  auto of = [&](uint32_t selector) {
    const uint32_t high = bytes_of(word, 0, selector);
    return times_pair((high & 0x80008000u) | (high >> 4 & 0x07f007f0u), 0x7b807b80u);  // 2^120
  };
  return {of(0x1404), of(0x3424)};
}

// Four int8 as bf16: 128 and the low seven bits, less 128, or 256 where the sign is set.
DEVICE Pairs widened_int8(uint32_t word) {
  auto of = [&](uint32_t selector) {
    const uint32_t low = bytes_of(word, 0, selector);
    return less_pair(and_xor(low, 0x007f007fu, 0x43004300u), and_xor(low, 0x00800080u, 0x43004300u));
  };
  return {of(0x4140), of(0x4342)};
}

// The j-th register of eight int4: 136 more than they are, less that.
DEVICE uint32_t widened_int4(uint32_t word, int j) {
  return less_pair(and_xor(word >> 4 * j, 0x000f000fu, 0x43084308u), 0x43084308u);
}

// The j-th register of 16 inputs of bf12, where no code is 0.
DEVICE uint32_t widened_bf12(uint32_t word, uint32_t codes, uint32_t base, int j) {
  return and_xor(rotated(word, j % 2 * 8), 0x807f807fu, rotated(codes, j * 4) & 0x07800780u) + base;
}

struct alignas(16) Slab {  // as it goes to the tensor core, and what of it is needed for numbers that have no code
  uint32_t a[4][4], codes[4], end[4];
};

// Where a code is 0, signs and mantissas are all that is right: a number of the slab's end, or zero. In memory, not in
// registers: it is seldom, and there are as many calls as there are copies of multiply().
SELDOM void mend(Slab& slab) {
#pragma unroll 1
  for (int i = 0; i < 4; ++i)
    if (slab.end[0] >> i & 1)
#pragma unroll 1
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int shift = 0; shift < 32; shift += 16)
          if ((rotated(slab.codes[i], j * 4) >> shift & 0x780) == 0) {
            const uint32_t bits = slab.a[i][j] >> shift & 0x807f, index = bits & 7;
            const uint32_t number = index == 0 ? bits : slab.end[index / 2] >> index % 2 * 16 & 0xffff;
            slab.a[i][j] = (slab.a[i][j] & 0xffff0000u >> shift) | number << shift;
          }
}

// acc += a chunk's weights times x, by a reader, who knows whether int4's scales are f16 or bf16.
template <typename Reader>
DEVICE void multiply(const Reader& r, float (&acc)[4], const Chunk& c, const uint4 (&x)[kX]) {
  if constexpr (kKind == kBf16) {
    multiply(acc, c.low, c.high, x[0]);
  } else {
    const uint32_t low[4] = {c.low.x, c.low.y, c.low.z, c.low.w}, high[4] = {c.high.x, c.high.y, c.high.z, c.high.w};
    uint32_t b[kX][4];
#pragma unroll
    for (int i = 0; i < kX; ++i) b[i][0] = x[i].x, b[i][1] = x[i].y, b[i][2] = x[i].z, b[i][3] = x[i].w;
    if constexpr (kKind == kFp8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Pairs a = widened_fp8(low[i]), other = widened_fp8(high[i]);
        mma(acc, a.first, other.first, a.second, other.second, b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
      }
    } else if constexpr (kKind == kInt8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t* words = i < 2 ? low : high;
        const Pairs a = widened_int8(words[i % 2 * 2]), other = widened_int8(words[i % 2 * 2 + 1]);
        mma(acc, a.first, a.second, other.first, other.second, b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
      }
    } else if constexpr (kKind == kBf12) {
      const uint32_t codes[4] = {c.codes.x, c.codes.y, c.codes.z, c.codes.w}, base = (c.end.x & 0x7f80) * 0x10001;
      uint32_t a[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) a[i][j] = widened_bf12((i < 2 ? low : high)[i % 2 * 2 + j / 2], codes[i], base, j);
      if (c.end.x & 15) {
        Slab slab;
        std::memcpy(slab.a, a, sizeof a), std::memcpy(slab.codes, &c.codes, 16), std::memcpy(slab.end, &c.end, 16);
        mend(slab);
        std::memcpy(a, slab.a, sizeof a);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) mma(acc, a[i][0], a[i][1], a[i][2], a[i][3], b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
    } else {
      float parts[2][4] = {};  // sums of whole numbers times x, of 64 inputs each
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const uint32_t word = part ? high[i] : low[i];
          mma(parts[part], widened_int4(word, 0), widened_int4(word, 1), widened_int4(word, 2), widened_int4(word, 3),
              b[kX / 2 * part + i / 2][i % 2 * 2], b[kX / 2 * part + i / 2][i % 2 * 2 + 1]);
        }
#pragma unroll
      for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const uint16_t bits = uint16_t(c.scales[kByGroup ? part : 0] >> 16 * row);
          const float scale = r.p.f16 ? wide_f16(bits) : wide(bits);
          acc[2 * row] = fused(scale, parts[part][2 * row], acc[2 * row]);
          acc[2 * row + 1] = fused(scale, parts[part][2 * row + 1], acc[2 * row + 1]);
        }
    }
  }
}

}  // namespace
