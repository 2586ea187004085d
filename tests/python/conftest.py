"""Pytest's view of this folder: files here import each other by name; a deadline dumps all stacks before a runner would kill the
process."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from pathlib import Path

import pytest

from programs import python


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """No test of one process takes minutes; the launches have deadlines of their own below this one."""
    faulthandler.dump_traceback_later(420, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert python("launch/data.py", "--digits", "--export", folder).returncode == 0
    return folder
