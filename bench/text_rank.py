"""One rank of `./bench/run quality --only text`: a small transformer learns, character by character, the text that Python brings along (pydoc's topics)."""

import argparse
import datetime
import pathlib
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "launch"))
import model as network
from options import number, with_timeout
import ranks
import thinwire

WARM_UP = 50  # steps over which the learning rate rises; it falls to 0 linearly after them
BETAS, DECAY = (0.9, 0.99), 0.1
PIECE = 4096  # characters; every tenth piece is for validation, so that both parts are about the same topics


class Text:
    """Characters as numbers: `train` and `validation`, each one long line of pieces."""

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
        self.source, self.symbols = f"pydoc's {len(topics)} topics, {len(text):,} characters", sorted(set(text))
        place = {symbol: i for i, symbol in enumerate(self.symbols)}
        pieces = torch.tensor([place[symbol] for symbol in text]).split(PIECE)
        self.train = torch.cat([piece for i, piece in enumerate(pieces) if i % 10 != 9])
        self.validation = torch.cat([piece for i, piece in enumerate(pieces) if i % 10 == 9])


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(count, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, symbols: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.symbol, self.place = nn.Embedding(symbols, width), nn.Embedding(length, width)
        nn.init.normal_(self.symbol.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        x = self.symbol(symbols) + self.place.weight[: symbols.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Trainer:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rank, self.world = options, dist.get_rank(), dist.get_world_size()
        self.text = Text()
        torch.manual_seed(options.seed)
        self.model = Transformer(len(self.text.symbols), options.length, options.width, options.layers, heads=4)
        self.ddp = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.state = None
        if options.config:
            config = thinwire.Config.parse(with_timeout(options.config, options.timeout))
            not_before = WARM_UP if config.keys_of("target")["freeze"] == "auto" else 0
            self.optimizer = thinwire.optim.OneBitAdam(self.model.parameters(), betas=BETAS, weight_decay=DECAY, not_before=not_before)
            self.state = thinwire.attach(self.ddp, config, self.optimizer)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=BETAS, weight_decay=DECAY)
        # Ranks draw places of their own; a seed gives the same ones to every config.
        self.places = torch.Generator().manual_seed(options.seed * 1000 + self.rank)

    def rate(self, step: int) -> float:
        return self.options.lr * min((step + 1) / WARM_UP, (self.options.steps - step) / max(1, self.options.steps - WARM_UP), 1.0)

    def step(self, step: int) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        length = self.options.length
        first = torch.randint(len(self.text.train) - length - 1, (self.options.batch, 1), generator=self.places)
        window = self.text.train[first + torch.arange(length + 1)]
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.ddp(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Mean loss and share of right guesses over the whole validation text, in windows side by side; each rank takes every world-th."""
        length = self.options.length
        count = (len(self.text.validation) - 1) // length
        inputs = self.text.validation[: count * length].view(count, length)[self.rank :: self.world]
        targets = self.text.validation[1 : count * length + 1].view(count, length)[self.rank :: self.world]
        sums = torch.zeros(3, dtype=torch.float64)
        for x, y in zip(inputs.split(64), targets.split(64)):
            logits = self.model(x).flatten(0, 1)
            sums += torch.tensor([functional.cross_entropy(logits, y.flatten(), reduction="sum"), (logits.argmax(1) == y.flatten()).sum(), y.numel()])
        dist.all_reduce(sums)
        return (sums[0] / sums[2]).item(), (sums[1] / sums[2]).item()

    def row(self) -> dict:
        seconds, tail = 0.0, max(1, self.options.steps // 10)
        losses = torch.zeros(1, dtype=torch.float64)
        for step in range(self.options.steps):
            start = time.perf_counter()
            loss = self.step(step)
            seconds += time.perf_counter() - start
            if step >= self.options.steps - tail:
                losses += loss / tail / self.world
            if self.rank == 0 and step % 20 == 0:
                ranks.emit("step", step=step, loss=loss.item())
        dist.all_reduce(losses)
        validation, right = self.validate()
        prints: list = [None] * self.world
        dist.all_gather_object(prints, network.fingerprint(self.model))
        if len(set(prints)) != 1:
            raise RuntimeError(f"the replicas have diverged: parameter hashes by rank {prints}")
        payload = 4 * self.options.steps * sum(p.numel() for p in self.model.parameters())
        sent = {"payload_bytes": payload, "wire_bytes": payload * 2 * (self.world - 1) // self.world, "dense_bytes": payload * 2 * (self.world - 1) // self.world}
        frozen: dict = {}
        if self.state is not None:
            stats = self.state.stats()
            sent = {name: int(stats[name]) for name in sent}
            frozen = stats["freeze"]
        seen = self.options.steps * self.options.batch * self.options.length * self.world
        return {"config": self.options.config or "codec=none", "data": self.text.source, "world": self.world, "epoch": round(seen / len(self.text.train)), "loss": losses.item(),
                "validation_loss": validation, "accuracy": right, "seconds": seconds, "steps": self.options.steps, **sent, "frozen_step": frozen.get("step"), "freeze_reason": frozen.get("reason"),
                "fingerprint": prints[0], "seed": self.options.seed}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/text_rank.py", description=__doc__)
    parser.add_argument("--config", default="", metavar="CONFIG", help="a config whose target is the momentum; none given: AdamW and DDP without a hook")
    parser.add_argument("--steps", type=number(int, 1), default=800, metavar="N")
    parser.add_argument("--batch", type=number(int, 1), default=8, metavar="B", help="windows per rank and step")
    parser.add_argument("--length", type=number(int, 2), default=128, metavar="L", help="characters of a window")
    parser.add_argument("--width", type=number(int, 4), default=128, metavar="W", help="a multiple of 4, the number of heads")
    parser.add_argument("--layers", type=number(int, 1), default=3, metavar="N")
    parser.add_argument("--lr", type=number(float, 0), default=2e-3, metavar="X")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N")
    parser.add_argument("--timeout", type=number(float, 1), default=120, metavar="S")
    return parser.parse_args()


def main() -> None:
    options = parse()
    ranks.die_with_parent()
    ranks.tell_warnings()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=options.timeout))
    trainer = Trainer(options)
    try:
        if trainer.rank == 0:
            ranks.emit("start", source=trainer.text.source, parameters=sum(p.numel() for p in trainer.model.parameters()))
        row = trainer.row()
        if trainer.rank == 0:
            ranks.emit("row", row=row)
    finally:
        if trainer.state:
            trainer.state.close()
    dist.destroy_process_group()
    ranks.leave()


if __name__ == "__main__":
    main()
