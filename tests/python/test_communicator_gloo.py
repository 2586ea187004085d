"""The communicator contract on real Gloo processes: one launch per world, all of the contract in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import BUILD
from ranks import Launch

MODULES = sorted((BUILD / "tests").glob("test_communicator_gloo.*.so"))


@pytest.mark.skipif(not MODULES, reason="built without its module (it needs GoogleTest and torch)")
@pytest.mark.parametrize("world", [1, 2, 3])
def test_contract(world: int, tmp_path: Path) -> None:
    launch = Launch(Path(__file__).parent / "gloo_rank.py", world, tmp_path, str(MODULES[0].parent))
    codes = launch.wait(240)
    assert codes == [0] * world, "\n".join(launch.log(rank) for rank in range(world))
    assert "[  PASSED  ]" in launch.log(0) and "Gloo/CommunicatorContract" in launch.log(0), launch.log(0)
