"""When Adam's variance counts as stable, and what is made of it at the freeze."""

from __future__ import annotations

from collections.abc import Sequence

import torch

NEAR = 0.04  # stable: an L1 norm that changes by no more than this from one look to the next
MOST = 0.9  # in this share of the tensors, and in their sum
PATIENCE = 5  # looks in vain before a word is said


class VarianceWatch:
    """Looks at the bias-corrected L1 norms of v every 1 / (1 − beta2) steps. Two-sided: a rising variance is as little settled as a falling
    one, and one that is all 0 has not begun."""

    def __init__(self, every: int, not_before: int) -> None:
        self.every = every
        self.earliest = max(2 * every, not_before)
        self.seen: tuple[int, list[float]] | None = None  # step of the last look, and its norms
        self._warned = False

    def look(self, step: int, norms: list[float]) -> tuple[bool, str]:
        """@returns whether v is stable, and what was seen; nothing was seen where there is nothing to compare with."""
        before, self.seen = self.seen, (step, norms)
        if before is None or before[0] != step - self.every or step < self.earliest:
            return False, ""
        near = [then > 0 and abs(now - then) <= NEAR * then for now, then in zip(norms, before[1], strict=True)]
        change = abs(sum(norms) - sum(before[1])) / max(sum(before[1]), 1e-300)
        words = f"the variance changed by {100 * change:.2g} % over {self.every} steps, in {sum(near)} of {len(near)} tensors by at most {100 * NEAR:g} %"
        zero = sum(norm == 0 for norm in norms)
        if zero:
            words += f"; {zero} have had no gradient yet"
        return change <= NEAR and sum(near) >= MOST * len(near), words

    def impatient(self, step: int) -> bool:
        """Once: whether all looks so far were in vain, and they were many."""
        now = not self._warned and step >= self.earliest + PATIENCE * self.every
        self._warned |= now
        return now


def raise_to(floor: float, v: torch.Tensor) -> None:
    """sqrt(v) ≥ floor · its mean, but where v is 0: such elements are masked."""
    least = (v.sqrt().mean(dtype=torch.float64) * floor).square().to(v.dtype)
    v.copy_(torch.where(v > 0, torch.maximum(v, least), v))


def bits(live: torch.Tensor) -> torch.Tensor | None:
    """Bit i % 8 of byte i // 8 for element i; None where all are live."""
    flat = live.reshape(-1)
    if bool(flat.all()):
        return None
    padded = torch.zeros((flat.numel() + 7) // 8 * 8, dtype=torch.uint8, device=flat.device)
    padded[: flat.numel()] = flat
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flat.device)
    return (padded.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def names_of(names: Sequence[str]) -> str:
    """The first few, and how many there are."""
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
