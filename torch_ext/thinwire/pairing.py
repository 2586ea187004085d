"""Which optimizers go with which configs."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .config import Config
from .errors import ArgumentError, ConfigError, warn
from .onebit_adam import OneBitAdam
from .optim import DGCSGD

_BETA1 = "0.9"  # the config's default; it cannot be told from one that was given


def paired_config(config: Config, optimizer: Any) -> Config:
    """The config with what is the optimizer's to say. @raises ConfigError, ArgumentError where the two do not go together, with the reason."""
    keys = config.keys_of("target")
    if not config.target.startswith("momentum"):
        if isinstance(optimizer, OneBitAdam) and not config.feedback.startswith("dgc"):
            raise ArgumentError(
                f"OneBitAdam goes with a config whose target is the momentum, such as 'onebit_adam'; with target={config.target} use torch.optim.AdamW"
            )
        if optimizer is not None:
            _check_momentum(config, optimizer)
            _warn_of_decay(config, optimizer)
        return config
    if optimizer is None:
        if keys["freeze"] == "auto":
            raise ConfigError("target=momentum: freeze=auto is decided by the optimizer: attach(ddp, config, OneBitAdam(...))")
        return config
    if not isinstance(optimizer, OneBitAdam):
        if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__):
            raise ArgumentError(
                "target=momentum does not support ZeroRedundancyOptimizer: at the freeze every rank hands over the momentum and the masks of all parameters, "
                "of which each has only a part under ZeRO; use thinwire.optim.OneBitAdam itself"
            )
        raise ArgumentError(
            f"target=momentum puts Adam's momentum into the gradients, which a {type(optimizer).__name__} would average once more: use thinwire.optim.OneBitAdam"
        )
    beta1s = sorted({float(group["betas"][0]) for group in optimizer.param_groups})
    if keys["beta1"] != _BETA1 and float(keys["beta1"]) not in beta1s:
        raise ConfigError(f"the config's beta1={keys['beta1']} is none of OneBitAdam's, {beta1s}, and the optimizer's count; leave it out of the config")
    optimizer._check_config(keys["freeze"])
    if optimizer.freeze in (None, "auto") or str(optimizer.freeze) == keys["freeze"]:
        return config
    if keys["freeze"] != "auto":
        raise ConfigError(f"OneBitAdam(freeze={optimizer.freeze}) and the config's freeze={keys['freeze']} differ; give one of them")
    return Config.parse(str(config).replace("freeze=auto", f"freeze={optimizer.freeze}"))


def _check_momentum(config: Config, optimizer: Any) -> None:
    """The momentum is applied once: by feedback=dgc in the hook, or by the optimizer."""
    if not config.feedback.startswith("dgc"):
        if isinstance(optimizer, DGCSGD):
            raise ArgumentError(
                f"DGCSGD leaves the gradients' momentum to the hook, but feedback={config.feedback} with codec={config.codec} applies none: "
                "the training would have no momentum at all. Use torch.optim.SGD(params, lr, momentum=...), or a config with feedback=dgc"
            )
        return
    keys = config.keys_of("feedback")
    momentum, nesterov = float(keys["momentum"]), bool(float(keys["nesterov"]))
    if isinstance(optimizer, DGCSGD):
        for group in optimizer.param_groups:
            if group["weight_decay"] != 0 and (group["momentum"], bool(group["nesterov"])) != (momentum, nesterov):
                raise ArgumentError(
                    f"DGCSGD decays weights with momentum={group['momentum']}, nesterov={group['nesterov']}, but feedback=dgc has momentum={momentum}, "
                    f"nesterov={nesterov}; give both the same (a scheduler that cycles it, such as OneCycleLR, takes cycle_momentum=False)"
                )
        return
    if not _is_plain_sgd(optimizer):
        raise ArgumentError(
            f"feedback=dgc applies momentum in the hook, so it needs thinwire.optim.DGCSGD or torch.optim.SGD without momentum, not {type(optimizer).__name__}; "
            "error_feedback('ef14', codec=...) goes with any optimizer"
        )
    for group in optimizer.param_groups:
        if group["momentum"] != 0:
            raise ArgumentError(
                f"feedback=dgc applies momentum in the hook; SGD(momentum={group['momentum']}) would apply it a second time. "
                f"Use thinwire.optim.DGCSGD(params, lr, momentum={momentum}). Where a scheduler set it (OneCycleLR takes cycle_momentum=False) or a loaded "
                "state_dict() of another run, set the groups' momentum to 0"
            )


def _is_plain_sgd(optimizer: Any) -> bool:
    """SGD, or a subclass with SGD's step(), which torch wraps by a profiler's hook."""
    return isinstance(optimizer, torch.optim.SGD) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(torch.optim.SGD.step)


def _warn_of_decay(config: Config, optimizer: Any) -> None:
    if not config.feedback.startswith("dgc") or isinstance(optimizer, DGCSGD) or all(group["weight_decay"] == 0 for group in optimizer.param_groups):
        return
    momentum = float(config.keys_of("feedback")["momentum"])
    warn(
        f"feedback=dgc with SGD(weight_decay=...): the momentum is in the hook, so that the decay has none and acts 1 - momentum = {1 - momentum:g} times as "
        f"strongly as under SGD with momentum. Use thinwire.optim.DGCSGD(params, lr, momentum={momentum}, weight_decay=...)"
    )


def guarded_steps(config: Config, optimizer: Any) -> Any:
    """Looks again before every step: schedulers and loaded states change an optimizer that was right when it was given. @returns a handle to remove() the look
    by, or None where there is nothing to look at."""
    if not config.feedback.startswith("dgc") or not isinstance(optimizer, torch.optim.Optimizer):
        return None
    return optimizer.register_step_pre_hook(lambda stepping, *_: _check_momentum(config, stepping))
