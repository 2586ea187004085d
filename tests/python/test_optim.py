"""DGCSGD: with the momentum of the gradient applied before it, it is torch's SGD with momentum and weight decay."""

from __future__ import annotations

import pytest
import torch

import thinwire
from thinwire.hook import _check_optimizer
from thinwire.optim import DGCSGD


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
        _check_optimizer(parsed, DGCSGD(parameters, 0.1))
    assert f"feedback={parsed.feedback}" in str(caught.value)
    _check_optimizer(parsed, torch.optim.SGD(parameters, 0.1, momentum=0.9))
    _check_optimizer(thinwire.Config.parse("dgc"), DGCSGD(parameters, 0.1))


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1}, {"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1}, {"momentum": 0, "nesterov": True}, {"lr": float("nan")}],
)
def test_refuses_values_that_mean_nothing(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="DGCSGD"):
        DGCSGD([torch.nn.Parameter(torch.ones(2))], **{"lr": 0.1, **wrong})
