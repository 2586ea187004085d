"""A configuration over recorded gradients, without a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ._extension import native
from .config import Config, as_config
from .errors import ArgumentError


@dataclass(frozen=True)
class Replay:
    """What every rank received and what it cost."""

    mean: dict[str, torch.Tensor]
    """name -> (steps, *shape), the gradients' dtype: what every rank received (compared between all ranks)."""
    payload_bytes: torch.Tensor
    """(steps, world), int64: bytes that each rank handed to the transport."""
    state: list[dict[str, dict[str, torch.Tensor]]]
    """[rank][name]: state after the last step, fp32, under the names of ``HookState.state_dict()``."""
    payloads: list[list[bytes]] = field(default_factory=list, repr=False)
    """[step][rank], only with ``record_payloads``; empty bytes for a step that sent dense sums alone."""
    stats: dict[str, Any] = field(default_factory=dict, repr=False)
    """Rank 0's counters after the last step, as ``HookState.stats()``."""


def replay(config: Config | str, grads: Mapping[str, torch.Tensor], *, record_payloads: bool = False) -> Replay:
    """Runs ``config`` over ``grads`` with ranks as threads of this process: the same engine as in training.

    ``grads``: name -> tensor (steps, world, *shape), fp32, bf16 or fp16, one dtype for all; together they are one bucket, in the mapping's
    order. Each rank's part is its local, undivided gradient. @raises ConfigError, Error.
    """
    if not isinstance(grads, Mapping):
        raise ArgumentError(f"replay: grads must map names to tensors (steps, world, *shape), not be a {type(grads).__name__}")
    out = native.replay(as_config(config), dict(grads), record_payloads)
    shapes = {name: tensor.shape[1:] for name, tensor in out["mean"].items()}
    state = [{name: shaped(arrays, shapes[name]) for name, arrays in rank["parameters"].items()} for rank in out["state"]]
    return Replay(out["mean"], out["payload_bytes"], state, out["payloads"], out["stats"])


def shaped(arrays: Mapping[str, torch.Tensor], shape: torch.Size, layout: Sequence[int] = ()) -> dict[str, torch.Tensor]:
    """State arrays that have one element per element of the parameter get its shape; a codec's own memory stays flat. ``layout``: the order
    of the dimensions in which the elements lie, the slowest first; empty: that of a contiguous tensor."""
    return {key: _laid_out(value, shape, layout) if key not in FLAT and value.numel() == shape.numel() else value for key, value in arrays.items()}


def _laid_out(flat: torch.Tensor, shape: torch.Size, layout: Sequence[int]) -> torch.Tensor:
    if not layout:
        return flat.view(shape)
    return flat.view([shape[d] for d in layout]).permute([layout.index(d) for d in range(len(layout))]).contiguous()


def flattened(tensor: torch.Tensor, layout: Sequence[int]) -> torch.Tensor:
    """The elements as they lie under ``layout``."""
    return (tensor.permute(list(layout)) if layout else tensor).reshape(-1)


FLAT = frozenset({"threshold", "server_residual"})
"""State that is no array over the parameter's elements."""
