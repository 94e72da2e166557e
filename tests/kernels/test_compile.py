"""The Triton kernels through the compiler, for architectures that need not be present.

One of each kind; `make test-all`: every kernel in every shipped configuration.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[2]
specification = importlib.util.spec_from_file_location("static_cost", ROOT / "bench/static_cost.py")
static_cost = importlib.util.module_from_spec(specification)
specification.loader.exec_module(static_cost)


def compiler_environment(cache):
    """Without the interpreter, and with a cache of its own: nothing compiled before counts."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return kept | {"TRITON_CACHE_DIR": str(cache)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Static cost of kernels, measured in a process of its own: this one may hold them as the
    interpreter's.
    """
    folder = tmp_path_factory.mktemp("static_cost")
    command = [
        sys.executable,
        str(ROOT / "bench/static_cost.py"),
        "--output",
        str(folder),
        "--brief",
    ]
    done = processes.run(command, env=compiler_environment(folder / "cache"))
    assert (folder / "triton_static_cost.json").exists(), done.stdout[-2000:] + done.stderr[-2000:]
    assert (folder / "triton_static_cost.png").stat().st_size > 10_000
    return json.loads((folder / "triton_static_cost.json").read_text())


def test_every_op_compiles_for_every_architecture(rows):
    compiled = {(r["arch"], r["op"], r["bits"]) for r in rows}
    for arch in ("sm_80", "sm_90", "gfx942"):
        for op in ("pack", "unpack", "record", "replay", "project", "reconstruct", "gram"):
            found = {bits for a, o, bits in compiled if (a, o) == (arch, op)}
            assert found == ({8, 4, 3, 2, 1} if arch == "sm_90" else set(static_cost.BRIEF_BITS))
        assert {(arch, op, 4) for op in ("step", "sum", "orthonormalize")} <= compiled


@pytest.mark.exhaustive
def test_every_configuration(tmp_path):
    command = [sys.executable, str(ROOT / "bench/static_cost.py"), "--check"]
    done = processes.run(command, env=compiler_environment(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_no_spills_wide_loads_and_within_the_budget(rows):
    assert [problem for row in rows for problem in static_cost.problems(row)] == []


def test_matrix_units_and_no_barriers_where_meant(rows):
    for row in rows:
        if row["op"] in ("project", "gram") or (
            row["op"] == "orthonormalize"
            and "products of" in row["variant"]
            and "float64" in row["variant"]
        ):
            assert row["matrix"] > 0, row
        if row["op"] == "reconstruct" and row["arch"].startswith("sm_"):
            assert row["barriers"] == row["shared_access"] == 0, row  # registers only


def test_instructions_at_72_rows(rows):
    """Also of a basis whose n is no multiple of 16: rows of padding included."""
    mine = [row for row in rows if row["arch"] == "sm_90"]
    for op in ("project", "reconstruct"):
        for bits in (8, 4):
            cost = static_cost.per_weight(mine, op, bits, 72)
            assert 1 < cost <= static_cost.LIMIT * static_cost.BUDGET[bits], (op, bits, cost)
            assert cost <= 1.45 * static_cost.per_weight(mine, op, bits, 64), (op, bits, cost)


def test_float64_products_of_16_bit_rows_suit_older_tritons(rows):
    """Versions before 3.9 are only tried by `make triton-versions`; this is what they need."""
    narrow = [row for row in rows if static_cost.is_narrow(row)]
    forms = {static_cost.form_of(row["variant"]) for row in narrow}
    assert forms == {"products", "transformed"}
    assert [row for row in narrow if row["behind"]] == []


def test_what_is_behind_products_is_found():
    ttir = """
      %w = tt.load %p, %mask, %zero : tensor<64x16x!tt.ptr<bf16>>
      %a = arith.extf %w : tensor<64x16xbf16> to tensor<64x16xf64>
      %b = tt.trans %a {order = array<i32: 1, 0>} : tensor<64x16xf64> -> tensor<16x64xf64>
      %c = tt.dot %a, %b, %acc, inputPrecision = tf32 : \
      tensor<64x16xf64> * tensor<16x64xf64> -> tensor<64x64xf64>
      %d = arith.addf %c, %c : tensor<64x64xf64>
      %e = tt.dot %d, %d, %acc : tensor<64x64xf64> * tensor<64x64xf64> -> tensor<64x64xf64>
    """
    assert static_cost.behind_products(ttir) == ["16 bits", "product", "tf32"]
    apart = (
        ttir.replace("%a = arith.extf %w", '%a = "tt.reduce"(%w)')
        .replace("arith.addf", '"tt.reduce"')
        .replace("= tf32", "= ieee")
    )
    assert static_cost.behind_products(apart) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 8}, "8 bytes of spills"),
        ({"shared": 1 << 18}, "262144 bytes of shared memory, sm_90 has 232448"),
        ({"wide": 0.5}, "50 % of the packed bytes"),
        ({"specialised": ["n"]}, "specialised on n"),
        ({"assembly": 1}, "assembly, around which AMD's compiler inserts no wait states"),
        ({"in_order": False}, "bytes in an order that the kernel does not know"),
        ({"behind": ["16 bits"]}, "float64 products with '16 bits' behind them"),
        ({"per_weight": 5.6}, "5.60 instructions per weight, budget 3.7"),
    ],
)
def test_a_problem_is_reported(change, message):
    row = {
        "op": "project",
        "bits": 4,
        "variant": "64 rows, fp32",
        "arch": "sm_90",
        "spills": 0,
        "shared": 0,
        "wide": 1.0,
        "per_weight": 3.6,
    }
    assert static_cost.problems(row) == []
    (found,) = static_cost.problems(row | change)
    assert message in found
