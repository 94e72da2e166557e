"""Every shipped Triton kernel through the compilers of several Triton versions; no GPU is needed.

Each version is installed into build/triton-VERSION (pip, the first time only), and compiles in
child processes that find it before the environment's own. PyTorch imports Triton lazily: any
of them goes with the environment's PyTorch.

    python bench/triton_versions.py    writes bench/results/triton_versions.md; exit status 1 if a
                                       kernel fails to compile, or spills on sm_90 or
                                       sm_120 with the oldest version or the newest, for
                                       which launches are chosen
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
WITHOUT = ("sm_90", "sm_120")  # spills, with the oldest version and the newest


def installed(version: str) -> Path:
    """The folder that holds this version of Triton."""
    folder = ROOT / "build" / f"triton-{version}"
    if not (folder / f"triton-{version}.dist-info").exists():
        print(f"installing triton {version} into build/", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        command += ["--no-deps", "--target", str(folder), f"triton=={version}"]
        subprocess.run(command, check=True)
    return folder


def compile_from(arch: str, first: int) -> Iterator[dict]:
    """In a child: one row per variant from the `first` on."""
    import static_cost

    from twa_kernels.backends.triton.aot import variants

    for v in list(variants(arch))[first:]:
        row = {"op": v.op, "bits": v.bits, "variant": v.name, "arch": arch}
        try:
            row |= static_cost.measure(v, arch)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        yield row


def measured(version: str, arch: str) -> list[dict]:
    """One row per variant, as static_cost.measure gives it, or with "failed": why.

    A child that the compiler takes down is started anew after the variant that did it.
    """
    folder = installed(version)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    rows: list[dict] = []
    ended = None
    while ended != 0:
        command = [sys.executable, __file__, "--child", arch, str(len(rows))]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        ) as child:
            for line in child.stdout:
                rows.append(json.loads(line) | {"triton": version})
                label = f"{rows[-1]['op']} {rows[-1]['bits']} bits, {rows[-1]['variant']}"
                label += "  FAILED" * ("failed" in rows[-1])
                print(f"triton {version} {arch} {len(rows)}: {label}", file=sys.stderr)
        ended = child.returncode
        if ended:
            failed = f"the compiler's process ended with status {ended}"
            row = {"op": "unknown", "bits": 0, "variant": f"number {len(rows)}"}
            rows.append(row | {"arch": arch, "triton": version, "failed": failed})
            if len(rows) > 1000:
                raise RuntimeError(f"triton {version} does not start: {' '.join(command)}")
    return rows


def measure_each(
    versions: tuple[str, ...], architectures: tuple[str, ...], workers: int
) -> Iterator[list[dict]]:
    """The rows of one version and architecture after the other."""
    for version in versions:
        installed(version)
    jobs = [(version, arch) for version in versions for arch in architectures]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda job: measured(*job), jobs)


def measure_all(
    versions: tuple[str, ...], architectures: tuple[str, ...], workers: int
) -> list[dict]:
    return [row for rows in measure_each(versions, architectures, workers) for row in rows]


def problems(rows: list[dict]) -> list[str]:
    found = []
    for r in rows:
        label = f"triton {r['triton']} {r['arch']} {r['op']} {r['bits']} bits, {r['variant']}"
        if "failed" in r:
            found.append(f"{label}: {r['failed']}")
        elif r["arch"] in WITHOUT and r["spills"] and r["triton"] in (VERSIONS[0], VERSIONS[-1]):
            found.append(f"{label}: {r['spills']} bytes of spills")
    return found


def markdown(rows: list[dict]) -> list[str]:
    lines = ["# The Triton kernels under several versions of Triton", ""]
    lines += [
        "Every shipped variant, compiled ahead of time on a CPU (`make triton-versions`);"
        " no GPU took part.",
        "",
    ]
    lines += [
        "| triton | architecture | variants | compiled | failed | with spills | largest spill |",
        "|" + "---|" * 7,
    ]
    for version, arch in dict.fromkeys((r["triton"], r["arch"]) for r in rows):
        mine = [r for r in rows if (r["triton"], r["arch"]) == (version, arch)]
        spills = [r["spills"] for r in mine if r.get("spills")]
        failed = sum("failed" in r for r in mine)
        largest = f"{max(spills)} bytes" if spills else ""
        cells = [version, arch, len(mine), len(mine) - failed, failed, len(spills), largest]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", default=",".join(VERSIONS))
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        for row in compile_from(args.child[0], int(args.child[1])):
            print(json.dumps(row), flush=True)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    rows, text = [], ""
    versions, architectures = tuple(args.versions.split(",")), tuple(args.architectures.split(","))
    for more in measure_each(versions, architectures, args.workers):
        rows += more
        text = "\n".join(markdown(rows))
        (args.output / "triton_versions.md").write_text(text)  # after each: a run may be cut short
    print(text)
    found = problems(rows)
    fine = "every kernel compiles with every version; none spills on sm_90 or sm_120"
    print("\n".join(found) or f"{fine} with the oldest and the newest")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
