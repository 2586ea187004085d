"""Rank processes of one training on this machine, or on the hosts of a virtual cluster: started together, watched, ended together."""

import collections
import contextlib
import ctypes
import json
import os
import pathlib
import queue
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

HERE = pathlib.Path(__file__).resolve().parent
CLUSTER = HERE / "cluster"


class RankError(RuntimeError):
    """A rank failed, or the cluster did not come up; the text names it and ends with its last words."""


def die_with_parent() -> None:
    """Called by a rank: the kernel ends this process when the one that started it ends, however that happens."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def emit(event: str, **fields: object) -> None:
    """A rank's word to whoever started it: one JSON object on a line of standard output."""
    print(json.dumps({"event": event, **fields}), flush=True)


def tell_warnings() -> None:
    """Called by a rank: from now on a warning is a word to whoever started it. Its standard error is read only if it fails."""
    warnings.showwarning = lambda message, *_: emit("warning", words=str(message))


def leave() -> NoReturn:
    """The end of a rank that has done its work and closed its group. Not by way of the interpreter's own end: a thread of torch that asks for the
    interpreter while that goes is ended by it inside C++ code, and takes the process along ("terminate called without an active exception")."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """`launch/cluster hold` for the life of a with-block. It ends when this process ends: it waits on a pipe that only we hold."""

    def __init__(self, world: int, rate: str) -> None:
        self.name = f"run{os.getpid()}"
        self.world, self.rate = world, rate

    def __enter__(self) -> "Cluster":
        # A session of its own: Ctrl-C reaches us first, and the hosts go after their processes.
        self.process = subprocess.Popen([str(CLUSTER), "hold", str(self.world), self.rate], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True, env={**os.environ, "THINWIRE_CLUSTER": self.name}, start_new_session=True)
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        if not ready or self.process.stdout.readline().strip() != "ready":
            self.process.stdin.close()
            if not ready:
                self.process.terminate()
            words = self.process.stderr.read().strip().splitlines()
            self.process.wait(30)
            raise RankError(words[-1] if words else "the virtual cluster did not come up within 60 s")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait(30)
        for pipe in (self.process.stdout, self.process.stderr):
            pipe.close()

    def on_host(self, rank: int, command: Sequence[str]) -> list[str]:
        return [str(CLUSTER), "exec", str(rank), *command]


def complain(words: str) -> None:
    print(f"warning: {words}", file=sys.stderr, flush=True)


class Ranks:
    """`world` processes of `command`, with torchrun's environment variables. Leaving the with-block ends those that still run. `warn` is handed what they warn of,
    once each, however many of them say it."""

    def __init__(self, world: int, command: Sequence[str], cluster: Cluster | None = None, silence_s: float = 300, warn: Callable[[str], None] = complain) -> None:
        self.world, self.command, self.cluster, self.silence_s, self.warn = world, list(command), cluster, silence_s, warn
        self.processes: list[subprocess.Popen] = []
        self.words: queue.SimpleQueue = queue.SimpleQueue()

    def __enter__(self) -> "Ranks":
        port = 29500 if self.cluster else free_port()
        shared = {**os.environ, "WORLD_SIZE": str(self.world), "LOCAL_WORLD_SIZE": str(self.world), "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                  "MASTER_ADDR": "10.77.0.1" if self.cluster else "127.0.0.1", "GLOO_SOCKET_IFNAME": "eth0" if self.cluster else "lo"}
        if self.cluster:
            shared["THINWIRE_CLUSTER"] = self.cluster.name
        self.complaints = [tempfile.TemporaryFile("w+") for _ in range(self.world)]
        try:
            for rank in range(self.world):
                command = self.cluster.on_host(rank, self.command) if self.cluster else self.command
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.complaints[rank], text=True,
                                           env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                self.processes.append(process)
                threading.Thread(target=self._listen, args=(rank, process), daemon=True).start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _listen(self, rank: int, process: subprocess.Popen) -> None:
        with process.stdout:
            for line in process.stdout:
                self.words.put((rank, line))
        self.words.put((rank, None))

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait()
        for complaint in self.complaints:
            complaint.close()

    def _last_words(self, rank: int) -> str:
        self.complaints[rank].seek(0)
        tail = collections.deque((line.rstrip() for line in self.complaints[rank] if line.strip()), maxlen=12)
        return "\n".join(f"  rank {rank}: {line}" for line in tail)

    def _failure(self, rank: int) -> RankError:
        # The first rank to end is often the messenger: a moment later the one that knows the reason has ended too.
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
        failed = [other for other, process in enumerate(self.processes) if process.poll() not in (None, 0)]
        codes = ", ".join(f"rank {other}: {self.processes[other].returncode}" for other in failed)
        return RankError(f"rank {rank} failed (exit status {codes})\n" + "\n".join(filter(None, map(self._last_words, failed))))

    def events(self) -> Iterator[tuple[int, dict]]:
        """What the ranks emit, warnings apart, until all have ended well. @raises RankError if one ends badly, or all are silent for `silence_s`."""
        running, warned = self.world, set()
        while running:
            try:
                rank, line = self.words.get(timeout=self.silence_s)
            except queue.Empty:
                stuck = [rank for rank, process in enumerate(self.processes) if process.poll() is None]
                raise RankError(f"no word from any rank for {self.silence_s:g} s; still running: {stuck}\n" + "\n".join(map(self._last_words, stuck))) from None
            if line is None:
                running -= 1
                if self.processes[rank].wait() != 0:
                    raise self._failure(rank)
                continue
            try:
                word = json.loads(line)
            except json.JSONDecodeError:
                print(line, end="", file=sys.stderr)  # a library's chatter
                continue
            if word["event"] != "warning":
                yield rank, word
            elif word["words"] not in warned:
                warned.add(word["words"])
                self.warn(word["words"])
