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


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each call of os.preadv has delivered, from here on; to be cleared at will."""
    read: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(preadv(descriptor, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counting)
    return read
