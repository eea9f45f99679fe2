#include "parallel.h"

#include <unistd.h>

#include <new>
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

// The tasks of one call, and the first exception of any of them, after which no more are begun.
struct Tasks {
  void (*const task)(const void*, int64_t);
  const void* const data;
  const int64_t num_tasks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;

  Tasks(void (*task_)(const void*, int64_t), const void* data_, int64_t num_tasks_)
      : task(task_), data(data_), num_tasks(num_tasks_) {}

  void run(int64_t i) {
    try {
      task(data, i);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
      next.store(num_tasks, std::memory_order_relaxed);
    }
  }
};

}  // namespace

void out_of_memory() { throw std::bad_alloc(); }

void team_run(int64_t num_tasks, int num_threads, void (*task)(const void*, int64_t), const void* data) {
  const int64_t team = std::min<int64_t>(num_threads, num_tasks);
  const OpenMPRegion region = team > 1 && getpid() == kLoadedIn ? loaded_openmp() : nullptr;
  Tasks tasks(task, data, num_tasks);
  if (region == nullptr) {
    parallel_for(num_tasks, num_threads, [&](int64_t i) {
      if (!tasks.failed.load(std::memory_order_relaxed)) tasks.run(i);
    });
  } else {
    const auto body = [](void* raw) {
      Tasks& mine = *static_cast<Tasks*>(raw);
      for (int64_t i; (i = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.num_tasks;) mine.run(i);
    };
    region(body, &tasks, static_cast<unsigned>(team), 0);
  }
  if (tasks.failure) std::rethrow_exception(tasks.failure);
}

}  // namespace moebert
