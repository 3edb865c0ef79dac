"""Stand-ins for SLURM's commands, which answer as SLURM was seen to and write down what they were asked."""

from __future__ import annotations

import os
from pathlib import Path

SBATCH = """
case "$(grep -o 'partition=.*' "$1")" in *nowhere*)
  echo "sbatch: error: invalid partition specified: nowhere" >&2
  echo "sbatch: error: Batch job submission failed: Invalid partition name specified" >&2
  exit 1 ;;
esac
cp "$1" "$FAKE_SLURM/script"; env > "$FAKE_SLURM/environment"
echo "Submitted batch job 41"
"""
SCONTROL = """
case "$*" in
"show config") echo "ClusterName             = fake" ;;
"show job"*) [ ! -e "$FAKE_SLURM/job" ] || echo "JobId=41 JobName=x $(cat "$FAKE_SLURM/job") Dependency=(null)" ;;
"show node"*) echo "NodeName=x Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=x" ;;
esac
"""
SRUN = """
trap 'echo told to stop; exit 0' TERM
eval "${FAKE_STEP:-true}"
"""


class FakeSlurm:
    """A folder of commands to be put first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commands = folder / "bin"
        self.commands.mkdir(parents=True)
        silent = dict.fromkeys(("scancel", "sacct", "squeue"), "")
        for name, body in {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": SRUN, **silent}.items():
            file = self.commands / name
            file.write_text(f'#!/bin/bash\necho "{name} $*" >> "$FAKE_SLURM/asked"\n{body}')
            file.chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        return {"FAKE_SLURM": str(self.folder), "PATH": f"{self.commands}:{os.environ['PATH']}"}

    def job_is(self, state: str, reason: str = "None") -> None:
        """What `scontrol show job` tells from now on."""
        (self.folder / "job").write_text(f"JobState={state} Reason={reason}")

    @property
    def asked(self) -> list[str]:
        file = self.folder / "asked"
        return file.read_text().splitlines() if file.exists() else []
