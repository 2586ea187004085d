"""Launches one process per rank and brings back what each said. Everything has a deadline: what hangs is killed and reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "error::ResourceWarning",
    }


class Launch:
    """`world` processes of `script`, each with the arguments RANK WORLD FOLDER and its own log; results lie in FOLDER/rank<R>.json."""

    def __init__(self, script: Path, world: int, folder: Path, *arguments: str) -> None:
        self.folder, self.world = folder, world
        self.processes = []
        for rank in range(world):
            with open(folder / f"rank{rank}.log", "wb") as log:
                command = [sys.executable, "-X", "faulthandler", str(script), str(rank), str(world), str(folder), *arguments]
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment()))

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes; None for a process that had to be killed."""
        codes = self.wait_for(range(self.world), seconds)
        self.kill()
        return codes

    def wait_for(self, ranks: Iterable[int], seconds: float) -> list[int | None]:
        """Exit codes of these; None for a process that goes on."""
        deadline = time.monotonic() + seconds
        codes: list[int | None] = []
        for rank in ranks:
            try:
                codes.append(self.processes[rank].wait(max(0.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
        return codes

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()

    def result(self, rank: int) -> dict[str, Any]:
        path = self.folder / f"rank{rank}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def log(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.log").read_text(errors="replace")[-6000:]
