"""What DDP does to a hook, checked on every rank of a real group; run by test_ddp.py as one process per rank: RANK WORLD FOLDER [FEATURE
...].

Each feature trains against the oracle: every rank computes its local gradients a second time on a plain copy of the model, the oracle turns
all ranks' gradients
into the mean, and DDP's gradients must equal it to the bit.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from oracle import Oracle
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire

FEATURES: dict[str, Callable[[int, int], None]] = {}


def feature(check: Callable[[int, int], None]) -> Callable[[int, int], None]:
    FEATURES[check.__name__] = check
    return check


def mlp(seed: int = 1, width: int = 24, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(10, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
    ).to(dtype)


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1000 * step + rank)
    return torch.randn(8, 10).to(dtype)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def local_grads(model: nn.Module, losses: list[Callable[[nn.Module], torch.Tensor]]) -> dict[str, torch.Tensor]:
    """This rank's own gradients, summed over micro-batches, of a plain copy of the model."""
    plain = copy.deepcopy(model)
    for p in plain.parameters():
        p.grad = None
    for loss in losses:
        loss(plain).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in plain.named_parameters()}


def everybody(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    out = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, value, group=group)
    return out


def same(grads: dict[str, torch.Tensor], model: nn.Module, where: str) -> None:
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{where}: {name} has no gradient"
        if not torch.equal(p.grad, grads[name]):
            worst = (p.grad.float() - grads[name].float()).abs().max().item()
            raise AssertionError(
                f"{where}: {name} differs from the oracle by up to {worst}, largest gradient {grads[name].float().abs().max().item()}"
            )


def replicas_equal(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    mine = b"".join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in model.parameters())
    assert len(set(everybody(mine, group))) == 1, "replicas differ"


def train(
    ddp: nn.Module,
    oracle: Oracle,
    steps: range,
    *,
    losses: Callable[[int], list[Callable[[nn.Module], torch.Tensor]]] | None = None,
    group: dist.ProcessGroup | None = None,
    lr: float = 0.1,
    forward: nn.Module | None = None,
) -> None:
    """SGD steps of ddp, each compared with the oracle. `forward`: what is called in ddp's place (a compiled module)."""
    rank = dist.get_rank()
    module = ddp.module
    dtype = next(module.parameters()).dtype
    for step in steps:
        todo = losses(step) if losses else [lambda m: loss_of(m, batch(rank, step, dtype))]
        expected = oracle.step(everybody(local_grads(module, todo), group))
        for p in module.parameters():
            p.grad = None
        for micro, loss in enumerate(todo):
            if micro + 1 < len(todo):
                with ddp.no_sync():
                    loss(ddp if forward is None else forward).backward()
            else:
                loss(ddp if forward is None else forward).backward()
        same(expected, module, f"step {step}")
        with torch.no_grad():
            for p in module.parameters():
                p.sub_(p.grad, alpha=lr)
    replicas_equal(module, group)


@feature
def first_bucket_and_rebuild(rank: int, world: int) -> None:
    oracle = Oracle(world)
    ddp = DistributedDataParallel(mlp(), bucket_cap_mb=0.002)
    state = thinwire.attach(ddp, oracle.config)
    train(ddp, oracle, range(6))
    assert ddp._get_ddp_logging_data()["has_rebuilt_buckets"] == 1
    assert len(ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")) > 1, "one bucket only: nothing was rebuilt"
    assert state.step == 6 and state.stats()["step"] == 6
    held = state.state_dict()["parameters"]
    for name, p in ddp.module.named_parameters():
        assert torch.equal(held[name]["momentum"].reshape(-1), oracle.ranks[rank].u[name]), name
        if p.dim() >= 2:
            assert torch.equal(held[name]["accumulated"].reshape(-1), oracle.ranks[rank].v[name]), name
        else:
            assert "accumulated" not in held[name], name


@feature
def ef14(rank: int, world: int) -> None:
    oracle = Oracle(world, kind="ef14", density=0.05)
    ddp = DistributedDataParallel(mlp(), bucket_cap_mb=0.002)
    thinwire.attach(ddp, oracle.config, torch.optim.Adam(ddp.parameters()))
    train(ddp, oracle, range(5))


@feature
def gradient_as_bucket_view(rank: int, world: int) -> None:
    oracle = Oracle(world, nesterov=True)
    ddp = DistributedDataParallel(mlp(), bucket_cap_mb=0.002, gradient_as_bucket_view=True)
    thinwire.attach(ddp, oracle.config)
    train(ddp, oracle, range(5))
    # The result lies in the bucket's own memory: gradients of one bucket share a storage.
    storages = {p.grad.untyped_storage().data_ptr() for p in ddp.parameters()}
    assert len(storages) < len(list(ddp.parameters()))


@feature
def static_graph(rank: int, world: int) -> None:
    oracle = Oracle(world)
    ddp = DistributedDataParallel(mlp(), bucket_cap_mb=0.002, static_graph=True)
    thinwire.attach(ddp, oracle.config)
    train(ddp, oracle, range(6))


class Branches(nn.Module):
    """`b` is used by rank 0 only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c = nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        if dist.get_rank() == 0:
            h = h + self.b(x)
        return self.c(h)


@feature
def find_unused_parameters(rank: int, world: int) -> None:
    oracle = Oracle(world)
    ddp = DistributedDataParallel(Branches(), find_unused_parameters=True)
    thinwire.attach(ddp, oracle.config)
    train(ddp, oracle, range(5))


@feature
def no_sync_and_accumulation(rank: int, world: int) -> None:
    oracle = Oracle(world)
    ddp = DistributedDataParallel(mlp(), bucket_cap_mb=0.002)
    state = thinwire.attach(ddp, oracle.config)
    micro = lambda step: [lambda m, i=i: loss_of(m, batch(rank, 10 * step + i)) / 3 for i in range(3)]  # noqa: E731
    train(ddp, oracle, range(4), losses=micro)
    assert state.step == 4, "only synchronised steps count"


@feature
def join(rank: int, world: int) -> None:
    oracle = Oracle(world)
    ddp = DistributedDataParallel(mlp(), bucket_cap_mb=0.002)
    state = thinwire.attach(ddp, oracle.config)
    mine: list[dict[str, torch.Tensor]] = []
    received: list[dict[str, torch.Tensor]] = []
    steps = 3 + rank  # the last rank has the most data
    with ddp.join(divide_by_initial_world_size=True):
        for step in range(steps):
            mine.append(local_grads(ddp.module, [lambda m, step=step: loss_of(m, batch(rank, step))]))
            ddp.zero_grad()
            loss_of(ddp, batch(rank, step)).backward()
            received.append({name: p.grad.clone() for name, p in ddp.module.named_parameters()})
            with torch.no_grad():
                for p in ddp.parameters():
                    p.sub_(p.grad, alpha=0.1)
    grads, longest = everybody(mine), everybody(received)[world - 1]
    for step in range(3 + world - 1):
        expected = oracle.step([g[step] if step < len(g) else None for g in grads])
        for name, value in expected.items():
            assert torch.equal(longest[step][name], value), f"step {step}, {name}"
    held = state.state_dict()["parameters"]
    for name in mine[0]:
        assert torch.equal(held[name]["momentum"].reshape(-1), oracle.ranks[rank].u[name]), f"{name}: a joined rank's state must stay"
    replicas_equal(ddp)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.words = nn.Embedding(50, 8, sparse=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(x))


@feature
def sparse_embedding(rank: int, world: int) -> None:
    oracle = Oracle(world)
    ddp = DistributedDataParallel(Words())
    state = thinwire.attach(ddp, oracle.config)
    handed = 0
    for step in range(4):
        torch.manual_seed(100 * step + rank)
        x = torch.randint(0, 50, (6,))
        plain = copy.deepcopy(ddp.module)
        plain.zero_grad()
        plain(x).square().mean().backward()
        gathered = everybody({name: p.grad.to_dense() if p.grad.is_sparse else p.grad for name, p in plain.named_parameters()})
        expected = oracle.step([{k: v for k, v in g.items() if k != "words.weight"} for g in gathered])
        ddp.zero_grad()
        ddp(x).square().mean().backward()
        rows = sum(g["words.weight"] for g in gathered) / world
        handed += len(set(x.tolist())) * (8 + 8 * 4)  # an int64 index and eight floats per word
        assert ddp.module.words.weight.grad.is_sparse
        # Gloo adds sparse rows in its own order: at most world − 1 roundings of the sum and one of the product.
        torch.testing.assert_close(ddp.module.words.weight.grad.to_dense(), rows, rtol=world * 2.0**-23, atol=1e-9)
        for name, value in expected.items():
            assert torch.equal(dict(ddp.module.named_parameters())[name].grad, value), name
    assert state.stats()["payload_bytes"] > handed, "sparse rows are not counted"
    stats = state.stats()["parameters"]["words.weight"]
    assert not stats["compressed"] and "sparse" in stats["reason"], stats


@feature
def bf16_model(rank: int, world: int) -> None:
    oracle = Oracle(world)
    ddp = DistributedDataParallel(mlp(dtype=torch.bfloat16), bucket_cap_mb=0.002)
    thinwire.attach(ddp, oracle.config)
    train(ddp, oracle, range(4))


class Mixed(nn.Module):
    """Parameters of three dtypes: three buckets, one of which no codec takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b, self.c = nn.Linear(10, 12), nn.Linear(12, 12).bfloat16(), nn.Linear(12, 4).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).bfloat16()).double())


@feature
def mixed_dtypes(rank: int, world: int) -> None:
    oracle = Oracle(world)
    ddp = DistributedDataParallel(Mixed())
    state = thinwire.attach(ddp, oracle.config)
    for step in range(4):
        loss = lambda m, step=step: m(batch(rank, step)).square().mean()  # noqa: E731
        gathered = everybody(local_grads(ddp.module, [loss]))
        expected = oracle.step([{k: v for k, v in g.items() if not k.startswith("c.")} for g in gathered])
        ddp.zero_grad()
        loss(ddp).backward()
        for name, p in ddp.module.named_parameters():
            if name.startswith("c."):
                torch.testing.assert_close(p.grad, sum(g[name] for g in gathered) / world, rtol=world * 2.0**-52, atol=0)
            else:
                assert torch.equal(p.grad, expected[name]), name
    assert (
        "float64" in state.stats()["parameters"]["c.weight"]["reason"].lower()
        or "double" in state.stats()["parameters"]["c.weight"]["reason"].lower()
    )


@feature
def two_models_and_own_collectives(rank: int, world: int) -> None:
    oracles = [Oracle(world), Oracle(world, kind="ef14")]
    models = [DistributedDataParallel(mlp(seed), bucket_cap_mb=0.002) for seed in (1, 2)]
    states = [thinwire.attach(model, oracle.config) for model, oracle in zip(models, oracles)]
    seen = torch.zeros(1)

    def own_collective(grad: torch.Tensor) -> None:
        dist.all_reduce(seen)  # in the midst of the backward pass, on the group that DDP uses

    for model in models:
        model.module[2].weight.register_hook(own_collective)
    for step in range(4):
        expected = [
            o.step(everybody(local_grads(m.module, [lambda m, step=step: loss_of(m, batch(rank, step))]))) for m, o in zip(models, oracles)
        ]
        for model in models:
            model.zero_grad()
        losses = [loss_of(model, batch(rank, step)) for model in models]  # two forwards, then one backward through both
        sum(losses).backward()
        dist.all_reduce(seen)
        for model, grads in zip(models, expected):
            same(grads, model.module, f"step {step}")
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.1)
    assert [s.step for s in states] == [4, 4]


@feature
def compiled(rank: int, world: int) -> None:
    oracle = Oracle(world)
    ddp = DistributedDataParallel(mlp())  # smaller buckets than the first one's 1 MiB trip an assertion of torch.compile's own
    thinwire.attach(ddp, oracle.config)
    train(ddp, oracle, range(4), forward=torch.compile(ddp, backend="aot_eager"))
    try:
        thinwire.attach(torch.compile(DistributedDataParallel(mlp())), oracle.config)
    except thinwire.Error as error:
        assert "before torch.compile" in str(error)
    else:
        raise AssertionError("attach took a compiled module")


@feature
def grad_scaler(rank: int, world: int) -> None:
    ddp = DistributedDataParallel(mlp(), bucket_cap_mb=0.002)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    state = thinwire.attach(
        ddp, "codec=topk:density=0.1,select=exact feedback=ef14 exchange=gather min_numel=0 timeout=60", optimizer, grad_scaler=scaler
    )
    fed = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in ddp.module.named_parameters()}
    got = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in ddp.module.named_parameters()}
    scales = []
    for step in range(9):
        overflow = step in (4, 6) and rank == 0
        x = batch(rank, step)
        local = local_grads(ddp.module, [lambda m: loss_of(m, x)])
        optimizer.zero_grad()
        before = [p.detach().clone() for p in ddp.parameters()]
        scale = scaler.get_scale()
        loss = scaler.scale(loss_of(ddp, x))
        if overflow:
            # One layer in the middle, so that buckets before and after it are finite.
            handle = ddp.module[2].weight.register_hook(lambda g: torch.where(torch.arange(g.numel()).reshape(g.shape) == 7, torch.inf, g))
            local["2.weight"].view(-1)[7] = 0  # no news
        loss.backward()
        if overflow:
            handle.remove()
        bad = step in (4, 6)
        for name, p in ddp.module.named_parameters():
            if p.dim() >= 2:
                fed[name] += sum(everybody(local[name])).double() / world
                if not bad:
                    got[name] += p.grad.double() / scale
        if bad:
            assert not torch.isfinite(ddp.module[2].weight.grad).any(), "the bucket of the overflow is NaN on every rank"
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if bad:
            assert all(torch.equal(a, b) for a, b in zip(before, ddp.parameters())), "an optimizer step was taken"
        replicas_equal(ddp)
    assert len(set(map(tuple, everybody(scales)))) == 1 and min(scales) < max(scales)
    assert state.stats()["nonfinite_steps"] == 2
    held = everybody(state.state_dict()["parameters"])
    for name, total in fed.items():
        if total.dim() < 2:
            continue
        kept = sum(rank_state[name]["residual"].double() for rank_state in held) / world
        # Scaling by powers of two is exact; each of 9 steps rounds e + g and the mean once: 2·9 roundings of values below the largest sum.
        torch.testing.assert_close(
            got[name] + kept, total, rtol=0, atol=18 * 2.0**-23 * float(total.abs().max() + kept.abs().max() + 1e-30) * world
        )


@feature
def subgroups(rank: int, world: int) -> None:
    members = [list(range(world - 1)), [world - 1]]
    groups = [dist.new_group(ranks) for ranks in members]
    mine = 0 if rank < world - 1 else 1
    oracle = Oracle(len(members[mine]))
    ddp = DistributedDataParallel(mlp(), process_group=groups[mine], bucket_cap_mb=0.002)
    for _ in range(1 + 2 * mine):  # the groups' counts of hooks need not agree
        state = thinwire.attach(DistributedDataParallel(mlp(), process_group=groups[mine]), oracle.config)
    state = thinwire.attach(ddp, oracle.config)
    train(ddp, oracle, range(4), group=groups[mine])
    assert state.stats()["step"] == 4


@feature
def torch_convention(rank: int, world: int) -> None:
    for named in (True, False):
        oracle = Oracle(world)
        # Several buckets in the very first step: what is learnt is not complete before the last of them.
        ddp = DistributedDataParallel(mlp(), bucket_cap_mb=0.002, find_unused_parameters=True)
        state = thinwire.HookState(oracle.config, named_parameters=ddp.module.named_parameters() if named else None)
        ddp.register_comm_hook(state, thinwire.hook)
        train(ddp, oracle, range(4))
        assert state.step == 4 and len(state.stats()["parameters"]) == 8
        if named:
            assert state.state_dict()["parameters"].keys() == dict(ddp.module.named_parameters()).keys()
            continue
        for call in (state.state_dict, lambda: state.load_state_dict({}), lambda: pickle.dumps(state)):
            try:
                call()
            except thinwire.Error as error:
                assert "named_parameters" in str(error) and error.code == "invalid_argument"
            else:
                raise AssertionError("state without names was given out")
    oracle = Oracle(world)
    ddp = DistributedDataParallel(mlp(dtype=torch.bfloat16))
    ddp.register_comm_hook(thinwire.HookState(oracle.config), thinwire.hook)
    train(ddp, oracle, range(3))


@feature
def torch_convention_sparse(rank: int, world: int) -> None:
    ddp = DistributedDataParallel(Words())
    ddp.register_comm_hook(thinwire.HookState("codec=none timeout=60"), thinwire.hook)
    for step in range(3):
        torch.manual_seed(100 * step + rank)
        x = torch.randint(0, 50, (6,))
        plain = copy.deepcopy(ddp.module)
        plain.zero_grad()
        plain(x).square().mean().backward()
        rows = sum(everybody(plain.words.weight.grad.to_dense())) / world
        ddp.zero_grad()
        ddp(x).square().mean().backward()
        torch.testing.assert_close(ddp.module.words.weight.grad.to_dense(), rows, rtol=world * 2.0**-23, atol=1e-9)


@feature
def sparse_overflow_under_a_scaler(rank: int, world: int) -> None:
    """An Inf among rank 0's sparse rows alone: the whole step is taken back, as if its gradients had only been added to the residuals."""
    ddp = DistributedDataParallel(Words())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    config = "codec=topk:density=0.1,select=exact feedback=ef14 exchange=gather min_numel=0 timeout=60"
    state = thinwire.attach(ddp, config, optimizer, grad_scaler=scaler)
    for step in range(4):
        bad = step == 2
        torch.manual_seed(100 * step + rank)
        x = torch.randint(0, 50, (6,))
        plain = copy.deepcopy(ddp.module)
        plain.zero_grad()
        plain(x).square().mean().backward()
        before = state.state_dict()["parameters"]["out.weight"]["residual"]
        weights = [p.detach().clone() for p in ddp.parameters()]
        optimizer.zero_grad()
        scale = scaler.get_scale()
        scaled = scaler.scale(ddp(x).square().mean())
        if bad and rank == 0:
            handle = ddp.module.words.weight.register_hook(lambda g: torch.sparse_coo_tensor(g._indices(), g._values() * torch.inf, g.shape))
        scaled.backward()
        if bad and rank == 0:
            handle.remove()
        received = {name: p.grad for name, p in ddp.module.named_parameters()}
        assert bool(torch.isfinite(received["words.weight"]._values()).all()) != bad
        if bad:
            assert torch.isnan(received["words.weight"]._values()).all()
            # 2^10 scales exactly, so that e + g is rounded as the engine rounds it; nothing of it was sent.
            held = state.state_dict()["parameters"]["out.weight"]["residual"]
            assert scale == 2.0**10 and torch.equal(held, before + plain.out.weight.grad), "what was sent did not return"
        else:
            assert torch.isfinite(received["out.weight"]).all()
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(a, b) for a, b in zip(weights, ddp.parameters())) == bad
        replicas_equal(ddp)
    stats = state.stats()
    assert stats["nonfinite_steps"] == 1 and state.step == 4
    dense = 4 * sum(p.numel() * 4 for p in ddp.parameters()) * 2 * (world - 1) / world
    # A sum of doubles over a dozen buckets: far below 2^-40 of it.
    assert abs(stats["dense_bytes"] - dense) <= dense * 2.0**-40, "sparse gradients count as what a dense reduction would have sent"


@feature
def a_refused_hook_is_not_counted(rank: int, world: int) -> None:
    """One rank's call is refused for a reason that the others do not have; corrected, it meets them."""
    oracle = Oracle(world)
    ddp = DistributedDataParallel(mlp())
    named = list(ddp.module.named_parameters())
    other = nn.Parameter(torch.zeros(2, 2))
    cases = [
        ([*named, ("again", named[0][1])], "under another name"),
        ([*named, (named[0][0], other)], "two parameters"),
        ([], "no parameter"),
        ([("only", 3)], "pairs"),
    ]
    for wrong, word in cases if rank == 0 else []:
        try:
            thinwire.HookState(oracle.config, named_parameters=wrong)
        except thinwire.Error as error:
            assert word in str(error) and error.code == "invalid_argument", str(error)
        else:
            raise AssertionError(f"taken, although {word}")
    scaler = torch.amp.GradScaler("cpu")
    scaler._scale = torch.ones(2)
    try:
        if rank == 0:
            thinwire.HookState(oracle.config, named_parameters=named, grad_scaler=scaler)
    except thinwire.Error as error:
        assert "one float32" in str(error) and error.code == "invalid_argument", str(error)
    ddp.register_comm_hook(thinwire.HookState(oracle.config, named_parameters=named), thinwire.hook)
    train(ddp, oracle, range(2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.a, self.b = nn.Linear(10, 10), nn.Linear(10, 10)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


@feature
def tied_and_frozen_parameters(rank: int, world: int) -> None:
    oracle = Oracle(world)
    module = nn.Sequential(Tied(), nn.Linear(10, 4))
    module[1].weight.requires_grad_(False)
    ddp = DistributedDataParallel(module)
    state = thinwire.attach(ddp, oracle.config)
    for step in range(3):
        loss = lambda m, step=step: loss_of(m, batch(rank, step))  # noqa: E731
        grads = local_grads(ddp.module, [loss])
        del grads["1.weight"]
        expected = oracle.step(everybody(grads))
        ddp.zero_grad()
        loss(ddp).backward()
        for name, value in expected.items():
            assert torch.equal(dict(ddp.module.named_parameters())[name].grad, value), name
    assert set(state.state_dict()["parameters"]) == {"0.a.weight", "0.a.bias", "0.b.bias", "1.bias"}


@feature
def copies(rank: int, world: int) -> None:
    oracle = Oracle(world)
    ddp = DistributedDataParallel(mlp(), bucket_cap_mb=0.002)
    state = thinwire.attach(ddp, oracle.config)
    train(ddp, oracle, range(3))
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), copy.deepcopy(copy.deepcopy(state))):
        assert other.step == 3 and other.config == state.config
        mine, theirs = state.state_dict(), other.state_dict()
        assert all(
            torch.equal(mine["parameters"][n][k], theirs["parameters"][n][k]) for n in mine["parameters"] for k in mine["parameters"][n]
        )
        for refused in (other.stats, other.flush, lambda other=other: other.load_state_dict(mine)):
            try:
                refused()
            except thinwire.Error as error:
                assert "copy" in str(error)
            else:
                raise AssertionError("a copy without a process group went on")
        other.close()
    twin = copy.deepcopy(ddp)  # torch keeps the hook's pair, but not the hook
    again = thinwire.attach(twin, oracle.config)
    again.load_state_dict(state.state_dict())
    twin_oracle = copy.deepcopy(oracle)
    train(twin, twin_oracle, range(3, 5))
    train(ddp, oracle, range(3, 5))
    assert again.step == state.step == 5


@feature
def resume_with_other_buckets(rank: int, world: int) -> None:
    def run(cap: float, steps: range, model: nn.Module, saved: Any) -> tuple[nn.Module, Any]:
        ddp = DistributedDataParallel(model, bucket_cap_mb=cap)
        state = thinwire.attach(ddp, "dgc:density=0.05 min_numel=0 exchange=gather timeout=60")
        if saved is not None:
            state.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))
        for step in steps:
            ddp.zero_grad()
            loss_of(ddp, batch(rank, step)).backward()
            with torch.no_grad():
                for p in ddp.parameters():
                    p.sub_(p.grad, alpha=0.1)
        file = io.BytesIO()
        torch.save(state.state_dict(), file)
        return ddp.module, file.getvalue()

    straight, last = run(0.002, range(10), mlp(), None)
    half, saved = run(0.002, range(5), mlp(), None)
    resumed, other_last = run(25, range(5, 10), half, saved)
    for a, b in zip(straight.parameters(), resumed.parameters()):
        assert torch.equal(a, b), "another bucket size changed the training"
    a, b = (torch.load(io.BytesIO(x), weights_only=True) for x in (last, other_last))
    assert a["step"] == b["step"] == 10
    assert all(torch.equal(a["parameters"][n][k], b["parameters"][n][k]) for n in a["parameters"] for k in a["parameters"][n])


@feature
def bad_checkpoints(rank: int, world: int) -> None:
    oracle = Oracle(world)
    ddp = DistributedDataParallel(mlp())
    state = thinwire.attach(ddp, oracle.config)
    train(ddp, oracle, range(2))
    good = state.state_dict()

    def broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        bad = copy.deepcopy(good)
        change(bad)
        return bad

    malformed: list[tuple[str, Any]] = [
        ("format", None), ("step", "x"), ("step", -1), ("step", 2**64), ("step", True), ("step", 1.5), ("step", None), ("world", "2"),
        ("world", 0), ("world", 2**31), ("rank", -1), ("rank", None), ("config", None), ("config", b"dgc"), ("started", 1),
        ("started", None), ("nonfinite_steps", "x"), ("nonfinite_steps", -1), ("parameters", None), ("parameters", []),
    ]  # fmt: skip
    cases = [
        (broken(lambda s: s["parameters"].pop("2.weight")), "2.weight"),
        (broken(lambda s: s["parameters"].update({"99.weight": {}})), "99.weight"),
        (broken(lambda s: s["parameters"]["2.weight"].pop("accumulated")), "accumulated"),
        (broken(lambda s: s["parameters"]["2.weight"].update(momentum=torch.zeros(3, 3))), "2.weight"),
        (broken(lambda s: s.pop("step")), "step"),
        (broken(lambda s: s.update(world=world + 1)), str(world + 1)),
        ([], "empty"),
        ([good] * (world + 1), "state"),
        ({"weights": 1}, "parameters"),
        (None, "NoneType"),
        ("state", "str"),
        ([good, None], "NoneType"),
        *((broken(lambda s, key=key, value=value: s.update({key: value})), key) for key, value in malformed),
        (broken(lambda s: s["parameters"].update({"2.weight": None})), "2.weight"),
        (broken(lambda s: s["parameters"].update({7: {}})), "7"),
        (broken(lambda s: s["parameters"]["2.weight"].update(momentum=[1.0])), "2.weight.momentum"),
        (broken(lambda s: s["parameters"]["2.weight"].update(momentum=torch.zeros(24, 24).to_sparse())), "2.weight.momentum"),
        (broken(lambda s: s["parameters"]["2.weight"].update(momentum=torch.zeros(24, 24, dtype=torch.complex64))), "2.weight.momentum"),
    ]
    for bad, word in cases:
        try:
            state.load_state_dict(bad)
        except thinwire.Error as error:
            assert word in str(error) and error.code == "invalid_argument", f"{word}: {error}"
        else:
            raise AssertionError(f"a state without {word} was taken")
    try:  # one rank's file alone is bad: the others do not go on with theirs, nor wait for it
        state.load_state_dict(broken(lambda s: s.update(step="x")) if rank == 0 else good)
    except thinwire.Error as error:
        assert error.code == "invalid_argument" and "step='x'" in str(error), str(error)
        assert rank == 0 or "rank 0 refused" in str(error), str(error)
    else:
        raise AssertionError("a state was taken that rank 0 refused")
    train(ddp, oracle, range(2, 4))  # nothing changed


@feature
def nan_on_one_rank(rank: int, world: int) -> None:
    oracle = Oracle(world)
    ddp = DistributedDataParallel(mlp())
    state = thinwire.attach(ddp, oracle.config)
    train(ddp, oracle, range(2))
    before = copy.deepcopy(state.state_dict()["parameters"])
    handle = ddp.module[4].weight.register_hook(lambda g: torch.full_like(g, torch.nan)) if rank == world - 1 else None
    ddp.zero_grad()
    loss_of(ddp, batch(rank, 2)).backward()
    if handle:
        handle.remove()
    assert all(torch.isnan(p.grad).all() for p in ddp.parameters()), "the whole bucket is NaN on every rank"
    after = state.state_dict()["parameters"]
    assert all(torch.isfinite(value).all() for arrays in after.values() for value in arrays.values()), "poisoned"
    assert state.stats()["nonfinite_steps"] == 1
    # Nothing lost: what was to be sent is back. v' = v + u' with u' = m·u + g before masking, g = 0 where it was not finite.
    local = local_grads(ddp.module, [lambda m: loss_of(m, batch(rank, 2))])
    for name, arrays in before.items():
        if "accumulated" not in arrays:
            continue
        g = torch.zeros_like(local[name]) if rank == world - 1 and name == "4.weight" else local[name]
        expected = arrays["accumulated"] + (0.5 * arrays["momentum"] + g)
        assert torch.equal(after[name]["accumulated"], expected), name
    ddp.zero_grad()
    loss_of(ddp, batch(rank, 3)).backward()
    assert all(torch.isfinite(p.grad).all() for p in ddp.parameters())
    replicas_equal(ddp)


@feature
def different_configs_are_refused(rank: int, world: int) -> None:
    ddp = DistributedDataParallel(mlp())
    density = 0.1 if rank == 0 else 0.2
    thinwire.attach(ddp, f"codec=topk:density={density} feedback=ef14 min_numel=0 timeout=20")
    for _ in range(2):  # and again: the error stays
        try:
            loss_of(ddp, batch(rank, 0)).backward()
        except thinwire.Error as error:
            assert error.code in ("invalid_argument", "invalid_config"), (error.code, str(error))
        else:
            raise AssertionError("two configurations in one group went on")


@feature
def flush_and_reset(rank: int, world: int) -> None:
    oracle = Oracle(world, kind="ef14", density=0.01)
    ddp = DistributedDataParallel(mlp())
    state = thinwire.attach(ddp, oracle.config)
    train(ddp, oracle, range(3))
    residuals = {name: r.v for r in [oracle.ranks[rank]] for name in r.v}
    assert residuals
    state.flush()
    grads = everybody(local_grads(ddp.module, [lambda m: loss_of(m, batch(rank, 3))]))
    ddp.zero_grad()
    loss_of(ddp, batch(rank, 3)).backward()
    for name, p in ddp.module.named_parameters():
        messages = [g[name] + r.v[name].reshape(p.shape) if name in r.v else g[name] for g, r in zip(grads, oracle.ranks)]
        # Gloo sums fp32 in an order of its own: world − 1 roundings and the product's.
        torch.testing.assert_close(
            p.grad, sum(messages) / world, rtol=0, atol=world * 2.0**-23 * float(max(m.abs().max() for m in messages))
        )
    held = state.state_dict()["parameters"]
    assert all(not arrays["residual"].any() for arrays in held.values() if "residual" in arrays), "the dense step left something behind"
    state.reset()
    assert state.stats()["payload_bytes"] == 0 and state.step == 4


@feature
def refusals(rank: int, world: int) -> None:
    def refused(word: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except thinwire.Error as error:
            assert word in str(error), f"expected {word!r} in: {error}"
        else:
            raise AssertionError(f"taken, although {word}")

    oracle = Oracle(world)
    ddp = DistributedDataParallel(mlp())
    dgc = thinwire.Config.parse(oracle.config)
    sgd, parameters = torch.optim.SGD, list(ddp.parameters())
    refused("no momentum", lambda: thinwire.attach(ddp, "codec=none", thinwire.optim.DGCSGD(parameters, 0.1)))
    refused("second time", lambda: thinwire.attach(ddp, dgc, sgd(parameters, 0.1, momentum=0.9)))
    refused("Adam", lambda: thinwire.attach(ddp, dgc, torch.optim.Adam(parameters)))
    refused("same", lambda: thinwire.attach(ddp, dgc, thinwire.optim.DGCSGD(parameters, 0.1, momentum=0.9, weight_decay=0.1)))
    refused("density", lambda: thinwire.attach(ddp, "dgc:density=2"))
    refused("DistributedDataParallel", lambda: thinwire.attach(ddp.module, dgc))
    refused("GradScaler", lambda: thinwire.attach(ddp, dgc, grad_scaler=type("Scaler", (), {"is_enabled": lambda self: True})()))
    refused("not a member", lambda: thinwire.HookState(dgc, process_group=dist.GroupMember.NON_GROUP_MEMBER))
    thinwire.attach(ddp, dgc, thinwire.optim.DGCSGD(parameters, 0.1, momentum=0.5, weight_decay=0.1))  # nothing had changed
    assert "thinwire" in ddp._get_ddp_logging_data()["comm_hook"]
    refused("already", lambda: thinwire.attach(ddp, dgc))
    train(ddp, oracle, range(2))
    hooked = DistributedDataParallel(mlp())
    hooked.register_comm_hook(None, lambda state, bucket: None)
    refused("already", lambda: thinwire.attach(hooked, dgc))
    builtin = DistributedDataParallel(mlp())
    builtin._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    try:
        thinwire.attach(builtin, dgc)
    except RuntimeError as error:
        assert "once" in str(error)
    else:
        raise AssertionError("a second hook was taken")
    loss_of(builtin, batch(rank, 0)).backward()
    wrong = DistributedDataParallel(mlp())
    names = [("only", next(wrong.parameters()))]
    wrong.register_comm_hook(thinwire.HookState(dgc, named_parameters=names), thinwire.hook)
    refused("among", lambda: loss_of(wrong, batch(rank, 0)).backward())
    extra = DistributedDataParallel(mlp())
    extra.register_comm_hook(
        thinwire.HookState(dgc, named_parameters=[*extra.named_parameters(), ("extra", nn.Parameter(torch.zeros(2, 2)))]), thinwire.hook
    )
    refused("named", lambda: loss_of(extra, batch(rank, 0)).backward())


@feature
def closing(rank: int, world: int) -> None:
    oracle = Oracle(world)
    ddp = DistributedDataParallel(mlp())
    state = thinwire.attach(ddp, oracle.config)
    train(ddp, oracle, range(2))
    before = (state.step, state.stats(), state.state_dict())
    state.close()
    state.close()
    held = state.state_dict()
    assert (state.step, state.stats()) == before[:2] and state.step == 2, "what was learnt is lost"
    for name, arrays in before[2]["parameters"].items():
        assert all(torch.equal(value, held["parameters"][name][key]) for key, value in arrays.items()), name
    assert copy.deepcopy(state).step == 2
    for change in (state.flush, state.reset, lambda: state.load_state_dict(held)):
        try:
            change()
        except thinwire.Error as error:
            assert "closed" in str(error) and error.code == "invalid_argument", str(error)
        else:
            raise AssertionError("a closed hook was changed")
    for _ in range(2):  # an error in the future, not in the engine: DDP stays usable
        try:
            loss_of(ddp, batch(rank, 0)).backward()
        except thinwire.Error as error:
            assert "closed" in str(error), str(error)
        else:
            raise AssertionError("a closed hook reduced")
    for _ in range(3):  # models come and go
        other = DistributedDataParallel(mlp())
        thinwire.attach(other, oracle.config)
        loss_of(other, batch(rank, 0)).backward()
        del other


@feature
def closing_while_a_peer_is_late(rank: int, world: int) -> None:
    ddp = DistributedDataParallel(mlp())
    state = thinwire.attach(ddp, Oracle(world).config)  # each call may take 60 seconds
    loss = loss_of(ddp, batch(rank, 0))
    if rank == world - 1:
        time.sleep(10)  # longer than close() waits for work under way
    errors: list[thinwire.Error] = []

    def backward() -> None:
        try:
            loss.backward()
        except thinwire.Error as error:
            errors.append(error)

    started = time.monotonic()
    thread = threading.Thread(target=backward)
    thread.start()
    if rank == 0:
        time.sleep(1)
        state.close()
    thread.join()
    assert errors, "a bucket was reduced without rank 0"
    assert time.monotonic() - started < 30, "close() waited for the deadline of a call that nobody will answer"
    assert errors[0].code in ("peer_lost", "transport"), errors[0].code


@feature
def forked_child(rank: int, world: int) -> None:
    oracle = Oracle(world)
    ddp = DistributedDataParallel(mlp())
    state = thinwire.attach(ddp, oracle.config)
    train(ddp, oracle, range(2))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            state.stats()
        except thinwire.Error as error:
            code = 0 if "forked" in str(error) else 2
        del ddp, state  # their destructors must not wait for threads that are not here
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    train(ddp, oracle, range(2, 4))


@feature
def codec_none_is_plain_ddp(rank: int, world: int) -> None:
    for kwargs in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
        plain = DistributedDataParallel(mlp(), bucket_cap_mb=0.002, **kwargs)
        ours = DistributedDataParallel(mlp(), bucket_cap_mb=0.002, **kwargs)
        state = thinwire.attach(ours, thinwire.Config(), torch.optim.SGD(ours.parameters(), 0.1, momentum=0.9))
        for step in range(4):
            for model in (plain, ours):
                model.zero_grad()
                loss_of(model, batch(rank, step)).backward()
            for a, b in zip(plain.parameters(), ours.parameters()):
                # DDP divides before the sum, we after it: equal bits where 1/N is a power of two, else a rounding per rank.
                torch.testing.assert_close(
                    a.grad, b.grad, rtol=0, atol=0 if world in (1, 2, 4) else (world + 1) * 2.0**-23 * float(a.grad.abs().max())
                )
        assert state.stats()["factor"] == 1.0


@feature
def elastic_4_2_4(rank: int, world: int) -> None:
    if world != 4:
        return
    config = "dgc:density=0.05 min_numel=0 exchange=gather timeout=60"

    def run(group: dist.ProcessGroup | None, model: nn.Module, steps: range, states: Any) -> tuple[Any, Any]:
        ddp = DistributedDataParallel(model, process_group=group)
        state = thinwire.attach(ddp, config)
        if states is not None:
            state.load_state_dict(states)
        loaded = state.state_dict()
        for step in steps:
            ddp.zero_grad()
            loss_of(ddp, batch(rank, step)).backward()
            with torch.no_grad():
                for p in ddp.parameters():
                    p.sub_(p.grad, alpha=0.1)
        return loaded, state.state_dict()

    model = mlp()
    _, saved = run(None, model, range(4), None)
    four = everybody(saved)
    pair = dist.new_group([0, 1])
    two: list[Any] = [None, None]
    if rank < 2:
        loaded, saved = run(pair, model, range(4, 8), four)
        for name, arrays in loaded["parameters"].items():
            for key, value in arrays.items():
                mean = sum(s["parameters"][name][key].double() for s in four) / 4
                assert value.any(), f"{name}.{key}: all zero proves nothing"
                torch.testing.assert_close(value.double(), mean, rtol=2.0**-23, atol=0)
        dist.all_gather_object(two, saved, group=pair)
    dist.barrier()
    dist.broadcast_object_list(two, src=0)
    for p in model.parameters():
        dist.broadcast(p.data, 0)
    loaded, saved = run(None, model, range(8, 10), two)
    for name, arrays in loaded["parameters"].items():
        for key, value in arrays.items():
            torch.testing.assert_close(value.double(), sum(s["parameters"][name][key].double() for s in two) / 2, rtol=2.0**-23, atol=0)
    assert saved["step"] == 10
    replicas_equal(model)
    try:
        run(None, mlp(), range(0), two[0])
    except thinwire.Error as error:
        assert "2" in str(error)
    else:
        raise AssertionError("one state of another world size was taken")


def main() -> None:
    rank, world, folder, chosen = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    results: dict[str, str] = {}
    file = folder / f"rank{rank}.json"
    for name in chosen or FEATURES:
        try:
            FEATURES[name](rank, world)
            results[name] = "ok"
        except BaseException:
            results[name] = traceback.format_exc()
        file.write_text(json.dumps(results))
        if results[name] != "ok":
            print(f"{name}\n{results[name]}", flush=True)
            os._exit(1)  # the others meet a closed connection instead of waiting for this rank
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
