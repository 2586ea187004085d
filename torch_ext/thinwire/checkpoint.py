"""What a state_dict() is, and what is refused as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .errors import ArgumentError
from .replay import FLAT, flattened, shaped

FORMAT = 1
_WATCHDOG: dict[str, float] = {"eta": 1e30, "since": 2**63, "ratio": math.inf, "recent": math.inf, "grad": math.inf, "grown": 2**31, "cuts": 2**31}  # what a state has of it, and up to what


def checked_states(states: Any, shapes: Mapping[str, torch.Size]) -> list[dict[str, Any]]:
    """@raises ArgumentError naming the key that is wrong."""
    if isinstance(states, Mapping):
        states = [states]
    if not isinstance(states, Sequence) or isinstance(states, (str, bytes)):
        raise ArgumentError(f"load_state_dict: a state_dict() or a sequence of them is needed, not a {type(states).__name__}")
    if not states:
        raise ArgumentError("load_state_dict: an empty sequence of states")
    for one in states:
        if not isinstance(one, Mapping):
            raise ArgumentError(f"load_state_dict: a sequence of state_dict()s is needed, but it holds a {type(one).__name__}")
        _check_state(one, shapes)
    layouts = states[0].get("layouts", {})
    for one in states:
        if one.get("layouts", {}) != layouts:
            raise ArgumentError("load_state_dict: the states are not of one checkpoint: their parameters lie in memory in different orders (layouts)")
    return [{**one, "parameters": {name: _flat(arrays, layouts.get(name, ())) for name, arrays in one["parameters"].items()}} for one in states]


def _flat(arrays: Mapping[str, torch.Tensor], layout: Sequence[int]) -> dict[str, torch.Tensor]:
    return {key: flattened(value, layout) if layout and key not in FLAT and value.dim() == len(layout) else value for key, value in arrays.items()}


def _check_state(state: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
    missing = [key for key in ("format", "step", "world", "rank", "config", "started", "nonfinite_steps", "parameters") if key not in state]
    if missing:
        raise ArgumentError(f"load_state_dict: this is no state of a HookState: {', '.join(missing)} missing")
    if state["format"] != FORMAT:
        raise ArgumentError(f"load_state_dict: a state of format {state['format']!r}; this version reads format {FORMAT}")
    for key, least, most in (("step", 0, 2**63 - 1), ("nonfinite_steps", 0, 2**63 - 1), ("world", 1, 2**31 - 1), ("rank", 0, 2**31 - 1)):
        value = state[key]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ArgumentError(f"load_state_dict: {key}={value!r} is not a whole number from {least} to {most}")
    if "frozen" in state and not (isinstance(state["frozen"], int) and not isinstance(state["frozen"], bool) and 0 <= state["frozen"] < 2**63):
        raise ArgumentError(f"load_state_dict: frozen={state['frozen']!r} is not a step, from 0 to 2^63 - 1")
    for key, kind in (("config", str), ("started", bool), ("parameters", Mapping), ("flush", bool), ("watchdog", Mapping), ("dense", Mapping), ("layouts", Mapping), ("lr", Mapping)):
        if key in state and not isinstance(state[key], kind):
            raise ArgumentError(f"load_state_dict: {key} must be a {kind.__name__}, not a {type(state[key]).__name__}")
    until = state.get("start_until", 0)
    if not isinstance(until, int) or isinstance(until, bool) or not 0 <= until < 2**63:
        raise ArgumentError(f"load_state_dict: start_until={until!r} is not a step, from 0 to 2^63 - 1")
    for name, dtype in state.get("dense", {}).items():
        if dtype not in ("fp32", "bf16", "fp16"):
            raise ArgumentError(f"load_state_dict: dense[{name!r}]={dtype!r} is not fp32, bf16 or fp16")
    for name, layout in state.get("layouts", {}).items():
        dims = len(shapes[name]) if name in shapes else 0
        if name in shapes and (not isinstance(layout, Sequence) or sorted(map(str, layout)) != sorted(map(str, range(dims)))):
            raise ArgumentError(f"load_state_dict: layouts[{name!r}]={layout!r} is no order of {dims} dimensions")
    for name, rate in state.get("lr", {}).items():
        if not (is_number(rate) and 0 < rate < math.inf):
            raise ArgumentError(f"load_state_dict: lr[{name!r}]={rate!r} is not a learning rate above 0")
    for name, one in state.get("watchdog", {}).items():
        if not isinstance(one, Mapping) or one.keys() != _WATCHDOG.keys():
            raise ArgumentError(f"load_state_dict: watchdog[{name!r}] must have {', '.join(_WATCHDOG)}, not {one!r}")
        for key, most in _WATCHDOG.items():
            if not (is_number(one[key]) and 0 <= one[key] < most and (key in ("eta", "ratio", "recent", "grad") or isinstance(one[key], int))):
                raise ArgumentError(f"load_state_dict: watchdog[{name!r}][{key!r}]={one[key]!r} is not a number from 0 to {most:g}")
    for name, arrays in state["parameters"].items():
        if not isinstance(name, str) or not isinstance(arrays, Mapping):
            raise ArgumentError(f"load_state_dict: parameters[{name!r}] must be a Mapping under a name, not a {type(arrays).__name__}")
        for key, value in arrays.items():
            if not isinstance(key, str) or not isinstance(value, torch.Tensor):
                raise ArgumentError(f"load_state_dict: {name}.{key} is a {type(value).__name__}, not a tensor")
            if value.layout != torch.strided or not value.is_floating_point():
                what = f"{value.dtype}, {value.layout}"
                raise ArgumentError(f"load_state_dict: {name}.{key} is {what}; dense floating-point numbers are needed")
            if name in shapes and value.dim() > 0 and shaped({key: value.reshape(-1)}, shapes[name])[key].shape != value.shape:
                raise ArgumentError(f"load_state_dict: {name}.{key} has shape {tuple(value.shape)}, the parameter {tuple(shapes[name])}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {name: {key: value.clone() for key, value in arrays.items()} for name, arrays in state["parameters"].items()}
    return {**state, "parameters": parameters}
