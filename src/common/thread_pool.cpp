// A job is published in one word that holds an epoch, an "open" bit and the number of workers inside. A worker enters
// with a compare-and-swap while the bit is set, so the caller, once it has cleared the bit, waits only for workers that
// really take part: one that sleeps too long just misses the job.
#include "common/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/cpu_limits.h"
#include "common/environment.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace mfa {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kCacheLine = 128;  // two lines of 64 bytes: processors fetch them in pairs

// Waking a sleeping thread costs about 25 us, so a worker looks out for the next job for about as long.
constexpr auto kWorkerSpin = std::chrono::microseconds(50);
// The caller has nothing else to do while the last tasks run, and sleeping through short ones costs far more.
constexpr auto kCallerSpin = std::chrono::microseconds(200);

constexpr uint32_t kCountMask = 0xfff;       // workers inside the job
constexpr uint32_t kOpen = 1u << 12;         // workers may enter
constexpr uint32_t kCallerWaits = 1u << 13;  // the last worker to leave wakes the caller
constexpr uint32_t kEpoch = 1u << 14;        // counts jobs, modulo 2^18: a worker that mistakes one only misses it

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // "yield" is a no-op on most cores; this takes about as long as x86's pause
#endif
}

// Spins until `ready()`, for at most `limit`.
template <typename Ready>
bool spin_until(Ready ready, Clock::duration limit) {
  for (int i = 0; i < 64; ++i) {
    if (ready()) return true;
    pause();
  }
  for (const Clock::time_point end = Clock::now() + limit; Clock::now() < end;) {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return true;
      pause();
    }
  }
  return ready();
}

thread_local bool inside_task = false;

void run_inline(int64_t tasks, const TaskRef& task) {
  std::exception_ptr error;
  const bool nested = std::exchange(inside_task, true);
  for (int64_t i = 0; i < tasks; ++i) {
    try {
      task(i, 0);
    } catch (...) {
      if (!error) error = std::current_exception();
    }
  }
  inside_task = nested;
  if (error) std::rethrow_exception(error);
}

class Pool {
 public:
  bool try_acquire() {
    return !busy_.load(std::memory_order_relaxed) && !busy_.exchange(true, std::memory_order_acquire);
  }

  // The three below need the pool acquired; `wake` and `run` release it.

  // Brings the number of workers to `threads` - 1, or as many as the system grants.
  void resize(int threads, bool spin) {
    if (threads_ == threads) return;
    threads_ = threads;
    stop_workers();
    spin_.store(spin, std::memory_order_relaxed);
    try {
      workers_.reserve(threads - 1);
      for (int id = 1; id < threads; ++id) workers_.emplace_back([this, id] { work(id); });
    } catch (...) {
      // No thread or memory to be had: with fewer workers the caller finishes what they do not take.
    }
  }

  // Workers that sleep wake up, and spin as the others do.
  void wake() {
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      epoch_ += kEpoch;
      state_.store(epoch_, std::memory_order_seq_cst);  // a job that is not open
      state_.notify_all();
    }
    busy_.store(false, std::memory_order_release);
  }

  void hold_awake() { holds_.fetch_add(1, std::memory_order_relaxed); }
  void let_sleep() { holds_.fetch_sub(1, std::memory_order_relaxed); }
  bool held_awake() const { return holds_.load(std::memory_order_relaxed) > 0; }

  void run(int64_t tasks, const TaskRef& task) {
    task_ = &task;
    tasks_ = tasks;
    next_.store(0, std::memory_order_relaxed);
    epoch_ += kEpoch;
    state_.store(epoch_ | kOpen, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      if (tasks > static_cast<int64_t>(workers_.size())) {
        state_.notify_all();
      } else {
        for (int64_t i = 1; i < tasks; ++i) state_.notify_one();
      }
    }
    take_tasks(0);
    state_.fetch_and(~kOpen, std::memory_order_relaxed);
    wait_for_workers();
    const std::exception_ptr error = std::exchange(error_, nullptr);
    busy_.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
  }

 private:
  void stop_workers() {
    if (workers_.empty()) return;
    stop_.store(true, std::memory_order_relaxed);
    epoch_ += kEpoch;
    state_.store(epoch_, std::memory_order_seq_cst);
    state_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stop_.store(false, std::memory_order_relaxed);
  }

  void take_tasks(int thread) {
    const TaskRef& task = *task_;
    const int64_t tasks = tasks_;
    inside_task = true;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      try {
        task(i, thread);
      } catch (...) {
        const std::lock_guard lock(error_mutex_);
        if (!error_ || i < error_task_) {
          error_ = std::current_exception();
          error_task_ = i;
        }
      }
    }
    inside_task = false;
  }

  void wait_for_workers() {
    const auto all_left = [this] { return (state_.load(std::memory_order_acquire) & kCountMask) == 0; };
    if (all_left() || (spin_.load(std::memory_order_relaxed) && spin_until(all_left, kCallerSpin))) return;
    const uint32_t ticket = wakes_.load(std::memory_order_relaxed);
    if ((state_.fetch_or(kCallerWaits, std::memory_order_acq_rel) & kCountMask) == 0) return;
    wakes_.wait(ticket, std::memory_order_acquire);  // changes once, after the last worker has left
  }

  void work(int id) {
    // Each job is entered at most once: a worker that left has seen the counter run out.
    for (uint32_t seen = 0;;) {
      uint32_t state = state_.load(std::memory_order_acquire);
      if (epoch_of(state) == seen) state = wait_for_epoch_after(seen);
      if (stop_.load(std::memory_order_relaxed)) return;
      seen = epoch_of(state);
      while (epoch_of(state) == seen && (state & kOpen)) {
        if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel, std::memory_order_acquire))
          continue;
        take_tasks(id);
        const uint32_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
        if ((before & kCountMask) == 1 && (before & kCallerWaits)) {
          wakes_.fetch_add(1, std::memory_order_release);
          wakes_.notify_one();
        }
        break;
      }
    }
  }

  static uint32_t epoch_of(uint32_t state) { return state & ~(kEpoch - 1); }

  uint32_t wait_for_epoch_after(uint32_t seen) {
    uint32_t state;
    const auto changed = [&] { return epoch_of(state = state_.load(std::memory_order_acquire)) != seen; };
    if (changed()) return state;
    if (spin_.load(std::memory_order_relaxed)) {
      if (spin_until(changed, kWorkerSpin)) return state;
      // A program's thread that builds the next operations meanwhile may have no other core.
      for (; held_awake(); std::this_thread::yield())
        for (int i = 0; i < 16; ++i) {
          if (changed()) return state;
          pause();
        }
    }
    // Either the caller sees this sleeper, or this thread sees the caller's job: both orders are sequentially
    // consistent.
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    for (state = state_.load(std::memory_order_seq_cst); epoch_of(state) == seen;
         state = state_.load(std::memory_order_acquire)) {
      state_.wait(state, std::memory_order_acquire);
    }
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
    return state;
  }

  alignas(kCacheLine) std::atomic<bool> busy_{false};
  alignas(kCacheLine) std::atomic<uint32_t> state_{0};
  std::atomic<int> sleepers_{0};
  alignas(kCacheLine) std::atomic<int64_t> next_{0};
  alignas(kCacheLine) std::atomic<uint32_t> wakes_{0};
  std::atomic<bool> stop_{false};
  std::atomic<bool> spin_{false};
  std::atomic<int> holds_{0};  // of AwakeWorkers

  // Written by the owner of `busy_` before it publishes a job; read by workers inside it.
  const TaskRef* task_ = nullptr;
  int64_t tasks_ = 0;
  int threads_ = 1;
  uint32_t epoch_ = 0;
  std::vector<std::thread> workers_;

  std::mutex error_mutex_;
  std::exception_ptr error_;
  int64_t error_task_ = 0;
};

// The pool and its workers are never destroyed: a thread may still be at work, or call, while the process exits.
std::atomic<Pool*> process_pool{nullptr};
std::atomic<int> chosen_threads{0};  // of set_thread_count; 0 = the default

// A child of fork() has none of the workers, and the pool may have been in use: it starts afresh and leaves the
// parent's copy alone. (A task must not return in a child that it forked itself.)
std::atomic<Pool*> parents_pool{nullptr};  // reachable, so that leak checkers know it

void forget_pool() {
  if (Pool* old = process_pool.exchange(nullptr, std::memory_order_relaxed)) parents_pool = old;
  inside_task = false;
}

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
#endif

Pool& pool() {
  if (Pool* existing = process_pool.load(std::memory_order_acquire)) return *existing;
  Pool* created = new Pool;
  Pool* expected = nullptr;
  if (process_pool.compare_exchange_strong(expected, created, std::memory_order_acq_rel)) return *created;
  delete created;  // another thread was faster
  return *expected;
}

// The value of `compute`, once. Two threads may both compute it: a function-local static would lock, and a fork at that
// moment would leave the lock held in the child.
template <typename Compute>
int remember(std::atomic<int>& cache, Compute compute) {
  int value = cache.load(std::memory_order_relaxed);
  if (value == 0) cache.store(value = compute(), std::memory_order_relaxed);
  return value;
}

int cores() {
  static constinit std::atomic<int> cache{0};
  return remember(cache, usable_cores);
}

int default_threads() {
  static constinit std::atomic<int> cache{0};
  return remember(cache, [] {
    const auto wanted = static_cast<int>(environment_threads().value.value_or(cores()));
    return std::min({cores(), wanted, static_cast<int>(kCountMask)});
  });
}

}  // namespace

int thread_count() {
  const int chosen = chosen_threads.load(std::memory_order_relaxed);
  return chosen > 0 ? chosen : default_threads();
}

void set_thread_count(int count) {
  const int limit = static_cast<int>(kCountMask);
  check(count >= 0 && count <= limit, "set_thread_count", "count must be from 0 to ", limit, "; got ", count);
  chosen_threads.store(count, std::memory_order_relaxed);
}

void parallel_for(int64_t tasks, TaskRef task) {
  const int threads = thread_count();
  if (tasks <= 1 || threads == 1 || inside_task) return run_inline(tasks, task);
  Pool& shared = pool();
  if (!shared.try_acquire()) return run_inline(tasks, task);
  shared.resize(threads, threads <= cores());
  shared.run(tasks, task);
}

AwakeWorkers::AwakeWorkers() {
  const int threads = thread_count();
  if (threads == 1 || threads > cores() || inside_task) return;
  Pool& shared = pool();
  shared.hold_awake();
  pool_ = &shared;
  if (!shared.try_acquire()) return;  // they are awake
  shared.resize(threads, true);
  shared.wake();
}

AwakeWorkers::~AwakeWorkers() {
  if (pool_) static_cast<Pool*>(pool_)->let_sleep();
}

bool workers_are_awake() {
  const Pool* existing = process_pool.load(std::memory_order_acquire);
  return existing && existing->held_awake();
}

}  // namespace mfa
