// The CUDA kernels, thread by thread on the host, against std::stable_sort; and the cutting of huge inputs.
#include <limits>

// clang-format off
#include "cuda_on_host.h"
#include "../../csrc/plan_kernels.cuh"
// clang-format on
#include "plan_cases.h"

namespace {

using cases::Buffers;
using namespace moebert;

// What launch() of plan_cuda.cu does, with junk in the workspace.
template <class Source>
void build(const Source& source, const PlanShape& shape, const PlanOutputs& out, int32_t* num_invalid,
           std::mt19937& random) {
  const PlanGeometry geometry = plan_geometry(shape);
  const auto grid_x = static_cast<unsigned>(geometry.num_chunks);
  const auto grid_y = static_cast<unsigned>(shape.num_layers);
  std::vector<int32_t> workspace(Buffers::size(plan_workspace_size(shape)), Buffers::kJunk);
  if (geometry.num_chunks == 1) {
    const auto kernel = [&] { plan_whole_layer(source, shape, out, geometry.chunk_slots, num_invalid); };
    cuda_on_host::launch(grid_x, grid_y, kLoneWarps * kWarpSize, kernel, random);
    return;
  }
  int32_t* const counts_LBC = workspace.data();
  int32_t* const invalid_C = counts_LBC + shape.num_layers * (shape.num_experts + 1) * geometry.num_chunks;
  const auto count = [&] {
    plan_count_chunks(source, shape, out, geometry.chunk_slots, counts_LBC,
                      num_invalid ? invalid_C : nullptr);
  };
  const auto place = [&] {
    plan_place_chunks(shape, out, geometry.chunk_slots, counts_LBC, invalid_C, num_invalid);
  };
  cuda_on_host::launch(grid_x, grid_y, kChunkWarps * kWarpSize, count, random);
  cuda_on_host::launch(grid_x, grid_y, kChunkWarps * kWarpSize, place, random);
}

template <class Id>
void check_expert_ids(const PlanShape& shape, std::mt19937& random) {
  const auto ids = cases::random_ids<Id>(shape.num_layers * shape.num_slots, shape.num_experts, random);
  Buffers found(shape);
  build(ExpertIds<Id>{ids.data(), shape.num_slots, shape.num_experts}, shape, found.outputs(), nullptr,
        random);
  cases::require(found == cases::expected_plans({ids.begin(), ids.end()}, shape), "from expert ids", shape);
}

template <class Id>
void check_input_ids(const PlanShape& shape, std::mt19937& random) {
  const cases::TokenCase<Id> tokens(shape, 1 + random() % 500, random);
  Buffers found(shape);
  int32_t num_invalid = Buffers::kJunk;
  build(TokenTables<Id>{tokens.input_ids.data(), tokens.args(), shape.num_experts}, shape, found.outputs(),
        &num_invalid, random);
  cases::require(found == cases::expected_plans(tokens.experts, shape), "from input ids", shape);
  cases::require(num_invalid == tokens.num_invalid, "num_invalid", shape);
}

int check_kernels(std::mt19937& random) {
  int num_cases = 0;
  // Round the warp, the block, the limit of one launch, and the chunks of two launches.
  for (const int64_t slots : {0, 1, 7, 31, 32, 33, 1023, 1025, 4099, 8191, 8192, 8193, 20011}) {
    constexpr int32_t kExperts[] = {1, 4, 31, 256};
    for (int i = 0; i < (slots < 8000 ? 2 : 1); ++i) {
      const int32_t experts = kExperts[random() % 4];
      const PlanShape shape = {1 + static_cast<int64_t>(random() % 2), slots, experts};
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
  return num_cases;
}

// Runs must hold every slot once, in order, for any size: nothing may overflow on the way.
void check_geometry(const PlanShape& shape) {
  const PlanGeometry geometry = plan_geometry(shape);
  const int num_warps = geometry.num_chunks == 1 ? kLoneWarps : kChunkWarps;
  cases::require(geometry.chunk_slots % (num_warps * kWarpSize) == 0, "whole steps", shape);
  cases::require(geometry.num_chunks <= kMaxChunks, "number of chunks", shape);
  int64_t next = 0;
  for (int64_t chunk = 0; chunk < geometry.num_chunks; ++chunk) {
    for (int warp = 0; warp < num_warps; ++warp) {
      const SlotRange run = warp_slots(shape.num_slots, geometry.chunk_slots, chunk, warp, num_warps);
      cases::require(run.begin == next && run.end >= run.begin, "runs follow each other", shape);
      next = run.end;
    }
  }
  cases::require(next == shape.num_slots, "runs hold all slots", shape);
}

}  // namespace

int main() {
  std::mt19937 random(2);
  const int num_cases = check_kernels(random);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  for (const int64_t slots :
       {int64_t{0}, int64_t{1}, int64_t{8192}, int64_t{8193}, int64_t{65536}, kMost - 1, kMost}) {
    for (const int64_t layers : {1, 12, 65535}) {
      for (const int32_t experts : {1, 4, 256}) check_geometry({layers, slots, experts});
    }
  }
  std::printf("plan_kernels: %d cases passed\n", num_cases);
}
