#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace fssa {
namespace {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The tasks of one call, taken by whoever is free.
class Job {
 public:
  Job(int64_t tasks, void (*run)(void *, int64_t), void *context) : tasks_(tasks), run_(run), context_(context) {}

  void work() {
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) {
      try {
        run_(context_, task);
      } catch (const std::bad_alloc &) {
        failed_.store(true);
      }
    }
  }
  int64_t tasks() const { return tasks_; }
  bool failed() const { return failed_.load(); }

 private:
  const int64_t tasks_;
  void (*const run_)(void *, int64_t);
  void *const context_;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> failed_{false};
};

// How compilers begin a parallel region of OpenMP, in the runtime that torch brought; null where it brought none.
using Region = void (*)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
Region openmp_region() {
  static const auto region = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return region;
}

// The job on offer, in one word: its number (upper half), whether it may still be joined, and how many workers are in it.
constexpr uint64_t OPEN = 1u << 31;
constexpr uint64_t WORKERS = OPEN - 1;
constexpr int SPINS = 2000;  // some tens of microseconds: the next op of a decode step often comes within that

// Threads of our own, for where OpenMP's cannot be had.
class Pool {
 public:
  void run(int threads, Job &job) {
    const int helpers = static_cast<int>(job.tasks() - 1 < threads - 1 ? job.tasks() - 1 : threads - 1);
    while (started_ < helpers) {
      std::thread([this, seen = number(state_.load())] { work(seen); }).detach();
      started_++;
    }
    job_ = &job, helpers_ = helpers;  // seen by whoever sees the number below, since that is stored after
    state_.store(((number(state_.load()) + 1) << 32) | OPEN);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    job.work();
    // A worker that has not joined by now need not be waited for.
    state_.fetch_and(~OPEN);
    for (int spins = 0; (state_.load(std::memory_order_acquire) & WORKERS) != 0; spins++) {
      spins < SPINS ? pause() : std::this_thread::yield();
    }
  }

 private:
  static uint64_t number(uint64_t state) { return state >> 32; }

  void work(uint64_t seen) {
    for (;;) {
      int spins = 0;
      // A while in a loop first: to be woken takes longer than most jobs.
      while (number(state_.load(std::memory_order_acquire)) == seen && spins < SPINS) pause(), spins++;
      if (spins == SPINS) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return number(state_.load()) != seen; });
        sleepers_.fetch_sub(1);
      }
      uint64_t state = state_.load();
      seen = number(state);
      // Joins by adding itself to the word that it read: if the job was closed or replaced meanwhile, that fails.
      while (number(state) == seen && (state & OPEN) && (state & WORKERS) < static_cast<uint64_t>(helpers_.load())) {
        if (state_.compare_exchange_weak(state, state + 1)) {
          job_->work();
          state_.fetch_sub(1, std::memory_order_release);
          break;
        }
      }
    }
  }

  int started_ = 0;

  std::atomic<uint64_t> state_{0};
  std::atomic<int> helpers_{0};
  Job *job_ = nullptr;  // written between jobs, read by those who joined one

  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};
};

struct Threads {
  std::mutex turn;  // held by the caller whose job is being done
  bool forked = false;
  Pool pool;
};

// Never destroyed: the pool's threads may outlive main.
Threads *all_threads = [] {
  // No thread survives a fork, neither ours nor OpenMP's, and the child's copy of their state may be anything.
  pthread_atfork(nullptr, nullptr, [] {
    all_threads = new Threads;
    all_threads->forked = true;
  });
  return new Threads;
}();

struct Block {
  char *data;
  size_t size;
};

constexpr size_t ALIGNMENT = 64;
constexpr size_t SMALLEST_BLOCK = size_t{1} << 20;
constexpr size_t KEPT = size_t{64} << 20;  // a thread that ever needed more gives everything back

struct Arena {
  std::vector<Block> blocks;
  size_t block = 0, used = 0;
  int depth = 0;

  ~Arena() { release(); }

  void release() {
    for (const Block &b : blocks) std::free(b.data);
    blocks.clear();
    block = used = 0;
  }
};

thread_local Arena arena;

}  // namespace

void run_tasks(int threads, int64_t tasks, void (*run)(void *, int64_t), void *context) {
  Job job(tasks, run, context);
  Threads &all = *all_threads;
  std::unique_lock<std::mutex> turn(all.turn, std::try_to_lock);
  const Region region = openmp_region();
  if (!turn.owns_lock()) {
    job.work();
  } else if (region && !all.forked) {
    // Always as many threads as torch has: a smaller team would end the others.
    region([](void *data) { static_cast<Job *>(data)->work(); }, &job, static_cast<unsigned>(threads), 0);
  } else {
    all.pool.run(threads, job);
  }
  if (job.failed()) throw std::bad_alloc();
}

Scratch::Scratch() : block_(arena.block), used_(arena.used) { arena.depth++; }

Scratch::~Scratch() {
  arena.block = block_;
  arena.used = used_;
  if (--arena.depth == 0) {
    size_t total = 0;
    for (const Block &b : arena.blocks) total += b.size;
    if (total > KEPT) arena.release();
  }
}

void *Scratch::bytes(size_t size) {
  size = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  for (; arena.block < arena.blocks.size(); arena.block++, arena.used = 0) {
    const Block &b = arena.blocks[arena.block];
    if (arena.used + size <= b.size) {
      arena.used += size;
      return b.data + arena.used - size;
    }
  }
  const size_t grown = arena.blocks.empty() ? SMALLEST_BLOCK : 2 * arena.blocks.back().size;
  Block b{nullptr, size > grown ? size : grown};
  if (size > static_cast<size_t>(INT64_MAX) || posix_memalign(reinterpret_cast<void **>(&b.data), ALIGNMENT, b.size)) {
    throw std::bad_alloc();
  }
  arena.blocks.push_back(b);
  arena.used = size;
  return b.data;
}

}  // namespace fssa
