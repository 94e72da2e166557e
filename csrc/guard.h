// Mapped files that another process cuts short while they are read.
//
// Touching a byte behind the file's new end is SIGBUS, which ends the process. For ranges that are
// guarded it does not: the missing pages become zeros, and the range is torn, which its reader has
// to ask for before it uses what it has read. Linux only; elsewhere nothing is guarded.
#pragma once

#include <cstdint>

namespace twa {

// Guards a mapping: bytes from `data` on, which is the begin of a page. Returns its number, to be
// given back by `unguard` before it is unmapped; -1 if it is not guarded.
int32_t guard(const void* data, int64_t bytes);
void unguard(int32_t number);

// Whether bytes of a guarded mapping were missing when they were touched.
bool is_torn(int32_t number);

// Ranges of this process that were torn so far, those no longer guarded with them.
int64_t torn_ranges();

}  // namespace twa
