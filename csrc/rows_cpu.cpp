#include "rows_cpu.h"

#ifdef __linux__
#include <dlfcn.h>
#endif

#include "parallel.h"

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

namespace {

// libgomp's entry for a parallel region: runs body(data) on num_threads threads of the caller's team.
using OpenMPRegion = void (*)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

// That of the runtime the process has already loaded (torch's), so that both share one team of threads.
OpenMPRegion loaded_openmp() {
#ifdef __linux__
  static const auto region = reinterpret_cast<OpenMPRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return region;
#else
  return nullptr;
#endif
}

}  // namespace

void team_run(int64_t num_tasks, int num_threads, void (*task)(const void*, int64_t), const void* data) {
  const int64_t team = std::min<int64_t>(num_threads, num_tasks);
  const OpenMPRegion region = team > 1 ? loaded_openmp() : nullptr;
  if (region == nullptr) {
    parallel_for(num_tasks, num_threads, [&](int64_t i) { task(data, i); });
    return;
  }
  struct Shared {
    void (*task)(const void*, int64_t);
    const void* data;
    int64_t num_tasks;
    std::atomic<int64_t> next;
  } shared{task, data, num_tasks, {0}};
  const auto body = [](void* raw) {
    Shared& mine = *static_cast<Shared*>(raw);
    for (int64_t i; (i = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.num_tasks;)
      mine.task(mine.data, i);
  };
  region(body, &shared, static_cast<unsigned>(team), 0);
}

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
