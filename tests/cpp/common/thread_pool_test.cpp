#include "common/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support/sanitizer.h"

namespace mfa {
namespace {

// Restores the default number of threads after each test.
class ThreadPool : public ::testing::Test {
 protected:
  ~ThreadPool() override { set_thread_count(0); }
};

// Runs `tasks` tasks and checks that each ran once, on a valid thread id that no two threads share.
void check_parallel_for(int64_t tasks) {
  std::vector<std::atomic<int>> runs(tasks);
  std::vector<std::atomic<std::thread::id>> owner(thread_count());
  std::atomic<int> wrong_threads{0};
  parallel_for(tasks, [&](int64_t task, int thread) {
    runs[task].fetch_add(1);
    if (thread < 0 || thread >= static_cast<int>(owner.size())) {
      wrong_threads.fetch_add(1);
      return;
    }
    std::thread::id expected{};
    const std::thread::id self = std::this_thread::get_id();
    if (!owner[thread].compare_exchange_strong(expected, self) && expected != self) wrong_threads.fetch_add(1);
  });
  EXPECT_EQ(wrong_threads.load(), 0);
  for (int64_t i = 0; i < tasks; ++i) ASSERT_EQ(runs[i].load(), 1) << "task " << i << " of " << tasks;
}

void spend(std::chrono::microseconds time) {
  const auto end = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < end) {
  }
}

TEST_F(ThreadPool, RunsEveryTaskOnceForAnyCounts) {
  for (int threads : {1, 2, 3, 7, 16}) {
    set_thread_count(threads);
    EXPECT_EQ(thread_count(), threads);
    for (int64_t tasks : {0, 1, 2, 3, 5, 16, 17, 100, 5000}) check_parallel_for(tasks);
  }
}

TEST_F(ThreadPool, ANegativeCountIsRefused) {
  EXPECT_THROW(set_thread_count(-1), std::invalid_argument);
  EXPECT_THROW(set_thread_count(1 << 20), std::invalid_argument);
  EXPECT_GE(thread_count(), 1);
}

TEST_F(ThreadPool, WritesOfTasksAreVisibleToTheCallerAndTheNextCall) {
  set_thread_count(3);
  std::vector<int64_t> values(64, 0);  // plain memory: ThreadSanitizer checks the order
  for (int round = 0; round < 3000; ++round) {
    parallel_for(64, [&](int64_t task, int) { values[task] += task; });
    ASSERT_EQ(values[63], int64_t{63} * (round + 1));
    for (int64_t& value : values) value += 0;
  }
}

TEST_F(ThreadPool, WorkersThatSleepAreWokenAndShareTheWork) {
  set_thread_count(2);
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // longer than a worker spins
    std::atomic<int> started{0};
    bool met = false;
    // Two tasks that wait for each other end only if two threads run them.
    parallel_for(2, [&](int64_t task, int) {
      started.fetch_add(1);
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (started.load() < 2 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
      if (task == 0) met = started.load() == 2;
    });
    ASSERT_TRUE(met);
  }
}

TEST_F(ThreadPool, WorkersThatAreHeldAwakeShareJobsAndSleepAfterwards) {
  EXPECT_FALSE(workers_are_awake());
  set_thread_count(2);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // longer than a worker spins
    const AwakeWorkers outer;
    for (int jobs = 0; jobs < 20; ++jobs) {
      const AwakeWorkers inner;
      spend(std::chrono::microseconds(jobs * 20));
      check_parallel_for(8);
    }
  }
  EXPECT_FALSE(workers_are_awake());
  set_thread_count(1);
  const AwakeWorkers none;
  EXPECT_FALSE(workers_are_awake());
}

TEST_F(ThreadPool, ManyThreadsMayHoldWorkersAwakeAtOnce) {
  set_thread_count(2);
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([] {
      for (int round = 0; round < 200; ++round) {
        const AwakeWorkers awake;
        std::atomic<int> done{0};
        parallel_for(4, [&](int64_t, int) { done.fetch_add(1); });
        EXPECT_EQ(done.load(), 4);
        if (round % 50 == 0) set_thread_count(2 + round / 50 % 2);  // workers end while they are held awake
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_FALSE(workers_are_awake());
}

TEST_F(ThreadPool, TheCallerWaitsForLongTasksOfWorkers) {
  set_thread_count(2);
  for (int round = 0; round < 10; ++round) {
    std::atomic<int> done{0};
    parallel_for(2, [&](int64_t, int thread) {
      // The worker, if it takes part, is still busy long after the caller has begun to wait, and then to sleep.
      if (thread == 1)
        std::this_thread::sleep_for(std::chrono::milliseconds(3));
      else
        spend(std::chrono::microseconds(300));
      done.fetch_add(1);
    });
    ASSERT_EQ(done.load(), 2);
  }
}

TEST_F(ThreadPool, ACallInsideATaskRunsOnItsThread) {
  set_thread_count(3);
  for (int64_t outer_tasks : {1, 8}) {
    std::atomic<int> wrong{0}, count{0};
    parallel_for(outer_tasks, [&](int64_t, int) {
      const std::thread::id self = std::this_thread::get_id();
      parallel_for(16, [&](int64_t, int thread) {
        if (std::this_thread::get_id() != self || thread != 0) wrong.fetch_add(1);
        count.fetch_add(1);
      });
    });
    EXPECT_EQ(wrong.load(), 0);
    EXPECT_EQ(count.load(), outer_tasks * 16);
  }
}

TEST_F(ThreadPool, ABusyPoolRunsASecondCallerInline) {
  set_thread_count(2);
  std::atomic<bool> release{false};
  std::atomic<int> holders{0};
  std::thread holder([&] {
    parallel_for(2, [&](int64_t, int) {
      holders.fetch_add(1);
      while (!release.load()) std::this_thread::yield();
    });
  });
  while (holders.load() == 0) std::this_thread::yield();
  const std::thread::id self = std::this_thread::get_id();
  int elsewhere = 0;
  parallel_for(32, [&](int64_t, int thread) { elsewhere += std::this_thread::get_id() != self || thread != 0; });
  release.store(true);
  holder.join();
  EXPECT_EQ(elsewhere, 0);
}

TEST_F(ThreadPool, TheExceptionOfTheFirstTaskIsThrownAfterAllHaveEnded) {
  for (int threads : {1, 2, 4}) {
    set_thread_count(threads);
    for (int round = 0; round < 50; ++round) {
      std::atomic<int> ended{0};
      std::string message;
      try {
        parallel_for(40, [&](int64_t task, int) {
          if (task % 10 == 3) {
            ended.fetch_add(1);
            throw std::runtime_error("task " + std::to_string(task));
          }
          ended.fetch_add(1);
        });
      } catch (const std::runtime_error& error) {
        message = error.what();
      }
      ASSERT_EQ(message, "task 3");
      ASSERT_EQ(ended.load(), 40);
    }
    check_parallel_for(100);  // the pool is as before
  }
}

TEST_F(ThreadPool, AnExceptionInANestedCallPassesThrough) {
  set_thread_count(2);
  EXPECT_THROW(parallel_for(4,
                            [&](int64_t, int) {
                              parallel_for(4, [](int64_t task, int) {
                                if (task == 2) throw std::logic_error("inner");
                              });
                            }),
               std::logic_error);
  check_parallel_for(100);
}

TEST_F(ThreadPool, ManyCallersAtOnceAllFinish) {
  set_thread_count(3);
  std::vector<std::thread> callers;
  std::atomic<int64_t> total{0};
  for (int c = 0; c < 12; ++c) {
    callers.emplace_back([&, c] {
      std::vector<int64_t> sums(64);
      for (int round = 0; round < 200; ++round) {
        parallel_for(64, [&](int64_t task, int) { sums[task] += c; });
      }
      for (int64_t sum : sums) total.fetch_add(sum);
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(total.load(), int64_t{66} * 200 * 64);  // 0 + ... + 11 = 66
}

TEST_F(ThreadPool, TheCountMayChangeWhileOthersCall) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c) {
    callers.emplace_back([&] {
      while (!stop.load()) {
        std::vector<std::atomic<int>> runs(20);
        parallel_for(20, [&](int64_t task, int) { runs[task].fetch_add(1); });
        for (const auto& run : runs) ASSERT_EQ(run.load(), 1);
      }
    });
  }
  for (int round = 0; round < 60; ++round) {
    set_thread_count(1 + round % 4);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  stop.store(true);
  for (std::thread& caller : callers) caller.join();
}

// Runs `body` in a child process and returns its exit status; a child that hangs is ended by its alarm.
template <typename Body>
int exit_status_of_child(Body body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    _exit(body() ? 0 : 1);
  }
  int status = -1;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// True if two tasks run at the same time in this process.
bool pool_has_a_worker() {
  std::atomic<int> started{0}, met{0};
  parallel_for(2, [&](int64_t, int) {
    started.fetch_add(1);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (started.load() < 2 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    met.fetch_add(started.load() == 2);
  });
  return met.load() == 2;
}

// Starts a pool of two threads and waits until its worker runs. AddressSanitizer's allocator has no fork handler: a
// thread that is just being born may hold its lock, which a fork would leave held in the child, whose first new thread
// then waits for ever.
void start_pool_of_two() {
  set_thread_count(2);
  ASSERT_TRUE(pool_has_a_worker());
}

TEST_F(ThreadPool, AChildOfForkGetsItsOwnWorkers) {
  if (testing::kThreadSanitizer) GTEST_SKIP() << "children of fork() start threads";
  start_pool_of_two();
  EXPECT_EQ(exit_status_of_child(pool_has_a_worker), 0);
  EXPECT_TRUE(pool_has_a_worker());
}

TEST_F(ThreadPool, AForkWhileAnotherThreadUsesThePoolIsSafe) {
  if (testing::kThreadSanitizer) GTEST_SKIP() << "children of fork() start threads";
  start_pool_of_two();
  std::atomic<bool> stop{false}, started{false};
  std::thread user([&] {
    while (!stop.load()) {
      parallel_for(8, [](int64_t, int) { spend(std::chrono::microseconds(20)); });
      started.store(true);
    }
  });
  while (!started.load()) std::this_thread::yield();
  for (int round = 0; round < 10; ++round) {
    EXPECT_EQ(exit_status_of_child([] {
                for (int i = 0; i < 20; ++i) {
                  if (!pool_has_a_worker()) return false;
                }
                return true;
              }),
              0);
  }
  stop.store(true);
  user.join();
  check_parallel_for(100);
}

TEST_F(ThreadPool, AForkInsideATaskMayCallThePool) {
  if (testing::kThreadSanitizer) GTEST_SKIP() << "children of fork() start threads";
  start_pool_of_two();
  std::atomic<int> failures{0};
  parallel_for(4, [&](int64_t, int) { failures.fetch_add(exit_status_of_child(pool_has_a_worker) != 0); });
  EXPECT_EQ(failures.load(), 0);
}

TEST_F(ThreadPool, TheProcessMayExitWhileTasksRun) {
  if (testing::kThreadSanitizer) GTEST_SKIP() << "children of fork() start threads";
  set_thread_count(2);
  EXPECT_EQ(exit_status_of_child([] {
              std::thread([] {
                parallel_for(2, [](int64_t, int) { std::this_thread::sleep_for(std::chrono::seconds(30)); });
              }).detach();
              std::this_thread::sleep_for(std::chrono::milliseconds(5));
              std::exit(0);
              return true;
            }),
            0);
}

}  // namespace
}  // namespace mfa
