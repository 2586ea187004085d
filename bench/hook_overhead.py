"""What the hook itself costs: DDP with codec=none beside plain DDP, steps in turn. For ./bench/run kernels: Gloo, two processes, 25 MB of gradients. By itself, for a GPU
(NCCL, one process, 100 MB):

    python bench/hook_overhead.py --device cuda --json FILE
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import report


@dataclass(frozen=True)
class Setup:
    """`layers` times `width` x `width` floats of gradients. On the CPU 25 MB: one bucket of DDP's default size and its first one. On a GPU 100 MB, as many as a ResNet-50 has,
    and a batch whose arithmetic is in proportion."""

    device: str = "cpu"
    world: int = 2
    width: int = 1024
    layers: int = 6
    batch: int = 8

    @property
    def numel(self):
        return self.layers * self.width * self.width


GPU = Setup("cuda", world=1, width=2048, batch=256)


def models(torch, thinwire, setup):
    """The same model three times: plain DDP, plain DDP again (how far two equal things differ here), DDP with our hook."""
    out = {}
    for name in ("plain", "plain_again", "none"):
        torch.manual_seed(0)
        net = torch.nn.Sequential(*[torch.nn.Linear(setup.width, setup.width, bias=False) for _ in range(setup.layers)]).to(setup.device)
        ddp = torch.nn.parallel.DistributedDataParallel(net)
        state = thinwire.attach(ddp, "codec=none") if name == "none" else None
        out[name] = (ddp, state)
    return out


def rank_main(rank, port, repetitions, out, setup):
    import torch
    import torch.distributed as dist

    import thinwire

    torch.set_num_threads(1)
    gpu = setup.device == "cuda"
    if gpu:
        torch.cuda.set_device(rank)
    settle = torch.cuda.synchronize if gpu else lambda: None
    dist.init_process_group("nccl" if gpu else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=setup.world)
    batch = torch.randn(setup.batch, setup.width, device=setup.device)
    running = models(torch, thinwire, setup)
    seconds = {name: [] for name in running}
    for repetition in range(repetitions + 5):
        for name, (ddp, _) in running.items():
            ddp.zero_grad()
            dist.barrier()
            settle()
            start = time.perf_counter()
            ddp(batch).sum().backward()
            settle()
            if repetition >= 5:  # the first steps rebuild buckets and pay for memory
                seconds[name].append(time.perf_counter() - start)
    reference = [parameter.grad for parameter in running["plain"][0].parameters()]
    for ours, theirs in zip(running["none"][0].parameters(), reference):
        torch.testing.assert_close(ours.grad, theirs)
    for _, state in running.values():
        if state is not None:
            state.close()
    if rank == 0:
        pathlib.Path(out).write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def measure(repetitions, setup=Setup()):
    """@returns the rows, and for each its paired time relative to plain DDP. @raises RuntimeError naming the ranks that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "seconds.json")
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=rank_main, args=(rank, port, repetitions, out, setup)) for rank in range(setup.world)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + 600
        for process in ranks:
            process.join(max(0, deadline - time.monotonic()))
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
        for process in ranks:
            if process.is_alive():
                process.kill()
        if failed:
            raise RuntimeError(f"hook: ranks {failed} failed or did not end within 600 s")
        seconds = json.loads(pathlib.Path(out).read_text())

    numel = setup.numel
    rows, paired = [], []
    for name in seconds:
        middle = statistics.median(seconds[name])
        rows.append({"kernel": f"hook_{name}", "isa": None, "backend": setup.device, "numel": numel, "density": None, "bytes_per_element": 4, "seconds_median": middle,
                     "seconds_min": min(seconds[name]), "gb_per_s": 4 * numel / middle * 1e-9, "ratio_memcpy": None, "ratio_axpy": None})  # fmt: skip
        paired.append(statistics.median(ours / plain for ours, plain in zip(seconds[name], seconds["plain"])))
    return rows, paired


def main():
    parser = argparse.ArgumentParser(prog="bench/hook_overhead.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--reps", type=int, default=60, help="steps of each model; default 60")
    parser.add_argument("--json", type=report.new_file, metavar="FILE", help="write the rows")
    options = parser.parse_args()
    if options.reps < 1:
        parser.error("--reps is at least 1")
    import torch

    setup = GPU if options.device == "cuda" else Setup()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench/hook_overhead.py: --device cuda: there is no GPU, or this torch has no CUDA", file=sys.stderr)
        return 1
    rows, paired = measure(options.reps, setup)
    print(f"{setup.numel * 4 / 1e6:.0f} MB of gradients, {setup.world} ranks, {options.device}")
    print(report.table(["step", "ms", "ms best", "time to plain DDP"],
                       [[row["kernel"], f"{row['seconds_median'] * 1e3:.3f}", f"{row['seconds_min'] * 1e3:.3f}", f"{x:.3f}x"] for row, x in zip(rows, paired)]))  # fmt: skip
    if options.json:
        gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
        rows = [row | {"time_to_plain": x} for row, x in zip(rows, paired)]
        report.write(options.json, report.script_line(), report.machine(torch=torch.__version__, gpu=gpu), rows)
    ours = paired[[row["kernel"] for row in rows].index("hook_none")]
    print(f"hook with codec=none against plain DDP: {ours:.3f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
