"""What OneBitAdam is given: its arguments, groups, gradients and checkpoints, what of them is refused, what was changed since the freeze, and its
settings in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from .errors import ArgumentError

REFUSED = {
    "amsgrad": "the maximum of v goes on growing, a frozen v does not",
    "maximize": "the averaged momentum is of gradients to descend",
    "capturable": "the freeze is decided on the host",
    "differentiable": "the step is not differentiable",
    "fused": "a fused step skips overflows by itself, which the hook's momentum has to know of",
}


def is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    """Words that read like one are none."""
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):  # the last: a tensor of several elements
        return False
    return not isinstance(value, (str, bytes))


def check_within(what: str, step: int, not_before: int, not_after: int | None) -> None:
    if step < not_before or (not_after is not None and step > not_after):
        bounds = f"not_before={not_before}" if step < not_before else f"not_after={not_after}"
        raise ArgumentError(f"OneBitAdam: {what} and {bounds} exclude each other; a number is the step of the freeze, and bounds are for freeze=auto: leave one out")


def check_freeze(freeze: Any, not_before: Any, not_after: Any, floor: Any) -> None:
    """@raises ArgumentError naming the argument that is no number, or none that goes with the others."""
    if not (freeze is None or freeze == "auto" or is_count(freeze, 1)):
        raise ArgumentError(f'OneBitAdam: freeze={freeze!r} must be "auto" or a number of steps, 1 or more: before the first there is no variance')
    if not is_count(not_before, 0):
        raise ArgumentError(f"OneBitAdam: not_before={not_before!r} must be a number of steps, 0 or more")
    if not_after is not None and not is_count(not_after, max(1, not_before)):
        raise ArgumentError(f"OneBitAdam: not_after={not_after!r} must be a number of steps, at least 1 and not_before={not_before}")
    if is_count(freeze, 1):
        check_within(f"freeze={freeze}", freeze, not_before, not_after)
    if not isinstance(floor, (int, float)) or not 0 <= floor <= 1:
        raise ArgumentError(f"OneBitAdam: floor={floor!r} must be a number in [0, 1]")


def check_group(group: Mapping[str, Any]) -> None:
    for name, why in REFUSED.items():
        if group.get(name):
            raise ArgumentError(f"OneBitAdam: {name}={group[name]} is not supported: {why}")
    if group.get("eps") == 0:
        raise ArgumentError("OneBitAdam: eps=0 divides 0 by 0 where the variance is 0")
    if "betas" not in group:  # the defaults, which were checked
        return
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(_is_number(beta) for beta in betas):
        raise ArgumentError(f"OneBitAdam: betas={betas!r} must be two numbers, of the momentum and of the variance")
    for name, beta in zip(("beta1", "beta2"), betas, strict=True):
        if not 0 <= float(beta) < 1:
            raise ArgumentError(f"OneBitAdam: {name}={beta} must be in [0, 1)")


def checked_freeze(freeze: Any) -> Mapping[str, Any]:
    """@raises ArgumentError naming what is wrong with this part of a state_dict()."""
    wrong = "load_state_dict: freeze must be what OneBitAdam's state_dict() has under it"
    if not isinstance(freeze, Mapping) or not isinstance(freeze.get("frozen"), Mapping) or "seen" not in freeze:
        raise ArgumentError(f"{wrong}, not {freeze!r}")
    since_rise = freeze.get("since_rise")
    for rates in (freeze.get("rates", []), freeze["frozen"].get("rates") or []):  # of the last step, and of the freeze
        if not isinstance(rates, Sequence) or not all(isinstance(rate, float) for rate in rates):
            raise ArgumentError(f"{wrong}; its rates={rates!r} are no learning rates")
    if not (since_rise is None or is_count(since_rise, 0)):
        raise ArgumentError(f"{wrong}; its since_rise={since_rise!r} is no number of steps")
    seen = freeze["seen"]
    if seen is None:
        return freeze
    if not isinstance(seen, Sequence) or len(seen) != 3 or not (is_count(seen[0], 0) and is_count(seen[1], 0)) or not isinstance(seen[2], Sequence):
        raise ArgumentError(f"{wrong}; its seen={seen!r} is not two steps and norms")
    if not all(isinstance(norm, float) and math.isfinite(norm) for norm in seen[2]):
        raise ArgumentError(f"{wrong}; its norms {seen[2]!r} are not all finite numbers")
    return {**freeze, "seen": (seen[0], seen[1], list(seen[2]))}


def refuse_sparse(groups: Sequence[Mapping[str, Any]], named: Sequence[tuple[str, torch.Tensor]]) -> None:
    """@raises ArgumentError naming a parameter that has a sparse gradient."""
    for p in (p for group in groups for p in group["params"]):
        if p.grad is None or not p.grad.is_sparse:
            continue
        called = next((repr(name) for name, q in named if q is p), f"a parameter of shape {tuple(p.shape)}")
        raise ArgumentError(
            f"OneBitAdam: {called} has a sparse gradient, of which AdamW's m and v cannot be made; make it dense, such as with "
            "nn.Embedding(sparse=False), or leave it out of OneBitAdam and give it to an optimizer of its own, such as torch.optim.SparseAdam"
        )


def betas_of(state: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[float, float]:
    """What a parameter's momentum is averaged with and its v corrected by: as they were at the freeze."""
    beta1, beta2 = group["betas"]
    return float(state.get("beta1", beta1)), float(state.get("beta2", beta2))


def changed_beta(name: str, groups: Sequence[Mapping[str, Any]], averaged: Collection[torch.Tensor], states: Mapping[torch.Tensor, Any]) -> str:
    """In words, which group's beta is another than at the freeze, which goes on counting for what the hook averages; empty: none is."""
    at, means = {
        "beta1": (0, "the hook averages the momentum with {0:g} and goes on so. A scheduler that cycles it, such as OneCycleLR, takes cycle_momentum=False"),
        "beta2": (1, "the frozen variance goes on being corrected by that of {0:g}, and only tensors that stay dense follow the change"),
    }[name]
    for i, group in enumerate(groups):
        now = float(group["betas"][at])
        for p in group["params"]:
            if p in averaged and (then := states[p].get(name, now)) != now:
                return f"{name} of parameter group {i} is {now:g} now and was {then:g} when the variance was frozen; {means.format(then)}"
    return ""


def risen_rate(frozen: Mapping[str, Any], rates: Sequence[float], groups: Sequence[Mapping[str, Any]], averaged: Collection[torch.Tensor]) -> str:
    """In words, which group's learning rate is higher than at the freeze, perhaps epochs after it; empty: none is, or it was said already."""
    for i, (now, then, group) in enumerate(zip(rates, frozen.get("rates") or (), groups, strict=False)):
        if now > then * (1 + 1e-5) and any(p in averaged for p in group["params"]):  # more than the rounding of a rate computed from the last one
            return (
                f"the learning rate of parameter group {i} is {now:g} now and was {then:g} when the variance was frozen, at step {frozen.get('step', '?')}: v is "
                "that of the lower rate. If it is a warm-up that goes on, freeze after it: OneBitAdam(..., not_before=STEPS), or a later freeze=STEP. A schedule "
                "that restarts or cycles comes to this too: freeze where its rate is high, or look at the loss"
            )
    return ""


def settings_of(groups: Sequence[Mapping[str, Any]], named: Sequence[tuple[str, torch.Tensor]]) -> str:
    """What the groups apply to the hook's parameters, one by one, so that two ranks' words differ where a parameter does; but for the learning
    rate, which may change at every step."""
    settings = {p: group for group in groups for p in group["params"]}
    words = []
    for name, p in named:
        if (group := settings.get(p)) is not None:  # else another optimizer's
            beta1, beta2 = (float(beta) for beta in group["betas"])
            words.append(f"{name!r}: betas=({beta1:.9g}, {beta2:.9g}), eps={float(group['eps']):.9g}, weight_decay={float(group['weight_decay']):.9g}")
    return "; ".join(words)


def unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Without the hooks that torch wraps around `step` of every class of which there was an optimizer: they run around the caller's own."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
