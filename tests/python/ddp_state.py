"""Features that concern state: checkpoints, copies, other world sizes, flush and reset, grad scalers, tied parameters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ddp_training import batch, everybody, feature, local_grads, loss_of, mlp, replicas_equal, train
from ddp_models import Words
from oracle import Oracle
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire


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
def estimates_resume(rank: int, world: int) -> None:
    """EControl with an eta that is watched: H made anew, a flush that is ahead and what the watchdog waits for go through a file. A dense step
    is Gloo's sum, whose order is that of the buckets: with three ranks there is none."""
    def run(cap: float, steps: range, model: nn.Module, saved: bytes | None, cut: int = -1) -> tuple[nn.Module, bytes]:
        ddp = DistributedDataParallel(model, bucket_cap_mb=cap)
        state = thinwire.attach(ddp, "codec=topk:density=0.1 feedback=econtrol:eta=0.9,init=compressed min_numel=0 exchange=gather timeout=60")
        if saved is not None:
            state.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))
        for step in steps:
            if step == cut:
                state.resynchronize()
                assert state.stats()["resync_error"] < 1e-5
                if world == 2:
                    state.flush()
            ddp.zero_grad()
            loss_of(ddp, batch(rank, step)).backward()
            with torch.no_grad():
                for p in ddp.parameters():
                    p.sub_(p.grad, alpha=0.01)
        if steps.stop == cut:
            state.resynchronize()
            if world == 2:
                state.flush()
        file = io.BytesIO()
        torch.save(state.state_dict(), file)
        return ddp.module, file.getvalue()

    straight, last = run(0.002, range(60), mlp(), None, cut=30)
    half, saved = run(0.002, range(30), mlp(), None, cut=30)
    resumed, other_last = run(25, range(30, 60), half, saved)
    for a, b in zip(straight.parameters(), resumed.parameters()):
        assert torch.equal(a, b), "the checkpoint left a trace"
    at, a, b = (torch.load(io.BytesIO(x), weights_only=True) for x in (saved, last, other_last))
    assert at.get("flush", False) == (world == 2) and "flush" not in a and a["watchdog"] == b["watchdog"]
    assert any(was["since"] > 0 for was in at["watchdog"].values()), "no window was under way"
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
        ("flush", 1), ("lr", 0.1), ("lr", {"2.weight": "x"}), ("lr", {"2.weight": 0.0}), ("watchdog", []), ("watchdog", {"2.weight": 0.1}),
        ("watchdog", {"2.weight": {"eta": "x", "since": 0, "ratio": 0.0, "recent": 0.0, "grad": 0.0, "grown": 0, "cuts": 0}}),
        ("watchdog", {"2.weight": {"eta": 0.1, "since": 0.5, "ratio": 0.0, "recent": 0.0, "grad": 0.0, "grown": 0, "cuts": 0}}),
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
