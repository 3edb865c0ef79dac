"""The learning rate over a run, the ways to ask a run to stop, and slow ranks."""

from __future__ import annotations

import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lmp.config import OptimizerConfig
from lmp.parallel.mesh import Mesh
from lmp.train.engine import learning_rate
from lmp.train.health import REQUEUE_FILE, SIGNALS, Pace, Stop, stop_requests


def rates(steps: int, **settings: float) -> list[float]:
    optimizer = OptimizerConfig(lr=1.0, **settings)
    return [learning_rate(step, steps=steps, settings=optimizer) for step in range(steps)]


def test_warm_up_is_linear_from_the_first_step() -> None:
    assert rates(100, warmup_fraction=0.1)[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])


def test_decay_is_a_cosine_to_the_final_fraction() -> None:
    found = rates(1000, warmup_fraction=0.1, final_lr_fraction=0.2)
    after = found[100:]
    assert after[0] == pytest.approx(1.0)
    assert all(earlier > later for earlier, later in pairwise(after))
    assert found[550] == pytest.approx(0.6)
    assert found[-1] == pytest.approx(0.2, abs=1e-4)
    assert min(found[99:]) >= 0.2


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert rates(10, warmup_fraction=0.0)[0] == pytest.approx(1.0)


def test_beyond_the_last_step_the_rate_stays() -> None:
    settings = OptimizerConfig(lr=1.0, final_lr_fraction=0.1)
    assert learning_rate(500, steps=100, settings=settings) == pytest.approx(0.1)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_asks_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests(tmp_path / "STOP") as stop:
        assert stop() is Stop.NO
        os.kill(os.getpid(), number)
        assert stop() is (Stop.STAY if number == signal.SIGINT else Stop.REQUEUE)
        assert stop.reason == number.name
    assert signal.getsignal(number) == before


def test_the_stop_file_asks_to_stop_for_good(tmp_path: Path) -> None:
    with stop_requests(tmp_path / "STOP") as stop:
        assert stop() is Stop.NO
        (tmp_path / "STOP").touch()
        assert stop() is Stop.STAY
        assert "STOP" in stop.reason


def test_the_file_of_a_batch_script_asks_to_go_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUEUE_FILE, str(tmp_path / "stop-0"))
    with stop_requests(tmp_path / "STOP") as stop, stop_requests(tmp_path / "STOP", looks=False) as other:
        assert stop() is Stop.NO
        (tmp_path / "stop-0").touch()
        assert stop() is Stop.REQUEUE
        assert other() is Stop.NO, "only one rank looks"
        (tmp_path / "STOP").touch()
        assert stop() is Stop.STAY, "a person's wish goes before a scheduler's"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() is Stop.STAY


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_forked_child_does_not_take_part(tmp_path: Path, number: signal.Signals) -> None:
    with stop_requests(tmp_path / "STOP") as stop:
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), number)
                time.sleep(0.05 if number == signal.SIGUSR2 else 30)
            finally:
                os._exit(0 if stop() is Stop.NO else 1)
        _, status = os.waitpid(child, 0)
        if number == signal.SIGUSR2:
            assert os.waitstatus_to_exitcode(status) == 0
        else:
            assert os.waitstatus_to_exitcode(status) == -number
        assert stop() is Stop.NO


def test_a_rank_that_is_slow_for_long_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [1.0, 1.0, 1.0, 1.0]
    monkeypatch.setattr(dist, "all_gather_object", lambda found, _: found.__setitem__(slice(None), list("abcd")))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.copy_(torch.tensor(times, dtype=tensor.dtype)))
    said: list[str] = []
    mesh = Mesh(rank=0, world_size=4, sequence=1, device=torch.device("cpu"), sequence_group=None)
    pace = Pace(mesh, percent=20, say=lambda text, event, **facts: said.append(f"{event}: {text}"))
    assert pace.compare(1, 1.0) == []
    times[2] = 1.5
    assert [pace.compare(step, 1.0) for step in (2, 3, 4, 5)] == [[], [], [2], [2]]
    assert said == ["stragglers: step 4: slower than the median for long: rank 2 on c 50 %"]
    assert pace.facts == {"slowest_percent": pytest.approx(50), "stragglers": 1}
    times[2] = 1.1
    assert pace.compare(6, 1.0) == [] and pace.facts["stragglers"] == 0
