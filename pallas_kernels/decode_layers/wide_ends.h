// What becomes of a tile's sums where devices share layers. Of wide.cu.
#pragma once

namespace {

struct Now : EndOf<Stage> {
  int turn;  // of the two halves of the peers' memory: an exchange is not in the way of the one before, which others may still read
};

// Of all devices: each sends the others what it has.
template <int AT_ONCE>
DEVICE void exchange(const Steps& p, const Now& now, int thread, int place, int count, float4 (&sums)[AT_ONCE]) {
  const int64_t places = int64_t(p.stages[0].units / p.stages[0].splits * 2) * p.groups;  // o's and down's tiles are the same
  auto way = [&](int device, int source, int r) {
    return p.peers.sums[device] + now.turn * p.peers.half + (source * places + place + r) * kComputing + thread;
  };
#pragma unroll
  for (int r = 0; r < AT_ONCE; ++r)
    if (r < count)
      for (int next = 1; next < p.peers.ranks; ++next) put_sums(way((p.peers.rank + next) % p.peers.ranks, p.peers.rank, r), sums[r]);
  add_sources(p.peers.ranks, p.peers.rank, count, sums, [&](int source, int r) { return way(p.peers.rank, source, r); });
}

}  // namespace
