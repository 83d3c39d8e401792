// Memory on several devices of one process, each of which may write to the others'. Host code.
#pragma once
#include <cuda_runtime.h>

#include <vector>

namespace {

// use() with each device current, until there is an error; then the one that was current before.
template <typename Use>
cudaError_t on_each(const std::vector<int>& devices, Use use) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  for (int device : devices) {
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error == cudaSuccess) error = use();
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
  }
  cudaSetDevice(before);
  return error;
}

// `bytes` of zeros on each device, in their order behind what `taken` holds.
inline cudaError_t take_among_peers(const std::vector<int>& devices, size_t bytes, std::vector<void*>& taken) {
  return on_each(devices, [&] {
    cudaError_t error = cudaSuccess;
    int own = 0;
    cudaGetDevice(&own);
    for (int peer : devices) {
      if (error != cudaSuccess || peer == own) continue;
      error = cudaDeviceEnablePeerAccess(peer, 0);
      if (error == cudaErrorPeerAccessAlreadyEnabled) error = cudaSuccess;
      cudaGetLastError();  // what was enabled before is no error of a later call
    }
    void* memory = nullptr;
    if (error == cudaSuccess) error = cudaMalloc(&memory, bytes);
    if (error == cudaSuccess) error = cudaMemset(memory, 0, bytes);
    if (error == cudaSuccess) taken.push_back(memory);
    return error;
  });
}

}  // namespace
