"""On the login node: what is refused before it costs queue time, the script, the snapshot, and watching a run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.executor import executor, submit_array
from launch.slurm import job_state, main, wait
from launch.slurm_state import refusal
from launch.snapshot import Snapshot
from launch.watch import duration
from lmp.cluster import ClusterConfig
from lmp.errors import UserError
from tests.launch.fake_slurm import FakeSlurm
from tests.runs import ROOT, config_of, make_shards, write_config


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    for name, value in fake.environment.items():
        monkeypatch.setenv(name, value)
    return fake


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def config(tmp_path: Path, shards: Path) -> Path:
    cluster = {"nodes": 2, "tasks_per_node": 2, "time": 10, "setup": ["module load cuda"], "preflight": False}
    return write_config(tmp_path / "config.yaml", config_of(shards, cluster=cluster))


def sbatch(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def test_a_dry_run_prints_what_would_be_submitted_and_writes_nothing(
    config: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(config), "--run", str(tmp_path / "run"), "--partition", "on", "--time", "1-00:00:00", "train.steps=30"]
    before = sorted(tmp_path.rglob("*"))
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out.rstrip("\n")
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before] == []
    assert slurm.asked == []

    assert main(words) == 0
    assert (slurm.folder / "script").read_text().rstrip("\n") == shown
    asked = sbatch(shown)
    assert (asked["nodes"], asked["ntasks-per-node"], asked["time"]) == ("2", "2", "1440")
    assert (asked["partition"], asked["signal"], asked["open-mode"]) == ("on", "USR2@120", "append")
    assert "requeue" in asked and "gpus-per-node" not in asked and "wckey" not in asked
    subprocess.run(["bash", "-n"], input=shown, text=True, check=True)


def test_a_submission_keeps_code_configuration_and_record(
    config: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([str(config), "--run", str(run), "--nodes", "1", "train.steps=30", "--new-data"]) == 0
    assert "job 41: 1 nodes x 2 processes" in capsys.readouterr().out
    record = json.loads((run / "job.json").read_text())
    assert (record["job"], record["cluster"], record["world_size"]) == ("41", "fake", 2)
    resolved = yaml.safe_load(Path(record["config"]).read_text())
    assert (resolved["train"]["steps"], resolved["cluster"]["nodes"]) == (30, 1)
    assert (run / "code/lmp/train/trainer.py").read_bytes() == (ROOT / "lmp/train/trainer.py").read_bytes()
    assert f"export PYTHONPATH={run}/code" in (slurm.folder / "script").read_text()
    assert not (run / "code/tests").exists()
    (event,) = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert event["event"] == "submit" and "train.steps=30" in event["command"]

    slurm.job_is("PENDING", "Resources")
    asked = len(slurm.asked)
    assert main([str(config), "--run", str(run)]) == 2
    told = capsys.readouterr().err
    assert "is the run folder of job 41, which is PENDING" in told and f"cancel {run}" in told
    assert not any(line.startswith("sbatch") for line in slurm.asked[asked:])

    slurm.job_is("FAILED", "NonZeroExitCode")
    assert main([str(config), "--run", str(run)]) == 0
    record = json.loads((run / "job.json").read_text())
    assert (record["earlier"], Path(record["config"]).name) == (["41"], "config-2.yaml")
    assert sorted(path.name for path in run.glob("code*")) == ["code"], "the same code is kept once"


def test_a_refusal_by_sbatch_is_one_line_and_leaves_nothing(
    config: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config), "--run", str(tmp_path / "run"), "--partition", "nowhere"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: sbatch refused the job: invalid partition specified: nowhere") and " -> " in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--nodes", "3"], "packs_per_step=4 cannot be dealt evenly to 6"),
        (["--nodes", "many", "train.stesp=1"], "2 faults: train.stesp: "),
        (["data.train=[nowhere]"], "nowhere"),
        (["--environment", "nowhere.sh"], "cluster.environment=nowhere.sh: no such file"),
        (["--time", "1"], "cluster.time=1 with cluster.signal_seconds=120"),
    ],
)
def test_a_users_mistake_costs_no_queue_time(
    config: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    assert main([str(config), "--run", str(tmp_path / "run"), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert slurm.asked == [] and not (tmp_path / "run").exists()


def test_a_finished_run_is_not_submitted(
    config: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/DONE").write_text('{"step": 20}')
    assert main([str(config), "--run", str(tmp_path / "run")]) == 0
    assert "finished already, at step 20" in capsys.readouterr().out
    assert slurm.asked == []


def test_every_key_of_the_section_reaches_the_script(tmp_path: Path) -> None:
    (tmp_path / "net.sh").write_text("")
    cluster = ClusterConfig(
        nodes=4,
        gpus_per_node=8,
        cpus_per_task=12,
        memory=0,  # type: ignore[arg-type]  # as YAML gives it
        account="a",
        qos="q",
        constraint="h100&ib",
        reservation="r",
        nodelist="n[1-9]",
        exclude="n5",
        comment="a b",
        sbatch={"mail_user": "me@here", "--exclusive": True, "no-kill": False},
        srun=["--container-image=x y"],
        setup=["module load cuda"],
        environment=str(tmp_path / "net.sh"),
        python="/opt/env/bin/python",
    )
    script = executor(tmp_path, cluster, name="x", dependency="afterok:7", code=Path("/c o"), run=tmp_path).script()
    asked = sbatch(script)
    assert {key: asked[key] for key in ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem")} == {
        "nodes": "4",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "mem": "0",
    }
    assert (asked["constraint"], asked["comment"], asked["mail-user"]) == ("'h100&ib'", "'a b'", "me@here")
    assert (asked["reservation"], asked["dependency"], asked["kill-on-invalid-dep"]) == ("r", "afterok:7", "yes")
    assert "exclusive" in asked and "no-kill" not in asked
    lines = script.splitlines()
    order = [lines.index("module load cuda"), lines.index(f". {tmp_path}/net.sh")]
    order += [next(n for n, line in enumerate(lines) if part in line) for part in ("preflight.sh", "step.sh", "srun -")]
    assert order == sorted(order)
    assert "'--container-image=x y' /opt/env/bin/python -u -m submitit" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)

    gres = executor(tmp_path, ClusterConfig(gpus_per_node=8, gres="gpu:h100:8"), name="x").script()
    assert (sbatch(gres)["gres"], sbatch(gres)["ntasks-per-node"]) == ("gpu:h100:8", "8")
    assert "gpus-per-node" not in gres and "preflight" not in gres


def test_a_job_submitted_from_a_job_does_not_inherit_it(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "SLURM_JOB_ID": "9",
        "SLURM_CPU_BIND": "x",
        "SLURM_CONF": "/c",
        "SBATCH_TIMELIMIT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    jobs = submit_array(executor(tmp_path / "jobs", ClusterConfig(), name="x"), pow, [(2, 3), (3, 2), (1, 1)])
    assert [job.job_id for job in jobs] == ["41_0", "41_1", "41_2"]
    asked = sbatch((slurm.folder / "script").read_text())
    assert (asked["array"], asked["output"]) == ("0-2%3", f"{tmp_path}/jobs/%A_%a_0_log.out")
    passed = dict(line.partition("=")[::2] for line in (slurm.folder / "environment").read_text().splitlines())
    assert passed["SLURM_CONF"] == "/c"
    assert not {"SLURM_JOB_ID", "SLURM_CPU_BIND", "SBATCH_TIMELIMIT"} & set(passed)
    assert os.environ["SLURM_JOB_ID"] == "9"


def test_refusals_are_told_once() -> None:
    told = (
        "sbatch: error: Memory specification can not be satisfied\n"
        "sbatch: error: Batch job submission failed: Requested node configuration is not available\n"
    )
    assert refusal(told) == ("Memory specification can not be satisfied; Requested node configuration is not available")
    assert refusal("sbatch: error: Batch job submission failed: Invalid account") == "Invalid account"


def checkout(folder: Path) -> Path:
    """A small git repository that looks like lmp's."""
    for name in ("lmp/__init__.py", "lmp/a.py", "launch/b.py", "tests/t.py", "configs/c.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    return folder


def test_a_snapshot_is_the_work_tree_and_does_not_change(tmp_path: Path) -> None:
    source, run = checkout(tmp_path / "checkout"), tmp_path / "run"
    run.mkdir()
    (source / "lmp/a.py").write_text("edited\n")
    (source / "lmp/new.py").write_text("new\n")
    (source / "lmp/weights.bin").write_bytes(b"0")
    (source / "configs/c.yaml").unlink()
    first = Snapshot.of(source, run)
    assert not list(run.iterdir())
    assert first.take() and first.folder == run / "code"
    have = {str(path.relative_to(first.folder)) for path in first.folder.rglob("*") if path.is_file()}
    assert have == {
        *("lmp/__init__.py", "lmp/a.py", "lmp/new.py", "launch/b.py"),
        *("snapshot.json", "changes.patch"),
    }
    assert "+edited" in (first.folder / "changes.patch").read_text()
    facts = json.loads((first.folder / "snapshot.json").read_text())
    assert facts["digest"] == first.digest and facts["changed"] is True

    assert Snapshot.of(source, run).take() is False
    (source / "lmp/a.py").write_text("edited again\n")
    assert (first.folder / "lmp/a.py").read_text() == "edited\n"
    second = Snapshot.of(source, run)
    assert second.take() and second.folder == run / "code-2"
    assert Snapshot.of(first.folder, tmp_path / "other").digest == first.digest, "a job submits what it runs itself"


def test_a_snapshot_needs_code(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no lmp"):
        Snapshot.of(tmp_path, tmp_path / "run")


def running(tmp_path: Path, slurm: FakeSlurm, *events: dict[str, object]) -> Path:
    """A run folder as a job leaves it."""
    run = tmp_path / "run"
    (run / "checkpoints/step-00000100").mkdir(parents=True)
    (run / "config.yaml").write_text("train: {steps: 200}\n")
    config = {"job": "41", "cluster": "fake", "submitted": "", "directory": "", "command": [], "code": "", "config": ""}
    (run / "job.json").write_text(json.dumps({**config, "world_size": 4, "earlier": []}))
    with (run / "ledger.jsonl").open("w") as ledger:
        ledger.writelines(json.dumps({"time": "12:00", **event}) + "\n" for event in events)
    with (run / "metrics.jsonl").open("w") as metrics:
        for step in range(1, 121):
            line = {"step": step, "loss": 1 / step, "seconds": 2.0, "seconds_waiting_for_data": 0.5}
            metrics.write(json.dumps({**line, "shots_per_second": 64.0}) + "\n")
        metrics.write('{"step": 12')
    slurm.job_is("RUNNING")
    return run


def launched(restart: int) -> dict[str, object]:
    return {"event": "launch", "job": "41", "restart": restart, "checkpoint": "none"}


def test_status(tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    saved = {"event": "saved", "step": 100}
    run = running(tmp_path, slurm, launched(0), {"event": "start", "step": 0}, saved, launched(1), {"event": "start"})
    assert main(["status", str(run)]) == 0
    first, progress, left, checkpoint, *events = capsys.readouterr().out.splitlines()
    assert first == f"{run}: job 41 is RUNNING, restarted 1 time"
    assert progress == "step 120 of 200 (60 %), loss 0.0083, 64 shots/s, 2 s a step"
    assert left == "about 3 min of training left, waiting in queues aside"
    assert checkpoint.startswith("newest checkpoint step-00000100, ")
    assert len(events) == 4 and not any("saved" in event for event in events)

    slurm.job_is("PENDING", "BeginTime")
    assert main(["status", "--json", str(run)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["why"], told["step"], told["seconds_left"]) == ("PENDING", "BeginTime", 120, 160.0)
    (run / "DONE").write_text('{"step": 200}')
    (slurm.folder / "job").unlink()
    assert main(["status", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run}: finished; job 41 is UNKNOWN")


def test_a_job_id_of_another_cluster_is_not_looked_up(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = running(tmp_path, slurm)
    (run / "job.json").write_text((run / "job.json").read_text().replace("fake", "elsewhere"))
    assert main(["status", str(run)]) == 0
    assert "job 41 is UNKNOWN" in capsys.readouterr().out


def test_cancel_lets_a_job_that_trains_save(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = running(tmp_path, slurm, launched(0), {"event": "start", "step": 0}, {"event": "saved", "step": 100})
    assert main(["cancel", str(run)]) == 0
    assert "asked to save and stop" in capsys.readouterr().out
    assert (run / "STOP").exists() and "scancel 41" not in slurm.asked
    assert main(["cancel", str(run), "--now"]) == 0
    assert "scancel 41" in slurm.asked


@pytest.mark.parametrize(
    ("state", "events"),
    [
        ("RUNNING", [launched(0)]),
        ("RUNNING", [launched(0), {"event": "start"}, {"event": "stop"}, {"event": "requeue"}]),
        ("PENDING", [launched(0), {"event": "start"}]),
    ],
)
def test_a_job_that_does_not_train_is_cancelled_at_once(
    tmp_path: Path, slurm: FakeSlurm, state: str, events: list[dict[str, object]]
) -> None:
    run = running(tmp_path, slurm, *events)
    slurm.job_is(state)
    assert main(["cancel", str(run)]) == 0
    assert "scancel 41" in slurm.asked and not (run / "STOP").exists()


def test_what_cannot_be_watched_is_told(tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["status", str(tmp_path)], ["tail", str(tmp_path)], ["cancel", str(tmp_path)]):
        assert main(words) == 2
        assert "holds no run" in capsys.readouterr().err
    run = running(tmp_path, slurm)
    assert main(["tail", str(run), "--rank", "3"]) == 2
    assert "no process has started yet" in capsys.readouterr().err
    slurm.job_is("COMPLETED")
    assert main(["cancel", str(run)]) == 0
    assert "over already (COMPLETED)" in capsys.readouterr().out


def test_states(slurm: FakeSlurm) -> None:
    assert job_state("41") == "UNKNOWN"
    slurm.job_is("RUNNING")
    with pytest.raises(TimeoutError, match="job 41 is RUNNING"):
        wait("41", 0.05, poll_s=0.01)
    (slurm.folder / "job").write_text("JobState=COMPLETED x\nJobId=42 JobState=FAILED y\n")
    assert wait("41", 5) == "FAILED"
    (slurm.folder / "job").write_text("JobState=FAILED x\nJobId=42 JobState=PENDING y\n")
    assert job_state("41") == "PENDING"


@pytest.mark.parametrize(("seconds", "words"), [(3, "3 s"), (600, "10 min"), (9000, "2.5 h"), (3 * 86400, "3.0 days")])
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words
