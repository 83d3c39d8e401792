// The call through XLA's FFI: buffers to Params, one launch. Included by gated_matmul.cu.
#pragma once
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

ffi::Error failure(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInternal, "gated_matmul: " + what); }

constexpr int kGroups = 2;  // three: too few registers

template <int WIDTH, int SHARED>
std::string launch(Stream stream, const Product& p) {
  return launch_product<WIDTH, kGroups, SHARED, kGated>(stream, p, false);
}

// The ways a product may be cut up that cuda.py chooses from.
std::string launch(Stream stream, const Product& p, int64_t width, int64_t shared) {
  switch (width * 10 + shared) {
    case 2560: return launch<256, kWeights>(stream, p);
    case 2240: return launch<224, kWeights>(stream, p);
    case 1920: return launch<192, kWeights>(stream, p);
    case 1280: return launch<128, kWeights>(stream, p);
    case 2241: return launch<224, kRows>(stream, p);
    case 1281: return launch<128, kRows>(stream, p);
  }
  return "no tile that is " + std::to_string(width) + " wide and shares " + std::to_string(shared);
}

ffi::Error gated_impl(Stream stream, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> out, int64_t width, int64_t shared, int64_t run, int64_t blocks) {
  Product p = {};
  p.out = out->untyped_data();
  const int M = int(x.dimensions()[0]), K = int(x.dimensions()[1]), N = int(out->dimensions()[1]);
  std::string fault = describe(p, x.untyped_data(), w.untyped_data(), M, N, K, {int(width), 1, int(shared)}, kGroups, kGated, int(run), int(blocks));
  if (fault.empty()) fault = launch(stream, p, width, shared);
  return fault.empty() ? ffi::Error::Success() : failure(fault);
}

#define JAXLLM_BINDING                                                                                                     \
  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int64_t>("width")        \
      .Attr<int64_t>("shared").Attr<int64_t>("run").Attr<int64_t>("blocks")

#ifdef JAXLLM_EMULATED
ffi::Error emulated_impl(ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> out, int64_t width, int64_t shared, int64_t run, int64_t blocks) {
  return gated_impl(nullptr, x, w, out, width, shared, run, blocks);
}
XLA_FFI_DEFINE_HANDLER(gated_handler, emulated_impl, ffi::Ffi::Bind() JAXLLM_BINDING);
#else
XLA_FFI_DEFINE_HANDLER(gated_handler, gated_impl, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>() JAXLLM_BINDING,
                       {ffi::Traits::kCmdBufferCompatible});
#endif

}  // namespace

extern "C" XLA_FFI_Error* jaxllm_gated_matmul(XLA_FFI_CallFrame* frame) { return gated_handler(frame); }
extern "C" int64_t jaxllm_gated_matmul_work() { return 0; }
