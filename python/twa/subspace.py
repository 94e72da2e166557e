"""`Subspace`: coefficients to weights of a model, and its gradients to coefficients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import twa_kernels as tk
from twa_kernels import capture
from twa_kernels.scaling import NORMALIZE

from . import averages
from .basis.dense import DenseBasis
from .basis.feed import Feed
from .basis.file import NAME, Loaded, read_basis
from .basis.grams import grams
from .basis.pieces import Pieces
from .basis.segments import Granularity, Segments, segments_of
from .basis.sources import Sources, check_sources
from .basis.streamed import StreamedBasis, in_host_memory
from .coordinates import BASES, CONSTRAINTS, Balanced, Coordinates, constrained
from .distributed.choose import choose_sharding, find_ranks
from .distributed.cost import check_storage
from .distributed.ranks import digest, facts, versions
from .distributed.sharding import Basis, KeptBasis, Sharding, reconstruct
from .distributed.weights import check_range, check_taken, load_untrained, write_counts
from .dtensors import local
from .export.bundle import write_bundle
from .io.averaging import as_weights
from .io.candidates import Candidates
from .io.errors import StateError, TwaError, check_type
from .io.key_map import match_model
from .io.versions import COEFFICIENTS, SUBSPACE, problem
from .modes import plain_weights, with_own_train
from .packing.build import build
from .packing.load import (
    center_at,
    center_of,
    check_model,
    find_basis,
    load_state,
    rows_of,
    warn_of_extra_state,
)
from .packing.save import check_savable, save_basis
from .spectral_norm import refresh_spectral_norms

BITS = (32, 8, 4, 3, 2, 1)


class Subspace:
    """The span of the candidates around a center, attached to a model.

        theta = center + sum_r x[r, l] * P[r, :]     l = segment of the column

    Made by `from_candidates` or `load`. The parameters of the model are at the coefficients
    whenever one of its methods returns.

    Attributes:
        coefficients: nn.Parameter, float32, (n, L), of differences (n - 1, L), of an orthonormal
            basis (rank, L): what is trained. Every rank has all of them, the same bits
        coordinates: how coefficients, rows of P and merge weights make each other
        basis: this rank's rows and columns of P
        center: this rank's part, float32, where the basis is kept; None on a rank that adds none
        pieces: this rank's parts of the parameters as the basis has them
        segments: which columns share coefficients
        normalize: how the rows were scaled
        sharding: what this rank holds, see `twa.distributed.sharding`
        model: the model that the subspace is attached to
        parameters: its trained parameters, in the order of the basis
        candidates: the n checkpoints
        key_map: which tensor of the model is which of the candidates
    """

    def __init__(
        self,
        sharding: Sharding,
        basis: KeptBasis,
        center: list[Tensor] | None,
        segments: Segments,
        coordinates: Coordinates,
        normalize: str = "row",
        pieces: Pieces | None = None,
        storage: str = "device",
    ) -> None:
        device = sharding.device
        self.pieces = pieces or Pieces.of_whole(shard.shape for shard in sharding.shards)
        self.sharding, self.model = sharding, sharding.model
        self.candidates, self.key_map = sharding.candidates, sharding.key_map
        self.parameters = sharding.tensors
        self.basis: Basis
        self.center = center
        if isinstance(basis, tk.PackedBasis) and storage == "host":
            self.basis = in_host_memory(basis, device)
        else:
            if isinstance(basis, tk.PackedBasis):  # its codes may be as large as a file
                basis = replace(basis, codes=Feed(device).whole(basis.codes))
            self.basis = basis.to(device)
            self.center = None if center is None else [c.to(device) for c in center]
        self.segments, self.coordinates, self.normalize = segments, coordinates, normalize
        dtype = self.basis.dtype if isinstance(self.basis, DenseBasis) else torch.float32
        self.coefficients = nn.Parameter(coordinates.start().to(device, dtype))
        self._of_tensor: dict[int, tuple[Basis, slice]] = {}
        self._own_train = with_own_train(self.model)
        self._written: list[int] | None = None  # write_counts when this wrote them last
        self._has_warned = False

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
        constraint: str = "none",
        balance: bool = False,
        sharding: str | Sharding = "auto",
        group: dist.ProcessGroup | None = None,
        progress: Callable[[str, int], None] | None = None,
        device: torch.device | str | None = None,
        storage: str = "device",
    ) -> Subspace:
        """Streams the candidates tensor by tensor into a basis and moves the model to the center.

        Frozen parameters and float buffers get the center's weights over the candidates and are not
        trained; integer and bool buffers are the last candidate's; a tied weight counts once;
        tensors equal in all candidates stay as they are.

        Args:
            model: its trainable parameters are in the subspace
            candidates: the n checkpoints
            bits: 8, 4, 3, 2, 1 (packed), or 32 (dense float32, n * D * 4 bytes)
            granularity: segments with their own coefficients: "model", "block", "tensor", a mapping
                from parameter name, a function; below tensors so many weights of one as they lie in
                memory (a multiple of 128), or "fine": as few as 4096 segments allow
            center: "mean", "last", a candidate's index, merge weights (n,) that sum to 1, or
                "zero": the span of the candidates themselves (the model then starts at zero: call
                set_merge_weights before training; see `conference_method`)
            normalize: "row": each candidate's delta has the same norm; "none"
            basis: what the rows of P are. "deltas": the candidates' distances from the center.
                "differences": those of each candidate but the first from the one before it, coded
                in a closed loop: each from what the rows before it decode to, so that errors of
                quantisation do not add up (not with sharding "rows"). Of a recording they are its
                own codes, and its own `bits` count.
                "orthonormal": in each segment an orthonormal basis of their span, made by block
                Gram-Schmidt (two more reads of the files); rows have the root mean square norm of
                the deltas' (norm 1 for normalize="none"), candidates that depend on earlier ones
                (duplicates, combinations) add no row
            constraint: "simplex": merge weights that are positive and sum to 1 in each segment
                (learned soup), whatever the basis: beta = softmax(sqrt(n) y), and y is trained. It
                starts at the center, but for weights of zero, which become 1e-3 / n
            balance: train combinations of the rows whose lengths are nearer to each other (see
                `twa.coordinates.Balanced`): `twa average` does. It trains better, most of all with
                coefficients below tensors. A step is then no single kernel. Not with a constraint,
                an orthonormal basis, center "zero" or sharding "rows"
            sharding: how the ranks of a torch.distributed job share the work. "replicate": every
                rank holds all of P, n * L numbers are summed per step; "columns": a model sharded
                by fully_shard or as DTensors, each rank holds P for its shards; "rows": each rank
                holds some rows of P, with sums of whole gradients and weights; "single": no
                communication; "auto": columns for a sharded model, else replicate if it fits into
                memory, else rows; single where torch.distributed is not initialised. But for
                "single", every rank makes the same calls, with its own data, and gradients are
                averaged over ranks
            group: the process group; default: the mesh of a sharded model, else all ranks
            progress: called with (tensor name, bytes read)
            device: where the basis is built, before it goes to the model's device; None: on that,
                if it has kernels, else on the CPU. Candidates are read on the CPU and go to a GPU
                a block at a time. The basis has the same bits wherever it is packed, but for
                Triton's sums of squares, and for an orthonormal one
            storage: where basis and center are kept. "device": the model's. "host": in host
                memory, for a GPU that has no room for them: two blocks of 64 MiB at a time are on
                the device, and a step copies the basis there twice and the center once. The basis
                is then built on the CPU. A step is no single kernel, and no CUDA graph captures it

        Raises:
            CandidateError: files and model do not fit, or a candidate holds NaN or Inf
            TwaError: another argument is none of what it can be
            DistributedError: the ranks were given different candidates, models, options or versions
        """
        given = sharding if isinstance(sharding, Sharding) else None
        name = sharding.name if isinstance(sharding, Sharding) else sharding
        ranks = given.ranks if given else find_ranks(name, model, group)
        with ranks.fail_together("matching model and candidates"):
            check_type("candidates", candidates, Candidates, "twa.Candidates(...)")
            _check_options(bits, basis, constraint, normalize, center)
            _check_balance(balance, basis, constraint, center, name)
            device = _check_storage(storage, bits, device)
            if given:  # which has matched them
                candidates, key_map = given.candidates, given.key_map
            else:
                candidates, key_map = match_model(model, candidates)
            if candidates.recording is not None and basis == "differences" and bits != 32:
                bits = candidates.recording.bits
            weights = averages.of_center(center, len(candidates))
            numels = key_map.numels(candidates.info)
            segments = segments_of(list(key_map.trained), numels, granularity)
            if segments.chunk and basis == "orthonormal":
                raise TwaError(
                    "expected segments of whole tensors, found granularity"
                    f" {segments.chunk}; use basis='deltas' or 'differences'",
                    "basis='orthonormal'",
                )
            if ranks.world_size > 1:
                options = {"bits": bits, "basis": basis, "normalize": normalize, "sharding": name}
                options |= {"constraint": constraint, "balance": balance, "storage": storage}
                options |= {"center": digest(weights.tolist())}
                options |= {"granularity": digest((segments.labels, segments.first))}
                same = {key: str(value) for key, value in options.items()}
                ranks.check_equal(versions() | facts(model, candidates) | same)
            place = given or choose_sharding(
                name, model, candidates, key_map, bits, ranks, storage=storage
            )
        place = copy.copy(place)  # another subspace may be of the one that was given
        place.mapped = ()
        with ranks.fail_together("packing the candidates"):
            made = build(place, segments, bits, basis, normalize, weights, progress, device)
            coordinates = constrained(made.coordinates, constraint)
            if balance:
                coordinates = balanced(coordinates, made.basis, made.pieces, segments, place)
            subspace = cls(
                place,
                made.basis,
                made.center,
                segments,
                coordinates,
                normalize,
                made.pieces,
                storage,
            )
            with plain_weights(model):
                load_untrained(place, weights)
                subspace._settle()
        return subspace

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module,
        candidates: Candidates | None = None,
        *,
        center: str | int | Tensor | None = None,
        balance: bool = False,
        sharding: str = "auto",
        group: dist.ProcessGroup | None = None,
        storage: str = "device",
    ) -> Subspace:
        """The subspace of a packed basis on disk, and the model at its coefficients.

        Codes are mapped, not read: it takes no time, and processes of one machine share the memory.
        With storage="host" they stay mapped for a model on a GPU, too, and are read as they are
        copied there, so that a basis may be larger than both memories.
        Ranks call it together.

        Args:
            path: the file, or its directory, as `twa pack` or `save(basis=True)` has written it
            model: as it was packed for
            candidates: those that it was packed from, which is checked by their fingerprints.
                Without them all works but exact averages (`load_merge`) and `twa.learning_rate`
            center: another center than the file's: as in from_candidates, but for "zero". Rows of P
                stay as they are, so that nothing is packed; coefficients that the file holds are
                left out. With the candidates the center is their exact average. Without, it has the
                error of the rows' quantisation, and what is not trained stays as the file has it
            balance: as in from_candidates, for a file that is at its center, as `twa pack` writes
                it; one that is balanced stays so
            sharding, group: as in from_candidates. With "columns" each rank takes the file's codes
                of its shards as they are, wherever these begin
            storage: as in from_candidates

        Raises:
            BasisError: the file is damaged, is no packed basis, or does not fit model or
                candidates. As long as the basis is mapped (the model is on the CPU), steps and
                `save` raise it, too, if the file is written to; replacing it is safe
            TwaError: balance, and the file's coefficients are trained ones of its rows; or center,
                and it is zero, or the file's is; storage is none of what it can be
        """
        path, ranks = find_basis(path), find_ranks(sharding, model, group)
        with ranks.fail_together(f"loading {path}"):
            check_storage(storage, ())
            loaded = read_basis(path)
            contents = loaded.contents
            check_model(model, contents, path)
            if candidates is not None:
                check_type("candidates", candidates, Candidates, "twa.Candidates(...)")
                check_sources(contents, candidates)
                sources = match_model(model, candidates)[0]
            else:
                sources = Sources(loaded)
                warn_of_extra_state(model, path)
            weights = None if center is None else averages.of_center(center, len(sources))
            key_map = contents.key_map
            place = choose_sharding(
                sharding, model, sources, key_map, contents.bits, ranks, storage=storage
            )
            if ranks.world_size > 1:
                given = None if weights is None else weights.tolist()
                same = {"basis": digest(contents), "center": digest(given)}
                ranks.check_equal(versions() | same)
            if weights is not None:
                is_balanced = balance or contents.balanced
                return recentred(
                    loaded, place, weights, contents.constraint, is_balanced, storage=storage
                )
            place.mapped = (loaded.file,)
            basis, pieces = rows_of(loaded, place)
            at = center_of(loaded, place)
            coordinates, segments = loaded.coordinates(), contents.tensor_segments
            trained = loaded.read("coefficients")
            if balance and not contents.balanced and bool(trained.any()):
                raise TwaError("its coefficients are trained ones of its own rows", "balance")
            if balance or contents.balanced:
                around = "mean" if bool(coordinates.center_weights.any()) else "zero"
                _check_balance(True, contents.basis, contents.constraint, around, place.name)
                coordinates = balanced(coordinates, basis, pieces, segments, place)
            if contents.balanced:
                coordinates.take_balance(loaded.read("mix"), loaded.read("unit"))
            subspace = cls(
                place, basis, at, segments, coordinates, contents.normalize, pieces, storage
            )
            with torch.no_grad():
                if trained.shape == subspace.coefficients.shape:  # else both are zero
                    subspace.coefficients.copy_(trained)
            with plain_weights(model):
                load_state(loaded, place)
                subspace._settle()
            subspace._forget(loaded)
        return subspace

    def __repr__(self) -> str:
        shape = tuple(self.coefficients.shape)
        return f"Subspace({len(self.candidates)} candidates, coefficients {shape})"

    @property
    def kept(self) -> KeptBasis:
        """The basis where its bytes are: in host memory if it is streamed from there."""
        return self.basis.host if isinstance(self.basis, StreamedBasis) else self.basis

    def _forget(self, loaded: Loaded) -> None:
        """Looks at the file no more if nothing lies in it: it was copied, and may go."""
        held = [] if self.center is None else list(self.center)
        if isinstance(self.kept, tk.PackedBasis):
            held += [self.kept.codes, self.kept.scales]
        if not any(map(loaded.file.holds, held)):
            self.sharding.check_mapped()  # what was copied was whole
            self.sharding.mapped = ()

    def _settle(self) -> None:
        """Moves the model to the coefficients for the first time."""
        self.write_weights()
        check_range(self.sharding)
        check_taken(self.sharding)
        refresh_spectral_norms(self.model)

    # Weights out, gradients in -------------------------------------------------------------------

    @torch.no_grad()
    def x(self) -> Tensor:
        """The coefficients of the rows of P, (rows, L); with a constraint not those trained."""
        return self.coordinates.to_basis(self.coefficients)

    @torch.no_grad()
    def write_weights(self) -> None:
        """Sets the model's parameters to center + sum_r x[r, l] * P[r, :], in their own dtypes."""
        with plain_weights(self.model, self._own_train):
            self.sharding.write(self.basis, self.pieces, self.x(), self.center)
            self._written = write_counts(self.sharding)

    @torch.no_grad()
    def find_moved(self) -> str | None:
        """Name of a trained tensor that is not at the coefficients, as somebody else wrote it.

        Rounded to the dtype of the candidates' files it counts as the same. None if there is none,
        or with sharding "rows", where no rank can tell.
        """
        if self.sharding.name == "rows":
            return None
        with plain_weights(self.model, self._own_train):
            x = self.x()
            for k, (name, key) in enumerate(self.key_map.trained.items()):
                basis, columns = self._basis_of(k)
                now = local(self.parameters[k])
                center = None if self.center is None else [self.center[k]]
                expected = torch.empty_like(now)
                reconstruct(basis, x[:, columns].contiguous(), center, [expected], self.pieces, k)
                stored = self.candidates.info[key].dtype
                if not torch.allclose(now.to(stored), expected.to(stored), 0, 0, equal_nan=True):
                    self.sharding.check_mapped()
                    return name
        return None

    def warn_if_moved(self) -> None:
        """Warns, once, if somebody else has moved the model since this wrote to it.

        Weights that were changed and put back, as for an evaluation, do not count.
        """
        if self._written is None or self._has_warned:  # once is enough, and looking takes time
            return
        if capture.capturing(self.coefficients.device):  # looking waits for the device
            return
        if (now := write_counts(self.sharding)) == self._written:
            return
        if name := self.find_moved():
            self._has_warned = True
            warnings.warn(
                f"{name!r} was changed by something else since the last step: the step starts from"
                " the coefficients, and the change is lost",
                RuntimeWarning,
                stacklevel=3,
            )
        else:
            self._written = now

    @torch.no_grad()
    def project_gradients(self) -> Tensor:
        """The gradient of the coefficients, in their shape, from the parameters' .grad.

        None counts as zero; several ranks get the average over ranks.
        """
        grads = self._gradients()
        c = self.sharding.coefficient_gradient(self.basis, self.pieces, grads, self.x())
        g = self.coordinates.pull_back(self.coefficients, c, slice(None))
        if self.coordinates.trains_rows:
            return g
        # Ranks with other processors may round the same sums otherwise.
        return self.sharding.ranks.broadcast_(g, 0)

    @torch.no_grad()
    def take_gradient(self, k: int) -> tuple[Tensor, slice]:
        """This rank's addend of the coefficients' gradient from parameter k; its .grad is freed.

        Returns:
            (rows, columns), and which columns of the coefficients they are
        """
        p = self.parameters[k]
        if p.grad is None:
            raise RuntimeError(
                "a gradient was taken before it could be projected: does another low_memory"
                " optimizer hold this model? close() it"
            )
        basis, columns = self._basis_of(k)
        g = self.sharding.gradient(p)
        c = self.sharding.local_coefficient_gradient(basis, self.pieces, [g], k)
        p.grad = None
        return self.coordinates.pull_back(self.coefficients, c, columns), columns

    def unit_step(self) -> float:
        """How far the weights move when every coefficient moves by 1, each by its gradient's sign.

        As in the first step of Adam with a rate of 1, and a gradient that is white noise. It is
        estimated from samples of P. Ranks call it together.
        """
        ranks, counts = self.sharding.ranks, list[int]()
        found = torch.zeros(0, dtype=torch.float32, device="cpu")
        if not self.coordinates.is_balanced:  # which knows
            found, counts = _grams(self.kept, self.pieces, self.segments, self.sharding)
        mine = self.coordinates.step_sq(found, counts)
        total = torch.tensor([mine], dtype=torch.float64, device="cpu")
        if self.sharding.name == "rows":  # as if rows of two ranks were like those of one
            total *= ranks.world_size
        return float(ranks.broadcast_(total, 0).sqrt())

    def _basis_of(self, k: int) -> tuple[Basis, slice]:
        """The basis of tensor k alone, and which columns of the coefficients are its."""
        if k not in self._of_tensor:
            at = self.pieces.of(k)
            self._of_tensor[k] = self.basis.select(at.start, len(at))
        return self._of_tensor[k]

    def _gradients(self) -> list[Tensor | None]:
        """This rank's part of each parameter's .grad; RuntimeError if there are none."""
        if all(p.grad is None for p in self.parameters):
            raise RuntimeError(
                "no parameter of the model has a gradient: call loss.backward() before"
                " optimizer.step()"
            )
        return self.sharding.gradients()

    def can_fuse(self) -> bool:
        """Whether `step` covers this subspace.

        It does for one process, a packed basis on a device that has its kernel, coefficients of the
        rows themselves, and dtypes that the kernels write.
        """
        if self.sharding.name != "single" or not isinstance(self.basis, tk.PackedBasis):
            return False
        if not self.coordinates.trains_rows:
            return False
        if not tk.registry.default_backend("step", self.basis.device.type):
            return False
        grads = [p.grad for p in self.parameters]
        return self.basis.takes(grads) and self.basis.takes(self.parameters)

    @torch.no_grad()
    def step(self, rule: str, options: dict[str, Any], state: dict[str, Any]) -> None:
        """Projects gradients, updates coefficients and writes weights in one call.

        It is twa_kernels.step. The coefficients' gradient is kept in .grad.

        Args:
            rule: "sgd" or "adamw"
            options: lr, ... of that optimizer
            state: that optimizer's state of the coefficients, updated in place
        """
        assert isinstance(self.basis, tk.PackedBasis)  # see can_fuse
        with plain_weights(self.model, self._own_train):
            self.coefficients.grad = tk.step(
                self.basis,
                self._gradients(),
                self.coefficients,
                self.parameters,
                self.center,
                rule=rule,
                options=options,
                state=state,
            )
            # Coefficients and weights may be wrong by now: nothing saves them after this.
            self.sharding.check_mapped()
            self._written = write_counts(self.sharding)

    # Merge weights -------------------------------------------------------------------------------

    @torch.no_grad()
    def merge_weights(self) -> Tensor:
        """The merge weights that the coefficients stand for.

            theta = sum_i beta[i, l] w_i, exact without quantisation

        Returns:
            beta (n, L) float64, on the CPU; columns sum to 1 unless the center is zero
        """
        return self.coordinates.merge_weights(self.coefficients)

    @torch.no_grad()
    def set_merge_weights(self, beta: Tensor | Sequence[float]) -> None:
        """Sets coefficients and model to merge weights.

        Under a constraint, to the nearest that it allows.

        Args:
            beta: (n,) or (n, L), also as a list; columns sum to 1

        Raises:
            TwaError: shape or sums are others
        """
        beta, expected = as_weights(beta), (len(self.candidates), len(self.segments.labels))
        beta = beta.double().cpu()
        beta = beta[:, None].expand(-1, expected[1]) if beta.dim() == 1 else beta
        ones = torch.ones(1, dtype=torch.float64, device="cpu")
        if beta.shape != expected or not torch.allclose(beta.sum(0), ones, atol=1e-6):
            raise TwaError(
                f"expected shape (n,) or {expected} with columns that sum to 1, found"
                f" {tuple(beta.shape)}",
                "merge weights",
            )
        self.coefficients.copy_(self.coordinates.from_merge_weights(beta))
        self.sharding.ranks.reset_drift()
        with plain_weights(self.model):
            self.write_weights()
            refresh_spectral_norms(self.model)

    # State and export ----------------------------------------------------------------------------

    def identity(self) -> dict[str, object]:
        """Says what coefficients belong to: those of one subspace mean nothing in another."""
        return {
            "candidates": [c.name for c in self.candidates],
            "segment_of": self._segment_of(),
            "chunk": self.segments.chunk,
            "bits": self.basis.bits,
            "center_weights": self.coordinates.center_weights.tolist(),
            "origin": self._origin(),
            "normalize": self.normalize,
            "constraint": self.coordinates.constraint,
            "basis": self.coordinates.basis,
            "balanced": self.coordinates.is_balanced,
        }

    def check_identity(self, theirs: Mapping[str, object], what: str = "state") -> None:
        """Raises TwaError unless coefficients of a subspace with that identity mean the same here.

        Args:
            theirs: what `identity` gave there
            what: holds the coefficients
        """
        for key, ours in self.identity().items():
            if theirs.get(key) != ours:
                text = f"{key}: expected {ours}, found {theirs.get(key)}"
                raise TwaError(text, f"{what} of another subspace")

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes: the coefficients, and what they belong to.

        Raises:
            DistributedError: the ranks' coefficients were not the same bits
            BasisError: a mapped basis is no longer what it was
        """
        self.sharding.check_mapped()
        self.sharding.ranks.check_drift()
        # a tuple: torch.distributed.checkpoint keeps it whole
        identity = tuple(self.identity().items())
        state = {
            "format": SUBSPACE,
            "coefficients": self.coefficients.detach().clone(),
            "identity": identity,
        }
        return state | self.coordinates.balance

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets coefficients and model to what they were when `state_dict` was called.

        Raises:
            TwaError: it is no such state, or of a subspace of other candidates, segments, center,
                bits, basis, constraint or normalisation, or a newer twa has made it
        """
        # without: from before there were versions
        if text := problem(state.get("format", SUBSPACE), SUBSPACE):
            raise StateError(text, "state of a Subspace")
        if missing := {"coefficients", "identity"} - state.keys():
            raise StateError(f"expected the state of a Subspace, found no {min(missing)!r}")
        self.check_identity(dict(state["identity"]))
        x = state["coefficients"]
        if x.shape != self.coefficients.shape:
            expected = tuple(self.coefficients.shape)
            raise TwaError(f"expected shape {expected}, found {tuple(x.shape)}", "coefficients")
        if self.coordinates.is_balanced:
            if missing := {"mix", "unit"} - state.keys():
                raise StateError(f"expected the state of a balanced Subspace, no {min(missing)!r}")
            self.coordinates.take_balance(state["mix"], state["unit"])
        self.sharding.ranks.reset_drift()
        self.coefficients.copy_(x)
        with plain_weights(self.model):
            self.write_weights()
            refresh_spectral_norms(self.model)

    def coefficients_json(self) -> dict[str, object]:
        """What coefficients.json holds: x, beta, and what they are of."""
        return {
            "format": COEFFICIENTS,
            "candidates": [str(c.path) for c in self.candidates],
            "segments": self.segments.labels,
            "segment_of": self._segment_of(),
            "chunk": self.segments.chunk,
            "bits": self.basis.bits,
            "basis": self.coordinates.basis,
            "constraint": self.coordinates.constraint,
            "center_weights": self.coordinates.center_weights.tolist(),
            "origin": self._origin(),
            "x": self.x().cpu().tolist(),
            "beta": self.merge_weights().tolist(),
        }

    def _origin(self) -> list[float] | None:
        """The weights of the point that rows of P are distances from; None: the center's."""
        origin = self.coordinates.rows.origin
        return None if origin is None else origin.tolist()

    def _segment_of(self) -> dict[str, str]:
        """Label of each trained tensor's segment, or of the first of them."""
        labels = [self.segments.labels[l] for l in self.segments.first]
        return dict(zip(self.key_map.trained, labels, strict=True))

    def save(self, folder: str | Path, *, dcp: bool = False, basis: bool = False) -> None:
        """Writes averaged.safetensors, the model as it is now, and coefficients.json.

        Every key and dtype of the candidate files is kept. On several ranks all call it; the first
        writes, and none returns before the files are there.

        Candidates that are directories as save_pretrained writes them also give averaged/, which
        from_pretrained loads (PEFT adapters: PeftModel.from_pretrained), in the place of an older
        one. Models also give mergekit.yaml.

        Args:
            folder: where the files go; made if it is not there
            dcp: also averaged_dcp/, a torch.distributed.checkpoint to which each rank writes what
                it holds; its tensors are where such candidates have them, under "model" for example
            basis: also basis.safetensors, the packed basis with center and coefficients, for `load`

        Raises:
            TwaError: basis, and no rank holds all of a packed one; or the model's weights are not
                those of the coefficients, since something else has written to them
            BasisError: a mapped basis is no longer what it was
            OSError: a file cannot be written
        """
        folder, ranks = Path(folder), self.sharding.ranks
        packed = check_savable(self.kept, self.sharding) if basis else None
        ranks.check_drift()
        with ranks.fail_together(f"writing {folder}"):
            self.sharding.check_mapped()
            if name := self.find_moved():
                raise TwaError(
                    f"the model's {name!r} is not at the coefficients: something else has written"
                    " to it, such as load_best_model_at_end or an EMA; write_weights() goes back,"
                    " or save the model as it is by other means",
                    "nothing is saved",
                )
            write_bundle(folder, self.sharding, self.coefficients_json(), dcp=dcp)
            if packed is not None and ranks.is_rank_zero:
                with plain_weights(self.model):
                    save_basis(
                        folder / NAME,
                        self.sharding,
                        packed,
                        self.center or [],
                        self.coordinates,
                        self.segments,
                        self.normalize,
                        self.coefficients,
                    )


def recentred(
    loaded: Loaded,
    sharding: Sharding,
    weights: Tensor,
    constraint: str = "none",
    balance: bool = False,
    progress: Callable[[str, int], None] | None = None,
    storage: str = "device",
) -> Subspace:
    """The subspace of a file's rows of P around another center, and its model there.

    Ranks call it together. Where the model is on the CPU, the rows stay mapped.

    Args:
        loaded: the file
        sharding: of the model; its candidates are those of the file, at hand or not
        weights: (n,), the merge weights of the center
        constraint, balance: as in `Subspace.from_candidates`
        progress: called with (key of the tensor, bytes read)
        storage: as in `Subspace.from_candidates`

    Raises:
        TwaError: one of both centers is zero
    """
    contents, rows = loaded.contents, loaded.coordinates().rows
    for name, total in (("center", weights.sum()), (f"{loaded.path}", rows.center_weights.sum())):
        if abs(float(total) - 1) > 2e-6:
            raise TwaError(
                f"expected a center other than 'zero', found weights of sum {total}", name
            )
    _check_balance(balance, contents.basis, constraint, "mean", sharding.name)
    with sharding.ranks.fail_together(f"moving {loaded.path} to another center"):
        sharding = copy.copy(sharding)  # another subspace may be of the one that was given
        sharding.mapped = (loaded.file,)
        basis, pieces = rows_of(loaded, sharding)
        device = "cpu" if storage == "host" else None
        center = center_at(loaded, sharding, basis, pieces, weights, progress, device)
        segments = contents.tensor_segments
        coordinates = constrained(rows.around(weights), constraint)
        if balance:
            coordinates = balanced(coordinates, basis, pieces, segments, sharding)
        subspace = Subspace(
            sharding, basis, center, segments, coordinates, contents.normalize, pieces, storage
        )
        with plain_weights(sharding.model):
            if sharding.candidates.at_hand:
                load_untrained(sharding, weights)
            else:
                load_state(loaded, sharding)
            subspace._settle()
        subspace._forget(loaded)
    return subspace


def balanced(
    rows: Coordinates, basis: KeptBasis, pieces: Pieces, segments: Segments, sharding: Sharding
) -> Coordinates:
    """Coordinates that balance these rows; ranks call it together, and get the same bits."""
    if sharding.name == "rows":
        raise TwaError("expected another sharding: no rank has all rows of P", "balance")
    made = Balanced(rows, *_grams(basis, pieces, segments, sharding))
    for t in (made.mix, made.unit):
        sharding.ranks.broadcast_(t, 0)
    return made


def _grams(
    basis: KeptBasis, pieces: Pieces, segments: Segments, sharding: Sharding
) -> tuple[Tensor, list[int]]:
    """`grams` of all ranks' parts; with sharding "rows" zero between rows of two ranks."""
    found, counts = grams(basis, pieces, segments, [shard.counts for shard in sharding.shards])
    sharding.check_mapped()
    if sharding.name == "rows":
        own, n = found, len(sharding.candidates)  # a row for each
        found = own.new_zeros(len(own), n, n)
        found[:, sharding.rows, sharding.rows] = own
    if sharding.name in ("rows", "columns"):
        found = sharding.ranks.all_reduce_(found)
    return found, counts


def _check_balance(
    balance: bool, basis: str, constraint: str, center: object, sharding: str
) -> None:
    """TwaError if rows are to be balanced that cannot be."""
    if not balance:
        return
    for name, value, odd in (
        ("basis", basis, "orthonormal"),
        ("constraint", constraint, "simplex"),
        ("center", center, "zero"),
        ("sharding", sharding, "rows"),
    ):
        if isinstance(value, str) and value == odd:
            raise TwaError(f"expected a {name} other than {odd!r}", "balance")


def _check_storage(
    storage: str, bits: int, device: torch.device | str | None
) -> torch.device | str | None:
    """Where a basis that is kept there is built; TwaError if it cannot be kept there."""
    check_storage(storage, [bits])
    if storage == "device":
        return device
    if device is not None and torch.device(device).type != "cpu":
        raise TwaError(f"expected a basis built on the CPU, found {device}", "storage 'host'")
    return "cpu"


def _check_options(bits: int, basis: str, constraint: str, normalize: str, center: object) -> None:
    """TwaError if an option is none of what it can be."""
    for name, value, known in (
        ("bits", bits, BITS),
        ("basis", basis, BASES),
        ("constraint", constraint, CONSTRAINTS),
        ("normalize", normalize, NORMALIZE),
    ):
        if value not in known:
            raise TwaError(f"expected one of {known}, found {value!r}", name)
    if not (isinstance(center, str) and center == "zero"):
        return
    for name, value in (("constraint", "simplex"), ("basis", "differences")):
        if value in (constraint, basis):
            raise TwaError("expected a center other than 'zero'", f"{name}={value!r}")
