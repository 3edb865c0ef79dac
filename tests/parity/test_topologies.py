"""Whole runs by the launcher follow one curve whatever the processes are; test_grid.py has every combination."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.runs import config_of, make_shards, metrics, run, write_config

pytestmark = pytest.mark.multiprocess

REFERENCE = (1, 1, 1)
OTHERS = [(2, 1, 1), (2, 3, 2)]
"""(processes, ZeRO stage, processes that share one pack)"""

Ended = tuple[Path, CompletedProcess[str]]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("topologies")
    shards = make_shards(folder / "shards")

    def go(topology: tuple[int, int, int]) -> Ended:
        processes, zero, sequence = topology
        name = f"{processes}-zero{zero}-sequence{sequence}"
        sections = {"parallel": {"zero": zero, "sequence": sequence}, "checkpoint": {"every_steps": 20}}
        config = write_config(folder / f"{name}.yaml", config_of(shards, **sections))
        return folder / name, run(str(config), "-n", str(processes), "--run", str(folder / name))

    with ThreadPoolExecutor(2) as pool:
        yield {topology: pool.submit(go, topology) for topology in [REFERENCE, *OTHERS]}


def curve(started: dict[tuple[int, int, int], Future[Ended]], topology: tuple[int, int, int], key: str) -> list[float]:
    folder, ended = started[topology].result()
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 21))
    return [line[key] for line in lines]


@pytest.mark.parametrize("topology", OTHERS, ids=lambda t: f"n{t[0]}-zero{t[1]}-sequence{t[2]}")
def test_curves_equal_those_of_one_process(started, topology) -> None:
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-3)):
        expected = curve(started, REFERENCE, key)
        assert curve(started, topology, key) == pytest.approx(expected, rel=tolerance), key


def test_the_reference_learns(started) -> None:
    losses = curve(started, REFERENCE, "loss")
    assert len(set(losses)) == 20
    assert min(losses[10:]) < losses[0]
