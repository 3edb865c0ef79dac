"""Starts a test's own script as the ranks of a gloo world and brings back what each rank saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.runs import ROOT, environment, free_port


def run_ranks(module: str, folder: Path, *, processes: int = 2, timeout: float = 120) -> list[dict[str, Any]]:
    """Run `python -m module FOLDER` as `processes` ranks; each saves its findings with `save_findings`."""
    rendezvous = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [folder / f"rank-{rank}.log" for rank in range(processes)]
    ranks = []
    for rank, file in enumerate(logs):
        with file.open("wb") as log:
            own = {**environment(), **rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", module, str(folder)]
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=log, stderr=log))
    try:
        codes = [rank.wait(timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    told = "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)
    assert codes == [0] * processes, f"{module} ended with {codes}\n{told}"
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(processes)]


def save_findings(folder: Path, findings: dict[str, Any]) -> None:
    torch.save(findings, folder / f"rank-{os.environ['RANK']}.pt")
