"""`lmp demo`: the whole path, by the very commands that a user types, on films made here."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmp
from lmp.config import load_config
from lmp.errors import EXIT_DONE, UserError

TRAIN_FILMS, HELD_OUT_FILMS, SHOTS = 128, 20, 50
PROCESSES = 2
STOP_AFTER = 0.4


def demo(out: Path) -> int:
    """Films -> shots -> features -> shards -> a run on two processes, stopped and resumed -> evaluation -> export.

    Args:
        out: folder for everything; what is there already is kept, so an interrupted demo goes on.

    Returns:
        0 when every step succeeded and the model beat its rivals on held-out films.

    Raises:
        UserError: not started from a checkout.
    """
    checkout = Path(lmp.__file__).parents[1]
    if not (checkout / "launch" / "local.py").is_file():
        raise UserError(
            "lmp demo uses launch/ and tools/, which are not installed",
            remedy="run it from a checkout of lmp",
        )
    began = time.monotonic()
    out = out.resolve()
    films, shards, run, export = (out / name for name in ("films", "shards", "run", "export"))
    _make_films(films)
    for part in ("train", "held-out"):
        if not (shards / part / "manifest.json").is_file():
            _command("lmp.cli", "ingest", films / part, "--out", shards / part, "--workers", PROCESSES)
    _train_in_two_starts(checkout, shards, run)
    code = _call(
        "lmp.cli",
        "evaluate",
        run,
        shards / "held-out",
        "--train-shards",
        shards / "train",
        "--labels",
        films,
        "--check",
    )
    if code != EXIT_DONE:
        print(f"demo: evaluation ended with {code}; read {run / 'evaluation' / 'report.md'}", file=sys.stderr)
        return code
    _command("tools.export_huggingface", run, export, "--overwrite", cwd=checkout)
    print(f"\ndemo: done in {time.monotonic() - began:.0f} s. Look next at")
    print(f"  {run / 'evaluation' / 'report.md'}   what the model learnt, against its rivals")
    print(f"  {export / 'README.md'}   the exported model: AutoModel.from_pretrained(..., trust_remote_code=True)")
    print(f"  tensorboard --logdir {run / 'tensorboard'}")
    return EXIT_DONE


def _make_films(folder: Path) -> None:
    from lmp.films.synthetic import FilmSettings, make_films

    settings = FilmSettings(shots=SHOTS)
    print(
        f"making {TRAIN_FILMS + HELD_OUT_FILMS} films of {SHOTS} shots with sound and subtitles in {folder}",
        flush=True,
    )
    for part, films, seed in (("train", TRAIN_FILMS, 11), ("held-out", HELD_OUT_FILMS, 12)):
        target = folder / part
        if len(list(target.glob("*.mp4"))) < films:
            make_films(target, films=films, seed=seed, settings=settings, workers=PROCESSES, prefix=part)


def _train_in_two_starts(checkout: Path, shards: Path, run: Path) -> None:
    """Ask the run to stop on the way, then start the same command again."""
    config = checkout / "configs" / "demo.yaml"
    command = _line("launch.local", config, "-n", PROCESSES, "--run", run, f"data.train=[{shards / 'train'}]")
    if not (run / "DONE").is_file() and _steps_made(run) == 0:
        _show(command)
        enough = STOP_AFTER * load_config(config).train.steps
        with subprocess.Popen(command, cwd=checkout, env=_environment()) as process:
            while process.poll() is None and _steps_made(run) < enough:
                time.sleep(0.2)
            print("demo: asking the run to stop (SIGTERM), as a cluster would before preemption", flush=True)
            process.send_signal(signal.SIGTERM)
        if process.returncode != EXIT_DONE:
            raise SystemExit(process.returncode)
    _command(*command[2:], cwd=checkout)


def _steps_made(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.is_file() else 0


def _command(module: str, *arguments: object, cwd: Path | None = None) -> None:
    code = _call(module, *arguments, cwd=cwd)
    if code != EXIT_DONE:
        raise SystemExit(code)


def _call(module: str, *arguments: object, cwd: Path | None = None) -> int:
    line = _line(module, *arguments)
    _show(line)
    return subprocess.run(line, cwd=cwd, env=_environment(), check=False).returncode


def _show(line: list[str]) -> None:
    """Print a command as a user types it."""
    typed = ["lmp", *line[3:]] if line[2] == "lmp.cli" else ["python", *line[1:]]
    print(f"$ {shlex.join(typed)}", flush=True)


def _line(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def _environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
