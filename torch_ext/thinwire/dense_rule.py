"""What to say where ``exchange=auto`` compresses nothing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ._extension import native
from .config import Config


def all_dense(config: Config, numels: Collection[int], world: int) -> str:
    """A warning, if fp32 tensors of all these sizes, none below min_numel, stay dense for good because that sends less; else empty. Narrower
    gradients, whose dense form is smaller, are dense by the rule then too."""
    if world == 1 or not numels or config.codec.startswith("none"):
        return ""
    if any(_last(config, numel, world)["compressed"] for numel in set(numels)):
        return ""
    numel = max(numels)
    dense = _last(config, numel, world)
    gathered = _last(Config.parse(str(config).replace("exchange=auto", "exchange=gather")), numel, world)
    density = config.keys_of("codec")["density"]
    feedback = config.feedback.partition(":")[0]
    kept = "" if feedback == "none" else f", and what feedback={feedback} keeps is kept for nothing"
    signs = "codec=sign feedback=ef14" if feedback == "dgc" else "codec=sign"  # which dgc does not take
    return (
        f"on {world} ranks exchange=auto sends every tensor densely: of {numel:,} fp32 elements at density {density} a rank would send "
        f"{megabytes(gathered['wire_bytes'])} per step as gathered payloads, {megabytes(dense['dense_bytes'])} in a dense all-reduce. Nothing is compressed{kept}. "
        f"Choose {_lower(config, float(density), numel, world)}{signs}, whose exchange=two_phase sends hardly more on more ranks"
    )


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.4g} MB"


def _last(config: Config, numel: int, world: int) -> dict[str, Any]:
    stage: dict[str, Any] = native.estimate(config, numel, world)[-1]
    return stage


def _lower(config: Config, density: float, numel: int, world: int) -> str:
    """The next lower density of 5, 2, 1 times a power of ten that is sent compressed, for the sentence above."""
    given = f"density={config.keys_of('codec')['density']}"
    for lower in (digit * 10.0**-exponent for exponent in range(1, 7) for digit in (5, 2, 1)):
        if lower < density and _last(Config.parse(str(config).replace(given, f"density={lower:g}", 1)), numel, world)["compressed"]:
            return f"density {lower:g} or less, or "
    return ""
