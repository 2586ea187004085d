"""Compressed gradients for a DistributedDataParallel model: one line, attach. torchrun --nproc-per-node 2 launch/examples/ddp_hook.py"""

import torch
import torch.distributed as dist
import thinwire

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.Tanh(), torch.nn.Linear(1024, 10)))
optimizer = thinwire.optim.DGCSGD(model.parameters(), lr=0.05)
state = thinwire.attach(model, "dgc:density=0.01", optimizer)
for step in range(100):
    x = torch.randn(64, 256)
    loss = torch.nn.functional.cross_entropy(model(x), x[:, :10].argmax(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
if dist.get_rank() == 0:
    print(f"loss {loss.item():.3f}, {state.stats()['factor']:.1f} times fewer bytes than dense")
dist.destroy_process_group()
