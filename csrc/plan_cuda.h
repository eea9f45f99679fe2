// Routing plans on the device: at most two kernel launches, no host sync, no allocation.
#pragma once

#include "plan.h"

namespace moebert {

// How many int32 of workspace the calls below need; it may be uninitialised.
int64_t plan_cuda_workspace_size(const PlanShape& shape);

// All pointers are of the current device; `stream` is a cudaStream_t. Throws std::runtime_error where a
// launch fails. Experts: 1 to 256.
void plan_from_expert_ids_cuda(IdPointer ids_LS, const PlanShape& shape, const PlanOutputs& out,
                               int32_t* workspace, void* stream);

// Also writes the number of unmasked token ids outside [0, vocab_size) to the device's *num_invalid.
void plan_from_input_ids_cuda(IdPointer input_ids_T, const TableArgs& tables, const PlanShape& shape,
                              const PlanOutputs& out, int32_t* num_invalid, int32_t* workspace, void* stream);

}  // namespace moebert
