// What lies between the GEMMs of the experts on the host: rows moved into and out of expert order,
// activations, the experts' LayerNorms. Everything is float inside, whatever the tensors hold.
//
// Notation: T tokens, K experts per token, S = T * K slots, D or N columns, E experts. A segment is the rows
// of one expert in a buffer sorted by expert, filled up to `padded` rows.
#pragma once

#include <cstdint>
#include <vector>

namespace moebert {

enum class Dtype { kFloat32 = 0, kBfloat16 = 1 };
enum class Activation { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSilu = 3 };

struct Segment {
  int64_t expert;
  int64_t begin;  // its slots are order[begin] ... order[begin + rows - 1]
  int64_t rows;
  int64_t start;   // of its rows in the sorted buffer
  int64_t padded;  // at least `rows`
};

struct Segments {
  const Segment* list;
  int64_t count;
  const int32_t* order_S;
};

// Rows [first, last) of a segment, counted from its start.
struct RowBlock {
  const Segment* segment;
  int64_t first;
  int64_t last;
};

// The segments' rows, padding included, cut into blocks.
std::vector<RowBlock> row_blocks(const Segments& segments, int64_t rows_per_block);

// dst[start + i] = src[order[begin + i] / divisor], padding 0. sums_EN: the column sums of each expert's rows
// in the dtype of the rows, those of experts without rows included if they are listed; null for none.
struct GatherArgs {
  const void* src;  // or null for rows that are in `dst` already
  void* dst;
  void* sums_EN;
  int64_t columns;
  int32_t divisor;
};

// dst[order[begin + i]] = src[start + i] + bias_EN[expert]; rows order[routed] ... order[slots - 1] of dst
// are 0. Or, with `add`, dst[order[begin + i]] += src[start + i], and nothing else.
struct ScatterArgs {
  const void* src;
  const void* bias_EN;  // or null
  void* dst;
  int64_t columns;
  int64_t routed;
  int64_t slots;
  bool add;
};

// a = act(h + bias_EN[expert]), padding 0. `a` may be h.
struct ActivationArgs {
  Activation activation;
  const void* h;
  const void* bias_EN;  // or null
  void* a;
  int64_t columns;
};

// Also da *= act'(h + bias), padding 0, and its column sums per expert.
struct ActivationBackwardArgs {
  ActivationArgs forward;
  void* da;
  void* sums_EN;  // or null
};

// y_t = sum_k g_tk LayerNorm_e(keep * z_tk + residual_t) over the slots with an expert; the residual itself
// where there is none. Dropout zeroes an element where its hash of (seed, slot, column) falls below
// drop_below, and scales the others. z, and dz in backward, may lie in rows sorted by expert, the slot in row
// inverse[slot] + shift[expert], their bias not yet added; z_tk is with it.
struct NormArgs {
  Dtype z_dtype;
  Dtype residual_dtype;
  Dtype parameter_dtype;
  const void* z;
  const void* residual_TD;
  const int32_t* expert_ids_S;
  const void* weight_ED;
  const void* bias_ED;
  const float* gate_S;       // or null for 1 / K
  const void* z_bias_ED;     // or null
  const int32_t* inverse_S;  // or null for z by slot
  const int64_t* shift_E;    // with inverse_S
  float* mean_S;             // it and rstd_S or null, in forward alone
  float* rstd_S;
  int64_t tokens;
  int64_t top_k;
  int64_t columns;
  int64_t experts;
  uint64_t seed;
  uint32_t drop_below;
  float keep_scale;
};

struct NormForwardArgs {
  NormArgs norm;
  void* y_TD;
  double eps;
};

struct NormBackwardArgs {
  NormArgs norm;
  const void* dy_TD;
  void* dz;
  void* dresidual_TD;
  void* dweight_ED;
  void* dbias_ED;
  float* dgate_S;  // or null
};

// One set of the kernels, compiled for one instruction set. Results are the same for every num_threads.
struct RowKernels {
  const char* name;
  void (*gather)(const Segments&, Dtype, const GatherArgs&, int num_threads);
  void (*scatter)(const Segments&, Dtype, const ScatterArgs&, int num_threads);
  void (*activate)(const Segments&, Dtype, const ActivationArgs&, int num_threads);
  void (*activate_backward)(const Segments&, Dtype, const ActivationBackwardArgs&, int num_threads);
  void (*norm)(const NormForwardArgs&, int num_threads);
  void (*norm_backward)(const NormBackwardArgs&, int num_threads);
};

// The best set this processor runs.
const RowKernels& row_kernels();

// Every set it runs, for tests.
std::vector<const RowKernels*> all_row_kernels();

}  // namespace moebert
