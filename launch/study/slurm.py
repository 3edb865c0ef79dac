"""Runs the cells of a study as SLURM arrays, and watches them; the arrays need no launcher to go on.

All elements of an array ask for the same resources, so there is an array for each number of nodes and processes; each
waits for the one before it, so that the concurrency limit holds for all. A last array measures what is finished.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from launch.executor import CHECKOUT, executor, submit_array
from launch.follow import Request, TaskRequest, measure_finished, one_process, unmeasured
from launch.slurm_state import RESTART_SECONDS, answers, exit_code, is_over, known_state, may_go_on, slurm
from launch.snapshot import Snapshot
from launch.study.cells import Cell
from launch.study.collect import last_step
from launch.study.config import Study
from launch.study.folder import CellState, StudyFolder, last_words, runnable
from launch.study.job import run_cell
from lmp.cluster import ClusterConfig
from lmp.errors import EXIT_RESTARTS, EXIT_USER, UserError

EVALUATIONS = 2
"""How often the finished cells' evaluation is submitted in one start of a study."""


class SlurmRunner:
    """Submits and watches; the caller holds the study's lock.

    Args:
        folder, study, cells: opened.
        poll: seconds between two looks at the jobs.
    """

    def __init__(self, folder: StudyFolder, study: Study, cells: Sequence[Cell], *, poll: float = 5.0) -> None:
        self.folder, self.study, self.poll = folder, study, poll
        self.cells = {cell.name: cell for cell in runnable(cells)}
        self.states = folder.states()
        self.over_since: dict[str, float] = {}

    @cached_property
    def code(self) -> Snapshot:
        """Looked at where something is first submitted; later submissions of this start keep to it."""
        return Snapshot.of(CHECKOUT, self.folder.path)

    def start(self) -> None:
        """Find the jobs of an earlier start, and submit the cells that have none and are not done.

        Raises:
            UserError: no SLURM here, or sbatch refused.
        """
        if not answers():
            raise UserError("SLURM does not answer here", remedy="run on a login node, or on this machine with --local")
        self.states.evaluations = 0
        for name in self.cells:
            state = self.states.cells.setdefault(name, CellState())
            state.failures = 0
        self._recover()
        for name in self.cells:
            self._look(name, again=True)
        waiting = [name for name in self.cells if self.states.cells[name].state == "waiting"]
        self._submit(waiting)
        # An evaluation that waits for the very arrays that go on is enough.
        if (self._unmeasured() or self._active()) and (waiting or not self._measuring()):
            self._submit_evaluation()
        self.folder.save(self.states)

    def watch(self) -> None:
        """Until every cell is done or given up, and measured. Cells that fail are submitted again, within bounds."""
        console = Console(stderr=True)
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        shown: dict[str, TaskID] = {}
        told: dict[str, str] = {}
        with bar:
            total = bar.add_task("steps", total=sum(cell.steps or 0 for cell in self.cells.values()), state="")
            while True:
                for name in self.cells:
                    self._look(name)
                self._submit([name for name in self.cells if self.states.cells[name].state == "waiting"])
                active = self._active()
                measuring = self._measuring()
                if not active and not measuring and self._unmeasured() and self.states.evaluations < EVALUATIONS:
                    self._submit_evaluation()
                    measuring = True
                self.folder.save(self.states)
                self._show(bar, total, shown, told)
                if not active and not measuring:
                    return
                time.sleep(self.poll)

    def cancel(self) -> list[str]:
        """Cancel every job of the study, also while a launcher watches it; returns their ids. Writes nothing."""
        self._recover()
        jobs = [s.job for s in self.states.cells.values() if s.job and may_go_on(s.job)]
        jobs += [job for job in self.states.evaluation if may_go_on(job)]
        if jobs and (done := slurm("scancel", *jobs)).returncode:
            raise UserError(f"scancel: {done.stderr.strip()}", remedy="try again when the controller answers")
        for state in self.states.cells.values():
            if state.job in jobs:
                state.state, state.reason, state.job = "cancelled", "cancelled", None
        return jobs

    def _look(self, name: str, *, again: bool = False) -> None:
        """Bring what is known of a cell up to date; `again`: what was given up is to be tried once more."""
        state = self.states.cells[name]
        if self.folder.is_done(name):
            state.state, state.reason = "done", None
            return
        if state.job is None:
            if again:
                state.state, state.reason = "waiting", None
            return
        now = known_state(state.job)
        if now is None:
            return
        if not is_over(now):
            self.over_since.pop(state.job, None)
            state.state, state.reason = ("running" if now in ("RUNNING", "COMPLETING") else "submitted"), None
            return
        if now in ("NODE_FAIL", "PREEMPTED"):
            since = self.over_since.setdefault(state.job, time.monotonic())
            if time.monotonic() - since < RESTART_SECONDS:  # SLURM is about to start it again
                return
        self._over(name, state, now, again=again)

    def _over(self, name: str, state: CellState, now: str, *, again: bool) -> None:
        """The job of a cell that is not done is over: the cell waits for another one, or is given up."""
        words = last_words(self.folder.run_of(name))
        code = exit_code(state.job or "")
        state.job = None
        if again:
            state.state, state.reason = "waiting", None
        elif now in ("CANCELLED", "UNKNOWN"):  # SLURM forgets an element that was cancelled before it ran
            state.state, state.reason = "cancelled", f"its job was cancelled; {words}"
        elif now == "COMPLETED":
            state.state, state.reason = "stopped", words
        else:
            state.failures += 1
            final = code in (EXIT_USER, EXIT_RESTARTS) or state.failures > self.study.retries
            state.state = "failed" if final else "waiting"
            state.reason = f"{now}, exit code {code}: {words}" if code else f"{now}: {words}"

    def _recover(self) -> None:
        """Find the jobs of submissions that a kill of the launcher kept it from writing down."""
        for token, names in self.states.submissions.items():
            lost = [n for n in names if (s := self.states.cells[n]).token == token and s.job is None]
            if not lost:
                continue
            listed = slurm("squeue", "-h", "-r", "-o", "%F_%K", "--name", self._job_name(token))
            if listed.returncode:
                raise UserError(f"squeue: {listed.stderr.strip()}", remedy="try again when the controller answers")
            for job in listed.stdout.split():
                number = job.rpartition("_")[2]
                if number.isdigit() and names[int(number)] in lost:
                    self.states.cells[names[int(number)]].job = job

    def _submit(self, names: Sequence[str]) -> None:
        """Submit cells, an array for each kind of resources, small ones first, each after those before."""
        before = self._arrays()
        if names:
            self.code.take()
        for _, group in sorted(_by_resources([self.cells[name] for name in names]).items()):
            token = f"{time.time_ns():x}"
            chosen = [cell.name for cell in group]
            self.states.submissions[token] = chosen
            for name in chosen:
                state = self.states.cells[name]
                state.state, state.token, state.job = "submitted", token, None
                # Written by the processes of the run; they find it there before they come.
                self.folder.run_of(name).mkdir(parents=True, exist_ok=True)
            # On disk before the jobs are: what a kill keeps from being written down is found by the job's name.
            self.folder.save(self.states)
            made = executor(
                self.folder.path / "slurm" / token,
                cluster_of(group[0]),
                name=self._job_name(token),
                array_parallelism=self.study.concurrency,
                dependency=f"afterany:{':'.join(before)}" if before else None,
                code=self.code.folder,
            )
            calls = [
                (str(self.folder.states_file), n, token, str(self.folder.run_of(n)), str(self.folder.config_of(n)))
                for n in chosen
            ]
            for name, job in zip(chosen, submit_array(made, run_cell, calls), strict=True):
                self.states.cells[name].job = str(job.job_id)
            self.folder.save(self.states)
            before = [(self.states.cells[chosen[0]].job or "").partition("_")[0]]
            print(f"array {before[0]}: {len(chosen)} cells, {self.study.concurrency} at a time", flush=True)

    def _submit_evaluation(self) -> None:
        """An array that measures what is finished when all arrays are over, by as many jobs as cells run at a time."""
        evaluate = self.study.evaluate
        if evaluate is None:
            return
        arrays = self._arrays()
        runs = [str(self.folder.run_of(name)) for name in self.cells]
        parts = min(self.study.concurrency, len(runs))
        request = Request(
            tuple(evaluate.shards),
            tuple(evaluate.train_shards),
            evaluate.labels,
            seeds=evaluate.seeds,
            tasks=tuple(TaskRequest(one.task, one.labels, tuple(one.shards)) for one in evaluate.tasks),
        )
        self.code.take()
        made = executor(
            self.folder.path / "slurm" / "evaluation",
            one_process(cluster_of(next(iter(self.cells.values())))),
            name=f"{self.study.name}-evaluation",
            array_parallelism=parts,
            dependency=f"afterany:{':'.join(arrays)}" if arrays else None,
            code=self.code.folder,
        )
        jobs = submit_array(made, measure_finished, [(runs[n::parts], request) for n in range(parts)])
        earlier = [job for job in self.states.evaluation if may_go_on(job)]
        self.states.evaluation = [*earlier, *(str(job.job_id) for job in jobs)]
        self.states.evaluations += 1
        self.folder.save(self.states)

    def _active(self) -> list[str]:
        """Cells whose jobs are not over."""
        return [name for name in self.cells if self.states.cells[name].state in ("submitted", "running")]

    def _arrays(self) -> list[str]:
        """Ids of the arrays that these are elements of."""
        return sorted({job.partition("_")[0] for name in self._active() if (job := self.states.cells[name].job)})

    def _measuring(self) -> bool:
        return any(map(may_go_on, self.states.evaluation))

    def _unmeasured(self) -> bool:
        """Whether finished cells wait to be measured."""
        return self.study.evaluate is not None and any(unmeasured(self.folder.run_of(n), last=True) for n in self.cells)

    def _job_name(self, token: str) -> str:
        return f"{self.study.name}-{token}"

    def _show(self, bar: Progress, total: TaskID, shown: dict[str, TaskID], told: dict[str, str]) -> None:
        """A bar for each cell at work; without a terminal a line for each change."""
        made = 0
        for name, cell in self.cells.items():
            state = self.states.cells[name]
            step = (cell.steps or 0) if state.state == "done" else last_step(self.folder.run_of(name)) or 0
            made += step
            if state.state in ("running", "failed"):
                if name not in shown:
                    shown[name] = bar.add_task(name, total=cell.steps, state=state.state)
                bar.update(shown[name], completed=step, state=state.state)
            elif name in shown:
                bar.remove_task(shown.pop(name))
            if told.get(name) != state.state:
                told[name] = state.state
                if not bar.console.is_terminal:
                    print(f"{name}: {state.state}" + (f" ({state.reason})" if state.reason else ""), flush=True)
        done = sum(state.state == "done" for state in self.states.cells.values())
        measuring = ", measuring" if not self._active() and self.states.evaluation else ""
        bar.update(total, completed=made, state=f"{done} of {len(self.cells)} cells done{measuring}")


def cluster_of(cell: Cell) -> ClusterConfig:
    """What a cell asks of SLURM: its configuration's `cluster` section, with its own nodes and processes."""
    section = ClusterConfig.model_validate((cell.config or {}).get("cluster", {}))
    gpus = section.gpus_per_node is not None or (cell.prediction is not None and cell.prediction.device != "cpu")
    places = {"nodes": cell.nodes, "tasks_per_node": cell.processes, "gpus_per_node": cell.processes if gpus else None}
    return section.model_copy(update=places)


def _by_resources(cells: Sequence[Cell]) -> dict[tuple[int, int, int], list[Cell]]:
    found: dict[tuple[int, int, int], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.world_size, cell.nodes, cell.processes), []).append(cell)
    return found
