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
  auto next = [&] { return args.get<ffi::AnyBuffer>(at++).value(); };
  auto data = [](ffi::AnyBuffer buffer) { return static_cast<const uint16_t*>(buffer.untyped_data()); };
  auto result = [&](size_t i) { return static_cast<uint16_t*>(rets.get<ffi::AnyBuffer>(i).value()->untyped_data()); };
  const ffi::AnyBuffer x = next(), mixed = next(), o = next(), norms = next(), gate_up = next(), down = next();
  const uint16_t* o_bias = has & kOBias ? data(next()) : nullptr;
  const uint16_t* next_norms = has & kFollowing ? data(next()) : nullptr;
  const int M = int(x.dimensions()[0]), D = int(x.dimensions()[1]), O = int(o.dimensions()[1]), F = int(down.dimensions()[1]);
  const Work w = lay_out(M, D, F, sums, reinterpret_cast<char*>(result(1)));
  if (cuts.size() < kStages * kOfCut) return failure("needs the cuts of four products");
  Chain chain = {stream, cuts.begin(), M, int(blocks), eps, ""};

  chain.multiply(0, false, kSums, data(mixed), data(o), w.sums, D, O);
  chain.add_up(0, {w.sums, o_bias, data(x), data(norms) + D, w.x, w.normed, M, D});
  chain.multiply(1, true, kGated, w.normed, data(gate_up), w.hidden, F, D);
  chain.multiply(2, true, kSums, w.hidden, data(down), w.sums, D, F);
  chain.add_up(2, {w.sums, nullptr, w.x, next_norms, result(0), w.normed, M, D});
  if (has & kFollowing) {
    const ffi::AnyBuffer qkv = next();
    const int Q = int(qkv.dimensions()[0]);
    chain.multiply(3, true, kSums, w.normed, data(qkv), w.sums, Q, D);
    chain.add_up(3, {w.sums, has & kNextBias ? data(next()) : nullptr, nullptr, nullptr, result(2), nullptr, M, Q});
  }
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
extern "C" int64_t jaxllm_decode_chain_work(int64_t M, int64_t D, int64_t F, int64_t sums) {
  return lay_out(M, D, F, sums, nullptr).bytes;
}
