"""What a trainer does to gradients between backward and step has the effect that it has elsewhere:
whoever clears, accumulates, clips, scales, or brings a closure; on one and on two ranks. And writes
of others to the weights are noticed.
"""

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
import twa
from bounds import gamma
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from twa.io.errors import TwaError

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3), nn.LayerNorm(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("contract"), make()
    for k in range(5):
        torch.manual_seed(k)
        for p in model.parameters():
            p.data += 0.2 * torch.randn(p.shape)
        save_file(model.state_dict(), folder / f"step_{k}.safetensors")
    return folder


def subspace_of(folder, bits=8):
    return twa.Subspace.from_candidates(make(), twa.Candidates(folder), bits=bits)


def loss(model, k, rank=0):
    g = torch.Generator().manual_seed(10 * k + rank)
    x, y = torch.randn(8, 6, generator=g), torch.randn(8, 3, generator=g)
    return 30 * (model(x) - y).square().mean()


def by_model(optimizer):
    optimizer.subspace.model.zero_grad()


def by_model_in_place(optimizer):
    optimizer.subspace.model.zero_grad(set_to_none=False)


def by_optimizer(optimizer):
    optimizer.zero_grad()


def by_optimizer_in_place(optimizer):
    optimizer.zero_grad(set_to_none=False)


def by_group(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


CLEARERS = (by_model, by_model_in_place, by_optimizer, by_optimizer_in_place, by_group)


def clip_model(optimizer):
    return torch.nn.utils.clip_grad_norm_(optimizer.subspace.model.parameters(), 2.0)


def clip_group(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.clip_grad_norm_(params, 2.0)


def clip_values(optimizer):
    torch.nn.utils.clip_grad_value_(optimizer.param_groups[0]["params"], 0.1)


def reference(folder, rule, accumulate=1, clip=None, skip=(), **options):
    """The coefficients after each step, by a loop around torch's own optimizer."""
    subspace = subspace_of(folder)
    model, x = subspace.model, subspace.coefficients
    inner, found = rule([x], **options), []
    for step in range(STEPS):
        for k in range(accumulate):
            loss(model, step * accumulate + k).backward()
        if clip:
            parameters = [p for p in model.parameters() if p.grad is not None]
            clip(parameters)
        if step not in skip:
            x.grad = subspace.project_gradients()
            inner.step()
            subspace.write_weights()
        model.zero_grad()
        found.append(x.detach().clone())
    return torch.stack(found)


#: with so large an eps a step is as long as its gradient is large: with the usual ones gradients
#: that are little but rounding make steps of full length, another one on another machine
RULES = {
    "adamw": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1, "eps": 10.0}),
    "sgd": (torch.optim.SGD, {"lr": 0.002, "momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.05, "eps": 10.0}),  # which is not fused
}
WEIGHTS, CANCELLED = 209, 20  # of the model; sum |p g| over the largest |sum p g|, at most


def norm(parameters):
    torch.nn.utils.clip_grad_norm_(parameters, 2.0)


def trained(folder, rule, clear, low_memory=False, accumulate=1, clip=None, **options):
    optimizer = twa.SubspaceOptimizer(subspace_of(folder), rule, low_memory=low_memory, **options)
    found = []
    for step in range(STEPS):
        for k in range(accumulate):
            loss(optimizer.subspace.model, step * accumulate + k).backward()
        if clip:
            clip(optimizer)
        optimizer.step()
        clear(optimizer)
        found.append(optimizer.subspace.coefficients.detach().clone())
    return torch.stack(found)


def assert_close(found, expected):
    """Up to float32 rounding of sums over all weights, of coefficients that have moved."""
    size = expected.abs().max()
    assert expected[-1].abs().max() > 1e-3
    assert (found - expected).abs().max() <= CANCELLED * gamma(WEIGHTS) * size


# Who clears -------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("clear", CLEARERS)
def test_whoever_clears_gradients(folder, clear, low_memory, accumulate):
    for rule, options in RULES.values():
        expected = reference(folder, rule, accumulate, **options)
        assert_close(trained(folder, rule, clear, low_memory, accumulate, **options), expected)


def test_low_memory_needs_nobody_to_clear(folder):
    """A step uses gradients up: those of the next one start from zero."""
    rule, options = RULES["adamw"]
    expected = reference(folder, rule, **options)
    assert_close(trained(folder, rule, lambda _: None, True, **options), expected)


def test_gradients_that_no_step_took_are_added(folder):
    """Without low_memory as with it: what was not cleared counts."""
    subspace = subspace_of(folder)
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, low_memory=True, lr=0.0)
    loss(subspace.model, 0).backward()
    first = subspace.coefficients.grad.clone()
    loss(subspace.model, 0).backward()
    torch.testing.assert_close(subspace.coefficients.grad, 2 * first)
    optimizer.step()
    loss(subspace.model, 0).backward()
    torch.testing.assert_close(subspace.coefficients.grad, first)


# Who clips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("clip", [clip_model, clip_group])
def test_whoever_clips_gradients(folder, rule, clip):
    rule, options = RULES[rule]
    expected = reference(folder, rule, clip=norm, **options)
    assert_close(trained(folder, rule, by_model, clip=clip, **options), expected)
    if rule is torch.optim.SGD:  # it sees the size of gradients
        assert not torch.allclose(expected, reference(folder, rule, **options), rtol=1e-2)


def test_clipping_by_value(folder):
    rule, options = RULES["sgd"]
    expected = reference(
        folder, rule, clip=lambda ps: torch.nn.utils.clip_grad_value_(ps, 0.1), **options
    )
    assert_close(trained(folder, rule, by_model, clip=clip_values, **options), expected)


def test_low_memory_clips_the_gradient_of_the_coefficients(folder):
    rule, options = RULES["sgd"]
    optimizer = twa.SubspaceOptimizer(subspace_of(folder), rule, low_memory=True, **options)
    loss(optimizer.subspace.model, 0).backward()
    assert float(clip_group(optimizer)) > 2.0
    assert optimizer.subspace.coefficients.grad.norm() == pytest.approx(2.0, rel=1e-5)


# Closures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_closure_is_called_once_and_has_the_same_effect(folder, rule, low_memory, monkeypatch):
    rule, options = RULES[rule]
    optimizer = twa.SubspaceOptimizer(subspace_of(folder), rule, low_memory=low_memory, **options)
    subspace, calls, found, fused = optimizer.subspace, [], [], []
    step = subspace.step
    monkeypatch.setattr(subspace, "step", lambda *a: (fused.append(1), step(*a)))

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        value = loss(subspace.model, len(calls))
        value.backward()
        calls.append(value.item())
        return value

    for _ in range(STEPS):
        value = optimizer.step(closure)
        assert value.item() == calls[-1]
        found.append(subspace.coefficients.detach().clone())
    assert len(calls) == STEPS
    assert len(fused) == (0 if low_memory or rule is torch.optim.RMSprop else STEPS)
    assert_close(torch.stack(found), reference(folder, rule, **options))


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("clear", [by_model, by_optimizer])
def test_a_closure_that_is_called_many_times(folder, clear, low_memory):
    """L-BFGS; gradients of one evaluation do not add to those of the next, whoever clears."""
    options = {"lr": 0.5, "max_iter": 5, "line_search_fn": "strong_wolfe"}
    subspace = subspace_of(folder)
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.LBFGS, low_memory=low_memory, **options)

    def closure():
        clear(optimizer)
        value = loss(subspace.model, 0)
        value.backward()
        return value

    theirs = subspace_of(folder)
    inner = torch.optim.LBFGS([theirs.coefficients], **options)

    def by_hand():
        theirs.write_weights()
        theirs.model.zero_grad()
        with torch.enable_grad():
            value = loss(theirs.model, 0)
            value.backward()
        theirs.coefficients.grad = theirs.project_gradients()
        return value

    for _ in range(3):
        optimizer.step(closure)
        inner.step(by_hand)
    assert_close(subspace.coefficients.detach()[None], theirs.coefficients.detach()[None])


# GradScaler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("clear", [by_model, by_optimizer])
def test_grad_scaler(folder, clear, low_memory, unscale):
    """A step with an Inf is skipped, and leaves nothing behind, also where only the model's
    gradients are cleared.
    """
    for rule, options in RULES.values():
        optimizer = twa.SubspaceOptimizer(
            subspace_of(folder), rule, low_memory=low_memory, **options
        )
        scaler, found = torch.amp.GradScaler("cpu", init_scale=1024.0), []
        for step in range(STEPS):
            value = loss(optimizer.subspace.model, step)
            scaler.scale(value * float("inf") if step == 2 else value).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            clear(optimizer)
            found.append(optimizer.subspace.coefficients.detach().clone())
        assert scaler.get_scale() == 512.0
        assert_close(torch.stack(found), reference(folder, rule, skip=(2,), **options))


# State ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_state_through_torch_distributed_checkpoint(folder, tmp_path, rule):
    rule, options = RULES[rule]
    optimizer = twa.SubspaceOptimizer(subspace_of(folder), rule, **options)

    def steps(optimizer, numbers):
        for k in numbers:
            loss(optimizer.subspace.model, k).backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.subspace.coefficients.detach().clone()

    steps(optimizer, range(3))
    model, state = get_state_dict(optimizer.subspace.model, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=tmp_path / "dcp")
    expected = steps(optimizer, range(3, 6))
    again = twa.SubspaceOptimizer(subspace_of(folder), rule, **options)
    model, state = get_state_dict(again.subspace.model, again)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=tmp_path / "dcp")
    set_state_dict(again.subspace.model, again, model_state_dict=model, optim_state_dict=state)
    assert torch.equal(steps(again, range(3, 6)), expected)


@pytest.mark.parametrize("low_memory", [False, True])
def test_state_of_one_mode_is_that_of_the_other(folder, low_memory):
    rule, options = RULES["adamw"]
    optimizer = twa.SubspaceOptimizer(subspace_of(folder), rule, low_memory=low_memory, **options)
    loss(optimizer.subspace.model, 0).backward()
    optimizer.step()
    other = twa.SubspaceOptimizer(subspace_of(folder), rule, low_memory=not low_memory, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o in (optimizer, other):
        o.zero_grad()
        loss(o.subspace.model, 1).backward()
        o.step()
    torch.testing.assert_close(other.subspace.coefficients, optimizer.subspace.coefficients)


def test_what_is_no_state_is_refused(folder):
    optimizer = twa.SubspaceOptimizer(subspace_of(folder), lr=0.1)
    other = torch.optim.AdamW(make().parameters())
    for state in ({}, {"state": {}}, other.state_dict(), {"param_groups": [], "state": {}}):
        with pytest.raises(TwaError, match="expected the state of a SubspaceOptimizer"):
            optimizer.load_state_dict(state)
    state = optimizer.state_dict()
    for bits in (4, 8):
        theirs = twa.Subspace.from_candidates(make(), twa.Candidates(folder), bits=bits)
        mine = twa.SubspaceOptimizer(theirs, lr=0.1)
        if bits == 8:
            mine.load_state_dict(state)
        else:
            with pytest.raises(TwaError, match="another subspace: bits: expected 4, found 8"):
                mine.load_state_dict(state)


# Writes of others -------------------------------------------------------------------------------


def step(optimizer, k=0):
    loss(optimizer.subspace.model, k).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_step_says_that_others_have_written(folder, low_memory):
    optimizer = twa.SubspaceOptimizer(subspace_of(folder), low_memory=low_memory, lr=0.1)
    model = optimizer.subspace.model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer)
        before = {k: t.clone() for k, t in model.state_dict().items()}
        model.load_state_dict(make().state_dict())  # an evaluation of other weights
        model.load_state_dict(before)
        step(optimizer)
    with torch.no_grad():
        model[2].bias.add_(0.01)
    with pytest.warns(RuntimeWarning, match=r"'2.bias' was changed by something else"):
        step(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer)


@pytest.mark.parametrize("sharding", ["auto", "single"])
@pytest.mark.parametrize("bits", [4, 32])
def test_weights_of_one_are_not_saved_with_the_coefficients_of_another(
    folder, tmp_path, bits, sharding
):
    subspace = twa.Subspace.from_candidates(
        make(), twa.Candidates(folder), bits=bits, sharding=sharding
    )
    optimizer = twa.SubspaceOptimizer(subspace, lr=0.1)
    step(optimizer)
    subspace.save(tmp_path / "mine")
    expected = load_file(tmp_path / "mine" / "averaged.safetensors")
    subspace.model[0].weight.data.copy_(make()[0].weight)  # which no counter of PyTorch's sees
    with pytest.raises(TwaError, match=r"'0.weight' is not at the coefficients.*write_weights"):
        subspace.save(tmp_path / "other")
    assert not (tmp_path / "other" / "averaged.safetensors").exists()
    subspace.write_weights()
    subspace.save(tmp_path / "other")
    found = load_file(tmp_path / "other" / "averaged.safetensors")
    assert all(torch.equal(found[key], t) for key, t in expected.items())


def test_weights_rounded_as_they_are_saved_count_as_the_same(folder, tmp_path):
    halves = tmp_path / "bf16"
    halves.mkdir()
    for path in sorted(folder.glob("*.safetensors")):
        state = {k: t.bfloat16() for k, t in load_file(path).items()}
        save_file(state, halves / path.name)
    subspace = twa.Subspace.from_candidates(make(), twa.Candidates(halves))
    with torch.no_grad():
        for p in subspace.model.parameters():
            p.copy_(p.bfloat16())
    subspace.save(tmp_path / "out")
    with torch.no_grad():
        subspace.model[0].bias[0] += 0.1
    with pytest.raises(TwaError, match=r"'0.bias' is not at the coefficients"):
        subspace.save(tmp_path / "again")


# Two ranks --------------------------------------------------------------------------------------


def sharded(model, group):
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=DeviceMesh.from_group(group, "cpu"))
    return model


def two_rank_steps(group, folder, clear, low_memory, shard, clip, amp):
    """Coefficients after each step of two ranks with gradients of their own data."""
    torch.manual_seed(0)
    model = make()
    if shard:
        sharded(model, group)
    bits = 32 if shard else 8  # shards are quantised in tiles of their own
    subspace = twa.Subspace.from_candidates(model, twa.Candidates(folder), bits=bits, group=group)
    optimizer = twa.SubspaceOptimizer(
        subspace, torch.optim.SGD, low_memory=low_memory, lr=0.002, momentum=0.9
    )
    rank, found = torch.distributed.get_rank(group), []
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=amp)
    for k in range(STEPS):
        value = loss(model, k, rank)
        # on one rank alone; sharded gradients have no rank of their own
        is_bad = amp and k == 2 and rank == 1
        scaler.scale(value * float("inf") if is_bad else value).backward()
        if clip:
            scaler.unscale_(optimizer)
            clip_group(optimizer)
        scaler.step(optimizer)
        scaler.update()
        clear(optimizer)
        found.append(subspace.coefficients.detach().clone())
    return torch.stack(found)


def mean_of_two(folder, bits=8, skip=()):
    """What one process trains on the data of both."""
    subspace = subspace_of(folder, bits)
    inner, found = torch.optim.SGD([subspace.coefficients], lr=0.002, momentum=0.9), []
    for k in range(STEPS):
        sum(loss(subspace.model, k, rank) / 2 for rank in range(2)).backward()
        if k not in skip:
            subspace.coefficients.grad = subspace.project_gradients()
            inner.step()
            subspace.write_weights()
        subspace.model.zero_grad()
        found.append(subspace.coefficients.detach().clone())
    return torch.stack(found)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("clear", [by_model, by_optimizer])
def test_two_ranks_whoever_clears(folder, ranks, clear, low_memory, shard):
    both = ranks.run(2, two_rank_steps, folder, clear, low_memory, shard, False, False)
    assert torch.equal(both[0], both[1])
    assert_close(both[0], mean_of_two(folder, 32 if shard else 8))


@pytest.mark.parametrize("low_memory", [False, True])
def test_two_ranks_skip_a_step_together(folder, ranks, low_memory):
    """An Inf on one of them; the scales then differ, and the steps do not."""
    both = ranks.run(2, two_rank_steps, folder, by_model, low_memory, False, False, True)
    assert torch.equal(both[0], both[1])
    assert_close(both[0], mean_of_two(folder, skip=(2,)))


def get_and_set(group, folder, target):
    model = sharded(make(), group)
    subspace = twa.Subspace.from_candidates(model, twa.Candidates(folder), bits=8, group=group)
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.05)
    for k in range(2):
        step(optimizer, k)
    before = subspace.coefficients.detach().clone()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=target, process_group=group)
    step(optimizer, 2)
    expected = subspace.coefficients.detach().clone()
    step(optimizer, 3)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=target, process_group=group)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    assert torch.equal(subspace.coefficients, before)
    step(optimizer, 2)
    return torch.equal(subspace.coefficients, expected)


def test_two_ranks_state_through_torch_distributed_checkpoint(folder, ranks, tmp_path):
    assert ranks.run(2, get_and_set, folder, tmp_path / "dcp") == [True, True]
