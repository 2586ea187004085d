"""Configurations: parsed once, in C++; here are only the names that people type."""

from __future__ import annotations

from typing import Any

from ._extension import native
from .errors import ArgumentError, ConfigError

Config = native.Config


def as_config(config: Config | str) -> Config:
    """@raises ConfigError, ArgumentError."""
    if isinstance(config, str):
        return Config.parse(config)
    if not isinstance(config, Config):
        raise ArgumentError(f"config must be a Config or a string, not {type(config).__name__}")
    return config


def _parse(text: str) -> Config:
    """What a pickle of a Config calls."""
    return Config.parse(text)


def dgc(
    density: float = 0.001,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    mask: bool = True,
    clip_norm: float | None = None,
    warmup_steps: int = 0,
    wire: str = "fp32",
    select: str = "sampled",
    **slots: Any,
) -> Config:
    """Deep Gradient Compression: top-k with momentum correction, factor masking and, if asked for, local clipping.

    Use it with ``optim.DGCSGD``, or SGD without momentum: the momentum is here. ``warmup_steps``: synchronised steps per entry of the
    paper's warm-up sequence of densities. ``slots``: any other slot, such as ``min_numel`` or ``timeout``.
    """
    _refuse_fixed("dgc", slots, codec="topk", feedback="dgc")
    if warmup_steps and "policy" in slots:
        raise ConfigError(f"dgc: warmup_steps={warmup_steps} is a policy, and policy={slots['policy']!r} another; give one of them")
    warmup = {"policy": f"warmup:steps={warmup_steps}"} if warmup_steps else {}
    return Config(
        codec=f"topk:density={density},wire={wire},select={select}",
        feedback=f"dgc:momentum={momentum},nesterov={int(nesterov)},mask={int(mask)},clip_norm={0 if clip_norm is None else clip_norm}",
        **{**warmup, **slots},
    )


def onebit_adam(
    *,
    beta1: float = 0.9,
    freeze: str | int = "auto",
    clip_norm: float | None = None,
    scale: str = "l1",
    block: int | str = 1024,
    **slots: Any,
) -> Config:
    """1-bit Adam: once the variance is frozen, signs of the momentum with a scale per block, with error feedback on both sides.

    Use it with ``optim.OneBitAdam``, whose groups' beta1 counts. ``freeze``: ``"auto"``, or synchronised steps that stay dense first.
    ``slots``: any other slot.
    """
    _refuse_fixed("onebit_adam", slots, codec="sign", feedback="ef14", target="momentum")
    return Config(
        codec=f"sign:scale={scale},block={block}",
        feedback="ef14",
        target=f"momentum:beta1={beta1},freeze={freeze},clip_norm={0 if clip_norm is None else clip_norm}",
        **slots,
    )


def econtrol(
    *,
    codec: str = "topk:density=0.1",
    eta: str | float = "auto",
    worker_ema: float = 1.0,
    init: str = "dense",
    residual: str = "fp32",
    estimate: str = "fp32",
    **slots: Any,
) -> Config:
    """EControl: every rank sends the change of an estimate of its gradient, and feeds back its residual by degrees.

    Use it with any optimizer: what comes back is dense. ``eta``: ``"auto"`` (the codec's contraction), ``"theory"``, ``"paper"`` or a
    number; ``worker_ema``: the new gradient's share in a rank's running average, 1 = off; ``init``: of the estimates, ``"dense"`` (by a
    dense first step), ``"compressed"`` or ``"zero"``; ``residual="bf16"`` and ``estimate="grid"`` (top-k with fp32 values) take 2 bytes per
    parameter instead of 4. ``slots``: any other slot.
    """
    _refuse_fixed("econtrol", slots, feedback="econtrol")
    keys = f"eta={eta},worker_ema={worker_ema},init={init},residual={residual},estimate={estimate}"
    return Config(codec=codec, feedback=f"econtrol:{keys}", **slots)


def error_feedback(kind: str = "ef14", *, codec: str, **keys_and_slots: Any) -> Config:
    """Error feedback around any codec: ``"ef14"`` adds what was not sent to the next message, ``"ef21"`` and ``"econtrol"`` send the change
    of an estimate. Use it with any optimizer.

    ``keys_and_slots``: keys of the feedback (``decay=0.9``, ``worker_ema=0.1``) and other slots (``min_numel=0``).
    """
    slots = {name: value for name, value in keys_and_slots.items() if name in _SLOTS}
    if ":" in kind and len(slots) < len(keys_and_slots):
        raise ConfigError(f"error_feedback: kind={kind!r} has keys; kind is a name alone, such as 'ef14', where keys are keyword arguments: decay=0.9")
    keys = ",".join(
        f"{name}={int(value) if isinstance(value, bool) else value}" for name, value in keys_and_slots.items() if name not in _SLOTS
    )
    return Config(codec=codec, feedback=f"{kind}:{keys}" if keys else kind, **slots)


def _refuse_fixed(preset: str, slots: dict[str, Any], **fixed: str) -> None:
    for slot, name in fixed.items():
        if slot in slots:
            raise ConfigError(f"{preset} is {slot}={name}; {slot}={slots[slot]!r} is another one: error_feedback(kind, codec=...), or Config(codec=..., feedback=...)")


_SLOTS = frozenset({"target", "exchange", "policy", "min_numel", "start_step", "timeout", "seed", "check_every"})
