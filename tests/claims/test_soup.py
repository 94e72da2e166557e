"""The claim soup on tiny workloads, and on stand-ins of the CLIP fine-tunes."""

import dataclasses
import itertools
import json

import matplotlib
import numpy
import pytest
import torch
from claims import job as jobs
from claims import soup, text, workloads
from claims.images import image_task
from claims.job import Job
from claims.rows import Rows, table
from claims.runs import Plan
from claims.workloads import Workload
from stand_ins import clip_files, digits, folder_of, little_digits, little_text, times
from twa.io.errors import TwaError
from twa.merge.settings import TwaMethod

N = 3
KEYS = {"seed", "setting", "steps", "looks", "cost", "val", "test", "seconds", "note"}
NAMES = [TwaMethod.parse(m).name for m in soup.TRAINED]
METHODS = {*soup.FIXED, *(f"{name}, {b}" for name in NAMES for b in soup.BUDGETS)}
METHODS |= {f"{name}, {b}" for name in soup.LEARNED for b in ("by default", "a quarter")}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A job whose models are trained for a few steps."""
    little_text(monkeypatch)
    little_digits(monkeypatch)
    monkeypatch.setattr(text, "EVAL_WINDOWS", 16)
    monkeypatch.setattr(soup, "FINETUNES", N)
    monkeypatch.setattr(soup, "STEPS", (20, 30))
    monkeypatch.setattr(soup, "EPOCHS", 1)
    plan = Plan(40, 10, lr=3e-3)
    gpt = dataclasses.replace(workloads.gpt(width=16, depth=1, context=64), usual=plan)
    vit = digits("vit", plan, twa_steps=56)
    monkeypatch.setattr(jobs, "BUILT_IN", {"gpt": lambda: gpt, "vit": lambda: vit})
    return Job(0, tmp_path, "quick")


def check(rows, task, n):
    """Every method once; costs by their definition."""
    mine = {r["method"]: r for r in rows.where(task=task)}
    assert mine.keys() == METHODS and len(rows.where(task=task)) == len(METHODS)
    for r in mine.values():
        assert r.keys() >= KEYS
        assert all(numpy.isfinite(r[key]) for key in ("cost", "val", "test"))
    look = mine["uniform"]["cost"]
    greedy = mine["greedy soup"]["cost"]
    assert mine["best single"]["cost"] == pytest.approx(n * look)
    assert greedy == pytest.approx((2 * n - 1) * look)
    best = min((mine[m] for m in soup.FIXED), key=lambda r: r["val"])
    for r in mine.values():
        if "budget" not in r:
            continue
        own, is_learned = r["steps"] + r["looks"], r["average"] in soup.LEARNED
        start = r["cost"] - own
        assert is_learned or start > look  # the start was chosen, and looked at on all of the data
        if r["budget"] == "a quarter":
            assert r["looks"] == 0
            assert r["steps"] == max(1, round(greedy / 4 - (0 if is_learned else start)))
        if r["budget"] in ("a quarter", "by default"):
            assert r["note"].startswith("from uniform" if is_learned else "from start")
        else:
            assert r["note"].startswith(f"from {best['method']}")
            assert r["cost"] == pytest.approx(own + greedy + look)
            assert r["val"] <= best["val"] + 1e-6
    return mine


def check_shown(rows, tasks):
    assert json.loads(json.dumps(rows)) == rows
    found = soup.findings(rows)
    assert [f.partition(":")[0] for f in sorted(found)] == sorted(tasks * 6)
    assert not any("not measured" in f for f in found)
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure()
    soup.picture(figure, rows)
    figure.canvas.draw()
    assert [axes.get_title() for axes in figure.axes] == list(tasks)
    assert all(axes.get_xscale() == "log" for axes in figure.axes)
    plt.close(figure)
    assert len(table(rows, soup.METRIC).splitlines()) == 2 + len(tasks) * len(METHODS)


def test_built_in(tiny):
    rows = soup.run(tiny)
    tasks = ("GPT, source text to English", "ViT, restoring to digits")
    for task in tasks:
        mine = check(rows, task, N)
        assert all(("metric" in r) == task.startswith("ViT") for r in mine.values())
    check_shown(rows, tasks)

    made = tiny.folder.glob("runs-*/vit/seed-0/*/run.json")
    plans = {p.parent.name: json.loads(p.read_text())["plan"] for p in made}
    names = [f"head-finetune-{k:02d}" for k in range(N)]
    assert plans.keys() == {"restored", "head", *names}
    assert len({plans[name]["lr"] for name in names}) == N
    assert all(4 <= plans[name]["steps"] <= 6 for name in names)
    restored, head = (
        {k: v for k, v in state(tiny, name).items() if not k.startswith("head.")}
        for name in ("restored", "head")
    )
    # the head alone was trained
    assert restored.keys() == head.keys() and all(torch.equal(restored[k], head[k]) for k in head)
    assert state(tiny, "restored")["head.weight"].shape == (64, 48)

    before = times(tiny.folder)
    made = soup.vit(tiny)  # from the runs that are there
    assert len(made.candidates) == N and before == times(tiny.folder)


def state(job, name):
    (path,) = job.folder.glob(f"runs-*/vit/seed-0/{name}/state-*.pt")
    return torch.load(path, weights_only=True)["model"]


def test_finetunes_have_an_order_of_the_data_each(tiny):
    """Equal plans would else give equal fine-tunes."""
    task = image_task("vit", heldout=48, val=48)
    workload = Workload("vit", "", lambda **o: task, Plan(2, 2, 1e-3), (), 1)
    plan = Plan(2, 2, 1e-3)
    start = tiny.run(workload, "start", task, plan)
    made = [
        tiny.run(workload, name, task, plan, start=(start, 2), optimizer_state=False, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = (run.state(2)["model"]["embed.weight"] for run in made)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_restoring_hides_patches():
    task = image_task("vit")
    made = soup.restoring(task)
    batch = next(iter(task.val))
    seen = []

    def model(images):
        seen.append(images)
        return images.flatten(1)

    loss = made.loss(model, batch)
    changed = (seen[0] != batch[0]).float()
    assert made.model()(batch[0]).shape == batch[0].flatten(1).shape and made.metric is None
    assert loss == pytest.approx(float((batch[0] * changed).square().mean()))
    patches = seen[0].unfold(2, 2, 2).unfold(3, 2, 2).abs().sum((-1, -2))  # (b, 1, 4, 4)
    assert 0.4 < float((patches == 0).float().mean()) < 0.6


def test_clip(tmp_path):
    """Fine-tunes on disk: nothing is trained but averages."""
    root, finetunes = folder_of(tmp_path / "pets"), clip_files(tmp_path / "soup", 4)
    options = {"finetunes": str(finetunes), "batch": 2, "epochs": 2}
    job = Job(1, tmp_path / "out", "full", root, options=options)
    unseen = numpy.zeros(18)
    unseen[:12] = 1
    numpy.save(finetunes / soup.UNSEEN, unseen)
    made = soup.clip(job)
    assert len(made.candidates) == 4 and made.steps == 2 * 3  # halves of the 12 unseen, 2 at a time

    rows = soup.run(dataclasses.replace(job, options=options | {"epochs": 1}))
    mine = check(rows, "CLIP, pets", 4)
    assert mine["uniform"]["looks"] == pytest.approx(6 / 2 / 3)
    assert rows.of("setting") == ["4 fine-tunes"] and rows.of("seed") == [1]
    assert all("metric" in r for r in rows)
    assert mine[f"{NAMES[0]}, by default"]["steps"] <= 3 and not (tmp_path / "out").exists()
    check_shown(rows, ("CLIP, pets",))
    (finetunes / soup.UNSEEN).unlink()
    made = soup.clip(dataclasses.replace(job, options=options | {"epochs": None}))
    assert len(made.task.heldout) == 1


def test_options_that_do_not_fit(tmp_path):
    for job in (
        Job(0, tmp_path, "full", tmp_path),
        Job(0, tmp_path, options={"finetunes": str(tmp_path)}),
    ):
        with pytest.raises(TwaError, match="soup: expected --finetunes DIR with --data IMAGES"):
            soup.run(job)
    root, finetunes = folder_of(tmp_path / "pets"), clip_files(tmp_path / "soup", 1)
    with pytest.raises(TwaError, match="expected at least 2 fine-tunes, found 1"):
        soup.run(Job(0, tmp_path, "full", root, options={"finetunes": str(finetunes)}))


def test_findings_say_where_the_claim_fails():
    """Greedy soup's cost 100, loss 1.0; TWA-v per tensor reaches it with a quarter, the others do
    not.
    """
    rows = Rows()
    for seed in (0, 1):
        common = {"seed": seed, "task": "T", "setting": "2 fine-tunes", "val": 1.0, "steps": 1}
        common |= {"looks": 0.0}
        for method in soup.FIXED:
            row = {"method": method, "test": 1.0, "cost": 100.0}
            rows.append(common | row | {"mean of two": -0.25, "members": 2})
        for name, budget in itertools.product((*NAMES, *soup.LEARNED), soup.BUDGETS):
            row = {"method": f"{name}, {budget}", "average": name, "budget": budget, "cost": 25.0}
            rows.append(common | row | {"test": 0.9 if name == NAMES[1] else 1.1})
    found = soup.findings(rows)
    assert found[0].startswith(
        "T: the mean of two fine-tunes has a validation loss 0.2500 below the mean of theirs"
    )
    assert f"{NAMES[1]} (25% of the cost): -0.1000 ± 0.0000, lower on 2 of 2 seeds" in found[2]
    reached = "T: at a quarter of greedy soup's cost greedy soup's test loss 1.0000 is reached by"
    assert found[-1] == f"{reached} {NAMES[1]}"
    for r in rows.where(average=NAMES[1]):
        r["test"] = 1.1
    assert soup.findings(rows)[-1].endswith("is reached by none")
