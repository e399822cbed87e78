#include "status.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>

namespace {
thread_local char message[512];
}

namespace fssa {

void fail(fssa_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  throw Error{status};
}

fssa_status status_of_exception() {
  try {
    throw;
  } catch (const Error &error) {
    return error.status;
  } catch (const std::bad_alloc &) {
    std::snprintf(message, sizeof(message), "memory for intermediate results could not be allocated");
    return FSSA_NO_MEMORY;
  }
}

}  // namespace fssa

const char *fssa_last_error(void) { return message; }

int64_t fssa_size_of(const char *name) {
#define FSSA_SIZE(type) \
  if (std::strcmp(name, #type) == 0) return sizeof(type);
  FSSA_SIZE(fssa_input)
  FSSA_SIZE(fssa_output)
  FSSA_SIZE(fssa_slots)
  FSSA_SIZE(fssa_film)
  FSSA_SIZE(fssa_norm)
  FSSA_SIZE(fssa_modulation)
  FSSA_SIZE(fssa_film_args)
  FSSA_SIZE(fssa_film_norm_args)
  FSSA_SIZE(fssa_film_backward_args)
  FSSA_SIZE(fssa_film_norm_gradients)
  FSSA_SIZE(fssa_film_norm_backward_args)
  FSSA_SIZE(fssa_lora_part)
  FSSA_SIZE(fssa_lora_args)
  FSSA_SIZE(fssa_lora_backward_part)
  FSSA_SIZE(fssa_lora_gradients)
  FSSA_SIZE(fssa_lora_backward_args)
  FSSA_SIZE(fssa_context_weights)
  FSSA_SIZE(fssa_context_gradients)
  FSSA_SIZE(fssa_context_encoder)
  FSSA_SIZE(fssa_context_input)
  FSSA_SIZE(fssa_context_args)
  FSSA_SIZE(fssa_context_rows_args)
  FSSA_SIZE(fssa_context_backward_args)
  FSSA_SIZE(fssa_linear_args)
  FSSA_SIZE(fssa_adapt_part)
  FSSA_SIZE(fssa_adapt_args)
  FSSA_SIZE(fssa_gate_args)
  FSSA_SIZE(fssa_heads)
  FSSA_SIZE(fssa_tokens)
  FSSA_SIZE(fssa_rotary)
  FSSA_SIZE(fssa_block_cache)
  FSSA_SIZE(fssa_scores)
  FSSA_SIZE(fssa_attention_args)
  FSSA_SIZE(fssa_sample_args)
#undef FSSA_SIZE
  return -1;
}
