"""`Subspace`: the model's weights as center + sum_i x[i, l] * P[i, :], built from candidates in one stream."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import twa_kernels as tk
from twa_kernels.ops import FLOATS
from twa_kernels.reference import tile_offsets

from . import orthonormal, schemes
from .candidates import CandidateError, Candidates, TensorInfo, average_into, check_info
from .dense import DenseBasis, DensePacker
from .files import write_json, write_safetensors
from .orthonormal import Coordinates

RIDGE = 1e-4
BITS = (32, 8, 4, 3, 2, 1)
BASES = ("deltas", "orthonormal")
Granularity = str | Mapping[str, object] | Callable[[str], object]


@dataclass(frozen=True)
class Layout:
    """What becomes of each tensor of the model.

    trained   parameters in the subspace: name -> key in the candidate files
    fixed     float tensors that are averaged but not trained: frozen parameters and float buffers
    copied    integer and bool buffers: taken from the last candidate (or the one that has all the weight)
    aliases   other names of tied parameters: name -> the name that stands for them
    """

    trained: dict[str, str]
    fixed: dict[str, str]
    copied: dict[str, str]
    aliases: dict[str, str]


def layout_of(model: nn.Module, candidates: Candidates) -> Layout:
    """Matches the model's state_dict with the candidates' keys; CandidateError where they do not fit."""
    canonical: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        first = canonical.setdefault(id(p), name)
        if first != name:
            aliases[name] = first
    parameters = dict(model.named_parameters())
    state = model.state_dict(keep_vars=True)
    expected = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    first, info = candidates[0], candidates.info

    if unexpected := sorted(info.keys() - expected.keys()):
        raise CandidateError(f"{first.path}: tensor {unexpected[0]!r} is unexpected ({len(unexpected)} in all): the model does not have it")
    groups: dict[str, list[str]] = {}  # canonical name -> keys present in the files
    for name in expected:
        groups.setdefault(aliases.get(name, name), [])
        if name in info:
            groups[aliases.get(name, name)].append(name)
    if missing := sorted(name for name, keys in groups.items() if not keys):
        raise CandidateError(f"{first.path}: tensor {missing[0]!r} of the model is missing ({len(missing)} in all)")

    layout = Layout({}, {}, {}, {a: n for a, n in aliases.items() if a in expected})
    for name, keys in groups.items():
        tensor, key = expected[name], keys[0]
        for k in keys:
            check_info(first.path, k, TensorInfo(tuple(tensor.shape), tensor.dtype), info[k], "in the model")
        for other in keys[1:]:
            for c in candidates:
                if not torch.equal(c.tensor(key), c.tensor(other)):
                    raise CandidateError(f"{c.path}: {key!r} and {other!r} are one tied weight in the model but differ in the file")
        if not tensor.is_floating_point():
            layout.copied[name] = key
        elif name in parameters and parameters[name].requires_grad:
            layout.trained[name] = key
        else:
            layout.fixed[name] = key
    if not layout.trained:
        raise ValueError("the model has no trainable floating-point parameter: nothing to average")
    return layout


def _block_of(name: str) -> str:
    """ "layers.3.attn.weight" -> "layers.3"; without a number the module: "embed.weight" -> "embed"."""
    parts = name.split(".")
    end = next((k for k, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: end + 1]) or name


def segment_labels(names: list[str], granularity: Granularity) -> list[object]:
    """Label of each parameter's segment: "model", "block" (the name up to its first number, else its module), "tensor", a mapping
    from parameter name to label, or a function."""
    if granularity == "model":
        return ["model"] * len(names)
    if granularity == "tensor":
        return list(names)
    if granularity == "block":
        return [_block_of(name) for name in names]
    if isinstance(granularity, Mapping):
        if missing := [name for name in names if name not in granularity]:
            raise ValueError(f"granularity: the mapping has no segment for parameter {missing[0]!r} ({len(missing)} in all)")
        return [granularity[name] for name in names]
    if callable(granularity):
        return [granularity(name) for name in names]
    raise ValueError(f"granularity: expected 'model', 'block', 'tensor', a mapping or a function, found {granularity!r}")


class Subspace:
    """The span of the candidates around a center, attached to a model.

    theta = center + sum_i x[i, l] * P[i, :]   with P[i] = (w_i - center) / divisor[i, l], or an orthonormal basis of those, packed at `bits` bits

    coefficients   x (n, L) float32 nn.Parameter (orthonormal: (rank, L)), all zero at first: the model is at the center
    coordinates    of an orthonormal basis: how its rows and the candidates make each other, and which candidates were dependent; else None
    labels         names of the L segments
    """

    def __init__(
        self,
        model: nn.Module,
        candidates: Candidates,
        layout: Layout,
        basis: tk.PackedBasis | DenseBasis,
        center: list[Tensor],
        center_weights: Tensor,
        labels: list[str],
        precondition: bool = False,
        normalize: str = "row",
        coordinates: Coordinates | None = None,
    ) -> None:
        self.model, self.candidates, self.layout = model, candidates, layout
        self.normalize, self.coordinates = normalize, coordinates
        self.basis, self.center, self.center_weights, self.labels = basis, center, center_weights, labels
        named = dict(model.named_parameters())
        self.parameters = [named[name] for name in layout.trained]
        self._selected: dict[int, tuple[tk.PackedBasis | DenseBasis, slice]] = {}
        dtype = basis.dtype if isinstance(basis, DenseBasis) else torch.float32
        self.coefficients = nn.Parameter(torch.zeros(basis.n, basis.num_segments, device=basis.device, dtype=dtype))
        self.preconditioner = _preconditioner(basis.gram()).to(dtype) if precondition else None  # (L, n, n)

    @classmethod
    def from_candidates(
        cls,
        model: nn.Module,
        candidates: Candidates,
        *,
        bits: int = 4,
        granularity: Granularity = "tensor",
        center: str | int | Tensor = "mean",
        normalize: str = "row",
        basis: str = "deltas",
        precondition: bool = False,
        progress: Callable[[str, int], None] | None = None,
    ) -> Subspace:
        """Streams the candidates tensor by tensor into a basis and moves the model to the center.

        bits         8, 4, 3, 2, 1 (packed), or 32 (dense float32, n * D * 4 bytes)
        granularity  segments with their own coefficients: "model", "block", "tensor", a mapping from parameter name, or a function
        center       "mean", "last", a candidate's index, merge weights (n,) that sum to 1, or "zero": the span of the candidates themselves
                     (the model then starts at zero: call set_merge_weights before training; see `conference_method`)
        normalize    "row" (each candidate's delta has the same norm), "segment" (each segment of it), "none"
        basis        "deltas": the candidates' distances from the center, as they are. "orthonormal": in each segment an orthonormal basis of their
                     span, made by block Gram-Schmidt (two more reads of the files); rows have the root mean square norm of the deltas'
                     (norm 1 for normalize="none"), candidates that depend on earlier ones (duplicates, combinations) add no row
        precondition coefficients of the basis orthonormalised within each segment: x = A y with A from the Cholesky factor of the Gram
                     matrix; the parameter that is trained is then y (basis="deltas" only)
        progress     called with (tensor name, bytes read)

        Frozen parameters and float buffers get the center's weights over the candidates and are not trained; integer and bool
        buffers are the last candidate's; a tied weight counts once; tensors equal in all candidates stay as they are.
        Raises CandidateError if files and model do not fit or a candidate holds NaN or Inf.
        """
        if bits not in BITS:
            raise ValueError(f"bits: expected one of {BITS}, found {bits!r}")
        if basis not in BASES:
            raise ValueError(f"basis: expected one of {BASES}, found {basis!r}")
        if precondition and basis == "orthonormal":
            raise ValueError("precondition: an orthonormal basis needs none; expected basis='deltas'")
        layout = layout_of(model, candidates)
        weights = _center_weights(center, len(candidates))
        names = list(layout.trained)
        labels = segment_labels(names, granularity)
        order = {label: l for l, label in enumerate(dict.fromkeys(labels))}
        segments = [order[label] for label in labels]
        shapes = [torch.Size(candidates.info[layout.trained[name]].shape) for name in names]
        rows_of = [functools.partial(_float_rows, candidates, layout.trained[name]) for name in names]
        coordinates, centers = None, []
        packer = None
        if basis == "deltas":
            packer = DensePacker(len(candidates), shapes, segments) if bits == 32 else tk.Packer(len(candidates), shapes, bits, segments)
        try:
            for name, read in zip(names, rows_of, strict=True):
                rows = read()
                centers.append(average_into(torch.empty(rows[0].shape), rows, weights))
                if packer:
                    packer.add(rows, centers[-1])
                if progress:
                    progress(name, sum(r.numel() * r.element_size() for r in rows))
            if packer:
                made = packer.finish(normalize)
            else:
                made, coordinates = orthonormal.build(lambda k: (rows_of[k](), centers[k]), shapes, segments, len(order), bits, normalize)
        except tk.NotFiniteError as error:
            raise not_finite(candidates, names[error.tensor], rows_of[error.tensor]()) from error
        device = dict(model.named_parameters())[names[0]].device
        subspace = cls(
            model,
            candidates,
            layout,
            made.to(device),
            [c.to(device) for c in centers],
            weights,
            [str(label) for label in order],
            precondition,
            normalize,
            coordinates,
        )
        load_untrained(model, candidates, layout, weights if weights.any() else schemes.uniform(len(candidates)))
        subspace.write_weights()
        return subspace

    # Weights in and out -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def write_weights(self) -> None:
        """model parameters = center + sum_i x[i, l] * P[i, :], in their own dtypes."""
        out = [p.detach() for p in self.parameters]
        if isinstance(self.basis, DenseBasis):
            self.basis.reconstruct(self.x(), self.center, out)
            return
        # float64 parameters, which the kernels do not write, go through float32.
        targets = [torch.empty_like(o, dtype=torch.float32) if o.dtype == torch.float64 else o for o in out]
        tk.reconstruct(self.basis, self.x(), self.center, out=targets)
        for o, t in zip(out, targets, strict=True):
            if o is not t:
                o.copy_(t)

    @torch.no_grad()
    def project_gradients(self) -> Tensor:
        """c (n, L): the gradient of the coefficients, from the parameters' .grad (None counts as zero)."""
        return self._pull_back(_project(self.basis, self._gradients()), slice(None))

    def can_fuse(self) -> bool:
        """Whether step() covers this subspace: packed, on a device that has its kernel, coefficients of the basis itself, dtypes that the kernels
        write."""
        if isinstance(self.basis, DenseBasis) or self.preconditioner is not None or not tk.dispatch.default_backend("step", self.basis.device.type):
            return False
        grads = [p.grad for p in self.parameters if p.grad is not None]
        return all(p.dtype in FLOATS for p in self.parameters) and all(g.layout == torch.strided and g.dtype in FLOATS for g in grads)

    @torch.no_grad()
    def step(self, rule: str, options: dict, state: dict) -> None:
        """twa_kernels.step on the coefficients and the model's weights; the coefficients' gradient is kept in .grad."""
        grads = self._gradients()
        self.coefficients.grad = tk.step(self.basis, grads, self.coefficients, self.parameters, self.center, rule=rule, options=options, state=state)

    def _gradients(self) -> list[Tensor | None]:
        grads = [p.grad for p in self.parameters]
        if all(g is None for g in grads):
            raise RuntimeError("no parameter of the model has a gradient: call loss.backward() before optimizer.step()")
        return grads

    @torch.no_grad()
    def absorb_gradient(self, k: int) -> None:
        """Adds the projection of parameter k's .grad to coefficients.grad and frees it."""
        if self.parameters[k].grad is None:
            raise RuntimeError("a gradient was taken before it could be projected: does another low_memory optimizer hold this model? close() it")
        basis, columns = self._tensor_basis(k)
        if self.coefficients.grad is None:
            self.coefficients.grad = torch.zeros_like(self.coefficients)
        self.coefficients.grad[:, columns] += self._pull_back(_project(basis, [self.parameters[k].grad]), columns)
        self.parameters[k].grad = None

    def _tensor_basis(self, k: int) -> tuple[tk.PackedBasis | DenseBasis, slice]:
        if k not in self._selected:
            self._selected[k] = self.basis.select(k)
        return self._selected[k]

    @torch.no_grad()
    def x(self) -> Tensor:
        """Coefficients (n, L) of the basis: the trained ones, or A times them."""
        if self.preconditioner is None:
            return self.coefficients.detach()
        return torch.einsum("lij,jl->il", self.preconditioner, self.coefficients)

    def _pull_back(self, c: Tensor, columns: slice) -> Tensor:
        """Gradient of the trained coefficients from that of x."""
        return c if self.preconditioner is None else torch.einsum("lij,il->jl", self.preconditioner[columns], c)

    # Coefficients and merge weights -------------------------------------------------------------------------------

    @torch.no_grad()
    def merge_weights(self) -> Tensor:
        """beta (n, L) float64: theta = sum_i beta[i, l] w_i (exact without quantisation); sum_i beta[i, l] = 1 unless the center is zero."""
        if self.coordinates is not None:
            share = self.coordinates.shares(self.x())
        else:
            divisor = self.basis.divisor.cpu()
            share = torch.where(divisor > 0, self.x().cpu().double() / torch.where(divisor > 0, divisor, 1.0), 0.0)
        return share + self.center_weights[:, None] * (1.0 - share.sum(0, keepdim=True))

    @torch.no_grad()
    def set_merge_weights(self, beta: Tensor) -> None:
        """Coefficients for merge weights (n,) or (n, L) that sum to 1, and the model there."""
        beta = beta.double().cpu()
        beta = beta[:, None].expand(-1, self.basis.num_segments) if beta.dim() == 1 else beta
        expected = (len(self.candidates), self.basis.num_segments)
        if beta.shape != expected or not torch.allclose(beta.sum(0), torch.ones(1, dtype=torch.float64), atol=1e-6):
            raise ValueError(f"merge weights: expected shape (n,) or {expected} with columns that sum to 1, found {tuple(beta.shape)}")
        x = beta * self.basis.divisor.cpu() if self.coordinates is None else self.coordinates.coefficients(beta)
        if self.preconditioner is not None:
            x = torch.linalg.solve(self.preconditioner.double().cpu(), x.T[..., None])[..., 0].T
        self.coefficients.copy_(x)
        self.write_weights()

    def identity(self) -> dict[str, object]:
        """What coefficients belong to: those of one subspace mean nothing in another."""
        return {
            "candidates": [c.name for c in self.candidates],
            "segment_of": dict(zip(self.layout.trained, self._segment_labels(), strict=True)),
            "bits": self.basis.bits,
            "center_weights": self.center_weights.tolist(),
            "normalize": self.normalize,
            "precondition": self.preconditioner is not None,
            "basis": "deltas" if self.coordinates is None else "orthonormal",
        }

    # Export -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes averaged.safetensors (the model as it is now, every key and dtype of the candidate files) and coefficients.json
        (x and merge weights beta)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "averaged.safetensors", export_state(self.model, self.candidates))
        write_json(folder / "coefficients.json", self.coefficients_json())

    def coefficients_json(self) -> dict:
        return {
            "format": "twa-coefficients-1",
            "candidates": [str(c.path) for c in self.candidates],
            "segments": self.labels,
            "segment_of": dict(zip(self.layout.trained, self._segment_labels(), strict=True)),
            "bits": self.basis.bits,
            "basis": "deltas" if self.coordinates is None else "orthonormal",
            "center_weights": self.center_weights.tolist(),
            "x": self.x().cpu().tolist(),
            "beta": self.merge_weights().tolist(),
        }

    def _segment_labels(self) -> list[str]:
        if isinstance(self.basis, DenseBasis):
            return [self.labels[l] for l in self.basis.segment]
        spans = itertools.pairwise(tile_offsets(self.basis.numels))
        return [self.labels[int(self.basis.tile_segment[first])] if first < end else "" for first, end in spans]


def _preconditioner(gram: Tensor) -> Tensor:
    """A (L, n, n) with x = A y: A = c * L^-T for G + ridge = L L^T, so that the rows of A^T P are orthogonal with norm c, the root mean square
    norm of P's rows. The ridge, 1e-4 of the mean diagonal, bounds what nearly dependent candidates are amplified by."""
    n = gram.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]  # (L, 1, 1); 0 for a segment that is equal in all candidates
    eye = torch.eye(n, dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + eye * torch.where(mean > 0, RIDGE * mean, 1.0))
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False).mT
    return torch.where(mean > 0, mean.sqrt() * inverse, eye)  # a segment that is equal in all candidates has no basis to turn


def _project(basis: tk.PackedBasis | DenseBasis, grads: list[Tensor | None]) -> Tensor:
    """c (n, L); sparse gradients are made dense, float64 ones float32 (what the kernels read)."""
    grads = [g if g is None or g.layout == torch.strided else g.to_dense() for g in grads]
    if isinstance(basis, DenseBasis):
        return basis.project(grads)
    return tk.project(basis, [g.float() if g is not None and g.dtype == torch.float64 else g for g in grads])


def _center_weights(center: str | int | Tensor, n: int) -> Tensor:
    if center == "mean" if isinstance(center, str) else False:
        return schemes.uniform(n)
    if isinstance(center, str) and center == "zero":
        return torch.zeros(n, dtype=torch.float64)
    if isinstance(center, str) and center == "last":
        return schemes.candidate(n, -1)
    if isinstance(center, int):
        return schemes.candidate(n, center)
    if isinstance(center, Tensor) and center.shape == (n,) and abs(float(center.double().sum()) - 1.0) < 1e-6:
        return center.double().cpu()
    raise ValueError(f"center: expected 'mean', 'last', 'zero', an index below {n} or {n} merge weights that sum to 1, found {center!r}")


def _float_rows(candidates: Candidates, key: str) -> list[Tensor]:
    """The n rows of a tensor in a dtype that the kernels read; only float64 and float8 are converted."""
    return [r if r.dtype in FLOATS else r.float() for r in candidates.tensors(key)]


def not_finite(candidates: Candidates, name: str, rows: list[Tensor]) -> CandidateError:
    """The error that says which file holds the NaN or Inf of this tensor."""
    for candidate, row in zip(candidates, rows, strict=True):
        bad = ~torch.isfinite(row)
        if bad.any():
            where = torch.nonzero(bad)[0].tolist()
            return CandidateError(
                f"{candidate.path}: tensor {name!r} has {int(bad.sum())} NaN or Inf of {row.numel()} values (the first at {where}): "
                "expected finite weights"
            )
    return CandidateError(f"tensor {name!r}: the candidates' mean or their distance from it overflows float32")


@torch.no_grad()
def load_untrained(model: nn.Module, candidates: Candidates, layout: Layout, weights: Tensor) -> None:
    """Frozen parameters and float buffers: the candidates' weighted mean; integer and bool buffers: the last candidate's, or those of
    the one that has all the weight."""
    state = model.state_dict(keep_vars=True)
    for name, key in layout.fixed.items():
        rows = candidates.tensors(key)
        if all(torch.equal(rows[0], r) for r in rows[1:]):
            value = rows[0]
        else:
            value = candidates.average(key, weights)
        if not torch.isfinite(value).all():
            raise not_finite(candidates, key, rows)
        state[name].data.copy_(value)
    single = torch.nonzero(weights == 1.0).flatten().tolist()
    source = candidates[single[0] if single else -1]
    for name, key in layout.copied.items():
        state[name].data.copy_(source.tensor(key))


@torch.no_grad()
def load_merge(model: nn.Module, candidates: Candidates, layout: Layout, beta: Tensor) -> None:
    """model = sum_i beta[i] w_i, exactly (no basis, no quantisation), streamed tensor by tensor."""
    parameters = dict(model.named_parameters())
    for name, key in layout.trained.items():
        parameters[name].data.copy_(candidates.average(key, beta))
    load_untrained(model, candidates, layout, beta)


@torch.no_grad()
def export_state(model: nn.Module, candidates: Candidates) -> dict[str, Tensor]:
    """The model's tensors under every key of the candidate files, in the files' dtypes."""
    state = model.state_dict()
    return {key: state[key].detach().to("cpu", info.dtype, copy=True).contiguous() for key, info in candidates.info.items()}


@torch.no_grad()
def round_to_files(model: nn.Module, candidates: Candidates, layout: Layout) -> None:
    """Rounds the model's weights to the dtypes of the candidate files, so that what is measured is what is exported."""
    state = model.state_dict(keep_vars=True)
    for name, key in (layout.trained | layout.fixed).items():
        dtype = candidates.info[key].dtype
        if dtype != state[name].dtype:
            state[name].data.copy_(state[name].data.to(dtype))
