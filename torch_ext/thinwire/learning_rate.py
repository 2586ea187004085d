"""lr_rescale=1: the residual keeps its worth when the optimizer's learning rate changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from .errors import ConfigError


class LearningRates:
    """Follows an optimizer's learning rates, parameter by parameter. What was not sent at a step with rate a is worth a·residual; at rate b
    it is worth the same times a/b. A rate of 0 applies nothing and is passed over."""

    def __init__(self, optimizer: torch.optim.Optimizer, named: list[tuple[str, torch.nn.Parameter]]) -> None:
        self._optimizer = optimizer
        self._names = {id(parameter): name for name, parameter in named}
        missing = set(self._names) - {id(p) for group in optimizer.param_groups for p in group["params"]}
        if missing:
            raise ConfigError(f"lr_rescale=1: the optimizer has no parameter {self._names[missing.pop()]!r}, so its learning rate is not known")
        self.last: dict[str, float] = {}

    def changed(self) -> dict[str, float]:
        """New rate by old one, of the parameters whose rate has changed since the last call."""
        ratios = {}
        for group in self._optimizer.param_groups:
            rate = float(group["lr"])
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name is None or not rate > 0:
                    continue
                before = self.last.get(name, rate)
                if before != rate:
                    ratios[name] = rate / before
                self.last[name] = rate
        return ratios


def follow(ddp: torch.nn.Module, rates: LearningRates, on_change: Callable[[Mapping[str, float]], None]) -> None:
    """Looks before each forward pass: the step before is over by then, and the next backward pass has not begun."""

    def look(*_: object) -> None:
        if ratios := rates.changed():
            on_change(ratios)

    ddp.register_forward_pre_hook(look)
