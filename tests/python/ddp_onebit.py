"""Features that concern 1-bit Adam: values and states of the hook and its optimizer. The freeze is in ddp_onebit_freeze.py."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import torch
import torch.distributed as dist
from ddp_training import batch, everybody, feature, local_grads, loss_of, mlp, replicas_equal
from onebit_training import CONFIG, LR, compressed, everywhere, once, pair, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire


@feature
def onebit_adam_equations(rank: int, world: int) -> None:
    """Before the freeze torch's AdamW on the mean gradient, to the bit; after it the momentum is what replay makes of this group's messages,
    and the update is the equation's."""
    ddp, optimizer, state = pair(floor=0.5)  # high, so that it raises some of this small network's
    reference = copy.deepcopy(ddp.module)
    adam = torch.optim.AdamW(reference.parameters(), lr=LR, weight_decay=0.1)
    steps, freeze = 7, 3
    names = [name for name, _ in ddp.module.named_parameters()]
    messages: dict[str, list[torch.Tensor]] = {}
    momentum: dict[str, torch.Tensor] = {}
    frozen: dict[str, torch.Tensor] = {}
    one = np.float32(1)
    beta = np.float32(0.9)
    for step in range(steps):
        x = batch(rank, step)
        local = local_grads(ddp.module, [lambda m: loss_of(m, x)])
        optimizer.zero_grad()
        loss_of(ddp, x).backward()
        which = compressed(state)
        assert which == {name for name in names if name.endswith("weight")}
        assert state.stats()["frozen"] == (step >= freeze)
        grads = {name: p.grad.clone() for name, p in ddp.module.named_parameters()}
        if step >= freeze:
            for name in sorted(which):
                message = momentum[name] * beta.item() + local[name] * float(one - beta)
                messages.setdefault(name, []).append(torch.stack(everybody(message)))
            stacked = {name: torch.stack(rounds) for name, rounds in messages.items()}
            expected = thinwire.replay("codec=sign:block=64 feedback=ef14 min_numel=1", stacked)
            for name in sorted(which):
                assert torch.equal(grads[name], expected.mean[name][-1]), f"step {step}: {name}'s momentum"
                momentum[name] = grads[name]
        optimizer.step()
        for name, p in reference.named_parameters():
            p.grad = None if step >= freeze and name in which else grads[name].clone()
        adam.step()
        t = step + 1
        for name, p in reference.named_parameters():
            if step == freeze - 1:
                momentum[name] = adam.state[p]["exp_avg"].clone()
                v = adam.state[p]["exp_avg_sq"]
                least = (v.sqrt().double().mean() * 0.5).square().float()
                assert 0 < int((v < least).sum()) < v.numel() or name != "0.weight", "the floor is not tested"
                frozen[name] = (torch.where(v > 0, torch.maximum(v, least), v).sqrt() / (1 - 0.999**t) ** 0.5).add_(1e-8)
            if step >= freeze and name in which:
                with torch.no_grad():
                    p.mul_(1 - LR * 0.1).addcdiv_(grads[name], frozen[name], value=-LR / (1 - 0.9**t))
        for (name, p), q in zip(ddp.module.named_parameters(), reference.parameters()):
            assert torch.equal(p, q), f"step {step}: {name}"
    said = state.stats()
    assert said["freeze"]["step"] == freeze and said["freeze"]["reason"] == "freeze=3"
    assert 0 < said["freeze"]["max_update"] < 20
    assert said["parameters"]["0.weight"]["momentum_norm"] > 0
    held = state.state_dict()["parameters"]["0.weight"]["server_residual"]
    assert abs(said["parameters"]["0.weight"]["server_residual_norm"] - float(held.norm())) <= 1e-6 * float(held.norm())
    residual, m = (state.state_dict()["parameters"]["2.weight"][name].double().norm() for name in ("residual", "momentum"))
    assert abs(said["parameters"]["2.weight"]["residual_over_momentum"] - float(residual / m)) <= 1e-9 * float(residual / m) > 0
    assert "residual_over_momentum" not in said["parameters"]["0.bias"]
    replicas_equal(ddp)


@feature
def onebit_adam_masks_dead_inputs(rank: int, world: int) -> None:
    """A coordinate whose frozen variance is 0 never moves, though one bit cannot send its zero."""
    ddp, optimizer, state = pair()

    def step(i: int) -> None:
        x = batch(rank, i)
        x[:, 3:5] = 0  # two inputs that are never on
        optimizer.zero_grad()
        loss_of(ddp, x).backward()
        dead = ddp.module[0].weight.grad[:, 3:5]
        assert not dead.any(), dead
        optimizer.step()

    before = ddp.module[0].weight[:, 3:5].detach().clone()
    for i in range(30):
        step(i)
    assert state.stats()["frozen"]
    assert all(torch.isfinite(p).all() for p in ddp.parameters())
    assert torch.allclose(ddp.module[0].weight[:, 3:5], before * (1 - LR * 0.1) ** 30, rtol=1e-5, atol=0)
    replicas_equal(ddp)


@feature
def onebit_adam_resumes(rank: int, world: int) -> None:
    """Both state_dicts, through a file, before and after the freeze: the same bits as without the break."""
    # Dense steps of three ranks have other bits in other buckets, which a resumed run has at first: Gloo's sum goes its own ways.
    for break_at in (2, 5) if world == 2 else (5,):
        ddp, optimizer, state = pair()
        run(ddp, optimizer, rank, range(break_at))
        file = io.BytesIO()
        torch.save({"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict(), "hook": state.state_dict()}, file)
        run(ddp, optimizer, rank, range(break_at, 9))
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model = mlp(seed=7)
        model.load_state_dict(saved["model"])
        again, other, hook = pair(model=model)
        if break_at == 5:
            hook.load_state_dict(saved["hook"])
            other.load_state_dict(saved["optimizer"])
        else:  # in either order
            other.load_state_dict(saved["optimizer"])
            hook.load_state_dict(saved["hook"])
        run(again, other, rank, range(break_at, 9))
        for p, q in zip(ddp.parameters(), again.parameters()):
            assert torch.equal(p, q), f"broken off at {break_at}"
        names = {"momentum", "residual", "server_residual"}
        assert set(hook.state_dict()["parameters"]["2.weight"]) == names
        assert hook.state_dict()["parameters"]["2.weight"]["server_residual"].dim() == 1


@feature
def onebit_adam_grad_scaler(rank: int, world: int) -> None:
    """An overflow on one rank: nobody steps, and nothing is lost. Powers of two, so that scaled and plain training are the same bits."""
    ends = []
    for scaled in (False, True):
        ddp = DistributedDataParallel(mlp(), bucket_cap_mb=0.002)
        optimizer = thinwire.optim.OneBitAdam(ddp.parameters(), lr=LR)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3) if scaled else None
        state = thinwire.attach(ddp, CONFIG, optimizer, grad_scaler=scaler)
        for step in range(8):
            optimizer.zero_grad()
            loss = loss_of(ddp, batch(rank, step))
            if scaler is None:
                loss.backward()
                optimizer.step()
                continue
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert state.stats()["frozen"]
        ends.append([p.detach().clone() for p in ddp.parameters()])
        if scaler is None:
            continue
        before, kept = [p.detach().clone() for p in ddp.parameters()], state.state_dict()
        optimizer.zero_grad()
        handle = ddp.module[2].weight.register_hook(lambda g: g * float("inf") if rank == 0 else g)
        scaler.scale(loss_of(ddp, batch(rank, 50))).backward()
        handle.remove()
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(a, b) for a, b in zip(before, ddp.parameters())), "an optimizer step was taken"
        after = state.state_dict()
        for name, arrays in kept["parameters"].items():
            if "momentum" in arrays:
                assert torch.equal(arrays["momentum"], after["parameters"][name]["momentum"]), name
        assert state.stats()["nonfinite_steps"] == 1
        replicas_equal(ddp)
    assert all(torch.equal(a, b) for a, b in zip(*ends))


class Same(nn.Module):
    """Every element's gradient is 1."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.w = nn.Parameter(torch.randn(32, 32, dtype=dtype))

    def forward(self) -> torch.Tensor:
        return self.w.sum()


@feature
def onebit_adam_momentum_without_a_rank(rank: int, world: int) -> None:
    """A rank without data goes on owing its beta1·m: the momentum decays to the mean of those that have data, with zeros of those that have
    none."""
    ddp, optimizer, state = pair(model=Same())
    steps, m = 40, 0.0
    with ddp.join():
        for step in range(12 if rank == 0 else steps):
            optimizer.zero_grad()
            ddp().backward()
            if state.stats()["frozen"]:
                m = 0.9 * m + 0.1 * (1 if step < 12 else (world - 1) / world)
                got = ddp.module.w.grad
                assert torch.allclose(got, torch.full_like(got, m), rtol=1e-4), f"step {step}: {got.mean()}, not {m}"
            optimizer.step()
            m = 1 - 0.9 ** (step + 1) if step < 3 else m
    assert state.step == steps
    replicas_equal(ddp)


class Mixed(nn.Module):
    """fp64 weights, with or without fp32 ones beside them."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.wide = mlp(dtype=torch.float64)
        self.narrow = mlp(seed=2) if beside else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.wide(x.double())
        return out if self.narrow is None else out + self.narrow(x)


@feature
def onebit_adam_leaves_fp64_to_adam(rank: int, world: int) -> None:
    """What the hook passes through comes back as its mean gradient, before the freeze and after it."""
    for beside in (False, True):
        ddp, optimizer, state = pair(model=Mixed(beside))
        reference = copy.deepcopy(ddp.module.wide)
        adam = torch.optim.AdamW(reference.parameters(), lr=LR, weight_decay=0.1)
        for step in range(8):
            optimizer.zero_grad()
            loss_of(ddp, batch(rank, step)).backward()
            optimizer.step()
            for p, q in zip(reference.parameters(), ddp.module.wide.parameters()):
                p.grad = q.grad.clone()
            adam.step()
            assert all(torch.equal(p, q) for p, q in zip(reference.parameters(), ddp.module.wide.parameters())), f"step {step}"
        stats = state.stats()
        assert stats["frozen"] == optimizer.frozen == beside
        assert stats["parameters"]["wide.0.weight"]["reason"] == "dtype Double"
        replicas_equal(ddp)


@feature
def onebit_adam_outlives_its_hook(rank: int, world: int) -> None:
    """An attach that failed and a hook that was closed leave the optimizer free for the next one; frozen, it does not step without."""
    model = mlp()
    optimizer = thinwire.optim.OneBitAdam(model.parameters(), lr=LR, weight_decay=0.1)
    taken = DistributedDataParallel(model)
    taken._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    try:
        thinwire.attach(taken, CONFIG, optimizer)
        raise AssertionError("two hooks on one model")
    except RuntimeError:
        assert optimizer._hook is None
    run(taken, optimizer, rank, range(1))

    ddp = DistributedDataParallel(model)
    state = thinwire.attach(ddp, CONFIG, optimizer)
    run(ddp, optimizer, rank, range(1, 6))
    kept = state.state_dict()
    state.close()
    everywhere("is frozen and has no hook", optimizer.step)
    again = DistributedDataParallel(model)
    thinwire.attach(again, CONFIG, optimizer).load_state_dict(kept)
    run(again, optimizer, rank, range(6, 8))
    replicas_equal(again)


@feature
def onebit_adam_says_unusual_updates(rank: int, world: int) -> None:
    """A tensor whose gradients come after the freeze: its updates are beyond Adam's by far, and one warning says so with numbers."""
    ddp, optimizer, state = pair("onebit_adam:freeze=2,block=64 min_numel=1 timeout=60", floor=0)
    optimizer.param_groups[0]["lr"] = 1e-8  # the network is to survive it
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(18):
            optimizer.zero_grad()
            (loss_of(ddp, batch(rank, step)) * (1e-4 if step < 2 else 1.0)).backward()
            optimizer.step()
    once(rank, said, "times the learning rate", "frozen at step 2")
    assert state.stats()["freeze"]["max_update"] > 20
    assert dist.get_rank() == rank


@feature
def onebit_adam_keeps_the_betas_of_the_freeze(rank: int, world: int) -> None:
    """Whoever changes them is told once that the hook's and those of the frozen v stay, and they do: also in a run that goes on from a checkpoint."""
    def begin() -> tuple[nn.Module, thinwire.optim.OneBitAdam, thinwire.HookState]:
        torch.manual_seed(1)
        weights = nn.Sequential(nn.Linear(10, 24, bias=False), nn.Tanh(), nn.Linear(24, 4, bias=False))  # biases are AdamW's, which follows
        return pair("onebit_adam:freeze=2,block=64 min_numel=1 timeout=60", weights)
    def trained(cycles: bool, cut: bool, older: bool = False) -> list[torch.Tensor]:
        ddp, optimizer, state = begin()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for step in range(8):
                if cycles and step >= 2:
                    optimizer.param_groups[0]["betas"] = (0.9 - 0.01 * step, 0.999 - 0.02 * step)
                if cut and step == 5:
                    kept, ours = optimizer.state_dict(), state.state_dict()
                    weights = ddp.module.state_dict()
                    for one in kept["state"].values() if older else ():
                        del one["beta1"], one["beta2"]
                    ddp, optimizer, state = begin()
                    ddp.module.load_state_dict(weights)
                    optimizer.load_state_dict(kept)
                    state.load_state_dict(ours)
                run(ddp, optimizer, rank, range(step, step + 1))
        if cycles and not cut:
            once(rank, said, "beta1 of parameter group 0 is 0.88 now and was 0.9", "cycle_momentum=False")
            once(rank, said, "beta2 of parameter group 0 is 0.959 now and was 0.999", "corrected by that of 0.999")
        elif not cycles:
            assert not [w for w in said if "parameter group" in str(w.message)], [str(w.message) for w in said]
        return [p.detach().clone() for p in ddp.parameters()]
    plain = trained(cycles=False, cut=False)
    for cut in (False, True):
        assert all(torch.equal(a, b) for a, b in zip(plain, trained(cycles=True, cut=cut), strict=True)), f"cut={cut}"
    assert all(torch.equal(a, b) for a, b in zip(plain, trained(cycles=False, cut=True, older=True), strict=True)), "a state without them takes the group's"


@feature
def onebit_adam_largest_update(rank: int, world: int) -> None:
    """max_update is the largest of all steps since the freeze: one large gradient among others is seen."""
    ddp, optimizer, state = pair("onebit_adam:freeze=18,block=64 min_numel=1 timeout=60")
    largest = 0.0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(40):
            optimizer.zero_grad()
            (loss_of(ddp, batch(rank, step)) * (2000 if step == 34 else 1)).backward()
            optimizer.step()
            for name in sorted(compressed(state)) if step >= 18 else ():
                p = ddp.module.get_parameter(name)
                v, t = optimizer.state[p]["exp_avg_sq"], step + 1
                largest = max(largest, float((p.grad / ((v.sqrt() / (1 - 0.999**18) ** 0.5) + 1e-8)).abs().max()) / (1 - 0.9**t))
            if step >= 18:
                assert abs(state.stats()["freeze"]["max_update"] - largest) <= 1e-5 * largest, f"step {step}"
    assert largest > 20
    once(rank, said, "times the learning rate by step 35")


@feature
def onebit_adam_floor_of_a_state_of_one_rank(rank: int, world: int) -> None:
    """Frozen where m was exact, loaded where it is ± a scale: the variances get their floor there, once."""
    groups = [dist.new_group([r]) for r in range(world)]
    torch.manual_seed(3)
    rare = torch.rand(24, 10) < 0.1
    alone = DistributedDataParallel(nn.Linear(10, 24, bias=False), process_group=groups[rank])

    def train(ddp: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            torch.manual_seed(step)
            noise = torch.randn(24, 10)
            (ddp(torch.eye(10)) * torch.where(rare, noise * 1e-4, noise).T).sum().backward()
            optimizer.step()

    optimizer = thinwire.optim.OneBitAdam(alone.parameters(), lr=LR)
    state = thinwire.attach(alone, CONFIG, optimizer)
    train(alone, optimizer, range(4))
    frozen, held = copy.deepcopy(optimizer.state_dict()), state.state_dict()
    v = frozen["state"][0]["exp_avg_sq"]
    least = (v.sqrt().double().mean() * 0.05).square().float()
    assert int((v < least).sum()) > 0, "nothing is below the floor"
    for before in (False, True):
        ddp = DistributedDataParallel(copy.deepcopy(alone.module))
        again = thinwire.optim.OneBitAdam(ddp.parameters(), lr=LR)
        if before:
            again.load_state_dict(frozen)
        hook = thinwire.attach(ddp, CONFIG, again)
        if not before:
            again.load_state_dict(frozen)
        hook.load_state_dict([held])
        assert torch.equal(frozen["state"][0]["exp_avg_sq"], v), "the checkpoint itself was changed"
        (p,) = again.state
        assert torch.equal(again.state[p]["exp_avg_sq"], torch.maximum(v, least))
        train(ddp, again, range(4, 6))
        replicas_equal(ddp)
        raised = copy.deepcopy(again.state_dict())
        again.load_state_dict(raised)
        assert torch.equal(again.state[p]["exp_avg_sq"], torch.maximum(v, least)), "raised twice"
