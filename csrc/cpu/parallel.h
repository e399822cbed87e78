// Threads, and scratch memory that outlives a call. The threads are those of the OpenMP runtime that torch brought, found
// when the program runs: after an op of torch they wait in a loop, and a second set of threads would share the cores with
// them. Linked against it we are not, since that might bring a second one. Where there is none, a pool of our own.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fssa {

// Runs run(context, task) for every task in [0, tasks), on at most `threads` threads, the caller's among them. A caller
// that finds the threads busy with another caller's tasks does its own alone. Safe after fork.
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
