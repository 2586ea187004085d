"""The hook on a GPU. Several ranks share GPU 0 where NCCL lets them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from cuda_calls import kernels, waits_and_copies
from ranks import Launch

import thinwire

SCRIPT = Path(__file__).parent / "gpu_rank.py"
TWINS = Path(__file__).parent / "device_rank.py"
CALLS = Path(__file__).parent / "gpu_calls_rank.py"
SECONDS = float(os.environ.get("THINWIRE_TEST_SECONDS", 240))  # of a whole run

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or not thinwire.build_info()["devices"], reason="there is no GPU, or this build has no CUDA")
anywhere = pytest.mark.parametrize(("world", "device"), [(2, "cpu"), pytest.param(1, "cuda", marks=needs_gpu), pytest.param(2, "cuda", marks=needs_gpu)])


def run(script: Path, world: int, folder: Path, *arguments: str) -> None:
    """Every rank says "ok" of all it did."""
    launch = Launch(script, world, folder, *arguments)
    codes = launch.wait(SECONDS)
    for rank in range(world):
        said = launch.result(rank)
        log = launch.log(rank)
        if world > 1 and "Duplicate GPU" in log:
            pytest.skip("this NCCL takes no two ranks on one GPU")
        assert said, f"rank {rank} said nothing, exit codes {codes}\n{log}"
        assert all(s == "ok" for s in said.values()), "\n".join(f"{what}: {s}" for what, s in said.items() if s != "ok")
    assert codes == [0] * world, launch.log(0)


@anywhere
def test_hook_is_replay_to_the_bit(world: int, device: str, tmp_path: Path) -> None:
    """With at most two ranks a dense step too: of more, each transport's all-reduce adds in an order of its own."""
    run(SCRIPT, world, tmp_path, device)


@anywhere
def test_grad_scaler_join_and_a_moved_checkpoint(world: int, device: str, tmp_path: Path) -> None:
    """On a GPU the same bits as on the CPU; on the CPU what holds on both."""
    run(TWINS, world, tmp_path, device)


@needs_gpu
def test_a_step_with_the_hook_waits_for_nothing(tmp_path: Path) -> None:
    """20 steps of plain DDP and of DDP with the hook: as many calls by which the host waits, and as many copies to the host. What asks for copies is seen."""
    launch = Launch(CALLS, 1, tmp_path, "cuda")
    assert launch.wait(SECONDS) == [0], launch.log(0)
    said = launch.result(0)
    plain = said.pop("plain")
    by_design = said.pop("check_every")
    if "THINWIRE_CALLS" in os.environ:
        Path(os.environ["THINWIRE_CALLS"]).write_text((tmp_path / "rank0.json").read_text())
    assert by_design["calls"].get("copies to the host", 0) >= plain["calls"].get("copies to the host", 0) + 20
    for name, one in said.items():
        assert one["kernels"] > plain["kernels"], f"{name}: the profiler saw no kernels of ours"
        more = {call: count - plain["calls"].get(call, 0) for call, count in one["calls"].items() if count > plain["calls"].get(call, 0)}
        assert not more, f"{name}: beside what plain DDP does in 20 steps: {more}"


def test_the_counting_program_runs(tmp_path: Path) -> None:
    """On the CPU, where nothing waits for a GPU: it is to be whole when it comes to one."""
    launch = Launch(CALLS, 1, tmp_path, "cpu")
    assert launch.wait(SECONDS) == [0], launch.log(0)
    said = launch.result(0)
    assert set(said) == {"plain", "none", "dgc", "dgc, clipped", "ef14 exact", "check_every"}
    assert all(one["calls"] == {} and one["kernels"] == 0 and one["events"] > 1000 for one in said.values())


def test_waits_and_copies_are_told_from_the_rest() -> None:
    events = [
        ("cuda_runtime", "cudaStreamSynchronize"), ("cuda_runtime", "cudaStreamWaitEvent"), ("cuda_runtime", "cudaMemcpyAsync"), ("cuda_runtime", "cudaEventQuery"),
        ("cuda_driver", "cuCtxSynchronize"), ("cuda_driver", "cuMemFree_v2"), ("cuda_driver", "cuLaunchKernel"), ("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)"),
        ("gpu_memcpy", "Memcpy DtoD (Device -> Device)"), ("kernel", "stream_kernel"), ("cpu_op", "cudaStreamSynchronize"), ("cuda_runtime", "cudaStreamSynchronize"),
    ]  # fmt: skip
    trace = {"traceEvents": [{"ph": "X", "cat": category, "name": name} for category, name in events] + [{"ph": "M"}]}
    assert waits_and_copies(trace) == {"cudaStreamSynchronize": 2, "cuCtxSynchronize": 1, "cuMemFree_v2": 1, "copies to the host": 1}
    assert kernels(trace) == 1


def test_build_info_tells_of_gpus() -> None:
    info = thinwire.build_info()
    assert (info["devices"] == []) or torch.cuda.is_available()
    assert ("nccl" in info["transports"]) == (info["cuda_built"] is not None and info["nccl_built"] is not None and torch.version.cuda is not None)


def test_parameters_on_other_devices_are_refused() -> None:
    parameter = torch.nn.Parameter(torch.empty(2, 2, device="meta"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(thinwire.Error, match="meta"):
            thinwire.HookState("dgc:density=0.1", named_parameters=[("w", parameter)])
        scaler = torch.amp.GradScaler("cpu")
        scaler._scale = torch.ones((), device="meta")
        with pytest.raises(thinwire.Error, match="one float32 on the CPU, where gradients are reduced, not 1 torch.float32 on meta"):
            thinwire.HookState("dgc:density=0.1", named_parameters=[("w", torch.nn.Parameter(torch.zeros(2, 2)))], grad_scaler=scaler)
    finally:
        torch.distributed.destroy_process_group()
