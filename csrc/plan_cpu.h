// Routing plans on the host: a stable counting sort in two passes, over all layers at once.
#pragma once

#include "plan.h"

namespace moebert {

// Bitwise the same for every num_threads >= 1. Uses fewer threads where the work does not pay for them.
void plan_from_expert_ids_cpu(IdPointer ids_LS, const PlanShape& shape, const PlanOutputs& out,
                              int num_threads);

// Returns the number of unmasked token ids outside [0, vocab_size).
int64_t plan_from_input_ids_cpu(IdPointer input_ids_T, const TableArgs& tables, const PlanShape& shape,
                                const PlanOutputs& out, int num_threads);

}  // namespace moebert
