"""feedback=dgc has the momentum in the hook: an optimizer that gets one of its own later is refused at its next step."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import thinwire


@pytest.fixture
def ddp():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DistributedDataParallel(torch.nn.Linear(4, 4))
    dist.destroy_process_group()


def step(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("by_attach", [True, False])
def test_a_scheduler_that_cycles_momentum_is_refused(ddp: DistributedDataParallel, by_attach: bool) -> None:
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    if by_attach:
        state = thinwire.attach(ddp, "dgc:density=0.1", optimizer)
    else:
        state = thinwire.HookState("dgc:density=0.1", named_parameters=ddp.module.named_parameters(), optimizer=optimizer)
        ddp.register_comm_hook(state, thinwire.hook)
    step(ddp, optimizer)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    before = ddp.module.weight.detach().clone()
    with pytest.raises(thinwire.Error, match="would apply it a second time.*cycle_momentum=False"):
        step(ddp, optimizer)
    assert torch.equal(ddp.module.weight, before)
    optimizer.param_groups[0]["momentum"] = 0
    optimizer.step()
    assert not torch.equal(ddp.module.weight, before)
    optimizer.param_groups[0]["momentum"] = 0.9
    state.close()
    optimizer.step()  # nobody's business any more


def test_a_loaded_momentum_is_refused(ddp: DistributedDataParallel) -> None:
    dense = torch.optim.SGD([torch.nn.Parameter(torch.zeros(4, 4)), torch.nn.Parameter(torch.zeros(4))], lr=0.1, momentum=0.9)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    state = thinwire.attach(ddp, "dgc:density=0.1", optimizer)
    optimizer.load_state_dict(dense.state_dict())
    with pytest.raises(thinwire.Error, match="momentum=0.9.*state_dict"):
        step(ddp, optimizer)
    state.close()


def test_the_momentum_of_weight_decay_follows_the_hook(ddp: DistributedDataParallel) -> None:
    optimizer = thinwire.optim.DGCSGD(ddp.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    state = thinwire.attach(ddp, "dgc:density=0.1", optimizer)
    step(ddp, optimizer)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    with pytest.raises(thinwire.Error, match="give both the same.*cycle_momentum=False"):
        step(ddp, optimizer)
    state.close()


def test_decay_without_momentum_is_a_warning(ddp: DistributedDataParallel) -> None:
    with pytest.warns(UserWarning, match="acts 1 - momentum = 0.1 times"):
        thinwire.attach(ddp, "dgc:density=0.1", torch.optim.SGD(ddp.parameters(), lr=0.1, weight_decay=1e-3)).close()
