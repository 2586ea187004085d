"""A rank that dies, stalls or leaves in the midst of training: RANK WORLD FOLDER HOW WIDTH. Survivors write the error they got and when."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire

TIMEOUT = 4.0  # seconds per blocking call


def main() -> None:
    rank, world, folder, how = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    width = int(sys.argv[5])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    torch.manual_seed(1)
    ddp = DistributedDataParallel(nn.Sequential(*[nn.Linear(64, width), *(nn.Linear(width, width) for _ in range(4))]), bucket_cap_mb=0.03)
    state = thinwire.attach(ddp, f"dgc:density=0.05 exchange=gather min_numel=0 timeout={TIMEOUT}")
    for step in range(1000):
        if step == 5 and rank == world - 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stalled":
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "raises":
                raise SystemExit(3)  # an ordinary way to end: exit handlers and destructors run
            if how == "closed":
                state.close()
        started = time.monotonic()
        try:
            ddp.zero_grad()
            ddp(torch.randn(4, 64)).square().mean().backward()
        except thinwire.Error as error:
            said = {"code": error.code, "text": str(error), "seconds": time.monotonic() - started, "step": step}
            break
    else:
        said = {"code": None}
    try:  # and ever after
        ddp(torch.randn(4, 64)).square().mean().backward()
        said["again"] = None
    except thinwire.Error as error:
        said["again"] = error.code
    (folder / f"rank{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
