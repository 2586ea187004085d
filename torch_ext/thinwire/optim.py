"""SGD for gradients whose momentum the hook applies; 1-bit Adam's optimizer is in onebit_adam.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from .onebit_adam import OneBitAdam

__all__ = ["DGCSGD", "OneBitAdam"]


class DGCSGD(Optimizer):
    """SGD for gradients whose momentum the hook has applied already (``feedback=dgc``).

    Its only buffer is the momentum of the weight decay, b, which needs no communication because the weights are equal on all ranks:

        b ← momentum·b + weight_decay·w;   d = b  (Nesterov: weight_decay·w + momentum·b);   w ← w − lr·(d + gradient)

    Since momentum is linear, this equals torch.optim.SGD(momentum, weight_decay) exactly when the hook sends everything (density 1, mask
    0). Give it the hook's
    own ``momentum`` and ``nesterov``; ``attach`` refuses others where they would matter. A parameter without gradient is left alone, its b
    too, as in torch's SGD.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        if not float(group["lr"]) >= 0:
            raise ValueError(f"DGCSGD: lr={group['lr']} must be 0 or more")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"DGCSGD: momentum={group['momentum']} must be in [0, 1)")
        if not group["weight_decay"] >= 0:
            raise ValueError(f"DGCSGD: weight_decay={group['weight_decay']} must be 0 or more")
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("DGCSGD: nesterov=True needs a momentum above 0")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; @returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum, decay, nesterov = group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse and decay != 0:
                    raise RuntimeError("DGCSGD: weight decay of a parameter with sparse gradients; give it a group with weight_decay=0")
                if decay == 0:
                    p.add_(p.grad, alpha=-lr)
                    continue
                state = self.state[p]
                if "decay_momentum" not in state:
                    state["decay_momentum"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                b = state["decay_momentum"]
                b.mul_(momentum).add_(p, alpha=decay)
                d = p.mul(decay).add_(b, alpha=momentum) if nesterov else b
                p.sub_(d.add(p.grad), alpha=lr)
        return loss
