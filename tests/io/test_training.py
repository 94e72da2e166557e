"""How far a training had come, by what is in a checkpoint: order where names do not say it, and
checkpoints that are gone. Nothing in these files is trusted.
"""

import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from twa.inspection import run as inspect
from twa.io.candidates import Candidates
from twa.io.errors import CandidateError, CandidateWarning
from twa.io.training import Progress, progress_of, removed


def state(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(4, 3, generator=g), "a.bias": torch.randn(4, generator=g)}


def save(path, seed, **values):
    """A checkpoint with these values beside its weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state(seed), **values}, path)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"global_step": 100, "epoch": 3}, (100, 3)),
        ({"step": 5, "global_step": 100}, (100, None)),
        ({"iteration": 7}, (7, None)),
        ({"epoch": 1.5}, (None, 1.5)),
        ({"step": True, "epoch": -1}, (None, None)),
        ({"step": float("nan"), "epoch": float("inf")}, (None, None)),
        ({"step": 1 << 3000, "epochs": 1e300}, (None, None)),
        ({"step": "100", "epoch": None}, (None, None)),
        ({"step": [1], "iter": 4}, (4, None)),
        ({}, (None, None)),
    ],
)
def test_progress(values, found):
    assert progress_of(values) == Progress(*found)


def names(paths, **options):
    return [c.path.name for c in Candidates(paths, **options)]


BY = "{}: the order is that of the {}s in the files, and not of their names"


def test_steps_in_files_count_where_names_have_none(tmp_path):
    """Each directory by itself; names stay where they have steps."""
    for k, name in enumerate(("loss-0.9", "loss-0.7", "loss-0.8")):
        save(tmp_path / "a" / f"{name}.pt", k, step=10 * k)
    for k, name in enumerate(("x", "c", "m")):
        save(tmp_path / "b" / f"{name}.pt", 10 + k, epoch=k)
    for k in (9, 10):  # what is in these would turn them round
        save(tmp_path / "c" / f"step_{k}.pt", 20 + k, step=100 - k)
    candidates = Candidates(f"{tmp_path}/*/*.pt")
    right = ["loss-0.9", "loss-0.7", "loss-0.8", "x", "c", "m", "step_9", "step_10"]
    assert candidates.names == right
    assert candidates.notes == [
        BY.format(tmp_path / "a", "step"),
        BY.format(tmp_path / "b", "epoch"),
    ]
    result = inspect.inspect([f"{tmp_path}/*/*.pt"])
    assert [row.path.stem for row in result.rows] == right
    assert sum("the order is that of" in f.message for f in result.findings) == 2


def test_equal_steps_are_in_the_order_of_names(tmp_path):
    steps = {"best": 3, "epoch=1": 1, "epoch=3": 3, "last": 3, "raw": 2}
    for seed, (name, step) in enumerate(steps.items()):
        save(tmp_path / f"{name}.pt", seed, global_step=step)
    assert names(tmp_path) == ["epoch=1.pt", "raw.pt", "best.pt", "epoch=3.pt", "last.pt"]


def test_names_that_agree_need_no_word(tmp_path):
    for k, name in enumerate(("model", "model-v1", "model-v2", "model-v10")):
        save(tmp_path / f"{name}.ckpt", k, global_step=k)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        candidates = Candidates(tmp_path)
    assert candidates.names == ["model", "model-v1", "model-v2", "model-v10"]
    assert not candidates.notes


@pytest.mark.parametrize("values", [{}, {"step": 0}, {"epoch": 3}])
def test_steps_that_some_lack_or_all_share_do_not_count(tmp_path, values):
    """Then names count, with their doubts."""
    for k, name in enumerate(("acc_0.91", "acc_0.85", "acc_0.99")):
        save(tmp_path / f"{name}.pt", k, **values)
    if not values:
        save(tmp_path / "acc_0.91.pt", 0, step=10)
    with pytest.warns(CandidateWarning, match="in the order of the metrics"):
        assert names(tmp_path) == ["acc_0.85.pt", "acc_0.91.pt", "acc_0.99.pt"]


#: (epoch, step) of a run whose steps are counted anew in each epoch, and of one whose epochs begin
#: anew in its second part
STEPS_ANEW = [(0, 250), (0, 500), (1, 100), (1, 350)]
EPOCHS_ANEW = [(0, None), (1, None), (0, None), (1, None)]
NUMBERS = "{}: the numbers in the names give another order than the {} in the files"
OPEN = "{}: the {} in the files begin anew or are the same"


def save_all(folder, files, progress):
    """A checkpoint by each name, with these epochs and steps in them."""
    for seed, (name, (epoch, step)) in enumerate(zip(files, progress, strict=True)):
        values = {"epoch": epoch, "step": step}
        save(folder / f"{name}.pt", seed, **{k: v for k, v in values.items() if v is not None})


def check_order(folder, right, *said):
    """These names in this order, with warnings that begin so: of Candidates and of inspect."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        candidates = Candidates(folder)
    assert candidates.names == right
    doubts = [str(w.message) for w in caught if w.category is CandidateWarning]
    assert len(doubts) == len(said) and doubts == list(candidates.notes)
    for text, doubt in zip(said, doubts, strict=True):
        assert doubt.startswith(text) and doubt.endswith("if the order is another")
    result = inspect.inspect([str(folder)])
    assert [row.path.stem for row in result.rows] == right


@pytest.mark.parametrize(
    ("progress", "said"),
    [
        ([(0, None), (0, None), (1, None), (1, None)], []),
        (STEPS_ANEW, []),  # as epochs and steps have it
        (EPOCHS_ANEW, [(NUMBERS, "epochs")]),
        ([(0, 10), (1, 20), (0, 30), (1, 40)], []),  # as the steps have it
        ([(0, 10), (1, 20), (0, 10), (1, 20)], [(NUMBERS, "steps")]),
        ([(None, 40), (None, 30), (None, 20), (None, 10)], [(NUMBERS, "steps")]),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["model_{}", "{}", "2026-{}-a", "loop9-{}"])
def test_names_with_plain_numbers_are_believed(tmp_path, form, progress, said):
    files = [form.format(number) for number in (0, 2, 9, 10)]
    said = [text.format(tmp_path, what) for text, what in said]
    save_all(tmp_path, files, progress)
    check_order(tmp_path, files, *said)
    save(tmp_path / "last.pt", 9, epoch=2, step=360)
    check_order(tmp_path, [*files, "last"], *said)


@pytest.mark.parametrize(
    ("files", "by_metric"),
    [
        (["a", "b", "c", "d"], False),
        (["best-val=0.42", "best-val=0.44", "best-val=0.45", "best-val=0.47"], True),
        (["m0.541", "m0.542", "m0.543", "m0.544"], True),
        (["0.41", "0.42", "0.43", "0.44"], True),
        (["model", "model-v1", "model-v2", "model-v3"], False),
    ],
    ids=str,
)
def test_names_without_numbers_and_files_that_leave_the_order_open(tmp_path, files, by_metric):
    """The names' order stays, and is in doubt; where the files are certain it is theirs."""
    names_only = ["the names have metrics"] if by_metric else []
    if files[0] == "model":
        names_only = ["no number is in the name"]
    for number, (progress, what) in enumerate(((STEPS_ANEW, "steps"), (EPOCHS_ANEW, "epochs"))):
        folder = tmp_path / "open" / str(number)
        save_all(folder, files, progress)
        check_order(folder, files, OPEN.format(folder, what), *names_only)
    save_all(tmp_path / "certain", files, [(1, 30), (0, 10), (2, 40), (0, 20)])
    candidates = Candidates(tmp_path / "certain")
    assert candidates.names == [files[k] for k in (1, 3, 0, 2)]
    assert candidates.notes == [BY.format(tmp_path / "certain", "step")]


def test_files_are_certain_of_the_rest_where_they_agree_with_numbers(tmp_path):
    """Also with epochs and steps in most names; else all is as the names have it."""
    files = ["best", "model_0", "model_1", "model_2"]
    save_all(tmp_path / "a", files, [(1, 25), (0, 10), (1, 20), (2, 30)])
    assert Candidates(tmp_path / "a").names == ["model_0", "model_1", "best", "model_2"]
    save_all(tmp_path / "b", files, [(1, 25), (0, 10), (2, 30), (1, 20)])
    check_order(
        tmp_path / "b",
        files,
        NUMBERS.format(tmp_path / "b", "steps"),
        "no number is in the name of best.pt",
    )
    files = ["best", "epoch_0_step_250", "epoch_0_step_500", "epoch_1_step_100"]
    save_all(tmp_path / "c", files, [(None, 90), (None, 250), (None, 500), (None, 100)])
    check_order(
        tmp_path / "c",
        files,
        NUMBERS.format(tmp_path / "c", "steps"),
        "no epoch or step is in the name of best.pt",
    )


def test_steps_begin_anew_where_some_files_say_no_epoch(tmp_path):
    save_all(tmp_path, "abc", [(0, 250), (None, 500), (1, 100)])
    check_order(tmp_path, [*"abc"], OPEN.format(tmp_path, "steps"))


def test_a_list_keeps_its_own_order(tmp_path):
    for k, name in enumerate(("b", "c", "a")):
        save(tmp_path / f"{name}.pt", k, step=10 - k)
    assert names([tmp_path / f"{name}.pt" for name in "bca"]) == ["b.pt", "c.pt", "a.pt"]
    assert names([tmp_path / f"{name}.pt" for name in "abc"]) == [
        "a.pt",
        "c.pt",
        "b.pt",
    ]  # a shell's


def test_values_inside_the_weights_do_not_count(tmp_path):
    """Only those at the top: "step" in a dict of arguments is none of the training."""
    for k, name in enumerate("ba"):
        torch.save({"model": state(k), "args": {"step": k}}, tmp_path / f"{name}.pt")
    assert names(tmp_path) == ["a.pt", "b.pt"]


# transformers' Trainer ---------------------------------------------------------------------------


class Arguments:
    """Stands for transformers.TrainingArguments; its strategy was an enumeration's member."""

    def __init__(self, **values):
        self.__dict__.update(values)


def trainer_output(folder, steps, state=None, arguments=None):
    """Checkpoints at these steps; the newest has these files of state and arguments."""
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        save_file(
            {"w": torch.full((2,), float(step))}, folder / f"checkpoint-{step}/model.safetensors"
        )
    last = folder / f"checkpoint-{max(steps)}"
    if state is not None:
        (last / "trainer_state.json").write_text(
            state if isinstance(state, str) else json.dumps(state)
        )
    if arguments is not None:
        content = Arguments(**arguments) if isinstance(arguments, dict) else arguments
        torch.save(content, last / "training_args.bin")
    return [folder / f"checkpoint-{step}" for step in steps]


STEPS = {"save_total_limit": 2, "save_strategy": "steps"}


@pytest.mark.parametrize(
    ("steps", "state", "arguments", "gone"),
    [
        ((500, 600), {"global_step": 600, "save_steps": 100}, STEPS, "4 of 6 .*100, 200, 300, 400"),
        ((500, 620), {"global_step": 620, "save_steps": 100}, STEPS, "5 of 7 .*300, 400, 600"),
        ((100, 200), {"global_step": 200, "save_steps": 100}, STEPS, ""),
        # what is there does not fit what was saved
        ((550, 600), {"global_step": 600, "save_steps": 100}, STEPS, ""),
        ((500, 600), {"global_step": 500, "save_steps": 100}, STEPS, ""),
        ((500, 600), {"global_step": 600, "save_steps": 0.1}, STEPS, ""),
        ((500, 600), {"global_step": 600, "save_steps": 0}, STEPS, ""),
        ((500, 600), {"global_step": 600, "save_steps": "100"}, STEPS, ""),
        ((5, 600_000_000), {"global_step": 600_000_000, "save_steps": 1}, STEPS, ""),
        (
            (500, 600),
            {"global_step": 600, "save_steps": 100},
            STEPS | {"save_strategy": "best"},
            "",
        ),
        ((500, 600), {"global_step": 600, "save_steps": 100}, {"save_total_limit": None}, ""),
        ((500, 600), {"global_step": 600, "save_steps": 100}, None, ""),
        ((500, 600), {"global_step": 600, "save_steps": 100}, [1, 2], ""),
        ((500, 600), None, STEPS, ""),
        ((500, 600), "[" * 100_000, STEPS, ""),
        ((500, 600), "[1]", STEPS, ""),
        ((500, 600), "", STEPS, ""),
        # at the end of each epoch
        (
            (40, 50),
            {"global_step": 50, "epoch": 5.0},
            STEPS | {"save_strategy": "epoch"},
            "3 of 5 .*steps 10, 20, 30:",
        ),
        ((40, 50), {"global_step": 50, "epoch": 4.6}, STEPS | {"save_strategy": "epoch"}, ""),
        ((40, 50), {"global_step": 50, "epoch": 1e9}, STEPS | {"save_strategy": "epoch"}, ""),
    ],
)
def test_what_save_total_limit_has_removed(tmp_path, steps, state, arguments, gone):
    paths = trainer_output(tmp_path, steps, state, arguments)
    found = removed(paths)
    if not gone:
        assert not found and not Candidates(tmp_path).notes
        return
    with pytest.warns(CandidateWarning, match=gone):
        assert Candidates(tmp_path).notes == found
    assert found[0].startswith(f"{tmp_path}: ") and found[0].endswith("save_total_limit=2")


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("plain", [False, True])
def test_nothing_beside_checkpoints_is_run(tmp_path, plain):
    ran = tmp_path / "ran"
    out = trainer_output(
        tmp_path / "out", (500, 600), {"global_step": 600, "save_steps": 100}, Attack(ran)
    )
    if plain:  # no archive
        (out[-1] / "training_args.bin").write_bytes(pickle.dumps(Attack(ran)))
    assert len(Candidates(tmp_path / "out")) == 2
    assert not ran.exists()


# DeepSpeed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "latest", [b"../elsewhere", b"/etc", b"\xff\0", b"", b"global_step1\n", b"x" * 10_000]
)
def test_what_deepspeed_calls_the_latest_is_not_trusted(tmp_path, latest):
    """It stands in a message, as the name of a directory, or not at all."""
    folder = tmp_path / "run" / "global_step1"
    folder.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for place in (folder, tmp_path / "elsewhere"):
        torch.save({"module": state()}, place / "mp_rank_00_model_states.pt")
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    (tmp_path / "run" / "latest").write_bytes(latest)
    with pytest.raises(CandidateError, match="a checkpoint of DeepSpeed") as error:
        Candidates(tmp_path / "run")
    named = latest.strip() == b"global_step1"
    assert ("-t global_step1" in str(error.value)) != named
    assert Path(error.value.where) == tmp_path / "run"
