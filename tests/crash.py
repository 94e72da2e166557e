"""Strikes at processes that write files: a preloaded library that sees each call that changes a
file, and a server that forks runs under it.
"""

import json
import os
import random
import select
import shutil
import subprocess
import sys
import textwrap

import processes
import pytest

SHIM = r"""
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
"""
OFF, PASS, KILL, TEAR, INTERRUPT, STOP, FULL, READ_ONLY = range(8)

SERVER = """
    import ctypes, gc, json, os, resource, signal, sys, time, traceback
    import torch
    import torch._dynamo  # which optimizers import
    import torch.distributed.checkpoint as dcp
    import twa
    from twa import average, basis_file, cli, pack, report, tasks
    from twa.candidates import Candidates

    torch.set_num_threads(1)  # nothing may have started threads when a run is forked
    pack.SAVE_SECONDS = 0.0  # a position after each block
    average.SAVE_SECONDS = float("inf")  # no state that depends on the machine
    Candidates.__init__.__kwdefaults__["block_bytes"] = 2000  # the smallest blocks
    report.picture = lambda *_: b"a picture, which takes a second"
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])

    def export(folder, candidates, task):
        model = tasks.load_task(task).model()
        subspace = twa.Subspace.from_candidates(model, Candidates(candidates))
        def save():
            try:
                subspace.save(folder, sharded=True, basis=True)
            except OSError as error:
                print("failed:", error)
                return 2
            except dcp.CheckpointException as error:  # quotes tracebacks
                print("failed:", folder, *(e for e, _ in error.failures.values()))
                return 2
            return 0
        return save

    def run(request):
        work = export(*request["export"]) if "export" in request else lambda: cli.main(request["argv"])
        if request.get("no_check"):
            basis_file.shutil.disk_usage = lambda _: type("Usage", (), {"free": 1 << 60})
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if request["mode"] == 1 else -1
        shim.strike_at(os.fsencode(request["below"]), request["mode"], ctypes.c_long(request["point"]), log)
        try:
            return work()
        except SystemExit as error:
            return error.code
        except BaseException:
            traceback.print_exc()
            return 99
        finally:
            shim.strike_at(b"", 0, ctypes.c_long(0), -1)

    def answer(pid, options=0):
        _, status = os.waitpid(pid, options)
        print(json.dumps({"pid": pid, "code": "stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)}), flush=True)

    gc.collect(), gc.freeze()  # else each run would copy what its collector touches
    print("ready", flush=True)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "go_on" in request:
            os.kill(request["go_on"], signal.SIGCONT)
            answer(request["go_on"])
            continue
        pid = os.fork()
        if not pid:
            resource.setrlimit(resource.RLIMIT_CPU, (600, 600))  # a run without end
            out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            code = run(request)
            if request.get("whole_exit"):
                sys.exit(code)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        if (signal_after := request.get("signal_after")):
            time.sleep(signal_after[1])
            os.kill(pid, signal_after[0])
        answer(pid, os.WUNTRACED)
"""

TASK = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, {wide}), nn.BatchNorm1d({wide}), nn.Linear({wide}, 1)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            return self.last(torch.tanh(self.norm(self.first(x))))

    def data(seed, count):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 8, generator=g)
        return list(zip(x.split(10), x.sum(1, keepdim=True).sin().split(10)))

    def model():
        return Net()

    def train_data():
        return data(1, 40)

    def val_data():
        return train_data()  # so that a trained average is the best

    def loss(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])
"""


def start(folder):
    """A server, with its files in this folder; skips the test where there can be none."""
    if (
        not sys.platform.startswith("linux")
        or (compiler := shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")) is None
    ):
        pytest.skip("needs Linux and a C compiler, for the library that strikes at calls")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"],
        check=True,
    )
    return Server(folder)


class Server:
    """server(argv=...) runs `twa ARGV`, server(export=(folder, candidates, task)) Subspace.save;
    returns (exit status, negative for a signal; output).

    below, mode, point   strike at this call below this folder
    signal_after         (signal, seconds): sent from outside
    """

    def __init__(self, folder):
        self.folder, self.calls = folder, []
        self.process = processes.Child(
            [sys.executable, "-c", textwrap.dedent(SERVER)],
            env=os.environ | {"LD_PRELOAD": str(folder / "shim.so"), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        assert self._line() == "ready\n"
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        processes.end(self.process)
        self.process.stdout.close()

    def _line(self):
        """The next line it says, for which it may take as long as it gets on."""
        said = [self.process.stdout]
        processes.wait(self.process, until=lambda: select.select(said, [], [], 0.5)[0], every=0)
        return self.process.stdout.readline()

    def _ask(self, request):
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()
        line = self._line()
        assert line, self.process.output("stderr")
        return json.loads(line)

    def __call__(self, below="", mode=OFF, point=0, name="output", **request):
        files = {"output": self.folder / name, "log": self.folder / "log"}
        if "argv" in request:
            request["argv"] = [str(a) for a in request["argv"]]
        reply = self._ask({"below": below, "mode": mode, "point": point} | files | request)
        self.pid = reply["pid"]
        if mode == PASS:
            self.calls = [line.split("\t") for line in files["log"].read_text().splitlines()]
        return reply["code"], files["output"].read_text()

    def go_on(self, pid, name="output"):
        """A run that was stopped, to its end."""
        return self._ask({"go_on": pid})["code"], (self.folder / name).read_text()


def points_of(calls, count, seed=0):
    """(mode, point) of a kill before every call and in the middle of every write; a sample of
    `count` of them unless all are asked for.
    """
    points = [
        (mode, k)
        for k, (call, *_) in enumerate(calls, 1)
        for mode in ((KILL, TEAR) if call == "write" else (KILL,))
    ]
    return (
        points
        if os.environ.get("TWA_CRASH_POINTS") == "all"
        else sorted(random.Random(seed).sample(points, min(count, len(points))))
    )
