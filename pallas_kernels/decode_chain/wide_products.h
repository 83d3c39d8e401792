// Beyond tensor_cores.h: products of 64 rows by up to 256 columns, and copies of what is wanted again soon. For sm_90a, and for
// the emulator.
#pragma once
#include "tensor_cores.h"

namespace {

#ifdef JAXLLM_EMULATED

template <int N>
DEVICE void multiply_wide(float (&sums)[N / 2], const void* a, const void* b, bool adds) {
  Fiber& mine = *machine->current;
  mine.products.push_back({sums, static_cast<const char*>(a), static_cast<const char*>(b), N, mine.groups, adds});
}
// What registers hold when this is called.
template <int N>
DEVICE void multiply_held(float (&sums)[N / 2], const uint32_t (&a)[16], const void* b, bool adds) {
  Fiber& mine = *machine->current;
  for (int step = 0; step < 4; ++step) {
    Issued product = {sums, nullptr, static_cast<const char*>(b) + step * 32, N, mine.groups, adds || step};
    for (int t = 0; t < 4; ++t)
      for (int j = 0; j < 4; ++j) {
        const uint32_t pair = uint32_t(shuffle(int(a[4 * step + j]), mine.lane / 4 * 4 + t));
        for (int i = 0; i < 2; ++i) product.left[j % 2][j / 2 * 8 + 2 * t + i] = wide(uint16_t(pair >> 16 * i));
      }
    product.held = a + 4 * step, std::copy_n(product.held, 4, product.as_held);
    mine.products.push_back(product);
  }
}
DEVICE void copy_kept(void* to, const TileMap* map, int column, int row, uint64_t* barrier) { copy_tile(to, map, column, row, barrier); }
DEVICE uint32_t exchanged(uint32_t value, int mask) { return shuffle_xor(value, mask); }

#else

// To stay in the second-level cache: others want it too.
DEVICE void copy_kept(void* to, const TileMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
DEVICE uint32_t exchanged(uint32_t value, int mask) { return __shfl_xor_sync(~0u, value, mask); }

#define JAXLLM_P96 JAXLLM_P64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define JAXLLM_P112 JAXLLM_P96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define JAXLLM_P128 JAXLLM_P112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define JAXLLM_P56 JAXLLM_P48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define JAXLLM_R64 JAXLLM_R32(0) JAXLLM_COMMA JAXLLM_R32(32)
#define JAXLLM_MULTIPLY_WIDE(N, places, a_at, b_at, adds_at, registers)                                              \
  template <>                                                                                                        \
  DEVICE void multiply_wide<N>(float(&d)[N / 2], const void* a, const void* b, bool adds) {                          \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" adds_at ", 0;\n"                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" places "}, %" a_at ", %" b_at          \
                 ", adds, 1, 1, 0, 0;\n}"                                                                            \
                 : registers                                                                                         \
                 : "l"(matrix(a)), "l"(matrix(b)), "r"(int(adds)));                                                  \
  }

#define JAXLLM_MULTIPLY_HELD(N, places, a_places, b_at, adds_at, registers)                                          \
  template <>                                                                                                        \
  DEVICE void multiply_step<N>(float(&d)[N / 2], const uint32_t* a, uint64_t b, bool adds) {                         \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" adds_at ", 0;\n"                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" places "}, {" a_places "}, %" b_at     \
                 ", adds, 1, 1, 0;\n}"                                                                               \
                 : registers                                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(adds)));                              \
  }

template <int N>
DEVICE void multiply_step(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool adds);
JAXLLM_MULTIPLY_HELD(32, JAXLLM_P16, "%16,%17,%18,%19", "20", "21", JAXLLM_R16(0))

// Of kDepth columns. The left operand from registers, in the order of `mma`'s, a warp's sixteen of the 64 rows: four for each 16 columns.
// They may be written again once the products have been waited for.
template <int N>
DEVICE void multiply_held(float (&d)[N / 2], const uint32_t (&a)[16], const void* b, bool adds) {
  const uint64_t first = matrix(b);
#pragma unroll
  for (int step = 0; step < 4; ++step) multiply_step<N>(d, a + 4 * step, first + 2 * step, adds || step);  // 32 bytes on
}

// As multiply of tensor_cores.h; without `adds` the sums are not read.
template <int N>
DEVICE void multiply_wide(float (&d)[N / 2], const void* a, const void* b, bool adds);
JAXLLM_MULTIPLY_WIDE(64, JAXLLM_P32, "32", "33", "34", JAXLLM_R32(0))
JAXLLM_MULTIPLY_WIDE(96, JAXLLM_P48, "48", "49", "50", JAXLLM_R32(0) JAXLLM_COMMA JAXLLM_R16(32))
JAXLLM_MULTIPLY_WIDE(112, JAXLLM_P56, "56", "57", "58", JAXLLM_R32(0) JAXLLM_COMMA JAXLLM_R16(32) JAXLLM_COMMA JAXLLM_R8(48))
JAXLLM_MULTIPLY_WIDE(128, JAXLLM_P64, "64", "65", "66", JAXLLM_R64)
JAXLLM_MULTIPLY_WIDE(192, JAXLLM_P96, "96", "97", "98", JAXLLM_R64 JAXLLM_COMMA JAXLLM_R32(64))
JAXLLM_MULTIPLY_WIDE(224, JAXLLM_P112, "112", "113", "114", JAXLLM_R64 JAXLLM_COMMA JAXLLM_R32(64) JAXLLM_COMMA JAXLLM_R16(96))
JAXLLM_MULTIPLY_WIDE(256, JAXLLM_P128, "128", "129", "130", JAXLLM_R64 JAXLLM_COMMA JAXLLM_R32(64) JAXLLM_COMMA JAXLLM_R32(96))

#endif

}  // namespace
