// Random inputs for the plan builders and what must come out: a stable sort, slot by slot.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/plan.h"

namespace cases {

using moebert::PlanOutputs;
using moebert::PlanShape;

inline void require(bool holds, const char* what, const PlanShape& shape) {
  if (holds) return;
  std::fprintf(stderr, "FAILED: %s at L=%lld S=%lld E=%d\n", what, static_cast<long long>(shape.num_layers),
               static_cast<long long>(shape.num_slots), shape.num_experts);
  std::abort();
}

// Outputs of exactly the right size, so that the address sanitizer sees a step too far, and full of junk, so
// that an element that is not written is seen too.
struct Buffers {
  explicit Buffers(const PlanShape& shape)
      : expert_ids(size(shape.num_layers * shape.num_slots), kJunk),
        order(expert_ids),
        inverse(expert_ids),
        counts(size(shape.num_layers * shape.num_experts), kJunk),
        offsets(size(shape.num_layers * (shape.num_experts + 1)), kJunk) {}

  PlanOutputs outputs() {
    return {expert_ids.data(), order.data(), inverse.data(), counts.data(), offsets.data()};
  }

  bool operator==(const Buffers& other) const {
    return expert_ids == other.expert_ids && order == other.order && inverse == other.inverse &&
           counts == other.counts && offsets == other.offsets;
  }

  static constexpr int32_t kJunk = 0x5a5a5a5a;
  static size_t size(int64_t n) { return static_cast<size_t>(n); }

  std::vector<int32_t> expert_ids, order, inverse, counts, offsets;
};

// The plans of experts_LS, whose ids outside [0, E) mean "no expert".
inline Buffers expected_plans(const std::vector<int64_t>& experts_LS, const PlanShape& shape) {
  Buffers plans(shape);
  const auto num_slots = Buffers::size(shape.num_slots);
  const auto num_experts = Buffers::size(shape.num_experts);
  for (size_t layer = 0; layer < Buffers::size(shape.num_layers); ++layer) {
    int32_t* const experts = plans.expert_ids.data() + layer * num_slots;
    int32_t* const order = plans.order.data() + layer * num_slots;
    for (size_t s = 0; s < num_slots; ++s) {
      const int64_t expert = experts_LS[layer * num_slots + s];
      experts[s] = expert >= 0 && expert < shape.num_experts ? static_cast<int32_t>(expert) : -1;
    }
    std::vector<std::vector<int32_t>> slots_of(num_experts + 1);  // in the last those of no expert
    for (size_t s = 0; s < num_slots; ++s)
      slots_of[experts[s] < 0 ? num_experts : Buffers::size(experts[s])].push_back(static_cast<int32_t>(s));
    int32_t place = 0;
    for (size_t e = 0; e <= num_experts; ++e) {
      plans.offsets[layer * (num_experts + 1) + e] = place;
      if (e < num_experts) plans.counts[layer * num_experts + e] = static_cast<int32_t>(slots_of[e].size());
      for (const int32_t slot : slots_of[e]) {
        plans.inverse[layer * num_slots + Buffers::size(slot)] = place;
        order[place++] = slot;
      }
    }
  }
  return plans;
}

// Ids in [0, n) in one of three manners: even, skewed to the first, all the same; some of them out of range.
template <class Id>
std::vector<Id> random_ids(int64_t size, int64_t n, std::mt19937& random) {
  const auto manner = random() % 3;
  const auto same = static_cast<Id>(random() % static_cast<uint64_t>(n));
  const Id outside[] = {-1, -2, static_cast<Id>(n), std::numeric_limits<Id>::min(),
                        std::numeric_limits<Id>::max()};
  const bool has_outside = random() % 2 == 0;
  std::vector<Id> ids(Buffers::size(size));
  for (Id& id : ids) {
    const auto even = static_cast<Id>(random() % static_cast<uint64_t>(n));
    id = manner == 0 ? even : manner == 1 ? (random() % 8 ? Id{0} : even) : same;
    if (has_outside && random() % 16 == 0) id = outside[random() % 5];
  }
  return ids;
}

// input_ids, tables, mask, and what they mean.
template <class Id>
struct TokenCase {
  TokenCase(const PlanShape& shape, int64_t vocab, std::mt19937& random)
      : vocab_size(vocab),
        input_ids(random_ids<Id>(shape.num_slots, vocab, random)),
        tables(random_ids<int32_t>(shape.num_layers * vocab, shape.num_experts, random)) {
    if (random() % 2 == 0) {
      mask.resize(Buffers::size(shape.num_slots));
      for (uint8_t& real : mask) real = random() % 4 != 0;
    }
    for (size_t l = 0; l < Buffers::size(shape.num_layers); ++l) {
      for (size_t t = 0; t < input_ids.size(); ++t) {
        const bool real = mask.empty() || mask[t] != 0;
        const bool known = input_ids[t] >= 0 && static_cast<int64_t>(input_ids[t]) < vocab;
        if (l == 0 && real && !known) ++num_invalid;
        experts.push_back(real && known ? tables[l * Buffers::size(vocab) + static_cast<size_t>(input_ids[t])]
                                        : -1);
      }
    }
  }

  moebert::TableArgs args() const {
    return {mask.empty() ? nullptr : mask.data(), tables.data(), vocab_size};
  }

  int64_t vocab_size;
  std::vector<Id> input_ids;
  std::vector<int32_t> tables;
  std::vector<uint8_t> mask;
  std::vector<int64_t> experts;
  int64_t num_invalid = 0;
};

}  // namespace cases
