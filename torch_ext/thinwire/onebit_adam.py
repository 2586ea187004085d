"""Adam until its variance is frozen, then the half of 1-bit Adam that is not in the hook."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.optim import AdamW

from .errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from .hook import HookState

_NEAR = 0.04  # the variance is stable when its L1 norm changes by no more than this per 1 / (1 - beta2) steps
_MOST = 0.9  # in this share of the tensors, and in their sum
_FLOOR = 0.05  # of a tensor's mean root of the variance, below which no frozen one is
_UNUSUAL = 20.0  # |update / lr|; Adam's is about 1
_LOOK_EVERY = 16  # steps between looks at the largest update


class OneBitAdam(AdamW):
    """AdamW (Adam where ``weight_decay`` is 0) until the variance is frozen; afterwards 1-bit Adam with the momentum that the hook averages.

    Before the freeze every step is torch's AdamW on the mean gradient, to the bit. At the freeze the momentum is handed to the hook, and from
    the next backward pass on ``p.grad`` of the tensors that it compresses holds the averaged momentum m:

        w ← w − lr·(weight_decay·w + m / (1 − beta1^t) / (sqrt(v / (1 − beta2^T)) + eps))

    with v and its correction frozen at T. Coordinates with v = 0 are masked: 1 bit cannot send their 0, so the hook leaves them out and m is
    0 there. Those whose gradients were merely rare would get updates of thousands of times the learning rate, since m is ± a scale of its
    block: with more than one rank sqrt(v) is raised to at least ``floor`` times its mean over the tensor (0: as it is). Tensors that the hook
    keeps dense go on with exact AdamW.

    ``freeze``: ``"auto"``: once the L1 norm of the variance has changed by at most 4 % over 1/(1 - beta2) steps, in sum and in 90 % of the
    tensors, at the earliest after twice as many steps and after ``not_before`` (finish a learning rate's warm-up first: v is still moving),
    at the latest after ``not_after`` steps, if it is given: a quarter of a short training, in which v never settles.
    A number: after so many synchronised steps. None: what the config says. Gradient clipping belongs to the config's ``clip_norm``:
    ``clip_grad_norm_`` would clip the momentum after the freeze.

    Pass it to ``attach(ddp, "onebit_adam", optimizer)``; without a hook it is AdamW. Save both ``state_dict()``s, the hook's on every rank.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        freeze: str | int | None = None,
        *,
        not_before: int = 0,
        not_after: int | None = None,
        floor: float = _FLOOR,
    ) -> None:
        if not (freeze is None or freeze == "auto" or (isinstance(freeze, int) and not isinstance(freeze, bool) and freeze >= 1)):
            raise ArgumentError(f'OneBitAdam: freeze={freeze!r} must be "auto" or a number of steps, 1 or more: before the first there is no variance')
        if not isinstance(not_before, int) or not_before < 0:
            raise ArgumentError(f"OneBitAdam: not_before={not_before!r} must be a number of steps, 0 or more")
        if not_after is not None and (not isinstance(not_after, int) or not_after < max(1, not_before)):
            raise ArgumentError(f"OneBitAdam: not_after={not_after!r} must be a number of steps, at least 1 and not_before={not_before}")
        if not 0 <= floor <= 1:
            raise ArgumentError(f"OneBitAdam: floor={floor!r} must be in [0, 1]")
        self.freeze = freeze
        self.not_before = not_before
        self.not_after = not_after
        self.floor = floor
        self._hook: HookState | None = None
        self._averaged: dict[torch.Tensor, int] = {}  # parameters that the hook compresses: their places among its parameters
        self._seen: tuple[int, list[float]] | None = None  # step of the last look at the variance, and its norms
        self._frozen: dict[str, Any] = {}  # when, why, how large updates got
        self._rates: tuple[list[float], bool] = ([], False)  # the last step's learning rates, and whether one of them had risen
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    # ---- with the hook ------------------------------------------------------------------------------------------------------------------

    def _pair(self, hook: HookState, parameters: list[torch.nn.Parameter]) -> None:
        """Called by ``attach``: this optimizer's momentum becomes the hook's at the freeze."""
        if self._hook is not None and self._hook is not hook:
            raise ArgumentError("this OneBitAdam belongs to another hook; make one optimizer per model")
        mine = {p for group in self.param_groups for p in group["params"]}
        averaged = {p: i for i, p in enumerate(parameters) if hook._engine.averages(i)}
        strange = [p for p in averaged if p not in mine]
        if strange:
            raise ArgumentError(
                f"OneBitAdam does not have {len(strange)} of the parameters whose momentum the hook averages, the first of shape {tuple(strange[0].shape)}"
            )
        self._hook, self._averaged, self._count = hook, averaged, len(parameters)
        if self.frozen:
            self._hand_over(momenta=False)

    @property
    def frozen(self) -> bool:
        """Whether the variance is frozen."""
        return any("frozen_step" in self.state[p] for group in self.param_groups for p in group["params"] if p in self.state)

    def _hand_over(self, *, momenta: bool) -> None:
        """Momenta (once), masks and beta1s to the hook."""
        assert self._hook is not None
        given: list[tuple[torch.Tensor | None, torch.Tensor | None, float]] = [(None, None, 0.0)] * self._count
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self._averaged:
                    continue
                state = self.state[p]
                given[self._averaged[p]] = (
                    state["exp_avg"].reshape(-1) if momenta else None,
                    _bits(state["exp_avg_sq"] != 0),
                    float(group["betas"][0]),
                )
        self._hook._engine.freeze(given)

    # ---- steps --------------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; @returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rates = [float(group["lr"]) for group in self.param_groups]
        self._rates = (rates, any(now > then for now, then in zip(rates, self._rates[0], strict=False)))
        if not self.frozen:
            super().step()
            self._freeze_if_time()
            return loss
        if self._hook is not None and not self._hook._engine.frozen():
            raise ArgumentError("this optimizer's variance is frozen, but the hook still sends gradients: load the hook's state_dict() as well")
        grads = {p: p.grad for p in self._averaged if p.grad is not None}
        for p in grads:
            p.grad = None  # the rest is AdamW's
        try:
            super().step()
        finally:
            for p, grad in grads.items():
                p.grad = grad
        for group in self.param_groups:
            self._apply_momentum(group, {p: grads[p] for p in group["params"] if p in grads})
        return loss

    def _apply_momentum(self, group: dict[str, Any], momenta: Mapping[torch.Tensor, torch.Tensor]) -> None:
        (beta1, beta2), lr, decay = group["betas"], float(group["lr"]), group["weight_decay"]
        for p, m in momenta.items():
            state = self.state[p]
            state["step"] += 1
            t = float(state["step"])
            denominator = (state["exp_avg_sq"].sqrt() / (1 - beta2 ** state["frozen_step"]) ** 0.5).add_(group["eps"])
            if t == state["frozen_step"] + 1 or t % _LOOK_EVERY == 0:
                self._look_at_update(float((m / denominator).abs().max()) / (1 - beta1**t) if m.numel() else 0.0, t)
            if decay != 0:
                p.mul_(1 - lr * decay)
            p.addcdiv_(m, denominator, value=-lr / (1 - beta1**t))

    def _look_at_update(self, largest: float, t: float) -> None:
        warned = self._frozen.get("max_update", 0.0) > _UNUSUAL
        self._frozen["max_update"] = max(self._frozen.get("max_update", 0.0), largest)
        if largest > _UNUSUAL and not warned:
            warnings.warn(
                f"OneBitAdam: an update of {largest:.3g} times the learning rate at step {int(t)}; Adam's are about 1. The variance was frozen at step "
                f"{self._frozen.get('step', '?')}, probably before it was stable where gradients are rare: freeze later, or keep such tensors dense (min_numel)",
                stacklevel=4,
            )

    # ---- the freeze ---------------------------------------------------------------------------------------------------------------------

    def _freeze_if_time(self) -> None:
        if self._hook is None or not self._averaged:
            return
        step = self._hook.step  # synchronised steps: a skipped one counts, as it does for the hook
        if any("exp_avg" not in self.state[p] for p in self._averaged):
            return  # a parameter without gradient so far has no momentum yet
        freeze = self._freeze_of(self._hook)
        reason = f"freeze={freeze}" if freeze != "auto" and step >= freeze else ""
        if freeze == "auto":
            reason = self._stable()
            if not reason and self.not_after is not None and step >= self.not_after:
                reason = f"not_after={self.not_after}"
        if not reason:
            return
        if self._rates[1]:
            warnings.warn(
                f"OneBitAdam: the variance is frozen at step {step} while the learning rate still rises; it is then that of a training that has hardly "
                "begun. Freeze after the warm-up: OneBitAdam(..., not_before=STEPS), or a later freeze=STEP",
                stacklevel=3,
            )
        self._hand_over(momenta=True)
        for p in self._averaged:
            state = self.state[p]
            if self.floor > 0 and dist.get_world_size(self._hook._group) > 1:
                _raise_to(self.floor, state["exp_avg_sq"])
            state["frozen_step"] = int(state["step"])
            del state["exp_avg"]  # the hook's from now on
        self._frozen = {"step": step, "reason": reason}

    def _freeze_of(self, hook: HookState) -> str | int:
        given = hook.config.keys_of("target")["freeze"]
        return given if given == "auto" else int(given)

    def _stable(self) -> str:
        """Why the variance counts as stable, or nothing. Two-sided: a rising variance is as little frozen as a falling one."""
        assert self._hook is not None
        betas2 = {float(group["betas"][1]) for group in self.param_groups if any(p in self._averaged for p in group["params"])}
        every = max(1, round(1 / (1 - max(betas2))))
        t = max(int(self.state[p]["step"]) for p in self._averaged)
        if t % every != 0:
            return ""
        beta2 = {p: float(group["betas"][1]) for group in self.param_groups for p in group["params"]}
        norms = [
            float(self.state[p]["exp_avg_sq"].abs().sum(dtype=torch.float64)) / (1 - beta2[p] ** int(self.state[p]["step"])) for p in self._averaged
        ]
        before, self._seen = self._seen, (t, norms)
        if before is None or before[0] != t - every or t < max(2 * every, self.not_before):
            return ""
        near = [abs(now - then) <= _NEAR * then for now, then in zip(norms, before[1], strict=True)]
        change = abs(sum(norms) - sum(before[1])) / max(sum(before[1]), 1e-300)
        decided = change <= _NEAR and sum(near) >= _MOST * len(near)
        # Replicas have the same variance; were it not so, they must still decide alike.
        first = next(iter(self._averaged))
        flag = torch.tensor([int(decided)], device=first.device)
        dist.broadcast(flag, src=dist.get_global_rank(self._hook._group, 0), group=self._hook._group)
        if not bool(flag.item()):
            return ""
        return f"the variance changed by {100 * change:.2g} % over {every} steps, in {sum(near)} of {len(near)} tensors by at most {100 * _NEAR:g} %"

    # ---- state --------------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "freeze": {"frozen": dict(self._frozen), "seen": self._seen}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        given = dict(state_dict)
        freeze = given.pop("freeze", {"frozen": {}, "seen": None})
        super().load_state_dict(given)
        self._frozen, self._seen = dict(freeze["frozen"]), freeze["seen"]
        if self._hook is not None and self.frozen and self._hook._engine.frozen():
            self._hand_over(momenta=False)


def _raise_to(floor: float, v: torch.Tensor) -> None:
    """sqrt(v) ≥ floor · its mean, but where v is 0: such elements are masked."""
    least = (v.sqrt().mean(dtype=torch.float64) * floor).square().to(v.dtype)
    v.copy_(torch.where(v > 0, torch.maximum(v, least), v))


def _bits(live: torch.Tensor) -> torch.Tensor | None:
    """Bit i % 8 of byte i // 8 for element i; None where all are live."""
    flat = live.reshape(-1)
    if bool(flat.all()):
        return None
    padded = torch.zeros((flat.numel() + 7) // 8 * 8, dtype=torch.uint8, device=flat.device)
    padded[: flat.numel()] = flat
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flat.device)
    return (padded.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def check_pair(target: str, optimizer: Any) -> None:
    """@raises ConfigError, ArgumentError where a config whose target is the momentum and this optimizer do not go together."""
    name, _, keys = target.partition(":")
    freeze = dict(key.split("=") for key in keys.split(",") if key).get("freeze", "auto")
    if name != "momentum":
        if isinstance(optimizer, OneBitAdam):
            raise ArgumentError(
                f"OneBitAdam goes with a config whose target is the momentum, such as 'onebit_adam'; with target={name} use torch.optim.AdamW"
            )
        return
    if optimizer is None:
        if freeze == "auto":
            raise ConfigError(
                "target=momentum: freeze=auto is decided by the optimizer: attach(ddp, config, OneBitAdam(...)), or give freeze=STEP and an optimizer "
                "that takes the momentum for the gradient from then on"
            )
        return
    if not isinstance(optimizer, OneBitAdam):
        raise ArgumentError(
            f"target=momentum puts Adam's momentum into the gradients, which a {type(optimizer).__name__} would average once more: use thinwire.optim.OneBitAdam"
        )
    if optimizer.freeze is not None and str(optimizer.freeze) != freeze:
        raise ConfigError(f"OneBitAdam(freeze={optimizer.freeze!r}) and the config's freeze={freeze} differ; give one of them, or both the same")
