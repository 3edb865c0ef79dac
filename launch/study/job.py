"""What the SLURM jobs of a study call. Imports no torch, so that the job can set the number of threads before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.job import TrainJob


def run_cell(states: str, name: str, token: str, run: str, config: str) -> Any:
    """Train one cell, unless it was submitted again since (a launcher was killed while submitting)."""
    known = json.loads(Path(states).read_text(encoding="utf-8"))["cells"].get(name, {})
    if known.get("token") != token:
        print(f"{name} was submitted again; this job leaves it alone", flush=True)
        return None
    return TrainJob(run, [config])()
