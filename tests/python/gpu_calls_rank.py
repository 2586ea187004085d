"""Counts, over whole training steps, the calls by which the host waits for the GPU and the copies to the host: plain DDP, and DDP with our hook.
gpu_calls_rank.py RANK WORLD FOLDER DEVICE; on the CPU, where there is nothing to count, it shows that the program works."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from cuda_calls import kernels, waits_and_copies
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import thinwire

RANK, WORLD, FOLDER, DEVICE = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
WIDTH, LAYERS = 512, 6  # 1 MB each, in buckets of 2 MB
WARM, STEPS = 4, 20  # buckets are laid out anew in the second step; of 20 steps one or two take norms
CONFIGS = {
    "plain": None,
    "none": "codec=none",
    "dgc": "dgc:density=0.01 exchange=gather",
    "dgc, clipped": "dgc:density=0.01,clip_norm=0.5 exchange=gather",
    "ef14 exact": "codec=topk:density=0.01,wire=bf16,select=exact feedback=ef14 exchange=gather",
    "check_every": "dgc:density=0.01 exchange=gather check_every=1",  # reads every mean back, by design: what the count must see
}


def count(config: str | None) -> dict:
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]).to(DEVICE)
    model = DistributedDataParallel(net, bucket_cap_mb=2, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = thinwire.attach(model, config, optimizer) if config else None
    batch = torch.randn(32, WIDTH, device=DEVICE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(batch).square().mean().backward()
        optimizer.step()

    def settle() -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM):
        step()
    settle()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
    settle()
    file = FOLDER / "trace.json"
    profiler.export_chrome_trace(str(file))
    trace = json.loads(file.read_text())
    if state is not None:
        assert state.stats()["step"] == WARM + STEPS
        state.close()
    return {"calls": waits_and_copies(trace), "kernels": kernels(trace), "events": len(trace["traceEvents"])}


def main() -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", init_method=f"file://{FOLDER}/store", rank=RANK, world_size=WORLD)
    # Profiled once for nothing: the first time costs calls of its own.
    said = {}
    for name in ("plain", *CONFIGS):
        said[name] = count(CONFIGS[name])
    (FOLDER / f"rank{RANK}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


main()
