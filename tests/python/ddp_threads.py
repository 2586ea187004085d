"""The backward pass and Python's threads."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import struct
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from ddp_training import batch, feature, mlp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire


def long_backward(x: torch.Tensor) -> torch.Tensor:
    """Of whose backward pass, a second or two in C++, nothing gets through before its end."""
    return torch.matrix_exp(x.mean() / 900 + torch.ones(900, 900) / 900).mean()


@feature
def no_gil_in_the_backward_pass(rank: int, world: int) -> None:
    """While a thread of rank 0 keeps the GIL, rank 0's backward pass in another one must reach the hook and reduce: rank 1, whose mean needs
    it, says so when it is done. With the Python hook, which takes the GIL, it cannot."""
    libc = ctypes.PyDLL(None)  # calls keep the GIL

    def answered(ddp: nn.Module, limit_ms: int) -> bool:
        box = [tempfile.mkdtemp() if rank == 0 else None]
        dist.broadcast_object_list(box)
        fifo = Path(box[0]) / "fifo"
        if rank == 0:
            os.mkfifo(fifo)
        dist.barrier()
        pipe = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
        out = ddp(batch(rank, 0))
        loss = long_backward(out) if rank == 0 else out.mean()
        dist.barrier()
        if rank > 0:
            loss.backward()
            if rank == 1:
                os.write(pipe, b"!")
            said = [None]
        else:
            # The graph is kept: to let go of a tensor that Python knows, torch takes the GIL.
            backward = threading.Thread(target=loss.backward, kwargs={"retain_graph": True})
            backward.start()
            time.sleep(0.1)  # it is in C++ by now
            ready = struct.pack("ihh", pipe, select.POLLIN, 0)
            buffer = ctypes.create_string_buffer(ready, len(ready))
            said = [libc.poll(buffer, 1, limit_ms) == 1]
            backward.join()
        dist.broadcast_object_list(said)
        os.close(pipe)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(box[0])
        return said[0]

    config = "codec=topk:density=0.1 feedback=ef14 min_numel=0 timeout=100"
    ddp = DistributedDataParallel(mlp())
    thinwire.attach(ddp, config)
    assert answered(ddp, 40_000), "rank 0 did not reduce while its GIL was taken"
    control = DistributedDataParallel(mlp())
    control.register_comm_hook(thinwire.HookState(config, named_parameters=control.module.named_parameters()), thinwire.hook)
    assert not answered(control, 3_000), "a hook in Python reduced without the GIL: this test shows nothing"
