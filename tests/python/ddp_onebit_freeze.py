"""Features that concern 1-bit Adam's freeze: when, on all ranks or none, and what is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from ddp_training import batch, everybody, feature, loss_of, mlp, replicas_equal
from onebit_training import CONFIG, LR, everywhere, once, pair, run
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import thinwire


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
def onebit_adam_warns_of_a_warm_up_that_goes_on(rank: int, world: int) -> None:
    """A rate that rises at epochs longer than what v remembers: said at the first rise after the freeze, once in a training's life."""
    config, late = "onebit_adam:freeze=15,block=64 min_numel=1 timeout=60", "is 0.03 now and was 0.02 when the variance was frozen, at step 15"
    for rates, resumed, older, words in (
        ({0: 2, 20: 3, 24: 4}, None, False, late),
        ({0: 1, 2: 2, 20: 3, 24: 4}, None, False, late),  # the plateau before the freeze is longer than v's memory
        ({0: 2, 20: 3, 24: 4}, 18, False, late),
        ({0: 2, 20: 3, 24: 4}, 22, False, late),
        ({0: 2, 20: 3}, 18, True, ""),  # a state of before these rates were kept
        ({0: 1, 14: 2, 20: 3}, None, False, "the learning rate last rose 0 steps before"),  # said at the freeze
        ({0: 2, 16: 1, 20: 2}, None, False, ""),  # back to where it was
    ):
        ddp, optimizer, state = pair(config, betas=(0.9, 0.9))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for step in range(26):
                if step == resumed:
                    hook, numbers, model = state.state_dict(), copy.deepcopy(optimizer.state_dict()), ddp.module
                    if older:
                        del numbers["freeze"]["frozen"]["rates"]
                    state.close()
                    ddp, optimizer, state = pair(config, model, betas=(0.9, 0.9))
                    state.load_state_dict(hook)
                    optimizer.load_state_dict(numbers)
                optimizer.param_groups[0]["lr"] = LR * rates.get(step, optimizer.param_groups[0]["lr"] / LR)
                run(ddp, optimizer, rank, range(step, step + 1))
        assert state.stats()["freeze"]["step"] == 15
        if words:
            once(rank, said, "learning rate", words, "not_before", "freeze=STEP")
        else:
            assert not [w for w in said if "learning rate" in str(w.message)], [str(w.message) for w in said]


@feature
def onebit_adam_warns_of_a_rise_only_where_v_is_frozen(rank: int, world: int) -> None:
    """The rate of a group whose tensors stay dense may rise: their v follows."""
    ddp = DistributedDataParallel(mlp(), bucket_cap_mb=0.002)
    biases, weights = ([p for p in ddp.parameters() if (p.dim() < 2) == dense] for dense in (True, False))
    optimizer = thinwire.optim.OneBitAdam([{"params": biases}, {"params": weights}], lr=LR)
    thinwire.attach(ddp, CONFIG, optimizer)
    for group, words in ((0, ""), (1, "the learning rate of parameter group 1 is 0.02 now and was 0.01")):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run(ddp, optimizer, rank, range(4))
            optimizer.param_groups[group]["lr"] = 2 * LR
            run(ddp, optimizer, rank, range(4, 6))
        if words:
            once(rank, said, words)
        else:
            assert not [w for w in said if "learning rate" in str(w.message)], [str(w.message) for w in said]


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
    everywhere("'0.bias': betas=(0.9, 0.999), eps=1e-08, weight_decay=0; '2.weight'", lambda: run(ddp, optimizer, rank, range(1)))


@feature
def onebit_adam_hook_without_an_optimizer_is_refused(rank: int, world: int) -> None:
    """Whoever registers the hook by torch's convention and keeps Adam would average the momentum twice."""
    named = list(mlp().named_parameters())
    everywhere("only OneBitAdam takes it", lambda: thinwire.HookState(CONFIG, named_parameters=named))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        thinwire.HookState(CONFIG, named_parameters=named, optimizer=thinwire.optim.OneBitAdam([p for _, p in named])).close()
    assert not said, [str(w.message) for w in said]
