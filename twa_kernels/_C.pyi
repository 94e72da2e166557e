"""What csrc/bindings.cpp exports. Tensors are addresses (int, 0: none) and dtype numbers.

dtype numbers: 0 float32, 1 bfloat16, 2 float16. Arguments are passed by position.
The second half, from `cuda_architectures` on, exists only where `with_cuda` is True.
"""

from collections.abc import Sequence

with_cuda: bool

class Basis:
    """csrc/twa.h, BasisView."""

    def __init__(
        self,
        codes: int,
        scales: int,
        row_scale: int,
        tile_segment: int,
        n: int,
        tiles: int,
        segments: int,
        bits: int,
    ) -> None: ...

def pack(
    rows: Sequence[int],
    row_dtypes: Sequence[int],
    center: Sequence[int],
    center_dtypes: Sequence[int],
    numel: Sequence[int],
    tile_segment: int,
    n: int,
    segments: int,
    bits: int,
    codes: int,
    scales: int,
    sum_sq: int,
    max_scale: int,
    errors: int,
    weights: Sequence[float],
    threads: int,
) -> tuple[int, int, int] | None: ...
def average(
    rows: Sequence[int],
    dtypes: Sequence[int],
    columns: int,
    weights: Sequence[float],
    out: int,
    threads: int,
) -> None: ...
def unpack(basis: Basis, out: Sequence[int], numel: Sequence[int], threads: int) -> None: ...
def project(
    basis: Basis,
    grads: Sequence[int],
    numel: Sequence[int],
    dtypes: Sequence[int],
    c: int,
    threads: int,
) -> None: ...
def reconstruct(
    basis: Basis,
    x: int,
    center: Sequence[int],
    center_dtypes: Sequence[int],
    out: Sequence[int],
    numel: Sequence[int],
    dtypes: Sequence[int],
    threads: int,
) -> None: ...
def step(
    basis: Basis,
    grads: Sequence[int],
    grad_dtypes: Sequence[int],
    adamw: bool,
    options: Sequence[float],
    count: int,
    x: int,
    first: int,
    second: int,
    center: Sequence[int],
    center_dtypes: Sequence[int],
    out: Sequence[int],
    numel: Sequence[int],
    dtypes: Sequence[int],
    c: int,
    threads: int,
) -> None: ...
def orthonormalize_pass(
    rows: Sequence[int],
    row_dtypes: Sequence[int],
    center: Sequence[int],
    center_dtypes: Sequence[int],
    numel: Sequence[int],
    n: int,
    parent: int,
    transform: int,
    r: int,
    probes: int,
    first: int,
    fast: bool,
    out: Sequence[int],
    out_dtypes: Sequence[int],
    gram: int,
    norms: int,
    threads: int,
) -> None: ...
def cpu_isa() -> str | None: ...
def read_bytes(data: int, bytes: int, threads: int, ahead: bool = False) -> int: ...
def copy_bytes(from_: int, to: int, bytes: int, threads: int) -> None: ...
def advise_huge_pages(data: int, bytes: int) -> None: ...
def get_code(bits: int, row: bytes, column: int) -> int: ...
def level(bits: int, code: int) -> int: ...

# With CUDA -----------------------------------------------------------------------------------

cuda_architectures: str
orthonormalize_chunk: int

class Work:
    """csrc/twa.h, DeviceWork: nine addresses in the order of its members."""

    def __init__(self, arrays: Sequence[int], items: int, groups: int) -> None: ...

class HostWork:
    """csrc/twa.h, HostWork: the same arrays as bytes in host memory, without `numel`."""

    def __init__(
        self, numel: Sequence[int], tile_segment: int, segments: int, bits: int
    ) -> None: ...
    @property
    def arrays(self) -> tuple[bytes, ...]: ...
    def tasks(self, window: int) -> bytes: ...

def pack_cuda(
    rows: int,
    center: int,
    numel: int,
    tile_begin: int,
    dtypes: int,
    count: int,
    tiles: int,
    n: int,
    bits: int,
    codes: int,
    scales: int,
    sum_sq_tiles: int,
    bad: int,
    device: int,
    stream: int,
) -> None: ...
def table_cuda(entries: Sequence[int], to: int, device: int, stream: int) -> None: ...
def project_cuda(
    basis: Basis,
    grads: int,
    work: Work,
    partial: int,
    sums: int,
    c: int,
    device: int,
    stream: int,
) -> None: ...
def reconstruct_cuda(
    basis: Basis,
    x: int,
    center: int,
    out: int,
    work: Work,
    x_rows: int,
    device: int,
    stream: int,
) -> None: ...
def step_cuda(
    basis: Basis,
    grads: int,
    adamw: bool,
    options: Sequence[float],
    count: int,
    x: int,
    first: int,
    second: int,
    center: int,
    out: int,
    work: Work,
    workspaces: Sequence[int],
    window: int,
    c: int,
    device: int,
    stream: int,
) -> None: ...
def orthonormalize_pass_cuda(
    rows: int,
    center: int,
    out: int,
    numel: int,
    chunk_begin: int,
    count: int,
    chunks: int,
    n: int,
    parent: int,
    transform: int,
    r: int,
    probes: int,
    first: int,
    partials: int,
    space: int,
    gram: int,
    norms: int,
    device: int,
    stream: int,
) -> None: ...
def orthonormalize_plan(
    n: int, r: int, chunks: int, transform: bool, write: bool
) -> tuple[int, int, int]: ...
def step_counters(groups: int, segments: int) -> int: ...
def step_window(n: int, bits: int, device: int) -> int: ...
def cuda_device_count() -> int: ...
