// The pool of csrc/cpu/parallel.cpp by itself, for ThreadSanitizer: callers that compete for it, and scratch memory.
// Nothing brings an OpenMP runtime into this program, so that the pool's own threads do the work.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace {

void expect(bool holds, const char *what) {
  if (!holds) std::fprintf(stderr, "pool: %s\n", what), std::exit(3);
}

void call_many(int times) {
  std::vector<int64_t> found(97);
  for (int round = 0; round < times; round++) {
    fssa::parallel(4, 97, [&](int64_t task) {
      fssa::Scratch scratch;
      int64_t *own = scratch.integers(100 + task);
      for (int64_t i = 0; i < 100 + task; i++) own[i] = i;
      found[task] = own[99 + task] + round;
      if (round % 10 == 0) std::this_thread::sleep_for(std::chrono::microseconds(20));  // time for the others to come
    });
    for (int64_t task = 0; task < 97; task++) expect(found[task] == 99 + task + round, "a task was not done");
  }
}

}  // namespace

int main() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; i++) callers.emplace_back(call_many, 300);
  for (std::thread &caller : callers) caller.join();
  call_many(300);
  return 0;
}
