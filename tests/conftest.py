"""Fixtures that every room shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data named by LMP_TEST_DATA; the test is skipped without one."""
    folder = os.environ.get("LMP_TEST_DATA")
    if not folder:
        pytest.skip("LMP_TEST_DATA does not name the folder of real data")
    if not Path(folder).is_dir():
        pytest.skip(f"LMP_TEST_DATA names {folder}, which is not there")
    return Path(folder)
