"""launch/cluster: hosts as network namespaces, and that nothing of them is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from programs import CONFIG, LAUNCH, needs_root, poll, processes_of, python, run


# --- the virtual cluster ----------------------------------------------------------------------------------------------------------------------------------------------


def cluster(*arguments, seconds: float = 60, name: str = f"test{os.getpid()}", **more) -> subprocess.CompletedProcess:
    return run([LAUNCH / "cluster", *arguments], seconds, env={"THINWIRE_CLUSTER": name}, **more)


def namespaces(word: str) -> list[str]:
    return [line.split()[0] for line in run(["ip", "netns", "list"]).stdout.splitlines() if word in line]


@pytest.fixture
def three_hosts():
    before = run(["ip", "-o", "address"]).stdout, run(["ip", "route"]).stdout
    assert cluster("up", 3, "100mbit").returncode == 0
    yield
    assert cluster("down").returncode == 0
    assert namespaces(f"test{os.getpid()}") == []
    assert before == (run(["ip", "-o", "address"]).stdout, run(["ip", "route"]).stdout)


@needs_root
def test_cluster_hosts_and_links(three_hosts) -> None:
    assert cluster("exec", 2, "hostname").stdout == "host2\n"
    assert cluster("exec", 1, "sh", "-c", 'echo "$1"; exit 7', "sh", "two words").stdout == "two words\n"
    assert cluster("exec", 1, "sh", "-c", "exit 7").returncode == 7
    assert "10.77.0.3/24" in cluster("exec", 2, "ip", "-4", "address", "show", "eth0").stdout
    assert "rate 100Mbit" in cluster("exec", 0, "tc", "class", "show", "dev", "eth0").stdout

    # 6 MB over 100 Mbit take at least .48 s; burst and buffers hide less than .2 MB of it.
    server = "import socket; s = socket.create_server(('', 7000)); print('up', flush=True); c = s.accept()[0]\nwhile c.recv(1 << 20): pass\nc.sendall(b'x')"
    client = "import socket, time; c = socket.create_connection(('10.77.0.1', 7000)); t = time.time(); c.sendall(bytes(6000000)); c.shutdown(1); c.recv(1); print(time.time() - t)"
    environment = {**os.environ, "THINWIRE_CLUSTER": f"test{os.getpid()}"}
    with subprocess.Popen([LAUNCH / "cluster", "exec", "0", sys.executable, "-c", server], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "up\n"
        assert float(cluster("exec", 1, sys.executable, "-c", client).stdout) > 0.46
        assert process.wait(30) == 0


@needs_root
def test_cluster_refuses_and_cleans_up(three_hosts) -> None:
    again = cluster("up", 2, "1gbit")
    assert again.returncode == 1 and "up already" in again.stderr and len(namespaces(f"test{os.getpid()}-")) == 4
    wrong = cluster("exec", 3, "true")
    assert wrong.returncode == 1 and "no host 3" in wrong.stderr and "0 1 2" in wrong.stderr
    # down ends what runs on its hosts, and touches no other cluster's.
    assert cluster("up", 1, "none", name=f"other{os.getpid()}").returncode == 0
    environment = {**os.environ, "THINWIRE_CLUSTER": f"test{os.getpid()}"}
    with subprocess.Popen([LAUNCH / "cluster", "exec", "1", "sleep", "300"], env=environment) as sleeper:
        time.sleep(1)
        assert sleeper.poll() is None
        assert cluster("down").returncode == 0
        assert sleeper.wait(10) != 0
    assert len(namespaces(f"other{os.getpid()}-")) == 2
    assert cluster("down", name=f"other{os.getpid()}").returncode == 0


@pytest.mark.parametrize("arguments", [["up"], ["up", "0", "1gbit"], ["up", "65", "1gbit"], ["up", "2", "fast"], ["up", "2", "0mbit"], ["exec", "0"], ["sideways"], []])
def test_cluster_misuse(arguments: list[str]) -> None:
    result = cluster(*arguments)
    assert result.returncode == 2 and "usage:" in result.stderr and namespaces(f"test{os.getpid()}") == []


@needs_root
def test_cluster_says_what_it_lacks() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copy(LAUNCH / "cluster", folder)
        ordinary = run(["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", f"{folder}/cluster", "up", 2, "1gbit"])
        assert ordinary.returncode == 1 and "root" in ordinary.stderr
        for tool in ("bash", "env", "id", "awk", "ip"):
            os.symlink(shutil.which(tool), f"{folder}/{tool}")
        without_tc = run([f"{folder}/cluster", "up", 2, "1gbit"], env={"PATH": folder})
        assert without_tc.returncode == 1 and "tc" in without_tc.stderr and "iproute2" in without_tc.stderr


@needs_root
@pytest.mark.parametrize("end", ["close", "terminate", "interrupt", "kill"])
def test_a_held_cluster_goes_with_its_holder(end: str) -> None:
    name = f"held{os.getpid()}"
    heard = ["env", "--default-signal=INT"]  # a shell's background job, such as this test may be, ignores interrupts
    command = [*heard, LAUNCH / "cluster", "hold", "2", "1gbit"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "THINWIRE_CLUSTER": name}) as process:
        assert process.stdout.readline() == "ready\n" and len(namespaces(name)) == 3
        if end == "close":
            process.stdin.close()
        else:
            process.send_signal({"terminate": signal.SIGTERM, "interrupt": signal.SIGINT, "kill": signal.SIGKILL}[end])
        process.wait(30)
    if end == "kill":
        poll(lambda: namespaces(name) == [], 20)
    assert namespaces(name) == []


@needs_root
def test_quickstart_over_links_leaves_nothing_even_if_killed(digits: Path, tmp_path: Path) -> None:
    arguments = ["--data", digits, "--batch", 32, "--link", "1gbit", "--output", tmp_path, "--json", tmp_path / "rows.json"]
    result = python("launch/quickstart.py", "--epochs", 1, "--config", CONFIG, *arguments)
    assert result.returncode == 0, result.stderr
    assert "2 virtual hosts" in result.stdout and len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 2
    with subprocess.Popen([sys.executable, str(LAUNCH / "quickstart.py"), "--epochs", "500", *map(str, arguments)], stdout=subprocess.DEVNULL) as process:
        ranks = poll(lambda: found if len(found := processes_of(process.pid, "train_rank.py")) >= 2 else None)
        assert len(namespaces(f"thinwire-run{process.pid}-")) == 3
        process.kill()
    poll(lambda: not namespaces(f"thinwire-run{process.pid}-"), 30)
    poll(lambda: not [pid for pid in ranks if Path(f"/proc/{pid}").exists()], 10)
