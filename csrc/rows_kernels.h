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

constexpr int64_t kLanes = MOEBERT_VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(MOEBERT_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(MOEBERT_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(MOEBERT_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(MOEBERT_VECTOR_BYTES / 2)));

struct Bfloat16 {
  uint16_t bits;
};

// The lower half of each word, which must be all it holds. GCC 12 takes
// __builtin_convertvector apart here, and warns of the unmasked AVX-512 intrinsic.
inline Halves narrow(Words words) {
#if MOEBERT_VECTOR_BYTES == 64
  return reinterpret_cast<Halves>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(words)));
#elif MOEBERT_VECTOR_BYTES == 32
  const __m256i packed =
      _mm256_packus_epi32(reinterpret_cast<__m256i>(words), reinterpret_cast<__m256i>(words));
  return reinterpret_cast<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(words, Halves);
#endif
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// How many lanes of a vector there are: all, known when compiling, or fewer at the end of a row. Lanes beyond
// are loaded as 0.
struct AllLanes {
  constexpr operator int64_t() const { return kLanes; }
};

template <class Count>
inline Floats load(const float* from, Count count) {
  Floats value = {};
  memcpy(&value, from, static_cast<size_t>(int64_t{count}) * sizeof(float));
  return value;
}

template <class Count>
inline Floats load(const Bfloat16* from, Count count) {
  Halves half = {};
  memcpy(&half, from, static_cast<size_t>(int64_t{count}) * sizeof(Bfloat16));
  return reinterpret_cast<Floats>(__builtin_convertvector(half, Words) << 16);
}

template <class Count>
inline void store(float* to, Floats value, Count count) {
  memcpy(to, &value, static_cast<size_t>(int64_t{count}) * sizeof(float));
}

template <class Count>
inline void store(Bfloat16* to, Floats value, Count count) {
  const Words bits = reinterpret_cast<Words>(value);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Words not_a_number = reinterpret_cast<Words>(value != value);
  const Words chosen = (not_a_number & 0x7fc0) | (~not_a_number & rounded);
  const Halves half = narrow(chosen);
  memcpy(to, &half, static_cast<size_t>(int64_t{count}) * sizeof(Bfloat16));
}

template <class T, class Count>
inline Floats load_or_zero(const T* from, int64_t offset, Count count) {
  return from == nullptr ? Floats{} : load(from + offset, count);
}

// body(i, count) over [begin, end) in vectors.
template <class Body>
inline void for_lanes(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, AllLanes{});
  if (i < end) body(i, end - i);
}

inline float sum_of(Floats value) {
  float sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += value[lane];
  return sum;
}

inline Floats choose(Ints mask, Floats yes, Floats no) {
  return reinterpret_cast<Floats>((mask & reinterpret_cast<Ints>(yes)) |
                                  (~mask & reinterpret_cast<Ints>(no)));
}

inline Floats absolute(Floats x) { return reinterpret_cast<Floats>(reinterpret_cast<Ints>(x) & 0x7fffffff); }

// exp(x) for x <= 0: 2^n e^r with |r| <= ln(2) / 2, Cephes' polynomial; 0 or nearly so below -87.
inline Floats exp_of_negative(Floats x) {
  const Floats bounded = choose(x < -87.0f, Floats{} - 87.0f, x);  // a NaN stays
  const Floats shifted = bounded * 1.44269504f + 12582912.0f;      // rounds: 1.5 * 2^23
  const Floats n = shifted - 12582912.0f;
  const Floats r = bounded - n * 0.693359375f - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints power = (reinterpret_cast<Ints>(shifted) - 0x4b400000 + 127) << 23;
  return p * reinterpret_cast<Floats>(power);
}

inline Floats sigmoid(Floats x) {
  const Floats e = exp_of_negative(-absolute(x));
  const Floats one = 1.0f / (1.0f + e);
  return choose(x < 0.0f, e * one, one);
}

// The activations: `value` act(h), and `both`, which also gives act'(h).

struct Gelu {
  static Floats both(Floats h, Floats* slope) {
    // Abramowitz & Stegun 7.1.26 for 1 - erf, whose exponential is that of the density.
    const Floats e = exp_of_negative(h * h * -0.5f);
    const Floats t = 1.0f / (1.0f + absolute(h) * (0.3275911f * 0.70710678f));
    Floats p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const Floats tail = p * t * e * 0.5f;
    const Floats share = choose(h < 0.0f, tail, 1.0f - tail);
    *slope = share + h * e * 0.39894228f;
    return h * share;
  }
};

struct GeluTanh {
  static Floats both(Floats h, Floats* slope) {
    constexpr float kScale = 1.5957691216f;  // 2 sqrt(2 / pi): (1 + tanh(x)) / 2 is sigmoid(2 x)
    const Floats square = h * h;
    const Floats share = sigmoid(h * kScale * (1.0f + square * 0.044715f));
    *slope = share + h * share * (1.0f - share) * kScale * (1.0f + square * (3 * 0.044715f));
    return h * share;
  }
};

struct Relu {
  static Floats both(Floats h, Floats* slope) {
    *slope = choose(h > 0.0f, Floats{} + 1.0f, Floats{});
    return choose(h <= 0.0f, Floats{}, h);  // a NaN stays
  }
};

struct Silu {
  static Floats both(Floats h, Floats* slope) {
    const Floats share = sigmoid(h);
    *slope = share * (1.0f + h * (1.0f - share));
    return h * share;
  }
};

constexpr int64_t kColumnsPerTask = 64;  // sums over rows share the columns among tasks
constexpr int64_t kRowsPerTask = 32;
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

// body(segment, first column, last column)
template <class Body>
void for_columns(const Segments& segments, int64_t columns, int num_threads, const Body& body) {
  const int64_t tasks = (columns + kColumnsPerTask - 1) / kColumnsPerTask;
  share_out(segments.count * tasks, elements_of(segments, columns), num_threads, [&](int64_t i) {
    const int64_t first = i % tasks * kColumnsPerTask;
    body(segments.list[i / tasks], first, least(first + kColumnsPerTask, columns));
  });
}

// Sums over the rows of one task's columns.
struct ColumnSums {
  Floats sums[kColumnsPerTask / kLanes] = {};

  void add(int64_t column, Floats value) { sums[column / kLanes] += value; }

  template <class T>
  void write(T* to, int64_t columns) const {
    for_lanes(0, columns, [&](int64_t i, auto count) { store(to + i, sums[i / kLanes], count); });
  }
};

template <class T>
void gather_as(const Segments& segments, const GatherArgs& args, int num_threads) {
  const auto* const src = static_cast<const T*>(args.src);
  auto* const dst = static_cast<T*>(args.dst);
  auto* const sums_EN = static_cast<T*>(args.sums_EN);
  const int32_t* const order_S = segments.order_S;
  const int64_t columns = args.columns;
  const int32_t divisor = args.divisor;
  const auto row_bytes = static_cast<size_t>(columns) * sizeof(T);
  if (sums_EN == nullptr) {
    for_rows(segments, columns, num_threads, [&](const Segment& segment, int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        T* const to = dst + (segment.start + row) * columns;
        if (row < segment.rows) {
          memcpy(to, src + order_S[segment.begin + row] / divisor * columns, row_bytes);
        } else {
          memset(to, 0, row_bytes);
        }
      }
    });
    return;
  }
  for_columns(segments, columns, num_threads, [&](const Segment& segment, int64_t first, int64_t last) {
    ColumnSums sums;
    for (int64_t row = 0; row < segment.padded; ++row) {
      T* const to = dst + (segment.start + row) * columns;
      if (row >= segment.rows) {
        memset(to + first, 0, static_cast<size_t>(last - first) * sizeof(T));
        continue;
      }
      const T* const from = src + order_S[segment.begin + row] / divisor * columns;
      for_lanes(first, last, [&](int64_t i, auto count) {
        const Floats value = load(from + i, count);
        sums.add(i - first, value);
        store(to + i, value, count);
      });
    }
    sums.write(sums_EN + segment.expert * columns + first, last - first);
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
  auto* const sums_EN = static_cast<T*>(args.sums_EN);
  const int64_t columns = args.forward.columns;
  for_columns(segments, columns, num_threads, [&](const Segment& segment, int64_t first, int64_t last) {
    ColumnSums sums;
    const int64_t bias_at = segment.expert * columns;
    for (int64_t row = 0; row < segment.rows; ++row) {
      const int64_t at = (segment.start + row) * columns;
      for_lanes(first, last, [&](int64_t i, auto count) {
        Floats slope;
        const Floats x = load(h + at + i, count) + load_or_zero(bias_EN, bias_at + i, count);
        store(a + at + i, Act::both(x, &slope), count);
        const Floats dh = load(da + at + i, count) * slope;
        store(da + at + i, dh, count);
        sums.add(i - first, dh);
      });
    }
    for (int64_t row = segment.rows; row < segment.padded; ++row) {
      const int64_t at = (segment.start + row) * columns + first;
      memset(a + at, 0, static_cast<size_t>(last - first) * sizeof(T));
      memset(da + at, 0, static_cast<size_t>(last - first) * sizeof(T));
    }
    if (sums_EN != nullptr) sums.write(sums_EN + bias_at + first, last - first);
  });
}

// Whether dropout keeps the elements of a slot: a hash of seed, slot and column against a threshold. The
// slot's key is splitmix64's, the columns are mixed as Wellons' lowbias32 does.
struct Dropout {
  uint32_t low;
  uint32_t high;
  uint32_t drop_below;
  float keep_scale;

  Dropout(const NormArgs& args, int64_t slot) : drop_below(args.drop_below), keep_scale(args.keep_scale) {
    uint64_t key = args.seed + (static_cast<uint64_t>(slot) + 1) * 0x9e3779b97f4a7c15u;
    key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9u;
    key = (key ^ (key >> 27)) * 0x94d049bb133111ebu;
    key ^= key >> 31;
    low = static_cast<uint32_t>(key);
    high = static_cast<uint32_t>(key >> 32);
  }

  Floats factors(int64_t column) const {
    Words x = {};
    for (int64_t lane = 0; lane < kLanes; ++lane) x[lane] = static_cast<uint32_t>(column + lane);
    x = x * 0x9e3779b9u + low;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = ((x ^ (x >> 15)) + high) * 0x846ca68bu;
    x ^= x >> 16;
    return choose(reinterpret_cast<Ints>(x >= drop_below), Floats{} + keep_scale, Floats{});
  }
};

// Memory of one task; std::vector would be instantiated here, see above.
struct Scratch {
  float* const data;

  explicit Scratch(int64_t size)
      : data(static_cast<float*>(malloc(static_cast<size_t>(size) * sizeof(float)))) {
    if (data == nullptr) abort();
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// The rows of `from`, of a NormArgs' parameter dtype, in float.
void widen(Dtype dtype, const void* from, int64_t size, float* to) {
  if (dtype == Dtype::kFloat32) {
    memcpy(to, from, static_cast<size_t>(size) * sizeof(float));
    return;
  }
  const auto* const half = static_cast<const Bfloat16*>(from);
  for_lanes(0, size, [&](int64_t i, auto count) { store(to + i, load(half + i, count), count); });
}

// The experts' weights and biases in float, side by side.
struct Parameters {
  Scratch both;
  const float* const weight_ED;
  const float* const bias_ED;

  explicit Parameters(const NormArgs& args)
      : both(2 * args.experts * args.columns),
        weight_ED(both.data),
        bias_ED(both.data + args.experts * args.columns) {
    const int64_t size = args.experts * args.columns;
    widen(args.parameter_dtype, args.weight_ED, size, both.data);
    widen(args.parameter_dtype, args.bias_ED, size, both.data + size);
  }
};

// u_D = keep * z + residual.
template <class Z, class R>
void residual_sum(const NormArgs& args, int64_t token, int64_t slot, float* u_D) {
  const int64_t columns = args.columns;
  const Z* const z = static_cast<const Z*>(args.z_SD) + slot * columns;
  const R* const residual = static_cast<const R*>(args.residual_TD) + token * columns;
  if (args.keep_scale == 1) {
    for_lanes(0, columns, [&](int64_t i, auto count) {
      store(u_D + i, load(z + i, count) + load(residual + i, count), count);
    });
    return;
  }
  const Dropout dropout(args, slot);
  for_lanes(0, columns, [&](int64_t i, auto count) {
    store(u_D + i, load(z + i, count) * dropout.factors(i) + load(residual + i, count), count);
  });
}

float gate_of(const NormArgs& args, int64_t slot) {
  return args.gate_S == nullptr ? 1.0f / static_cast<float>(args.top_k) : args.gate_S[slot];
}

template <class Z, class R>
void norm_token(const NormForwardArgs& forward, const Parameters& parameters, int64_t token, float* u_D,
                float* y_D) {
  const NormArgs& args = forward.norm;
  const int64_t columns = args.columns;
  R* const y = static_cast<R*>(forward.y_TD) + token * columns;
  int64_t done = 0;
  for (int64_t k = 0; k < args.top_k; ++k) {
    const int64_t slot = token * args.top_k + k;
    const int64_t expert = args.expert_ids_S[slot];
    args.mean_S[slot] = args.rstd_S[slot] = 0;
    if (expert < 0) continue;
    residual_sum<Z, R>(args, token, slot, u_D);
    Floats sums = {}, squares = {};
    for_lanes(0, columns, [&](int64_t i, auto count) { sums += load(u_D + i, count); });
    const float mean = sum_of(sums) / static_cast<float>(columns);
    for_lanes(0, columns, [&](int64_t i, auto count) {
      const Floats centred = load(u_D + i, count) - mean;
      squares += count == kLanes ? centred * centred : Floats{};
    });
    float variance = sum_of(squares);
    for (int64_t i = columns - columns % kLanes; i < columns; ++i)
      variance += (u_D[i] - mean) * (u_D[i] - mean);
    variance /= static_cast<float>(columns);
    const float rstd = 1.0f / __builtin_sqrtf(variance + static_cast<float>(forward.eps));
    args.mean_S[slot] = mean;
    args.rstd_S[slot] = rstd;
    const float gate = gate_of(args, slot);
    const float* const weight = parameters.weight_ED + expert * columns;
    const float* const bias = parameters.bias_ED + expert * columns;
    const bool only = args.top_k == 1;
    for_lanes(0, columns, [&](int64_t i, auto count) {
      const Floats xhat = (load(u_D + i, count) - mean) * rstd;
      const Floats out = (xhat * load(weight + i, count) + load(bias + i, count)) * gate;
      if (only) {
        store(y + i, out, count);
      } else {
        store(y_D + i, done ? load(y_D + i, count) + out : out, count);
      }
    });
    ++done;
  }
  if (done == 0) {
    memcpy(y, static_cast<const R*>(args.residual_TD) + token * columns,
           static_cast<size_t>(columns) * sizeof(R));
  } else if (args.top_k > 1) {
    for_lanes(0, columns, [&](int64_t i, auto count) { store(y + i, load(y_D + i, count), count); });
  }
}

template <class Z, class R>
void norm_as(const NormForwardArgs& args, int num_threads) {
  const int64_t tokens = args.norm.tokens, columns = args.norm.columns;
  const int64_t tasks = (tokens + kRowsPerTask - 1) / kRowsPerTask;
  const Parameters parameters(args.norm);
  share_out(tasks, tokens * columns * args.norm.top_k, num_threads, [&](int64_t task) {
    const Scratch scratch(2 * columns);
    for (int64_t token = task * kRowsPerTask; token < least((task + 1) * kRowsPerTask, tokens); ++token)
      norm_token<Z, R>(args, parameters, token, scratch.data, scratch.data + columns);
  });
}

// dsums_2ED: where this task adds up d weight and d bias.
template <class Z, class R>
void norm_backward_token(const NormBackwardArgs& backward, const Parameters& parameters, int64_t token,
                         float* u_D, float* du_D, float* dsums_2ED) {
  const NormArgs& args = backward.norm;
  const int64_t columns = args.columns;
  const R* const dy = static_cast<const R*>(backward.dy_TD) + token * columns;
  R* const dresidual = static_cast<R*>(backward.dresidual_TD) + token * columns;
  int64_t done = 0;
  for (int64_t k = 0; k < args.top_k; ++k) {
    const int64_t slot = token * args.top_k + k;
    const int64_t expert = args.expert_ids_S[slot];
    Z* const dz = static_cast<Z*>(backward.dz_SD) + slot * columns;
    if (expert < 0) {
      memset(dz, 0, static_cast<size_t>(columns) * sizeof(Z));
      if (backward.dgate_S != nullptr) backward.dgate_S[slot] = 0;
      continue;
    }
    residual_sum<Z, R>(args, token, slot, u_D);
    const float mean = args.mean_S[slot], rstd = args.rstd_S[slot], gate = gate_of(args, slot);
    const float* const weight = parameters.weight_ED + expert * columns;
    const float* const bias = parameters.bias_ED + expert * columns;
    float* const dweight = dsums_2ED + expert * columns;
    float* const dbias = dweight + args.experts * columns;
    Floats of_d = {}, of_dx = {}, of_gate = {};  // lanes past the end have dy = 0
    for_lanes(0, columns, [&](int64_t i, auto count) {
      const Floats xhat = (load(u_D + i, count) - mean) * rstd;
      const Floats w = load(weight + i, count), dy_i = load(dy + i, count), dout = dy_i * gate;
      store(dweight + i, load(dweight + i, count) + dout * xhat, count);
      store(dbias + i, load(dbias + i, count) + dout, count);
      of_d += dout * w;
      of_dx += dout * w * xhat;
      of_gate += dy_i * (xhat * w + load(bias + i, count));
    });
    if (backward.dgate_S != nullptr) backward.dgate_S[slot] = sum_of(of_gate);
    const float mean_d = sum_of(of_d) / static_cast<float>(columns);
    const float mean_dx = sum_of(of_dx) / static_cast<float>(columns);
    const bool drops = args.keep_scale != 1;
    const Dropout dropout(args, slot);
    for_lanes(0, columns, [&](int64_t i, auto count) {
      const Floats xhat = (load(u_D + i, count) - mean) * rstd;
      const Floats dxhat = load(dy + i, count) * gate * load(weight + i, count);
      const Floats du = (dxhat - mean_d - xhat * mean_dx) * rstd;
      store(dz + i, drops ? du * dropout.factors(i) : du, count);
      if (args.top_k == 1) {
        store(dresidual + i, du, count);
      } else {
        store(du_D + i, done ? load(du_D + i, count) + du : du, count);
      }
    });
    ++done;
  }
  if (done == 0) {
    memcpy(dresidual, dy, static_cast<size_t>(columns) * sizeof(R));
  } else if (args.top_k > 1) {
    for_lanes(0, columns, [&](int64_t i, auto count) { store(dresidual + i, load(du_D + i, count), count); });
  }
}

// Tokens are cut into chunks whose number depends on the sizes alone; each adds up its own sums, and the sums
// are added in the chunks' order.
template <class Z, class R>
void norm_backward_as(const NormBackwardArgs& args, int num_threads) {
  constexpr int64_t kMostChunks = 16, kTokensPerChunk = 64, kMostFloats = int64_t{1} << 22;
  const int64_t tokens = args.norm.tokens, columns = args.norm.columns;
  const int64_t sums = 2 * args.norm.experts * columns;
  int64_t chunks = least(kMostChunks, least(tokens / kTokensPerChunk, kMostFloats / (sums + 1)));
  if (chunks < 1) chunks = 1;
  const int64_t part = (tokens + chunks - 1) / chunks;
  const Scratch partial(chunks * sums);
  const Parameters parameters(args.norm);
  share_out(chunks, tokens * columns * args.norm.top_k, num_threads, [&](int64_t chunk) {
    float* const mine = partial.data + chunk * sums;
    memset(mine, 0, static_cast<size_t>(sums) * sizeof(float));
    const Scratch scratch(2 * columns);
    for (int64_t token = chunk * part; token < least((chunk + 1) * part, tokens); ++token)
      norm_backward_token<Z, R>(args, parameters, token, scratch.data, scratch.data + columns, mine);
  });
  for (int64_t half = 0; half < 2; ++half) {
    void* const to = half == 0 ? args.dweight_ED : args.dbias_ED;
    for_lanes(0, sums / 2, [&](int64_t i, auto count) {
      Floats total = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        total += load(partial.data + chunk * sums + half * (sums / 2) + i, count);
      if (args.norm.parameter_dtype == Dtype::kFloat32) {
        store(static_cast<float*>(to) + i, total, count);
      } else {
        store(static_cast<Bfloat16*>(to) + i, total, count);
      }
    });
  }
}

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
