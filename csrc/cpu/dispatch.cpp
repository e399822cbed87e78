// The CPU half of the C interface: checks what only the values show, and calls the ops of the machine's instruction set.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "ops.h"
#include "parallel.h"
#include "status.h"

FSSA_DECLARE_OPS(scalar)
#if defined(FSSA_X86)
FSSA_DECLARE_OPS(avx2)
#endif
#if defined(FSSA_AVX512)
FSSA_DECLARE_OPS(avx512)
#endif
#if defined(FSSA_AVX512_BF16)
FSSA_DECLARE_OPS(avx512_bf16)
#endif

namespace fssa {
namespace {

struct Isa {
  const char *name;
  bool (*supported)();
  decltype(scalar::film) *film;
  decltype(scalar::film_norm) *film_norm;
  decltype(scalar::film_backward) *film_backward;
  decltype(scalar::film_norm_backward) *film_norm_backward;
  decltype(scalar::lora) *lora;
  decltype(scalar::lora_backward) *lora_backward;
  decltype(scalar::context) *context;
  decltype(scalar::context_rows) *context_rows;
  decltype(scalar::context_backward) *context_backward;
  decltype(scalar::linear) *linear;
  decltype(scalar::adapt) *adapt;
  decltype(scalar::gate) *gate;
  decltype(scalar::attention) *attention;
  decltype(scalar::sample) *sample;
};

#define FSSA_OPS(ISA)                                                                                              \
  ISA::film, ISA::film_norm, ISA::film_backward, ISA::film_norm_backward, ISA::lora, ISA::lora_backward, ISA::context, \
      ISA::context_rows, ISA::context_backward, ISA::linear, ISA::adapt, ISA::gate, ISA::attention, ISA::sample

#if defined(FSSA_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif

const Isa isas[] = {  // the best last
    {"scalar", [] { return true; }, FSSA_OPS(scalar)},
#if defined(FSSA_X86)
    {"avx2",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     },
     FSSA_OPS(avx2)},
#endif
#if defined(FSSA_AVX512)
    {"avx512", has_avx512, FSSA_OPS(avx512)},
#endif
#if defined(FSSA_AVX512_BF16)
    {"avx512_bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }, FSSA_OPS(avx512_bf16)},
#endif
};

const Isa &named(const char *name, const char *source) {
  for (const Isa &isa : isas) {
    if (std::strcmp(isa.name, name) == 0) return isa;
  }
  const char *known = sizeof(isas) / sizeof(*isas) == 1 ? "scalar" : "scalar, avx2, avx512 or avx512_bf16";
  fail(FSSA_BAD_VALUE, "%s: expected %s, got %s", source, known, name);
}

const Isa &usable(const char *name, const char *source) {
  const Isa &isa = named(name, source);
  if (!isa.supported()) fail(FSSA_UNSUPPORTED, "%s: this machine has no %s", source, name);
  return isa;
}

std::atomic<const Isa *> current{nullptr};

const Isa &isa() {
  const Isa *known = current.load(std::memory_order_acquire);
  if (known) return *known;
  const char *wanted = std::getenv("FSSA_CPU_ISA");
  if (wanted) {
    known = &usable(wanted, "FSSA_CPU_ISA");
  } else {
    for (const Isa &candidate : isas) {
      if (candidate.supported()) known = &candidate;
    }
  }
  current.store(known, std::memory_order_release);
  return *known;
}

template <class Body>
fssa_status guarded(const Body &body) {
  try {
    body();
    return FSSA_OK;
  } catch (...) {
    return status_of_exception();
  }
}

template <class Body>
fssa_status with_scratch(const Body &body) {
  return guarded([&] {
    Scratch scratch;
    body(scratch);
  });
}

void check_index(const char *name, int64_t index, int64_t limit) {
  if (index < 0 || index >= limit) {
    fail(FSSA_BAD_INDEX, "%s: expected values in [0, %lld), got %lld", name, static_cast<long long>(limit),
         static_cast<long long>(index));
  }
}

// Integers of the caller, each read once into a copy: another thread may write to them during the call, and what was
// checked has to be what the op uses.
template <class Integer>
int64_t *copy_of(Scratch &scratch, const Integer *from, int64_t count) {
  int64_t *copy = scratch.integers(count);
  for (int64_t i = 0; i < count; i++) copy[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
  return copy;
}

// The arguments with a checked copy of their slots.
template <class Args>
Args with_slots(Scratch &scratch, Args args) {
  fssa_slots &slots = args.slots;
  const int64_t *copy = slots.is_int64 ? copy_of(scratch, static_cast<const int64_t *>(slots.data), slots.count)
                                       : copy_of(scratch, static_cast<const int32_t *>(slots.data), slots.count);
  for (int64_t i = 0; i < slots.count; i++) check_index("slots", copy[i], slots.limit);
  slots.data = copy;
  slots.is_int64 = 1;
  return args;
}

void check_attention(const fssa_attention_args &a) {
  const fssa_block_cache &cache = a.cache;
  for (int64_t n = 0; n < a.tokens.count; n++) {
    check_index("sequences", a.tokens.sequences[n], cache.sequences);
    check_index("positions", a.tokens.positions[n], a.rotary.positions);
    const int64_t last = a.tokens.positions[n] / 32;
    check_index("positions: blocks", last, cache.table_stride);
    for (int64_t block = 0; block <= last; block++) {
      check_index("table", cache.table[a.tokens.sequences[n] * cache.table_stride + block], cache.blocks);
    }
  }
}

// The arguments with checked copies of choices and offsets.
template <class Args>
Args with_choices(Scratch &scratch, Args args) {
  fssa_context_input &input = args.input;
  input.choices = copy_of(scratch, input.choices, input.pair_count);
  input.offsets = copy_of(scratch, input.offsets, input.users + 1);
  for (int64_t i = 0; i < input.pair_count; i++) {
    if (input.choices[i] != 0 && input.choices[i] != 1) {
      fail(FSSA_BAD_VALUE, "choices: expected 0 or 1, got %lld", static_cast<long long>(input.choices[i]));
    }
  }
  bool rising = input.offsets[0] == 0 && input.offsets[input.users] == input.pair_count;
  for (int64_t user = 0; user < input.users && rising; user++) {
    rising = input.offsets[user] <= input.offsets[user + 1];
  }
  if (!rising) {
    fail(FSSA_BAD_VALUE, "offsets: expected to rise from 0 to the %lld pairs, got %lld to %lld",
         static_cast<long long>(input.pair_count), static_cast<long long>(input.offsets[0]),
         static_cast<long long>(input.offsets[input.users]));
  }
  return args;
}

}  // namespace
}  // namespace fssa

using namespace fssa;

fssa_status fssa_cpu_isa(const char **name) {
  return guarded([&] { *name = isa().name; });
}

fssa_status fssa_set_cpu_isa(const char *name) {
  return guarded([&] { current.store(&usable(name, "name"), std::memory_order_release); });
}

fssa_status fssa_cpu_isa_supported(const char *name, int32_t *supported) {
  return guarded([&] { *supported = named(name, "name").supported(); });
}

fssa_status fssa_cpu_film(const fssa_film_args *args) {
  return with_scratch([&](Scratch &scratch) { isa().film(with_slots(scratch, *args)); });
}

fssa_status fssa_cpu_film_norm(const fssa_film_norm_args *args) {
  return with_scratch([&](Scratch &scratch) { isa().film_norm(with_slots(scratch, *args)); });
}

fssa_status fssa_cpu_film_backward(const fssa_film_backward_args *args) {
  return with_scratch([&](Scratch &scratch) { isa().film_backward(with_slots(scratch, *args)); });
}

fssa_status fssa_cpu_film_norm_backward(const fssa_film_norm_backward_args *args) {
  return with_scratch([&](Scratch &scratch) { isa().film_norm_backward(with_slots(scratch, *args)); });
}

fssa_status fssa_cpu_lora(const fssa_lora_args *args) {
  return with_scratch([&](Scratch &scratch) { isa().lora(with_slots(scratch, *args)); });
}

fssa_status fssa_cpu_lora_backward(const fssa_lora_backward_args *args) {
  return with_scratch([&](Scratch &scratch) { isa().lora_backward(with_slots(scratch, *args)); });
}

fssa_status fssa_cpu_context(const fssa_context_args *args) {
  return with_scratch([&](Scratch &scratch) { isa().context(with_choices(scratch, *args)); });
}

fssa_status fssa_cpu_context_rows(const fssa_context_rows_args *args) {
  return with_scratch([&](Scratch &scratch) { isa().context_rows(with_choices(scratch, with_slots(scratch, *args))); });
}

fssa_status fssa_cpu_context_backward(const fssa_context_backward_args *args) {
  return with_scratch([&](Scratch &scratch) { isa().context_backward(with_choices(scratch, *args)); });
}

fssa_status fssa_cpu_linear(const fssa_linear_args *args) {
  return guarded([&] { isa().linear(*args); });
}

fssa_status fssa_cpu_adapt(const fssa_adapt_args *args) {
  return with_scratch([&](Scratch &scratch) { isa().adapt(with_slots(scratch, *args)); });
}

fssa_status fssa_cpu_gate(const fssa_gate_args *args) {
  return guarded([&] { isa().gate(*args); });
}

fssa_status fssa_cpu_attention(const fssa_attention_args *args) {
  return guarded([&] { check_attention(*args), isa().attention(*args); });
}

fssa_status fssa_cpu_sample(const fssa_sample_args *args) {
  return with_scratch([&](Scratch &scratch) {
    if (args->width < 1 || args->width > 1 << 19) {
      fail(FSSA_BAD_VALUE, "width: expected a number in [1, %d], got %lld", 1 << 19, static_cast<long long>(args->width));
    }
    isa().sample(with_slots(scratch, *args));
  });
}
