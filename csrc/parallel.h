// Sharing the tasks of one call among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace moebert {

// Raises std::bad_alloc; code for one instruction set calls it, see below.
[[noreturn]] void out_of_memory();

// Runs task(0) ... task(num_tasks - 1), each once, on the calling thread and up to num_threads - 1 more.
// Tasks must not raise.
// Threads live for one call: a kept pool would be lost in a forked data-loader worker.
template <class Task>
void parallel_for(int64_t num_tasks, int num_threads, const Task& task) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) task(i);
  };
  std::vector<std::thread> helpers;
  const int64_t num_helpers = std::min<int64_t>(num_threads, num_tasks) - 1;
  helpers.reserve(static_cast<size_t>(std::max<int64_t>(num_helpers, 0)));
  try {
    for (int64_t i = 0; i < num_helpers; ++i) helpers.emplace_back(work);
  } catch (const std::exception&) {
    // No more threads to be had, or no memory for them: those that run share the work.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

// parallel_for on the threads that torch computes with, where the process has loaded libgomp: awake between
// two GEMMs, where starting new ones would cost more than many a row kernel, and where new ones would have to
// share a processor with those of torch, which spin for a while. A process forked from the one that loaded
// this library starts its own. What a task raises is raised here, when all that run have ended: a thread that
// ended by an exception would end the process. Not a template: code for one instruction set calls it, and
// must not instantiate what the linker may share with the rest.
void team_run(int64_t num_tasks, int num_threads, void (*task)(const void* data, int64_t i),
              const void* data);

// team_run of anything that can be called with i.
template <class Task>
void share_among_team(int64_t num_tasks, int num_threads, const Task& task) {
  team_run(
      num_tasks, num_threads, [](const void* data, int64_t i) { (*static_cast<const Task*>(data))(i); },
      &task);
}

}  // namespace moebert
