"""The claim border on a tiny transformer, and what it says of rows that are made up."""

import json

import matplotlib
import pytest
from claims import border, border_points, text
from claims.job import Job
from claims.rows import Rows, pivot
from claims.runs import Plan, train
from stand_ins import little_text

N = 4
TWA, COARSE = border.METHOD.name, border.COARSE.name
ALWAYS = {*border.FIXED.values(), TWA, border.EQUAL_STEPS, border.EQUAL_COST, border.ON}
TINY = {
    "N": N,
    "SPACING": 2,
    "STEPS": 12,
    "WARMUP": 1,
    "WINDOWS": 64,
    "BATCH": 4,
    "WIDTH": 16,
    "CONTEXT": 16,
    "SIZES": {8: 1, 16: 1},
    "BASE": 8,
    "FACTORS": {
        border.TRAINED: (8,),
        border.LEFT_OF: (1 / 4,),
        border.APART: (1 / 2, 1),
        border.BATCH_OF: (4, 8),
        border.SIZE_OF: (8, 16),
    },
}
COLUMNS = {
    border.TRAINED: ["16 steps"],
    border.LEFT_OF: ["1/4 left"],
    border.APART: ["1 apart", "2 apart"],
    border.BATCH_OF: ["batch 4", "batch 8"],
    border.SIZE_OF: ["2040 weights", "6k weights"],
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A job whose models are trained for a few steps."""
    little_text(monkeypatch)
    monkeypatch.setattr(text, "EVAL_WINDOWS", 16)
    for name, value in TINY.items():
        monkeypatch.setattr(border_points, name, value)
    monkeypatch.setattr(border, "N", N)
    monkeypatch.setattr(border, "BRANCH", N // 2)
    return Job(0, tmp_path)


def run_of(point):
    return point.run.folder.name


def test_rows(tiny):
    rows = border.run(tiny)
    assert json.loads(json.dumps(rows)) == rows
    assert {task: rows.where(task=task).of("setting") for task in rows.of("task")} == COLUMNS
    base = {r["method"]: r for r in rows.where(task=border.TRAINED, setting="16 steps")}
    shared = (
        (border.APART, "2 apart"),
        (border.BATCH_OF, "batch 4"),
        (border.SIZE_OF, "6k weights"),
    )
    for task, setting in shared:
        for r in rows.where(task=task, setting=setting):
            own = {"task": task, "setting": setting, "x": r["x"]}
            assert r == base[r["method"]] | own
    for task, settings in COLUMNS.items():
        for setting in settings:
            mine = rows.where(task=task, setting=setting)
            check(mine, unit=2 if setting == "batch 8" else 1)
            is_base = (task, setting) in shared or mine[0]["point"] == base["last"]["point"]
            combined = is_base or task in (border.TRAINED, border.LEFT_OF)
            more = {border.EMA_AFTER, border.TWA_AFTER} if combined else set()
            assert set(mine.of("method")) == ALWAYS | more | ({COARSE} if is_base else set())
    # as many samples, whatever the batch
    assert len({round(r["cost"], 6) for r in rows.where(method="last")}) == 1
    steps = [r["steps"] for r in rows.where(task=border.BATCH_OF, method=TWA)]
    assert steps == [12, 8]  # 12 / sqrt(2)

    border.findings(rows)
    assert pivot(rows).count("| last ") == len(COLUMNS)


def check(rows, unit):
    """Costs and figures of a point, by their definition."""
    mine = {r["method"]: r for r in rows}
    assert len(mine) == len(rows)
    ours, look = mine[TWA], mine["last"]["cost"]
    assert mine["SWA"]["cost"] == pytest.approx(look)
    assert mine["EMA"]["cost"] == pytest.approx(5 * look)
    assert ours["cost"] > unit * ours["steps"] + look  # a start was chosen
    assert mine[border.EQUAL_STEPS]["steps"] == ours["steps"]
    assert mine[border.EQUAL_STEPS]["cost"] == unit * ours["steps"]
    assert abs(mine[border.EQUAL_COST]["cost"] - ours["cost"]) <= unit / 2
    on = mine[border.ON]
    assert on["cost"] == pytest.approx(unit * on["steps"] + 5 * look)
    if "left" not in ours["setting"]:
        assert abs(on["cost"] - ours["cost"]) <= unit / 2
    else:  # no further than to the end of the schedule
        assert on["steps"] <= 16 - ours["stopped"]
    if border.EMA_AFTER in mine:
        ema, twa = mine[border.EMA_AFTER], mine[border.TWA_AFTER]
        assert ema["cost"] == pytest.approx(ema["steps"] + 5 * look)
        assert 0 <= ours["cost"] + 0.5 - ema["cost"] < border.BRANCH + 1
        assert twa["steps"] == ours["steps"] and twa["cost"] > twa["steps"] + look
    if ours["setting"] != "1 apart":  # there the EMA is of other candidates
        assert ours["fall"] == mine["EMA"]["val"] - on["val"]
    best = min(mine[m]["val"] for m in border.FIXED.values())
    assert ours["noise"] == mine["last"]["val"] - best


def test_points_are_of_the_runs_that_they_say(tiny):
    found = {setting: point for _, setting, _, point in border_points.points(tiny)}
    main = found["16 steps"].run
    steps = {setting: steps_of(point.candidates()) for setting, point in found.items()}
    assert steps["16 steps"] == [10, 12, 14, 16] and steps["1/4 left"] == [6, 8, 10, 12]
    assert steps["1 apart"] == [13, 14, 15, 16] and steps["batch 8"] == [5, 6, 7, 8]
    # the checkpoints in between are of the same run
    fine = found["1 apart"].fine
    for step in (14, 16):
        assert fine.path(step).read_bytes() == main.path(step).read_bytes()
    # a run of which only the end is kept is one run
    point = found["batch 8"]
    assert point.run.plan.lr == pytest.approx(2**0.5 * main.plan.lr) and point.unit == 2
    whole = train(point.task, Plan(8, 1, point.run.plan.lr), tiny.folder / "whole", tiny.seed)
    for step in (5, 8):
        assert whole.path(step).read_bytes() == point.run.path(step).read_bytes()
    assert len(point.task.train.data) == 64 and len(next(iter(point.task.train))) == 8


def steps_of(candidates):
    return [int(name.split("-")[-1].split(".")[0]) for name in candidates.names]


def test_training_on_ends_where_the_cost_does(tiny):
    """It goes on with the same bits as a longer run, whatever the spacing."""
    found = {setting: point for _, setting, _, point in border_points.points(tiny)}
    point, plan = found["16 steps"], found["16 steps"].run.plan
    row = border.trained_on(tiny, point, 13)
    assert row["method"] == border.ON and row["steps"] == 13
    folder = tiny.folder_of(point.workload)
    first, then = folder / "constant-on-16-5-5", folder / "constant-on-16-5-8-2"
    names = [path.name for path in sorted(then.glob("step-*"))]
    assert names == [f"step-0000{k}.safetensors" for k in (23, 25, 27, 29)]
    longer = Plan(29, 29, plan.lr, warmup=plan.warmup)
    whole = train(point.task, longer, tiny.folder / "whole", tiny.seed)
    assert whole.path(29).read_bytes() == (then / names[-1]).read_bytes()
    assert len(list(first.glob("step-*"))) == 1

    cosine = found["1/4 left"]
    row = border.trained_on(tiny, cosine, 3)
    assert row["steps"] == 3 and border.trained_on(tiny, cosine, 99)["steps"] == 4


def test_quick_has_fewer_points(tiny, monkeypatch):
    quick = {border.TRAINED: (8,), border.LEFT_OF: (), border.APART: (1,), border.BATCH_OF: (4,)}
    monkeypatch.setattr(border_points, "QUICK", quick | {border.SIZE_OF: (16,)})
    job = Job(0, tiny.folder, "quick")
    found = list(border_points.points(job))
    assert [task for task, *_ in found] == [t for t in COLUMNS if t != border.LEFT_OF]
    assert len({point.key for *_, point in found}) == 1
    assert found[0][3].spacing == 1 and found[0][3].steps == 2


# What is said of rows ----------------------------------------------------------------------------


def made_up(gains, seeds=3):
    """Rows of points at which a trained average has such gains over annealing at equal cost, and
    training on gains that less.
    """
    rows = Rows()
    for seed in range(seeds):
        for k, gained in enumerate(gains):
            where = {"task": border.TRAINED, "setting": f"{2**k} steps", "x": 2.0**k, "seed": seed}
            where |= {"point": f"p{k}", "steps": 1, "looks": 1.0, "cost": 2.0}
            noise = 0.001 * seed
            tests = dict.fromkeys(border.FIXED.values(), 1.3) | {"EMA": 1.2, "LAWA": 1.1}
            tests |= {
                TWA: 1.0,
                border.EQUAL_STEPS: 1.0 + noise,
                border.EQUAL_COST: 1 + gained + noise,
            }
            tests |= {border.ON: 1.0, border.EMA_AFTER: 0.5, border.TWA_AFTER: 0.6, COARSE: 1.25}
            for method, test in tests.items():
                # EMA is the best on validation data, LAWA on test data
                val = 0.0 if method == "EMA" else test
                rows.append(where | {"method": method, "val": val, "test": test})
            rows.where(method=TWA)[-1].update(fall=0.5 - gained, pace=0.1, noise=0.2)
    return rows


def test_findings():
    found = border.findings(made_up([-0.1, 0.0, 0.1]))
    assert (
        f"how long it has trained: gain of {TWA} over best fixed average: 1 steps +0.2000 ± 0.0000"
        " (clear); 2 steps +0.2000 ± 0.0000 (clear); 4 steps +0.2000 ± 0.0000 (clear)"
    ) in found
    text = "; 2 steps +0.0010 ± 0.0006; 4 steps +0.1010 ± 0.0006 (clear)"
    assert any("over annealing, equal cost: 1 steps -0.0990" in f and text in f for f in found)
    text = "by intervals of 95 %: ahead at 4 steps; not told apart at 2 steps; behind at 1 steps"
    assert any("and annealing, equal cost, of 3 points" in f and f.endswith(text) for f in found)
    assert any(f.endswith("with each factor: how long it has trained +1.00") for f in found)
    text = (
        "cost of the average: rank correlation -1.00; TWA ahead at 2 points, 0.4 to 0.5; behind at"
    )
    assert any(f"{text} 1 points, 0.6 to 0.6" in f for f in found)
    assert any("expected from the past: rank correlation -;" in f for f in found)
    assert any(
        f.startswith("gain of annealing, then EMA")
        and "over annealing, equal cost: 1 steps +0.4010" in f
        for f in found
    )
    assert found[-1].startswith("gain of fine coefficients over those per tensor")
    assert found[-1].count("+0.2500") == 3


def test_one_seed_is_never_clear():
    assert not any("(clear)" in f for f in border.findings(made_up([-0.1, 0.1], seeds=1)))


def test_picture():
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure()
    border.picture(figure, made_up([-0.1, 0.0, 0.1]))
    figure.canvas.draw()
    shown = [axes for axes in figure.axes if axes.get_visible()]
    first, last = shown  # the factors that there are, and all points
    assert first.get_xscale() == "log" and first.get_xlabel() == border.AXES[border.TRAINED]
    assert [t.get_text() for t in first.get_xticklabels()] == ["1", "2", "4"]
    means = [float(y) for line in first.containers for y in line[0].get_ydata()]
    assert means[:3] == pytest.approx([0.2] * 3)  # over the best fixed average
    assert [len(points.get_offsets()) for points in last.collections] == [3] * len(border.RIVALS)
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == list(border.RIVALS)
    plt.close(figure)


def test_labels():
    labels = [border_points.short(x) for x in (1 / 16, 3 / 4, 0.5, 4.0, 512.0, 31616.0)]
    assert labels == ["1/16", "3/4", "1/2", "4", "512", "32k"]
