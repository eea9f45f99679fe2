#include "parallel.h"

#include <unistd.h>
#ifdef __linux__
#include <dlfcn.h>
#endif

namespace moebert {

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

// The process that loaded this library: one forked from it has none of its threads.
const auto kLoadedIn = getpid();

}  // namespace

void team_run(int64_t num_tasks, int num_threads, void (*task)(const void*, int64_t), const void* data) {
  const int64_t team = std::min<int64_t>(num_threads, num_tasks);
  const OpenMPRegion region = team > 1 && getpid() == kLoadedIn ? loaded_openmp() : nullptr;
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

}  // namespace moebert
