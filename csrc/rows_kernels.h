// The row kernels, for the instruction set MOEBERT_ISA with vectors of MOEBERT_VECTOR_BYTES. No include
// guard: one file per instruction set includes it. Nothing here may instantiate a template of the standard
// library that is not inlined: the linker would be free to give this copy, for newer processors, to everyone.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors as arguments: every function that has them is local
#endif

namespace moebert {
namespace MOEBERT_ISA {
namespace {

#include "rows_vectors.h"

constexpr int64_t kRowsPerTask = 32;
constexpr int64_t kRowsPerSum = 64;
constexpr int64_t kElementsWorthAThread = 16384;

template <class Task>
void share_out(int64_t num_tasks, int64_t elements, int num_threads, const Task& task) {
  const int64_t useful = elements / kElementsWorthAThread + 1;
  if (least(useful, least(num_threads, num_tasks)) <= 1) {
    for (int64_t i = 0; i < num_tasks; ++i) task(i);
    return;
  }
  team_run(
      num_tasks, static_cast<int>(least(useful, num_threads)),
      [](const void* data, int64_t i) { (*static_cast<const Task*>(data))(i); }, &task);
}

int64_t elements_of(const Segments& segments, int64_t columns) {
  int64_t rows = 0;
  for (int64_t i = 0; i < segments.count; ++i) rows += segments.list[i].padded;
  return rows * columns;
}

// body(segment, first row, last row)
template <class Body>
void for_rows(const Segments& segments, int64_t columns, int num_threads, const Body& body) {
  const std::vector<RowBlock> blocks = row_blocks(segments, kRowsPerTask);
  const RowBlock* const block = blocks.data();
  share_out(static_cast<int64_t>(blocks.size()), elements_of(segments, columns), num_threads,
            [&](int64_t i) { body(*block[i].segment, block[i].first, block[i].last); });
}

// Memory of one task; std::vector would be instantiated here, see above.
struct Scratch {
  float* const data;

  explicit Scratch(int64_t size)
      : data(static_cast<float*>(malloc(static_cast<size_t>(size) * sizeof(float) + 1))) {
    if (data == nullptr) out_of_memory();
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// body(segment, first row, last row, sums), which adds to `sums`, a row of floats for each block of rows.
// Their totals by expert go to sums_EN unless it is null. How rows are cut depends on their number alone.
template <class T, class Body>
void for_rows_with_sums(const Segments& segments, int64_t columns, T* sums_EN, int num_threads,
                        const Body& body) {
  const std::vector<RowBlock> blocks = row_blocks(segments, kRowsPerSum);
  const RowBlock* const block = blocks.data();
  const auto num_blocks = static_cast<int64_t>(blocks.size());
  const Scratch partial(num_blocks * columns);
  share_out(num_blocks, elements_of(segments, columns), num_threads, [&](int64_t i) {
    float* const sums = partial.data + i * columns;
    memset(sums, 0, static_cast<size_t>(columns) * sizeof(float));
    body(*block[i].segment, block[i].first, block[i].last, sums);
  });
  if (sums_EN == nullptr) return;
  int64_t end = 0;
  for (int64_t s = 0; s < segments.count; ++s) {
    const int64_t begin = end;
    while (end < num_blocks && block[end].segment == segments.list + s) ++end;
    for_lanes(0, columns, [&](int64_t i, auto count) {
      Floats total = {};
      for (int64_t b = begin; b < end; ++b) total += load(partial.data + b * columns + i, count);
      store(sums_EN + segments.list[s].expert * columns + i, total, count);
    });
  }
}

template <class T>
void gather_as(const Segments& segments, const GatherArgs& args, int num_threads) {
  const auto* const src = static_cast<const T*>(args.src);
  auto* const dst = static_cast<T*>(args.dst);
  auto* const sums_EN = static_cast<T*>(args.sums_EN);
  const int32_t* const order_S = segments.order_S;
  const int64_t columns = args.columns;
  const int32_t divisor = args.divisor;
  const auto row_bytes = static_cast<size_t>(columns) * sizeof(T);
  const auto move = [&](const Segment& segment, int64_t row) {
    T* const to = dst + (segment.start + row) * columns;
    if (row >= segment.rows) {
      memset(to, 0, row_bytes);
    } else if (src != nullptr) {
      memcpy(to, src + order_S[segment.begin + row] / divisor * columns, row_bytes);
    }
  };
  if (sums_EN == nullptr) {
    for_rows(segments, columns, num_threads, [&](const Segment& segment, int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) move(segment, row);
    });
    return;
  }
  for_rows_with_sums(segments, columns, sums_EN, num_threads,
                     [&](const Segment& segment, int64_t first, int64_t last, float* sums) {
                       for (int64_t row = first; row < last; ++row) {
                         move(segment, row);
                         const T* const moved = dst + (segment.start + row) * columns;
                         for_lanes(0, columns, [&](int64_t i, auto count) {
                           store(sums + i, load(sums + i, count) + load(moved + i, count), count);
                         });
                       }
                     });
}

template <class T>
void scatter_as(const Segments& segments, const ScatterArgs& args, int num_threads) {
  const auto* const src = static_cast<const T*>(args.src);
  const auto* const bias_EN = static_cast<const T*>(args.bias_EN);
  auto* const dst = static_cast<T*>(args.dst);
  const int32_t* const order_S = segments.order_S;
  const int64_t columns = args.columns;
  const auto row_bytes = static_cast<size_t>(columns) * sizeof(T);
  for_rows(segments, columns, num_threads, [&](const Segment& segment, int64_t first, int64_t last) {
    for (int64_t row = first; row < least(last, segment.rows); ++row) {
      T* const to = dst + order_S[segment.begin + row] * columns;
      const T* const from = src + (segment.start + row) * columns;
      if (args.add) {
        for_lanes(0, columns, [&](int64_t i, auto count) {
          store(to + i, load(to + i, count) + load(from + i, count), count);
        });
        continue;
      }
      if (bias_EN == nullptr) {
        memcpy(to, from, row_bytes);
        continue;
      }
      const T* const bias = bias_EN + segment.expert * columns;
      for_lanes(0, columns, [&](int64_t i, auto count) {
        store(to + i, load(from + i, count) + load(bias + i, count), count);
      });
    }
  });
  if (args.add) return;
  for (int64_t i = args.routed; i < args.slots; ++i) memset(dst + order_S[i] * columns, 0, row_bytes);
}

template <class Act, class T>
void activate_as(const Segments& segments, const ActivationArgs& args, int num_threads) {
  const auto* const h = static_cast<const T*>(args.h);
  const auto* const bias_EN = static_cast<const T*>(args.bias_EN);
  auto* const a = static_cast<T*>(args.a);
  const int64_t columns = args.columns;
  for_rows(segments, columns, num_threads, [&](const Segment& segment, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = (segment.start + row) * columns;
      if (row >= segment.rows) {
        memset(a + at, 0, static_cast<size_t>(columns) * sizeof(T));
        continue;
      }
      for_lanes(0, columns, [&](int64_t i, auto count) {
        Floats slope;
        const Floats x = load(h + at + i, count) + load_or_zero(bias_EN, segment.expert * columns + i, count);
        store(a + at + i, Act::both(x, &slope), count);
      });
    }
  });
}

template <class Act, class T>
void activate_backward_as(const Segments& segments, const ActivationBackwardArgs& args, int num_threads) {
  const auto* const h = static_cast<const T*>(args.forward.h);
  const auto* const bias_EN = static_cast<const T*>(args.forward.bias_EN);
  auto* const a = static_cast<T*>(args.forward.a);
  auto* const da = static_cast<T*>(args.da);
  const int64_t columns = args.forward.columns;
  for_rows_with_sums(segments, columns, static_cast<T*>(args.sums_EN), num_threads,
                     [&](const Segment& segment, int64_t first, int64_t last, float* sums) {
                       for (int64_t row = first; row < last; ++row) {
                         const int64_t at = (segment.start + row) * columns;
                         if (row >= segment.rows) {
                           memset(a + at, 0, static_cast<size_t>(columns) * sizeof(T));
                           memset(da + at, 0, static_cast<size_t>(columns) * sizeof(T));
                           continue;
                         }
                         for_lanes(0, columns, [&](int64_t i, auto count) {
                           Floats slope;
                           const Floats x = load(h + at + i, count) +
                                            load_or_zero(bias_EN, segment.expert * columns + i, count);
                           store(a + at + i, Act::both(x, &slope), count);
                           const Floats dh = load(da + at + i, count) * slope;
                           store(da + at + i, dh, count);
                           store(sums + i, load(sums + i, count) + dh, count);
                         });
                       }
                     });
}

#include "rows_norm.h"

// The choice of instances by dtype and activation.

void gather(const Segments& segments, Dtype dtype, const GatherArgs& args, int num_threads) {
  (dtype == Dtype::kFloat32 ? gather_as<float> : gather_as<Bfloat16>)(segments, args, num_threads);
}

void scatter(const Segments& segments, Dtype dtype, const ScatterArgs& args, int num_threads) {
  (dtype == Dtype::kFloat32 ? scatter_as<float> : scatter_as<Bfloat16>)(segments, args, num_threads);
}

template <class T>
void activate_with(const Segments& segments, const ActivationArgs& args, int num_threads) {
  switch (args.activation) {
    case Activation::kGelu:
      return activate_as<Gelu, T>(segments, args, num_threads);
    case Activation::kGeluTanh:
      return activate_as<GeluTanh, T>(segments, args, num_threads);
    case Activation::kRelu:
      return activate_as<Relu, T>(segments, args, num_threads);
    case Activation::kSilu:
      return activate_as<Silu, T>(segments, args, num_threads);
  }
}

template <class T>
void activate_backward_with(const Segments& segments, const ActivationBackwardArgs& args, int num_threads) {
  switch (args.forward.activation) {
    case Activation::kGelu:
      return activate_backward_as<Gelu, T>(segments, args, num_threads);
    case Activation::kGeluTanh:
      return activate_backward_as<GeluTanh, T>(segments, args, num_threads);
    case Activation::kRelu:
      return activate_backward_as<Relu, T>(segments, args, num_threads);
    case Activation::kSilu:
      return activate_backward_as<Silu, T>(segments, args, num_threads);
  }
}

void activate(const Segments& segments, Dtype dtype, const ActivationArgs& args, int num_threads) {
  (dtype == Dtype::kFloat32 ? activate_with<float> : activate_with<Bfloat16>)(segments, args, num_threads);
}

void activate_backward(const Segments& segments, Dtype dtype, const ActivationBackwardArgs& args,
                       int num_threads) {
  const auto run =
      dtype == Dtype::kFloat32 ? activate_backward_with<float> : activate_backward_with<Bfloat16>;
  run(segments, args, num_threads);
}

// call(zero of z's type, zero of the residual's type)
template <class Call>
void with_types(const NormArgs& args, const Call& call) {
  const bool wide_z = args.z_dtype == Dtype::kFloat32, wide_residual = args.residual_dtype == Dtype::kFloat32;
  if (wide_z && wide_residual) return call(float{}, float{});
  if (wide_z) return call(float{}, Bfloat16{});
  if (wide_residual) return call(Bfloat16{}, float{});
  return call(Bfloat16{}, Bfloat16{});
}

void norm(const NormForwardArgs& args, int num_threads) {
  with_types(args.norm,
             [&](auto z, auto residual) { norm_as<decltype(z), decltype(residual)>(args, num_threads); });
}

void norm_backward(const NormBackwardArgs& args, int num_threads) {
  with_types(args.norm, [&](auto z, auto residual) {
    norm_backward_as<decltype(z), decltype(residual)>(args, num_threads);
  });
}

}  // namespace

#define MOEBERT_TEXT(name) #name
#define MOEBERT_TEXT_OF(name) MOEBERT_TEXT(name)
extern const RowKernels kKernels;
const RowKernels kKernels = {
    MOEBERT_TEXT_OF(MOEBERT_ISA), gather, scatter, activate, activate_backward, norm, norm_backward};
#undef MOEBERT_TEXT_OF
#undef MOEBERT_TEXT

}  // namespace MOEBERT_ISA
}  // namespace moebert

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
