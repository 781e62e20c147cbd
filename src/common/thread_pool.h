// thread_pool.h: one small fork-join pool for the process.
//
// The caller works too and finishes what is left, so a pool of N threads has N - 1 workers. Tasks are handed out by an
// atomic counter in index order. Results never depend on the number of threads: kernels give each task its own output.
#pragma once

#include <cstdint>
#include <functional>

namespace mfa {

// A reference to a callable `void(int64_t task, int thread)`; it does not own it. `thread` is in [0, thread_count()).
class TaskRef {
 public:
  template <typename F>
  TaskRef(const F& f)  // NOLINT: implicit, so that lambdas pass
      : object_(&f),
        call_([](const void* object, int64_t task, int thread) { (*static_cast<const F*>(object))(task, thread); }) {}
  void operator()(int64_t task, int thread) const { call_(object_, task, thread); }

 private:
  const void* object_;
  void (*call_)(const void*, int64_t, int);
};

// Threads that parallel_for may use: MFA_NUM_THREADS if set, else what the affinity mask and the cgroup quota allow.
int thread_count();

// Sets the number of threads (for tests and benchmarks); 0 = the default. Throws std::invalid_argument if negative.
void set_thread_count(int count);

// Runs task(0) .. task(tasks - 1) and returns when all are done. The first exception of a task is rethrown, after all
// tasks have ended. When the pool is busy with another caller, or inside a task, the tasks run on the calling thread.
// `thread` identifies the executing thread within this call, for per-thread scratch.
void parallel_for(int64_t tasks, TaskRef task);

// While one lives, workers without work look out for the next job instead of going to sleep: for a series of jobs too
// short to wake a worker for, with other work between them. It wakes those that sleep. Does nothing where threads
// outnumber cores.
class AwakeWorkers {
 public:
  AwakeWorkers();
  ~AwakeWorkers();
  AwakeWorkers(const AwakeWorkers&) = delete;
  AwakeWorkers& operator=(const AwakeWorkers&) = delete;

 private:
  void* pool_ = nullptr;
};
bool workers_are_awake();  // whether one lives

}  // namespace mfa
