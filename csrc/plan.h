// What the host and the device builders of a routing plan share: shapes, outputs, and where experts come
// from.
//
// Notation: L layers, T tokens, S = T * K slots, E experts, V vocabulary. Slot s = t * K + k.
// A slot's expert is an id in [0, E); every other id means "no expert".
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOEBERT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MOEBERT_HOST_DEVICE inline
#endif

namespace moebert {

struct PlanShape {
  int64_t num_layers;   // L
  int64_t num_slots;    // S, at most 2^31 - 1
  int32_t num_experts;  // E
};

// Row-major, one row per layer, written in full.
struct PlanOutputs {
  int32_t* expert_ids_LS;  // the slot's expert, -1 for none
  int32_t* order_LS;       // slots sorted stably by expert, those without an expert last
  int32_t* inverse_LS;     // inverse[order[i]] == i
  int32_t* counts_LE;      // slots of each expert
  int32_t* offsets_LE1;    // exclusive prefix sums of the counts; the last is the number of routed slots
};

constexpr int32_t kNoExpert = -1;

// Expert ids given by the caller: `read` what a slot holds, `resolve` it to an expert or kNoExpert.
template <class Id>
struct ExpertIds {
  const Id* ids_LS;
  int64_t num_slots;
  int32_t num_experts;

  MOEBERT_HOST_DEVICE Id read(int64_t layer, int64_t slot) const { return ids_LS[layer * num_slots + slot]; }
  MOEBERT_HOST_DEVICE int32_t resolve(int64_t /*layer*/, Id id) const {
    return id >= 0 && id < num_experts ? static_cast<int32_t>(id) : kNoExpert;
  }
};

// The ids of a call before their width is known; `bytes` is 4 or 8.
struct IdPointer {
  const void* data;
  int bytes;
};

// The tables of hash routing (K = 1). A masked token's id is never looked up and never counted as invalid:
// padding may hold anything. Table entries outside [0, E) mean "no expert".
struct TableArgs {
  const uint8_t* mask_T;  // 0 for padding; null for no padding
  const int32_t* tables_LV;
  int64_t vocab_size;  // V, from 1 to 2^31 - 1
};

}  // namespace moebert
