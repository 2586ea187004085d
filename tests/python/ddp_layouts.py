"""Features that concern memory formats: parameters that are not contiguous, or become so, train and are saved as the same contiguous ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ddp_training import everybody, feature, replicas_equal
from onebit_training import everywhere
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire

EXACT = "min_numel=1 exchange=gather timeout=60"  # without ties the entries are the same, however they lie, and ranks are added in order


class Weights(nn.Module):
    """Gradients are the inputs, to the bit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Parameter(torch.randn(16, 8, 3, 3))
        self.pointwise = nn.Parameter(torch.randn(16, 8, 1, 1))
        self.table = nn.Parameter(torch.randn(32, 24))
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((p * inputs[name]).sum() for name, p in self.named_parameters())


def inputs_of(model: nn.Module, rank: int, step: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(100 * step + rank)
    return {name: torch.randn(p.shape) for name, p in model.named_parameters()}


def convert(model: nn.Module) -> None:
    """What model.to(memory_format=torch.channels_last) does, and a transposed weight."""
    for p in (model.conv, model.pointwise):
        p.data = p.data.contiguous(memory_format=torch.channels_last)
    model.table.data = model.table.data.t().contiguous().t()
    assert not (model.conv.is_contiguous() or model.table.is_contiguous())


def restore(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.contiguous()


Plan = dict[int, Callable[[nn.Module], None]]  # before which step what is done to the model; -1: before DDP


def played(rank: int, config: str, steps: range, plan: Plan, start: Any = None, *, by_hook: bool = False, **ddp_keys: Any) -> tuple[list[dict[str, torch.Tensor]], Any]:
    """The means of every step, and the state at the end."""
    model = Weights()
    plan.get(-1, lambda _: None)(model)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.004, **ddp_keys)
    if by_hook:
        state = thinwire.HookState(config, named_parameters=model.named_parameters())
        ddp.register_comm_hook(state, thinwire.hook)
    else:
        state = thinwire.attach(ddp, config)
    if start is not None:
        state.load_state_dict(start)
    means = []
    for step in steps:
        plan.get(step, lambda _: None)(model)
        for p in model.parameters():
            p.grad = None
        ddp(inputs_of(model, rank, step)).backward()
        means.append({name: p.grad.detach().clone().contiguous() for name, p in model.named_parameters()})
    replicas_equal(model)
    out = state.state_dict()
    state.close()
    return means, out


def same_run(a: tuple[list[dict[str, torch.Tensor]], Any], b: tuple[list[dict[str, torch.Tensor]], Any], what: str) -> None:
    assert len(a[0]) == len(b[0])
    for step, (mine, other) in enumerate(zip(a[0], b[0], strict=True)):
        for name in mine:
            assert torch.equal(mine[name], other[name]), f"{what}: mean of {name}, step {step}"
    for name, arrays in a[1]["parameters"].items():
        for key, values in arrays.items():
            assert torch.equal(values, b[1]["parameters"][name][key]), f"{what}: {name}.{key}"


@feature
def memory_formats_change_nothing(rank: int, world: int) -> None:
    for config in (f"codec=topk:density=0.1,select=exact feedback=ef14 {EXACT}", f"codec=topk:density=0.1,select=exact feedback=econtrol:init=zero {EXACT}",
                   f"dgc:density=0.05,select=exact {EXACT}"):  # fmt: skip
        plain = played(rank, config, range(6), {})
        assert "layouts" not in plain[1]
        for what, plan, keys in (
            ("before DDP", {-1: convert}, {}),
            ("before DDP, views", {-1: convert}, {"gradient_as_bucket_view": True}),
            ("before DDP, by torch's own registration", {-1: convert}, {"by_hook": True}),
            ("after attach, views", {0: convert}, {"gradient_as_bucket_view": True}),
            ("in the second step", {1: convert}, {}),
            ("in the middle, views", {3: convert}, {"gradient_as_bucket_view": True}),
            ("there and back", {-1: convert, 2: restore, 4: convert}, {"gradient_as_bucket_view": True}),
            ("back before the first step", {-1: convert, 0: restore}, {"gradient_as_bucket_view": True}),
        ):
            other = played(rank, config, range(6), plan, **keys)
            same_run(plain, other, f"{config}, {what}")
            if "before DDP" in what:
                assert other[1]["layouts"] == {"conv": [0, 2, 3, 1], "table": [1, 0]}, other[1].get("layouts")


@feature
def formats_that_ddp_would_misread_are_refused(rank: int, world: int) -> None:
    """Without bucket views DDP reads a hook's result by the parameter's strides of now, whatever those of its buckets are."""
    config = f"codec=topk:density=0.1,select=exact feedback=ef14 {EXACT}"
    for plan in ({0: convert}, {3: convert}, {-1: convert, 0: restore}):
        everywhere("memory format after DDP had made its buckets", lambda plan=plan: played(rank, config, range(5), plan))


@feature
def checkpoints_move_between_memory_formats(rank: int, world: int) -> None:
    config = f"codec=topk:density=0.1,select=exact feedback=econtrol:init=zero {EXACT}"
    plain = played(rank, config, range(6), {})
    for begin, rest in (({-1: convert}, {}), ({}, {-1: convert}), ({-1: convert}, {-1: convert}), ({-1: convert}, {4: restore, -1: convert})):
        first = played(rank, config, range(3), begin)
        for start in (first[1], everybody(first[1])):
            means, state = played(rank, config, range(3, 6), rest, start, gradient_as_bucket_view=True)
            same_run((plain[0][3:], plain[1]), (means, state), f"{begin} then {rest}")
    wrong = dict(first[1], layouts={"conv": [0, 1, 1, 2]})
    everywhere("layouts['conv']=[0, 1, 1, 2]", lambda: played(rank, config, range(3, 4), {}, wrong))


@feature
def onebit_adam_in_channels_last(rank: int, world: int) -> None:
    """Inputs that are off have a variance of 0, wherever their weights lie in memory: these never move after the freeze, the others do."""
    for late in (False, True):
        torch.manual_seed(1)
        model = nn.Conv2d(16, 8, 3, bias=False)
        if not late:
            model.to(memory_format=torch.channels_last)
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=late)
        optimizer = thinwire.optim.OneBitAdam(ddp.parameters(), lr=0.01)
        state = thinwire.attach(ddp, "onebit_adam:freeze=3,block=64 min_numel=1 timeout=60", optimizer)
        if late:
            model.to(memory_format=torch.channels_last)
        before: torch.Tensor | None = None
        for step in range(8):
            torch.manual_seed(10 * step + rank)
            x = torch.randn(4, 16, 6, 6)
            x[:, ::2] = 0
            optimizer.zero_grad()
            ddp(x).square().mean().backward()
            optimizer.step()
            if step == 3:
                before = model.weight.detach().clone()
        moved = model.weight.detach() != before
        assert not bool(moved[:, ::2].any()) and bool(moved[:, 1::2].all()), f"late={late}"
        momentum = state.state_dict()["parameters"]["weight"]["momentum"]
        assert not bool(momentum[:, ::2].any()) and bool((momentum[:, 1::2] != 0).all())
        replicas_equal(model)
        state.close()


@feature
def owned_parts_are_not_moved(rank: int, world: int) -> None:
    """Under two_phase owners hold back parts by their places: a state of another format is refused, with the reason."""
    config = "codec=sign:block=24 feedback=ef14 exchange=two_phase min_numel=1 timeout=20"
    whole = played(rank, config, range(6), {-1: convert})
    first = played(rank, config, range(3), {-1: convert})[1]
    means, state = played(rank, config, range(3, 6), {-1: convert}, first)
    same_run((whole[0][3:], whole[1]), (means, state), "two_phase")
    everywhere("owners hold back parts of it by their places", lambda: played(rank, config, range(3, 6), {}, first))
