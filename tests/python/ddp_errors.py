"""What is refused, what a non-finite gradient does, and how a hook ends."""

from __future__ import annotations

import copy
import os
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ddp_training import batch, feature, local_grads, loss_of, mlp, replicas_equal, train
from oracle import Oracle
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire


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


@feature
def a_hook_that_compresses_nothing_says_so(rank: int, world: int) -> None:
    """At 90 % a gather sends more than a dense all-reduce; where one tensor is compressed, or none ever would be, there is nothing to say."""
    for config, warns in (
        ("codec=topk:density=0.9 feedback=econtrol min_numel=1", True),
        ("codec=topk:density=0.01 feedback=ef14 min_numel=1", False),
        ("codec=topk:density=0.9 feedback=ef14 min_numel=1 exchange=gather", False),
        ("codec=topk:density=0.9 feedback=ef14 min_numel=1000000", False),
    ):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ddp = DistributedDataParallel(mlp())
            state = thinwire.attach(ddp, config)
        texts = [str(one.message) for one in said]
        assert len(texts) == (1 if warns and rank == 0 else 0), texts
        assert all(f"on {world} ranks exchange=auto sends every tensor densely" in text and "feedback=econtrol keeps" in text for text in texts), texts
        for step in range(3):  # the first is a start, dense in any case
            loss_of(ddp, batch(rank, step)).backward()
        sent = [one["compressed"] for one in state.stats()["parameters"].values()]
        assert any(sent) == (not warns and "1000000" not in config), (config, sent)
        state.close()


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
def an_attach_that_was_given_up_is_nobodys(rank: int, world: int) -> None:
    """One rank makes its hook too early and gives up; then all do, and meet."""
    if rank == 0:
        try:
            thinwire.HookState("dgc:density=0.1 timeout=2", named_parameters=mlp().named_parameters())
        except thinwire.Error as error:
            assert error.code in ("timeout", "transport"), error.code
        else:
            raise AssertionError("met nobody")
    dist.barrier()
    oracle = Oracle(world)
    ddp = DistributedDataParallel(mlp())
    state = thinwire.attach(ddp, oracle.config)
    train(ddp, oracle, range(2))
    assert state.step == 2


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
def different_parameters_are_refused(rank: int, world: int) -> None:
    """The first that differs is named on all ranks, in DDP's order of parameters."""
    ddp = DistributedDataParallel(mlp())
    named = [("renamed" if rank == world - 1 and name == "2.weight" else name, p) for name, p in ddp.module.named_parameters()]
    config = "codec=topk:density=0.1 feedback=ef14 min_numel=0 timeout=20"
    ddp.register_comm_hook(thinwire.HookState(config, named_parameters=named), thinwire.hook)
    try:
        loss_of(ddp, batch(rank, 0)).backward()
    except thinwire.Error as error:
        assert error.code == "invalid_config", (error.code, str(error))
        says = f"number 2: 'renamed' of shape (24, 24) on rank {world - 1}, '2.weight' of shape (24, 24) on rank 0"
        assert says in str(error), str(error)
    else:
        raise AssertionError("two names of one parameter went on")


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
    refused("none of the parameters", lambda: thinwire.attach(ddp, dgc, thinwire.optim.DGCSGD(mlp().parameters(), 0.1, momentum=0.9)))
    refused("second time", lambda: thinwire.attach(ddp, dgc, sgd(parameters, 0.1, momentum=0.9)))
    refused("Adam", lambda: thinwire.attach(ddp, dgc, torch.optim.Adam(parameters)))
    refused("same", lambda: thinwire.attach(ddp, dgc, thinwire.optim.DGCSGD(parameters, 0.1, momentum=0.9, weight_decay=0.1)))
    refused("density", lambda: thinwire.attach(ddp, "dgc:density=2"))
    refused("DistributedDataParallel", lambda: thinwire.attach(ddp.module, dgc))
    refused("a Config or a string, not int", lambda: thinwire.attach(ddp, 3))
    refused("GradScaler", lambda: thinwire.attach(ddp, dgc, grad_scaler=3))
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
