#include "rows_cpu.h"

#include <algorithm>

namespace moebert {

namespace baseline {
extern const RowKernels kKernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const RowKernels kKernels;
}
namespace avx512 {
extern const RowKernels kKernels;
}
#endif

std::vector<RowBlock> row_blocks(const Segments& segments, int64_t rows_per_block) {
  std::vector<RowBlock> blocks;
  for (int64_t i = 0; i < segments.count; ++i) {
    const Segment& segment = segments.list[i];
    for (int64_t row = 0; row < segment.padded; row += rows_per_block)
      blocks.push_back({&segment, row, std::min(row + rows_per_block, segment.padded)});
  }
  return blocks;
}

std::vector<const RowKernels*> all_row_kernels() {
  std::vector<const RowKernels*> sets = {&baseline::kKernels};
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    sets.push_back(&avx2::kKernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      sets.push_back(&avx512::kKernels);
  }
#endif
  return sets;
}

const RowKernels& row_kernels() {
  static const RowKernels* const best = all_row_kernels().back();
  return *best;
}

}  // namespace moebert
