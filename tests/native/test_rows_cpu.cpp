// Every set of row kernels against plain loops in double, for every thread count alike.
// With the argument "threaded" the cases alone that several threads work on: for the thread sanitizer.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/rows_cpu.h"

namespace {

using namespace moebert;

constexpr int kThreadCounts[] = {1, 2, 5};

void require(bool holds, const char* kernels, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "FAILED: %s (%s)\n", what, kernels);
  std::abort();
}

// Numbers in memory of exactly the right size, so that the address sanitizer sees a step too far.
struct Numbers {
  Dtype dtype;
  std::vector<float> wide;
  std::vector<uint16_t> half;

  Numbers(Dtype type, size_t size) : dtype(type) {
    if (type == Dtype::kFloat32) {
      wide.assign(size, NAN);
    } else {
      half.assign(size, 0x7fc0);
    }
  }
  Numbers(Dtype type, size_t size, std::mt19937& random) : Numbers(type, size) {
    std::uniform_real_distribution<float> draw(-3, 3);
    for (size_t i = 0; i < size; ++i) set(i, draw(random));
  }
  const void* data() const {
    return dtype == Dtype::kFloat32 ? static_cast<const void*>(wide.data()) : half.data();
  }
  void* data() { return dtype == Dtype::kFloat32 ? static_cast<void*>(wide.data()) : half.data(); }
  void set(size_t i, float value) {
    if (dtype == Dtype::kFloat32) {
      wide[i] = value;
      return;
    }
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    half[i] = static_cast<uint16_t>(bits >> 16);
  }
  double get(size_t i) const {
    if (dtype == Dtype::kFloat32) return wide[i];
    const uint32_t bits = static_cast<uint32_t>(half[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  bool near(size_t i, double expected, double scale = 1) const {
    const double tolerance = dtype == Dtype::kFloat32 ? 1e-5 : 1e-2;
    return std::fabs(get(i) - expected) <= tolerance * (scale + std::fabs(expected));
  }
  bool operator==(const Numbers& other) const { return wide == other.wide && half == other.half; }
};

// Three experts, the second without rows, two slots without an expert; every segment padded by two rows.
struct Sorted {
  std::vector<int32_t> order;
  std::vector<Segment> list;
  int64_t routed;

  explicit Sorted(int64_t slots) : order(static_cast<size_t>(slots)), routed(slots - 2) {
    for (int64_t i = 0; i < slots; ++i) order[static_cast<size_t>(i)] = static_cast<int32_t>(slots - 1 - i);
    const int64_t first = routed / 3;
    list = {{0, 0, first, 0, first + 2},
            {1, first, 0, first + 2, 2},
            {2, first, routed - first, first + 4, routed - first + 2}};
  }
  Segments view() const { return {list.data(), static_cast<int64_t>(list.size()), order.data()}; }
  size_t padded() const { return static_cast<size_t>(routed) + 6; }
};

void check_rows(const RowKernels& kernels, Dtype dtype, int64_t slots, int64_t columns,
                std::mt19937& random) {
  const Sorted sorted(slots);
  const auto N = static_cast<size_t>(columns);
  Numbers src(dtype, static_cast<size_t>(slots) * N, random), bias(dtype, 3 * N, random);
  Numbers first_sums(dtype, 3 * N), first_back(dtype, static_cast<size_t>(slots) * N);
  for (const int threads : kThreadCounts) {
    Numbers rows(dtype, sorted.padded() * N), plain_rows(rows), sums(dtype, 3 * N), back(first_back);
    kernels.gather(sorted.view(), dtype, {src.data(), rows.data(), sums.data(), columns, 1}, threads);
    kernels.gather(sorted.view(), dtype, {src.data(), plain_rows.data(), nullptr, columns, 1}, threads);
    require(rows == plain_rows, kernels.name, "gather with and without sums");
    Numbers sums_in_place(dtype, 3 * N);
    kernels.gather(sorted.view(), dtype, {nullptr, plain_rows.data(), sums_in_place.data(), columns, 1},
                   threads);
    require(rows == plain_rows && sums == sums_in_place, kernels.name, "sums of rows in place");
    for (const Segment& segment : sorted.list) {
      std::vector<double> expected(N, 0.0);
      for (int64_t row = 0; row < segment.padded; ++row) {
        for (size_t c = 0; c < N; ++c) {
          const size_t at = static_cast<size_t>(segment.start + row) * N + c;
          if (row >= segment.rows) {
            require(rows.get(at) == 0, kernels.name, "gather's padding");
            continue;
          }
          const auto slot = static_cast<size_t>(sorted.order[static_cast<size_t>(segment.begin + row)]);
          require(rows.get(at) == src.get(slot * N + c), kernels.name, "gather");
          expected[c] += rows.get(at);
        }
      }
      for (size_t c = 0; c < N; ++c)
        require(sums.near(static_cast<size_t>(segment.expert) * N + c, expected[c], 20), kernels.name,
                "sums");
    }
    kernels.scatter(sorted.view(), dtype,
                    {rows.data(), bias.data(), back.data(), columns, sorted.routed, slots, false}, threads);
    for (const Segment& segment : sorted.list)
      for (int64_t row = 0; row < segment.rows; ++row)
        for (size_t c = 0; c < N; ++c) {
          const auto slot = static_cast<size_t>(sorted.order[static_cast<size_t>(segment.begin + row)]);
          const double expected =
              src.get(slot * N + c) + bias.get(static_cast<size_t>(segment.expert) * N + c);
          require(back.near(slot * N + c, expected), kernels.name, "scatter");
        }
    for (int64_t i = sorted.routed; i < slots; ++i)
      for (size_t c = 0; c < N; ++c)
        require(back.get(static_cast<size_t>(sorted.order[static_cast<size_t>(i)]) * N + c) == 0,
                kernels.name, "scatter of no expert");
    Numbers twice(src);
    kernels.scatter(sorted.view(), dtype,
                    {rows.data(), nullptr, twice.data(), columns, sorted.routed, slots, true}, threads);
    for (int64_t i = 0; i < slots; ++i)
      for (size_t c = 0; c < N; ++c) {
        const size_t at = static_cast<size_t>(sorted.order[static_cast<size_t>(i)]) * N + c;
        require(twice.near(at, (i < sorted.routed ? 2 : 1) * src.get(at)), kernels.name, "scatter that adds");
      }
    if (threads == 1) {
      first_sums = sums;
    } else {
      require(sums == first_sums, kernels.name, "sums by thread count");
    }
  }
}

double act(Activation activation, double x) {
  switch (activation) {
    case Activation::kGelu:
      return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return x * 0.5 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu:
      return x > 0 ? x : 0;
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
  }
  return NAN;
}

void check_activations(const RowKernels& kernels, Dtype dtype, int64_t slots, int64_t columns,
                       std::mt19937& random) {
  const Sorted sorted(slots);
  const auto N = static_cast<size_t>(columns);
  for (int code = 0; code < 4; ++code) {
    const auto activation = static_cast<Activation>(code);
    Numbers h(dtype, sorted.padded() * N, random), bias(dtype, 3 * N, random),
        da(dtype, sorted.padded() * N, random);
    for (const int threads : kThreadCounts) {
      Numbers a(dtype, sorted.padded() * N), again(a), dh(da), sums(dtype, 3 * N);
      const ActivationArgs args = {activation, h.data(), bias.data(), a.data(), columns};
      kernels.activate(sorted.view(), dtype, args, threads);
      kernels.activate_backward(
          sorted.view(), dtype,
          {{activation, h.data(), bias.data(), again.data(), columns}, dh.data(), sums.data()}, threads);
      require(a == again, kernels.name, "the activation in backward");
      for (const Segment& segment : sorted.list)
        for (int64_t row = 0; row < segment.padded; ++row)
          for (size_t c = 0; c < N; ++c) {
            const size_t at = static_cast<size_t>(segment.start + row) * N + c;
            if (row >= segment.rows) {
              require(a.get(at) == 0 && dh.get(at) == 0, kernels.name, "the activation's padding");
              continue;
            }
            const double x = h.get(at) + bias.get(static_cast<size_t>(segment.expert) * N + c);
            require(a.near(at, act(activation, x)), kernels.name, "activation");
            if (activation == Activation::kRelu && std::fabs(x) < 1e-5) continue;  // no slope there
            const double slope = (act(activation, x + 1e-6) - act(activation, x - 1e-6)) / 2e-6;
            require(dh.near(at, da.get(at) * slope), kernels.name, "activation's derivative");
          }
    }
  }
}

// z in rows sorted by expert, with two rows of padding between experts and its bias not yet added, must do
// what `plain` found: y, dz, dresidual, dweight, dbias.
void check_sorted_norm(const RowKernels& kernels, NormArgs args, const std::vector<Numbers>& plain,
                       const Numbers& dy) {
  const auto S = static_cast<size_t>(args.tokens * args.top_k), N = static_cast<size_t>(args.columns);
  const auto experts = static_cast<size_t>(args.experts);
  Numbers z(args.z_dtype, S * N), bias(args.z_dtype, experts * N);
  std::memcpy(z.data(), args.z, S * N * (args.z_dtype == Dtype::kFloat32 ? 4 : 2));
  for (size_t i = 0; i < experts * N; ++i) bias.set(i, 0.5);
  std::vector<int32_t> inverse(S);
  std::vector<int64_t> shift_E;
  int32_t place = 0;
  for (int32_t expert = 0; expert < args.experts; ++expert) {
    shift_E.push_back(2 * expert);
    for (size_t s = 0; s < S; ++s)
      if (args.expert_ids_S[s] == expert) inverse[s] = place++;
  }
  Numbers sorted(args.z_dtype, (S + 2 * experts) * N), dz(sorted);
  for (size_t s = 0; s < S; ++s) {
    const int32_t expert = args.expert_ids_S[s];
    if (expert < 0) continue;
    const size_t row = static_cast<size_t>(inverse[s] + shift_E[static_cast<size_t>(expert)]);
    for (size_t c = 0; c < N; ++c) sorted.set(row * N + c, static_cast<float>(z.get(s * N + c)) - 0.5f);
  }
  std::vector<Numbers> found(plain);
  args.z = sorted.data();
  args.z_bias_ED = bias.data();
  args.inverse_S = inverse.data();
  args.shift_E = shift_E.data();
  NormBackwardArgs backward = {
      args, dy.data(), dz.data(), found[2].data(), found[3].data(), found[4].data(), nullptr};
  kernels.norm({args, found[0].data(), 1e-5}, 2);
  kernels.norm_backward(backward, 2);
  const double slack = args.z_dtype == Dtype::kFloat32 ? 20 : 100;  // z lost digits with its bias
  for (size_t s = 0; s < S; ++s) {
    const int32_t expert = args.expert_ids_S[s];
    if (expert < 0) continue;
    const size_t row = static_cast<size_t>(inverse[s] + shift_E[static_cast<size_t>(expert)]);
    for (size_t c = 0; c < N; ++c)
      require(dz.near(row * N + c, plain[1].get(s * N + c), slack), kernels.name, "dz in sorted rows");
  }
  for (const size_t which : {0, 2, 3, 4}) {
    const size_t size =
        plain[which].dtype == Dtype::kFloat32 ? plain[which].wide.size() : plain[which].half.size();
    for (size_t i = 0; i < size; ++i)
      require(found[which].near(i, plain[which].get(i), slack), kernels.name, "norm of sorted rows");
  }
}

void check_norm(const RowKernels& kernels, Dtype dtype, int64_t tokens, int64_t top_k, int64_t columns,
                std::mt19937& random) {
  const auto T = static_cast<size_t>(tokens), K = static_cast<size_t>(top_k),
             N = static_cast<size_t>(columns);
  std::vector<int32_t> ids(T * K);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % 4) - 1;
  Numbers z(dtype, T * K * N, random), residual(dtype, T * N, random), dy(dtype, T * N, random);
  Numbers weight(dtype, 3 * N, random), bias(dtype, 3 * N, random);
  Numbers y(dtype, T * N), dz(dtype, T * K * N), dresidual(dtype, T * N), dweight(dtype, 3 * N),
      dbias(dtype, 3 * N);
  std::vector<float> gate(T * K, 0.75f), mean(T * K), rstd(T * K), dgate(T * K);
  const NormArgs args = {dtype,      dtype,         dtype,       z.data(),    residual.data(),
                         ids.data(), weight.data(), bias.data(), gate.data(), nullptr,
                         nullptr,    nullptr,       mean.data(), rstd.data(), tokens,
                         top_k,      columns,       3,           7,           0,
                         1};
  std::vector<Numbers> first;
  for (const int threads : kThreadCounts) {
    kernels.norm({args, y.data(), 1e-5}, threads);
    kernels.norm_backward(
        {args, dy.data(), dz.data(), dresidual.data(), dweight.data(), dbias.data(), dgate.data()}, threads);
    const std::vector<Numbers> found = {y, dz, dresidual, dweight, dbias};
    if (first.empty()) first = found;
    require(found == first, kernels.name, "norm by thread count");
  }
  check_sorted_norm(kernels, args, {y, dz, dresidual, dweight, dbias}, dy);
  for (size_t t = 0; t < T; ++t) {
    std::vector<double> expected(N, 0.0);
    bool routed = false;
    for (size_t k = 0; k < K; ++k) {
      const int32_t expert = ids[t * K + k];
      if (expert < 0) continue;
      routed = true;
      double sum = 0, squares = 0;
      for (size_t c = 0; c < N; ++c) sum += z.get((t * K + k) * N + c) + residual.get(t * N + c);
      for (size_t c = 0; c < N; ++c)
        squares += std::pow(z.get((t * K + k) * N + c) + residual.get(t * N + c) - sum / columns, 2);
      const double scale = 1 / std::sqrt(squares / columns + 1e-5);
      for (size_t c = 0; c < N; ++c) {
        const double xhat = (z.get((t * K + k) * N + c) + residual.get(t * N + c) - sum / columns) * scale;
        const size_t at = static_cast<size_t>(expert) * N + c;
        expected[c] += 0.75 * (xhat * weight.get(at) + bias.get(at));
      }
    }
    for (size_t c = 0; c < N; ++c)
      require(y.near(t * N + c, routed ? expected[c] : residual.get(t * N + c)), kernels.name, "norm");
  }
}

}  // namespace

int main(int argc, char**) {
  const bool threaded = argc > 1;
  std::mt19937 random(1);
  int num_cases = 0;
  for (const RowKernels* const kernels : all_row_kernels()) {
    if (threaded && kernels != all_row_kernels().front()) continue;  // all share their work in the same way
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBfloat16}) {
      // Columns round the vector widths; rows round those of a task and of a sum, or for three threads.
      for (const int64_t columns : {3, 4, 16, 17, 64, 65, 130}) {
        for (const int64_t slots : {5, 40, 111, 400}) {
          const bool shared = slots * columns > 3 * 16384;
          if (!shared && (threaded || slots == 400)) continue;
          check_rows(*kernels, dtype, slots, columns, random);
          check_activations(*kernels, dtype, slots, columns, random);
          check_norm(*kernels, dtype, slots, 1 + slots % 2, columns, random);
          num_cases += 3;
        }
      }
    }
  }
  std::printf("rows_cpu: %d cases passed\n", num_cases);
}
