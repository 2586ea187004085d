"""One rank of the communicator contract over Gloo: RANK WORLD FOLDER MODULE, the folder of test_communicator_gloo."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# Gloo adds in the order of its ring: over more than two ranks that is another than the contract's, and the module has a test of its own.
RANK_ORDER = "-*.AllReduceAddsFloatsInRankOrder:*.AllReduceRoundsHalvesAfterEachAddition"


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    sys.path.insert(0, sys.argv[4])
    import test_communicator_gloo

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    options = ["--gtest_fail_fast", "--gtest_color=no", f"--gtest_filter={RANK_ORDER if world > 2 else '*'}"]
    failed = test_communicator_gloo.run(store, rank, world, dist.ProcessGroupGloo, options)
    if failed:
        os._exit(1)  # the others meet closed connections
    (folder / f"rank{rank}.json").write_text("{}")


if __name__ == "__main__":
    main()
