"""Jobs through the executor on a real SLURM: what sbatch refuses, arrays, what is tried again and what is not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from launch.executor import CHECKOUT
from launch.slurm import executor, job_state, submit, submit_array, wait
from lmp.cluster import ClusterConfig
from lmp.errors import UserError
from tests.cluster.conftest import Slurm

pytestmark = pytest.mark.slurm

FUNCTIONS = """
import os

def divide(number):
    if number == 1 and "SLURM_RESTART_COUNT" not in os.environ:
        os.kill(os.getpid(), 9)
    return 10 // number, os.getcwd() in __import__("sys").path
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the code with one more module, which is what the jobs import."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "functions_of_test.py").write_text(FUNCTIONS)
    for name in ("lmp", "launch", "slurm"):
        (folder / name).symlink_to(CHECKOUT / name)
    monkeypatch.syspath_prepend(folder)
    return folder


def test_a_killed_function_is_called_again_and_one_that_raised_is_not(slurm: Slurm, code: Path, tmp_path: Path) -> None:
    import functions_of_test  # type: ignore[import-not-found]

    cluster = ClusterConfig(time=5, array_parallelism=2, python=sys.executable)
    jobs = submit_array(
        executor(tmp_path / "jobs", cluster, name="divide", code=code), functions_of_test.divide, [(1,), (0,), (2,)]
    )
    array = jobs[0].job_id.split("_")[0]
    after = executor(tmp_path / "after", cluster, name="after", dependency=f"afterok:{array}", code=code)
    dependent = submit(after, functions_of_test.divide, 5)
    assert [wait(job.job_id, 100) for job in jobs] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert [jobs[0].result(), jobs[2].result()] == [(10, False), (5, False)]
    assert slurm.field(jobs[0].job_id, "Restarts") == "1"
    assert slurm.field(jobs[1].job_id, "Restarts") == "0"
    assert wait(dependent.job_id, 60) == "CANCELLED", "what it waits for cannot come true any more"
    assert job_state(array) == "FAILED"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"partition": "nowhere"}, "invalid partition specified: nowhere"),
        ({"sbatch": {"begin": "whenever"}}, "whenever"),
        ({"nodelist": "nobody"}, "Invalid node name specified"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_no_file(
    slurm: Slurm, tmp_path: Path, capfd: pytest.CaptureFixture[str], asked: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError) as caught:
        submit(executor(tmp_path / "jobs", ClusterConfig.model_validate(asked), name="refused"), os.getcwd)
    assert words in caught.value.problem and "\n" not in caught.value.problem
    assert list((tmp_path / "jobs").iterdir()) == []
    assert capfd.readouterr().err == ""
