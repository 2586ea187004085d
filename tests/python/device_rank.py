"""One rank of the same training on the CPU over Gloo and, where DEVICE is cuda, on GPU 0 over NCCL: under a grad scaler, under DDP.join, and
over a checkpoint that moves from one to the other. Both runs must give the same bits. device_rank.py RANK WORLD FOLDER DEVICE"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

RANK, WORLD, FOLDER, DEVICE = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
if WORLD > 1:  # several ranks on one GPU: NCCL takes each for a host of its own
    os.environ.update(NCCL_HOSTID=f"rank{RANK}", NCCL_NET="Socket", NCCL_IB_DISABLE="1", NCCL_SOCKET_IFNAME="lo", NCCL_MAX_CTAS="2")

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import thinwire

# Exact selection: sampled selection draws its sample by the step's number, and replay's steps have other numbers here.
CONFIGS = [
    "dgc:density=0.01,select=exact min_numel=1000 exchange=gather timeout=60",
    "codec=topk:density=0.1,select=exact feedback=ef14 min_numel=1000 exchange=gather timeout=60",
    "dgc:density=0.05,select=exact,clip_norm=0.5 min_numel=1000 exchange=gather start_step=2 timeout=60",
]
SHAPES = {"a": (300, 200), "b": (200,), "c": (129, 65), "d": (40000, 3)}
BAD = {0: "a", 3: "c"}  # step -> the parameter in which the last rank's gradient overflows
STEPS = 6


class Given(torch.nn.Module):
    """A model whose gradients are given: the loss is the sum of parameter times gradient."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))

    def forward(self, grads: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((p * grads[name]).sum() for name, p in self.named_parameters())


def gradients(steps: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {name: torch.randn(steps, WORLD, *shape, generator=generator) for name, shape in SHAPES.items()}


def model_on(device: str, groups: dict[str, dist.ProcessGroup]) -> DistributedDataParallel:
    return DistributedDataParallel(Given().to(device), device_ids=[0] if device == "cuda" else None, bucket_cap_mb=0.3, process_group=groups[device])


def received(ddp: DistributedDataParallel) -> dict[str, torch.Tensor]:
    return {name: p.grad.detach().cpu().clone() for name, p in ddp.module.named_parameters()}


def held(state: thinwire.HookState) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": x.cpu().clone() for name, arrays in state.state_dict()["parameters"].items() for key, x in arrays.items()}


def scaled(config: str, device: str, groups: dict[str, dist.ProcessGroup]) -> list[dict[str, torch.Tensor]]:
    """Steps under a GradScaler: what every step received, then the state. Steps 0 and 3 overflow on one rank."""
    grads = gradients(STEPS)
    ddp = model_on(device, groups)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=2)
    if "ef14" in config:  # a scaler that has been used before
        scaler.scale(torch.zeros(1, device=device))
    state = thinwire.attach(ddp, config, optimizer, grad_scaler=scaler)
    assert scaler._scale is not None and scaler._scale.device.type == device, "the scale was moved"
    out: list[dict[str, torch.Tensor]] = []
    scales = []
    for step in range(STEPS):
        given = {name: g[step, RANK].to(device) for name, g in grads.items()}
        if step in BAD and RANK == WORLD - 1:
            given[BAD[step]].view(-1)[7] = torch.inf
        before = [p.detach().clone() for p in ddp.parameters()]
        optimizer.zero_grad()
        scale = scaler.get_scale()
        scaler.scale(ddp(given)).backward()
        out.append(received(ddp))
        if step in BAD:
            assert torch.isnan(out[-1][BAD[step]]).all(), f"step {step}: the overflow's bucket is not NaN"
        if step in (1, 2) and "start_step" not in config:
            # What came before the first finite step left no trace. Scales are powers of two: exact.
            clean = thinwire.replay(config, {name: g[1 : step + 1] for name, g in grads.items()})
            for name, got in out[-1].items():
                assert torch.equal(got / scale, clean.mean[name][-1]), f"step {step} {name}: not the replay of unscaled gradients"
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        kept = [torch.equal(a, b) for a, b in zip(before, ddp.parameters(), strict=True)]
        assert all(kept) if step in BAD else not any(kept), f"step {step}: parameters kept: {kept}"
    assert scales == [512.0, 512.0, 1024.0, 512.0, 512.0, 1024.0], scales
    stats = state.stats()
    assert stats["nonfinite_steps"] == len(BAD) and stats["step"] == STEPS, stats
    out.append(held(state))
    state.close()
    return out


def joined(config: str, device: str, groups: dict[str, dist.ProcessGroup]) -> list[dict[str, torch.Tensor]]:
    """Rank r has data for 2 + r steps: what it received, then the state."""
    grads = gradients(2 + WORLD)
    ddp = model_on(device, groups)
    state = thinwire.attach(ddp, config)
    out: list[dict[str, torch.Tensor]] = []
    with ddp.join(divide_by_initial_world_size=True):
        for step in range(2 + RANK):
            before = held(state)
            ddp.zero_grad()
            ddp({name: g[step, RANK].to(device) for name, g in grads.items()}).backward()
            out.append(received(ddp))
            assert any(not torch.equal(x, before[name]) for name, x in held(state).items()), "a step with data left the state as it was"
        last = held(state)
    assert state.step == 1 + WORLD
    for name, x in held(state).items():
        assert torch.equal(x, last[name]), f"{name}: a joined rank's state must stay"
    out.append(last)
    state.close()
    return out


def moved(config: str, device: str, groups: dict[str, dist.ProcessGroup]) -> list[dict[str, torch.Tensor]]:
    """Half of the steps on `device`, the others from its checkpoint, on the other device where there is one: what replay says of all of them."""
    grads = gradients(STEPS)
    expected = thinwire.replay(config, grads)
    other = next((name for name in groups if name != device), device)
    out: list[dict[str, torch.Tensor]] = []
    saved: dict[str, Any] | None = None
    for place, steps in ((device, range(STEPS // 2)), (other, range(STEPS // 2, STEPS))):
        ddp = model_on(place, groups)
        state = thinwire.attach(ddp, config)
        if saved is not None:
            state.load_state_dict(saved)
        for step in steps:
            ddp.zero_grad()
            ddp({name: g[step, RANK].to(place) for name, g in grads.items()}).backward()
            out.append(received(ddp))
            for name, got in out[-1].items():
                assert torch.equal(got, expected.mean[name][step]), f"step {step} {name}, on {place}: not what replay says"
        saved = state.state_dict()
        out.append(held(state))
        state.close()
    return out


def main() -> None:
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/store", rank=RANK, world_size=WORLD)
    groups = {"cpu": dist.group.WORLD}
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
        groups["cuda"] = dist.new_group(backend="nccl")
    said: dict[str, Any] = {}
    for body in (scaled, joined, moved):
        for config in CONFIGS:
            what = f"{body.__name__} {config}"
            try:
                runs = [body(config, device, groups) for device in groups]
                for step, (own, twin) in enumerate(zip(runs[0], runs[-1], strict=True)):
                    for name, x in own.items():
                        assert torch.equal(x.nan_to_num(7.0), twin[name].nan_to_num(7.0)), f"{step} {name}: CPU and GPU differ"
                said[what] = "ok"
            except Exception:  # noqa: BLE001: told to the test, whatever it was
                said[what] = traceback.format_exc()
                print(said[what], flush=True)
            (FOLDER / f"rank{RANK}.json").write_text(json.dumps(said))
            if said[what] != "ok":
                os._exit(1)  # the others meet a closed connection instead of waiting for this rank
    dist.destroy_process_group()


main()
