"""One rank of `./bench/run training`: every variant's model lives in this process, and the variants take turns, so that a slow minute of the machine hits all of them."""

import argparse
import contextlib
import datetime
import functools
import json
import os
import pathlib
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "launch"))
import data as datasets
import model as network
from options import with_timeout
import ranks
import thinwire

WARM_UP = 6  # steps: DDP rebuilds its buckets after the first, PowerSGD starts at the third


def build(width: int, layers: int) -> torch.nn.Sequential:
    """`layers` linear layers from 28 x 28 pixels over `width` to 10 classes: 5.01 M parameters for 1024 and 6."""
    sizes = [28 * 28] + [width] * (layers - 1) + [10]
    parts: list[torch.nn.Module] = [torch.nn.Flatten()]
    for before, after in zip(sizes, sizes[1:]):
        parts += [torch.nn.Linear(before, after), torch.nn.ReLU()]
    return torch.nn.Sequential(*parts[:-1])


class Variant:
    """A model with its way of exchanging gradients."""

    def __init__(self, config: str, options: argparse.Namespace) -> None:
        self.config = config
        torch.manual_seed(0)
        self.model = build(options.width, options.layers)
        self.numel = sum(parameter.numel() for parameter in self.model.parameters())
        # torch's PowerSGD hook aborts over Gloo when a step has several buckets, so it gets one.
        self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=4096 if config.startswith("powerSGD") else options.bucket_mb,
                                           gradient_as_bucket_view=options.bucket_view)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.state, self.power, self.steps, self.loss = None, None, 0, float("nan")
        if config == "bf16_compress_hook":
            self.ddp.register_comm_hook(None, default_hooks.bf16_compress_hook)
        elif config.startswith("powerSGD"):
            self.power = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
            self.ddp.register_comm_hook(self.power, powerSGD_hook.powerSGD_hook)
        elif config not in ("compute alone", "dense"):
            parsed = thinwire.Config.parse(with_timeout(config, options.timeout))
            if parsed.feedback.startswith("dgc"):
                self.optimizer = thinwire.optim.DGCSGD(self.model.parameters(), lr=0.01)
            self.state = thinwire.attach(self.ddp, parsed, self.optimizer)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        with self.ddp.no_sync() if self.config == "compute alone" else contextlib.nullcontext():
            self.optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(self.ddp(images), labels)
            loss.backward()
        self.optimizer.step()
        self.loss = loss.item()
        self.steps += 1

    def payload_bytes(self) -> int:
        """Handed to the transport so far, by our counters, torch's PowerSGD's own, or the size of what the others all-reduce."""
        if self.state:
            return self.state.stats()["payload_bytes"]
        if self.power:  # its first steps are dense and not in its count
            return 4 * (self.power.total_numel_after_compression + self.numel * min(self.steps, self.power.start_powerSGD_iter))
        return {"compute alone": 0, "dense": 4, "bf16_compress_hook": 2}[self.config] * self.numel * self.steps


def sent_by_interface(name: str) -> int | None:
    """Bytes that left this host, headers included; None where all ranks share one interface."""
    if name == "lo":
        return None
    for line in pathlib.Path("/proc/self/net/dev").read_text().splitlines():
        interface, _, counters = line.partition(":")
        if interface.strip() == name:
            return int(counters.split()[8])
    raise RuntimeError(f"no interface {name} on this host")


def common_fingerprint(model: torch.nn.Module, world: int) -> str:
    prints: list = [None] * world
    dist.all_gather_object(prints, network.fingerprint(model))
    if len(set(prints)) != 1:
        raise RuntimeError(f"the replicas have diverged: parameter hashes by rank {prints}")
    return prints[0]


def measure(options: argparse.Namespace) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    data = datasets.load(options.data)
    images, labels = network.pixels(torch.from_numpy(data.train_images[:10000].copy())), torch.from_numpy(data.train_labels[:10000].copy()).long()
    choice = torch.Generator().manual_seed(1 + rank)
    variants = [Variant(config, options) for config in options.variants]
    interface = os.environ["GLOO_SOCKET_IFNAME"]

    def block(variant: Variant, steps: int) -> tuple[float, int | None]:
        batches = [torch.randint(len(images), (options.batch,), generator=choice) for _ in range(steps)]
        batches = [(images[batch], labels[batch]) for batch in batches]
        dist.barrier()
        sent, start = sent_by_interface(interface), time.perf_counter()
        for batch in batches:
            variant.step(*batch)
        seconds = (time.perf_counter() - start) / steps
        dist.barrier()  # what is still on its way belongs to this block
        return seconds, None if sent is None else (sent_by_interface(interface) - sent) // steps

    if rank == 0:
        ranks.emit("start", parameters=variants[0].numel, source=data.source)
    for variant in variants:
        block(variant, WARM_UP)
    before = [variant.payload_bytes() for variant in variants]
    seconds = torch.zeros(len(variants), options.rounds, dtype=torch.float64)
    sent = [0] * len(variants)
    for turn in range(options.rounds):
        for i in ((turn + j) % len(variants) for j in range(len(variants))):
            seconds[i, turn], sent[i] = block(variants[i], options.block)
        if rank == 0:
            ranks.emit("round", done=turn + 1)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # a step is over when the last rank has finished it
    test_images, test_labels = network.pixels(torch.from_numpy(data.test_images[:2000].copy())), torch.from_numpy(data.test_labels[:2000].copy())
    for i, variant in enumerate(variants):
        mark = None if variant.config == "compute alone" else common_fingerprint(variant.model, world)
        with torch.no_grad():
            accuracy = (variant.model(test_images).argmax(1) == test_labels).double().mean().item()
        row = {"config": variant.config, "world": world, "epoch": 0, "loss": variant.loss, "accuracy": accuracy, "seconds": seconds[i].sum().item() * options.block,
               "steps": variant.steps, "payload_bytes": variant.payload_bytes(), "dense_bytes": int(variant.steps * 4 * variant.numel * 2 * (world - 1) / world),
               "fingerprint": mark, "payload_bytes_per_step": (variant.payload_bytes() - before[i]) // (options.rounds * options.block),
               "seconds_median": seconds[i].median().item(), "seconds_min": seconds[i].min().item(), "step_seconds": seconds[i].tolist(),
               "interface_bytes_per_step": sent[i]}
        if rank == 0:
            ranks.emit("row", row=row)
        if variant.state:
            variant.state.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("options", type=functools.partial(json.loads, object_hook=lambda fields: argparse.Namespace(**fields)))
    options = parser.parse_args().options
    ranks.die_with_parent()
    ranks.tell_warnings()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=options.timeout))
    measure(options)
    dist.destroy_process_group()
    ranks.leave()


if __name__ == "__main__":
    sys.exit(main())
