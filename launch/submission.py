"""One training run becomes one SLURM job: checks, snapshot, script, record."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.executor import CHECKOUT, Executor, executor, submit
from launch.job import TrainJob
from launch.record import JobRecord, check_free, read_record
from launch.slurm_state import cluster_name
from launch.snapshot import Snapshot
from lmp.config import Config, check_run
from lmp.errors import UserError
from lmp.train.run_folder import RunFolder, write_atomic


@dataclass(frozen=True)
class Submission:
    """What is to be submitted.

    Args:
        config: the run's configuration, overrides applied.
        run: the run folder.
        command: what was typed, for the record.
        more: options of the start, [--new-data].
    """

    config: Config
    run: Path
    command: Sequence[str]
    more: Sequence[str] = ()

    @property
    def finished(self) -> int | None:
        """The step at which the run was finished, if there is nothing left to do."""
        step = RunFolder(self.run).finished_step()
        return step if step is not None and step >= self.config.train.steps else None

    def check(self, *, resume: str = "auto") -> None:
        """All that can be known to be wrong before any time is spent in a queue.

        Args:
            resume: "never" refuses a folder that holds a run already.

        Raises:
            UserError: the folder holds another run or is in use; data, ranks and configuration do not fit.
        """
        cluster = self.config.cluster
        if resume == "never" and RunFolder(self.run).config.exists():
            raise UserError(
                f"{self.run}: holds a run already", remedy="name another folder, or submit with --resume auto"
            )
        check_free(self.run)
        if cluster.environment is not None and not Path(cluster.environment).is_file():
            raise UserError(
                f"cluster.environment={cluster.environment}: no such file", remedy="name a shell file that is there"
            )
        RunFolder(self.run).check_same_run(self.config)
        from lmp.train.data import load_index

        # The cache is on the disks of the nodes; this machine is none of them.
        data = self.config.data.model_copy(update={"cache": type(self.config.data.cache)()})
        index = load_index(self.config.model_copy(update={"data": data}))
        check_run(self.config, world_size=cluster.world_size, modalities=index.modalities)

    def script(self) -> str:
        """The batch script as it would be submitted; writes nothing."""
        return self._executor(Snapshot.of(CHECKOUT, self.run)).script()

    def submit(self) -> JobRecord:
        """Take the snapshot and submit.

        Raises:
            UserError: sbatch refused; the run folder is as it was.
        """
        made = not self.run.exists()
        folder = self.run / "submitit"
        folder.mkdir(parents=True, exist_ok=True)
        snapshot = Snapshot.of(CHECKOUT, self.run)
        new = snapshot.take()
        before = read_record(self.run)
        earlier = [*before.earlier, before.job] if before else []
        config = folder / f"config-{len(earlier) + 1}.yaml"
        write_atomic(config, self.config.dump())
        job = None
        try:
            job = submit(self._executor(snapshot), TrainJob(str(self.run), [str(config), *self.more]))
        finally:
            if job is None:
                config.unlink()
                if new:
                    shutil.rmtree(snapshot.folder)
                if made:
                    shutil.rmtree(self.run)
        record = JobRecord(
            job=job.job_id,
            cluster=cluster_name(),
            submitted=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            directory=str(Path.cwd()),
            command=list(self.command),
            code=str(snapshot.folder),
            config=str(config),
            world_size=self.config.cluster.world_size,
            earlier=earlier,
        )
        record.write(self.run)
        RunFolder(self.run).note(
            "submit",
            job=record.job,
            command=shlex.join(self.command),
            code=snapshot.folder.name + (" (new)" if new else ""),
            nodes=self.config.cluster.nodes,
            world_size=record.world_size,
        )
        return record

    def _executor(self, snapshot: Snapshot) -> Executor:
        return executor(
            self.run / "submitit", self.config.cluster, name=self.config.name, code=snapshot.folder, run=self.run
        )
