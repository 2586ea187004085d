"""Textbook DGC and EF14 on torch tensors, written from the equations alone: the oracle of everything that the engine returns.

Exact selection, fp32 values, gather: with these the engine's result is determined to the bit (fp32 operations in the order of the
equations, a rank-order sum, one
product with float(1/N)), so comparisons are for equality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


@dataclass
class Rank:
    """One rank's state."""

    u: dict[str, torch.Tensor] = field(default_factory=dict)
    v: dict[str, torch.Tensor] = field(default_factory=dict)  # DGC's v, EF14's e


@dataclass
class Oracle:
    """``kind``: dgc or ef14. A step takes every rank's local gradients (None: the rank has joined) and returns the mean that everybody
    receives."""

    world: int
    kind: str = "dgc"
    density: float = 0.1
    momentum: float = 0.5
    nesterov: bool = False
    mask: bool = True
    min_numel: int = 0
    ranks: list[Rank] = field(init=False)

    def __post_init__(self) -> None:
        self.ranks = [Rank() for _ in range(self.world)]

    @property
    def config(self) -> str:
        feedback = f"dgc:momentum={self.momentum},nesterov={int(self.nesterov)},mask={int(self.mask)}" if self.kind == "dgc" else "ef14"
        return f"codec=topk:density={self.density},select=exact feedback={feedback} exchange=gather min_numel={self.min_numel} timeout=60"

    def step(self, grads: list[dict[str, torch.Tensor] | None]) -> dict[str, torch.Tensor]:
        first = next(g for g in grads if g is not None)
        return {name: self._mean(name, [None if g is None else g[name] for g in grads]) for name in first}

    def _mean(self, name: str, grads: list[torch.Tensor | None]) -> torch.Tensor:
        like = next(g for g in grads if g is not None)
        total = torch.zeros(like.numel())
        for rank, grad in zip(self.ranks, grads):
            if grad is not None:
                total = total + self._sent(
                    rank, name, grad.detach().float().reshape(-1), like.dim() >= 2 and like.numel() >= self.min_numel
                )
        mean = total * torch.tensor(1 / self.world, dtype=torch.float32)
        return mean.reshape(like.shape).to(like.dtype)

    def _sent(self, rank: Rank, name: str, g: torch.Tensor, compressed: bool) -> torch.Tensor:
        zero = torch.zeros_like(g)
        if self.kind == "ef14":
            if not compressed:
                return g
            message = rank.v.get(name, zero) + g
        else:
            u = rank.u.get(name, zero)
            u = self.momentum * (u + g) if self.nesterov else self.momentum * u + g
            news = u + g if self.nesterov else u
            rank.u[name] = u
            if not compressed:
                return news
            message = rank.v.get(name, zero) + news
        k = max(1, math.ceil(self.density * g.numel() - 1e-9))
        order = sorted(range(g.numel()), key=lambda i: (-abs(float(message[i])), i))
        chosen = [i for i in order[:k] if float(message[i]) != 0]
        sent = torch.zeros_like(g)
        sent[chosen] = message[chosen]
        rank.v[name] = message - sent
        if self.kind == "dgc" and self.mask:
            rank.u[name] = rank.u[name].clone()
            rank.u[name][chosen] = 0
        return sent
