"""What this build is, and what it found."""

from __future__ import annotations

import ctypes.util
import platform
from typing import Any

import torch
import torch.distributed as dist

from ._extension import MPI_BUILT, TORCH_BUILT, VERSION, native


def build_info() -> dict[str, Any]:
    """Version, instruction sets in use and built, and the libraries compiled in and found; None where a part is not there.

    ``mpi_built``: the MPI standard of the C++ library's transport; ``mpi_found``: the shared library on this machine. ``transports`` are
    those of the Python package. ``devices``: the GPUs that this process can use, each with its compute capability, driver and runtime.
    """
    gpu = native.device_info()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None
    return {
        "version": VERSION,
        **{key: value for key, value in native.isa_info().items() if key != "torch_built"},
        "torch_built": TORCH_BUILT,
        "torch_found": torch.__version__,
        "python": platform.python_version(),
        "transports": ["loopback", "gloo"] + ([] if gpu["refusal"] else ["nccl"]),
        "gloo_found": dist.is_gloo_available(),
        "cuda_built": gpu["cuda_built"],
        "cuda_found": torch.version.cuda,
        "devices": gpu["devices"],
        "nccl_built": gpu["nccl_built"],
        "nccl_found": nccl,
        "mpi_built": MPI_BUILT,
        "mpi_found": ctypes.util.find_library("mpi"),
    }


def machine() -> dict[str, Any]:
    """The ``machine`` of JSON outputs."""
    return {
        "cpu": _cpu_name(),
        "cores": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "isa": native.isa_info()["isa"],
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the platform module knows something shorter
    return platform.processor() or platform.machine()
