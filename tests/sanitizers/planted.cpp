// A fault for each sanitizer, by its name as the argument: what does not find it is not at work.
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstring>
#include <thread>

#include "cpu/parallel.h"

int main(int count, char **arguments) {
  const char *fault = count > 1 ? arguments[1] : "";
  if (std::strcmp(fault, "address") == 0) {
    volatile float *given_back = new float[3];
    delete[] given_back;
    given_back[1] = 1.0f;
  } else if (std::strcmp(fault, "undefined") == 0) {
    volatile int most = INT_MAX;
    most = most + count;
  } else if (std::strcmp(fault, "thread") == 0) {
    int64_t shared = 0;  // written by all threads of the pool
    for (int i = 0; i < 20; i++) {
      fssa::parallel(4, 64, [&](int64_t task) {
        shared += task;
        std::this_thread::sleep_for(std::chrono::microseconds(100));  // time for the others to come
      });
    }
    std::printf("%lld\n", static_cast<long long>(shared));
  }
  return 0;
}
