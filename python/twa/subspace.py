"""`Subspace`: the model's weights as center + sum_i x[i, l] * P[i, :], built from candidates in one
stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import twa_kernels as tk
from twa_kernels.ops import FLOATS

from . import averages as schemes
from .basis.dense import DenseBasis
from .basis.file import NAME, Sources, facts_of, read_basis
from .basis.segments import Granularity, Layout, Segments, layout_of, segments_of
from .distributed.choose import find_world, resolve
from .distributed.ranks import digest, facts, versions
from .distributed.sharding import Basis, Placement
from .distributed.weights import check_range, load_untrained, write_dcp, write_export
from .export.hugging_face import write_beside
from .io.atomic import write_json
from .io.candidates import Candidates
from .packing.build import build
from .packing.load import check_model, check_savable, find_basis, load_state, part_of, save_basis
from .packing.orthonormal import Coordinates
from .spectral_norm import refresh_spectral_norms

RIDGE = 1e-4
BITS = (32, 8, 4, 3, 2, 1)
BASES = ("deltas", "orthonormal")
CONSTRAINTS = ("none", "simplex")


class Subspace:
    """The span of the candidates around a center, attached to a model.

    theta = center + sum_i x[i, l] * P[i, :] with P[i] = (w_i - center) / divisor[i, l], or an
    orthonormal basis of those, packed at `bits` bits

    coefficients   x (n, L) float32 nn.Parameter (orthonormal: (rank, L)), all zero at first: the
                   model is at the center. Every rank has all of them, the same bits
    coordinates    of an orthonormal basis: how its rows and the candidates make each other, and
                   which candidates were dependent; else None
    labels         names of the L segments
    parts          which columns are in which segment
    placement      what this rank holds: see `twa.placement`
    """

    def __init__(
        self,
        placement: Placement,
        basis: Basis,
        center: list[Tensor] | None,
        center_weights: Tensor,
        segments: Segments,
        divisor: Tensor,
        precondition: bool = False,
        normalize: str = "row",
        coordinates: Coordinates | None = None,
        constraint: str = "none",
    ) -> None:
        self.placement, self.model, self.candidates, self.layout = (
            placement,
            placement.model,
            placement.candidates,
            placement.layout,
        )
        self.normalize, self.coordinates, self.divisor = normalize, coordinates, divisor
        self.basis, self.center, self.center_weights, self.parts = (
            basis,
            center,
            center_weights,
            segments,
        )
        self.labels, self.segments = segments.labels, segments.first
        self.parameters = placement.tensors
        self._selected: dict[int, tuple[Basis, slice]] = {}
        dtype = basis.dtype if isinstance(basis, DenseBasis) else torch.float32
        self.coefficients = nn.Parameter(
            torch.zeros(divisor.shape, device=basis.device, dtype=dtype)
        )
        # (L, n, n)
        self.preconditioner = (
            _preconditioner(placement.gram(basis)).to(dtype) if precondition else None
        )
        self.constraint = constraint
        if constraint == "simplex":
            self._set_x(center_weights[:, None] * divisor)

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
        constraint: str = "none",
        placement: str | Placement = "auto",
        group: dist.ProcessGroup | None = None,
        progress: Callable[[str, int], None] | None = None,
    ) -> Subspace:
        """Streams the candidates tensor by tensor into a basis and moves the model to the center.

        bits         8, 4, 3, 2, 1 (packed), or 32 (dense float32, n * D * 4 bytes)
        granularity  segments with their own coefficients: "model", "block", "tensor", a mapping
                     from parameter name, a function; below tensors so many weights of one as they
                     lie in memory (a multiple of 128), or "fine": as few as 4096 segments allow
        center       "mean", "last", a candidate's index, merge weights (n,) that sum to 1, or
                     "zero": the span of the candidates themselves (the model then starts at zero:
                     call set_merge_weights before training; see `conference_method`)
        normalize    "row" (each candidate's delta has the same norm), "segment" (each segment of
                     it), "none"
        basis        "deltas": the candidates' distances from the center, as they are.
                     "orthonormal": in each segment an orthonormal basis of their span, made by
                     block Gram-Schmidt (two more reads of the files); rows have the root mean
                     square norm of the deltas' (norm 1 for normalize="none"), candidates that
                     depend on earlier ones (duplicates, combinations) add no row
        precondition coefficients of the basis orthonormalised within each segment: x = A y with A
        from the Cholesky factor of the Gram
                     matrix; the parameter that is trained is then y (basis="deltas" only)
        constraint   "simplex": merge weights that are positive and sum to 1 in each segment
                     (learned soup): the parameter that is trained is then y with beta =
                     softmax(sqrt(n) y); starts at the center but for weights of zero, which become
                     1e-3 / n (basis="deltas" only)
        placement    how the ranks of a torch.distributed job share the work: "replicate" (every
                     rank holds all of P, n * L numbers are summed per step), "columns" (a model
                     sharded by fully_shard or as DTensors: each rank holds P for its shards),
                     "rows" (each rank holds some rows of P; sums of whole gradients and weights),
                     "single" (no communication); "auto": columns for a sharded model, else
                     replicate if it fits into memory, else rows; single where torch.distributed is
                     not initialised. With a placement other than "single", every rank makes the
                     same calls, with its own data. Gradients are averaged over ranks
        group        the process group; default: the mesh of a sharded model, else all ranks
        progress     called with (tensor name, bytes read)

        Frozen parameters and float buffers get the center's weights over the candidates and are not
        trained; integer and bool buffers are the last candidate's; a tied weight counts once;
        tensors equal in all candidates stay as they are. Raises CandidateError if files and model
        do not fit or a candidate holds NaN or Inf, DistributedError if the ranks were given
        different candidates, models, options or versions.
        """
        given = isinstance(placement, Placement)
        world = placement.world if given else find_world(placement, model, group)
        with world.together("matching model and candidates"):
            if bits not in BITS:
                raise ValueError(f"bits: expected one of {BITS}, found {bits!r}")
            if basis not in BASES:
                raise ValueError(f"basis: expected one of {BASES}, found {basis!r}")
            if precondition and basis == "orthonormal":
                raise ValueError(
                    "precondition: an orthonormal basis needs none; expected basis='deltas'"
                )
            if constraint not in CONSTRAINTS:
                raise ValueError(f"constraint: expected one of {CONSTRAINTS}, found {constraint!r}")
            if constraint == "simplex" and (
                precondition
                or basis == "orthonormal"
                or (isinstance(center, str) and center == "zero")
            ):
                raise ValueError(
                    "constraint='simplex': expected basis='deltas' around a center other than"
                    " 'zero', without precondition"
                )
            layout = layout_of(model, candidates)
            weights, segments = choices(layout, candidates, granularity, center)
            if segments.chunk and basis == "orthonormal":
                raise ValueError(
                    "basis='orthonormal': expected segments of whole tensors, found granularity"
                    f" {segments.chunk}; use basis='deltas'"
                )
            if world.size > 1:
                options = {
                    "bits": bits,
                    "basis": basis,
                    "normalize": normalize,
                    "precondition": precondition,
                    "constraint": constraint,
                }
                options |= {
                    "placement": placement.name if given else placement,
                    "center": digest(weights.tolist()),
                    "granularity": digest((segments.labels, segments.first, segments.chunk)),
                }
                world.check_equal(
                    versions() | facts(model, candidates) | {k: str(v) for k, v in options.items()}
                )
            place = (
                placement if given else resolve(placement, model, candidates, layout, bits, world)
            )
        with world.together("packing the candidates"):
            made, divisor, centers, coordinates = build(
                place, segments, bits, basis, normalize, weights, progress
            )
            subspace = cls(
                place,
                made.to(place.device),
                None if centers is None else [c.to(place.device) for c in centers],
                weights,
                segments,
                divisor,
                precondition,
                normalize,
                coordinates,
                constraint,
            )
            load_untrained(place, weights)
            subspace.write_weights()
            check_range(place)
            refresh_spectral_norms(model)
        return subspace

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module,
        candidates: Candidates | None = None,
        *,
        precondition: bool = False,
        placement: str = "auto",
        group: dist.ProcessGroup | None = None,
    ) -> Subspace:
        """The subspace of a packed basis on disk, as `twa pack` or `save(basis=True)` has written
        it (path: the file, or its directory), and the model at its coefficients. Codes are mapped,
        not read: it takes no time, and processes of one machine share the memory.

        candidates   those that it was packed from, which is checked by their fingerprints. Without
                     them all works but exact averages (`load_merge`).
        precondition, placement, group   as in from_candidates; with "columns", shards must begin at
                                         multiples of 128 weights.

        Raises BasisError if the file is damaged, is no packed basis, or does not fit model or
        candidates. Ranks call it together."""
        path, world = find_basis(path), find_world(placement, model, group)
        with world.together(f"loading {path}"):
            loaded = read_basis(path)
            contents = loaded.contents
            check_model(model, contents, path)
            if candidates is not None:
                facts_of(contents, candidates.fingerprints())
            if precondition and contents.basis == "orthonormal":
                raise ValueError("precondition: an orthonormal basis needs none")
            sources = Sources(loaded) if candidates is None else candidates
            place = resolve(placement, model, sources, contents.layout, contents.bits, world)
            if world.size > 1:
                world.check_equal(
                    versions() | {"basis": digest(contents), "precondition": str(precondition)}
                )
            basis, center = part_of(loaded, place)
            device = place.device
            subspace = cls(
                place,
                basis.to(device),
                None if center is None else [c.to(device) for c in center],
                loaded.read("center_weights").clone(),
                contents.parts,
                (
                    loaded.read("divisor").clone()
                    if contents.basis == "deltas"
                    else torch.ones(loaded.contents.rows, len(contents.labels)).double()
                ),
                precondition,
                contents.normalize,
                loaded.coordinates,
            )
            load_state(loaded, place)
            subspace._set_x(loaded.read("coefficients").clone())
            subspace.write_weights()
            check_range(place)
            refresh_spectral_norms(model)
        return subspace

    # Weights in and out --------------------------------------------------------------------------

    @torch.no_grad()
    def write_weights(self) -> None:
        """model parameters = center + sum_i x[i, l] * P[i, :], in their own dtypes."""
        self.placement.write(self.basis, self.x(), self.center)

    @torch.no_grad()
    def project_gradients(self) -> Tensor:
        """c (n, L): the gradient of the coefficients, from the parameters' .grad (None counts as
        zero), averaged over ranks.
        """
        return self._pull_back(
            self.placement.project(self.basis, self._gradients(), self.x()), slice(None)
        )

    def can_fuse(self) -> bool:
        """Whether step() covers this subspace: one process, packed, on a device that has its
        kernel, coefficients of the basis itself, dtypes that the kernels write."""
        if (
            self.placement.name != "single"
            or isinstance(self.basis, DenseBasis)
            or self.preconditioner is not None
            or self.constraint != "none"
        ):
            return False
        if not tk.dispatch.default_backend("step", self.basis.device.type):
            return False
        grads = [p.grad for p in self.parameters if p.grad is not None]
        return all(p.dtype in FLOATS for p in self.parameters) and all(
            g.layout == torch.strided and g.dtype in FLOATS for g in grads
        )

    @torch.no_grad()
    def step(self, rule: str, options: dict, state: dict) -> None:
        """twa_kernels.step on the coefficients and the model's weights; the coefficients' gradient
        is kept in .grad.
        """
        grads = self._gradients()
        self.coefficients.grad = tk.step(
            self.basis,
            grads,
            self.coefficients,
            self.parameters,
            self.center,
            rule=rule,
            options=options,
            state=state,
        )

    def _gradients(self) -> list[Tensor | None]:
        if all(p.grad is None for p in self.parameters):
            raise RuntimeError(
                "no parameter of the model has a gradient: call loss.backward() before"
                " optimizer.step()"
            )
        return self.placement.gradients()

    @torch.no_grad()
    def take_gradient(self, k: int) -> tuple[Tensor, slice]:
        """This rank's addend of the coefficients' gradient from parameter k's .grad, which is
        freed: (n, columns), and which columns.
        """
        if self.parameters[k].grad is None:
            raise RuntimeError(
                "a gradient was taken before it could be projected: does another low_memory"
                " optimizer hold this model? close() it"
            )
        if k not in self._selected:
            self._selected[k] = self.basis.select(k)
        basis, columns = self._selected[k]
        c = self._pull_back(
            self.placement.project_local(basis, [self.placement.gradient(self.parameters[k])], k),
            columns,
        )
        self.parameters[k].grad = None
        return c, columns

    @torch.no_grad()
    def x(self) -> Tensor:
        """Coefficients (n, L) of the basis: the trained ones, A times them, or those whose merge
        weights are the softmax of them.
        """
        if self.constraint == "simplex":
            return (self._simplex() * self._divisor()).to(self.coefficients.dtype)
        if self.preconditioner is None:
            return self.coefficients.detach()
        return torch.einsum("lij,jl->il", self.preconditioner, self.coefficients)

    def _pull_back(self, c: Tensor, columns: slice) -> Tensor:
        """Gradient of the trained coefficients from that of x."""
        if self.constraint == "simplex":
            beta, g = self._simplex()[:, columns], c.double() * self._divisor()[:, columns]
            return (math.sqrt(len(beta)) * beta * (g - (beta * g).sum(0))).to(c.dtype)
        return (
            c
            if self.preconditioner is None
            else torch.einsum("lij,il->jl", self.preconditioner[columns], c)
        )

    def _simplex(self) -> Tensor:
        """beta (n, L) > 0 of the trained coefficients.

        With the factor a learning rate for unconstrained coefficients fits here, too: merge weights
        near 1 / n move by lr / sqrt(n) a step."""
        return (self.coefficients.detach().double() * math.sqrt(len(self.candidates))).softmax(0)

    def _divisor(self) -> Tensor:
        return self.divisor.to(self.coefficients.device)

    # Coefficients and merge weights --------------------------------------------------------------

    @torch.no_grad()
    def merge_weights(self) -> Tensor:
        """beta (n, L) float64: theta = sum_i beta[i, l] w_i (exact without quantisation); sum_i
        beta[i, l] = 1 unless the center is zero.
        """
        if self.coordinates is not None:
            share = self.coordinates.shares(self.x())
        else:
            share = torch.where(
                self.divisor > 0,
                self.x().cpu().double() / torch.where(self.divisor > 0, self.divisor, 1.0),
                0.0,
            )
        return share + self.center_weights[:, None] * (1.0 - share.sum(0, keepdim=True))

    @torch.no_grad()
    def set_merge_weights(self, beta: Tensor) -> None:
        """Coefficients for merge weights (n,) or (n, L) that sum to 1, and the model there."""
        beta = beta.double().cpu()
        beta = beta[:, None].expand(-1, len(self.labels)) if beta.dim() == 1 else beta
        expected = (len(self.candidates), len(self.labels))
        if beta.shape != expected or not torch.allclose(
            beta.sum(0), torch.ones(1, dtype=torch.float64), atol=1e-6
        ):
            raise ValueError(
                f"merge weights: expected shape (n,) or {expected} with columns that sum to 1,"
                f" found {tuple(beta.shape)}"
            )
        self._set_x(
            beta * self.divisor if self.coordinates is None else self.coordinates.coefficients(beta)
        )
        self.write_weights()
        refresh_spectral_norms(self.model)

    @torch.no_grad()
    def _set_x(self, x: Tensor) -> None:
        """The trained coefficients that make those of the basis x (n, L); nearly, if merge weights
        must be positive and some are not.
        """
        if self.constraint == "simplex":
            known = self.divisor > 0
            beta = torch.where(known, x.double().cpu() / self.divisor.clamp(min=1e-300), 0.0)
            # of candidates that are equal to the center
            rest = (1.0 - beta.sum(0)) / (~known).sum(0).clamp(min=1)
            x = torch.where(known, beta, rest).clamp(min=1e-3 / len(beta)).log() / math.sqrt(
                len(beta)
            )
        if self.preconditioner is not None:
            x = torch.linalg.solve(self.preconditioner.double().cpu(), x.double().T[..., None])[
                ..., 0
            ].T
        self.coefficients.copy_(x)
        self.placement.world.forget()

    def identity(self) -> dict[str, object]:
        """What coefficients belong to: those of one subspace mean nothing in another."""
        return {
            "candidates": [c.name for c in self.candidates],
            "segment_of": self._segment_of(),
            "chunk": self.parts.chunk,
            "bits": self.basis.bits,
            "center_weights": self.center_weights.tolist(),
            "normalize": self.normalize,
            "precondition": self.preconditioner is not None,
            "constraint": self.constraint,
            "basis": "deltas" if self.coordinates is None else "orthonormal",
        }

    # Export --------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, sharded: bool = False, basis: bool = False) -> None:
        """Writes averaged.safetensors (the model as it is now, every key and dtype of the candidate
        files) and coefficients.json (x and merge weights beta). Candidates that are directories as
        save_pretrained writes them also give averaged/, which from_pretrained loads (PEFT adapters:
        PeftModel.from_pretrained), in the place of an older one, and mergekit.yaml (not for
        adapters). sharded: also averaged_dcp/, a torch.distributed.checkpoint to which each rank
        writes what it holds. basis: also basis.safetensors, the packed basis with center and
        coefficients, for `load`. On several ranks all call it; the first writes, and none returns
        before the files are there."""
        folder, world = Path(folder), self.placement.world
        if basis:
            check_savable(self)
        world.check()
        with world.together(f"writing {folder}"):
            if world.is_writer:
                folder.mkdir(parents=True, exist_ok=True)
            world.meet()
            write_export(folder / "averaged.safetensors", self.placement)
            if sharded:
                write_dcp(folder / "averaged_dcp", self.placement)
            if world.is_writer:
                coefficients = self.coefficients_json()
                write_json(folder / "coefficients.json", coefficients)
                write_beside(folder, self.placement, coefficients)
                if basis:
                    save_basis(folder / NAME, self)

    def coefficients_json(self) -> dict:
        return {
            "format": "twa-coefficients-1",
            "candidates": [str(c.path) for c in self.candidates],
            "segments": self.labels,
            "segment_of": self._segment_of(),
            "chunk": self.parts.chunk,
            "bits": self.basis.bits,
            "basis": "deltas" if self.coordinates is None else "orthonormal",
            "center_weights": self.center_weights.tolist(),
            "x": self.x().cpu().tolist(),
            "beta": self.merge_weights().tolist(),
        }

    def _segment_of(self) -> dict[str, str]:
        return {
            name: self.labels[l] for name, l in zip(self.layout.trained, self.segments, strict=True)
        }


def _preconditioner(gram: Tensor) -> Tensor:
    """A (L, n, n) with x = A y:

    A = c * L^-T for G + ridge = L L^T, so that the rows of A^T P are orthogonal with norm c, the
    root mean square norm of P's rows. The ridge, 1e-4 of the mean diagonal, bounds what nearly
    dependent candidates are amplified by."""
    n = gram.shape[-1]
    # (L, 1, 1); 0 for a segment that is equal in all candidates
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(n, dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + eye * torch.where(mean > 0, RIDGE * mean, 1.0))
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False).mT
    # a segment that is equal in all candidates has no basis to turn
    return torch.where(mean > 0, mean.sqrt() * inverse, eye)


def choices(
    layout: Layout, candidates: Candidates, granularity: Granularity, center: str | int | Tensor
) -> tuple[Tensor, Segments]:
    """The center's weights over the candidates (n,), and the segments."""
    numels = [math.prod(candidates.info[key].shape) for key in layout.trained.values()]
    return _center_weights(center, len(candidates)), segments_of(
        list(layout.trained), numels, granularity
    )


def _center_weights(center: str | int | Tensor, n: int) -> Tensor:
    if center == "mean" if isinstance(center, str) else False:
        return schemes.uniform(n)
    if isinstance(center, str) and center == "zero":
        return torch.zeros(n, dtype=torch.float64)
    if isinstance(center, str) and center == "last":
        return schemes.candidate(n, -1)
    if isinstance(center, int):
        return schemes.candidate(n, center)
    if (
        isinstance(center, Tensor)
        and center.shape == (n,)
        and abs(float(center.double().sum()) - 1.0) < 1e-6
    ):
        return center.double().cpu()
    raise ValueError(
        f"center: expected 'mean', 'last', 'zero', an index below {n} or {n} merge weights that sum"
        f" to 1, found {center!r}"
    )
