"""One rank of a data-parallel training of launch/model.py over Gloo, on GPUs over NCCL. launch/quickstart starts several; so does torchrun:

    torchrun --nproc-per-node 2 launch/train_rank.py --config dgc:density=0.01 --epochs 1
"""

import argparse
import datetime
import os
import pathlib
import sys
import time

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import data as datasets
import model as network
from options import add_training_options, learning_rate, with_timeout
import ranks

QUICK_TEST = 2000  # images of an evaluation within an epoch
QUICK_TESTS = 5  # of these in an epoch


def options_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/train_rank.py", description="One rank of a data-parallel training; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as from torchrun.")
    parser.add_argument("--config", default="", metavar="CONFIG", help="thinwire configuration; none given: DDP without a hook")
    add_training_options(parser)
    parser.add_argument("--events", action="store_true", help=argparse.SUPPRESS)
    return parser


class DeviceError(RuntimeError):
    """The device that was asked for is not to be had."""


def pick_device(options: argparse.Namespace) -> torch.device:
    """The CPU, or the GPU of this rank's place among its host's. Before the process group: NCCL reads the environment when it starts."""
    if options.device == "cpu":
        return torch.device("cpu")
    place, ranks_here, gpus = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if gpus == 0:
        raise DeviceError("--device cuda: there is no GPU, or no driver for it, or this torch has no CUDA")
    if ranks_here > gpus and not options.share_gpus:
        raise DeviceError(f"--device cuda: {ranks_here} ranks for {gpus} GPUs: start one rank per GPU, or, to test several on one, add --share-gpus")
    if options.share_gpus:
        os.environ.update(NCCL_HOSTID=f"rank{os.environ.get('RANK', '0')}", NCCL_NET="Socket", NCCL_IB_DISABLE="1", NCCL_SOCKET_IFNAME="lo", NCCL_MAX_CTAS="2")
    device = torch.device("cuda", place % gpus)
    torch.cuda.set_device(device)
    return device


class Trainer:
    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.data = datasets.load(options.data)
        keep = options.subset or len(self.data.train_images)
        self.images, self.labels = (torch.from_numpy(array[:keep].copy()).to(device) for array in (self.data.train_images, self.data.train_labels))
        keep = max(1, options.subset // 5) if options.subset else len(self.data.test_images)
        self.test_images, self.test_labels = (torch.from_numpy(array[:keep].copy()).to(device) for array in (self.data.test_images, self.data.test_labels))
        self.epoch_steps = datasets.epoch_steps(self.data, options.subset, self.world, options.batch)
        self.steps = self.epoch_steps * options.epochs

        torch.manual_seed(options.seed)
        self.model = network.Net().to(device)  # the CPU's generator has initialised it: the same bits on any device
        self.ddp = DistributedDataParallel(self.model)
        self.state, self.config, self.adam = None, "", options.optimizer == "adam"
        if options.config:
            import thinwire

            config = thinwire.Config.parse(with_timeout(options.config, options.timeout))
            averaged = config.target.startswith("momentum")
            self.adam |= averaged and options.optimizer == "auto"
            # Momentum correction brings the momentum into the hook: an optimizer with its own would apply it twice.
            if averaged and self.adam:
                target = config.keys_of("target")
                betas, not_after = (float(target["beta1"]), options.beta2), max(1, self.steps // 4) if target["freeze"] == "auto" else None
                self.optimizer = thinwire.optim.OneBitAdam(self.model.parameters(), betas=betas, weight_decay=options.weight_decay, not_after=not_after)
            elif config.feedback.startswith("dgc") and not self.adam:
                feedback = config.keys_of("feedback")
                momentum, nesterov = float(feedback["momentum"]), bool(int(feedback["nesterov"]))
                self.optimizer = thinwire.optim.DGCSGD(
                    self.model.parameters(), lr=0, momentum=momentum, weight_decay=options.weight_decay, nesterov=nesterov
                )
            else:
                self.optimizer = self.plain()
            self.state, self.config = thinwire.attach(self.ddp, config, self.optimizer), str(config)
        else:
            self.optimizer = self.plain()
        self.numel = sum(parameter.numel() for parameter in self.model.parameters())
        self.done, self.seconds, self.loss_sum = 0, 0.0, 0.0

    def plain(self) -> torch.optim.Optimizer:
        if self.adam:
            return torch.optim.AdamW(self.model.parameters(), betas=(0.9, self.options.beta2), weight_decay=self.options.weight_decay)
        return torch.optim.SGD(self.model.parameters(), lr=0, momentum=self.options.momentum, weight_decay=self.options.weight_decay)

    def bytes_so_far(self) -> dict[str, int]:
        """Of this rank: bytes handed to the transport, bytes that left it, and those that a dense ring all-reduce of the same gradients would have sent."""
        payload, ring = self.done * 4 * self.numel, 2 * (self.world - 1) / self.world
        dense = int(payload * ring)
        if self.state is None:  # without a hook DDP hands every gradient to an all-reduce once per step
            return {"payload_bytes": payload, "wire_bytes": dense, "dense_bytes": dense}
        stats = self.state.stats()
        return {name: int(stats[name]) for name in ("payload_bytes", "wire_bytes", "dense_bytes")}

    def step(self, batch: torch.Tensor) -> float:
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.options, self.adam) * (1 - self.done / self.steps)
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.ddp(network.pixels(self.images[batch])), self.labels[batch].long())
        loss.backward()
        self.optimizer.step()
        value = loss.item()
        self.done += 1
        self.seconds += time.perf_counter() - start
        return value

    @torch.no_grad()
    def accuracy(self, count: int) -> float:
        """Share of the first `count` test images that are classified right; each rank takes every world-th."""
        right = torch.zeros(1, dtype=torch.float64, device=self.device)
        for first in range(self.rank, count, self.world * 500):
            part = slice(first, min(count, first + self.world * 500), self.world)
            right += (self.model(network.pixels(self.test_images[part])).argmax(1) == self.test_labels[part]).sum()
        dist.all_reduce(right)
        return right.item() / count

    def batches(self, epoch: int) -> torch.Tensor:
        """This rank's images, (steps, batch): every world-th of all in random order, or of its own labels' in one."""
        generator = torch.Generator().manual_seed(self.options.seed * 1000003 + epoch)
        each = self.epoch_steps * self.options.batch
        if self.options.by_label:
            shard = torch.sort(self.labels.cpu(), stable=True).indices[self.rank * each : (self.rank + 1) * each]
            return shard[torch.randperm(each, generator=generator)].view(self.epoch_steps, -1)
        order = torch.randperm(len(self.images), generator=generator)
        return order[self.rank : each * self.world : self.world].reshape(self.epoch_steps, -1)

    def epoch(self, epoch: int) -> dict:
        batches = self.batches(epoch).to(self.device)
        loss_sum = torch.zeros(1, dtype=torch.float64, device=self.device)
        quick = {self.epoch_steps * part // QUICK_TESTS for part in range(1, QUICK_TESTS)} if self.options.events else set()
        for step in range(self.epoch_steps):
            loss = self.step(batches[step])
            loss_sum += loss
            if self.options.events and self.rank == 0:
                ranks.emit("step", step=self.done, loss=loss, **self.bytes_so_far())  # counted at every step, outside the seconds
            if step + 1 in quick and step + 1 < self.epoch_steps:
                accuracy = self.accuracy(min(QUICK_TEST, len(self.test_images)))
                if self.rank == 0:
                    ranks.emit("test", step=self.done, accuracy=accuracy, **self.bytes_so_far())
        dist.all_reduce(loss_sum)
        return {"world": self.world, "epoch": epoch, "loss": loss_sum.item() / self.epoch_steps / self.world, "accuracy": self.accuracy(len(self.test_images)),
                "seconds": self.seconds, "steps": self.done, **self.bytes_so_far(), **self.freeze(), "fingerprint": self.common_fingerprint()}

    def freeze(self) -> dict:
        """When 1-bit Adam froze its variance and why; None where it has not, and with other optimizers."""
        freeze = {} if self.state is None else self.state.stats().get("freeze", {})
        return {"frozen_step": freeze.get("step"), "freeze_reason": freeze.get("reason")}

    def freeze_said(self) -> str:
        """The same in words; empty with other optimizers."""
        if self.state is None or "freeze" not in self.state.stats():
            return ""
        freeze = self.freeze()
        return f"variance frozen at step {freeze['frozen_step']}: {freeze['freeze_reason']}" if freeze["freeze_reason"] else "variance not frozen: every step was dense"

    def common_fingerprint(self) -> str:
        """The hash of the parameters, which must be the same on all ranks."""
        prints: list = [None] * self.world
        dist.all_gather_object(prints, network.fingerprint(self.model))
        if len(set(prints)) != 1:
            raise RuntimeError(f"the replicas have diverged: parameter hashes by rank {prints}")
        return prints[0]


def train(options: argparse.Namespace, device: torch.device) -> None:
    trainer = Trainer(options, device)
    try:
        if trainer.rank == 0 and options.events:
            ranks.emit("start", source=trainer.data.source, images=len(trainer.images), steps=trainer.steps, parameters=trainer.numel, config=trainer.config)
        elif trainer.rank == 0:
            print(f"{trainer.data.source}, {len(trainer.images)} images, {trainer.world} ranks, {trainer.steps} steps", flush=True)
        for epoch in range(1, options.epochs + 1):
            row = trainer.epoch(epoch)
            if trainer.rank == 0 and options.events:
                ranks.emit("epoch", **row)
            elif trainer.rank == 0:
                print(f"epoch {epoch}: loss {row['loss']:.4f}, accuracy {row['accuracy']:.2%}, {row['payload_bytes'] / 1e6:.1f} MB sent, {row['seconds']:.1f} s", flush=True)
        said = trainer.freeze_said()
        if said and trainer.rank == 0:
            ranks.emit("freeze", words=said) if options.events else print(said, flush=True)
    finally:
        if trainer.state:
            trainer.state.close()


def main() -> int:
    options = options_parser().parse_args()
    if options.events:
        ranks.die_with_parent()
        ranks.tell_warnings()
    torch.set_num_threads(1)
    try:
        device = pick_device(options)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=options.timeout))
        train(options, device)
    except (datasets.DataError, DeviceError) as error:
        print(f"train_rank: {error}", file=sys.stderr)
        return 2
    dist.destroy_process_group()
    ranks.leave()


if __name__ == "__main__":
    sys.exit(main())
