"""A peer that dies, stalls or leaves is an error on every survivor within the deadline, and every process ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from lost_peer import TIMEOUT
from ranks import Launch

WORLD = 3
LIMIT = TIMEOUT + 20  # the deadline of one call, and what a loaded machine adds


@pytest.mark.parametrize(
    ("how", "width"), [("killed", 64), ("stalled", 64), ("raises", 64), ("closed", 64), ("killed", 1024), ("stalled", 1024)]
)
def test_survivors_get_an_error(how: str, width: int, tmp_path: Path) -> None:
    """Layers of 64 send messages straight to every rank, layers of 1024 go round Gloo's ring."""
    launch = Launch(Path(__file__).parent / "lost_peer.py", WORLD, tmp_path, how, str(width))
    try:
        for rank in range(WORLD - 1):
            assert launch.processes[rank].wait(120) == 0, launch.log(rank)
    finally:
        launch.kill()
    for rank in range(WORLD - 1):
        said = launch.result(rank)
        assert said["code"] in ("timeout", "peer_lost", "transport"), said
        assert said["seconds"] < LIMIT, said
        assert f"rank {rank}" in said["text"] and "step 5" in said["text"] and "bucket" in said["text"], said
        assert said["again"] == said["code"], f"the same error for every later step: {said}"
    if how == "closed":
        assert "closed" in launch.result(WORLD - 1)["text"]
