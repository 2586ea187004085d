"""Pytest's view of this folder: files here import each other by name; a deadline dumps all stacks before a runner would kill the process."""

from __future__ import annotations

import faulthandler

import pytest


@pytest.fixture(autouse=True)
def deadline() -> object:
    """No test of one process takes minutes; the launches have deadlines of their own below this one."""
    faulthandler.dump_traceback_later(420, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
