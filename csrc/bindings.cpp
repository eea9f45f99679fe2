// moebert_kernels._native: raw addresses and sizes in, so that the module depends on no torch.
// routing/native_plans.py and kernels/cpu/ call it; they own dtypes, devices, contiguity and allocation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan_cpu.h"
#include "rows_cpu.h"
#ifdef MOEBERT_WITH_CUDA
#include "plan_cuda.h"
#include "plan_geometry.h"
#endif

namespace py = pybind11;

namespace {

using namespace moebert;

using Address = std::uintptr_t;

// Raised by one whenever a signature or the meaning of an argument below changes.
constexpr int kAbiVersion = 3;

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

// Filled up to one of 32 counts in each octave: at most 1 / 32 more.
int64_t bounded_rows(int64_t rows) {
  if (rows <= 32) return rows;
  int64_t step = 1;
  while (step * 64 < rows) step *= 2;
  return (rows + step - 1) / step * step;
}

// Where the rows of a plan lie in a sorted buffer.
class SortedRows {
 public:
  // bounded: whether experts' rows are filled up to bounded_rows. All experts get the same number as long as
  // that adds at most max_fill rows.
  SortedRows(Address offsets_E1, int64_t num_experts, Address order_S, bool bounded, int64_t max_fill)
      : order_S_(at<const int32_t>(order_S)) {
    require(num_experts >= 1, "num_experts must be at least 1");
    const int32_t* const offsets = at<const int32_t>(offsets_E1);
    const auto filled = [&](int64_t rows) { return bounded ? bounded_rows(rows) : rows; };
    int64_t most = 0;
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      const int64_t rows = int64_t{offsets[expert + 1]} - offsets[expert];
      require(rows >= 0, "offsets must not decrease");
      most = std::max(most, rows);
    }
    routed_ = offsets[num_experts];
    if (filled(most) * num_experts - routed_ <= max_fill) batch_ = filled(most);
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      const int64_t begin = offsets[expert], rows = offsets[expert + 1] - begin;
      list_.push_back({expert, begin, rows, total_, batch_ > 0 ? batch_ : filled(rows)});
      total_ += list_.back().padded;
    }
  }

  // Some of one expert's, as if they began at row 0.
  SortedRows(int64_t expert, int64_t begin, int64_t rows, int64_t padded, Address order_S)
      : list_{{expert, begin, rows, 0, padded}},
        order_S_(at<const int32_t>(order_S)),
        total_(padded),
        routed_(rows) {
    require(rows >= 0 && rows <= padded, "rows must lie in [0, padded]");
  }

  int64_t total() const { return total_; }
  int64_t routed() const { return routed_; }
  int64_t batch() const { return batch_; }  // every expert's rows where they are as many; otherwise 0
  const std::vector<Segment>& list() const { return list_; }

  // By expert, how far its rows lie behind where they would be without padding.
  std::vector<int64_t> shifts(int64_t num_experts) const {
    std::vector<int64_t> shift_E(static_cast<size_t>(num_experts));
    for (const Segment& segment : list_) {
      require(segment.expert < num_experts, "a segment's expert does not exist");
      shift_E[static_cast<size_t>(segment.expert)] = segment.start - segment.begin;
    }
    return shift_E;
  }

  Segments view() const { return {list_.data(), static_cast<int64_t>(list_.size()), order_S_}; }

 private:
  std::vector<Segment> list_;
  const int32_t* order_S_;
  int64_t total_ = 0;
  int64_t routed_ = 0;
  int64_t batch_ = 0;
};

Dtype dtype_of(int code) {
  require(code == 0 || code == 1, "dtype must be 0 (float32) or 1 (bfloat16)");
  return static_cast<Dtype>(code);
}

Activation activation_of(int code) {
  require(code >= 0 && code <= 3, "activation must be 0 (gelu), 1 (gelu_tanh), 2 (relu) or 3 (silu)");
  return static_cast<Activation>(code);
}

void gather_rows(const SortedRows& rows, int dtype, Address src, Address dst, Address sums_EN,
                 int64_t columns, int32_t divisor, int num_threads) {
  require(divisor >= 1, "divisor must be at least 1");
  const GatherArgs args = {at<const void>(src), at<void>(dst), at<void>(sums_EN), columns, divisor};
  const py::gil_scoped_release released;
  row_kernels().gather(rows.view(), dtype_of(dtype), args, num_threads);
}

void scatter_rows(const SortedRows& rows, int dtype, Address src, Address bias_EN, Address dst,
                  int64_t columns, int64_t routed, int64_t slots, bool add, int num_threads) {
  const ScatterArgs args = {
      at<const void>(src), at<const void>(bias_EN), at<void>(dst), columns, routed, slots, add};
  const py::gil_scoped_release released;
  row_kernels().scatter(rows.view(), dtype_of(dtype), args, num_threads);
}

void activate_rows(const SortedRows& rows, int dtype, int activation, Address h, Address bias_EN, Address a,
                   int64_t columns, int num_threads) {
  const ActivationArgs args = {activation_of(activation), at<const void>(h), at<const void>(bias_EN),
                               at<void>(a), columns};
  const py::gil_scoped_release released;
  row_kernels().activate(rows.view(), dtype_of(dtype), args, num_threads);
}

void activate_backward_rows(const SortedRows& rows, int dtype, int activation, Address h, Address bias_EN,
                            Address a, Address da, Address sums_EN, int64_t columns, int num_threads) {
  const ActivationBackwardArgs args = {
      {activation_of(activation), at<const void>(h), at<const void>(bias_EN), at<void>(a), columns},
      at<void>(da),
      at<void>(sums_EN)};
  const py::gil_scoped_release released;
  row_kernels().activate_backward(rows.view(), dtype_of(dtype), args, num_threads);
}

// (seed, probability of dropping); probability 0 for no dropout
using DropoutArgs = std::pair<uint64_t, double>;

// The arguments of both directions of the norm, and what they point to.
class Norm {
 public:
  // rows: null for z by slot.
  Norm(const SortedRows* rows, const std::vector<int>& dtypes, const std::vector<Address>& tensors,
       const std::vector<int64_t>& sizes, const DropoutArgs& dropout) {
    require(dtypes.size() == 3 && tensors.size() == 10 && sizes.size() == 4,
            "wrong number of norm arguments");
    const double p = dropout.second;
    require(p >= 0 && p < 1, "dropout must be in [0, 1)");
    if (rows != nullptr) shift_E_ = rows->shifts(sizes[3]);
    args_ = {dtype_of(dtypes[0]),
             dtype_of(dtypes[1]),
             dtype_of(dtypes[2]),
             at<const void>(tensors[0]),
             at<const void>(tensors[1]),
             at<const int32_t>(tensors[2]),
             at<const void>(tensors[3]),
             at<const void>(tensors[4]),
             at<const float>(tensors[5]),
             at<const void>(tensors[8]),
             rows == nullptr ? nullptr : at<const int32_t>(tensors[9]),
             shift_E_.data(),
             at<float>(tensors[6]),
             at<float>(tensors[7]),
             sizes[0],
             sizes[1],
             sizes[2],
             sizes[3],
             dropout.first,
             static_cast<uint32_t>(p * 4294967296.0),
             static_cast<float>(1 / (1 - p))};
  }

  const NormArgs& args() const { return args_; }

 private:
  std::vector<int64_t> shift_E_;
  NormArgs args_;
};

void norm_rows(const SortedRows* rows, const std::vector<int>& dtypes, const std::vector<Address>& tensors,
               const std::vector<int64_t>& sizes, const DropoutArgs& dropout, Address y_TD, double eps,
               int num_threads) {
  const Norm norm(rows, dtypes, tensors, sizes, dropout);
  const py::gil_scoped_release released;
  row_kernels().norm({norm.args(), at<void>(y_TD), eps}, num_threads);
}

void norm_backward_rows(const SortedRows* rows, const std::vector<int>& dtypes,
                        const std::vector<Address>& tensors, const std::vector<int64_t>& sizes,
                        const DropoutArgs& dropout, Address dy_TD, Address dz, Address dresidual_TD,
                        Address dweight_ED, Address dbias_ED, Address dgate_S, int num_threads) {
  const Norm norm(rows, dtypes, tensors, sizes, dropout);
  const NormBackwardArgs args = {
      norm.args(),          at<const void>(dy_TD), at<void>(dz),      at<void>(dresidual_TD),
      at<void>(dweight_ED), at<void>(dbias_ED),    at<float>(dgate_S)};
  const py::gil_scoped_release released;
  row_kernels().norm_backward(args, num_threads);
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
  m.doc() = "Routing plans in C++ and CUDA, row kernels in C++; see moebert_kernels/native.py.";
  m.attr("ABI_VERSION") = kAbiVersion;
  m.attr("COMPILER") = compiler_name();
  m.attr("CUDA_VERSION") = MOEBERT_CUDA_VERSION;  // "" where built without nvcc
  m.attr("CUDA_ARCHS") = MOEBERT_CUDA_ARCHS;      // space-separated, such as "sm_80 sm_90a compute_100"
  m.attr("NO_CUDA_REASON") = MOEBERT_NO_CUDA_REASON;

  m.def("from_expert_ids_cpu", &from_expert_ids_cpu);
  m.def("from_input_ids_cpu", &from_input_ids_cpu);

  m.attr("ROW_KERNELS") = row_kernels().name;
  m.def("bounded_rows", &bounded_rows);
  py::class_<SortedRows>(m, "SortedRows")
      .def(py::init<Address, int64_t, Address, bool, int64_t>())
      .def_static("piece", [](int64_t expert, int64_t begin, int64_t rows, int64_t padded,
                              Address order_S) { return SortedRows(expert, begin, rows, padded, order_S); })
      .def_property_readonly("total", &SortedRows::total)
      .def_property_readonly("routed", &SortedRows::routed)
      .def_property_readonly("batch", &SortedRows::batch)
      .def("segments", [](const SortedRows& rows) {
        std::vector<std::array<int64_t, 4>> segments;  // begin, rows, start, padded
        for (const Segment& s : rows.list()) segments.push_back({s.begin, s.rows, s.start, s.padded});
        return segments;
      });
  m.def("gather_rows", &gather_rows);
  m.def("scatter_rows", &scatter_rows);
  m.def("activate_rows", &activate_rows);
  m.def("activate_backward_rows", &activate_backward_rows);
  m.def("norm_rows", &norm_rows);
  m.def("norm_backward_rows", &norm_backward_rows);
#ifdef MOEBERT_WITH_CUDA
  m.attr("HAS_CUDA") = true;
  m.def("workspace_size_cuda", &workspace_size_cuda);
  m.def("from_expert_ids_cuda", &from_expert_ids_cuda);
  m.def("from_input_ids_cuda", &from_input_ids_cuda);
#else
  m.attr("HAS_CUDA") = false;
#endif
}
