"""The fuzzer's first cases, and that it sees what it is there to see.

All 20,000: python tests/fuzz.py --count 20000.
"""

import json
import sys
import textwrap
from pathlib import Path

import processes
import pytest
from conftest import run_python

HERE = Path(__file__).parents[1]
#: but for the fuzzer's own basis, which it moves to make another
ZEROS = (
    "lambda self, part=None, read=twa.io.mapped.Stored.read: read(self, part)"
    " if self.file.path.name == 'basis.safetensors' else read(self, part).clone().zero_()"
)
#: what is broken: its place, what stands there instead; which cases then; what must be said of one
LIBRARY = {
    "code is run": (
        "twa.io.dcp",
        "unpickle",
        "lambda data, names: (pickle.loads(data), 0)",
        "dcp",
        200,
        "files: ['canary'",
    ),
    "sizes are not checked": (
        "twa.io.safetensors",
        "are_sizes",
        "lambda value: True",
        "safetensors",
        200,
        "TypeError: ",
    ),
    "keys are not checked": (
        "twa.io.unpickle",
        "checked_key",
        "lambda key: key",
        "torch",
        200,
        "hang",
    ),
    "other values": (
        "twa.io.mapped.Stored",
        "read",
        ZEROS,
        "torch",
        60,
        "wrong: torch.load finds other tensors",
    ),
}
#: what happens while a file is read, and what must be said of it
EVENTS = {
    "a crash": ("os.kill(os.getpid(), 11)", "signal SIGSEGV"),
    "an end": ("os._exit(3)", "the worker ended with 3"),
    "a long time": ("busy(1.2)", "time: "),
    "memory": ("torch.ones(100 << 20)", "memory: "),
    "a file beside it": ("(case / 'more').write_text('x')", "files: the case's folder changed"),
    "a file": ("open('more', 'w').close()", "files: ['more']"),
    "a temporary file": ("tempfile.mkstemp(prefix='more')", "files: ['more"),
    "output": ("print('warning')", "output: 'warning"),
    "an error": ("[][0]", "IndexError: list index out of range"),
    "a message": ("raise_(twa.CandidateError('\\x1b[2J'))", "message: "),
}


def test_1200_damaged_files():
    done = processes.run([sys.executable, str(HERE / "fuzz.py"), "--count", "1200"])
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = [line.split() for line in done.stdout.splitlines()[1:9]]
    assert all(
        int(cases) == 150 and int(loaded) > 5 and int(refused) > 50
        for _, cases, loaded, refused, _ in kinds
    ), done.stdout


@pytest.fixture(scope="module")
def said():
    """What the fuzzer says of libraries in which something is broken."""
    code = f"""
        import sys
        sys.path.insert(0, {str(HERE)!r})
        import json, os, pickle, pkgutil, tempfile, time, unittest.mock, torch, twa, fuzz
        def raise_(error):
            raise error

        def busy(seconds):
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass

        fuzz.SECONDS, said = 1.0, {{}}
        for name, (where, what, other, kind, count, _) in {LIBRARY!r}.items():
            with unittest.mock.patch.object(pkgutil.resolve_name(where), what, eval(other)):
                said[name] = [text for _, _, text in fuzz.fuzz(count, kinds=[kind]).failures]
        for name, (event, _) in {EVENTS!r}.items():
            fuzz.CHECKS["torch"] = eval(f"lambda case: ({{event}}, ('loaded', ''))[1]")
            said[name] = [text for _, _, text in fuzz.fuzz(4, kinds=["torch"]).failures]
        print(json.dumps(said))
    """
    return json.loads(run_python(textwrap.dedent(code)))


@pytest.mark.parametrize("broken", LIBRARY)
def test_it_sees_what_is_broken(said, broken):
    assert any(LIBRARY[broken][-1] in text for text in said[broken]), said[broken]


@pytest.mark.parametrize("event", EVENTS)
def test_it_sees_what_happens_and_goes_on(said, event):
    assert len(said[event]) == 4 and all(
        text.startswith(EVENTS[event][-1]) for text in said[event]
    ), said[event]
