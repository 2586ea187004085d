"""Features of DDP and kinds of models: buckets, graphs, accumulation, join, sparse and 16-bit gradients, several models, compilation."""

from __future__ import annotations

import copy
import pickle

import torch
import torch.distributed as dist
from ddp_training import batch, everybody, feature, local_grads, loss_of, mlp, replicas_equal, same, train
from oracle import Oracle
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire


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


class Large(nn.Module):
    """A matrix half of which makes contributions of 300 kB, and a vector that stays dense beside it with 80 kB: what small models do not
    reach, Gloo's own all-gather (with three ranks) and the all-to-all to owners."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.w = nn.Parameter(torch.randn(200, 700))
        self.v = nn.Parameter(torch.randn(20000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = x.mean()
        return torch.stack([torch.sin(self.w * (1 + s)).mean(), torch.sin(self.v * (2 + s)).mean()])


@feature
def large_contributions(rank: int, world: int) -> None:
    for density, dtype in ((0.5, torch.float32), (0.05, torch.bfloat16)):
        oracle = Oracle(world, density=density)
        ddp = DistributedDataParallel(Large().to(dtype))
        state = thinwire.attach(ddp, oracle.config)
        train(ddp, oracle, range(2))
        stats = state.stats()["parameters"]
        assert stats["w"]["compressed"] and not stats["v"]["compressed"], stats
        state.close()


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


@feature
def join_calls_the_hook_outside_of_a_backward_pass(rank: int, world: int) -> None:
    """By this the hook knows a rank that has run out of data."""
    for options in ({}, {"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}):
        ddp = DistributedDataParallel(mlp(), bucket_cap_mb=0.002, **options)
        calls: list[tuple[bool, bool]] = []

        def hook(state, bucket, calls=calls):  # noqa: ANN001, ANN202: torch wants annotations as objects, or none
            calls.append((torch._C._current_graph_task_id() == -1, not bucket.buffer().any()))
            return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

        ddp.register_comm_hook(None, hook)
        with ddp.join(divide_by_initial_world_size=True):
            for step in range(3 + rank):
                loss_of(ddp, batch(rank, step)).backward()
            own = len(calls)
        assert own > 0 and set(calls[:own]) == {(False, False)}, (options, calls)
        assert (len(calls) > own) == (rank < world - 1) and set(calls[own:]) <= {(True, True)}, (options, calls)


class Given(nn.Module):
    """Its gradients are what it is given, times the loss scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.a, self.b = nn.Parameter(torch.randn(40, 16)), nn.Parameter(torch.randn(24, 16))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (self.a * a).sum() + (self.b * b).sum()


@feature
def a_bucket_of_zeros_is_a_gradient(rank: int, world: int) -> None:
    """In a backward pass a rank has data, whatever its gradients: what comes out does not depend on what shares a bucket with them."""
    for zero_on in ([world - 1], range(world)):
        for config in (
            "codec=sign:block=64 feedback=ef14 min_numel=1",
            "onebit_adam:freeze=2,block=64 min_numel=1",
            "dgc:density=0.1,select=exact min_numel=1 exchange=gather",
        ):
            ends = []
            for bucket_mb in (25, 0.001):
                ddp = DistributedDataParallel(Given(), bucket_cap_mb=bucket_mb)
                if config.startswith("onebit"):
                    optimizer: torch.optim.Optimizer = thinwire.optim.OneBitAdam(ddp.parameters(), lr=0.01)
                else:
                    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
                state = thinwire.attach(ddp, config, optimizer)
                said = []
                for step in range(9):
                    torch.manual_seed(50 * step + rank)
                    # Small whole numbers: dense sums are exact in any order.
                    a, b = torch.randint(-8, 9, (40, 16)).float(), torch.randint(-8, 9, (24, 16)).float()
                    optimizer.zero_grad()
                    ddp(a, torch.zeros_like(b) if step >= 5 and rank in zero_on else b).backward()
                    said.append(ddp.module.b.grad.clone())
                    optimizer.step()
                ends.append((said, state.state_dict()["parameters"]["b"]))
            for step, (one, other) in enumerate(zip(*(said for said, _ in ends))):
                assert torch.equal(one, other), f"{config}: step {step} depends on the buckets"
            for name, array in ends[0][1].items():
                assert torch.equal(array, ends[1][1][name]), f"{config}: {name} depends on the buckets"


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
