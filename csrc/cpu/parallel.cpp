#include "parallel.h"

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

// The job on offer, in one word: its number (upper half), whether it may still be joined, and how many workers are in it.
constexpr uint64_t OPEN = 1u << 31;
constexpr uint64_t WORKERS = OPEN - 1;
constexpr int SPINS = 2000;  // some tens of microseconds: the next op of a decode step often comes within that

class Pool {
 public:
  void run(int threads, int64_t tasks, void (*run)(void *, int64_t), void *context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) {
      for (int64_t task = 0; task < tasks; task++) run(context, task);
      return;
    }
    const int helpers = static_cast<int>(tasks - 1 < threads - 1 ? tasks - 1 : threads - 1);
    while (started_ < helpers) {
      std::thread([this, seen = number(state_.load())] { work(seen); }).detach();
      started_++;
    }
    run_ = run, context_ = context, tasks_ = tasks, helpers_ = helpers;
    failed_.store(false, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    state_.store(((number(state_.load()) + 1) << 32) | OPEN);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    do_tasks();
    // A worker that has not joined by now need not be waited for.
    state_.fetch_and(~OPEN);
    for (int spins = 0; (state_.load(std::memory_order_acquire) & WORKERS) != 0; spins++) {
      spins < SPINS ? pause() : std::this_thread::yield();
    }
    if (failed_.load()) throw std::bad_alloc();
  }

 private:
  static uint64_t number(uint64_t state) { return state >> 32; }

  void do_tasks() {
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) {
      try {
        run_(context_, task);
      } catch (const std::bad_alloc &) {
        failed_.store(true);
      }
    }
  }

  void work(uint64_t seen) {
    for (;;) {
      int spins = 0;
      while (number(state_.load(std::memory_order_acquire)) == seen && spins < SPINS) pause(), spins++;
      if (spins == SPINS) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return number(state_.load()) != seen; });
        sleepers_.fetch_sub(1);
      }
      uint64_t state = state_.load();
      seen = number(state);
      while (number(state) == seen && (state & OPEN) && (state & WORKERS) < static_cast<uint64_t>(helpers_.load())) {
        if (state_.compare_exchange_weak(state, state + 1)) {
          do_tasks();
          state_.fetch_sub(1, std::memory_order_release);
          break;
        }
      }
    }
  }

  std::mutex turn_;  // held by the caller whose job is on offer
  int started_ = 0;

  std::atomic<uint64_t> state_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::atomic<int> helpers_{0};
  void (*run_)(void *, int64_t) = nullptr;  // these three are written between jobs, read by those who joined one
  void *context_ = nullptr;
  int64_t tasks_ = 0;

  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};
};

// Never destroyed: its threads may outlive main.
Pool *pool = [] {
  // The threads do not exist in a forked child, and its copy of the pool may be in any state: begin anew.
  pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  return new Pool;
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
  pool->run(threads, tasks, run, context);
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
