"""step: projection, the optimizer's update and new weights in one call."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, SupportsFloat, cast

import torch
from torch import Tensor

from .. import capture
from ..basis import PackedBasis
from ..operands import (
    BasisView,
    StepArgs,
    as_list,
    check_disjoint,
    check_is_tensor,
    check_list,
    check_tensor,
)
from ..registry import backend_of
from . import project
from .define import BASIS, Flat, define, with_basis

#: torch.optim's state of a tensor: tensors and numbers of steps, which torch types no further
State = MutableMapping[str, Any]

#: rule -> its options, in the order of the op's list, and the moments it keeps
RULES = {
    "sgd": (
        ("maximize", "lr", "weight_decay", "momentum", "dampening", "nesterov"),
        ("momentum_buffer",),
    ),
    "adamw": (
        ("maximize", "lr", "weight_decay", "beta1", "beta2", "eps"),
        ("exp_avg", "exp_avg_sq"),
    ),
}
DEFAULTS: dict[str, dict[str, object]] = {
    "sgd": {
        "lr": 1e-3,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
    },
    "adamw": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "maximize": False,
    },
}
#: options of torch's optimizers that change the update in ways the fused step does not know
UNSUPPORTED_OPTIONS = ("amsgrad", "differentiable")
#: all that a param_group of these optimizers may name
KNOWN_OPTIONS = frozenset().union(
    *DEFAULTS.values(),
    UNSUPPORTED_OPTIONS,
    ("capturable", "decoupled_weight_decay", "foreach", "fused"),
)


def step(
    basis: PackedBasis,
    grads: Tensor | Sequence[Tensor | None],
    x: Tensor,
    out: Tensor | Sequence[Tensor],
    center: Tensor | Sequence[Tensor] | None = None,
    *,
    rule: str,
    options: Mapping[str, object],
    state: State,
    backend: str = "",
) -> Tensor:
    """One training step of the coefficients in one call.

    `c = project(basis, grads)`, the optimizer's update of x, `reconstruct(basis, x, center,
    out=out)`; a segment at a time, where segments are small and many, so that their packed rows are
    read from memory once. c and out have the bits of the separate calls on the same x; x itself
    agrees with torch's optimizer to float32 rounding.

    Plain PyTorch, per segment: `x.grad = P @ g; optimizer.step(); theta = center + x @ P`.

    Args:
        basis: the packed rows.
        grads: as in `project`; no gradient may share memory with an output.
        x: (n, L) float32, contiguous, updated in place.
        out: as in `reconstruct`, written.
        center: as in `reconstruct`.
        rule: "sgd" (torch.optim.SGD, with momentum) or "adamw" (torch.optim.AdamW).
        options: lr, weight_decay, momentum, dampening, nesterov, betas, eps, maximize: a
            param_group of that optimizer (which has "params"; names of others are passed over), or
            a dict of these alone; what is left out has torch's default. amsgrad
            and differentiable must be false. capturable (adamw) counts steps on the device, so that
            a CUDA graph can capture the call, after one that was not captured. A graph repeats all
            other options as numbers: it refuses those that are tensors on its device.
        state: that optimizer's state of x, updated in place: {} at first, then step (a number or a
            0-d tensor) with exp_avg and exp_avg_sq, or momentum_buffer, tensors (n, L): torch's
            names, so that either may continue what the other began.
        backend: the one to run; "": the default of the device (registry.py).

    Returns:
        c (n, L) float32, the gradient of the coefficients, for clipping thresholds and logs.

    Raises:
        ValueError: sizes or devices do not fit the basis, or the rule or an option is unknown.
        TypeError: a dtype is not one of those above.
        RuntimeError: a CUDA graph cannot capture this call.
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {sorted(RULES)}, found {rule!r}")
    for name in UNSUPPORTED_OPTIONS:
        if options.get(name):
            raise ValueError(f"options: {name}=True is not supported by the fused step")
    if "params" not in options and (odd := set(options) - KNOWN_OPTIONS):
        known = ", ".join(DEFAULTS[rule])
        raise ValueError(f"options: expected some of {known}, found {sorted(odd)[0]!r}")
    if rule == "adamw" and not options.get("decoupled_weight_decay", True):
        raise ValueError("options: decoupled_weight_decay=False is Adam's rule, expected AdamW's")
    given = {**DEFAULTS[rule], **options}
    betas = cast(Sequence[float], given.get("betas", (0.0, 0.0)))
    given["beta1"], given["beta2"] = betas
    numbers = [_number(name, given[name]) for name in RULES[rule][0]]
    check_is_tensor("x", x)
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError("x: expected a tensor to update in place, found a lazily negated one")
    x = x.detach()
    moments = RULES[rule][1] if rule == "adamw" or given["momentum"] else ()
    # torch's SGD counts no steps: its first one is the one that finds no buffer.
    counter = x.device if given.get("capturable") else "cpu"
    steps = state.get("step")
    if steps is None:
        steps = torch.zeros((), dtype=torch.float32, device=counter)
    on_device = rule == "adamw" and (
        given.get("capturable") or (isinstance(steps, Tensor) and steps.device.type != "cpu")
    )
    if on_device:  # not read here: that would wait for the device
        count = 0
    else:
        count = 1 + (
            int(steps) if rule == "adamw" else int(state.get("momentum_buffer") is not None)
        )
    held = [torch.zeros_like(x) if state.get(name) is None else state[name] for name in moments]
    targets = as_list(out)
    with torch.no_grad():
        c = OP(
            *basis.operands,
            project.present(basis, grads),
            [] if center is None else as_list(center),
            targets,
            x,
            [*held, steps] if on_device else held,
            rule,
            numbers,
            count,
            backend,
        )
    # Only now: a call that was refused leaves the state as it was.
    state.update(zip(moments, held, strict=True))
    if rule == "adamw":
        state["step"] = steps
        state["step"] += 1
    torch.autograd.graph.increment_version([x, *held, *targets])
    return c


def _number(name: str, value: object) -> float:
    """An option's value; RuntimeError if it is on a device that a CUDA graph is captured on."""
    if isinstance(value, Tensor) and capture.capturing(value.device):
        raise RuntimeError(
            f"options['{name}'] is a tensor on {value.device}, which a CUDA graph cannot read"
            " back: give a number, which every replay repeats, or take the separate calls, whose"
            " optimizer reads it there"
        )
    return float(cast(SupportsFloat, value))


def _with_args(*flat: Any) -> Flat:
    """The flat operands, in the schema's order, as views. Raises ValueError on a wrong number."""
    basis, grads, center, out, x, state, rule, options, count, backend = with_basis(*flat)
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {sorted(RULES)}, found {rule!r}")
    names, moments = RULES[rule]
    if len(options) != len(names) or count < 0 or (count == 0 and rule != "adamw"):
        raise ValueError(
            f"step: expected options {names} and a count of at least 1, "
            f"found {len(options)} options and count {count}"
        )
    basis.check_coefficients(x)
    given = dict(zip(names, options, strict=True))
    needed = moments if rule == "adamw" or given["momentum"] else ()
    steps = None
    if count == 0:  # the steps so far are counted on the device, in a last tensor of the state
        *state, steps = state or [x.new_empty(0)]
        check_tensor("step", steps, (), torch.float32, basis.device)
    if len(state) != len(needed):
        raise ValueError(f"state: expected {len(needed)} tensors {needed}, found {len(state)}")
    for name, t in zip(("x", *needed), (x, *state), strict=True):
        check_tensor(name, t, basis.row_scale.shape, torch.float32, basis.device)
    args = StepArgs(
        rule=rule,
        maximize=bool(given["maximize"]),
        lr=given["lr"],
        weight_decay=given["weight_decay"],
        momentum=given.get("momentum", 0.0),
        dampening=given.get("dampening", 0.0),
        nesterov=bool(given.get("nesterov", 0.0)),
        beta1=given.get("beta1", 0.0),
        beta2=given.get("beta2", 0.0),
        eps=given.get("eps", 0.0),
        count=count,
        x=x,
        first=state[0] if state else None,
        second=state[1] if len(state) > 1 else None,
        steps_before=steps,
    )
    return basis, grads, args, center, out, backend


def _check(
    basis: BasisView,
    grads: Sequence[Tensor],
    args: StepArgs,
    center: Sequence[Tensor],
    out: Sequence[Tensor],
    backend: str,
) -> None:
    project.check(basis, grads, backend)
    if center:
        check_list("center", center, basis.numels, basis.device, backend)
    check_list("out", out, basis.numels, basis.device, backend)


def _check_capture(device: torch.device, args: StepArgs, counts_on_device: bool) -> None:
    """Raises RuntimeError for a step that a CUDA graph would repeat with the wrong numbers.

    The graph repeats the numbers of the captured call.
    """
    if not capture.capturing(device):
        return
    if args.count == 0 and not counts_on_device:
        raise RuntimeError(
            "a CUDA graph cannot read the number of steps back: "
            "with options['capturable']=True use backend='cuda'"
        )
    if args.count == 1 and args.first is not None:
        raise RuntimeError(
            "a CUDA graph cannot capture the first step of an optimizer with momentum: "
            "run one step before"
        )
    if args.count > 1 and args.rule == "adamw":
        raise RuntimeError(
            "a CUDA graph would repeat this step's bias correction: AdamW needs"
            " options['capturable']=True and backend 'cuda', which counts steps on the device"
        )


def _run(
    basis: BasisView,
    grads: Sequence[Tensor],
    args: StepArgs,
    center: Sequence[Tensor],
    out: Sequence[Tensor],
    backend: str,
) -> Tensor:
    _check(basis, grads, args, center, out, backend)
    check_disjoint(out)
    check_disjoint([t for t in (args.x, args.first, args.second) if t is not None], "x and state")
    chosen = backend_of("step", basis.device.type, backend)
    _check_capture(basis.device, args, chosen.counts_steps_on_device)
    if args.steps_before is not None and not chosen.counts_steps_on_device:
        # Such a kernel takes a number, and waits for it.
        args = replace(args, count=int(args.steps_before) + 1, steps_before=None)
    return chosen.kernel("step")(basis, grads, args, center, out)


def _fake(
    basis: BasisView,
    grads: Sequence[Tensor],
    args: StepArgs,
    center: Sequence[Tensor],
    out: Sequence[Tensor],
    backend: str,
) -> Tensor:
    _check(basis, grads, args, center, out, backend)
    return basis.row_scale.new_empty(basis.row_scale.shape)


OP = define(
    "step",
    f"({BASIS}, Tensor[] grads, Tensor[] center, Tensor(a!)[] out, Tensor(b!) x, "
    "Tensor(c!)[] state, str rule, float[] options, int count, str backend) -> Tensor",
    _run,
    _fake,
    _with_args,
)
