"""Every DDP feature on real Gloo processes: one launch per world, one test per feature."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
from ranks import Launch

HERE = Path(__file__).parent
SCRIPT = HERE / "ddp_features.py"
SECONDS = 300  # a launch of all features takes about 30


def features() -> list[str]:
    """Names of the decorated functions, without importing torch's process groups into this process."""
    return [
        n.name
        for file in ("ddp_models.py", "ddp_layouts.py", "ddp_onebit.py", "ddp_onebit_freeze.py", "ddp_onebit_groups.py", "ddp_state.py", "ddp_errors.py", "ddp_threads.py")
        for n in ast.parse((HERE / file).read_text()).body
        if isinstance(n, ast.FunctionDef) and any(isinstance(d, ast.Name) and d.id == "feature" for d in n.decorator_list)
    ]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> object:
    @cache
    def launch(world: int, *chosen: str) -> Launch:
        made = Launch(SCRIPT, world, tmp_path_factory.mktemp(f"world{world}"), *chosen)
        made.codes = made.wait(SECONDS)
        return made

    return launch


def check(launch: Launch, feature: str) -> None:
    said = [launch.result(rank).get(feature) for rank in range(launch.world)]
    if all(s == "ok" for s in said):
        return
    if all(s in (None, "ok") for s in said):
        stopped = {name: s for r in range(launch.world) for name, s in launch.result(r).items() if s != "ok"}
        pytest.fail(
            f"not finished on ranks {[r for r, s in enumerate(said) if s is None]} (exit codes {launch.codes}); failed before: {list(stopped)}\n{launch.log(0)}"
        )
    pytest.fail("\n".join(f"rank {r}: {s}" for r, s in enumerate(said) if s not in (None, "ok")))


@pytest.mark.parametrize("feature", [f for f in features() if f != "elastic_4_2_4"])
@pytest.mark.parametrize("world", [2, 3])
def test_feature(launches: object, world: int, feature: str) -> None:
    check(launches(world, *[f for f in features() if f != "elastic_4_2_4"]), feature)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_end_well(launches: object, world: int) -> None:
    launch = launches(world, *[f for f in features() if f != "elastic_4_2_4"])
    assert launch.codes == [0] * world, launch.log(0)


def test_elastic_4_2_4(launches: object) -> None:
    check(launches(4, "elastic_4_2_4"), "elastic_4_2_4")
