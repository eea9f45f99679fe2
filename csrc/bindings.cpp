// moebert_kernels._native: raw addresses and sizes in, so that the module depends on no torch.
// moebert_kernels/native.py is the only caller; it owns dtypes, devices, contiguity and allocation.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "plan_cpu.h"
#ifdef MOEBERT_WITH_CUDA
#include "plan_cuda.h"
#include "plan_geometry.h"
#endif

namespace py = pybind11;

namespace {

using namespace moebert;

using Address = std::uintptr_t;

// Raised by one whenever a signature or the meaning of an argument below changes.
constexpr int kAbiVersion = 1;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

PlanShape shape_of(int64_t num_layers, int64_t num_slots, int64_t num_experts) {
  require(num_layers >= 0, "num_layers must not be negative");
  require(num_slots >= 0 && num_slots <= INT32_MAX, "num_slots must be in [0, 2^31 - 1]");
  require(num_experts >= 1 && num_experts < INT32_MAX, "num_experts must be in [1, 2^31 - 2]");
  return {num_layers, num_slots, static_cast<int32_t>(num_experts)};
}

IdPointer ids_of(Address ids, int id_bytes) {
  require(id_bytes == 4 || id_bytes == 8, "id_bytes must be 4 or 8");
  return {at<const void>(ids), id_bytes};
}

PlanOutputs outputs_of(Address expert_ids_LS, Address order_LS, Address inverse_LS, Address counts_LE,
                       Address offsets_LE1) {
  return {at<int32_t>(expert_ids_LS), at<int32_t>(order_LS), at<int32_t>(inverse_LS), at<int32_t>(counts_LE),
          at<int32_t>(offsets_LE1)};
}

TableArgs tables_of(Address mask_T, Address tables_LV, int64_t vocab_size) {
  require(vocab_size >= 1 && vocab_size <= INT32_MAX, "vocab_size must be in [1, 2^31 - 1]");
  return {at<const uint8_t>(mask_T), at<const int32_t>(tables_LV), vocab_size};
}

void from_expert_ids_cpu(Address ids_LS, int id_bytes, int64_t num_layers, int64_t num_slots,
                         int64_t num_experts, Address expert_ids_LS, Address order_LS, Address inverse_LS,
                         Address counts_LE, Address offsets_LE1, int num_threads) {
  const PlanShape shape = shape_of(num_layers, num_slots, num_experts);
  const PlanOutputs out = outputs_of(expert_ids_LS, order_LS, inverse_LS, counts_LE, offsets_LE1);
  const IdPointer ids = ids_of(ids_LS, id_bytes);
  const py::gil_scoped_release released;
  plan_from_expert_ids_cpu(ids, shape, out, num_threads);
}

int64_t from_input_ids_cpu(Address input_ids_T, int id_bytes, Address mask_T, Address tables_LV,
                           int64_t vocab_size, int64_t num_layers, int64_t num_slots, int64_t num_experts,
                           Address expert_ids_LS, Address order_LS, Address inverse_LS, Address counts_LE,
                           Address offsets_LE1, int num_threads) {
  const PlanShape shape = shape_of(num_layers, num_slots, num_experts);
  const PlanOutputs out = outputs_of(expert_ids_LS, order_LS, inverse_LS, counts_LE, offsets_LE1);
  const IdPointer ids = ids_of(input_ids_T, id_bytes);
  const TableArgs tables = tables_of(mask_T, tables_LV, vocab_size);
  const py::gil_scoped_release released;
  return plan_from_input_ids_cpu(ids, tables, shape, out, num_threads);
}

#ifdef MOEBERT_WITH_CUDA
PlanShape cuda_shape_of(int64_t num_layers, int64_t num_slots, int64_t num_experts) {
  require(num_layers <= kMaxCudaLayers, "num_layers must be at most 65535 on CUDA");
  require(num_experts <= kMaxCudaExperts, "num_experts must be at most 256 on CUDA");
  return shape_of(num_layers, num_slots, num_experts);
}

int64_t workspace_size_cuda(int64_t num_layers, int64_t num_slots, int64_t num_experts) {
  return plan_cuda_workspace_size(cuda_shape_of(num_layers, num_slots, num_experts));
}

void from_expert_ids_cuda(Address ids_LS, int id_bytes, int64_t num_layers, int64_t num_slots,
                          int64_t num_experts, Address expert_ids_LS, Address order_LS, Address inverse_LS,
                          Address counts_LE, Address offsets_LE1, Address workspace, Address stream) {
  const PlanShape shape = cuda_shape_of(num_layers, num_slots, num_experts);
  const PlanOutputs out = outputs_of(expert_ids_LS, order_LS, inverse_LS, counts_LE, offsets_LE1);
  const IdPointer ids = ids_of(ids_LS, id_bytes);
  const py::gil_scoped_release released;
  plan_from_expert_ids_cuda(ids, shape, out, at<int32_t>(workspace), at<void>(stream));
}

void from_input_ids_cuda(Address input_ids_T, int id_bytes, Address mask_T, Address tables_LV,
                         int64_t vocab_size, int64_t num_layers, int64_t num_slots, int64_t num_experts,
                         Address expert_ids_LS, Address order_LS, Address inverse_LS, Address counts_LE,
                         Address offsets_LE1, Address num_invalid, Address workspace, Address stream) {
  const PlanShape shape = cuda_shape_of(num_layers, num_slots, num_experts);
  const PlanOutputs out = outputs_of(expert_ids_LS, order_LS, inverse_LS, counts_LE, offsets_LE1);
  const IdPointer ids = ids_of(input_ids_T, id_bytes);
  const TableArgs tables = tables_of(mask_T, tables_LV, vocab_size);
  const py::gil_scoped_release released;
  plan_from_input_ids_cuda(ids, tables, shape, out, at<int32_t>(num_invalid), at<int32_t>(workspace),
                           at<void>(stream));
}
#endif

std::string compiler_name() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "g++ " __VERSION__;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "Routing plans in C++ and CUDA; see moebert_kernels/native.py.";
  m.attr("ABI_VERSION") = kAbiVersion;
  m.attr("COMPILER") = compiler_name();
  m.attr("CUDA_VERSION") = MOEBERT_CUDA_VERSION;  // "" where built without nvcc
  m.attr("CUDA_ARCHS") = MOEBERT_CUDA_ARCHS;      // space-separated, such as "sm_80 sm_90a compute_100"
  m.attr("NO_CUDA_REASON") = MOEBERT_NO_CUDA_REASON;

  m.def("from_expert_ids_cpu", &from_expert_ids_cpu);
  m.def("from_input_ids_cpu", &from_input_ids_cpu);
#ifdef MOEBERT_WITH_CUDA
  m.attr("HAS_CUDA") = true;
  m.def("workspace_size_cuda", &workspace_size_cuda);
  m.def("from_expert_ids_cuda", &from_expert_ids_cuda);
  m.def("from_input_ids_cuda", &from_input_ids_cuda);
#else
  m.attr("HAS_CUDA") = false;
#endif
}
