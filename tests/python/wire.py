"""A decoder of payloads written from docs/wire_format.md alone (NumPy, no code of the library)."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

BLOCK = 65536
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass
class Segment:
    numel: int
    density: float
    wire: str
    index: str
    exact: bool

    @property
    def k(self) -> int:
        return min(self.numel, max(1, math.ceil(self.density * self.numel - 1e-9)))

    @property
    def capacity(self) -> int:
        return self.k if self.exact else min(self.numel, math.ceil(1.25 * self.k))

    @property
    def sizes(self) -> dict[str, int]:
        blocks = -(-self.numel // BLOCK)
        return {"u32": 4 * self.capacity, "u16": 4 * blocks + (2 * self.capacity + 3) // 4 * 4, "bitmap": 4 * -(-self.numel // 32)}

    @property
    def form(self) -> str:
        return min(self.sizes, key=lambda form: self.sizes[form]) if self.index == "auto" else self.index


def decode(payload: bytes, segments: list[Segment], step: int) -> list[np.ndarray]:
    """One fp32 array per segment; asserts every rule on the way."""
    magic, version, codec, round_, flags, count, size, _plan, at_step = struct.unpack_from("<4sHBBIIQQQ", payload)
    assert (magic, version, codec, round_, count, at_step) == (b"TWWP", 1, 1, 0, len(segments), step)
    assert size <= len(payload) and flags in (0, 1, 2, 3)
    kept = struct.unpack_from(f"<{count}I", payload, 64)
    at, out = 64 + 4 * count, []
    for segment, k in zip(segments, kept):
        assert k <= segment.capacity
        index_bytes = segment.sizes[segment.form]
        area = payload[at : at + index_bytes]
        if segment.form == "u32":
            index = np.frombuffer(area, "<u4", k)
        elif segment.form == "u16":
            blocks = -(-segment.numel // BLOCK)
            per_block = np.frombuffer(area, "<u4", blocks)
            assert per_block.sum() == k
            index = np.frombuffer(area, "<u2", k, 4 * blocks).astype(np.int64) + BLOCK * np.repeat(np.arange(blocks), per_block)
        else:
            bits = np.unpackbits(np.frombuffer(area, np.uint8), bitorder="little")
            assert not bits[segment.numel :].any()
            index = np.flatnonzero(bits)
            assert len(index) == k
        index = index.astype(np.int64)
        assert (np.diff(index) > 0).all() and (k == 0 or index[-1] < segment.numel), "indices ascend, each once, inside the tensor"
        at += index_bytes
        if segment.wire == "bf16":
            values = (np.frombuffer(payload, "<u2", k, at).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(payload, "<f4" if segment.wire == "fp32" else "<f2", k, at).astype(np.float32)
        assert np.isfinite(values).all() and (values != 0).all(), "zeros are never sent, nor what is not finite"
        at += (segment.capacity * ITEM[segment.wire] + 3) // 4 * 4
        dense = np.zeros(segment.numel, np.float32)
        dense[index] = values
        out.append(dense)
    assert size >= at
    return out


def decode_signs(payload: bytes, counts: list[int], block: int, step: int) -> list[np.ndarray]:
    """One part's payload of signs, one fp32 array per segment; asserts every rule on the way. `block` 0: one scale per tensor."""
    magic, version, codec, round_, flags, count, size, _plan, at_step = struct.unpack_from("<4sHBBIIQQQ", payload)
    assert (magic, version, codec, round_, count, at_step) == (b"TWWP", 1, 2, 0, len(counts), step)
    assert size == len(payload) and flags in (0, 1, 2, 3)
    blocks = [(-(-n // block) if block else 1) if n else 0 for n in counts]
    scales = np.frombuffer(payload, "<f4", sum(blocks), 64)
    assert np.isfinite(scales).all() and (scales >= 0).all()
    at, first, out = 64 + scales.nbytes, 0, []
    for n, k in zip(counts, blocks):
        bits = np.unpackbits(np.frombuffer(payload, np.uint8, -(-n // 8), at), bitorder="little")
        assert not bits[n:].any()
        scale = np.repeat(scales[first : first + k], block or n)[:n]
        out.append(np.where(bits[:n] == 1, scale, -scale))
        at, first = at + -(-n // 8), first + k
    assert not any(payload[at:])
    return out
