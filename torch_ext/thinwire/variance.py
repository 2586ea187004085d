"""When Adam's variance counts as stable, and what is made of it at the freeze."""

from __future__ import annotations

from collections.abc import Sequence

import torch

NEAR = 0.04  # stable: an L1 norm that changes by no more than this from one look to the next
MOST = 0.9  # in this share of the tensors, and in their sum
PATIENCE = 5  # looks in vain before a word is said
WITHIN = 16  # synchronised steps in which an optimizer's step has to fall: more than one may take


class VarianceWatch:
    """Looks at the bias-corrected L1 norms of v every 1 / (1 − beta2) steps. Two-sided: a rising variance is as little settled as a falling
    one, and one that is all 0 has not begun.

    Two clocks: the ranks compare at synchronised steps, which all of them count alike, so a look falls on the first step in a window of
    WITHIN of those, from each multiple of `every` on; v moves with the optimizer's steps, of which one may take several synchronised
    backward passes, so windows are passed over until it has had its time."""

    def __init__(self, every: int, not_before: int) -> None:
        self._not_before = not_before
        self.remember(every)
        # The synchronised step that was the first in the last window; the optimizer's step at the last look, and its norms.
        self.seen: tuple[int, int, list[float]] | None = None
        self.words = ""  # what the last look saw; nothing where there was nothing to compare with
        self._warned = False

    def remember(self, every: int) -> None:
        """v remembers so many steps."""
        self.every = every
        self.earliest = max(2 * every, self._not_before)

    def due(self, step: int, taken: int) -> bool:
        """Whether to look now, at this synchronised step and after so many of the optimizer's."""
        if step < self.every or step % self.every >= WITHIN:
            return False
        if self.seen is None:
            return True
        first, then, norms = self.seen
        if step // self.every == first // self.every:
            return False
        self.seen = (step, then, norms)
        return taken - then >= 0.75 * self.every  # a grad scaler may have skipped some

    def look(self, step: int, taken: int, norms: list[float]) -> bool:
        """@returns whether v is stable."""
        before, self.seen = self.seen, (step, taken, norms)
        if before is None or step < self.earliest:
            return False
        _, then, old = before
        near = [a > 0 and abs(b - a) <= NEAR * a for b, a in zip(norms, old, strict=True)]
        change = abs(sum(norms) - sum(old)) / max(sum(old), 1e-300)
        self.words = (
            f"the variance changed by {100 * change:.2g} % over {taken - then} steps, in {sum(near)} of {len(near)} tensors by at most {100 * NEAR:g} %"
        )
        zero = sum(norm == 0 for norm in norms)
        if zero:
            self.words += f"; {zero} have had no gradient yet"
        return change <= NEAR and sum(near) >= MOST * len(near)

    def impatient(self, step: int, taken: int) -> bool:
        """Once: whether all looks so far were in vain, and there was time for many, by both clocks."""
        now = not self._warned and step >= self.earliest + PATIENCE * self.every and taken >= (2 + PATIENCE) * self.every
        self._warned |= now
        return now


def raised(floor: float, v: torch.Tensor) -> torch.Tensor:
    """sqrt(v) ≥ floor · its mean, but where v is 0: such elements are masked."""
    least = (v.sqrt().mean(dtype=torch.float64) * floor).square().to(v.dtype)
    return torch.where(v > 0, torch.maximum(v, least), v)


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
