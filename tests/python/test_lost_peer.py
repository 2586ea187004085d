"""A peer that dies, stalls or leaves is an error on every survivor within the deadline, and every process ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from lost_peer import TIMEOUT
from ranks import Launch

import thinwire

WORLD = {"cpu": 3, "cuda": 2}  # ranks on a GPU share it
SECONDS = float(os.environ.get("THINWIRE_TEST_SECONDS", 120))  # of a whole run

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or not thinwire.build_info()["devices"], reason="there is no GPU, or this build has no CUDA")


def survivors(device: str, how: str, width: int, folder: Path, method: str = "dgc", world: int = 0, *timeout: str) -> list[dict]:
    """What each survivor said; all of them have ended by themselves."""
    world = world or WORLD[device]
    launch = Launch(Path(__file__).parent / "lost_peer.py", world, folder, how, str(width), device, method, *timeout)
    try:
        codes = launch.wait_for(range(world - 1), SECONDS)
    finally:
        launch.kill()
    for rank in range(world - 1):
        if device == "cuda" and any("Duplicate GPU" in launch.log(r) for r in range(world)):
            pytest.skip("this NCCL takes no two ranks on one GPU")
        assert codes[rank] == 0, f"rank {rank} of {how} ended with {codes[rank]} (None: not at all)\n{launch.log(rank)}"
    if how == "closed":
        assert "closed" in launch.result(world - 1)["text"]
    return [launch.result(rank) for rank in range(world - 1)]


@pytest.mark.parametrize(
    ("how", "width", "device"),
    [
        *[(how, width, "cpu") for how, width in (("killed", 64), ("stalled", 64), ("raises", 64), ("closed", 64), ("killed", 1024), ("stalled", 1024))],
        *[pytest.param(how, 64, "cuda", marks=needs_gpu) for how in ("killed", "stalled")],
    ],
)
def test_survivors_get_an_error(how: str, width: int, device: str, tmp_path: Path) -> None:
    """On the CPU layers of 64 send messages straight to every rank, layers of 1024 go round Gloo's ring. On a GPU it is a gather of NCCL that ends, and the call after it that tells."""
    limit = TIMEOUT[device] + 20  # the deadline of one call, and what a loaded machine adds
    for rank, said in enumerate(survivors(device, how, width, tmp_path)):
        assert said["code"] in ("timeout", "peer_lost", "transport"), said
        assert said["seconds"] < limit, said
        steps = ("step 5",) if device == "cpu" else ("step 5", "step 6")
        assert f"rank {rank}" in said["text"] and any(step in said["text"] for step in steps) and "bucket" in said["text"], said
        assert said["again"] == said["code"], f"the same error for every later step: {said}"
        if device == "cuda":
            assert "nccl: " in said["text"], said
            if how == "stalled":
                assert said["code"] == "timeout" and f"did not end within {TIMEOUT[device] * 1000:.0f} ms" in said["text"], said


def test_who_is_no_neighbour_is_released_by_those_who_are(tmp_path: Path) -> None:
    """In Gloo's ring of four rank 1 hears nothing of rank 3, which is killed: ranks 0 and 2 do, and shut their connections. A deadline of 60 s is not what
    ends its wait."""
    for rank, said in enumerate(survivors("cpu", "killed", 1024, tmp_path, "dgc", 4, "60")):
        assert said["code"] in ("peer_lost", "transport") and said["again"] == said["code"], said
        assert f"rank {rank}" in said["text"] and "step 5" in said["text"], said


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    for rank, said in enumerate(survivors("cpu", "absent", 64, tmp_path)):
        assert said["code"] == "timeout" and f"on rank {rank}" in said["text"] and "did not come: rank 2" in said["text"], said
        assert said["seconds"] < TIMEOUT["cpu"] + 20, said


@pytest.mark.parametrize("method", ["sign", "onebit"])
@pytest.mark.parametrize("how", ["killed", "stalled"])
def test_survivors_of_two_phases_get_an_error(how: str, method: str, tmp_path: Path) -> None:
    """An owner that is gone owes everybody its part; under 1-bit Adam after the freeze."""
    for rank, said in enumerate(survivors("cpu", how, 64, tmp_path, method)):
        assert said["code"] in ("timeout", "peer_lost", "transport"), said
        assert said["seconds"] < TIMEOUT["cpu"] + 20, said
        assert f"rank {rank}" in said["text"] and "step 5" in said["text"] and "bucket" in said["text"], said
        assert said["again"] == said["code"], f"the same error for every later step: {said}"


@needs_gpu
def test_a_rank_that_never_comes_is_an_error_on_cuda(tmp_path: Path) -> None:
    """NCCL itself would wait for it for ever."""
    for said in survivors("cuda", "absent", 64, tmp_path):
        assert said["code"] == "timeout" and "not all ranks came within the deadline" in said["text"], said
        assert said["seconds"] < TIMEOUT["cuda"] + 20, said
