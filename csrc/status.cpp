#include "status.h"

#include <cstdarg>
#include <cstdio>
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
