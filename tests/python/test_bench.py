"""What ./bench/run and tests/run_gpu start, on small data."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from programs import BUILD, NUMEL, ROOT, poll, python, run


# --- what tests/run_gpu starts ----------------------------------------------------------------------------------------------------------------------------------------


def test_the_training_of_gpus_runs_on_the_cpu(digits: Path, tmp_path: Path) -> None:
    result = python("bench/gpu_training.py", "--device", "cpu", "--world", 2, "--batch", 32, "--data", digits, "--json", tmp_path / "rows.json")
    assert result.returncode == 0, result.stdout + result.stderr
    dense, ours = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (dense["world"], dense["steps"], dense["payload_bytes"]) == (2, 22, 22 * 4 * NUMEL)
    assert ours["full_config"].count("exchange=gather") == 1 and ours["payload_bytes"] < dense["payload_bytes"] / 2
    none = python("bench/gpu_training.py", "--data", tmp_path / "nowhere")
    assert none.returncode == 77 and "nowhere" in none.stdout  # run_gpu then skips it by name


def test_goals_are_told_from_what_was_reached(tmp_path: Path) -> None:
    rows = [{"kernel": kernel, "density": density, "ratio_memcpy": ratio, "seconds_median": 1e-3, "numel": 4096}
            for kernel, density, ratio in (("dgc_topk_sampled", 0.0098, 0.84), ("dgc_topk_sampled", 0.0011, 0.85), ("none_topk_exact", 0.01, 0.5), ("ef14_topk_sampled", 0.011, 0.9),
                                           ("ef14_sign", None, 0.86), ("ef14_sign_512", None, 0.5))]
    (tmp_path / "kernels-cuda.json").write_text(json.dumps({"rows": rows, "pairs": [{"pair": "ordered against unordered selection", "ratio": 1.2}]}))
    eager = python("bench/gpu_eager.py", tmp_path / "kernels-cuda.json", "--device", "cpu", "--json", tmp_path / "eager.json")
    assert eager.returncode == 0, eager.stderr
    table = python("bench/gpu_goals.py", tmp_path).stdout
    words = {line[:46].strip(): line.split()[-1] for line in table.splitlines()}
    assert words["dgc_topk_sampled, 0.1%, x copy"] == "met" and words["dgc_topk_sampled, 1.0%, x copy"] == "MISSED"
    assert words["ef14_sign, x copy"] == "met" and words["torch's eager 1-bit step by ef14_sign, time"] in ("met", "MISSED")
    assert words["ordered against unordered selection, time"] == "MISSED" and words["exact selection by the fused EF14 step, time"] == "met"
    assert table.count("not measured") == 12, table  # dgc 8 %, two of ef14, four of econtrol, both bf16, decode, the layers, the hook
    assert python("bench/gpu_goals.py").returncode == 2


def test_bits_packed_by_torch_are_numpys() -> None:
    """The eager 1-bit step that a GPU's rows are compared with sends what the codec would: 1 where !(x < 0), the first element in the lowest bit."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "bench")!r})
import eager, numpy, torch
grad = torch.randn(4096, generator=torch.Generator().manual_seed(3))
grad[:4] = torch.tensor([0.0, -0.0, -1e-45, 1e-45])
for pack in (eager.packed_by_torch, eager.packed_by_numpy):
    residual = torch.zeros(4096)
    bits, scale = eager.eager_ef14_sign(grad, None, residual, None, pack)
    assert numpy.array_equal(numpy.asarray(bits), numpy.packbits(~(grad.numpy() < 0), bitorder="little"))
    assert torch.equal(residual, grad - torch.where(grad < 0, -scale, scale))
"""
    result = run([sys.executable, "-c", program])
    assert result.returncode == 0, result.stderr


def test_the_table_of_eager_operations_wants_rows(tmp_path: Path) -> None:
    for name, text in (("missing.json", None), ("cut.json", '{"rows": ['), ("other.json", "{}")):
        if text is not None:
            (tmp_path / name).write_text(text)
        result = python("bench/gpu_eager.py", tmp_path / name)
        assert result.returncode == 1 and name in result.stderr and "Traceback" not in result.stderr, result.stderr


RUN_GPU = ROOT / "tests" / "run_gpu"


@pytest.mark.parametrize(("arguments", "says"), [
    ([], "usage:"), (["out", "--sources"], "--sources needs a folder"), (["out", "--sources", ""], "--sources needs a folder"),
    (["out", "--sources", "/nonexistent"], "there is no folder /nonexistent"), (["out", "other"], "not out and other"), ([""], "OUT is empty"),
    (["out", "--only"], "--only takes one of: contract"), (["out", "--only", "build"], "--only takes one of"), (["out", "--budget"], "--budget takes seconds"),
    (["out", "--budget", "9m"], "--budget takes seconds"), (["out", "--budget", "0"], "--budget takes seconds"), (["out", "--wrong"], "usage:"), (["--collect"], "--collect needs a folder")])  # fmt: skip
def test_run_gpu_refuses(arguments: list[str], says: str, tmp_path: Path) -> None:
    result = run([RUN_GPU, *arguments], cwd=tmp_path)
    assert result.returncode == 2 and says in result.stderr and not list(tmp_path.iterdir()), result.stdout + result.stderr


def test_what_run_gpu_sanitizes_is_there() -> None:
    """The script looks at each filter before it runs it, but only on a GPU."""
    lines = re.search(r"^sanitized=\(\n(.*?)^\)", RUN_GPU.read_text(), re.DOTALL | re.MULTILINE)
    assert lines is not None
    for line in lines[1].splitlines():
        tools, program, patterns = line.strip().strip('"').split(" ")
        assert set(tools.split(",")) <= {"memcheck", "racecheck", "synccheck"}
        source = (ROOT / "tests" / f"{program}.cpp").read_text()
        for pattern in patterns.split(":"):
            suite, _, name = pattern.partition(".")
            declared = r"TYPED_TEST\(\w+" if suite == "*/cuda" else rf"TEST(_F)?\({suite}"
            name = name.replace("*", r"\w*")
            assert re.search(rf"^{declared}, {name}\)", source, re.MULTILINE), (program, pattern)


class FakeGpu:
    """A machine that says it has a GPU: nothing is built, and what Python is asked to run does as it is told here."""

    def __init__(self, folder: Path, **programs: str) -> None:
        self.out, self.seconds = folder / "out", f"9{os.getpid()}"  # a sleep that no one else sleeps
        self.out.mkdir()
        tools = folder / "tools"
        tools.mkdir()
        cases = "".join(f'  *{name}.py) {body.replace("HANG", f"timeout 500 sleep {self.seconds}")} ;;\n' for name, body in programs.items() if name != "cmake")
        scripts = {"nvidia-smi": "echo fake, 1", "cmake": programs.get("cmake", "true").replace("HANG", f"timeout 500 sleep {self.seconds}"),
                   "python": f'case "$1" in\n{cases}  *) exec {sys.executable} "$@" ;;\nesac'}  # fmt: skip
        for name, body in scripts.items():
            (tools / name).write_text(f"#!/bin/sh\n{body}\n")
            (tools / name).chmod(0o755)
        self.environment = {"PATH": f"{tools}:{os.environ['PATH']}", "THINWIRE_PYTHON": str(tools / "python")}

    def sleeps(self) -> bool:
        return any(self.seconds in line for line in (path.read_text(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()))

    def summary(self) -> dict[str, str]:
        return {line.split()[0]: line.split("s  ", 1)[1] for line in (self.out / "summary.txt").read_text().splitlines() if re.match(r"\w+ +\d+s  ", line)}


def test_run_gpu_ends_what_hangs_and_goes_on(tmp_path: Path) -> None:
    """The hanging program is in a process group of its own, as timeout and mpirun make them."""
    fake = FakeGpu(tmp_path, gpu_eager="echo begun; HANG", hook_overhead="echo not here; exit 77", gpu_training="echo wrong; exit 3")
    (fake.out / "kernels-cuda.json").write_text(json.dumps({"rows": [], "pairs": [{"pair": "ordered against unordered selection", "ratio": 1.05}]}))
    (fake.out / "eager.json").write_text('{"topk_to_exact": 9}')  # of an earlier run
    parts = [word for part in ("eager", "hook", "quickstart") for word in ("--only", part)]
    result = run([RUN_GPU, fake.out, "--budget", "9", *parts], env=fake.environment, seconds=60)
    said = fake.summary()
    assert result.returncode == 1 and list(said) == ["build", "eager", "hook", "quickstart"], result.stdout + result.stderr
    assert said["build"] == "passed" and re.match(r"timed out after \d s, see eager.log", said["eager"]), said
    assert said["hook"] == "skipped: not here" and said["quickstart"] == "FAILED, see quickstart.log", said
    assert not fake.sleeps() and (fake.out / "eager.log").read_text() == "begun\n"
    goals = (fake.out / "goals.txt").read_text()
    assert re.search(r"ordered against unordered.* met", goals) and re.search(r"torch.topk .* not measured", goals), goals
    assert goals in (fake.out / "summary.txt").read_text() and "FAILED after" in result.stdout


def test_run_gpu_without_a_build_stops_within_its_budget(tmp_path: Path) -> None:
    fake = FakeGpu(tmp_path, cmake="HANG")
    started = time.monotonic()
    result = run([RUN_GPU, fake.out, "--budget", "4"], env=fake.environment, seconds=60)
    assert result.returncode == 1 and time.monotonic() - started < 15
    assert list(fake.summary()) == ["build"] and "timed out" in fake.summary()["build"] and not fake.sleeps()


def test_run_gpu_ended_from_outside_leaves_nothing(tmp_path: Path) -> None:
    fake = FakeGpu(tmp_path, cmake="HANG")
    with subprocess.Popen([RUN_GPU, fake.out], env={**os.environ, **fake.environment}, stdout=subprocess.DEVNULL) as process:
        poll(fake.sleeps)
        process.terminate()
        assert process.wait(20) == 143
    poll(lambda: not fake.sleeps(), 10)
    assert fake.summary() == {"build": "ended from outside"}


# --- bench/run training -----------------------------------------------------------------------------------------------------------------------------------------------


def test_training_benchmark(digits: Path, tmp_path: Path) -> None:
    config = "codec=topk:density=0.01,wire=bf16 feedback=ef14"
    result = python("bench/training.py", "--link", "none", "--world", 2, "--width", 256, "--layers", 3, "--rounds", 2, "--block", 2, "--bucket-mb", 0.5, "--config", config,
                    "--data", digits, "--json", tmp_path / "rows.json", "--output", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {row["config"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert list(rows) == ["compute alone", "dense", "bf16_compress_hook", "powerSGD_hook:rank=4", config]
    numel = 784 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
    assert rows["dense"]["payload_bytes_per_step"] == 4 * numel and rows["bf16_compress_hook"]["payload_bytes_per_step"] == 2 * numel
    assert 0.01 * numel * 4 < rows[config]["payload_bytes_per_step"] < 0.05 * 4 * numel
    for name, row in rows.items():
        assert row["seconds_median"] > 0 and row["steps"] == 6 + 2 * 2 and (row["fingerprint"] is None) == (name == "compute alone")
    assert (tmp_path / "training.png").read_bytes()[:4] == b"\x89PNG"


# --- bench/results --------------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in (ROOT / "bench" / "results").glob("*/README.md")))
def test_results_are_shown_as_they_are(folder: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "bench" / "results" / folder, tmp_path / folder)
    result = python("bench/report_results.py", tmp_path / folder)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / folder / "README.md").read_text() == (ROOT / "bench" / "results" / folder / "README.md").read_text(), f"python bench/report_results.py bench/results/{folder}"


# --- bench/run error_control --------------------------------------------------------------------------------------------------------------------------------------------


def test_error_control_benchmark(tmp_path: Path) -> None:
    result = python("bench/error_control.py", "--quick", "--json", tmp_path / "rows.json", "--plot", tmp_path / "picture.png", env={"THINWIRE_BUILD": str(BUILD)})
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["section"] for row in rows} == {"quadratics", "least_squares"} and "all as expected" in result.stdout
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


# --- bench/run quality -------------------------------------------------------------------------------------------------------------------------------------------------


def test_text_training() -> None:
    """A few steps of a small one: the row of both optimizers, and that 1-bit Adam did freeze."""
    small = ["--steps=12", "--batch=2", "--length=16", "--width=32", "--layers=1"]
    program = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "bench")!r})
import quality
print(json.dumps([quality.train_text(0, config, {small}) for config in ("", "onebit_adam:freeze=6 min_numel=1024")]))
"""
    result = run([sys.executable, "-c", program])
    assert result.returncode == 0, result.stdout + result.stderr
    dense, ours = json.loads(result.stdout.splitlines()[-1])
    assert (dense["config"], dense["frozen_step"], dense["steps"], dense["world"]) == ("codec=none", None, 12, 2)
    assert ours["frozen_step"] == 6 and ours["freeze_reason"] == "freeze=6" and ours["wire_bytes"] < 0.8 * dense["wire_bytes"] == 0.8 * ours["dense_bytes"]
    assert ours["fingerprint"] != dense["fingerprint"]
    for row in (dense, ours):
        assert 0 < row["accuracy"] < 1 and 1 < row["validation_loss"] < 6, row
