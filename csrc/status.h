// Errors inside the core: thrown as Error, turned into a status and a message where the C interface begins.
#pragma once

#include "fssa.h"

namespace fssa {

class Error {
 public:
  fssa_status status;
};

// Throws Error, with a message in the style of printf kept for fssa_last_error().
[[noreturn]] void fail(fssa_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

// The status of the exception being handled; called in a catch block only.
fssa_status status_of_exception();

}  // namespace fssa
