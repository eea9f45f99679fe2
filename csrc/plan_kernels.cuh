// The device kernels of plan_cuda.cu. Apart from the CUDA built-ins they use this is plain C++: the tests
// also compile it for the host and run every thread of a block there (tests/native/cuda_on_host.h).
//
// Stability without atomics: each warp owns a run of consecutive slots and a row of counters, one per bin. It
// counts its run, the rows are turned into places by prefix sums (over warps, chunks and bins, in that
// order), and the warp then walks its run again, handing out places in slot order. Nothing depends on timing.
#pragma once

#include "plan_geometry.h"

namespace moebert {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kStepsInFlight = 4;  // steps of 32 slots whose loads a warp issues together
constexpr int kNoBin = -1;         // lanes past the end of the run

template <int kWarps>
struct BlockCounters {
  int32_t of_warp_WB[kWarps][kMaxBins];  // counts, then places relative to first_B
  int32_t total_B[kMaxBins];             // slots of the bin in this chunk, or in the layer
  int32_t first_B[kMaxBins];             // the place of this chunk's first slot of the bin
  int32_t invalid_W[kWarps];
};

// A token id outside the tables: counted, then treated as kNoExpert.
constexpr int32_t kInvalidToken = -2;

// A source of experts has two steps, so that many reads can be issued before the first is needed: `read` what
// the slot holds, then `resolve` it to an expert, kNoExpert or kInvalidToken. Neither branches on data.

template <class Id>
struct TokenTables {
  const Id* input_ids_T;
  TableArgs tables;
  int32_t num_experts;

  struct Token {
    Id id;
    bool masked;
  };

  MOEBERT_HOST_DEVICE Token read(int64_t /*layer*/, int64_t slot) const {
    return {input_ids_T[slot], tables.mask_T != nullptr && tables.mask_T[slot] == 0};
  }
  MOEBERT_HOST_DEVICE int32_t resolve(int64_t layer, Token token) const {
    const bool known = !token.masked && token.id >= 0 && token.id < tables.vocab_size;
    const int32_t expert = tables.tables_LV[layer * tables.vocab_size + (known ? token.id : 0)];
    if (!known) return token.masked ? kNoExpert : kInvalidToken;
    return expert >= 0 && expert < num_experts ? expert : kNoExpert;
  }
};

MOEBERT_HOST_DEVICE int bin_of(int32_t expert, int32_t num_experts) {
  return expert < 0 ? num_experts : expert;
}

// Adds the warp's 32 bins to its counters and returns, per lane, the bin's counter as it was plus the lane's
// rank among the lanes of the same bin.
__device__ __forceinline__ int32_t take_places(int32_t* counters_B, int bin, int lane) {
  const unsigned peers = __match_any_sync(kFullWarp, bin);
  const int rank = __popc(peers & ((1u << lane) - 1));
  const int32_t before = bin == kNoBin ? 0 : counters_B[bin];
  __syncwarp();
  if (rank == 0 && bin != kNoBin) counters_B[bin] = before + __popc(peers);
  __syncwarp();
  return before + rank;
}

// Counts the warp's run into its row of counters and writes the normalised expert ids, unless expert_ids_S is
// null. Returns the run's invalid tokens.
template <class Source>
__device__ int32_t count_run(const Source& source, int64_t layer, SlotRange run, int32_t num_experts,
                             int32_t* expert_ids_S, int32_t* counters_B) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int bin = lane; bin <= num_experts; bin += kWarpSize) counters_B[bin] = 0;
  __syncwarp();
  int32_t num_invalid = 0;
  for (int64_t base = run.begin; base < run.end; base += kStepsInFlight * kWarpSize) {
    // Lanes past the end read the last slot again, to keep the reads free of branches.
    decltype(source.read(layer, 0)) raw[kStepsInFlight];
    int32_t expert[kStepsInFlight];
#pragma unroll
    for (int i = 0; i < kStepsInFlight; ++i) {
      raw[i] = source.read(layer, clamp_to(base + i * kWarpSize + lane, run.end - 1));
    }
#pragma unroll
    for (int i = 0; i < kStepsInFlight; ++i) expert[i] = source.resolve(layer, raw[i]);
#pragma unroll
    for (int i = 0; i < kStepsInFlight; ++i) {
      if (base + i * kWarpSize >= run.end) break;
      const int64_t slot = base + i * kWarpSize + lane;
      const bool inside = slot < run.end;
      if (inside && expert_ids_S != nullptr) expert_ids_S[slot] = expert[i] < 0 ? kNoExpert : expert[i];
      num_invalid += __popc(__ballot_sync(kFullWarp, inside && expert[i] == kInvalidToken));
      take_places(counters_B, inside ? bin_of(expert[i], num_experts) : kNoBin, lane);
    }
  }
  return num_invalid;
}

// Turns each bin's counts into exclusive sums over the block's warps, and their total. Whole block; syncs
// after.
template <int kWarps>
__device__ void scan_over_warps(BlockCounters<kWarps>& counters, int num_bins) {
  for (int bin = static_cast<int>(threadIdx.x); bin < num_bins; bin += kWarps * kWarpSize) {
    int32_t sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const int32_t count = counters.of_warp_WB[warp][bin];
      counters.of_warp_WB[warp][bin] = sum;
      sum += count;
    }
    counters.total_B[bin] = sum;
  }
  __syncthreads();
}

// Exclusive sums of totals over the bins, added to first. One warp.
__device__ __forceinline__ void add_bin_offsets(const int32_t* total_B, int32_t* first_B, int num_bins,
                                                int lane) {
  constexpr int kBinsPerLane = (kMaxBins + kWarpSize - 1) / kWarpSize;
  int32_t sum = 0;
  for (int i = 0; i < kBinsPerLane; ++i) {
    const int bin = lane * kBinsPerLane + i;
    if (bin < num_bins) sum += total_B[bin];
  }
  int32_t running = sum;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int32_t below = __shfl_up_sync(kFullWarp, running, static_cast<unsigned>(distance));
    if (lane >= distance) running += below;
  }
  running -= sum;
  for (int i = 0; i < kBinsPerLane; ++i) {
    const int bin = lane * kBinsPerLane + i;
    if (bin >= num_bins) break;
    first_B[bin] += running;
    running += total_B[bin];
  }
}

// offset_B: the place of the layer's first slot of each bin. Whole block.
__device__ __forceinline__ void write_counts(const PlanOutputs& out, int64_t layer, int32_t num_experts,
                                             const int32_t* total_B, const int32_t* offset_B) {
  for (int bin = static_cast<int>(threadIdx.x); bin <= num_experts; bin += static_cast<int>(blockDim.x)) {
    out.offsets_LE1[layer * (int64_t{num_experts} + 1) + bin] = offset_B[bin];
    if (bin < num_experts) out.counts_LE[layer * num_experts + bin] = total_B[bin];
  }
}

// Walks the warp's run again and writes both permutations. Lanes read ids that their own warp wrote in
// count_run.
__device__ __forceinline__ void place_run(SlotRange run, int32_t num_experts, const int32_t* first_B,
                                          const int32_t* expert_ids_S, int32_t* order_S, int32_t* inverse_S,
                                          int32_t* counters_B) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int64_t base = run.begin; base < run.end; base += kStepsInFlight * kWarpSize) {
    int bin[kStepsInFlight];
#pragma unroll
    for (int i = 0; i < kStepsInFlight; ++i) {
      const int64_t slot = base + i * kWarpSize + lane;
      const int32_t expert = expert_ids_S[clamp_to(slot, run.end - 1)];
      bin[i] = slot < run.end ? bin_of(expert, num_experts) : kNoBin;
    }
#pragma unroll
    for (int i = 0; i < kStepsInFlight; ++i) {
      if (base + i * kWarpSize >= run.end) break;
      const int64_t slot = base + i * kWarpSize + lane;
      const int32_t relative = take_places(counters_B, bin[i], lane);
      if (bin[i] == kNoBin) continue;
      const int32_t place = first_B[bin[i]] + relative;
      order_S[place] = static_cast<int32_t>(slot);
      inverse_S[slot] = place;
    }
  }
}

// The chunk's sum of the warps' invalid tokens, to *num_invalid. Whole block; only the first layer counts
// them.
template <int kWarps>
__device__ void write_invalid(BlockCounters<kWarps>& counters, int32_t of_this_warp, int32_t* num_invalid) {
  if (threadIdx.x % kWarpSize == 0) counters.invalid_W[threadIdx.x / kWarpSize] = of_this_warp;
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += counters.invalid_W[warp];
    *num_invalid = sum;
  }
}

// One launch: grid (1, L), kLoneWarps warps. num_invalid may be null.
template <class Source>
__global__ void __launch_bounds__(kLoneWarps* kWarpSize)
    plan_whole_layer(Source source, PlanShape shape, PlanOutputs out, int64_t chunk_slots,
                     int32_t* num_invalid) {
  __shared__ BlockCounters<kLoneWarps> counters;
  const int64_t layer = blockIdx.y;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int num_bins = shape.num_experts + 1;
  const int64_t row = layer * shape.num_slots;
  const SlotRange run = warp_slots(shape.num_slots, chunk_slots, 0, warp, kLoneWarps);

  const int32_t invalid =
      count_run(source, layer, run, shape.num_experts, out.expert_ids_LS + row, counters.of_warp_WB[warp]);
  __syncthreads();
  if (num_invalid != nullptr && layer == 0) write_invalid(counters, invalid, num_invalid);

  for (int bin = static_cast<int>(threadIdx.x); bin < num_bins; bin += kLoneWarps * kWarpSize) {
    counters.first_B[bin] = 0;
  }
  scan_over_warps(counters, num_bins);
  if (warp == 0) {
    add_bin_offsets(counters.total_B, counters.first_B, num_bins, static_cast<int>(threadIdx.x) % kWarpSize);
  }
  __syncthreads();
  write_counts(out, layer, shape.num_experts, counters.total_B, counters.first_B);
  place_run(run, shape.num_experts, counters.first_B, out.expert_ids_LS + row, out.order_LS + row,
            out.inverse_LS + row, counters.of_warp_WB[warp]);
}

// First of two launches: grid (C, L), kChunkWarps warps. Writes expert ids, chunk_counts_LBC, and, where
// chunk_invalid_C is not null, the chunks' invalid tokens.
template <class Source>
__global__ void __launch_bounds__(kChunkWarps* kWarpSize)
    plan_count_chunks(Source source, PlanShape shape, PlanOutputs out, int64_t chunk_slots,
                      int32_t* chunk_counts_LBC, int32_t* chunk_invalid_C) {
  __shared__ BlockCounters<kChunkWarps> counters;
  const int64_t layer = blockIdx.y;
  const int64_t chunk = blockIdx.x;
  const int64_t num_chunks = gridDim.x;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int num_bins = shape.num_experts + 1;
  const SlotRange run = warp_slots(shape.num_slots, chunk_slots, chunk, warp, kChunkWarps);

  const int32_t invalid = count_run(source, layer, run, shape.num_experts,
                                    out.expert_ids_LS + layer * shape.num_slots, counters.of_warp_WB[warp]);
  __syncthreads();
  if (chunk_invalid_C != nullptr && layer == 0) write_invalid(counters, invalid, chunk_invalid_C + chunk);

  for (int bin = static_cast<int>(threadIdx.x); bin < num_bins; bin += kChunkWarps * kWarpSize) {
    int32_t sum = 0;
#pragma unroll
    for (int w = 0; w < kChunkWarps; ++w) sum += counters.of_warp_WB[w][bin];
    chunk_counts_LBC[(layer * num_bins + bin) * num_chunks + chunk] = sum;
  }
}

// The sums of values_C over all chunks and over the chunks before `chunk`, in every lane. One warp.
struct ChunkSums {
  int32_t all;
  int32_t before;
};
__device__ __forceinline__ ChunkSums sum_chunks(const int32_t* values_C, int64_t num_chunks, int64_t chunk,
                                                int lane) {
  ChunkSums sums = {0, 0};
  for (int64_t c = lane; c < num_chunks; c += kWarpSize) {
    const int32_t value = values_C[c];
    sums.all += value;
    if (c < chunk) sums.before += value;
  }
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    sums.all += __shfl_xor_sync(kFullWarp, sums.all, distance);
    sums.before += __shfl_xor_sync(kFullWarp, sums.before, distance);
  }
  return sums;
}

// Second of two launches: grid (C, L), kChunkWarps warps. Reads what plan_count_chunks wrote.
static __global__ void __launch_bounds__(kChunkWarps* kWarpSize)
    plan_place_chunks(PlanShape shape, PlanOutputs out, int64_t chunk_slots, const int32_t* chunk_counts_LBC,
                      const int32_t* chunk_invalid_C, int32_t* num_invalid) {
  __shared__ BlockCounters<kChunkWarps> counters;
  __shared__ int32_t offset_B[kMaxBins];
  const int64_t layer = blockIdx.y;
  const int64_t chunk = blockIdx.x;
  const int64_t num_chunks = gridDim.x;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int num_bins = shape.num_experts + 1;
  const int64_t row = layer * shape.num_slots;
  const SlotRange run = warp_slots(shape.num_slots, chunk_slots, chunk, warp, kChunkWarps);
  const ExpertIds<int32_t> counted = {out.expert_ids_LS, shape.num_slots, shape.num_experts};

  count_run(counted, layer, run, shape.num_experts, nullptr, counters.of_warp_WB[warp]);
  __syncthreads();
  scan_over_warps(counters, num_bins);

  // From here total_B is the layer's, no longer the chunk's.
  for (int bin = warp; bin < num_bins; bin += kChunkWarps) {
    const int32_t* const counts_C = chunk_counts_LBC + (layer * num_bins + bin) * num_chunks;
    const ChunkSums sums = sum_chunks(counts_C, num_chunks, chunk, lane);
    if (lane == 0) {
      counters.total_B[bin] = sums.all;
      counters.first_B[bin] = sums.before;
      offset_B[bin] = 0;
    }
  }
  __syncthreads();
  if (warp == 0) {
    add_bin_offsets(counters.total_B, counters.first_B, num_bins, lane);
  } else if (warp == 1 && chunk == 0) {
    add_bin_offsets(counters.total_B, offset_B, num_bins, lane);
  } else if (warp == 2 && chunk == 0 && layer == 0 && num_invalid != nullptr) {
    const ChunkSums sums = sum_chunks(chunk_invalid_C, num_chunks, 0, lane);
    if (lane == 0) *num_invalid = sums.all;
  }
  __syncthreads();
  if (chunk == 0) write_counts(out, layer, shape.num_experts, counters.total_B, offset_B);
  place_run(run, shape.num_experts, counters.first_B, out.expert_ids_LS + row, out.order_LS + row,
            out.inverse_LS + row, counters.of_warp_WB[warp]);
}

}  // namespace moebert
