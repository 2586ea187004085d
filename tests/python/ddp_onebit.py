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
def onebit_adam_freezes_at_the_latest_and_warns_of_a_warm_up(rank: int, world: int) -> None:
    ddp, optimizer, state = pair("onebit_adam:block=64 min_numel=1 timeout=60", not_after=6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(8):
            optimizer.param_groups[0]["lr"] = LR * (step + 1) / 8
            run(ddp, optimizer, rank, range(step, step + 1))
            assert optimizer.frozen == (step >= 5)
    assert state.stats()["freeze"]["reason"] == "not_after=6"
    words = [str(w.message) for w in said if "learning rate still rises" in str(w.message)]
    assert len(words) == 1 and "frozen at step 6" in words[0] and "not_before" in words[0], words


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
    refused("freeze=auto is decided by the optimizer", lambda: thinwire.attach(ddp, "onebit_adam"))
    refused("use thinwire.optim.OneBitAdam", lambda: thinwire.attach(ddp, "onebit_adam", torch.optim.Adam(ddp.parameters())))
    one = thinwire.optim.OneBitAdam(ddp.parameters(), freeze=5)
    refused("differ", lambda: thinwire.attach(ddp, "onebit_adam:freeze=6", one))
    refused("use torch.optim.AdamW", lambda: thinwire.attach(ddp, "codec=sign feedback=ef14", one))
    some = thinwire.optim.OneBitAdam([ddp.module[0].weight])
    refused("does not have", lambda: thinwire.attach(ddp, "onebit_adam min_numel=1", some))
    for freeze in (-1, 0):
        refused('must be "auto" or a number of steps, 1 or more', lambda freeze=freeze: thinwire.optim.OneBitAdam(ddp.parameters(), freeze=freeze))
    refused("floor=2 must be in [0, 1]", lambda: thinwire.optim.OneBitAdam(ddp.parameters(), floor=2))
    refused("not_after=3", lambda: thinwire.optim.OneBitAdam(ddp.parameters(), not_before=5, not_after=3))
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
    words = [str(w.message) for w in said if "times the learning rate" in str(w.message)]
    assert len(words) == 1 and "frozen at step 2" in words[0], words
    assert state.stats()["freeze"]["max_update"] > 20
    assert dist.get_rank() == rank
