"""Features that concern 1-bit Adam's optimizer: parameter groups and schedulers, what it does beside the hook, what it says of itself."""

from __future__ import annotations

import copy

import numpy as np
import torch
from ddp_training import batch, everybody, feature, local_grads, loss_of, mlp, replicas_equal
from onebit_training import CONFIG, compressed
from torch.nn.parallel import DistributedDataParallel

import thinwire

GROUPS = (
    {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 0.003, "betas": (0.75, 0.98), "eps": 1e-5, "weight_decay": 0.02},
)
RATES = [lambda step: 1 / (1 + step), lambda step: 0.5**step]


def grouped(model: torch.nn.Module) -> list[dict]:
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
