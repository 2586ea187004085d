"""Features that concern 1-bit Adam: the hook and its optimizer before, at and after the freeze."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ddp_training import batch, everybody, feature, local_grads, loss_of, mlp, replicas_equal
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import thinwire

CONFIG = "onebit_adam:freeze=3,block=64 min_numel=1 timeout=60"
LR = 0.01


def run(ddp: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()


def pair(config: str = CONFIG, model: nn.Module | None = None, **keys: Any) -> tuple[nn.Module, thinwire.optim.OneBitAdam, thinwire.HookState]:
    ddp = DistributedDataParallel(mlp() if model is None else model, bucket_cap_mb=0.002)
    optimizer = thinwire.optim.OneBitAdam(ddp.parameters(), lr=LR, weight_decay=0.1, **keys)
    return ddp, optimizer, thinwire.attach(ddp, config, optimizer)


def once(rank: int, said: list[warnings.WarningMessage], *words: str) -> None:
    """One rank speaks for all, once, and of the line that took the step."""
    found = [w for w in said if words[0] in str(w.message)]
    assert len(found) == (1 if rank == 0 else 0), [str(w.message) for w in said]
    for w in found:
        assert all(word in str(w.message) for word in words), f"{words} not all in {w.message}"
        assert w.filename == __file__, f"{w.filename}:{w.lineno}"


def compressed(state: thinwire.HookState) -> set[str]:
    return {name for name, one in state.stats()["parameters"].items() if not one["reason"].startswith("fewer")}


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
def onebit_adam_freezes_by_itself(rank: int, world: int) -> None:
    """freeze=auto: when the variance is stable, not before; on all ranks at the same step."""
    ddp = DistributedDataParallel(nn.Linear(10, 64, bias=False))
    optimizer = thinwire.optim.OneBitAdam(ddp.parameters(), lr=1e-4, betas=(0.9, 0.95))
    state = thinwire.attach(ddp, "onebit_adam:block=64 min_numel=1", optimizer)
    when = None
    for step in range(400):
        torch.manual_seed(step * 100 + rank)
        optimizer.zero_grad()
        # Noise that grows for 200 steps and stays as it is from then on: a one-sided test would freeze at once.
        (ddp(torch.randn(64, 10)) * torch.randn(64, 64)).mean().mul(min(1.0, (step + 1) / 200)).backward()
        optimizer.step()
        if optimizer.frozen:
            when = step + 1
            break
    assert when is not None, "never froze"
    assert when % 20 == 0 and when > 200, when
    assert len(set(everybody(when))) == 1
    assert "the variance changed by" in state.stats()["freeze"]["reason"]


@feature
def onebit_adam_freezes_by_itself_between_several_backward_passes(rank: int, world: int) -> None:
    """Three synchronised passes to a step: no multiple of 20 but every third is a step of the optimizer, and v moves a third as fast."""
    ddp = DistributedDataParallel(nn.Linear(10, 64, bias=False))
    optimizer = thinwire.optim.OneBitAdam(ddp.parameters(), lr=1e-4, betas=(0.9, 0.95))
    state = thinwire.attach(ddp, "onebit_adam:block=64 min_numel=1 timeout=60", optimizer)
    for step in range(300):
        optimizer.zero_grad()
        for part in range(3):
            torch.manual_seed(1000 * step + 10 * part + rank)
            (ddp(torch.randn(64, 10)) * torch.randn(64, 64)).mean().backward()
        optimizer.step()
        if optimizer.frozen:
            break
    when = state.stats()["freeze"]
    assert optimizer.frozen and when["step"] % 20 < 16 and when["step"] % 3 == 0, when
    assert len(set(everybody(when["step"]))) == 1
    assert any(f"over {steps} steps" in when["reason"] for steps in range(15, 26)), when["reason"]
    optimizer.zero_grad()
    ddp(torch.randn(64, 10)).mean().backward()
    optimizer.step()
    assert state.stats()["frozen"]
    replicas_equal(ddp)


@feature
def onebit_adam_freezes_at_the_latest_and_warns_of_a_warm_up(rank: int, world: int) -> None:
    ddp, optimizer, state = pair("onebit_adam:block=64 min_numel=1 timeout=60", not_after=6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(8):
            optimizer.param_groups[0]["lr"] = LR * (step + 1) / 8
            run(ddp, optimizer, rank, range(step, step + 1))
            assert optimizer.frozen == (step >= 5)
    assert state.stats()["freeze"]["reason"] == "not_after=6"
    once(rank, said, "the learning rate last rose 0 steps before", "frozen at step 6", "not_before")


@feature
def onebit_adam_warns_of_a_warm_up_that_v_remembers(rank: int, world: int) -> None:
    """A rate that rises epoch by epoch, and a rise before a checkpoint: v at the freeze is of rates that are gone."""
    for last_rise, resumed in ((8, False), (8, True), (4, False)):
        ddp, optimizer, state = pair("onebit_adam:freeze=15,block=64 min_numel=1 timeout=60", betas=(0.9, 0.9))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for step in range(16):
                if resumed and step == 11:
                    hook, numbers, model = state.state_dict(), optimizer.state_dict(), ddp.module
                    state.close()
                    ddp, optimizer, state = pair("onebit_adam:freeze=15,block=64 min_numel=1 timeout=60", model, betas=(0.9, 0.9))
                    state.load_state_dict(hook)
                    optimizer.load_state_dict(numbers)
                optimizer.param_groups[0]["lr"] = LR * (1 + (step >= last_rise))
                run(ddp, optimizer, rank, range(step, step + 1))
        assert state.stats()["freeze"]["step"] == 15
        if last_rise == 8:
            once(rank, said, "the learning rate last rose 6 steps before; v remembers 1/(1 - beta2) = 10 steps")
        else:
            assert not [w for w in said if "learning rate" in str(w.message)], [str(w.message) for w in said]


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


def error_of(call: Any) -> str:
    try:
        call()
    except thinwire.Error as error:
        return str(error)
    return "nothing was refused"


def everywhere(words: str, call: Any) -> None:
    """Every rank is refused, with these words."""
    said = everybody(error_of(call))
    assert all(words in one for one in said), f"{words!r} not in all of {said}"


def frozen_states(rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    ddp, optimizer, state = pair()
    run(ddp, optimizer, rank, range(5))
    states = state.state_dict(), optimizer.state_dict()
    state.close()
    return states


@feature
def onebit_adam_one_state_forgotten(rank: int, world: int) -> None:
    """A frozen half beside one that is not would take gradients for momenta, or the reverse."""
    hook_state, optimizer_state = frozen_states(rank)
    ddp, optimizer, state = pair()
    state.load_state_dict(hook_state)
    before = [p.detach().clone() for p in ddp.parameters()]
    everywhere("load the optimizer's state_dict() as well", lambda: run(ddp, optimizer, rank, range(5, 6)))
    assert all(torch.equal(a, b) for a, b in zip(before, ddp.parameters()))

    ddp, optimizer, state = pair()
    optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    everywhere("load the hook's state_dict() as well", lambda: run(ddp, optimizer, rank, range(5, 6)))

    ends = []
    for forget in (True, False):  # loaded before attach
        ddp = DistributedDataParallel(mlp(), bucket_cap_mb=0.002)
        optimizer = thinwire.optim.OneBitAdam(ddp.parameters(), lr=LR, weight_decay=0.1)
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))
        state = thinwire.attach(ddp, CONFIG, optimizer)
        if forget:
            everywhere("load the hook's state_dict() as well", lambda: run(ddp, optimizer, rank, range(5, 6)))
            continue
        state.load_state_dict(hook_state)
        run(ddp, optimizer, rank, range(5, 8))
        ends.append([p.detach().clone() for p in ddp.parameters()])
    ddp, optimizer, state = pair()  # and after it
    optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    state.load_state_dict(hook_state)
    run(ddp, optimizer, rank, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ddp.parameters()))


@feature
def onebit_adam_ranks_load_different_states(rank: int, world: int) -> None:
    """What would make ranks wait for each other in different collectives, or hold different masks, is an error on all of them."""
    hook_state, optimizer_state = frozen_states(rank)
    ddp = DistributedDataParallel(mlp(), bucket_cap_mb=0.002)
    optimizer = thinwire.optim.OneBitAdam(ddp.parameters(), lr=LR)
    if rank == 0:
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    thinwire.attach(ddp, CONFIG, optimizer)
    everywhere("rank 1 and rank 0 have different optimizers: ", lambda: run(ddp, optimizer, rank, range(1)))

    for value, words in ((11, "frozen since step 3"), ("x", "frozen='x' is not a step"), (-5, "frozen=-5 is not a step"), (True, "frozen=True")):
        ddp, optimizer, state = pair()
        wrong = {**hook_state, "frozen": value} if rank == 1 else hook_state
        everywhere(words, lambda state=state, wrong=wrong: state.load_state_dict(wrong))
        assert state.step == 0
        state.close()

    ddp, optimizer, state = pair()
    state.load_state_dict(hook_state)
    if rank == 1:
        optimizer_state["state"][2]["exp_avg_sq"][0, :3] = 0
    optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    everywhere("different masks of parameter '2.weight': 3 and 0 of its elements", lambda: run(ddp, optimizer, rank, range(5, 6)))

    ddp, optimizer, state = pair(betas=(0.8 if rank == 1 else 0.9, 0.999))
    everywhere("rank 1 and rank 0 have different optimizers: ", lambda: run(ddp, optimizer, rank, range(6)))


@feature
def onebit_adam_no_freeze_without_a_rank(rank: int, world: int) -> None:
    """A rank that has run out of data takes no optimizer step: a freeze then is an error on all ranks, not a wait for it."""
    for config, keys in ((CONFIG.replace("freeze=3", "freeze=6"), {}), ("onebit_adam:block=64 min_numel=1 timeout=60", {"betas": (0.9, 0.9), "not_after": 25})):
        ddp, optimizer, state = pair(config, **keys)

        def train(ddp: nn.Module = ddp, optimizer: torch.optim.Optimizer = optimizer) -> None:
            with ddp.join():
                run(ddp, optimizer, rank, range(4 if rank == 0 else 60))

        everywhere("freeze at a step that all ranks take", train)
        assert state.step in (7, *range(21, 27)), state.step
    ddp, optimizer, state = pair()  # after the freeze nobody minds
    with ddp.join():
        run(ddp, optimizer, rank, range(6 if rank == 0 else 9))
    assert state.stats()["frozen"] and state.step == 9
    replicas_equal(ddp)


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


class Beside(nn.Module):
    """A layer that is used, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = mlp(), nn.Linear(10, 30)

    def forward(self, x: torch.Tensor, spare: bool = False) -> torch.Tensor:
        return self.used(x).sum() + (self.spare(x).sum() if spare else 0)


@feature
def onebit_adam_freezes_beside_a_layer_without_gradients(rank: int, world: int) -> None:
    """It is masked, and a warning names it."""
    ddp = DistributedDataParallel(Beside(), find_unused_parameters=True)
    optimizer = thinwire.optim.OneBitAdam(ddp.parameters(), lr=LR)
    state = thinwire.attach(ddp, CONFIG, optimizer)
    before = ddp.module.spare.weight.detach().clone()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(8):
            optimizer.zero_grad()
            ddp(batch(rank, step), spare=step > 5).square().backward()
            optimizer.step()
    once(rank, said, "have had no gradient", "'spare.weight'", "never move again")
    stats = state.stats()
    assert stats["freeze"]["step"] == 3
    assert torch.equal(before, ddp.module.spare.weight)
    assert stats["parameters"]["spare.weight"]["masked"] == 300 and stats["parameters"]["used.2.weight"]["masked"] == 0
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
def onebit_adam_says_that_it_stays_dense(rank: int, world: int) -> None:
    """A variance that grows all along never freezes: one warning, with numbers and with what to do."""
    ddp, optimizer, state = pair("onebit_adam:block=64 min_numel=1 timeout=60", betas=(0.9, 0.9))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(90):
            optimizer.zero_grad()
            (loss_of(ddp, batch(rank, step)) * 1.1**step).backward()
            optimizer.step()
    once(rank, said, "still dense", "after 70 steps", "over 10 steps", "not_after=STEPS")
    assert not state.stats()["frozen"]


@feature
def onebit_adam_a_number_counts_more_than_auto(rank: int, world: int) -> None:
    for config, freeze in (("onebit_adam:block=64 min_numel=1", 4), ("onebit_adam:block=64,freeze=4 min_numel=1", "auto")):
        ddp, optimizer, state = pair(config, freeze=freeze)
        assert state.config.keys_of("target")["freeze"] == "4"
        run(ddp, optimizer, rank, range(5))
        assert state.stats()["freeze"]["reason"] == "freeze=4"


@feature
def onebit_adam_refusals(rank: int, world: int) -> None:
    def refused(words: str, call: Any) -> None:
        try:
            call()
        except thinwire.Error as error:
            assert words in str(error), f"{words!r} not in {error}"
            return
        raise AssertionError(f"accepted: {words}")

    ddp = DistributedDataParallel(mlp())
    for config in ("onebit_adam", "onebit_adam:freeze=5"):
        refused("only OneBitAdam takes it", lambda config=config: thinwire.attach(ddp, config))
    names = list(ddp.module.named_parameters())
    refused("freeze=auto is decided by the optimizer", lambda: thinwire.HookState("onebit_adam", named_parameters=names))
    refused("use thinwire.optim.OneBitAdam", lambda: thinwire.attach(ddp, "onebit_adam", thinwire.optim.DGCSGD(ddp.parameters(), lr=0.1)))
    refused("use thinwire.optim.OneBitAdam", lambda: thinwire.attach(ddp, "onebit_adam", torch.optim.Adam(ddp.parameters())))
    one = thinwire.optim.OneBitAdam(ddp.parameters(), freeze=5)
    refused("differ", lambda: thinwire.attach(ddp, "onebit_adam:freeze=6", one))
    refused("use torch.optim.AdamW", lambda: thinwire.attach(ddp, "codec=sign feedback=ef14", one))
    refused("needs thinwire.optim.DGCSGD", lambda: thinwire.attach(ddp, "dgc", one))
    refused("beta1=0.95 is none of OneBitAdam's, [0.9]", lambda: thinwire.attach(ddp, "onebit_adam:beta1=0.95", one))
    some = thinwire.optim.OneBitAdam([ddp.module[0].weight])
    refused("does not have", lambda: thinwire.attach(ddp, "onebit_adam min_numel=1", some))
    for freeze in (-1, 0):
        refused('must be "auto" or a number of steps, 1 or more', lambda freeze=freeze: thinwire.optim.OneBitAdam(ddp.parameters(), freeze=freeze))
    for floor in (2, -1, None):
        refused(f"floor={floor} must be a number in [0, 1]", lambda floor=floor: thinwire.optim.OneBitAdam(ddp.parameters(), floor=floor))
    refused("not_after=3", lambda: thinwire.optim.OneBitAdam(ddp.parameters(), not_before=5, not_after=3))
    bounds = (({"freeze": 3, "not_before": 50}, "freeze=3 and not_before=50"), ({"freeze": 9, "not_after": 8}, "freeze=9 and not_after=8"))
    for keys, words in bounds:
        refused(f"{words} exclude each other", lambda keys=keys: thinwire.optim.OneBitAdam(ddp.parameters(), **keys))
    bounded = thinwire.optim.OneBitAdam(ddp.parameters(), not_before=2, not_after=4)
    for freeze, bound in ((1, "not_before=2"), (10, "not_after=4")):
        refused(f"the config's freeze={freeze} and {bound} exclude", lambda freeze=freeze: thinwire.attach(ddp, f"onebit_adam:freeze={freeze}", bounded))
    zero = ZeroRedundancyOptimizer(ddp.parameters(), optimizer_class=thinwire.optim.OneBitAdam, lr=LR)
    refused("does not support ZeroRedundancyOptimizer", lambda: thinwire.attach(ddp, CONFIG, zero))
    words = nn.Embedding(50, 8, sparse=True)
    words(torch.tensor([1, 2])).sum().backward()
    refused("shape (50, 8) has a sparse gradient", thinwire.optim.OneBitAdam(words.parameters()).step)
    state = thinwire.attach(ddp, "onebit_adam:freeze=5 min_numel=1", one)
    run(ddp, one, rank, range(2))
    refused("belongs to another hook", lambda: thinwire.attach(DistributedDataParallel(mlp()), "onebit_adam:freeze=5", one))
    assert not state.stats()["frozen"]


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
def onebit_adam_keeps_the_beta1_of_the_freeze(rank: int, world: int) -> None:
    """A scheduler that cycles beta1 is told once that the hook does not, and it does not: also in a run that goes on from a checkpoint."""
    def begin() -> tuple[nn.Module, thinwire.optim.OneBitAdam, thinwire.HookState]:
        torch.manual_seed(1)
        weights = nn.Sequential(nn.Linear(10, 24, bias=False), nn.Tanh(), nn.Linear(24, 4, bias=False))  # biases are AdamW's, which follows
        return pair("onebit_adam:freeze=2,block=64 min_numel=1 timeout=60", weights)
    def trained(cycles: bool, cut: bool) -> list[torch.Tensor]:
        ddp, optimizer, state = begin()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for step in range(8):
                if cycles and step >= 2:
                    optimizer.param_groups[0]["betas"] = (0.9 - 0.01 * step, 0.999)
                if cut and step == 5:
                    kept, ours = optimizer.state_dict(), state.state_dict()
                    weights = ddp.module.state_dict()
                    ddp, optimizer, state = begin()
                    ddp.module.load_state_dict(weights)
                    optimizer.load_state_dict(kept)
                    state.load_state_dict(ours)
                run(ddp, optimizer, rank, range(step, step + 1))
        if cycles and not cut:
            once(rank, said, "beta1 of parameter group 0 is 0.88 now and was 0.9", "cycle_momentum=False")
        return [p.detach().clone() for p in ddp.parameters()]
    plain = trained(cycles=False, cut=False)
    for cut in (False, True):
        assert all(torch.equal(a, b) for a, b in zip(plain, trained(cycles=True, cut=cut), strict=True)), f"cut={cut}"


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


@feature
def onebit_adam_ranks_set_differently(rank: int, world: int) -> None:
    """What would part the replicas is found before the first step; the learning rate may change at every step and is not compared."""
    for keys, words in (
        ({"betas": (0.9, 0.999 - 0.1 * rank)}, "0.999"),
        ({"eps": 1e-8 * (1 + rank)}, "eps=1e-08"),
        ({"weight_decay": 0.1 * (1 + rank)}, "weight_decay=0.1"),
    ):
        ddp = DistributedDataParallel(mlp())
        optimizer = thinwire.optim.OneBitAdam(ddp.parameters(), **{"lr": LR, **keys})
        thinwire.attach(ddp, CONFIG, optimizer)
        everywhere("rank 1 and rank 0 have different optimizers: ", lambda: run(ddp, optimizer, rank, range(1)))
    ddp = DistributedDataParallel(mlp())
    first = list(ddp.parameters())[:: 1 if rank == 1 else 2]
    rest = [p for p in ddp.parameters() if all(p is not q for q in first)]
    groups = [{"params": first, "weight_decay": 0.1}] + ([{"params": rest}] if rest else [])
    optimizer = thinwire.optim.OneBitAdam(groups, lr=LR)
    thinwire.attach(ddp, CONFIG, optimizer)
    everywhere("weight_decay=0 for '0.bias', '2.bias', '4.bias' and 1 more", lambda: run(ddp, optimizer, rank, range(1)))


@feature
def onebit_adam_hook_without_an_optimizer_says_so(rank: int, world: int) -> None:
    """Whoever registers the hook by torch's convention and keeps Adam would average the momentum twice."""
    named = list(mlp().named_parameters())
    for optimizer, warned in ((None, True), (thinwire.optim.OneBitAdam([p for _, p in named]), False)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            thinwire.HookState(CONFIG, named_parameters=named, optimizer=optimizer).close()
        if warned:
            once(rank, said, "without a OneBitAdam", "from step 3 on", "optimizer=OneBitAdam(...)")
        else:
            assert not said, [str(w.message) for w in said]
