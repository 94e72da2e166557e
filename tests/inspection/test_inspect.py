"""twa inspect: every fault that can be put into a heap is found, a sound heap gives no finding, and
figures agree with those of whole tensors.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from twa import averages
from twa.cli import main as cli
from twa.inspection import report as inspect_report
from twa.inspection import run as inspect
from twa.inspection import samples as heap
from twa.inspection.barrier import barrier_findings, bump
from twa.inspection.contents import read_contents
from twa.inspection.findings import Finding
from twa.inspection.geometry import Geometry
from twa.inspection.results import Barrier
from twa.inspection.samples import sample_findings, take_sample
from twa.io.candidates import Candidates
from twa.io.errors import CandidateError
from twa.merge.run import Merge
from twa.merge.settings import Settings
from twa.tasks.contract import Task

SHAPES = {
    "up.weight": (40, 50),
    "down.weight": (50, 40),
    "up.bias": (50,),
    "norm.weight": (300,),
    "scale": (),
}


SCALAR = Finding(
    "note", "odd-shapes", "empty or a single number: 1 tensor: scale []", "nothing needs to be done"
)


def state(seed, spread=1.0, base=None):
    """Weights of an initialisation, or at a distance from another; norm weights are near 1."""
    g = torch.Generator().manual_seed(seed)
    drawn = {key: torch.randn(shape, generator=g) * spread for key, shape in SHAPES.items()}
    drawn["norm.weight"] = 1.0 + 0.01 * drawn["norm.weight"]
    return (
        drawn
        if base is None
        else {key: base[key] + t for key, t in drawn.items()}
        | {"norm.weight": drawn["norm.weight"]}
    )


def run(n, seed=0, spread=0.3):
    """A heap of one initialisation."""
    return [state(100 * seed + 1 + k, spread, state(seed)) for k in range(n)]


def written(folder, states, suffix=".safetensors"):
    paths = []
    for k, s in enumerate(states):
        paths.append(folder / f"c_{k}{suffix}")
        (
            save_file({key: t.contiguous() for key, t in s.items()}, paths[-1])
            if suffix == ".safetensors"
            else torch.save(s, paths[-1])
        )
    return [str(p) for p in paths]


def kinds(findings):
    return sorted(f.kind for f in findings)


def only(findings, kind):
    (found,) = (f for f in findings if f.kind == kind)
    return found


# The look at samples -----------------------------------------------------------------------------


def test_a_sound_heap_gives_no_finding(tmp_path):
    candidates = Candidates(written(tmp_path, run(5)))
    assert sample_findings(candidates) == []
    assert inspect.inspect([str(tmp_path)]).findings == [SCALAR]


def test_unrelated_groups_are_named(tmp_path):
    candidates = Candidates(written(tmp_path, run(3, seed=0) + run(2, seed=7)))
    (found,) = sample_findings(candidates)
    assert (found.severity, found.kind) == ("error", "unrelated")
    assert "(1) c_0, c_1, c_2; (2) c_3, c_4" in found.message


def test_strays_beside_a_large_group_are_no_error(tmp_path):
    candidates = Candidates(written(tmp_path, [state(50), *run(4)]))
    (found,) = sample_findings(candidates)
    assert (found.severity, found.kind) == ("warning", "stray") and found.message.startswith(
        "c_0: "
    )


def test_adapters_of_different_factors_are_no_error(tmp_path):
    states = [{f"lora_A.{key}": t for key, t in state(k).items()} for k in range(3)]
    (found,) = sample_findings(Candidates(written(tmp_path, states)))
    assert (found.severity, found.kind) == ("warning", "unrelated")


def test_chains_link_what_is_far_apart(tmp_path):
    """A long run: the first and the last are unrelated, neighbours are not."""
    a, b = state(1), state(2)
    angles = torch.linspace(0, torch.pi / 2, 5).tolist()
    turn = [
        {key: a[key] * torch.tensor(t).cos() + b[key] * torch.tensor(t).sin() for key in a}
        for t in angles
    ]
    candidates = Candidates(written(tmp_path, turn))
    assert take_sample(candidates).related[0, -1] < heap.RELATED
    assert sample_findings(candidates) == []


def test_few_weights_tell_nothing(tmp_path):
    states = [
        {"weight": torch.randn(10, 10, generator=torch.Generator().manual_seed(k))}
        for k in range(4)
    ]
    assert sample_findings(Candidates(written(tmp_path, states))) == []


def test_norm_weights_do_not_hide_unrelated_matrices(tmp_path):
    """Near 1 in every model, and as many as all other weights; (1, n, 1) is a vector too."""
    states = [
        state(k)
        | {
            "norms": 1 + 0.01 * torch.randn(4000),
            "gamma": 1 + 0.01 * torch.randn(1, 4000, 1),
        }
        for k in range(3)
    ]
    assert kinds(sample_findings(Candidates(written(tmp_path, states)))) == ["unrelated"]


@pytest.mark.parametrize("new_head", [True, False])
def test_one_tensor_of_another_scale_does_not_decide(tmp_path, new_head):
    """A new head of large weights on a shared trunk, or a shared table of large weights: neither is
    refused.
    """
    shared, own = run(3), [state(k + 60) for k in range(3)]
    parts = (
        [("up.weight", shared), ("down.weight", shared), ("head", own)]
        if new_head
        else [("up.weight", own), ("down.weight", own), ("head", shared)]
    )
    states = [
        {
            key: source[k].get(key, source[k]["up.weight"][:5]) * (100 if key == "head" else 1)
            for key, source in parts
        }
        for k in range(3)
    ]
    assert sample_findings(Candidates(written(tmp_path, states))) == []


def test_what_is_the_same_everywhere_does_not_hide_unrelated_weights(tmp_path):
    table = {"position": 100 * torch.randn(30, 30)}
    (found,) = sample_findings(Candidates(written(tmp_path, [state(k) | table for k in range(3)])))
    assert found.kind == "unrelated"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(tmp_path, dtype):
    def cast(states):
        return [{key: t.to(dtype) for key, t in s.items()} for s in states]

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert sample_findings(Candidates(written(tmp_path / "a", cast(run(3))))) == []
    assert kinds(
        sample_findings(
            Candidates(written(tmp_path / "b", cast([state(k) for k in range(3)]), ".pt"))
        )
    ) == ["unrelated"]


def test_sample_is_small_and_spread(tmp_path, monkeypatch):
    """Of a large tensor a few runs are read, the first and the last weights among them; small
    tensors whole.
    """
    states = [state(k) | {"big.weight": torch.randn(1000, 1000)} for k in range(2)]
    candidates = Candidates(written(tmp_path, states))
    read = []
    columns = type(candidates[0]).columns

    def noted(self, key, begin, end, part=None):
        read.append((key, begin, end))
        return columns(self, key, begin, end, part)

    monkeypatch.setattr(type(candidates[0]), "columns", noted)
    take_sample(candidates, 1 << 16)
    big = [(b, e) for key, b, e in read if key == "big.weight"]
    assert min(b for b, _ in big) == 0 and max(e for _, e in big) == 1_000_000 and len(big) >= 6
    assert sum(e - b for _, b, e in read) * 4 <= 2 * 1.2 * (1 << 16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_sampled_nan(tmp_path, value):
    states = run(3)
    states[1]["norm.weight"][7] = value
    (found,) = sample_findings(Candidates(written(tmp_path, states)))
    assert (
        found.kind == "not-finite"
        and found.severity == "error"
        and found.message == "c_1 holds NaN or Inf in norm.weight"
    )


def test_identical_candidates(tmp_path):
    paths = written(tmp_path, [state(0)] * 3)
    (found,) = sample_findings(Candidates.of([Candidates(path)[0] for path in paths]))
    assert found.kind == "identical"
    assert sample_findings(Candidates(written(tmp_path, [state(0)])[:1])) == []


# The whole read ----------------------------------------------------------------------------------


def flat(states, matrices=False):
    return torch.stack(
        [
            torch.cat([t.double().flatten() for t in s.values() if t.dim() > 1 or not matrices])
            for s in states
        ]
    )


@pytest.mark.parametrize("reference", [None, 2])
def test_geometry_agrees_with_whole_vectors(tmp_path, reference):
    states = run(6)
    candidates = Candidates(written(tmp_path, states), block_bytes=1 << 16)
    content = read_contents(candidates)
    # and a sample
    assert candidates.bytes_read < 2.1 * sum(i.nbytes for i in candidates.info.values()) * 6
    g = Geometry(candidates.names, content.matrices, content.others, reference)
    w, m = flat(states), flat(states, matrices=True)
    mean_norm = w.norm(dim=1).mean()
    deltas = w - (w.mean(0) if reference is None else w[reference])
    close = dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(g.norms, w.norm(dim=1), **close)
    torch.testing.assert_close(
        g.distances, torch.stack([(w - row).norm(dim=1) for row in w]) / mean_norm, **close
    )
    torch.testing.assert_close(g.from_center, deltas.norm(dim=1) / mean_norm, **close)
    torch.testing.assert_close(
        g.cosines, torch.nn.functional.cosine_similarity(m[:, None], m[None], dim=-1), **close
    )
    expected = torch.nn.functional.cosine_similarity(deltas[:, None], deltas[None], dim=-1)
    torch.testing.assert_close(g.delta_cosines, expected, rtol=1e-4, atol=1e-5)


def test_nan_and_inf_are_counted_and_the_rest_is_measured(tmp_path):
    states = run(5)
    states[1]["up.weight"].view(-1)[[0, 777, 1999]] = torch.tensor(
        [float("nan"), float("inf"), -float("inf")]
    )
    states[3]["norm.weight"][::2] = float("nan")
    states[4]["up.weight"][:] = 3e38  # its sum overflows, no number does
    result = inspect.inspect(written(tmp_path, states))
    broken = [f.message for f in result.findings if f.kind == "not-finite"]
    assert broken == [
        "c_1 holds NaN or Inf in up.weight (3 of 2000)",
        "c_3 holds NaN or Inf in norm.weight (150 of 300)",
    ]
    assert [p.stem for p in result.members] == ["c_0", "c_2", "c_4"]
    expected = flat([states[0], states[2]])
    assert float(result.geometry.distances[0, 1] * result.geometry.scale) == pytest.approx(
        float((expected[0] - expected[1]).norm()), rel=1e-5
    )


def test_no_candidate_is_sound(tmp_path):
    result = inspect.inspect(written(tmp_path, [{"w": torch.full((3, 3), float("nan"))}] * 2))
    assert (
        result.geometry is None
        and kinds(result.findings) == ["not-finite"] * 2
        and inspect_report.text(result)
    )


def test_constant_tensors(tmp_path):
    frozen = {"frozen": torch.randn(30, 30)}
    found = only(
        inspect.inspect(written(tmp_path, [s | frozen for s in run(3)])).findings,
        "constant",
    )
    assert found.message == "the same in all candidates: 1 tensor, 17.1% of the weights: frozen"


def test_duplicates(tmp_path):
    states = run(6)
    states[3] = states[1]
    states[4] = {key: t.clone() for key, t in states[2].items()}
    states[4]["up.weight"][0, 0] *= 1 + 1e-5
    findings = inspect.inspect(written(tmp_path, states)).findings
    assert only(findings, "duplicates").message == "c_1, c_3 are the same, every tensor"
    assert only(findings, "near-duplicates").message.startswith("c_2, c_4 differ by less")


def test_duplicates_may_differ_in_integers(tmp_path):
    states = [s | {"steps": torch.tensor(7)} for s in run(3)]
    states[2] = states[1] | {"steps": torch.tensor(8)}
    findings = inspect.inspect(written(tmp_path, states)).findings
    assert "duplicates" not in kinds(findings) and "near-duplicates" in kinds(findings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_among_the_candidates(tmp_path, dtype):
    states = run(5)
    states[0] = {
        key: 0.5 * states[1][key] + 0.3 * states[3][key] + 0.2 * states[4][key] for key in SHAPES
    }
    findings = inspect.inspect(
        written(tmp_path, [{key: t.to(dtype) for key, t in s.items()} for s in states])
    ).findings
    assert (
        only(findings, "mean-of-others").message
        == "c_0 is a weighted mean of other candidates, up to rounding: c_1 (0.50), c_3 (0.30), c_4"
        " (0.20)"
    )


def test_extrapolation_is_no_average(tmp_path):
    states = run(3)
    # so c_1 is the mean of c_0 and c_3, and no other
    states.append({key: 2 * states[1][key] - states[0][key] for key in SHAPES})
    findings = inspect.inspect(written(tmp_path, states)).findings
    assert only(findings, "mean-of-others").message.startswith("c_1 is")


def test_outlier(tmp_path):
    states = run(5, spread=0.02)
    states[2] = state(77, 0.6, state(0))
    findings = inspect.inspect(written(tmp_path, states)).findings
    assert only(findings, "outlier").message.startswith("c_2 is")


# Tensors -----------------------------------------------------------------------------------------


def test_tied_only_where_equal_in_every_candidate(tmp_path):
    states = [
        s
        | {
            "head": s["up.weight"].clone(),
            "zeros": torch.zeros(40, 50),
            "nil": torch.zeros(40, 50),
        }
        for s in run(3)
    ]
    result = inspect.inspect(written(tmp_path, states))
    assert only(result.findings, "tied").message.startswith("head = up.weight in every")
    states[2]["head"][20, 20] += 1.0  # neither at the beginning nor at the end
    assert "tied" not in kinds(inspect.inspect(written(tmp_path, states)).findings)


def test_tensors_that_are_not_averaged(tmp_path):
    extra = {
        "steps": torch.tensor(5),
        "mask": torch.ones(3, dtype=torch.bool),
        "none": torch.zeros(0, 4),
    }
    findings = inspect.inspect(written(tmp_path, [s | extra for s in run(3)])).findings
    integers = only(findings, "integers")
    assert (
        integers.severity == "note"
        and "steps (int64 [])" in integers.message
        and "mask (bool [3])" in integers.message
    )
    assert "none [0, 4]" in only(findings, "odd-shapes").message


def test_quantised_checkpoints(tmp_path):
    codes = {"codes": torch.zeros(100, 100, dtype=torch.int8)}
    findings = inspect.inspect(written(tmp_path, [s | codes for s in run(3)])).findings
    assert only(findings, "integers").severity == "error"


def test_mixed_dtypes(tmp_path):
    states = run(3)
    states[1] = {key: t.bfloat16() for key, t in states[1].items()}
    findings = inspect.inspect(written(tmp_path, states)).findings
    assert only(findings, "dtypes").message.startswith(
        "of different dtypes in different candidates: 5 tensors: "
    )


def test_integers_alone(tmp_path):
    result = inspect.inspect(written(tmp_path, [{"codes": torch.arange(5)}] * 2))
    assert "integers" in kinds(result.findings) and inspect_report.text(result)


# Files -------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_are_rows(tmp_path):
    written(tmp_path, run(3))
    (tmp_path / "c_7.safetensors").write_bytes((tmp_path / "c_0.safetensors").read_bytes()[:3000])
    result = inspect.inspect([str(tmp_path / "c_*.safetensors"), str(tmp_path / "missing_*.pt")])
    assert [row.candidate is None for row in result.rows] == [False] * 3 + [True] * 2
    assert (
        kinds(result.findings) == ["odd-shapes", "unreadable", "unreadable"]
        and len(result.geometry) == 3
    )
    printed = inspect_report.text(result)
    assert "c_7.safetensors" in printed and "missing_*.pt" in printed


def test_nothing_can_be_read(tmp_path):
    result = inspect.inspect([str(tmp_path / "missing.pt")])
    assert kinds(result.findings) == ["unreadable"] and result.geometry is None


CHANGES = {
    "1 of 5 tensors missing: up.bias": lambda s: {
        key: t for key, t in s.items() if key != "up.bias"
    },
    "2 unexpected: more.0, more.1": (
        lambda s: s | {"more.0": torch.ones(1), "more.1": torch.ones(1)}
    ),
    "these keys have the prefix 'model.' before the same names": lambda s: {
        f"model.{key}": t for key, t in s.items()
    },
    "tensor 'up.bias': expected shape [50] as in c_1, found [51]": (
        lambda s: s | {"up.bias": torch.ones(51)}
    ),
    "tensor 'up.bias': expected torch.float32 as in c_1, found torch.int64": (
        lambda s: s | {"up.bias": torch.ones(50).long()}
    ),
    "this looks like an adapter (LoRA)": lambda s: {"up.lora_A.weight": torch.ones(3, 3)},
}


@pytest.mark.parametrize("words", CHANGES)
def test_what_does_not_match_the_majority(tmp_path, words):
    """The odd one is the first: the majority counts, not the order."""
    states = run(4)
    states[0] = CHANGES[words](states[0])
    result = inspect.inspect(written(tmp_path, states))
    found = only(result.findings, "layout")
    assert words in found.message and found.message.split(" ")[0].endswith("c_0.safetensors")
    assert [p.stem for p in result.members] == ["c_1", "c_2", "c_3"]


def test_prefix_of_the_others_and_vocabulary(tmp_path):
    states = [
        {f"model.{key}": t for key, t in s.items()} | {"embed.weight": torch.randn(30, 4)}
        for s in run(3)
    ]
    states.append({key.removeprefix("model."): t for key, t in states[2].items()})
    states.append(states[0] | {"embed.weight": torch.ones(32, 4)})
    result = inspect.inspect(written(tmp_path, states))
    assert "vocabulary mismatch (30 and 32 tokens)" in result.rows[4].problem
    assert (
        "5 of 6 tensors missing" in result.rows[3].problem
        and "the others' keys have the prefix 'model.'" in result.rows[3].problem
    )


def test_reference_sets_the_layout_and_the_center(tmp_path):
    states = run(4)
    states[0]["extra"] = torch.ones(1)
    states[2]["extra"] = torch.ones(1)
    paths = written(tmp_path, states)
    result = inspect.inspect(paths, reference=2)
    assert [p.stem for p in result.members] == ["c_0", "c_2"] and result.geometry.center == "c_2"
    assert result.geometry.from_center[1] == 0
    with pytest.raises(ValueError, match="expected 1 to 4, found 5"):
        inspect.inspect(paths, reference=4)
    with pytest.raises(CandidateError, match=r"--reference 1: .* no such file"):
        inspect.inspect([str(tmp_path / "none.pt"), *paths], reference=0)


def test_paths_that_lead_nowhere(tmp_path):
    paths = [*written(tmp_path, run(2)), str(tmp_path / "none.pt")]
    messages = [str(f) for f in inspect.inspect(paths).findings]
    assert any("none.pt: no such file. Look at the path" in m for m in messages), messages


# Losses ------------------------------------------------------------------------------------------


class Well(nn.Module):
    """The loss is that of a double well in one weight: minima at -1 and 1, 1 between them."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))


def well_task(model=Well):
    batches = [torch.ones(2, 1)]
    return Task(
        "well",
        model,
        lambda m, b: (m.w.square() - 1).square().sum(),
        batches,
        batches,
        None,
        None,
        None,
        "",
    )


def wells(folder, values):
    return written(folder, [{"w": torch.tensor([v])} for v in values])


def test_minima_that_are_not_connected(tmp_path):
    result = inspect.inspect(wells(tmp_path, [-1.1, 1.0, 1.1]), task=well_task())
    b = result.barrier
    assert b.ends == (0, 2) and [share for share, _ in b.line] == [0, 0.25, 0.5, 0.75, 1]
    assert b.line[2][1] == pytest.approx(1.0, abs=1e-6) and b.losses[1] == pytest.approx(
        0.0, abs=1e-6
    )
    assert (
        only(result.findings, "barrier").severity == "warning"
        and "not linearly connected" in only(result.findings, "barrier").message
    )
    assert "rises above both ends by 0.9559 at 50%" in only(result.findings, "line").message


@pytest.mark.parametrize(
    "values, words",
    [
        ([0.9, 1.05], "at least as good as the best"),
        ([1.0, 1.3], "worse than the best candidate, better than"),
    ],
)
def test_candidates_of_one_minimum(tmp_path, values, words):
    findings = inspect.inspect(wells(tmp_path, values), task=well_task()).findings
    assert (
        only(findings, "barrier").severity == "note"
        and words in only(findings, "barrier").message
        and "line" not in kinds(findings)
    )


def test_losses_that_are_not_finite():
    b = Barrier(
        ["a", "b"],
        [1.0, float("inf")],
        float("inf"),
        (0, 1),
        [(0.0, 1.0), (0.5, float("inf")), (1.0, float("inf"))],
        0,
    )
    assert kinds(barrier_findings(b)) == ["barrier", "loss-not-finite"] and bump(b.line) == (
        0.0,
        0.5,
    )


def test_candidates_that_do_not_fit_the_model(tmp_path):
    result = inspect.inspect(written(tmp_path, run(3)), task=well_task())
    assert only(result.findings, "candidates").severity == "error" and result.geometry is not None


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


def test_losses_are_those_of_twa_average(tmp_path):
    """With BatchNorm, which is re-estimated for averages and left alone for single candidates."""
    g = torch.Generator().manual_seed(3)
    batches = [torch.randn(16, 4, generator=g) + 2 for _ in range(3)]
    task = Task(
        "bn",
        Normed,
        lambda m, b: (m(b) - b.sum(1, keepdim=True)).square().mean(),
        batches,
        batches,
        None,
        None,
        None,
        "",
    )
    torch.manual_seed(0)
    models = [Normed().half() for _ in range(3)]  # rounded to the files' dtype
    paths = written(tmp_path, [m.state_dict() for m in models])
    b = inspect.inspect(paths, task=task).barrier
    average = Merge(task, Candidates(paths), Settings(methods=(), compare=True))
    results = {r.method: r for r in average.run() and average.results}
    assert (
        b.mean == results["uniform"].val_loss
        and min(b.losses) == results["best single"].val_loss
        and b.losses[-1] == results["last"].val_loss
    )
    assert b.bn_batches == 3
    average.evaluator.load(
        0.75 * averages.candidate(3, b.ends[0]) + 0.25 * averages.candidate(3, b.ends[1])
    )
    assert b.line[1][1] == average.evaluator.loss()


# Output ------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    states = run(3)
    states[1]["norm.weight"][0] = float("nan")
    paths = written(tmp_path, states)
    out = tmp_path / "out" / "deep"
    assert cli.main(["inspect", *paths, "-o", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == set(inspect_report.FILES)
    content = json.loads((out / "inspect.json").read_text())
    assert [f["kind"] for f in content["findings"]] == ["not-finite", "odd-shapes"] and len(
        content["distances"]
    ) == 2
    assert content["files"][1]["problem"] == "NaN or Inf" and content["files"][0][
        "parameters"
    ] == sum(t.numel() for t in states[0].values())
    page = (out / "inspect.md").read_text()
    assert page.startswith("# 3 candidates: 1 error, 0 warnings, 1 note") and (
        out / "inspect.png"
    ).read_bytes().startswith(b"\x89PNG")
    assert (
        "- error: c_1 holds NaN or Inf in norm.weight (1 of 300). Leave this candidate out."
        in capsys.readouterr().out
    )


def test_command_with_a_task(tmp_path, capsys):
    (tmp_path / "task.py").write_text(
        "import torch\n"
        "class Well(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = torch.nn.Parameter(torch.zeros(1))\n"
        "def model(): return Well()\n"
        "def train_data(): return [torch.ones(2, 1)]\n"
        "val_data = train_data\n"
        # NaN below -2
        "def loss(model, batch): return (model.w ** 2 - 1).square().sum() + 0 * (model.w +"
        " 2).log().sum()\n"
    )
    paths = wells(tmp_path, [-3.0, -1.0, 1.0])
    assert (
        cli.main(
            [
                "inspect",
                *paths,
                "--task",
                str(tmp_path / "task.py"),
                "--device",
                "cpu",
                "-o",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    content = json.loads(
        (tmp_path / "out" / "inspect.json").read_text(),
        parse_constant=lambda text: pytest.fail(text),
    )
    assert content["losses"] == [None, 0.0, 0.0] and len(content["line"]["points"]) == 5
    printed = capsys.readouterr().out
    assert "the loss of c_0 is NaN or Inf" in printed and "best 0.0000 (c_1)" in printed


@pytest.mark.parametrize(
    "arguments", [["--reference", "9"], ["--task", "none.py"], ["-o", "{file}"]]
)
def test_bad_input(tmp_path, capsys, arguments):
    paths = written(tmp_path, run(2))
    assert cli.main(["inspect", *paths, *(a.format(file=paths[0]) for a in arguments)]) == 2
    assert "twa: error:" in capsys.readouterr().err


@pytest.mark.parametrize("n", [1, 3, 61])
def test_pictures_of_any_number(tmp_path, n):
    result = inspect.inspect(written(tmp_path, [{"w": torch.randn(20, 20)} for _ in range(n)]))
    assert inspect_report.picture(result).startswith(
        b"\x89PNG"
    ) and f"# {n} candidate" in inspect_report.markdown(result)
