"""Features that concern 1-bit Adam's optimizer: parameter groups and schedulers, what it does beside the hook, what it says of itself."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import torch
from ddp_training import batch, everybody, feature, local_grads, loss_of, mlp, replicas_equal
from onebit_training import CONFIG, LR, compressed, everywhere, once, pair, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire

GROUPS = (
    {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 0.003, "betas": (0.75, 0.98), "eps": 1e-5, "weight_decay": 0.02},
)
RATES = [lambda step: 1 / (1 + step), lambda step: 0.5**step]


def grouped(model: nn.Module) -> list[dict]:
    """Layers by turns: every group has tensors that are compressed and some that stay dense."""
    layers = [layer for layer in model if list(layer.parameters())]
    return [{"params": [p for layer in layers[i::2] for p in layer.parameters()], **keys} for i, keys in enumerate(GROUPS)]


@feature
def onebit_adam_groups_and_schedulers(rank: int, world: int) -> None:
    """Every parameter by its own group's betas, eps and weight decay and by the rate of the step, before the freeze and after it."""
    ddp = DistributedDataParallel(mlp(), bucket_cap_mb=0.002)
    optimizer = thinwire.optim.OneBitAdam(grouped(ddp.module))
    state = thinwire.attach(ddp, CONFIG, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, RATES)
    reference = copy.deepcopy(ddp.module)
    adam = torch.optim.AdamW(grouped(reference))
    adams = torch.optim.lr_scheduler.LambdaLR(adam, RATES)
    names = {p: name for name, p in reference.named_parameters()}
    freeze, one = 3, np.float32(1)
    messages: dict[str, list[torch.Tensor]] = {}
    momentum: dict[str, torch.Tensor] = {}
    denominators: dict[str, torch.Tensor] = {}
    for step in range(7):
        x = batch(rank, step)
        local = local_grads(ddp.module, [lambda m: loss_of(m, x)])
        optimizer.zero_grad()
        loss_of(ddp, x).backward()
        grads = {name: p.grad.clone() for name, p in ddp.module.named_parameters()}
        which = compressed(state)
        if step >= freeze:
            for group in adam.param_groups:
                beta = np.float32(group["betas"][0])
                for name in sorted(which & {names[p] for p in group["params"]}):
                    message = momentum[name] * beta.item() + local[name] * float(one - beta)
                    messages.setdefault(name, []).append(torch.stack(everybody(message)))
            expected = thinwire.replay("codec=sign:block=64 feedback=ef14 min_numel=1", {name: torch.stack(rounds) for name, rounds in messages.items()})
            for name in sorted(which):
                assert torch.equal(grads[name], expected.mean[name][-1]), f"step {step}: {name}'s momentum"
                momentum[name] = grads[name]
        optimizer.step()
        scheduler.step()
        for p, name in names.items():
            p.grad = None if step >= freeze and name in which else grads[name].clone()
        adam.step()
        t = step + 1
        for group in adam.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                name = names[p]
                if name not in which:
                    continue
                if t == freeze:
                    momentum[name], v = adam.state[p]["exp_avg"].clone(), adam.state[p]["exp_avg_sq"]
                    least = (v.sqrt().double().mean() * 0.05).square().float()
                    denominators[name] = (torch.where(v > 0, torch.maximum(v, least), v).sqrt() / (1 - beta2**t) ** 0.5).add_(group["eps"])
                if t > freeze:
                    with torch.no_grad():
                        p.mul_(1 - group["lr"] * group["weight_decay"])
                        p.addcdiv_(grads[name], denominators[name], value=-group["lr"] / (1 - beta1**t))
        adams.step()
        for (name, p), q in zip(ddp.module.named_parameters(), reference.parameters()):
            assert torch.equal(p, q), f"step {step}: {name}"
    assert [group["lr"] for group in optimizer.param_groups] == [0.01 / 8, 0.003 / 2**7]
    replicas_equal(ddp)


@feature
def onebit_adam_freezes_by_itself_in_a_training(rank: int, world: int) -> None:
    """A regression whose targets are mostly noise: once the weights have arrived the gradients' variance stays, the criterion itself freezes it,
    and the training ends where AdamW does, with fewer bytes."""
    torch.manual_seed(5)
    truth = torch.randn(16, 40)

    def losses(compresses: bool) -> float:
        torch.manual_seed(6)
        ddp = DistributedDataParallel(nn.Linear(40, 16, bias=False))
        if compresses:
            optimizer = thinwire.optim.OneBitAdam(ddp.parameters(), lr=0.05, betas=(0.9, 0.99))
            state = thinwire.attach(ddp, "onebit_adam:block=64 min_numel=1 timeout=60", optimizer)
        else:
            optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.05, betas=(0.9, 0.99), weight_decay=0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 800)
        for step in range(800):
            torch.manual_seed(step * 10 + rank)
            x = torch.randn(32, 40)
            optimizer.zero_grad()
            (ddp(x) - x @ truth.T - 4 * torch.randn(32, 16)).square().mean().backward()
            optimizer.step()
            scheduler.step()
        if compresses:
            stats = state.stats()
            assert "the variance changed by" in stats["freeze"]["reason"], stats["freeze"]
            assert 200 <= stats["freeze"]["step"] <= 600 and stats["freeze"]["step"] % 100 == 0, stats["freeze"]
            assert stats["factor"] > 1.4, stats["factor"]
            replicas_equal(ddp)
        return float((ddp.module.weight.detach() - truth).square().mean())

    start, dense, ours = float(truth.square().mean()), losses(False), losses(True)
    assert dense < 0.1 * start and ours < 1.5 * dense, (start, dense, ours)


class Words(nn.Module):
    """Rows of an embedding, averaged."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.words, self.out = nn.Embedding(50, 8, sparse=True), nn.Linear(8, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(x).mean(dim=1))


@feature
def onebit_adam_beside_an_optimizer_of_sparse_gradients(rank: int, world: int) -> None:
    """What the refusal of sparse gradients advises: they pass by the hook, also after the freeze, and are SparseAdam's."""

    def backward(ddp: nn.Module, step: int) -> None:
        torch.manual_seed(100 * step + rank)
        ddp(torch.randint(0, 50, (8, 3))).square().mean().backward()

    both = DistributedDataParallel(Words())
    optimizer = thinwire.optim.OneBitAdam(both.parameters(), lr=LR)
    state = thinwire.attach(both, CONFIG, optimizer)
    backward(both, 0)
    everywhere("'words.weight' has a sparse gradient", optimizer.step)
    everywhere("leave it out of OneBitAdam and give it to an optimizer of its own, such as torch.optim.SparseAdam", optimizer.step)
    state.close()

    ddp = DistributedDataParallel(Words())
    optimizer = thinwire.optim.OneBitAdam(ddp.module.out.parameters(), lr=LR)
    rows = torch.optim.SparseAdam(ddp.module.words.parameters(), lr=LR)
    state = thinwire.attach(ddp, CONFIG, optimizer)
    alone = copy.deepcopy(ddp.module.words)
    reference = torch.optim.SparseAdam(alone.parameters(), lr=LR)
    before = copy.deepcopy(ddp.module.words.weight.detach())
    for step in range(7):
        for one in (optimizer, rows):
            one.zero_grad()
        backward(ddp, step)
        gathered = everybody(ddp.module.words.weight.grad.to_dense())
        assert all(torch.equal(gathered[0], one) for one in gathered) and ddp.module.words.weight.grad.is_sparse
        alone.weight.grad = ddp.module.words.weight.grad.clone()
        optimizer.step()
        rows.step()
        reference.step()
    stats = state.stats()
    assert stats["frozen"] and stats["parameters"]["out.weight"]["compressed"] and "sparse" in stats["parameters"]["words.weight"]["reason"]
    assert torch.equal(alone.weight, ddp.module.words.weight) and not torch.equal(before, alone.weight)
    replicas_equal(ddp)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    state.load_state_dict(state.state_dict())
    backward(ddp, 7)
    optimizer.step()


@feature
def onebit_adam_looks_as_often_as_loaded_betas_say(rank: int, world: int) -> None:
    """A state whose beta2 is another than the constructor's: from its load on v is looked at in its own time, and freezes when it would have."""

    def train(ddp: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> int | None:
        for step in steps:
            torch.manual_seed(step * 100 + rank)
            optimizer.zero_grad()
            (ddp(torch.randn(64, 10)) * torch.randn(64, 64)).mean().backward()
            optimizer.step()
            if optimizer.frozen:
                return step + 1
        return None

    def begin(**keys: object) -> tuple[nn.Module, thinwire.optim.OneBitAdam, thinwire.HookState]:
        torch.manual_seed(2)
        ddp = DistributedDataParallel(nn.Linear(10, 64, bias=False))
        optimizer = thinwire.optim.OneBitAdam(ddp.parameters(), lr=1e-4, **keys)
        return ddp, optimizer, thinwire.attach(ddp, "onebit_adam:block=64 min_numel=1 timeout=60", optimizer)

    ddp, optimizer, state = begin(betas=(0.9, 0.95))
    train(ddp, optimizer, range(30))
    saved = copy.deepcopy((ddp.module.state_dict(), optimizer.state_dict(), state.state_dict()))
    when = train(ddp, optimizer, range(30, 300))
    assert when is not None and when % 20 == 0, when
    again, other, hook = begin()  # beta2 = 0.999 looks every 1000 steps
    again.module.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    hook.load_state_dict(saved[2])
    assert train(again, other, range(30, 300)) == when
    assert hook.stats()["freeze"]["step"] == when


@feature
def onebit_adam_says_that_nothing_is_compressed(rank: int, world: int) -> None:
    """All tensors are below min_numel: no freeze will ever come, and one warning says why."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ddp, optimizer, state = pair("onebit_adam:freeze=2 timeout=60")
        run(ddp, optimizer, rank, range(4))
    once(rank, said, "none of the 8 tensors is compressed", "min_numel=16384", "never frozen")
    assert not optimizer.frozen and not any(one["compressed"] for one in state.stats()["parameters"].values())


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterDict({f"a_layer_with_a_long_name_{i:02}": nn.Parameter(torch.ones(4, 4)) for i in range(60)})

    def forward(self) -> torch.Tensor:
        return sum(p.sum() for p in self.layers.values())


@feature
def onebit_adam_names_a_difference_among_many(rank: int, world: int) -> None:
    """Ranks whose groups differ in one parameter far behind the names that a message has room for."""
    ddp = DistributedDataParallel(Many())
    layers = list(ddp.module.layers.values())
    decayed = [p for i, p in enumerate(layers) if i % 2 == 0 and (rank == 0 or i != 46)]
    rest = [p for p in layers if all(p is not q for q in decayed)]
    optimizer = thinwire.optim.OneBitAdam([{"params": rest}, {"params": decayed, "weight_decay": 0.1}], lr=LR)
    thinwire.attach(ddp, CONFIG, optimizer)

    def train() -> None:
        ddp().backward()

    everywhere("rank 1 and rank 0 have different optimizers: … ", train)
    for decay in ("0; ", "0.1; "):
        everywhere(f"'layers.a_layer_with_a_long_name_46': betas=(0.9, 0.999), eps=1e-08, weight_decay={decay}", train)
