"""DGCSGD: with the momentum of the gradient applied before it, it is torch's SGD with momentum and weight decay. OneBitAdam without a hook."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch

import thinwire
from thinwire.optim import DGCSGD, OneBitAdam
from thinwire.pairing import paired_config
from thinwire.variance import VarianceWatch


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_sgd(nesterov: bool, weight_decay: float) -> None:
    m, steps = 0.9, 200
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(40, dtype=torch.float64)) for _ in range(2))
    mine = DGCSGD([ours], 0.05, m, weight_decay, nesterov)
    sgd = torch.optim.SGD([theirs], 0.05, m, weight_decay=weight_decay, nesterov=nesterov)
    u = torch.zeros(40, dtype=torch.float64)
    for _ in range(steps):
        g = torch.randn(40, dtype=torch.float64)
        u = m * u + g
        ours.grad, theirs.grad = g + m * u if nesterov else u.clone(), g.clone()
        mine.step(), sgd.step()
    # fp64: some ten roundings a step, which momentum amplifies by at most 1/(1 − m).
    torch.testing.assert_close(ours, theirs, rtol=10 * steps * 10 * 2.0**-53, atol=1e-12)
    assert not torch.allclose(ours, torch.ones(40, dtype=torch.float64))


def test_only_the_weight_decay_has_a_buffer() -> None:
    decayed, free, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = DGCSGD([{"params": [decayed], "weight_decay": 0.1}, {"params": [free, unused]}], lr=0.1)
    decayed.grad = free.grad = torch.ones(3)
    optimizer.step()
    assert set(optimizer.state) == {decayed} and set(optimizer.state[decayed]) == {"decay_momentum"}
    assert torch.equal(unused, torch.ones(3))
    again = DGCSGD([{"params": [decayed], "weight_decay": 0.1}, {"params": [free, unused]}], lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[decayed]["decay_momentum"], optimizer.state[decayed]["decay_momentum"])


def test_closure_and_sparse_gradients() -> None:
    p = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = DGCSGD([p], lr=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 8.0 and torch.equal(p, torch.full((4, 2), 0.5))
    p.grad = torch.eye(4, 2).to_sparse()
    optimizer.step()
    assert torch.equal(p, torch.full((4, 2), 0.5) - 0.5 * torch.eye(4, 2))
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize("config", ["codec=none", "codec=topk:density=0.1 feedback=ef14", "codec=topk:density=0.1 feedback=none"])
def test_without_dgc_there_is_no_momentum(config: str) -> None:
    parsed, parameters = thinwire.Config.parse(config), [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(thinwire.errors.ArgumentError, match="no momentum") as caught:
        paired_config(parsed, DGCSGD(parameters, 0.1))
    assert f"feedback={parsed.feedback}" in str(caught.value)
    paired_config(parsed, torch.optim.SGD(parameters, 0.1, momentum=0.9))
    paired_config(thinwire.Config.parse("dgc"), DGCSGD(parameters, 0.1))


def test_which_sgd_goes_with_dgc() -> None:
    """A subclass does what SGD does as long as step() is SGD's, whether or not a profiler's hook has been put around it."""
    dgc, parameters = thinwire.Config.parse("dgc"), [torch.nn.Parameter(torch.ones(2))]
    named = type("Named", (torch.optim.SGD,), {})
    other = type("Other", (torch.optim.SGD,), {"step": lambda self, closure=None: None})
    for optimizer in (named(parameters, 0.1), torch.optim.SGD(parameters, 0.1), named(parameters, 0.1)):
        assert paired_config(dgc, optimizer) == dgc
    for optimizer, word in ((other(parameters, 0.1), "not Other"), (named(parameters, 0.1, momentum=0.9), "second time")):
        with pytest.raises(thinwire.errors.ArgumentError, match=word):
            paired_config(dgc, optimizer)


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1}, {"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1}, {"momentum": 0, "nesterov": True}, {"lr": float("nan")}],
)
def test_refuses_values_that_mean_nothing(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="DGCSGD"):
        DGCSGD([torch.nn.Parameter(torch.ones(2))], **{"lr": 0.1, **wrong})


def stepped(steps: int = 3, **keys: Any) -> tuple[torch.nn.Parameter, OneBitAdam]:
    p = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = OneBitAdam([p], **keys)
    for step in range(steps):
        p.grad = torch.full((4, 3), float(step + 1))
        optimizer.step()
    return p, optimizer


def test_step_hooks_of_onebit_adam_run_once_a_step() -> None:
    """torch wraps the step of every class of which there was an optimizer, AdamW's among them, which OneBitAdam calls."""
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    p, optimizer = stepped()
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    for _ in range(2):
        p.grad = torch.ones(4, 3)
        optimizer.step()
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize("name", ["amsgrad", "maximize", "capturable", "differentiable", "fused"])
def test_onebit_adam_refuses_what_it_would_ignore(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    for make in (lambda: OneBitAdam([p], **{name: True}), lambda: OneBitAdam([{"params": [p], name: True}])):
        with pytest.raises(thinwire.errors.ArgumentError, match=f"{name}=True is not supported: "):
            make()
    OneBitAdam([p], **{name: False}, foreach=False)
    saved = OneBitAdam([p]).state_dict()
    saved["param_groups"][0][name] = True
    with pytest.raises(thinwire.errors.ArgumentError, match=name):
        OneBitAdam([p]).load_state_dict(saved)
    trained, optimizer = stepped()
    optimizer.param_groups[0][name] = True  # in the midst of a training
    before = trained.detach().clone()
    with pytest.raises(thinwire.errors.ArgumentError, match=f"{name}=True is not supported: "):
        optimizer.step()
    assert torch.equal(before, trained)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nesterov'"):
        OneBitAdam([p], nesterov=True)


@pytest.mark.parametrize(
    ("betas", "words"),
    [((0.9, 1.0), "beta2=1.0 must be in"), ((1.5, 0.9), "beta1=1.5 must be in"), ((-0.1, 0.9), "beta1=-0.1"), ((0.9, float("nan")), "beta2=nan"), (0.9, "betas=0.9 must be two"), (("a", "b"), "betas=('a', 'b') must be two numbers"), (("0.9", 0.9), "betas=('0.9', 0.9) must be two numbers"), ((0.9, None), "betas=(0.9, None) must be two numbers")],
)
def test_onebit_adam_checks_the_betas_of_every_group(betas: Any, words: str) -> None:
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    saved = OneBitAdam([p]).state_dict()
    saved["param_groups"][0]["betas"] = betas
    for make in (
        lambda: OneBitAdam([p], betas=betas),
        lambda: OneBitAdam([{"params": [p], "betas": betas}, {"params": [q]}]),
        lambda: OneBitAdam([p]).add_param_group({"params": [q], "betas": betas}),
        lambda: OneBitAdam([p]).load_state_dict(saved),
    ):
        with pytest.raises(thinwire.errors.ArgumentError, match=re.escape(words)):
            make()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_onebit_adam_goes_on(copied: Any) -> None:
    _, optimizer = stepped(betas=(0.8, 0.9), floor=0.2)
    other = copied(optimizer)
    assert (other.floor, other.freeze, other.frozen) == (0.2, None, False)
    for one in (optimizer, other):
        (p,) = one.param_groups[0]["params"]
        p.grad = torch.full((4, 3), 0.5)
        one.step()
    assert torch.equal(optimizer.param_groups[0]["params"][0], other.param_groups[0]["params"][0])


@pytest.mark.parametrize(
    "freeze",
    [3, None, {}, {"frozen": 1, "seen": None}, {"frozen": {}}, {"frozen": {}, "seen": 5}, {"frozen": {}, "seen": (1.5, 1, [])}, {"frozen": {}, "seen": (1, 1, ["x"])}, {"frozen": {}, "seen": None, "rates": 1}, {"frozen": {"rates": ["x"]}, "seen": None}, {"frozen": {}, "seen": None, "since_rise": -1}],
)
def test_a_state_with_a_wrong_freeze_changes_nothing(freeze: Any) -> None:
    p, optimizer = stepped()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(thinwire.errors.ArgumentError, match="load_state_dict: freeze must be"):
        optimizer.load_state_dict({**stepped(1)[1].state_dict(), "freeze": freeze})
    assert torch.equal(optimizer.state[p]["exp_avg"], before["state"][0]["exp_avg"])


def test_a_variance_is_stable_when_it_neither_grows_nor_shrinks() -> None:
    watch = VarianceWatch(every=10, not_before=0)
    assert not watch.look(10, 10, [1.0, 2.0]) and watch.words == ""
    assert watch.look(20, 20, [1.03, 1.97])
    assert not watch.look(30, 30, [1.03, 2.2])
    assert watch.look(50, 50, [1.03, 2.2]), "nothing changed over 20 steps"
    assert "over 20 steps" in watch.words


def test_a_variance_of_zero_is_not_stable() -> None:
    watch = VarianceWatch(every=10, not_before=0)
    for step in (10, 20, 30):
        assert not watch.look(step, step, [0.0] * 2 + [1.0] * 8)
    assert watch.words.endswith("in 8 of 10 tensors by at most 4 %; 2 have had no gradient yet")


@pytest.mark.parametrize(
    ("each", "skipped", "looks"),
    [
        (1, (), [20, 40, 60, 80]),
        (1, (20, 40), [21, 41, 60, 80]),  # by a grad scaler: the next step looks
        (2, (), [20, 60, 100, 140, 180]),  # 20 of the optimizer's steps are 40 synchronised ones
        (3, (), [21, 81, 141, 201, 261]),  # none of whose multiples of 20 but every third is one of the optimizer's
        (7, (), [21, 126, 245, 364]),
    ],
)
def test_looks_fall_on_steps_of_the_optimizer(each: int, skipped: tuple[int, ...], looks: list[int]) -> None:
    watch, taken, looked = VarianceWatch(every=20, not_before=0), 0, []
    for step in range(each, looks[-1] + 1, each):
        if step in skipped:
            continue
        taken += 1
        if watch.due(step, taken):
            looked.append(step)
            watch.look(step, taken, [1.0])
    assert looked == looks


def test_a_variance_that_does_not_settle_is_told_of_once() -> None:
    watch = VarianceWatch(every=10, not_before=40)
    assert [step for step in range(0, 300, 10) if watch.impatient(step, step)] == [90]
    watch = VarianceWatch(every=10, not_before=0)
    assert [step for step in range(0, 600, 30) if watch.impatient(step, step // 3)] == [210], "by the optimizer's steps"
