// Residual sum, dropout and the experts' LayerNorms. Part of rows_kernels.h.

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

// The row of z, and of dz, that a slot with this expert has.
int64_t row_of_z(const NormArgs& args, int64_t slot, int64_t expert) {
  return args.inverse_S == nullptr ? slot : args.inverse_S[slot] + args.shift_E[expert];
}

// u_D = keep * (z + its bias) + residual.
template <class Z, class R>
void residual_sum(const NormArgs& args, int64_t token, int64_t slot, int64_t expert, float* u_D) {
  const int64_t columns = args.columns;
  const Z* const z = static_cast<const Z*>(args.z) + row_of_z(args, slot, expert) * columns;
  const Z* const z_bias_ED = static_cast<const Z*>(args.z_bias_ED);
  const R* const residual = static_cast<const R*>(args.residual_TD) + token * columns;
  const auto biased = [&](int64_t i, auto count) {
    return load(z + i, count) + load_or_zero(z_bias_ED, expert * columns + i, count);
  };
  if (args.keep_scale == 1) {
    for_lanes(0, columns, [&](int64_t i, auto count) {
      store(u_D + i, biased(i, count) + load(residual + i, count), count);
    });
    return;
  }
  const Dropout dropout(args, slot);
  for_lanes(0, columns, [&](int64_t i, auto count) {
    store(u_D + i, biased(i, count) * dropout.factors(i) + load(residual + i, count), count);
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
    if (args.mean_S != nullptr) args.mean_S[slot] = args.rstd_S[slot] = 0;
    if (expert < 0) continue;
    residual_sum<Z, R>(args, token, slot, expert, u_D);
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
    if (args.mean_S != nullptr) {
      args.mean_S[slot] = mean;
      args.rstd_S[slot] = rstd;
    }
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
    if (expert < 0) {
      if (args.inverse_S == nullptr)
        memset(static_cast<Z*>(backward.dz) + slot * columns, 0, static_cast<size_t>(columns) * sizeof(Z));
      if (backward.dgate_S != nullptr) backward.dgate_S[slot] = 0;
      continue;
    }
    residual_sum<Z, R>(args, token, slot, expert, u_D);
    Z* const dz = static_cast<Z*>(backward.dz) + row_of_z(args, slot, expert) * columns;
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
