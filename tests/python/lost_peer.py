"""A rank that dies, stalls or leaves in the midst of training: RANK WORLD FOLDER HOW WIDTH DEVICE METHOD [TIMEOUT]. Survivors write the error they
got and when; of four ranks they stay until all have."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

# Seconds per blocking call. On a GPU NCCL is loaded, and its ranks meet, within them too.
TIMEOUT = {"cpu": 4.0, "cuda": 10.0}
# The peer is lost at step 5: in a gather, and in the two collectives of two_phase.
METHODS = {"dgc": "dgc:density=0.05 exchange=gather", "sign": "codec=sign feedback=ef14", "onebit": "onebit_adam:freeze=2"}

if __name__ == "__main__" and sys.argv[6] == "cuda":  # several ranks on one GPU: NCCL takes each for a host of its own
    os.environ.update(NCCL_HOSTID=f"rank{sys.argv[1]}", NCCL_NET="Socket", NCCL_IB_DISABLE="1", NCCL_SOCKET_IFNAME="lo", NCCL_MAX_CTAS="2")

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire


def main() -> None:
    rank, world, folder, how = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    width, device, method = int(sys.argv[5]), sys.argv[6], sys.argv[7]
    timeout = float(sys.argv[8]) if len(sys.argv) > 8 else TIMEOUT[device]
    torch.set_num_threads(1)
    # DDP's own group is Gloo on a GPU too: NCCL is in our group alone, and torch's watchdog does not end the process before we do.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    torch.manual_seed(1)
    net = nn.Sequential(*[nn.Linear(64, width), *(nn.Linear(width, width) for _ in range(4))]).to(device)
    ddp = DistributedDataParallel(net, bucket_cap_mb=0.03)

    optimizer = thinwire.optim.OneBitAdam(ddp.parameters()) if method == "onebit" else None

    def train() -> None:
        ddp.zero_grad()
        ddp(torch.randn(4, 64, device=device)).square().mean().backward()
        if device == "cuda":  # what the GPU meets is the next call's error: nobody is to be many steps ahead
            torch.cuda.synchronize()
        if optimizer is not None:
            optimizer.step()

    said = {"code": None}
    started = time.monotonic()
    try:
        if how == "absent" and rank == world - 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        state = thinwire.attach(ddp, f"{METHODS[method]} min_numel=0 timeout={timeout}", optimizer)
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
            if step <= 5:  # the peer is lost here
                started = time.monotonic()
            train()
    except thinwire.Error as error:
        said = {"code": error.code, "text": str(error), "seconds": time.monotonic() - started}
    if how != "absent":
        try:  # and ever after
            train()
            said["again"] = None
        except thinwire.Error as error:
            said["again"] = error.code
    (folder / f"rank{rank}.json").write_text(json.dumps(said))
    # A process that ends closes its sockets: that must not be what releases the others.
    others = [folder / f"rank{r}.json" for r in range(world - 1)]
    while world > 3 and not all(other.exists() for other in others):
        time.sleep(0.05)


if __name__ == "__main__":
    main()
