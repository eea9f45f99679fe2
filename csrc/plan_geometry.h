// How the device builder cuts the slots of a layer: into chunks, one per block, and those into one run per
// warp. A function of shapes alone, so that a captured graph and a changed routing agree on every launch.
#pragma once

#include "plan.h"

namespace moebert {

constexpr int kWarpSize = 32;
constexpr int kMaxCudaExperts = 256;
constexpr int kMaxBins = kMaxCudaExperts + 1;  // the last bin holds the slots without an expert
constexpr int kMaxCudaLayers = 65535;          // one row of the grid each

constexpr int kLoneWarps = 32;   // warps of the one block that does a whole layer
constexpr int kChunkWarps = 16;  // warps of a block that does one of many chunks

// Up to here one block per layer needs 8 steps per warp, less than a second launch costs.
constexpr int64_t kMaxLoneSlots = 8192;
constexpr int64_t kMinChunkSlots = 2048;
// Enough blocks to fill a chip a few times over; more only lengthen the sums over chunks.
constexpr int64_t kTargetBlocks = 1024;
constexpr int64_t kMaxChunks = 512;
// Every block reads the counts of all of its layer's chunks: keep them to 64 KiB.
constexpr int64_t kMaxChunkCounts = 16384;

struct PlanGeometry {
  int64_t num_chunks;   // blocks per layer
  int64_t chunk_slots;  // a multiple of the block's warps * 32
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// num_chunks == 1 means one launch with kLoneWarps per block; otherwise two launches with kChunkWarps.
inline PlanGeometry plan_geometry(const PlanShape& shape) {
  const auto rounded = [&](int64_t num_chunks, int warps) {
    const int64_t unit = int64_t{warps} * kWarpSize;
    return ceil_div(ceil_div(shape.num_slots, num_chunks), unit) * unit;
  };
  if (shape.num_slots <= kMaxLoneSlots) return {1, rounded(1, kLoneWarps)};
  int64_t num_chunks = ceil_div(shape.num_slots, kMinChunkSlots);
  const auto at_most = [&](int64_t limit) { num_chunks = num_chunks < limit ? num_chunks : limit; };
  at_most(kMaxChunks);
  at_most(ceil_div(kTargetBlocks, shape.num_layers));
  at_most(kMaxChunkCounts / (shape.num_experts + 1));
  if (num_chunks < 2) num_chunks = 2;
  return {num_chunks, rounded(num_chunks, kChunkWarps)};
}

// Workspace of the two launches: the chunks' counts [L, E + 1, C], then their invalid tokens [C].
inline int64_t plan_workspace_size(const PlanShape& shape) {
  const int64_t num_chunks = plan_geometry(shape).num_chunks;
  if (num_chunks == 1) return 0;
  return (shape.num_layers * (int64_t{shape.num_experts} + 1) + 1) * num_chunks;
}

struct SlotRange {
  int64_t begin;
  int64_t end;
};

MOEBERT_HOST_DEVICE int64_t clamp_to(int64_t value, int64_t limit) { return value < limit ? value : limit; }

// The slots of one warp; consecutive warps of consecutive chunks hold consecutive slots.
MOEBERT_HOST_DEVICE SlotRange warp_slots(int64_t num_slots, int64_t chunk_slots, int64_t chunk, int warp,
                                         int num_warps) {
  const int64_t run = chunk_slots / num_warps;
  const int64_t begin = chunk * chunk_slots + warp * run;
  return {clamp_to(begin, num_slots), clamp_to(begin + run, num_slots)};
}

}  // namespace moebert
