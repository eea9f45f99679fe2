#include "plan_cpu.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "parallel.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace moebert {
namespace {

// Fewer slots than this are sorted sooner than a second thread is started.
constexpr int64_t kMinSlotsPerThread = 32768;

// One layer's slots [begin, end) and, per bin, first their number and then the next place in `order`.
// Bin e < E is expert e, bin E the slots without an expert.
struct Chunk {
  int64_t layer;
  int64_t begin;
  int64_t end;
  std::vector<int32_t> bins;
};

constexpr int32_t kNoToken = -1;  // all bits set, as kNoExpert

// The two kinds of source: `of_layer` gives a layer's experts, whose `write` fills out[0 .. end - begin) with
// those of its slots, kNoExpert for none.

template <class Id>
struct GivenExperts {
  ExpertIds<Id> ids;

  struct Layer {
    ExpertIds<Id> ids;
    int64_t layer;

    void write(int64_t begin, int64_t end, int32_t* out) const {
      const ExpertIds<Id> source =
          ids;  // `out` may alias a member as far as the compiler knows, but no local
      for (int64_t slot = begin; slot < end; ++slot)
        out[slot - begin] = source.resolve(layer, source.read(layer, slot));
    }
  };

  Layer of_layer(int64_t layer, int64_t /*num_slots*/) const { return {ids, layer}; }
};

#ifdef __x86_64__
// narrow_table in steps of 16; returns where it stopped.
__attribute__((target("avx512f"))) int64_t narrow_table_avx512(const int32_t* table_V, int64_t vocab_size,
                                                               int32_t num_experts, int8_t* narrow_V) {
  int64_t id = 0;
  for (; id + 16 <= vocab_size; id += 16) {
    const __m512i experts = _mm512_loadu_si512(table_V + id);
    // Unsigned, so that negative numbers are too large as well.
    const __mmask16 known = _mm512_cmplt_epu32_mask(experts, _mm512_set1_epi32(num_experts));
    const __m512i valid = _mm512_mask_blend_epi32(known, _mm512_set1_epi32(kNoExpert), experts);
    // Not the form without a mask: GCC 12 warns of an operand that it leaves undefined on purpose.
    const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, valid);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(narrow_V + id), bytes);
  }
  return id;
}
#endif

// A table's entries as bytes, kNoExpert for what is no expert.
void narrow_table(const int32_t* table_V, int64_t vocab_size, int32_t num_experts, int8_t* narrow_V) {
  int64_t id = 0;
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f")) id = narrow_table_avx512(table_V, vocab_size, num_experts, narrow_V);
#endif
  for (; id < vocab_size; ++id) {
    const int32_t expert = table_V[id];
    narrow_V[id] = static_cast<int8_t>(expert >= 0 && expert < num_experts ? expert : kNoExpert);
  }
}

struct LookedUpExperts {
  const int32_t* tokens_T;  // kNoToken, or an index that the tables have
  const int32_t* tables_LV;
  int64_t vocab_size;
  int32_t num_experts;

  struct Layer {
    const LookedUpExperts& tables;
    const int32_t* table_V;
    // The table in a byte an entry, which the first cache holds, and before it kNoExpert for kNoToken; empty
    // where that does not pay.
    std::vector<int8_t> narrow;

    void write(int64_t begin, int64_t end, int32_t* out) const {
      const int32_t* const tokens = tables.tokens_T + begin;
      if (!narrow.empty()) {
        const int8_t* const table = narrow.data() + 1;
        for (int64_t i = 0; i < end - begin; ++i) out[i] = table[tokens[i]];
        return;
      }
      const int32_t* const table = table_V;
      const int32_t limit = tables.num_experts;
      for (int64_t i = 0; i < end - begin; ++i)
        out[i] = table[std::max(tokens[i], 0)] | std::min(tokens[i], 0);
      for (int64_t i = 0; i < end - begin; ++i) out[i] = out[i] >= 0 && out[i] < limit ? out[i] : kNoExpert;
    }
  };

  Layer of_layer(int64_t layer, int64_t num_slots) const {
    Layer made{*this, tables_LV + layer * vocab_size, {}};
    if (num_slots < vocab_size || num_experts > INT8_MAX) return made;
    made.narrow.resize(static_cast<size_t>(vocab_size) + 1);
    made.narrow[0] = static_cast<int8_t>(kNoExpert);
    narrow_table(made.table_V, vocab_size, num_experts, made.narrow.data() + 1);
    return made;
  }
};

// The pointers of one layer that the second pass works on.
struct Row {
  const int32_t* expert_ids_S;
  int32_t* order_S;
  int32_t* inverse_S;
};

// Adds the experts to the counters of their bins.
void tally_scalar(const int32_t* experts, int64_t size, int32_t num_experts, int32_t* bins) {
  for (int64_t i = 0; i < size; ++i) ++bins[experts[i] < 0 ? num_experts : experts[i]];
}

void put_in_order_scalar(const Row& row, int64_t begin, int64_t end, int32_t num_experts, int32_t* next) {
  for (int64_t slot = begin; slot < end; ++slot) {
    const int32_t expert = row.expert_ids_S[slot];
    const int32_t place = next[expert < 0 ? num_experts : expert]++;
    row.order_S[place] = static_cast<int32_t>(slot);
    row.inverse_S[slot] = place;
  }
}

#ifdef __x86_64__
// A counter in memory costs the scalar loops some cycles a slot. With few experts it is quicker to take 16
// slots at a time and go through the bins. Both functions return where they stopped, less than 16 slots
// before the end.

constexpr int32_t kMaxVectorExperts = 16;

bool use_vectors(int32_t num_experts) {
  return num_experts <= kMaxVectorExperts && __builtin_cpu_supports("avx512f");
}

__attribute__((target("avx512f,popcnt"))) int64_t tally_avx512(const int32_t* experts, int64_t size,
                                                               int32_t num_experts, int32_t* bins) {
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    const __m512i experts_16 = _mm512_loadu_si512(experts + i);
    int32_t unrouted = 16;
    for (int32_t expert = 0; expert < num_experts; ++expert) {
      const int32_t equal =
          __builtin_popcount(_mm512_cmpeq_epi32_mask(experts_16, _mm512_set1_epi32(expert)));
      bins[expert] += equal;
      unrouted -= equal;
    }
    bins[num_experts] += unrouted;
  }
  return i;
}

// kNumExperts: known to the compiler, which then keeps the places in registers; 0 for any number.
template <int32_t kNumExperts>
__attribute__((target("avx512f,popcnt"))) int64_t put_in_order_avx512(const Row& row, int64_t begin,
                                                                      int64_t end, int32_t any_number,
                                                                      int32_t* bins) {
  const int32_t num_experts = kNumExperts == 0 ? any_number : kNumExperts;
  int32_t next[kMaxVectorExperts + 1];
  std::copy_n(bins, num_experts + 1, next);
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int64_t slot = begin;
  for (; slot + 16 <= end; slot += 16) {
    const __m512i experts = _mm512_loadu_si512(row.expert_ids_S + slot);
    const __m512i slots = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(slot)));
    __m512i places = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int32_t bin = 0; bin <= num_experts; ++bin) {
      const int32_t expert = bin < num_experts ? bin : kNoExpert;
      const __mmask16 here = _mm512_cmpeq_epi32_mask(experts, _mm512_set1_epi32(expert));
      if (expert == kNoExpert && here == 0) continue;  // without padding, never anything else
      const int32_t count = __builtin_popcount(here);
      const auto first = static_cast<__mmask16>((1u << count) - 1);
      const __m512i run = _mm512_add_epi32(lanes, _mm512_set1_epi32(next[bin]));
      _mm512_mask_storeu_epi32(row.order_S + next[bin], first, _mm512_maskz_compress_epi32(here, slots));
      places = _mm512_mask_expand_epi32(places, here, run);
      next[bin] += count;
    }
    _mm512_storeu_si512(row.inverse_S + slot, places);
  }
  std::copy_n(next, num_experts + 1, bins);
  return slot;
}
#endif

// Between lookup and tally a block stays in the first cache.
constexpr int64_t kBlockSlots = 1024;

template <class Source>
void count(const Source& source, const PlanShape& shape, const PlanOutputs& out, Chunk& chunk) {
  int32_t* const expert_ids_S = out.expert_ids_LS + chunk.layer * shape.num_slots;
  const auto experts = source.of_layer(chunk.layer, chunk.end - chunk.begin);
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlockSlots) {
    const int64_t end = std::min(begin + kBlockSlots, chunk.end);
    experts.write(begin, end, expert_ids_S + begin);
    int64_t done = begin;
#ifdef __x86_64__
    if (use_vectors(shape.num_experts)) {
      done += tally_avx512(expert_ids_S + begin, end - begin, shape.num_experts, chunk.bins.data());
    }
#endif
    tally_scalar(expert_ids_S + done, end - done, shape.num_experts, chunk.bins.data());
  }
}

void put_in_order(const PlanShape& shape, const PlanOutputs& out, Chunk& chunk) {
  const int64_t offset = chunk.layer * shape.num_slots;
  const Row row = {out.expert_ids_LS + offset, out.order_LS + offset, out.inverse_LS + offset};
  int64_t done = chunk.begin;
#ifdef __x86_64__
  if (use_vectors(shape.num_experts)) {
    const auto vectors = shape.num_experts == 4 ? put_in_order_avx512<4> : put_in_order_avx512<0>;
    done = vectors(row, done, chunk.end, shape.num_experts, chunk.bins.data());
  }
#endif
  put_in_order_scalar(row, done, chunk.end, shape.num_experts, chunk.bins.data());
}

// Turns the counts of one layer's chunks into places, and writes the layer's counts and offsets.
void scan(const PlanShape& shape, const PlanOutputs& out, int64_t layer, Chunk* chunks, int64_t num_chunks) {
  int32_t* const counts_E = out.counts_LE + layer * shape.num_experts;
  int32_t* const offsets_E1 = out.offsets_LE1 + layer * (int64_t{shape.num_experts} + 1);
  int32_t place = 0;
  for (int32_t bin = 0; bin <= shape.num_experts; ++bin) {
    offsets_E1[bin] = place;
    for (int64_t c = 0; c < num_chunks; ++c) {
      const int32_t in_chunk = chunks[c].bins[static_cast<size_t>(bin)];
      chunks[c].bins[static_cast<size_t>(bin)] = place;
      place += in_chunk;
    }
    if (bin < shape.num_experts) counts_E[bin] = place - offsets_E1[bin];
  }
}

// Fewer threads than asked for where the work does not pay for them.
int useful_threads(int64_t slots, int max_threads) {
  return static_cast<int>(std::clamp<int64_t>(slots / kMinSlotsPerThread, 1, std::max(max_threads, 1)));
}

template <class Source>
void build(const Source& source, const PlanShape& shape, const PlanOutputs& out, int max_threads) {
  if (shape.num_layers == 0) return;
  const int num_threads = useful_threads(shape.num_layers * shape.num_slots, max_threads);
  // Whole layers keep both passes in one core's cache; layers are cut only where they are fewer than threads.
  const int64_t chunks_per_layer = (num_threads + shape.num_layers - 1) / shape.num_layers;
  const int64_t chunk_slots = (shape.num_slots + chunks_per_layer - 1) / chunks_per_layer;

  std::vector<Chunk> chunks;
  chunks.reserve(static_cast<size_t>(shape.num_layers * chunks_per_layer));
  for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
    for (int64_t c = 0; c < chunks_per_layer; ++c) {
      chunks.push_back({layer, std::min(c * chunk_slots, shape.num_slots),
                        std::min((c + 1) * chunk_slots, shape.num_slots),
                        std::vector<int32_t>(static_cast<size_t>(shape.num_experts) + 1, 0)});
    }
  }

  if (chunks_per_layer == 1) {
    share_among_team(shape.num_layers, num_threads, [&](int64_t layer) {
      Chunk& chunk = chunks[static_cast<size_t>(layer)];
      count(source, shape, out, chunk);
      scan(shape, out, layer, &chunk, 1);
      put_in_order(shape, out, chunk);
    });
    return;
  }
  const auto num_chunks = static_cast<int64_t>(chunks.size());
  share_among_team(num_chunks, num_threads,
                   [&](int64_t i) { count(source, shape, out, chunks[static_cast<size_t>(i)]); });
  for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
    scan(shape, out, layer, &chunks[static_cast<size_t>(layer * chunks_per_layer)], chunks_per_layer);
  }
  share_among_team(num_chunks, num_threads,
                   [&](int64_t i) { put_in_order(shape, out, chunks[static_cast<size_t>(i)]); });
}

// Checks ids and mask once for all layers. Returns the number of unmasked ids outside [0, vocab_size).
template <class Id>
int64_t check_tokens(const Id* input_ids_T, const TableArgs& tables, int64_t num_tokens, int32_t* tokens_T,
                     int max_threads) {
  std::atomic<int64_t> num_invalid{0};
  const int num_threads = useful_threads(num_tokens, max_threads);
  const int64_t part = (num_tokens + num_threads - 1) / num_threads;
  share_among_team(num_threads, num_threads, [&](int64_t i) {
    const Id* const ids = input_ids_T;
    const uint8_t* const mask = tables.mask_T;
    const auto vocab_size = static_cast<int32_t>(tables.vocab_size);
    const int64_t end = std::min((i + 1) * part, num_tokens);
    int64_t invalid = 0;
    for (int64_t slot = i * part; slot < end; ++slot) {
      const Id id = ids[slot];
      const auto low = static_cast<int32_t>(id);
      const bool known = low == id && low >= 0 && low < vocab_size;
      invalid += !known;
      tokens_T[slot] = known ? low : kNoToken;
    }
    for (int64_t slot = i * part; mask != nullptr && slot < end; ++slot) {
      if (mask[slot] != 0) continue;
      const Id id = ids[slot];
      invalid -= !(id >= 0 && id < vocab_size);
      tokens_T[slot] = kNoToken;
    }
    num_invalid += invalid;
  });
  return num_invalid;
}

}  // namespace

void plan_from_expert_ids_cpu(IdPointer ids_LS, const PlanShape& shape, const PlanOutputs& out,
                              int num_threads) {
  if (ids_LS.bytes == 8) {
    const auto* const ids = static_cast<const int64_t*>(ids_LS.data);
    build(GivenExperts<int64_t>{{ids, shape.num_slots, shape.num_experts}}, shape, out, num_threads);
  } else {
    const auto* const ids = static_cast<const int32_t*>(ids_LS.data);
    build(GivenExperts<int32_t>{{ids, shape.num_slots, shape.num_experts}}, shape, out, num_threads);
  }
}

int64_t plan_from_input_ids_cpu(IdPointer input_ids_T, const TableArgs& tables, const PlanShape& shape,
                                const PlanOutputs& out, int num_threads) {
  std::vector<int32_t> tokens_T(static_cast<size_t>(shape.num_slots));
  const int64_t num_invalid = input_ids_T.bytes == 8
                                  ? check_tokens(static_cast<const int64_t*>(input_ids_T.data), tables,
                                                 shape.num_slots, tokens_T.data(), num_threads)
                                  : check_tokens(static_cast<const int32_t*>(input_ids_T.data), tables,
                                                 shape.num_slots, tokens_T.data(), num_threads);
  const LookedUpExperts source = {tokens_T.data(), tables.tables_LV, tables.vocab_size, shape.num_experts};
  build(source, shape, out, num_threads);
  return num_invalid;
}

}  // namespace moebert
