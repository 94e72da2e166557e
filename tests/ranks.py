"""Ranks for tests: processes of one gloo job that stay alive over many tests and run functions in
groups of any size.
"""

import datetime
import importlib
import multiprocessing
import os
import queue
import tempfile
import threading
import traceback

import processes
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 4
LIMIT = datetime.timedelta(hours=2)  # of gloo; Ranks.run sees long before that they hang


class Ranks:
    """run(size, function, *arguments): function(group, *arguments) on the first `size` ranks ->
    their results. Functions are module-level ones of a test file. A failure on a rank fails the
    test with that rank's traceback, and the job is started anew."""

    def __init__(self):
        self.processes = []

    def start(self):
        context = mp.get_context("forkserver")  # what is slow to import, once for all ranks
        context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "twa"])
        self.queues = [context.Queue() for _ in range(SIZE)]
        self.results = context.Queue()
        self.store = tempfile.mktemp(prefix="twa-ranks-")
        arguments = [(rank, self.store, self.queues[rank], self.results) for rank in range(SIZE)]
        self.processes = [context.Process(target=_serve, args=a, daemon=True) for a in arguments]
        for p in self.processes:
            p.start()

    def stop(self):
        for p in self.processes:
            p.kill()
            p.join()
        self.processes = []
        if os.path.exists(getattr(self, "store", "")):
            os.unlink(self.store)

    def run(self, size, function, *arguments):
        if not self.processes:
            self.start()
        for rank in range(size):
            self.queues[rank].put((size, function.__module__, function.__qualname__, arguments))
        answers, failures = {}, []
        for _ in range(size):
            rank, value, failure = self._next()
            answers[rank] = value
            if failure:
                failures.append(f"rank {rank} of {size}:\n{failure}")
                break  # the others may wait for it
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [answers[rank] for rank in range(size)]

    def _next(self):
        """The next answer, for which the ranks may take as long as they get on."""
        patience = processes.Patience(*(p.pid for p in self.processes))
        while True:
            dead = [k for k, p in enumerate(self.processes) if not p.is_alive()]
            try:
                return self.results.get(timeout=1)
            except queue.Empty:
                if dead or patience.hung():
                    self.stop()
                    raise AssertionError(
                        f"ranks {dead} died"
                        if dead
                        else "the ranks hang: no answer, no use of the CPU"
                    ) from None


def _end_with_parent():
    """No rank outlives the tests, however these end."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _serve(rank, store, tasks, results):
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=LIMIT
    )
    groups = {size: dist.new_group(list(range(size)), timeout=LIMIT) for size in range(1, SIZE + 1)}
    while True:
        size, module, name, arguments = tasks.get()
        try:
            function = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            torch.manual_seed(0)
            results.put((rank, function(groups[size], *arguments), None))
        except BaseException:  # reported, and the job ends
            results.put((rank, None, traceback.format_exc()))
            raise
