"""What the features of 1-bit Adam share: a model with its optimizer and hook, steps, what is said and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from ddp_training import batch, everybody, loss_of, mlp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire

CONFIG = "onebit_adam:freeze=3,block=64 min_numel=1 timeout=60"
LR = 0.01


def run(ddp: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()


def pair(config: str = CONFIG, model: nn.Module | None = None, **keys: Any) -> tuple[nn.Module, thinwire.optim.OneBitAdam, thinwire.HookState]:
    ddp = DistributedDataParallel(mlp() if model is None else model, bucket_cap_mb=0.002)
    optimizer = thinwire.optim.OneBitAdam(ddp.parameters(), lr=LR, weight_decay=0.1, **keys)
    return ddp, optimizer, thinwire.attach(ddp, config, optimizer)


def once(rank: int, said: list[warnings.WarningMessage], *words: str) -> None:
    """One rank speaks for all, once, and of the line that took the step."""
    found = [w for w in said if words[0] in str(w.message)]
    assert len(found) == (1 if rank == 0 else 0), [str(w.message) for w in said]
    for w in found:
        assert all(word in str(w.message) for word in words), f"{words} not all in {w.message}"
        assert Path(w.filename).parent == Path(__file__).parent, f"{w.filename}:{w.lineno}"


def compressed(state: thinwire.HookState) -> set[str]:
    return {name for name, one in state.stats()["parameters"].items() if not one["reason"].startswith("fewer")}


def error_of(call: Any) -> str:
    try:
        call()
    except thinwire.Error as error:
        return str(error)
    return "nothing was refused"


def everywhere(words: str, call: Any) -> None:
    """Every rank is refused, with these words."""
    said = everybody(error_of(call))
    assert all(words in one for one in said), f"{words!r} not in all of {said}"
