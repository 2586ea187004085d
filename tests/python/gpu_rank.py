"""One rank of a DDP run, on GPU 0 over NCCL where DEVICE is cuda, else over Gloo: gradients that are known beforehand go through the hook, and
what comes back is what replay says on the CPU, to the bit. gpu_rank.py RANK WORLD FOLDER DEVICE"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

RANK, WORLD, FOLDER, DEVICE = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
if WORLD > 1:  # several ranks on one GPU: NCCL takes each for a host of its own
    os.environ.update(NCCL_HOSTID=f"rank{RANK}", NCCL_NET="Socket", NCCL_IB_DISABLE="1", NCCL_SOCKET_IFNAME="lo", NCCL_MAX_CTAS="2")

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import thinwire

CONFIGS = [
    "dgc:density=0.01 min_numel=1000",
    "codec=topk:density=0.02,wire=bf16,select=exact feedback=ef14 min_numel=1000",
    "dgc:density=0.01,clip_norm=0.5 min_numel=1000 start_step=1",
    "codec=topk:density=0.1,index=bitmap feedback=ef14 min_numel=1000 exchange=gather",
    "codec=sign feedback=ef14 min_numel=1000 exchange=two_phase",
    "codec=sign:scale=l2,block=512 feedback=ef14 min_numel=1000 exchange=gather",
    "onebit_adam:freeze=2 min_numel=1000",
    "codec=topk:density=0.02 feedback=ef21 min_numel=1000 exchange=gather",
    "codec=topk:density=0.02,wire=bf16,select=exact feedback=econtrol:worker_ema=0.5 min_numel=1000 exchange=gather start_step=2",
    "codec=sign:block=512 feedback=econtrol:init=zero min_numel=1000 exchange=two_phase",
]
SHAPES = {"a": (300, 200), "b": (200,), "c": (129, 65), "d": (40000, 3)}
STEPS = 5


class Given(torch.nn.Module):
    """A model whose gradients are given: the loss is the sum of parameter times gradient."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, grads: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((p * grads[name]).float().sum() for name, p in self.named_parameters())


def gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(STEPS, WORLD, *shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def run(config: str, dtype: torch.dtype) -> None:
    grads = gradients(dtype)
    expected = thinwire.replay(config, grads)
    model = DistributedDataParallel(Given(dtype).to(DEVICE), device_ids=[0] if DEVICE == "cuda" else None, bucket_cap_mb=0.3)
    # No optimizer, without which a momentum is refused elsewhere: nothing is done with what comes back.
    state = thinwire.HookState(config, named_parameters=model.module.named_parameters(), _unpaired=True)
    model.register_comm_hook(state, thinwire.hook)
    for step in range(STEPS):
        model.zero_grad()
        model({name: g[step, RANK].to(DEVICE) for name, g in grads.items()}).backward()
        for name, parameter in model.module.named_parameters():
            got, want = parameter.grad.cpu(), expected.mean[name][step]
            assert torch.equal(got, want), f"{config} {dtype} step {step} {name}: {(got.float() - want.float()).abs().max()}"
    saved = state.state_dict()
    assert {name: set(arrays) for name, arrays in saved["parameters"].items()} == {name: set(arrays) for name, arrays in expected.state[RANK].items()}, config
    for name, arrays in saved["parameters"].items():
        for array, values in arrays.items():
            assert torch.equal(values.flatten(), expected.state[RANK][name][array].flatten()), f"{config} {dtype} state {name}.{array}"
    assert state.stats()["step"] == STEPS
    state.load_state_dict(saved)
    state.close()


def main() -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", init_method=f"file://{FOLDER}/store", rank=RANK, world_size=WORLD)
    said: dict[str, str] = {}
    for config in CONFIGS:
        for dtype in (torch.float32, torch.bfloat16):
            try:
                run(config, dtype)
                said[f"{config} {dtype}"] = "ok"
            except Exception:  # noqa: BLE001: told to the test, whatever it was
                said[f"{config} {dtype}"] = traceback.format_exc()
            (FOLDER / f"rank{RANK}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


main()
