"""What the package promises at import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import thinwire
from thinwire import _extension


def test_another_minor_version_of_torch_is_refused() -> None:
    _extension.check_torch("2.11.0", "2.11.3+cu130")
    for found in ("2.10.0", "2.12.0+cpu", "3.11.0"):
        with pytest.raises(ImportError, match=f"2.11.0.*{found[:4]}.*Build it again"):
            _extension.check_torch("2.11.0", found)


def test_missing_torch_is_said_clearly(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['torch'] = None; import thinwire"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1 and "thinwire needs PyTorch" in done.stderr


def test_public_names() -> None:
    assert all(hasattr(thinwire, name) for name in thinwire.__all__)
    assert (Path(thinwire.__file__).parent / "py.typed").exists() and (Path(thinwire.__file__).parent / "_C.pyi").exists()
    info = thinwire.build_info()
    assert info["isa"] in info["isas_built"] and info["torch_found"] == torch.__version__ and info["version"] == thinwire.__version__


def test_mpi_is_reported_as_it_was_built() -> None:
    """The C++ library of the same build tree is the judge: what its MPI transport is compiled against, if there is one."""
    built = thinwire.build_info()["mpi_built"]
    assert built is None or [part.isdecimal() for part in built.split(".")] == [True, True]
    cache = Path(thinwire.__file__).parents[2] / "CMakeCache.txt"
    if not cache.exists():
        pytest.skip("an installed package: no build tree to compare with")
    archive = (cache.parent / "collectives" / "libthinwire_collectives.a").read_bytes()
    assert (built is not None) == (b"MPI_Comm_split" in archive)


def test_forced_instruction_set(tmp_path: Path) -> None:
    import os

    ask = "import thinwire; print(thinwire.build_info()['isa'])"
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, timeout=120, env={**os.environ, "THINWIRE_ISA": "scalar"}, cwd=tmp_path
    )
    assert done.stdout.strip() == "scalar", done.stderr
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, timeout=120, env={**os.environ, "THINWIRE_ISA": "sse9"}, cwd=tmp_path
    )
    assert done.returncode == 1 and "sse9" in done.stderr and "ConfigError" in done.stderr


def test_errors_have_codes() -> None:
    assert {cls.code for cls in thinwire.errors.BY_CODE.values()} == {
        "invalid_config", "invalid_argument", "corrupt_payload", "peer_lost", "timeout", "transport", "device", "unsupported", "internal",
    }  # fmt: skip
    assert all(issubclass(cls, thinwire.Error) and issubclass(cls, RuntimeError) for cls in thinwire.errors.BY_CODE.values())


def test_no_process_group() -> None:
    with pytest.raises(thinwire.Error, match="init_process_group"):
        thinwire.HookState("codec=none")
    with pytest.raises(thinwire.Error, match="DistributedDataParallel"):
        thinwire.attach(torch.nn.Linear(2, 2), "codec=none")
