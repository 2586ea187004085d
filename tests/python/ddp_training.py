"""What the DDP features share: a model, its local gradients, and training steps that are compared with the oracle.

Every rank computes its local gradients a second time on a plain copy of the model, the oracle turns all ranks' gradients into the mean, and
DDP's gradients must equal it to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from oracle import Oracle
from torch import nn

FEATURES: dict[str, Callable[[int, int], None]] = {}


def feature(check: Callable[[int, int], None]) -> Callable[[int, int], None]:
    FEATURES[check.__name__] = check
    return check


def mlp(seed: int = 1, width: int = 24, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(10, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
    ).to(dtype)


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1000 * step + rank)
    return torch.randn(8, 10).to(dtype)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def local_grads(model: nn.Module, losses: list[Callable[[nn.Module], torch.Tensor]]) -> dict[str, torch.Tensor]:
    """This rank's own gradients, summed over micro-batches, of a plain copy of the model."""
    plain = copy.deepcopy(model)
    for p in plain.parameters():
        p.grad = None
    for loss in losses:
        loss(plain).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in plain.named_parameters()}


def everybody(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    out = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, value, group=group)
    return out


def same(grads: dict[str, torch.Tensor], model: nn.Module, where: str) -> None:
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{where}: {name} has no gradient"
        if not torch.equal(p.grad, grads[name]):
            worst = (p.grad.float() - grads[name].float()).abs().max().item()
            raise AssertionError(
                f"{where}: {name} differs from the oracle by up to {worst}, largest gradient {grads[name].float().abs().max().item()}"
            )


def replicas_equal(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    mine = b"".join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in model.parameters())
    assert len(set(everybody(mine, group))) == 1, "replicas differ"


def train(
    ddp: nn.Module,
    oracle: Oracle,
    steps: range,
    *,
    losses: Callable[[int], list[Callable[[nn.Module], torch.Tensor]]] | None = None,
    group: dist.ProcessGroup | None = None,
    lr: float = 0.1,
    forward: nn.Module | None = None,
) -> None:
    """SGD steps of ddp, each compared with the oracle. `forward`: what is called in ddp's place (a compiled module)."""
    rank = dist.get_rank()
    module = ddp.module
    dtype = next(module.parameters()).dtype
    for step in steps:
        todo = losses(step) if losses else [lambda m: loss_of(m, batch(rank, step, dtype))]
        expected = oracle.step(everybody(local_grads(module, todo), group))
        for p in module.parameters():
            p.grad = None
        for micro, loss in enumerate(todo):
            if micro + 1 < len(todo):
                with ddp.no_sync():
                    loss(ddp if forward is None else forward).backward()
            else:
                loss(ddp if forward is None else forward).backward()
        same(expected, module, f"step {step}")
        with torch.no_grad():
            for p in module.parameters():
                p.sub_(p.grad, alpha=lr)
    replicas_equal(module, group)
