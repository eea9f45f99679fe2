#include "plan_cuda.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "plan_kernels.cuh"

namespace moebert {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("moebert: ") + what + ": " + cudaGetErrorString(error));
  }
}

// The first launch of a kernel loads its module, which a stream capture forbids in its default mode; nothing
// here touches other streams, so the thread's mode is relaxed meanwhile.
class RelaxedCapture {
 public:
  RelaxedCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "capture mode"); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

template <class Source>
void launch(const Source& source, const PlanShape& shape, const PlanOutputs& out, int32_t* num_invalid,
            int32_t* workspace, void* stream_handle) {
  if (shape.num_layers == 0) return;
  const RelaxedCapture relaxed;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const PlanGeometry geometry = plan_geometry(shape);
  const dim3 grid(static_cast<unsigned>(geometry.num_chunks), static_cast<unsigned>(shape.num_layers));
  if (geometry.num_chunks == 1) {
    plan_whole_layer<<<grid, kLoneWarps * kWarpSize, 0, stream>>>(source, shape, out, geometry.chunk_slots,
                                                                  num_invalid);
    check(cudaGetLastError(), "plan_whole_layer");
    return;
  }
  int32_t* const chunk_counts_LBC = workspace;
  int32_t* const chunk_invalid_C =
      workspace + shape.num_layers * (int64_t{shape.num_experts} + 1) * geometry.num_chunks;
  plan_count_chunks<<<grid, kChunkWarps * kWarpSize, 0, stream>>>(
      source, shape, out, geometry.chunk_slots, chunk_counts_LBC, num_invalid ? chunk_invalid_C : nullptr);
  check(cudaGetLastError(), "plan_count_chunks");
  plan_place_chunks<<<grid, kChunkWarps * kWarpSize, 0, stream>>>(
      shape, out, geometry.chunk_slots, chunk_counts_LBC, chunk_invalid_C, num_invalid);
  check(cudaGetLastError(), "plan_place_chunks");
}

}  // namespace

int64_t plan_cuda_workspace_size(const PlanShape& shape) {
  return shape.num_layers == 0 ? 0 : plan_workspace_size(shape);
}

void plan_from_expert_ids_cuda(IdPointer ids_LS, const PlanShape& shape, const PlanOutputs& out,
                               int32_t* workspace, void* stream) {
  if (ids_LS.bytes == 8) {
    launch(ExpertIds<int64_t>{static_cast<const int64_t*>(ids_LS.data), shape.num_slots, shape.num_experts},
           shape, out, nullptr, workspace, stream);
  } else {
    launch(ExpertIds<int32_t>{static_cast<const int32_t*>(ids_LS.data), shape.num_slots, shape.num_experts},
           shape, out, nullptr, workspace, stream);
  }
}

void plan_from_input_ids_cuda(IdPointer input_ids_T, const TableArgs& tables, const PlanShape& shape,
                              const PlanOutputs& out, int32_t* num_invalid, int32_t* workspace,
                              void* stream) {
  if (input_ids_T.bytes == 8) {
    const auto* const ids_T = static_cast<const int64_t*>(input_ids_T.data);
    launch(TokenTables<int64_t>{ids_T, tables, shape.num_experts}, shape, out, num_invalid, workspace,
           stream);
  } else {
    const auto* const ids_T = static_cast<const int32_t*>(input_ids_T.data);
    launch(TokenTables<int32_t>{ids_T, tables, shape.num_experts}, shape, out, num_invalid, workspace,
           stream);
  }
}

}  // namespace moebert
