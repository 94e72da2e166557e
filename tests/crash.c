// The library that tests/crash.py preloads: it strikes at a call that changes a file.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

// PASS: only counts.  KILL: before call number `point`.  TEAR: in the middle of it, if it writes.  INTERRUPT, STOP: the signal, before it.
// FULL: no space from it on.  READ_ONLY: nothing can be changed from it on.
enum mode { OFF, PASS, KILL, TEAR, INTERRUPT, STOP, FULL, READ_ONLY };
enum kind { TAKES_SPACE, CHANGES, FREES };
enum verdict { GO, HALF, FAIL };
static char folder[4096];
static int mode, record;
static long point, seen;

void strike_at(const char* below, int how, long number, int log) {
    strncpy(folder, below, sizeof folder - 1);
    mode = how, point = number, record = log, seen = 0;
}

static const char* path_of(int fd, char* buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, buffer, 4095);
    buffer[length > 0 ? length : 0] = 0;
    return buffer;
}

static const char* path_at(int fd, const char* path, char* buffer) {
    if (path[0] == '/') return path;
    if (fd == AT_FDCWD) return getcwd(buffer, 4096 - 512), strcat(strcat(buffer, "/"), path);
    return path_of(fd, buffer), strcat(strcat(buffer, "/"), path);
}

static enum verdict ask(enum kind kind, const char* call, const char* path) {
    size_t length = strlen(folder);
    if (mode == OFF || strncmp(path, folder, length)) return GO;
    long number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (record >= 0) dprintf(record, "%s\t%s\n", call, path + length);
    if (number == point) {
        if (mode == TEAR && !strcmp(call, "write")) return HALF;
        if (mode == KILL || mode == TEAR) kill(getpid(), SIGKILL);
        if (mode == STOP) kill(getpid(), SIGSTOP);
        if (mode == INTERRUPT) raise(SIGINT);
        if (mode == FULL && !strcmp(call, "write")) return HALF;
    }
    int fails = mode == READ_ONLY ? number >= point : mode == FULL && (number == point ? kind != FREES : number > point && kind == TAKES_SPACE);
    if (fails) errno = mode == FULL ? ENOSPC : EROFS;
    return fails ? FAIL : GO;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define OPEN(name, parameters, arguments, fd, path)                                                          \
    int name parameters {                                                                                    \
        REAL(name);                                                                                          \
        char buffer[4096];                                                                                   \
        va_list more;                                                                                        \
        va_start(more, flags);                                                                               \
        mode_t permissions = va_arg(more, int);                                                              \
        va_end(more);                                                                                        \
        const char* at = path_at(fd, path, buffer);                                                          \
        int makes = (flags & O_TMPFILE) == O_TMPFILE || ((flags & O_CREAT) && access(at, F_OK));             \
        if (makes && ask(TAKES_SPACE, "create", at) == FAIL) return -1;                                      \
        if (!makes && (flags & O_TRUNC) && ask(FREES, "truncate", at) == FAIL) return -1;                    \
        if (!makes && mode == READ_ONLY && (flags & O_ACCMODE) && ask(CHANGES, "open", at) == FAIL) return -1; \
        return real arguments;                                                                               \
    }
OPEN(open, (const char* path, int flags, ...), (path, flags, permissions), AT_FDCWD, path)
OPEN(open64, (const char* path, int flags, ...), (path, flags, permissions), AT_FDCWD, path)
OPEN(openat, (int fd, const char* path, int flags, ...), (fd, path, flags, permissions), fd, path)
OPEN(openat64, (int fd, const char* path, int flags, ...), (fd, path, flags, permissions), fd, path)

#define WRITE(name, parameters, whole, half)                                    \
    ssize_t name parameters {                                                   \
        REAL(name);                                                             \
        char buffer[4096];                                                      \
        enum verdict v = ask(TAKES_SPACE, "write", path_of(fd, buffer));        \
        if (v == FAIL) return -1;                                               \
        ssize_t written = v == HALF ? real half : real whole;                   \
        if (v == HALF && mode == TEAR) kill(getpid(), SIGKILL);                 \
        return written;                                                         \
    }
WRITE(write, (int fd, const void* data, size_t size), (fd, data, size), (fd, data, (size + 1) / 2))
WRITE(pwrite, (int fd, const void* data, size_t size, off_t at), (fd, data, size, at), (fd, data, (size + 1) / 2, at))
WRITE(pwrite64, (int fd, const void* data, size_t size, off64_t at), (fd, data, size, at), (fd, data, (size + 1) / 2, at))
WRITE(sendfile, (int fd, int in, off_t* at, size_t size), (fd, in, at, size), (fd, in, at, (size + 1) / 2))
WRITE(sendfile64, (int fd, int in, off64_t* at, size_t size), (fd, in, at, size), (fd, in, at, (size + 1) / 2))
WRITE(copy_file_range, (int in, off64_t* from, int fd, off64_t* at, size_t size, unsigned flags), (in, from, fd, at, size, flags),
      (in, from, fd, at, (size + 1) / 2, flags))

// Whether every call changes something, or only one on what is there, or on what is not.
enum subject { ANY, PRESENT, ABSENT };
static int changes(enum subject subject, const char* path) { return subject == ANY || (subject == PRESENT) == !access(path, F_OK); }
#define CALL(name, parameters, arguments, kind, call, path, subject)                                     \
    int name parameters {                                                                                \
        REAL(name);                                                                                      \
        char buffer[4096];                                                                               \
        const char* at = path;                                                                           \
        return changes(subject, at) && ask(kind, call, at) == FAIL ? -1 : real arguments;                \
    }
CALL(ftruncate, (int fd, off_t size), (fd, size), FREES, "truncate", path_of(fd, buffer), ANY)
CALL(ftruncate64, (int fd, off64_t size), (fd, size), FREES, "truncate", path_of(fd, buffer), ANY)

// What a killed process leaves does not depend on it: no time is spent on the disk.
#define SYNC(name) \
    int name(int fd) { char buffer[4096]; return ask(CHANGES, "sync", path_of(fd, buffer)) == FAIL ? -1 : 0; }
SYNC(fsync)
SYNC(fdatasync)

CALL(unlink, (const char* path), (path), FREES, "unlink", path_at(AT_FDCWD, path, buffer), PRESENT)
CALL(unlinkat, (int fd, const char* path, int flags), (fd, path, flags), FREES, "unlink", path_at(fd, path, buffer), PRESENT)
CALL(rmdir, (const char* path), (path), FREES, "unlink", path_at(AT_FDCWD, path, buffer), PRESENT)
CALL(mkdir, (const char* path, mode_t m), (path, m), TAKES_SPACE, "create", path_at(AT_FDCWD, path, buffer), ABSENT)
CALL(link, (const char* from, const char* to), (from, to), TAKES_SPACE, "link", path_at(AT_FDCWD, to, buffer), ANY)
CALL(linkat, (int f, const char* from, int t, const char* to, int flags), (f, from, t, to, flags), TAKES_SPACE, "link", path_at(t, to, buffer), ANY)

static const char* both(const char* from, const char* to, char* buffer) {
    size_t length = strlen(folder);
    snprintf(buffer, 4096, "%s\t%s", from, strncmp(to, folder, length) ? to : to + length);
    return buffer;
}
CALL(rename, (const char* from, const char* to), (from, to), CHANGES, "rename", both(from, to, buffer), ANY)
CALL(renameat, (int f, const char* from, int t, const char* to), (f, from, t, to), CHANGES, "rename", both(from, to, buffer), ANY)
CALL(renameat2, (int f, const char* from, int t, const char* to, unsigned flags), (f, from, t, to, flags), CHANGES, flags & 2 ? "swap" : "rename",
     both(from, to, buffer), ANY)
