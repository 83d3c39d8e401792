// Devices of one process that hold shares of the same layers, in rank order, and the memory in which they send each other sums. Host
// code; for the emulator also where their calls wait for each other, as it plays them together. Who includes it loads its own kernels:
// load_kernels().
#pragma once
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

#ifndef JAXLLM_EMULATED
#include "../all_reduce/peers.h"
#endif
#include "xla/ffi/api/ffi.h"

namespace {

struct Group {
  std::vector<int> devices;
  int64_t bytes;
  std::vector<void*> sums;
#ifdef JAXLLM_EMULATED
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<const void*> here;  // by rank: what who waits for the others brings
  int rounds = 0, arrived = 0;
  std::string fault;
#endif
};

std::mutex groups_mutex;
std::vector<Group*> groups;  // never freed: executables refer to them by number

// The group that this device is of, and its rank there; null: it has all of the layers.
Group* find_peers(Peers& p, xla::ffi::Span<const int64_t> numbers, int device, std::string& fault) {
  p.ranks = 1;
  for (int64_t number : numbers) {
    Group& group = *groups[number];
    for (size_t rank = 0; rank < group.devices.size(); ++rank) {
      if (group.devices[rank] != device) continue;
      p.rank = int(rank), p.ranks = int(group.devices.size());
      p.half = group.bytes / 2 / int64_t(sizeof(float4));
      for (size_t r = 0; r < group.sums.size(); ++r) p.sums[r] = static_cast<float4*>(group.sums[r]);
      return &group;
    }
  }
  if (numbers.size() > 0) fault = "device " + std::to_string(device) + " is in none of the groups";
  return nullptr;
}

#ifdef JAXLLM_EMULATED

std::string make(Group& group) {
  for (size_t i = 0; i < group.devices.size(); ++i) group.sums.push_back(std::calloc(1, group.bytes));
  return "";
}

std::mutex playing;  // there is one machine

template <typename Play>
std::string alone(const Play& play) {
  std::lock_guard<std::mutex> lock(playing);
  return play();
}

// play(what all ranks brought), by the last of them that comes.
template <typename Play>
std::string together(Group& group, const Peers& peers, const void* mine, const Play& play) {
  std::unique_lock<std::mutex> lock(group.mutex);
  group.here.resize(group.devices.size());
  group.here[peers.rank] = mine;
  if (++group.arrived == peers.ranks) {
    group.fault = alone([&] { return play(group.here); }), group.arrived = 0, ++group.rounds;
    group.changed.notify_all();
  } else {
    group.changed.wait(lock, [&group, round = group.rounds] { return group.rounds != round; });
  }
  return group.fault;
}

#else

cudaError_t load_kernels();  // what may be left loaded lazily would be loaded while a peer waits: every kernel is loaded before

std::string make(Group& group) {
  cudaError_t error = take_among_peers(group.devices, group.bytes, group.sums);
  if (error == cudaSuccess) error = on_each(group.devices, load_kernels);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

#endif

// -1 and a reason in `why` when it cannot be made.
int number_of_group(const std::vector<int>& wanted, int64_t bytes, char* why, int why_bytes) {
  std::lock_guard<std::mutex> lock(groups_mutex);
  for (size_t number = 0; number < groups.size(); ++number)
    if (groups[number]->devices == wanted && groups[number]->bytes >= bytes) return int(number);
  auto* group = new Group;
  group->devices = wanted, group->bytes = bytes;
  const std::string fault = wanted.size() > size_t(kMostRanks) ? "too many devices" : make(*group);
  if (!fault.empty()) {
    snprintf(why, why_bytes, "%s", fault.c_str());
    return -1;
  }
  groups.push_back(group);
  return int(groups.size()) - 1;
}

}  // namespace
