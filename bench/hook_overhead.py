"""What the hook itself costs: DDP with codec=none beside plain DDP, Gloo, two processes, 25 MB of gradients, steps in turn."""

import json
import multiprocessing
import os
import pathlib
import socket
import statistics
import tempfile
import time

WIDTH, LAYERS, WORLD = 1024, 6, 2  # 6 x 1024 x 1024 floats: 25 MB, one bucket of DDP's default size and its first one


def models(torch, thinwire):
    """The same model three times: plain DDP, plain DDP again (how far two equal things differ here), DDP with our hook."""
    out = {}
    for name in ("plain", "plain_again", "none"):
        torch.manual_seed(0)
        net = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
        ddp = torch.nn.parallel.DistributedDataParallel(net)
        state = thinwire.attach(ddp, "codec=none") if name == "none" else None
        out[name] = (ddp, state)
    return out


def rank_main(rank, port, repetitions, out):
    import torch
    import torch.distributed as dist

    import thinwire

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    batch = torch.randn(8, WIDTH)
    running = models(torch, thinwire)
    seconds = {name: [] for name in running}
    for repetition in range(repetitions + 5):
        for name, (ddp, _) in running.items():
            ddp.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            ddp(batch).sum().backward()
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


def measure(repetitions):
    """@returns the rows, and for each its paired time relative to plain DDP. @raises RuntimeError naming the ranks that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "seconds.json")
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=rank_main, args=(rank, port, repetitions, out)) for rank in range(WORLD)]
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

    numel = LAYERS * WIDTH * WIDTH
    rows, paired = [], []
    for name in seconds:
        middle = statistics.median(seconds[name])
        rows.append({"kernel": f"hook_{name}", "isa": None, "backend": "cpu", "numel": numel, "density": None, "bytes_per_element": 4, "seconds_median": middle,
                     "seconds_min": min(seconds[name]), "gb_per_s": 4 * numel / middle * 1e-9, "ratio_memcpy": None, "ratio_axpy": None})  # fmt: skip
        paired.append(statistics.median(ours / plain for ours, plain in zip(seconds[name], seconds["plain"])))
    return rows, paired
