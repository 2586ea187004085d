"""What the tests of whole programs share: how they are started, with a deadline each, and what they need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
BUILD = Path(os.environ.get("THINWIRE_BUILD", ROOT / "build"))
NUMEL = 824_458  # of the network, counted by hand: 320 + 18,496 + 803,072 + 2,570
CONFIG = "dgc:density=0.01,warmup_steps=3"
MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1",
       "OMPI_MCA_hwloc_base_binding_policy": "none", "OMPI_MCA_mpi_yield_when_idle": "1", "OMP_NUM_THREADS": "1"}

needs_mpi = pytest.mark.skipif(shutil.which("mpirun") is None or not (BUILD / "launch" / "thinwire_train").exists(), reason="built without MPI or LibTorch")
needs_root = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("tc") is None, reason="network namespaces need root, ip and tc")


def run(command: list, seconds: float = 200, **more) -> subprocess.CompletedProcess:
    environment = {**os.environ, **MPI, **more.pop("env", {})}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=seconds, env=environment, stdin=subprocess.DEVNULL, **more)


def python(script: str, *arguments, **more) -> subprocess.CompletedProcess:
    return run([sys.executable, ROOT / script, *arguments], **more)


def trainer(*arguments, ranks: int = 2, **more) -> subprocess.CompletedProcess:
    return run(["mpirun", "-np", ranks, BUILD / "launch" / "thinwire_train", *arguments], **more)


def poll(found, seconds: float = 60):
    """The first true value of found(), which must come within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(0.1)
    pytest.fail(f"nothing within {seconds} s")


def processes_of(parent: int, word: str) -> list[int]:
    """Ids of the descendants of `parent` whose command line holds `word`."""
    parents, lines = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(entry.name)] = (entry / "cmdline").read_text()
            except OSError:
                continue  # it ended meanwhile
    def descends(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == parent:
                return True
        return False
    return sorted(pid for pid, line in lines.items() if word in line and descends(pid))
