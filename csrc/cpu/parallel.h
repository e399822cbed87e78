// A persistent pool of threads, and scratch memory that outlives a call. No OpenMP: a second runtime beside the one that
// torch brings would fight it for the cores.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fssa {

// Runs run(context, task) for every task in [0, tasks), on at most `threads` threads, the caller's among them. A caller
// that finds the pool busy with another thread's call does its tasks alone. Safe after fork.
void run_tasks(int threads, int64_t tasks, void (*run)(void *context, int64_t task), void *context);

template <class Body>
inline __attribute__((always_inline)) void parallel(int threads, int64_t tasks, Body &&body) {
  struct Call {
    static void task(void *context, int64_t index) { (*static_cast<decltype(&body)>(context))(index); }
  };
  if (threads <= 1 || tasks <= 1) {
    for (int64_t index = 0; index < tasks; index++) body(index);
  } else {
    run_tasks(threads, tasks, Call::task, &body);
  }
}

// Memory of the calling thread, given back to it (not to the system) when the Scratch goes out of scope. Nested ones
// stack. Aligned to 64 bytes, contents undefined.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;

  float *floats(int64_t count) { return static_cast<float *>(bytes(count * sizeof(float))); }
  int64_t *integers(int64_t count) { return static_cast<int64_t *>(bytes(count * sizeof(int64_t))); }

 private:
  void *bytes(size_t size);  // throws std::bad_alloc
  size_t block_, used_;
};

}  // namespace fssa
