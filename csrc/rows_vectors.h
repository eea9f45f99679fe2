// Vectors of the instruction set that rows_kernels.h is compiled for, and functions of them. Part of that
// file.

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
