"""The command line as users run it: output, JSON, pictures, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import thinwire
from thinwire.__main__ import main


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command in this process and in a folder of its own: importing torch takes seconds."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Done:
        try:
            code = main(list(arguments))
        except SystemExit as exit_:  # argparse's way
            code = exit_.code
        return Done(code, *capsys.readouterr())

    return call


def rows_of(file: Path, command: str) -> list[dict]:
    out = json.loads(file.read_text())
    assert set(out) == {"command", "version", "machine", "rows"} and out["command"] == command and out["version"] == thinwire.__version__
    return out["rows"]


def test_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "thinwire", "check", "dgc:density=2"], capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert done.returncode == 2 and "density=2 is outside (0, 1]" in done.stderr and done.stdout == ""


def test_info(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("info", "--json", "out.json")
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout and thinwire.__version__ in done.stdout
    assert rows_of(tmp_path / "out.json", "info") == [thinwire.build_info()]


def test_check(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("check", "dgc:density=0.01", "--numel", "1000000", "--world", "4", "--json", "out.json")
    assert done.returncode == 0, done.stderr
    assert "momentum=0.9" in done.stdout and "16384" in done.stdout
    row = rows_of(tmp_path / "out.json", "check")[0]
    # 12 500 entries of 4-byte values and 2-byte offsets, 16 blocks' counts, a header of 64 and one count.
    assert row["payload_bytes"] == pytest.approx(12500 * 6 + 16 * 4 + 68, abs=64) and row["wire_bytes"] == 3 * row["payload_bytes"]
    assert row["dense_bytes"] == 6e6


def test_check_warns_of_a_config_that_compresses_nothing(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("check", "econtrol", "--world", "16", "--json", "out.json")
    rows = [row for row in rows_of(tmp_path / "out.json", "check") if row["numel"] > 16384]
    assert done.returncode == 0 and not rows[-1]["compressed"] and rows[-1]["stage"] == "dense, which sends less"
    (warning,) = rows[0]["warnings"]
    # 1/10 of 2^20 entries of 6 bytes, room for a quarter more, 15 times; dense 4 MiB, 15/8 times.
    assert "on 16 ranks" in warning and "1,048,576" in warning and "7.864 MB in a dense" in warning, warning
    assert float(warning.split("would send ")[1].split(" MB")[0]) == pytest.approx(2**20 / 10 * 6 * 1.25 * 15 / 1e6 * 0.8333, rel=0.01)
    assert "feedback=econtrol keeps is kept for nothing" in warning and "codec=sign" in warning and rows[0]["hints"] == []
    assert "warning:" in done.stdout and "hint:" not in done.stdout
    advised = warning.split("Choose density ")[1].split(" ")[0]
    for config, world, warns in (
        (f"econtrol:density={advised}", 16, False),
        ("econtrol", 8, False),
        ("econtrol exchange=gather", 16, False),
        ("codec=sign feedback=econtrol", 16, False),
        ("econtrol", 1, False),
        ("codec=none", 16, False),
        ("codec=topk:density=0.9 feedback=none", 2, True),
        ("dgc:density=0.9", 2, True),
    ):
        assert run("check", config, "--world", str(world), "--json", "out.json").returncode == 0
        warnings = rows_of(tmp_path / "out.json", "check")[0]["warnings"]
        assert any("sends every tensor densely" in one for one in warnings) == warns, (config, warnings)
        if warns:
            assert ("is kept for nothing" in warnings[-1]) == ("dgc" in config) == ("codec=sign feedback=ef14" in warnings[-1])
    assert run("check", "econtrol", "--world", "16", "--numel", "100", "--json", "out.json").returncode == 0
    assert rows_of(tmp_path / "out.json", "check")[0]["warnings"] == []  # dense as it is small, whatever the rule


@pytest.mark.parametrize("columns", ["80", "120"])
def test_check_is_readable_in_a_terminal(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    """No word is cut, no number has an exponent."""
    monkeypatch.setenv("COLUMNS", columns)
    for config, numel, words in (
        ("dgc:density=0.001,warmup_steps=100", "100000000", {"compressed", "16.5", "6,300", "47.64 MB"}),
        ("econtrol", "1", {"dense start", "0.000056"}),
        ("onebit_adam", "25000000", {"compressed", "dense, before the", "1,400"}),
    ):
        done = run("check", config, "--numel", numel, "--world", "64" if "dgc" in config else "8")
        table = done.stdout.partition("tensor of two")[2]
        assert done.returncode == 0 and "…" not in done.stdout and "e+" not in table and "e-0" not in table, done.stdout
        assert all(len(line) <= int(columns) for line in done.stdout.splitlines())
        assert all(word in table for word in words), done.stdout


def test_check_knows_no_step_of_an_automatic_freeze(run: Callable[..., Done], tmp_path: Path) -> None:
    for config, first in (("onebit_adam", None), ("onebit_adam:freeze=7", 7)):
        done = run("check", config, "--json", "out.json")
        rows = [row for row in rows_of(tmp_path / "out.json", "check") if row["numel"] > 16384]
        assert [(row["first_step"], row["stage"]) for row in rows] == [(0, "dense, before the freeze"), (first, "compressed")], done.stderr


def test_check_refuses(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("check", "dgc:density=2")
    assert done.returncode == 2 and "density=2 is outside (0, 1]" in done.stderr and done.stdout == ""
    for flag, value in (("--world", "0"), ("--world", "many"), ("--world", str(2**31)), ("--numel", str(2**64)), ("--numel", "1e6")):
        done = run("check", "dgc", flag, value)
        assert done.returncode == 2 and f"{value} is not a whole number from 1 to" in done.stderr, done
    done = run("check", "dgc", "--numel", "99999999999")
    assert done.returncode == 2 and "numel=99999999999 is too large" in done.stderr and ".cpp" not in done.stderr
    assert run("check", "dgc", "--numel", str(2**32 - 1)).returncode == 0
    assert run("check", "codec=none", "--numel", "99999999999").returncode == 0
    assert run("fly").returncode == 2
    assert run().returncode == 2


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_replay(run: Callable[..., Done], tmp_path: Path, suffix: str) -> None:
    arrays = {"w": np.random.default_rng(0).standard_normal((5, 2, 16, 16)).astype(np.float32), "b": np.ones((5, 2, 16), np.float32)}
    if suffix == ".npz":
        np.savez(tmp_path / "g.npz", **arrays)
    else:
        pytest.importorskip("safetensors.torch").save_file(
            {name: torch.from_numpy(a) for name, a in arrays.items()}, str(tmp_path / "g.safetensors")
        )
    done = run("replay", "dgc:density=0.1 min_numel=0 exchange=gather", f"g{suffix}", "--json", "out.json", "--plot", "out.png")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out.json", "replay")
    assert [row["step"] for row in rows] == list(range(5)) and all(0 < row["payload_bytes"] < row["gradient_bytes"] for row in rows)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_replay_refuses(run: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    (tmp_path / "bad.txt").write_text("1 2 3")
    np.savez(tmp_path / "flat.npz", w=np.ones(3, np.float32))
    for arguments, code in (
        (("dgc", "missing.npz"), 2),
        (("dgc", "bad.npz"), 2),
        (("dgc", "bad.txt"), 2),
        (("dgc:density=9", "flat.npz"), 2),
        (("dgc", "flat.npz"), 2),
    ):
        done = run("replay", *arguments)
        assert done.returncode == code and done.stderr.startswith("thinwire replay: ") and "Traceback" not in done.stderr, (arguments, done)
        assert "bad.npz" not in arguments or "not an .npz archive" in done.stderr, done


def test_outputs_are_refused_before_the_work(run: Callable[..., Done], tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", w=np.ones((2, 2, 64, 512), np.float32))
    for arguments, words in (
        (("replay", "dgc", "g.npz", "--plot", "a.txt"), "a picture ends in .png, .svg or .pdf"),
        (("replay", "dgc", "g.npz", "--plot", "no/a.png"), "no/a.png cannot be written"),
        (("replay", "dgc", "g.npz", "--json", "."), ". cannot be written"),
        (("replay", "dgc", "g.npz", "--json", "./g.npz"), "--json g.npz would overwrite the gradients"),
        (("check", "dgc", "--json", "no/rows.json"), "no/rows.json cannot be written"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and words in done.stderr and done.stdout == "", done
    assert not (tmp_path / "no").exists()


def test_replay_warns_and_shows_what_the_feedback_measures(run: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    np.savez(tmp_path / "g.npz", w=np.random.default_rng(0).standard_normal((3, 2, 64, 512)).astype(np.float32))
    done = run("replay", "econtrol:eta=0.3 exchange=gather", "g.npz")
    assert done.returncode == 0 and "warning: econtrol: eta=0.3 is above twice the contraction" in done.stdout, done
    assert all(word in done.stdout for word in ("eta cuts", "stale", "0.3")) and "owner's" not in done.stdout
    bad = np.ones((3, 2, 64, 512), np.float32)
    bad[1, 0, 5, 5] = np.nan
    np.savez(tmp_path / "nan.npz", w=bad)
    done = run("replay", "dgc", "nan.npz")
    assert done.returncode == 0 and "not finite, NaN on all ranks: 1" in done.stdout, done
    done = run("replay", "codec=sign feedback=ef14 exchange=two_phase", "g.npz")
    assert done.returncode == 0 and "owner's residual norm" in done.stdout and "eta" not in done.stdout and "warning" not in done.stdout, done


@pytest.mark.parametrize("verb", ["info", "check", "replay"])
def test_help(run: Callable[..., Done], tmp_path: Path, verb: str) -> None:
    done = run(verb, "--help")
    assert done.returncode == 0 and "--json" in done.stdout and "exit codes" in done.stdout
    if verb != "info":
        assert "codec=topk" in done.stdout and "momentum" in done.stdout
