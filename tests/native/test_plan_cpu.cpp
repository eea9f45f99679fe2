// The host builder against a stable sort, for every thread count alike.
// With the argument "threaded" the cases alone that several threads work on: for the thread sanitizer.
#include <atomic>
#include <cstdlib>
#include <limits>
#include <new>

#include "../../csrc/plan_cpu.h"
#include "plan_cases.h"

namespace {
std::atomic<int64_t> allocations_left{INT64_MAX};
}

void* operator new(size_t size) {
  if (allocations_left.fetch_sub(1) <= 0) throw std::bad_alloc();
  if (void* const memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void* operator new(size_t size, const std::nothrow_t&) noexcept { return std::malloc(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

using cases::Buffers;
using moebert::PlanShape;

constexpr int kThreadCounts[] = {1, 2, 3, 8};

template <class Id>
void check_expert_ids(const PlanShape& shape, std::mt19937& random) {
  const auto ids = cases::random_ids<Id>(shape.num_layers * shape.num_slots, shape.num_experts, random);
  const Buffers expected = cases::expected_plans({ids.begin(), ids.end()}, shape);
  for (const int num_threads : kThreadCounts) {
    Buffers found(shape);
    moebert::plan_from_expert_ids_cpu({ids.data(), sizeof(Id)}, shape, found.outputs(), num_threads);
    cases::require(found == expected, "plan_from_expert_ids_cpu", shape);
  }
}

template <class Id>
void check_input_ids(const PlanShape& shape, std::mt19937& random) {
  const cases::TokenCase<Id> tokens(shape, 1 + random() % 500, random);
  const Buffers expected = cases::expected_plans(tokens.experts, shape);
  for (const int num_threads : kThreadCounts) {
    Buffers found(shape);
    const int64_t num_invalid = moebert::plan_from_input_ids_cpu(
        {tokens.input_ids.data(), sizeof(Id)}, tokens.args(), shape, found.outputs(), num_threads);
    cases::require(found == expected, "plan_from_input_ids_cpu", shape);
    cases::require(num_invalid == tokens.num_invalid, "num_invalid", shape);
  }
}

// Whichever allocation fails, on whichever thread, the caller hears of it, and the next call goes well.
void check_failed_allocations(std::mt19937& random) {
  const PlanShape shape = {2, 50001, 4};
  const cases::TokenCase<int64_t> tokens(shape, 50, random);
  const Buffers expected = cases::expected_plans(tokens.experts, shape);
  for (const int num_threads : kThreadCounts) {
    Buffers found(shape);
    const auto build = [&] {
      moebert::plan_from_input_ids_cpu({tokens.input_ids.data(), 8}, tokens.args(), shape, found.outputs(),
                                       num_threads);
    };
    int64_t allowed = 0;
    for (bool done = false; !done; ++allowed) {
      allocations_left = allowed;
      try {
        build();
        done = true;
      } catch (const std::bad_alloc&) {
      }
      allocations_left = INT64_MAX;
    }
    cases::require(allowed > 5, "allocations were made to fail", shape);
    build();
    cases::require(found == expected, "a plan after a failed allocation", shape);
  }
}

}  // namespace

int main(int argc, char**) {
  const bool threaded = argc > 1;
  std::mt19937 random(1);
  int num_cases = 0;
  // Sizes round the vector width, the lookup block, and (from 65536 slots on) chunks of more than one thread.
  for (const int64_t slots : {0, 1, 7, 15, 16, 17, 1023, 1024, 1025, 4099, 65537, 262147}) {
    if (threaded && slots < 65536) continue;
    for (const int32_t experts : {1, 2, 4, 16, 17, 256, 1000}) {
      if (slots > 65536 && (experts < 4 || experts == 256)) continue;  // take the ways of 16 and of 1000
      const int64_t layers = 1 + static_cast<int64_t>(random() % (slots > 60000 ? 2 : 4));
      const PlanShape shape = {layers, slots, experts};
      if (random() % 2) {
        check_expert_ids<int32_t>(shape, random);
        check_input_ids<int64_t>(shape, random);
      } else {
        check_expert_ids<int64_t>(shape, random);
        check_input_ids<int32_t>(shape, random);
      }
      num_cases += 2;
    }
  }
  check_failed_allocations(random);
  std::printf("plan_cpu: %d cases passed\n", num_cases);
}
