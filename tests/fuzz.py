"""A fuzzer of everything that reads files from elsewhere.

    python tests/fuzz.py --count 20000 [--seed N] [--seconds S] [--kind KIND ...] [--only INDEX ...]

Small files of every kind are damaged in ways that matter: bits, runs, cuts, splices, integer
fields, and by structure: JSON, zip directories, pickle instructions, records of metadata. What
comes of it must load, with the values that the format's own library finds, or be refused with an
error of our own: without a crash, a hang, much memory, a file written, output, or anything run.
Cases depend on seed and number only. Each runs in a worker, which is started anew when it dies.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import decimal
import gc
import json
import multiprocessing
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import uuid
import warnings
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO, StringIO
from multiprocessing.connection import wait
from pathlib import Path

import numpy
import processes
import torch
import torch.distributed.checkpoint as torch_dcp
import twa
from mutations import damage, damage_json, damage_metadata, damage_pickle, damage_zip, patch_header
from safetensors.torch import load_file, save_file
from torch import nn
from twa.basis.file import read_basis
from twa.distributed.ranks import Ranks
from twa.io.candidates import Candidates
from twa.io.errors import BasisError, CandidateError, CandidateWarning, StateError, TwaError
from twa.io.formats import weights_of
from twa.io.versions import ITERATE_AVERAGE, RUN
from twa.merge.results import Result
from twa.merge.resume import Store
from twa.packing import to_file as pack

import twa_kernels as tk

SECONDS, MEMORY = 5.0, 300 << 20  # of the CPU and of memory, that a case may take
CLEAN = (CandidateError, BasisError, StateError)


# The files that are damaged ----------------------------------------------------------------------


def weights(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    whole = torch.randn(6, 4, generator=g)
    return {
        "a.weight": torch.randn(3, 5, generator=g).to(dtype),
        "a.bias": torch.randn(3, generator=g).bfloat16(),
        "n": torch.tensor(seed),
        "none": torch.zeros(0, 2),
        "mask": torch.tensor([True, False]),
        "scale": torch.randn((), generator=g).double(),
        "part": whole[1:3, 1:],
        "turned": whole.t(),
        "expanded": whole[:1].expand(3, 4),
    }


def plain(state):
    return {k: v.contiguous().clone() for k, v in state.items()}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = (
            nn.Linear(9, 15),
            nn.BatchNorm1d(15),
            nn.Linear(15, 2, bias=False),
        )


def saved(value, protocol=2):
    buffer = BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def files_of(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def torch_values():
    yield {
        "state_dict": weights(),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1),
        "losses": [0.5, (1, "x", b"y", None, True)],
    }
    yield {
        "run": {"model": {"student": plain(weights(1))}},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
    }
    yield nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict(keep_vars=True) | {
        "p": nn.Parameter(torch.ones(2, dtype=torch.float16))
    }


class Fields(dict):
    """A dict with attributes."""


def objects():
    """What stands beside weights, and is not looked into."""
    fields = Fields(a=Fields(b=1))
    fields.more = pathlib.PurePosixPath("x")
    beside = [
        [numpy.float64(0.5), numpy.ones(2), numpy.random.RandomState(0).get_state()[:2]],
        [datetime.date(2024, 1, 1), decimal.Decimal("1.5"), 1 << 100, 1 + 2j, bytearray(b"x")],
        [{1, 2}, frozenset({3}), deque([1], 2), defaultdict(list, {"a": [1]}), Counter("ab")],
        [partial(max, 1), nn.ReLU, str.lower, slice(1, 2), nn.MSELoss(), fields],
        {(1, (2, 3)): 4, frozenset({1}): 5, 1 << 90: 6, None: 7},
    ]
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    return {"before": beside, "state_dict": model.state_dict(), "after": beside}


def extra_states():
    """With _metadata and extra states, among them an object."""
    state = nn.BatchNorm1d(2).state_dict()
    state["a._extra_state"] = {"amax": [torch.ones(2), 1.5], "name": ("x", None, b"y")}
    state["b._extra_state"] = {"recipe": pathlib.PurePosixPath("x")}
    return state


def run_state():
    facts = {
        "number of candidates": "2",
        "candidate 0": "c0 (12)",
        "model": "ab",
        "batches per step": "2",
        "steps": "10",
    }
    row = vars(
        Result(
            "uniform",
            2,
            0,
            0.5,
            1000,
            0.25,
            beta=torch.tensor([0.5, 0.5], dtype=torch.float64),
            curve=[1.0],
            val_curve=[(0, 0.5)],
        )
    )
    x, p = torch.zeros(2, 3), torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.grad = x.clone()
    optimizer.step()
    moments = optimizer.state_dict() | {"coefficients": x, "subspace": {"bits": 4}}
    at = {"step": 2, "pass": 0, "offset": 0, "digest": "ab"}
    under_way = {
        "curve": [0.5, 0.4],
        "val_curve": [(0, 0.5)],
        "best_loss": 0.5,
        "best": x,
        "average": {"format": ITERATE_AVERAGE, "eta": 3.0, "steps": 2, "coefficients": x},
        "seconds": 1.0,
        "looks": 2.0,
        "optimizer": moments,
    }
    under_way |= {
        "schedule": {"last_epoch": 2, "base_lrs": [0.1]},
        "buffers": {"calls": torch.tensor(3)},
        "position": at,
    }
    state = {
        "format": RUN,
        "best_file": "state-best-2.safetensors",
        "best_digest": "ab",
        "run": facts,
        "results": [dict(row)],
        "best": 0,
    }
    return state | {
        "losses": [(torch.ones(2, dtype=torch.float64), 0.5, 2.0)],
        "stride": 2,
        "method": 1,
        "under_way": under_way,
    }


class Stopped(Exception):
    pass


def make_seeds():
    """Kind -> whole sets of files (name -> bytes); and the candidates of the bases.

    In the current directory, which names in files refer to.
    """
    seeds = defaultdict(list)
    Path("heap").mkdir()
    for k in range(3):
        g = torch.Generator().manual_seed(k)
        state = {
            key: v + torch.randn(v.shape, generator=g) if v.is_floating_point() else v + k
            for key, v in Model().state_dict().items()
        }
        save_file(state, f"heap/c{k}.safetensors")
        for name, state in (
            (
                f"{k}.safetensors",
                plain(weights(k, (torch.float32, torch.float64, torch.float16)[k])),
            ),
        ):
            save_file(state, name, metadata={"format": "pt"})
            seeds["safetensors"].append({"x.safetensors": Path(name).read_bytes()})
            Path(name).unlink()
    halves = [
        save(plain(weights(1)), names)
        for names in (("a.weight", "a.bias", "n"), ("none", "part", "scale"))
    ]
    map_ = {
        k: f"model-{i + 1}.safetensors"
        for i, names in enumerate((("a.weight", "a.bias", "n"), ("none", "part", "scale")))
        for k in names
    }
    index = json.dumps({"metadata": {"total_size": 1000}, "weight_map": map_}).encode()
    seeds["index"] = [
        {
            "model.safetensors.index.json": index,
            "model-1.safetensors": halves[0],
            "model-2.safetensors": halves[1],
        }
    ]
    for value in torch_values():
        seeds["torch"].append({"x.pt": saved(value)})
    for protocol in (2, 4):
        for value in (objects(), extra_states()):
            seeds["torch"].append({"x.pt": saved(value, protocol)})
    for k in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch_dcp.save(
                {"model": plain(weights(k)), "epoch": 3} if k else plain(weights(k)),
                checkpoint_id="dcp",
                no_dist=True,
            )
        metadata = pickle.loads(Path("dcp/.metadata").read_bytes())
        if metadata.storage_meta is not None:
            metadata.storage_meta.save_id = "0"  # random
        seeds["dcp"].append(
            files_of(Path("dcp")) | {".metadata": pickle.dumps(metadata, protocol=(2, 4)[k])}
        )
        shutil.rmtree("dcp")
    # one by one: a library that reads them wrong may take them for the same
    candidates = Candidates.of([Candidates(p)[0] for p in sorted(Path("heap").iterdir())])
    for basis in ("deltas", "differences", "orthonormal"):
        twa.Subspace.from_candidates(Model(), candidates, basis=basis).save(
            Path("basis"), basis=True
        )
        seeds["basis"].append({"basis.safetensors": Path("basis/basis.safetensors").read_bytes()})
    shutil.rmtree("basis")
    packed = pack.PackToFile("basis/basis.safetensors", Model(), candidates)
    packed.run()
    moved = twa.Subspace.load("basis", Model(), candidates, center="last")
    moved.save("basis", basis=True)
    seeds["basis"].append({"basis.safetensors": Path("basis/basis.safetensors").read_bytes()})
    shutil.rmtree("basis")
    Path("basis").mkdir()
    seconds, pack.SAVE_SECONDS = pack.SAVE_SECONDS, -1.0
    for after in (1, 2):
        calls = iter(range(100))

        def stop(_, calls=calls, after=after):
            if next(calls) == after:
                raise Stopped

        try:
            pack.PackToFile("basis/b.safetensors", Model(), candidates).run(progress=stop)
        except Stopped:
            seeds["position"].append(files_of(Path("basis")))
        shutil.rmtree("basis")
        Path("basis").mkdir()
    pack.SAVE_SECONDS = seconds
    Path("basis").rmdir()
    seeds["state"] = [
        {"state.pt": saved(run_state())},
        {"state.pt": saved(run_state() | {"under_way": None, "best": None, "best_file": ""})},
    ]
    for run, bits in ((1, 4), (2, 1)):
        write_recording(Path("recording"), run, bits)
        seeds["recording"].append(files_of(Path("recording")))
        shutil.rmtree("recording")
    return dict(seeds)


def write_recording(folder, run, bits):
    """A recording of four snapshots."""
    name, uuid.uuid4 = uuid.uuid4, lambda: uuid.UUID(int=run)  # else random
    model = Model()
    recorder = twa.Recorder(model, every=1, path=folder, bits=bits)
    uuid.uuid4 = name
    g = torch.Generator().manual_seed(run)
    for step in range(1, 5):
        for t in (*model.parameters(), model.norm.running_mean):
            t.data += torch.randn(t.shape, generator=g)
        recorder.record(step)
    recorder.close()
    (folder / "recording.lock").unlink()


def save(state, names):
    save_file({k: state[k] for k in names}, "half.safetensors")
    data = Path("half.safetensors").read_bytes()
    Path("half.safetensors").unlink()
    return data


# Damage ------------------------------------------------------------------------------------------


def damaged(rng, kind, seeds):
    """One of the seeds of this kind, damaged once to three times."""
    files = dict(rng.choice(seeds[kind]))
    other = rng.choice(seeds[kind])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = (
            rng.choice(
                [n for n in files if n.endswith((".position.partial", ".json", ".metadata"))]
                or list(files)
            )
            if rng.random() < 0.5
            else None
        )
        name = name or rng.choice(list(files))
        data, more = files[name], other.get(name, b"")
        ways = [lambda d, m=more: damage(rng, d, m)]
        if name.endswith(".safetensors") or name.endswith("safetensors.partial"):
            ways += [lambda d: patch_header(rng, d)] * 3
        elif name.endswith((".json", ".position.partial")):
            ways += [lambda d: damage_json(rng, d)] * 5
        elif name.endswith((".pt", ".distcp")) and data[:4] == b"PK\3\4":
            ways += [lambda d: damage_zip(rng, d)] * 4
        elif name == ".metadata":
            # what was damaged is not unpickled here
            whole = any(data == s[name] for s in seeds[kind])
            ways += [lambda d: damage_pickle(rng, d)] * 2 + [
                lambda d: damage_metadata(rng, d)
            ] * 3 * whole
        elif name.endswith(".pt"):
            ways += [lambda d: damage_pickle(rng, d)] * 3
        files[name] = rng.choice(ways)(data)
        if kind == "recording" and rng.random() < 0.3:
            files = displaced(rng, files, other)
    return files


def displaced(rng, files, other):
    """The files of a recording, of which one is gone, at another's place, or of another run."""
    name, place = rng.choice(list(files)), rng.choice(list(files))
    way = rng.randrange(4)
    if way == 0:
        return {n: data for n, data in files.items() if n != name or len(files) == 1}
    if way == 1:
        return files | {place: files[name]}
    if way == 2:
        return files | {name: other.get(name, b"")}
    return files | {
        rng.choice(("step_9", "anchor_9", "step_02", "anchor_00")) + ".safetensors": files[name]
    }


# What must hold ----------------------------------------------------------------------------------


class Wrong(Exception):
    """The library did what it must not do."""


def same(ours, theirs):
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    return torch.equal(
        *(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (ours, theirs))
    )


def read_all(path):
    """All tensors of a checkpoint, read whole and in blocks."""
    candidates = Candidates(path)
    candidate = candidates[0]
    for key, info in candidate.info.items():
        t = candidate.tensor(key)
        if t.shape != info.shape or t.dtype != info.dtype:
            raise Wrong(f"{key!r} is {t.shape}, not {info}")
    keys = list(candidate.info)
    counts = Counter()
    for block in candidates.stream([(key, None) for key in keys]):
        counts[block.index] += block.rows[0].clone().numel()
    for k, key in enumerate(keys):
        if counts[k] != candidate.tensor(key).numel():
            raise Wrong(f"stream gives {counts[k]} elements of {key!r}")
    return candidate


def check_safetensors(path):
    try:
        library, note = load_file(path), ""
    except Exception as error:
        library, note = None, str(error)
    try:
        candidate = read_all(path)
    except CLEAN as error:
        return "refused", (
            f"only the library loads: {str(error).split(': ', 1)[1]}" if library else ""
        )
    if library is None:
        raise Wrong(f"the library refuses it: {note}")
    compare(candidate, library)
    return "loaded", ""


def compare(candidate, library):
    if candidate.info.keys() != library.keys():
        raise Wrong("the library finds other names")
    for key, t in library.items():
        if not same(candidate.tensor(key), t):
            raise Wrong(f"the library finds another {key!r}")


def check_index(folder):
    index = folder / "model.safetensors.index.json"
    candidate = read_all(folder)
    library = {}
    for name in set(json.loads(index.read_bytes())["weight_map"].values()):
        library |= load_file(folder / name)
    compare(candidate, library)
    return "loaded", ""


def check_torch(path):
    candidate = read_all(path)
    reading, writing = os.pipe()
    pid = os.fork()  # PyTorch may not survive what we do
    if not pid:
        code = 3
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the CPU
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, weights_only=True, map_location="cpu")
            library = weights_of(nested(content), path, None)
            code = (
                0
                if candidate.info.keys() == library.keys()
                and all(same(candidate.tensor(k), t) for k, t in library.items())
                else 4
            )
        except BaseException as error:
            os.write(
                writing,
                f"{type(error).__name__}: {error}"[:80].splitlines()[0].encode(errors="replace"),
            )
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(writing)
    with os.fdopen(reading) as f:
        reason = f.read()
    if status == 4:
        raise Wrong("torch.load finds other tensors")
    return "loaded", {0: "", 3: f"torch.load refuses what we load: {reason}"}.get(
        status, f"torch.load ends with {status}, we load"
    )


def nested(content, depth=0):
    if isinstance(content, torch.Tensor):
        return content
    if isinstance(content, dict) and depth < 16:
        return {
            str(k): v
            for k, v in ((k, nested(v, depth + 1)) for k, v in content.items())
            if v is not None
        }
    return None


def check_dcp(folder):
    read_all(folder)
    return "loaded", ""


def check_basis(path):
    loaded = read_basis(path)
    subspace = twa.Subspace.load(path, Model())
    basis, center = loaded.basis(), loaded.center()
    tame = all(
        t.abs().max() < 1e12
        for t in (
            basis.row_scale,
            loaded.read("divisor"),
            *center,
            *(loaded.read(n) for n in loaded.tensors if n == "R"),
        )
    )
    x = torch.full(subspace.coefficients.shape, 0.01)
    values = [
        *tk.reconstruct(basis, x, center),
        tk.project(basis, [torch.ones(s) for s in basis.shapes]),
    ]
    if tame and not all(torch.isfinite(v).all() for v in values):
        raise Wrong("numbers that are not finite")
    subspace.write_weights()
    return "loaded", ""


def check_position(folder):
    path = folder / "b.safetensors"
    job = pack.PackToFile(path, Model(), Candidates("heap"))
    with contextlib.redirect_stderr(StringIO()):  # it may warn of weights that are lost
        job.run(resume=True)
    try:
        read_basis(path)
    except BasisError as error:
        return "loaded", f"the basis is refused: {str(error).split(': ', 1)[1][:50]}"
    return "loaded", ""


def check_state(folder):
    store = Store(folder, resume=True)
    state = store.read(Ranks())
    if state is None:
        raise Wrong("no state is seen")
    store.accept(state, run_state()["run"])
    return "loaded", ""


def check_recording(folder):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        candidates = Candidates(folder)
        for candidate in candidates:
            for key, info in candidate.info.items():
                t = candidate.tensor(key)
                if t.shape != info.shape or t.dtype != info.dtype:
                    raise Wrong(f"{key!r} is {t.shape}, not {info}")
        candidates.average(torch.full((len(candidates),), 1 / len(candidates)))
        found = go_on(folder)
    for w in said:
        text = str(w.message)
        if w.category is not CandidateWarning or len(text) > 3000 or not text.isprintable():
            raise Wrong(f"warning: {text[:200]!a}")
    return "loaded", found


def go_on(folder):
    """A recorder goes on with it, unless it is refused."""
    with tempfile.TemporaryDirectory() as work:
        copy = shutil.copytree(folder, Path(work) / "run")
        bits = min(c.recording.bits for c in Candidates(copy))
        try:
            recorder = twa.Recorder(Model(), every=1, path=copy, bits=bits, resume=True)
        except TwaError as error:
            return f"not resumed: {error.problem[:50]}"
        recorder.record(10**9)
        recorder.close()
        if Candidates(copy)[-1].step != 10**9:
            raise Wrong("the next snapshot is not there")
    return ""


CHECKS = {
    "safetensors": lambda case: check_safetensors(case / "x.safetensors"),
    "index": check_index,
    "torch": lambda case: check_torch(case / "x.pt"),
    "dcp": check_dcp,
    "basis": lambda case: check_basis(case / "basis.safetensors"),
    "position": check_position,
    "state": check_state,
    "recording": check_recording,
}


# One case ----------------------------------------------------------------------------------------


def listing(folder):
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def resident(name):
    return next(
        int(line.split()[1]) << 10
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(name)
    )


def run_case(index, seed, kind, seeds, root):
    """(outcome, note, failure or None)"""
    rng = random.Random(f"{seed} {index}")
    files = damaged(rng, kind, seeds)
    case = root / "case"
    shutil.rmtree(case, ignore_errors=True)
    for name, data in files.items():
        (case / name).parent.mkdir(parents=True, exist_ok=True)
        (case / name).write_bytes(data)
    before, outside = listing(case), listing(root / "tmp") | listing(root / "heap")
    gc.collect(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory counts from here
    resident_before, begun = resident("VmRSS"), time.process_time()
    outcome, note, failure = "refused", "", None
    try:
        outcome, note = CHECKS[kind](case)
    except CLEAN as error:
        text = str(error)
        if len(text) > 3000 or not text.isprintable():
            failure = f"message: {len(text)} characters, {text[:200]!a}"
    except Wrong as error:
        outcome, failure = "loaded", f"wrong: {error}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        failure = (
            f"{type(error).__name__}: {str(error)[:200]}"
            f" ({Path(where.filename).name}:{where.lineno})"
        )
    grown, seconds = resident("VmHWM") - resident_before, time.process_time() - begun
    if grown > MEMORY:
        failure = failure or f"memory: {grown >> 20} MB"
    if seconds > SECONDS:
        failure = failure or f"time: {seconds:.1f} s"
    if kind != "position" and listing(case) != before:
        failure = failure or "files: the case's folder changed"
    new = [
        p
        for p in (*root.iterdir(), *(root / "tmp").iterdir())
        if p.name not in ("case", "tmp", "heap", "output")
    ]
    if new or listing(root / "tmp") | listing(root / "heap") != outside:
        failure = failure or f"files: {sorted(p.name for p in new)}"
    for p in new:
        shutil.rmtree(p) if p.is_dir() else p.unlink()
    sys.stdout.flush()
    sys.stderr.flush()
    if (root / "output").stat().st_size:
        failure = failure or f"output: {(root / 'output').read_text(errors='replace')[:200]!r}"
        os.truncate(root / "output", 0)
    return outcome, note, failure


def work(connection, indices, seed, kinds, seeds, root):
    """A worker: says which case it begins, and what came of it."""
    shutil.rmtree(root, ignore_errors=True)
    (root / "tmp").mkdir(parents=True)
    shutil.copytree("heap", root / "heap")
    os.chdir(root)
    tempfile.tempdir = str(root / "tmp")
    warnings.filterwarnings("ignore", message=".*which no data need")
    output = os.open(root / "output", os.O_CREAT | os.O_RDWR | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    limit = 6 << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for index in indices:
        connection.send((index, None))
        signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)  # of the CPU: ends a case without end
        connection.send((index, run_case(index, seed, kinds[index % len(kinds)], seeds, root)))


@dataclass
class Table:
    cases: Counter = field(default_factory=Counter)
    loaded: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)
    failures: list = field(default_factory=list)  # (index, kind, text)

    def __str__(self):
        failed = Counter(kind for _, kind, _ in self.failures)
        lines = [f"{'kind':12}{'cases':>8}{'loaded':>8}{'refused':>9}{'failures':>10}"]
        lines += [
            f"{k:12}{self.cases[k]:8}{self.loaded[k]:8}{self.refused[k]:9}{failed[k]:10}"
            for k in self.cases
        ]
        lines.append(
            f"{'all':12}{self.cases.total():8}{self.loaded.total():8}{self.refused.total():9}{len(self.failures):10}"
        )
        return "\n".join(
            lines + [f"{count:6} x {note}" for note, count in self.notes.most_common(25)]
        )


class Worker:
    def __init__(self, indices, *arguments):
        self.indices, self.arguments = indices, arguments
        self.start()

    def start(self):
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(
            target=work, args=(theirs, self.indices, *self.arguments)
        )
        self.process.start()
        theirs.close()
        self.index, self.patience = None, processes.Patience(self.process.pid)


def fuzz(count, seed=0, kinds=None, workers=2, seconds=None, indices=None):
    """The table of so many cases."""
    kinds, table, begun, here = kinds or list(CHECKS), Table(), time.monotonic(), os.getcwd()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.chdir(folder)
            seeds = make_seeds()
            share = [list(indices or range(count))[k::workers] for k in range(workers)]
            running = [
                Worker(part, seed, kinds, seeds, Path(folder) / f"worker{k}")
                for k, part in enumerate(share)
            ]
            while running:
                wait([w.connection for w in running], 0.2)
                for w in list(running):
                    if not follow(w, table, kinds):
                        running.remove(w)
                if seconds and time.monotonic() - begun > seconds:
                    break
            for w in running:
                w.process.kill()
                w.process.join()
        finally:
            os.chdir(here)
    return table


def follow(worker, table, kinds):
    """Takes what the worker says; False when it is done.

    A worker that died or hangs is started anew after its case.
    """
    try:
        while worker.connection.poll():
            worker.index, result = worker.connection.recv()
            worker.patience = processes.Patience(worker.process.pid)
            if result is not None:
                record(table, worker.index, kinds, *result)
                worker.indices, worker.index = (
                    worker.indices[worker.indices.index(worker.index) + 1 :],
                    None,
                )
    except (EOFError, ConnectionResetError):
        worker.process.join()
        if not worker.indices:
            return False
        code = worker.process.exitcode
        text = (
            f"signal {signal.Signals(-code).name}" if code < 0 else f"the worker ended with {code}"
        )
        text = "hang" if code == -signal.SIGPROF else text
    else:
        if not worker.patience.hung():
            return True
        worker.process.kill()
        worker.process.join()
        text = "hang"
    index = worker.indices[0]
    record(table, index, kinds, "refused", "", text)
    worker.indices = worker.indices[1:]
    if worker.indices:
        worker.start()
    return bool(worker.indices)


def record(table, index, kinds, outcome, note, failure):
    kind = kinds[index % len(kinds)]
    table.cases[kind] += 1
    (table.loaded if outcome == "loaded" else table.refused)[kind] += 1
    if note:
        table.notes[f"{kind}: {note[:120]}"] += 1
    if failure:
        table.failures.append((index, kind, failure))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kind", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument(
        "--only",
        type=int,
        nargs="+",
        metavar="INDEX",
        help="these cases, of a run with the same seed and kinds",
    )
    args = parser.parse_args(arguments)
    begun = time.monotonic()
    table = fuzz(args.count, args.seed, args.kind, args.workers, args.seconds, args.only)
    print(table)
    for index, kind, text in table.failures[:100]:
        print(
            f"failure: --seed {args.seed} --kind {' '.join(args.kind)} --only {index} ({kind}):"
            f" {text}"
        )
    print(
        f"{table.cases.total()} cases in {time.monotonic() - begun:.0f} s, {len(table.failures)}"
        " failures"
    )
    return 1 if table.failures else 0


if __name__ == "__main__":
    sys.exit(main())
