// The call through XLA's FFI: buffers to Params, one launch. Included by decode_attention.cu.
#pragma once
#include <memory>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// What queries are made from, and which buffers come: in this order, before the pages, the table and the lengths.
enum Has { kHeads = 1, kNorms = 2, kBias = 4, kAmong = 8 };

struct Sizes {  // attributes, as they come
  int64_t rows, programs, heads, kv_heads, page_size, width, addends, has;
};

ffi::Error failure(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInternal, "decode_attention: " + what); }

int64_t up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Lays the work buffer out; returns its size.
int64_t lay_out(Params& p, unsigned char* base) {
  int64_t at = 0;
  auto take = [&](int64_t floats) { return reinterpret_cast<float*>(base + std::exchange(at, at + up(floats * 4))); };
  const Results kept = results_of(p);
  p.parts = take(kept.parts * kHead), p.part_stats = take(kept.parts * 2);
  p.runs = take(kept.runs * kHead), p.run_stats = take(kept.runs * 2);
  return at;
}

void size(Params& p, const Sizes& z) {
  p.rows = int(z.rows), p.programs = int(z.programs), p.heads = int(z.heads), p.kv_heads = int(z.kv_heads);
  p.width = int(z.width), p.addends = int(z.addends), p.page_shift = 0;
  while (kUnit << p.page_shift < z.page_size) ++p.page_shift;
}

std::string fill(Call& p, const Sizes& z, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  size(p, z);
  if (p.programs * kWorkers > kMaxWorkers || p.rows * p.kv_heads > kMaxSegments) return "too many workers or rows";
  size_t at = 0;
  bool good = true;
  auto next = [&]() -> void* {
    auto got = args.get<ffi::AnyBuffer>(at++);
    good = good && got.has_value();
    return got.has_value() ? got->untyped_data() : nullptr;
  };
  auto bits = [&] { return static_cast<uint16_t*>(next()); };
  auto floats = [&] { return static_cast<const float*>(next()); };
  auto ints = [&] { return static_cast<const int*>(next()); };
  if (z.has & kHeads) {
    p.qkv = next(), p.cosines = floats(), p.sines = floats();
    p.norms = z.has & kNorms ? bits() : nullptr;
    p.bias = z.has & kBias ? bits() : nullptr;
  } else {
    p.q = bits();
  }
  if (z.has & kAmong) p.tokens = ints(), next();  // the outputs that come in are the same memory
  const int64_t pages = at < args.size() ? args.get<ffi::AnyBuffer>(at)->dimensions()[0] : 0;
  p.k_pages = bits(), p.v_pages = bits();         // where results, the same memory
  p.table = ints(), p.lens = ints();
  auto out = rets.get<ffi::AnyBuffer>(0), work = rets.get<ffi::AnyBuffer>(1);
  if (!good || at != args.size() || !out.has_value() || !work.has_value()) return "unexpected number of buffers";
  p.out = static_cast<uint16_t*>((*out)->untyped_data());
  if (lay_out(p, static_cast<unsigned char*>((*work)->untyped_data())) > int64_t((*work)->size_bytes()))
    return "the work buffer is too small";
  return map_pages(p, pages);
}

#define JAXLLM_SIZES                                                                                                   \
  .Attr<int64_t>("rows").Attr<int64_t>("programs").Attr<int64_t>("heads").Attr<int64_t>("kv_heads")                       \
      .Attr<int64_t>("page_size").Attr<int64_t>("width").Attr<int64_t>("addends").Attr<int64_t>("has")                   \
      .Attr<float>("eps").Attr<float>("scale")
#define JAXLLM_SIZE_ARGUMENTS                                                                                          \
  int64_t rows, int64_t programs, int64_t heads, int64_t kv_heads, int64_t page_size, int64_t width, int64_t addends,   \
      int64_t has, float eps, float scale
#define JAXLLM_SIZE_VALUES {rows, programs, heads, kv_heads, page_size, width, addends, has}

#ifdef JAXLLM_EMULATED

ffi::Error decode_attention_impl(ffi::RemainingArgs args, ffi::RemainingRets rets, JAXLLM_SIZE_ARGUMENTS) {
  Call p{};
  p.eps = eps, p.scale = scale * kLog2e;
  const std::string why = fill(p, JAXLLM_SIZE_VALUES, args, rets);
  if (!why.empty()) return failure(why);
  const auto out = *rets.get<ffi::AnyBuffer>(0), work = *rets.get<ffi::AnyBuffer>(1);
  std::memset(work->untyped_data(), 0xff, work->size_bytes());  // NaN, as memory may hold
  if (p.tokens == nullptr) std::memset(out->untyped_data(), 0xff, out->size_bytes());
  const std::string fault = launch_attention(nullptr, p, false);
  for (uint32_t left : arrivals[0])
    if (fault.empty() && left) return failure("a counter is not zero after the call");
  return fault.empty() ? ffi::Error::Success() : failure(fault);
}

XLA_FFI_DEFINE_HANDLER(decode_attention_handler, decode_attention_impl,
                       ffi::Ffi::Bind().RemainingArgs().RemainingRets() JAXLLM_SIZES);

#else

ffi::Error decode_attention_impl(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets, JAXLLM_SIZE_ARGUMENTS) {
  Call p{};
  p.eps = eps, p.scale = scale * kLog2e;
  const std::string why = fill(p, JAXLLM_SIZE_VALUES, args, rets);
  if (!why.empty()) return failure(why);
  const std::string fault = launch_attention(stream, p, false);
  return fault.empty() ? ffi::Error::Success() : failure(fault);
}

XLA_FFI_DEFINE_HANDLER(decode_attention_handler, decode_attention_impl,
                       ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets() JAXLLM_SIZES,
                       {ffi::Traits::kCmdBufferCompatible});

#endif

}  // namespace

extern "C" XLA_FFI_Error* jaxllm_decode_attention(XLA_FFI_CallFrame* frame) { return decode_attention_handler(frame); }

extern "C" int64_t jaxllm_decode_attention_work(int64_t rows, int64_t programs, int64_t heads, int64_t kv_heads,
                                                int64_t page_size, int64_t width) {
  Call p{};
  size(p, {rows, programs, heads, kv_heads, page_size, width, 0, 0});
  return lay_out(p, nullptr);
}
