"""Inside a job: where a process stands, whether it may start, and when the batch script puts the job back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launch.place import Place, address_of, first_host, port_of
from launch.restarts import newest_checkpoint, refused
from lmp.cluster import ClusterConfig
from lmp.errors import UserError
from lmp.train.run_folder import RunFolder
from tests.launch.fake_slurm import FakeSlurm
from tests.runs import ROOT, config_of, environment, write_config

STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "12",
    "SLURM_JOB_NODELIST": "gpu-[03-05]",
    "SLURM_TASKS_PER_NODE": "4(x3)",
    "SLURM_STEP_NODELIST": "gpu-[04-05]",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    for name, value in fake.environment.items():
        monkeypatch.setenv(name, value)
    return fake


def test_the_place_is_that_of_the_step_and_not_of_the_job(slurm: FakeSlurm) -> None:
    place = Place.read(STEP)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 8, 1, 4)
    assert place.master_address == "10.0.0.7"  # gpu-04 does not resolve
    assert slurm.asked == ["scontrol show node -o gpu-04"]
    assert (place.job, place.restart) == ("41", 0)


def test_a_name_that_resolves_is_kept(slurm: FakeSlurm) -> None:
    assert address_of("localhost") == "localhost"
    assert slurm.asked == []


def test_an_element_of_an_array_is_named_by_the_array() -> None:
    element = {**STEP, "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    place = Place.read({**element, "SLURM_STEP_NODELIST": "localhost"})
    assert (place.job, place.restart) == ("40_3", 2)


def test_outside_of_a_job_there_is_no_place() -> None:
    with pytest.raises(UserError, match="SLURM_PROCID"):
        Place.read({"SLURM_JOB_ID": "1"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[3-5]", "n3"), ("n[007,9]-x,m", "n007-x"), ("r[1-2]n[4-5]", "r1n4")],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_ports_of_neighbours_and_restarts_do_not_meet() -> None:
    ports = [port_of(job, restart) for job in range(7000, 7300) for restart in range(37)]
    assert len(set(ports)) == len(ports)
    assert all(20_000 <= port_of(job, 0) < 32_000 for job in range(0, 10**7, 1237))


def launches(*checkpoints: str, job: str = "41") -> list[dict[str, object]]:
    return [{"event": "launch", "job": job, "checkpoint": checkpoint} for checkpoint in checkpoints]


@pytest.mark.parametrize(
    ("events", "restart", "checkpoint", "words"),
    [
        ([], 0, "none", None),
        (launches("none", "none"), 2, "none", None),
        (launches("none", "none", "none"), 3, "none", "crash loop: the last 3 starts began without a checkpoint"),
        (launches("none", "none", "none"), 3, "step-5 of 1", None),
        (launches("step-5 of 1") * 3, 3, "step-5 of 1", "crash loop: the last 3 starts began from checkpoint step-5"),
        (launches("step-5 of 1") * 3, 3, "step-5 of 2", None),
        (launches("none", "step-5 of 1", "step-5 of 1"), 3, "step-5 of 1", None),
        (launches("none", "none", "none", job="40"), 0, "none", None),
        (launches("none", "none", "none", job="40") + launches("none"), 1, "none", None),
        ([], 6, "none", "restarted 6 times, cluster.max_restarts=5"),
    ],
)
def test_crash_loops(events: list, restart: int, checkpoint: str, words: str | None) -> None:
    cluster = ClusterConfig(max_restarts=5)
    reason = refused(events, job="41", restart=restart, checkpoint=checkpoint, cluster=cluster)
    assert reason is None if words is None else words in (reason or "")


def test_a_checkpoint_made_anew_is_another_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert newest_checkpoint(folder) == "none"
    for name in ("step-00000005", "step-00000010", "step-00000015.tmp"):
        (folder.checkpoints / name).mkdir(parents=True)
    before = newest_checkpoint(folder)
    assert before.startswith("step-00000010 of ")
    os.utime(folder.checkpoints / "step-00000010", (1, 1))
    assert newest_checkpoint(folder) != before


def task(
    folder: Path, slurm: FakeSlurm, *, overrides: Sequence[str] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """One task of a job, as slurm/train.sbatch starts it."""
    config = write_config(folder / "config.yaml", config_of(folder / "shards"))
    step = {**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "localhost"}
    return subprocess.run(
        [sys.executable, "-m", "launch.job", str(folder / "run"), str(config), *overrides],
        env={**environment(), **slurm.environment, **step, "LMP_HANDOVER": str(folder / "handover"), **variables},
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
    )


def test_a_finished_run_ends_at_once(tmp_path: Path, slurm: FakeSlurm) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/DONE").write_text('{"step": 20}')
    done = task(tmp_path, slurm)
    assert done.returncode == 0, done.stderr
    assert "finished already, at step 20" in (tmp_path / "run/logs/rank-0000.log").read_text()
    assert not (tmp_path / "run/ledger.jsonl").exists()


def test_a_crash_loop_is_refused_with_its_reason(tmp_path: Path, slurm: FakeSlurm) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/ledger.jsonl").open("w") as ledger:
        ledger.writelines(json.dumps(event) + "\n" for event in launches("none", "none", "none"))
        ledger.write('{"event": "laun')
    done = task(tmp_path, slurm)
    assert done.returncode == 3, done.stderr
    line = done.stdout.splitlines()[-1]
    assert line.startswith("error: crash loop: the last 3 starts")
    assert (tmp_path / "handover").read_text().splitlines() == [f"run {tmp_path / 'run'}", f"exit 3 {line}"]
    last = json.loads((tmp_path / "run/ledger.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "refused" and "crash loop" in last["reason"]
    record = json.loads((tmp_path / "run/job.json").read_text())
    assert record["job"] == "41", "a job that was not submitted by launch.slurm is found too"


def test_a_job_that_was_asked_to_stop_does_not_begin_anew(tmp_path: Path, slurm: FakeSlurm) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/STOP").touch()
    assert task(tmp_path, slurm, SLURM_RESTART_COUNT="1").returncode == 75, "the others are to be ended by srun"
    assert "exit 0" in (tmp_path / "handover").read_text()
    assert not (tmp_path / "run/STOP").exists()


def test_the_stop_file_of_an_earlier_job_is_not_for_this_one(tmp_path: Path, slurm: FakeSlurm) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/STOP").touch()
    assert task(tmp_path, slurm, overrides=["data.train=[/nowhere]"]).returncode == 2
    assert not (tmp_path / "run/STOP").exists(), "a restart would take it for a wish of its own"


def test_a_users_mistake_is_one_line_and_no_requeue(tmp_path: Path, slurm: FakeSlurm) -> None:
    done = task(tmp_path, slurm, overrides=["train.stesp=5"])
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stdout.splitlines()[-1] and "train.stesp" in done.stdout.splitlines()[-1]
    assert done.stdout.splitlines()[-1] in (tmp_path / "run/logs/rank-0000.log").read_text()
    assert f"exit 2 {done.stdout.splitlines()[-1]}" in (tmp_path / "handover").read_text()


def test_a_folder_of_another_running_job_is_refused(tmp_path: Path, slurm: FakeSlurm) -> None:
    (tmp_path / "run").mkdir()
    record = {"job": "41", "cluster": "fake", "submitted": "", "directory": "", "command": [], "code": "", "config": ""}
    (tmp_path / "run/job.json").write_text(json.dumps({**record, "world_size": 1, "earlier": []}))
    slurm.job_is("RUNNING")
    done = task(tmp_path, slurm, SLURM_JOB_ID="42")
    assert done.returncode == 2
    assert "is the run folder of job 41, which is RUNNING" in done.stdout


class Batch:
    """A batch script around a step that is a piece of shell."""

    def __init__(self, folder: Path, slurm: FakeSlurm) -> None:
        self.folder, self.slurm = folder, slurm
        (folder / "run").mkdir()

    def start(self, step: str, *, restart: int = 0, bound: int = 5) -> subprocess.Popen[str]:
        script = f'. "{ROOT}/slurm/step.sh" "{self.folder}" {bound}\nsrun something\nafter_step $?\n'
        # The requeue ends a batch script; here its wait for that does.
        variables = {"SLURM_JOB_ID": "41", "SLURM_RESTART_COUNT": str(restart), "FAKE_STEP": step}
        return subprocess.Popen(
            ["bash", "-c", f"sleep() {{ exit 99; }}\n{script}"],
            env={**os.environ, **self.slurm.environment, **variables},
            text=True,
            stdout=subprocess.PIPE,
        )

    def run(self, step: str, *, restart: int = 0, bound: int = 5) -> tuple[int, bool]:
        """Exit code, and whether the job was put back in the queue."""
        process = self.start(step, restart=restart, bound=bound)
        process.communicate(timeout=30)
        requeued = "scontrol requeue 41" in self.slurm.asked
        return process.returncode, requeued

    @property
    def tell(self) -> str:
        return f'echo "run {self.folder}/run" > $LMP_HANDOVER; '


@pytest.fixture
def batch(tmp_path: Path, slurm: FakeSlurm) -> Batch:
    slurm.job_is("RUNNING")
    return Batch(tmp_path, slurm)


@pytest.mark.parametrize(
    ("step", "code", "requeued"),
    [
        ("true", 0, False),
        ("exit 2", 2, False),
        ("exit 3", 3, False),
        ("exit 75", 99, True),
        ("kill -9 $$", 99, True),
        ("exit 1", 99, True),
        ("echo exit 2 >> $LMP_HANDOVER; exit 143", 2, False),
        ("echo exit 0 >> $LMP_HANDOVER; exit 75", 0, False),
        ("echo exit 3 >> $LMP_HANDOVER; kill -9 $$", 3, False),
        ("echo requeue SIGUSR2 >> $LMP_HANDOVER", 99, True),
    ],
)
def test_what_a_step_ends_with_decides(batch: Batch, step: str, code: int, requeued: bool) -> None:
    assert batch.run(batch.tell + step) == (code, requeued)
    ledger = batch.folder / "run/ledger.jsonl"
    events = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    assert [event["event"] for event in events] == (["requeue"] if requeued else ["refused"] if code == 2 else [])


def test_a_mistake_told_by_one_of_many_is_in_the_ledger(batch: Batch) -> None:
    told = 'exit 2 error: "a" holds no manifest'
    step = f"echo '{told}' >> $LMP_HANDOVER; exit 137"
    assert batch.run(batch.tell + step) == (2, False)
    (event,) = [json.loads(line) for line in (batch.folder / "run/ledger.jsonl").read_text().splitlines()]
    assert event["reason"] == "error: 'a' holds no manifest"


def test_word_of_an_earlier_start_does_not_count(batch: Batch) -> None:
    (batch.folder / "handover-41").write_text("requeue SIGUSR2\n")
    assert batch.run("true") == (0, False)


def test_a_function_that_raised_is_not_tried_again(batch: Batch) -> None:
    (batch.folder / "41_0_result.pkl").touch()
    assert batch.run("exit 1") == (1, False)


def test_restarts_are_bounded(batch: Batch) -> None:
    assert batch.run(batch.tell + "exit 75", restart=5) == (3, False)
    assert '"event": "refused"' in (batch.folder / "run/ledger.jsonl").read_text()


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "NODE_FAIL"])
def test_a_cancelled_job_stays_so(batch: Batch, state: str) -> None:
    batch.slurm.job_is(state)
    assert batch.run(batch.tell + "echo requeue SIGTERM >> $LMP_HANDOVER")[1] is False


def test_the_time_limit_is_followed_by_a_requeue(batch: Batch) -> None:
    """SLURM leaves such a job at TIMEOUT; the processes here do not end."""
    up, enough = batch.folder / "up", batch.folder / "enough"
    process = batch.start(batch.tell + f"trap : TERM; touch {up}; until [ -e {enough} ]; do command sleep 0.05; done")
    try:
        until(up.exists)
        batch.slurm.job_is("COMPLETING", "TimeLimit")
        process.send_signal(signal.SIGTERM)
        until(lambda: "scontrol requeue 41" in batch.slurm.asked)
    finally:
        enough.touch()
        process.communicate(timeout=30)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
