// The fibers, the barriers and the memory of emulation.h; drawn numbers come from fssa_emulation_seed.
#include "emulation.h"

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <unordered_set>
#include <vector>

#if defined(__x86_64__)
// Saves the registers that a call keeps and the stack's address in *from; goes on where `to` was saved.
extern "C" void fssa_switch(void **from, void *to);
asm(R"(
.text
.globl fssa_switch
.type fssa_switch, @function
fssa_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

namespace emulation {

Index thread_index, block_index, block_size;

namespace {

constexpr size_t STACK = 256 * 1024;
constexpr size_t SECTOR = 32;  // bytes: what memory moves at a time

struct Copy {
  void *to;
  const void *from;
  int bytes;
  bool done;
};

struct Fiber {
#if defined(__x86_64__)
  void *stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char *stack = nullptr;
  void *fake_stack = nullptr;
  unsigned index = 0;
  bool finished = false;
  bool may_read = false;        // what the launch before wrote
  const char *waits = nullptr;  // for what
  std::vector<std::vector<Copy>> groups;
};

struct Warp {
  int arrived = 0, phase = 0;
  const char *kind = nullptr;
  uint32_t words[2][32][8];
};

struct Counts {
  int64_t launches = 0, read = 0, written = 0, multiply_adds = 0;
  std::unordered_set<uintptr_t> sectors_read, sectors_written;
};

std::mt19937_64 draw{0};
std::map<std::string, Counts> counts;
Counts *counted = nullptr;
bool counting = false;
std::string kernel_name;

std::unordered_set<uintptr_t> written, written_before;  // words of 4 bytes: by this launch, by the one before
bool early_launch = false;

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<unsigned> ready;  // fibers that can go on
unsigned running = 0, at_barrier = 0, finished = 0;
unsigned char *shared_begin = nullptr;
size_t shared_size = 0;
const std::function<void()> *body = nullptr;
Fiber scheduler;

[[maybe_unused]] const void *main_stack = nullptr;  // by AddressSanitizer alone
[[maybe_unused]] size_t main_stack_size = 0;

void switch_fibers(Fiber &from, Fiber &to, bool last) {
#if defined(__SANITIZE_ADDRESS__)
  const bool home = &to == &scheduler;
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, home ? main_stack : to.stack,
                                 home ? main_stack_size : STACK);
#else
  (void)last;
#endif
#if defined(__x86_64__)
  fssa_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void *bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(from.fake_stack, &bottom, &size);
  if (&from != &scheduler) main_stack = bottom, main_stack_size = size;
#endif
}

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_size);
#endif
  (*body)();
  Fiber &self = fibers[running];
  self.finished = true;
  finished++;
  switch_fibers(self, scheduler, true);
  std::abort();
}

void prepare(Fiber &fiber) {
  if (fiber.stack == nullptr) {
    void *memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) stop("no memory for a thread's stack");
    fiber.stack = static_cast<char *>(memory);
  }
  fiber.finished = false;
  fiber.may_read = !early_launch;
  fiber.waits = nullptr;
  fiber.fake_stack = nullptr;
  fiber.groups.assign(1, {});
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, STACK);
#endif
#if defined(__x86_64__)
  void **top = reinterpret_cast<void **>(fiber.stack + STACK) - 2;  // where `enter` returns to: nowhere
  *top = reinterpret_cast<void *>(&enter);
  fiber.stack_pointer = top - 6;
  std::memset(fiber.stack_pointer, 0, 6 * sizeof(void *));
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &enter, 0);
#endif
}

void wait_for(const char *what) {
  fibers[running].waits = what;
  switch_fibers(fibers[running], scheduler, false);
}

void wake(unsigned from, unsigned to) {
  for (unsigned i = from; i < to; i++) {
    fibers[i].waits = nullptr;
    ready.push_back(i);
  }
}

void run_block(unsigned threads) {
  ready.clear();
  at_barrier = finished = 0;
  warps.assign(threads / 32, Warp());
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned i = 0; i < threads; i++) {
    fibers[i].index = i;
    prepare(fibers[i]);
  }
  wake(0, threads);
  while (!ready.empty()) {
    const size_t pick = draw() % ready.size();
    running = ready[pick];
    ready[pick] = ready.back();
    ready.pop_back();
    thread_index.x = running;
    switch_fibers(scheduler, fibers[running], false);
  }
  if (finished != threads) {
    for (unsigned i = 0; i < threads; i++) {
      if (!fibers[i].finished) stop((std::string("threads wait for others that never come, at a ") + fibers[i].waits).c_str());
    }
  }
}

bool is_shared(const void *at) {
  const auto *byte = static_cast<const unsigned char *>(at);
  return byte >= shared_begin && byte < shared_begin + shared_size;
}

void mark(std::unordered_set<uintptr_t> &sectors, const void *at, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(at);
  for (uintptr_t sector = begin / SECTOR; sector <= (begin + bytes - 1) / SECTOR; sector++) sectors.insert(sector);
}

void perform(Copy &copy) {
  if (copy.done) return;
  copy.done = true;
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  std::memset(static_cast<char *>(copy.to) + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
}

}  // namespace

void stop(const char *what) {
  std::fprintf(stderr, "emulation: %s: block (%u, %u), thread %u: %s\n", kernel_name.c_str(), block_index.x, block_index.y,
               thread_index.x, what);
  std::fflush(stderr);
  std::_Exit(70);
}

void barrier() {
  if (finished != 0) stop("a barrier after a thread of the block has ended");
  if (++at_barrier == block_size.x) {
    at_barrier = 0;
    wake(0, block_size.x);
  }
  wait_for("barrier");
}

const uint32_t (*exchange(const char *kind, const uint32_t *words, int count))[8] {
  Warp &warp = warps[running / 32];
  if (warp.arrived != 0 && warp.kind != kind && std::strcmp(warp.kind, kind) != 0) {
    stop((std::string("a warp's lanes meet at different operations: ") + warp.kind + " and " + kind).c_str());
  }
  const int phase = warp.phase;
  warp.kind = kind;
  std::memcpy(warp.words[phase][running % 32], words, static_cast<size_t>(count) * 4);
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    warp.phase = 1 - phase;
    wake(running / 32 * 32, running / 32 * 32 + 32);
  }
  wait_for(kind);
  return warp.words[phase];
}

unsigned char *shared() { return shared_begin; }

void copy_async(void *to, const void *from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    stop("cp.async: an address that is no multiple of 16");
  }
  if (bytes < 0 || bytes > 16) stop("cp.async: not 0 to 16 bytes");
  if (bytes) count_read(from, static_cast<size_t>(bytes));
  fibers[running].groups.back().push_back({to, from, bytes, false});
  if (draw() % 2) perform(fibers[running].groups.back().back());
}

void copy_commit() { fibers[running].groups.emplace_back(); }

void copy_wait(int later) {
  auto &groups = fibers[running].groups;  // the last one has not been committed
  while (groups.size() > static_cast<size_t>(later) + 1) {
    for (Copy &copy : groups.front()) perform(copy);
    groups.erase(groups.begin());
  }
}

void wait_for_launch_before() { fibers[running].may_read = true; }

void count_read(const void *from, size_t bytes) {
  if (is_shared(from)) return;
  if (!fibers[running].may_read) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(from);
    for (uintptr_t word = begin / 4; word <= (begin + bytes - 1) / 4; word++) {
      if (written_before.count(word)) stop("reads what the launch before wrote, and has not waited for it");
    }
  }
  if (!counting) return;
  counted->read += static_cast<int64_t>(bytes);
  mark(counted->sectors_read, from, bytes);
}

void count_write(const void *to, size_t bytes) {
  if (is_shared(to)) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(to);
  for (uintptr_t word = begin / 4; word <= (begin + bytes - 1) / 4; word++) written.insert(word);
  if (!counting) return;
  counted->written += static_cast<int64_t>(bytes);
  mark(counted->sectors_written, to, bytes);
}

void count_products(int64_t multiply_adds) {
  if (counting) counted->multiply_adds += multiply_adds;
}

void run(const char *name, unsigned x, unsigned y, unsigned z, unsigned threads, size_t shared_bytes, bool early,
         const std::function<void()> &kernel) {
  kernel_name = name;
  early_launch = early;
  written_before.swap(written);
  written.clear();
  block_size = {threads, 1, 1};
  if (threads == 0 || threads % 32 || threads > 1024) stop("a block's threads: expected whole warps, 1024 at most");
  if (x == 0 || y == 0 || z == 0 || y > 65535 || z > 65535) stop("a grid with no or too many blocks");
  if (shared_bytes > MOST_SHARED) stop("more shared memory than a block may have");
  counted = &counts[name];
  counted->launches++;
  body = &kernel;
  std::vector<uint64_t> blocks(static_cast<size_t>(x) * y * z);
  for (size_t i = 0; i < blocks.size(); i++) blocks[i] = i;
  for (size_t i = blocks.size(); i > 1; i--) std::swap(blocks[i - 1], blocks[draw() % i]);
  for (const uint64_t block : blocks) {
    block_index = {static_cast<unsigned>(block % x), static_cast<unsigned>(block / x % y),
                   static_cast<unsigned>(block / x / y)};
    shared_begin = static_cast<unsigned char *>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16 + 16));
    shared_size = shared_bytes;
    std::memset(shared_begin, 0xff, shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(shared_begin + shared_bytes, (shared_bytes + 15) / 16 * 16 + 16 - shared_bytes);
#endif
    run_block(threads);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(shared_begin, (shared_bytes + 15) / 16 * 16 + 16);
#endif
    std::free(shared_begin);
    shared_begin = nullptr;
    shared_size = 0;
  }
}

}  // namespace emulation

extern "C" {

__attribute__((visibility("default"))) void fssa_emulation_seed(uint64_t seed) { emulation::draw.seed(seed); }

// Counts from here on, from zero, or no longer.
__attribute__((visibility("default"))) void fssa_emulation_count(int on) {
  emulation::counting = on != 0;
  if (on) emulation::counts.clear();
}

// What was counted: a line a kernel with its launches, bytes read, bytes written, distinct bytes read and written (in
// sectors of 32), and products.
__attribute__((visibility("default"))) const char *fssa_emulation_counts() {
  static std::string text;
  text.clear();
  for (const auto &[name, c] : emulation::counts) {
    text += name;
    for (const int64_t number :
         {c.launches, c.read, c.written, static_cast<int64_t>(c.sectors_read.size() * emulation::SECTOR),
          static_cast<int64_t>(c.sectors_written.size() * emulation::SECTOR), c.multiply_adds}) {
      text += "\t" + std::to_string(number);
    }
    text += "\n";
  }
  return text.c_str();
}

}  // extern "C"
