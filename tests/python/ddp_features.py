"""What DDP does to a hook, checked on every rank of a real group; run by test_ddp.py as one process per rank: RANK WORLD FOLDER [FEATURE
...]. The features are in ddp_models.py, ddp_layouts.py, ddp_onebit*.py, ddp_state.py, ddp_errors.py and
ddp_threads.py.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import ddp_errors  # noqa: F401  registers its features
import ddp_models  # noqa: F401
import ddp_layouts  # noqa: F401
import ddp_onebit  # noqa: F401
import ddp_onebit_freeze  # noqa: F401
import ddp_onebit_groups  # noqa: F401
import ddp_state  # noqa: F401
import ddp_threads  # noqa: F401
import torch
import torch.distributed as dist
from ddp_training import FEATURES


def main() -> None:
    rank, world, folder, chosen = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    results: dict[str, str] = {}
    file = folder / f"rank{rank}.json"
    for name in chosen or FEATURES:
        try:
            FEATURES[name](rank, world)
            results[name] = "ok"
        except BaseException:
            results[name] = traceback.format_exc()
        file.write_text(json.dumps(results))
        if results[name] != "ok":
            print(f"{name}\n{results[name]}", flush=True)
            os._exit(1)  # the others meet a closed connection instead of waiting for this rank
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
