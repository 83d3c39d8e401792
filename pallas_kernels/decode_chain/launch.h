// The call through XLA's FFI: buffers to launches. Included by decode_chain.cu.
#pragma once
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

enum Has { kOBias = 1, kFollowing = 2, kNextBias = 4 };  // which optional arrays there are, in the order they come in
ffi::Error failure(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInternal, "decode_chain: " + what); }

ffi::Error chain_impl(Stream stream, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Span<const int64_t> cuts,
                      int64_t blocks, int64_t sums, int64_t has, float eps) {
  size_t at = 0;
  int64_t first = 0, second = 0;  // the last one's sizes
  auto data = [&] {
    const ffi::AnyBuffer got = args.get<ffi::AnyBuffer>(at++).value();
    first = got.dimensions()[0], second = got.dimensions().back();
    return static_cast<const uint16_t*>(got.untyped_data());
  };
  auto result = [&](size_t i) { return static_cast<uint16_t*>(rets.get<ffi::AnyBuffer>(i).value()->untyped_data()); };
  if (cuts.size() < kStages * kOfCut) return failure("needs the cuts of four products");
  Chain chain = {stream, cuts.begin()};
  chain.blocks = int(blocks), chain.eps = eps;
  const uint16_t* x = data();
  chain.M = int(first), chain.D = int(second);
  const uint16_t* mixed = data();
  chain.O = int(second);
  Weights layer = {};
  layer.o = data(), layer.norm = data() + chain.D, layer.gate_up = data(), layer.down = data();
  chain.F = int(second);
  layer.o_bias = has & kOBias ? data() : nullptr;
  if (has & kFollowing) {
    layer.next_norm = data(), layer.next_qkv = data();
    chain.Q = int(first);
    layer.next_bias = has & kNextBias ? data() : nullptr;
  }
  chain.w = lay_out(chain.M, chain.D, chain.F, sums, reinterpret_cast<char*>(result(1)));
  chain.record(layer, mixed, x, result(0), has & kFollowing ? result(2) : nullptr, false);
  return chain.fault.empty() ? ffi::Error::Success() : failure(chain.fault);
}

#define JAXLLM_BINDING                                                                                            \
  .RemainingArgs().RemainingRets().Attr<ffi::Span<const int64_t>>("cuts").Attr<int64_t>("blocks")               \
      .Attr<int64_t>("sums").Attr<int64_t>("has").Attr<float>("eps")

#ifdef JAXLLM_EMULATED
ffi::Error emulated_impl(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Span<const int64_t> cuts, int64_t blocks,
                         int64_t sums, int64_t has, float eps) {
  std::vector<Grid> recorded;
  const ffi::Error error = chain_impl(&recorded, args, rets, cuts, blocks, sums, has, eps);
  if (error.failure()) return error;
  const std::string fault = play_recorded(&recorded, 1);
  return fault.empty() ? ffi::Error::Success() : failure(fault);
}
XLA_FFI_DEFINE_HANDLER(chain_handler, emulated_impl, ffi::Ffi::Bind() JAXLLM_BINDING);
#else
XLA_FFI_DEFINE_HANDLER(chain_handler, chain_impl, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>() JAXLLM_BINDING,
                       {ffi::Traits::kCmdBufferCompatible});
#endif

}  // namespace

extern "C" XLA_FFI_Error* jaxllm_decode_chain(XLA_FFI_CallFrame* frame) { return chain_handler(frame); }
extern "C" int64_t jaxllm_decode_chain_work(int64_t M, int64_t D, int64_t F, int64_t sums) { return lay_out(M, D, F, sums, nullptr).bytes; }
