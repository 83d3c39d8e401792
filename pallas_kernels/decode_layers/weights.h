// How weights lie in a slot of decode_layers.cu's ring, and what a lane does with those it takes: one kind a library. bf16 and
// e4m3 are rows [N][K]. int8 and int4 are words as quant_matmul/packing.py lays them: pieces of 512 bytes, a strip of 16
// outputs x 64 inputs (int8: 32), in which a lane's 16 bytes are what it gives to the tensor core, so lanes pass nothing on.
//
// Widening to bf16 is exact, so a product is one of bf16 activations with what is stored. Activations are not rounded to
// e4m3. A NaN of e4m3 is widened to 480: who stores weights has none.
#pragma once

namespace {

enum Kind { kBf16, kFp8, kInt8, kInt4 };
constexpr Kind kKind = JAXLLM_WEIGHTS;
constexpr int kBits = kKind == kBf16 ? 16 : kKind == kInt4 ? 4 : 8;
constexpr bool kPacked = kKind == kInt8 || kKind == kInt4, kByOutput = kKind == kFp8 || kKind == kInt8, kByGroup = kKind == kInt4;

constexpr int kUnit = 16;             // outputs of the tensor core
constexpr int kChunk = 512 / kBits;   // inputs of which a lane has 16 bytes of row g and 16 of row g + 8
constexpr int kX = kChunk / 32;       // 16 bytes of activations for that
constexpr int kPiece = 512;           // bytes of a piece; the next inputs' is kPieceStride on
constexpr int kPieceInputs = kPiece * 8 / kBits / kUnit, kPieceStride = 2048, kTileUnits = 4;
constexpr int kGroupInputs = 64;      // the fewest that share a scale

// A lane's weights of a chunk: rows g and g + 8, or of packed ones a piece and the next. `scales`, of int4: of each 64 inputs
// row g's and above it row g + 8's.
struct Chunk {
  uint4 low = {}, high = {};
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
