"""README.md and docs/: every Python example runs as it stands, every command parses, every link and
anchor exists, and the API pages have all that is public.
"""

import argparse
import functools
import gc
import re
import shlex
import socket
from pathlib import Path

import pytest
import torch
import twa
from safetensors.torch import save_file
from twa.cli.main import COMMANDS, parser
from twa.io.candidates import Candidates
from twa.merge.run import Merge
from twa.merge.settings import Settings, TwaMethod
from twa.tasks.batches import first_batch
from twa.tasks.contract import load_task

import twa_kernels as tk

ROOT = Path(__file__).parent.parent
DOCS = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
PAGES = [*DOCS, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text(page):
    return (ROOT / page).read_text()


def examples(page):
    return [code for language, code in FENCED.findall(text(page)) if language == "python"]


# Examples -----------------------------------------------------------------------------------------


def net():
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 1)
    )


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def evaluate(model):
    model.eval()
    value = float(loss(model, (torch.ones(16, 6), torch.ones(16, 1))).detach())
    model.train()
    return value


def save_nets(folder, names):
    Path(folder).mkdir()
    for k, name in enumerate(names):
        torch.manual_seed(k)
        save_file(net().state_dict(), f"{folder}/{name}.safetensors")


def in_a_trainer():
    """What the examples take for granted: a model, its data and a folder of checkpoints."""
    save_nets("run", [f"step_{k}" for k in range(4)])
    loader = [(torch.randn(16, 6), torch.randn(16, 1)) for _ in range(5)]
    names = {"torch": torch, "twa": twa, "model": net(), "loss": loss, "loader": loader}
    return names | {"batch": loader[0], "evaluate": evaluate}


def run(codes, names):
    for code in codes:
        exec(code, names)
    return names


def readme(codes):
    shapes = [(130,), (5, 7)]
    names = run(
        codes,
        in_a_trainer()
        | {
            "rows": [torch.randn(3, *s) for s in shapes],
            "center": [torch.randn(s) for s in shapes],
            "grads": [torch.randn(s) for s in shapes],
            "x": torch.zeros(3, 2, requires_grad=True),
        },
    )
    assert Path("out/averaged.safetensors").exists() and Path("out/coefficients.json").exists()
    assert names["c"].shape == (3, 2)
    assert [t.shape for t in names["theta"]] == [torch.Size(s) for s in shapes]


def from_ema(codes):
    save_nets("ft", "abc")
    names = in_a_trainer()
    names["loader"] *= 40  # 200 steps: a checkpoint every 50
    names["optimizer"] = torch.optim.SGD(names["model"].parameters(), lr=0.01)
    run(codes, names)
    assert len(list(Path("run").glob("*.pt"))) == 4
    assert Path("ema/averaged.safetensors").exists() and Path("out/state.pt").exists()
    assert names["soup"].sum() == pytest.approx(1.0)


def recording(codes):
    names = in_a_trainer()
    names["loader"] *= 200  # 1000 steps: a snapshot every 100
    names["optimizer"] = torch.optim.SGD(names["model"].parameters(), lr=0.01)
    run(codes, names)
    assert len(Candidates("run/twa")) == 10 and Path("averaged.safetensors").exists()
    assert names["recorder"].count == 1000


def own_trainer(codes):
    names = in_a_trainer()
    names |= {
        "states": [net().state_dict() for _ in range(3)],
        "W": torch.randn(3, 50)[[0, 1, 1, 2]],
    }
    fused = next(k for k, code in enumerate(codes) if "tk.step(" in code)
    run(codes[:fused], names)
    before = names["model"][0].weight.detach().clone()
    run(codes[fused : fused + 1], names)
    assert not torch.equal(names["model"][0].weight, before) and int(names["state"]["step"]) == 5
    run(codes[fused + 1 :], names)
    assert Path("averaged.pt").exists()
    assert names["x"].grad.shape == (3, 6) and names["x"].grad.abs().sum() > 0
    assert names["o"].rank == 3 and [row for row, _ in names["o"].dropped] == [2]


def tasks(codes):
    task, shuffled, hugging_face, adapters = codes
    Path("mytask.py").write_text(task)
    for k in range(3):
        torch.manual_seed(k)
        save_file(torch.nn.Linear(10, 1).state_dict(), f"c{k}.safetensors")
    methods = (TwaMethod("t", "tensor", 4), TwaMethod("v", "model", 4))
    settings = Settings(methods, steps=30)
    job = Merge(load_task("mytask.py"), Candidates("c*.safetensors"), settings, progress=False)
    outcome = job.run()
    assert outcome.winner.method.startswith("TWA")
    assert outcome.winner.val_loss < outcome.results[0].val_loss

    numpy = pytest.importorskip("numpy")
    data = run([shuffled], {"numpy": numpy, "batches": list(range(50))})["Shuffled"]()
    data.set_epoch(1)
    assert list(data) == list(data) and first_batch(data) == next(iter(data))

    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    size = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**size, **heads)
    transformers.LlamaForCausalLM(config).save_pretrained("base")
    transformers.LlamaForCausalLM(config).save_pretrained("run/checkpoint-500")
    names = run([hugging_face], {"transformers": transformers})
    words = torch.arange(8)[None]
    value = names["loss"](names["model"](), {"input_ids": words, "labels": words})
    assert value.shape == () and value.isfinite()
    model = run([adapters], {"transformers": transformers, "peft": peft})["model"]()
    assert isinstance(model, peft.PeftModel)


def distributed(codes):
    names = in_a_trainer() | {"make_model": net}
    end = "torch.distributed.destroy_process_group()\n"
    assert codes[0].endswith(end)
    try:
        run([codes[0].removesuffix(end), *codes[1:]], names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        gc.collect()  # gloo's threads must not live to the end of the process
    assert Path("out/averaged_dcp").is_dir()
    weights = Candidates("state/step-100")[0]
    assert torch.equal(weights.tensor("0.weight"), names["model"][0].weight)


def packed(codes):
    names = in_a_trainer() | {"candidates": Candidates("run/*")}
    twa.Subspace.from_candidates(names["model"], names["candidates"]).save(".", basis=True)
    subspace = run(codes, names)["subspace"]
    assert subspace.coordinates.center_weights.tolist() == [0, 0, 0, 1]


def merged(codes):
    names = run(codes, in_a_trainer())
    assert names["beta"].sum() == pytest.approx(1.0)


def example_files(codes):
    """They are files that tests/integrations/test_examples.py runs."""
    assert set(codes) <= {path.read_text() for path in (ROOT / "examples").glob("*.py")}


#: how the examples of a page run, one after another
RUN = {
    "README.md": readme,
    "docs/commands/merge.md": merged,
    "docs/commands/pack.md": packed,
    "docs/distributed.md": distributed,
    "docs/from-ema.md": from_ema,
    "docs/own-trainer.md": own_trainer,
    "docs/recording.md": recording,
    "docs/tasks.md": tasks,
    "docs/trainers/accelerate.md": example_files,
    "docs/trainers/cuda_graph.md": example_files,
    "docs/trainers/fsdp2.md": example_files,
    "docs/trainers/lightning.md": example_files,
    "docs/trainers/plain.md": example_files,
    "docs/trainers/timm.md": example_files,
    "docs/trainers/transformers.md": example_files,
}


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)])
def test_examples_run(page, tmp_path, monkeypatch):
    assert page in RUN, f"no test runs the Python examples of {page}: write one, and add it to RUN"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for key, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    RUN[page](examples(page))


def test_every_runner_has_a_page():
    assert [page for page in RUN if not examples(page)] == []


# Commands -----------------------------------------------------------------------------------------


def commands(page):
    """The arguments of every `twa ...` line in the blocks of a page."""
    blocks = [code for language, code in FENCED.findall(text(page)) if language != "python"]
    blocks += re.findall(r"(?:^    .*\n)+", FENCED.sub("", text(page)), re.MULTILINE)
    found = []
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        if match := re.match(r"\s*(?:\S.* -m )?twa (.*)", line):
            found.append(shlex.split(match[1], comments=True))
    return found


ALL_COMMANDS = [(page, *arguments) for page in PAGES for arguments in commands(page)]


@pytest.mark.parametrize("page, arguments", [(p, a) for p, *a in ALL_COMMANDS])
def test_commands_parse(page, arguments):
    try:
        args = parser().parse_args(arguments)
    except SystemExit as stop:  # 0: --help
        assert stop.code == 0, f"{page}: twa {shlex.join(arguments)}"
        return
    for method in getattr(args, "twa", None) or []:
        TwaMethod.parse(method)


@pytest.mark.parametrize("name", [module.__name__.rpartition(".")[2] for module in COMMANDS])
def test_a_commands_page_has_its_options(name):
    page = next(p for p in (f"docs/commands/{name}.md", f"docs/{name}.md") if p in DOCS)
    actions = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    known = set(actions.choices[name]._option_string_actions) - {"-h", "--help"}
    named = set(re.findall(r"`(--?[a-z][a-z-]*)", text(page)))
    assert sorted(known - named) == [] and sorted(named - known) == []


# Pages --------------------------------------------------------------------------------------------


def prose(page):
    """A page without fenced code and without code in a line."""
    return re.sub(r"`[^`\n]*`", "`code`", FENCED.sub("", text(page)))


def anchors(page):
    """Of each heading, as GitHub and the site make them."""
    lines = re.findall(r"^#+ (.*)$", FENCED.sub("", text(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.strip().lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^()\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file.resolve().relative_to(ROOT)), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_lines_have_at_most_100_columns(page):
    """But for tables, and for what a program has printed."""
    lines = [line for line in FENCED.sub("", text(page)).splitlines() if len(line) > 100]
    assert [line for line in lines if not line.startswith(("|", "    "))] == []


def test_readme_is_short():
    assert len(text("README.md").splitlines()) <= 120


@pytest.mark.parametrize("package", [twa, tk], ids=lambda package: package.__name__)
def test_api_pages_have_all_that_is_public(package):
    name = package.__name__
    page = text(f"docs/api/{name}.md")
    shown = set(re.findall(rf"^::: {name}\.(?:\w+\.)?(\w+)$", page, re.MULTILINE))
    named = set(re.findall(rf"`{name}\.(\w+)`", page))
    public = set(package.__all__)
    assert shown <= public <= shown | named
